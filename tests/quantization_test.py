"""Fake quantisation and the min-max step against closed forms; the worked example in small."""

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quadratics import RHO, ball_step, quadratic

from sam_jax import sharpness
from sam_jax.benchmarks import quantize_digits
from sam_jax.quantization import (
    fake_quantize,
    fake_quantize_activations,
    min_max_step,
    quantize_kernels,
    quantized_inputs,
)

LR_X, LR_Y = 0.1, 0.2
ASCENT = optax.sgd(LR_Y)


def _descent(method, base=None):
    return optax.chain(method, base or optax.sgd(LR_X))


def _kernel():
    """Of a convolution with 8 output channels of different sizes."""
    sizes = np.linspace(0.1, 3.0, 8)
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 8)) * sizes, jnp.float32)


# The grid.


@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_values_lie_on_the_grid(bits, per_channel):
    """2^bits - 1 levels, the outermost of which is the largest weight; the nearest of them."""
    w = np.asarray(_kernel())
    quantised = np.asarray(fake_quantize(w, bits, per_channel))
    n = 2 ** (bits - 1) - 1
    scale = np.abs(w).max(axis=(0, 1, 2) if per_channel else None) / n
    levels = quantised / scale
    np.testing.assert_allclose(levels, levels.round(), atol=1e-5)
    assert np.abs(levels.round()).max() == n and len(np.unique(levels.round())) <= 2**bits - 1
    assert per_channel == (len(np.unique(quantised)) > 2**bits - 1)
    assert (np.abs(quantised - w) <= scale * 0.50001).all()
    helpers.assert_trees_equal(fake_quantize(-w, bits, per_channel), -quantised)
    helpers.assert_trees_close(fake_quantize(quantised, bits, per_channel), quantised, rtol=1e-6)


def test_by_hand():
    w = jnp.array([[3.0, -0.4], [1.6, 0.3]])
    np.testing.assert_array_equal(fake_quantize(w, 3), [[3.0, 0.0], [2.0, 0.0]])
    np.testing.assert_allclose(
        fake_quantize(w, 3, per_channel=True), [[3.0, -0.4], [2.0, 0.4 * 2 / 3]], rtol=1e-6
    )
    np.testing.assert_array_equal(fake_quantize(w, 2), [[3.0, 0.0], [3.0, 0.0]])


@pytest.mark.parametrize('per_channel', [False, True])
def test_zeros_stay_and_are_differentiable(per_channel):
    w = _kernel().at[..., 0].set(0.0)
    assert (fake_quantize(w, 4, per_channel)[..., 0] == 0).all()
    value, grads = jax.value_and_grad(lambda w: jnp.sum(fake_quantize(w, 4, per_channel)))(0 * w)
    assert value == 0 and (grads == 1).all()


def test_gradients_go_straight_through():
    """Bit for bit that of the identity, in reverse and in forward mode."""
    w, direction = _kernel(), jnp.flip(_kernel())
    grads = jax.grad(lambda w: jnp.sum(direction * fake_quantize(w, 2)))(w)
    helpers.assert_trees_equal(grads, direction)
    tangent = jax.jvp(lambda w: fake_quantize(w, 2), (w,), (direction,))[1]
    helpers.assert_trees_equal(tangent, direction)


def test_only_kernels_are_quantised():
    params = {
        'conv': {'kernel': _kernel()},
        'norm': {'scale': jnp.linspace(0.5, 2.0, 8)},
        'head': {'kernel': _kernel()[0, 0], 'bias': jnp.linspace(-1.0, 1.0, 8)},
    }
    for per_channel in (False, True):
        quantised = quantize_kernels(params, 4, per_channel)
        assert quantised['norm']['scale'] is params['norm']['scale']
        assert quantised['head']['bias'] is params['head']['bias']
        for layer in ('conv', 'head'):
            helpers.assert_trees_equal(
                quantised[layer]['kernel'], fake_quantize(params[layer]['kernel'], 4, per_channel)
            )


@pytest.mark.parametrize('bits', [1, 0, -3])
def test_bad_bits(bits):
    with pytest.raises(ValueError, match=f'bits is {bits}; it must be at least 2'):
        fake_quantize(_kernel(), bits)


# The step.


def _saddle(seed=0):
    """f = x'Ax / 2 + x'By - y'Cy / 2: returns f, A, B, C, x, y in float64."""
    rng = np.random.default_rng(seed)
    b, x, y = rng.normal(size=(5, 3)), rng.normal(size=5), rng.normal(size=3)
    a, c = (m @ m.T + np.eye(len(m)) for m in (rng.normal(size=(5, 5)), rng.normal(size=(3, 3))))
    return lambda x, y: x @ a @ x / 2 + x @ b @ y - y @ c @ y / 2, a, b, c, x, y


@pytest.mark.parametrize('rho', [0.0, RHO])
def test_step_in_closed_form(rho, x64):
    """x+ = x - a (A (x + e) + B y), e = rho n(A x + B y);  y+ = y + b (B'x+ - C y)."""
    f, a, b, c, x, y = _saddle()
    x_new = x - LR_X * (a @ (x + ball_step(a @ x + b @ y, rho)) + b @ y)
    y_new = y + LR_Y * (b.T @ x_new - c @ y)
    descent = _descent(sharpness.sam(rho))
    result = min_max_step(f, x, y, (descent.init(x), ASCENT.init(y)), descent, ASCENT)
    helpers.assert_trees_close(result[:2], (x_new, y_new), rtol=1e-12)


def test_each_goes_its_way(x64):
    """By small steps the student lowers f and the generator raises it."""
    f, *_, x, y = _saddle()
    ascent = optax.sgd(1e-3)
    descent = _descent(sharpness.sam(1e-3), ascent)
    states = descent.init(x), ascent.init(y)
    x_new, y_new, _ = min_max_step(f, x, y, states, descent, ascent)
    assert f(x_new, y) < f(x, y) and f(x_new, y_new) > f(x_new, y)


def test_rho_zero_is_plain_min_max():
    """Bit for bit, for several compiled steps, and each compiles once."""
    f, *_, x, y = _saddle()
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    ends = []
    for method in (sharpness.sam(0.0), sharpness.erm()):
        ascent = optax.adam(LR_Y)
        descent = _descent(method, ascent)
        step = jax.jit(
            lambda *now, descent=descent, ascent=ascent: min_max_step(f, *now, descent, ascent)
        )
        now = x, y, (descent.init(x), ascent.init(y))
        for _ in range(3):
            now = step(*now)
        x_state, y_state = now[2]
        assert step._cache_size() == 1 and x_state[1][0].count == y_state[0].count == 3
        ends.append(now[:2])
    helpers.assert_trees_equal(*ends)


def test_zero_gradient_is_finite():
    f, *_, x, y = _saddle()
    x, y = jnp.zeros(x.shape), jnp.zeros(y.shape)
    descent = _descent(sharpness.sam(RHO))
    states = descent.init(x), ASCENT.init(y)
    helpers.assert_trees_equal(min_max_step(f, x, y, states, descent, ASCENT)[:2], (x, y))


def test_student_is_perturbed_before_it_is_rounded():
    """Its gradient is A Q(w + e), e = rho n(A Q(w)), straight through both times."""
    params, grad_fn, a = quadratic()
    w = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(params)])
    descent = _descent(sharpness.sam(RHO))
    states = descent.init(w), ASCENT.init(jnp.zeros(()))

    def f(w, y):
        quantised = fake_quantize(w, 3)
        return quantised @ a @ quantised / 2 - y**2

    moved = w + ball_step(a @ fake_quantize(w, 3), RHO)
    expected = w - LR_X * a @ fake_quantize(moved.astype(jnp.float32), 3)
    result, _, _ = min_max_step(f, w, jnp.zeros(()), states, descent, ASCENT)
    helpers.assert_trees_close(result, expected, rtol=1e-5)
    assert helpers.relative_distance(fake_quantize(moved, 3), fake_quantize(w, 3)) > 0.01


def test_other_arguments_reach_the_methods():
    f, *_, x, y = _saddle()
    descent = _descent(sharpness.random_sam(RHO))
    states = descent.init(jnp.asarray(x)), ASCENT.init(jnp.asarray(y))
    ends = [
        min_max_step(
            f, jnp.asarray(x), jnp.asarray(y), states, descent, ASCENT, key=jax.random.key(i)
        )[0]
        for i in (0, 0, 1)
    ]
    helpers.assert_trees_equal(*ends[:2])
    assert helpers.relative_distance(ends[2], ends[0]) > 1e-3


# The worked example.


def test_example_brings_the_student_to_its_teacher():
    """On images that it has not seen; and the generator's images suit the teacher's statistics."""
    model, shape = helpers.Net(), (8, 8, 1)
    images = jax.random.normal(jax.random.key(1), (64, *shape))
    latents = jax.random.normal(jax.random.key(2), (64, quantize_digits.LATENTS))
    teacher = jax.jit(model.init)(jax.random.key(0), images)
    generator = quantize_digits.Generator(shape, (0.5,), (0.5,))
    parts = dict(
        model=model,
        generator=generator,
        bits=2,
        ascent=optax.adam(1e-2),
        descent=_descent(sharpness.sam(0.05), optax.adam(1e-2)),
    )

    @jax.jit
    def measure(params, y):
        made = generator.apply({'params': y}, latents)
        return [
            quantize_digits.divergence(model, teacher, quantize_kernels(params, 2), x)
            for x in (images, made)
        ], quantize_digits.mismatch(model, teacher, made)

    _, first = quantize_digits.train_student(teacher, 0, 0, **parts)
    x, last = quantize_digits.train_student(teacher, 0, 40, **parts)
    before, after = measure(teacher['params'], last)[0], measure(x, last)[0]
    assert all(a < 0.6 * b for a, b in zip(after, before))
    assert measure(x, last)[1] < 0.3 * measure(x, first)[1]


# Activations.


def test_activations_by_hand():
    """Each token has its own scale; with one for all, the large tokens coarsen the small."""
    x = jnp.array([[3.0, -0.4, 1.6], [0.3, 0.2, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(
        fake_quantize_activations(x, 3), [[3, 0, 2], [0.3, 0.2, 0], [0, 0, 0]], rtol=1e-6
    )
    np.testing.assert_allclose(
        fake_quantize_activations(x, 3, per_token=False), [[3, 0, 2], [0, 0, 0], [0, 0, 0]]
    )
    grads = jax.grad(lambda x: jnp.sum(x * 0 + 2 * fake_quantize_activations(x, 3)))(x)
    assert (grads == 2).all()
    on_grid = jnp.array([[127.0, -3.0, 0.0, 64.0]]) / 16
    helpers.assert_trees_equal(fake_quantize_activations(on_grid, 8), on_grid)
    with pytest.raises(ValueError, match='bits is 1; it must be at least 2'):
        fake_quantize_activations(x, 1)


def test_dense_layers_are_given_rounded_numbers():
    layer, x = nn.Dense(2), jnp.array([[1.0, 0.3]])
    variables = {'params': {'kernel': jnp.eye(2), 'bias': jnp.array([0.1, 0.1])}}
    with quantized_inputs(2):
        rounded = layer.apply(variables, x)
    with quantized_inputs(None):
        as_it_is = layer.apply(variables, x)
    np.testing.assert_allclose(rounded, [[1.1, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(as_it_is, [[1.1, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(layer.apply(variables, x), [[1.1, 0.4]], rtol=1e-6)
