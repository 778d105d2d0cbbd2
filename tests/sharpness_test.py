"""Sharpness-aware gradients against closed forms, hand-computed steps and their laws."""

import functools
import itertools

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from sam_jax import sharpness

PS = [2.0, 3.0, 1.5, np.inf]
RHO = 0.3
SIZES = [6, 4, 1]  # of the leaves of quadratic()'s params


def ball_step(g, rho, p=2.0):
    """Equation 2 of the SAM paper, literally, on a vector in float64."""
    g = np.asarray(g, np.float64)
    q = 1 / (1 - 1 / p)
    return rho * np.sign(g) * np.abs(g) ** (q - 1) / np.sum(np.abs(g) ** q) ** (1 / p)


def ravel(tree):
    return ravel_pytree(tree)[0]


def flat(tree):
    return np.asarray(ravel(tree))


def quadratic(dtype=np.float32, seed=0):
    """L(w) = w'Aw / 2 on a pytree: returns params, the gradient function and A."""
    rng = np.random.RandomState(seed)
    params = {'a': rng.randn(2, 3), 'b': [rng.randn(4), {'c': rng.randn()}]}
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    w, unravel = ravel_pytree(params)
    a = rng.randn(w.size, w.size)
    a = (a @ a.T / w.size + np.eye(w.size)).astype(dtype)
    return params, lambda tree: unravel(a @ ravel(tree)), a


def update(tx, grad_fn, params, state=None, **extra_args):
    state = tx.init(params) if state is None else state
    return tx.update(grad_fn(params), state, params, grad_fn=grad_fn, **extra_args)


def take_steps(tx, grad_fn, params, steps):
    """Params after every step, flat."""
    @jax.jit
    def step(params, state):
        updates, state = update(tx, grad_fn, params, state)
        return optax.apply_updates(params, updates), state

    state, trajectory = tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        trajectory.append(flat(params))
    return np.stack(trajectory)


def nans(tree):
    return jax.tree.map(lambda x: jnp.full_like(x, np.nan), tree)


# The closed form


@pytest.mark.parametrize('dtype, tol', [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize('p', PS)
def test_quadratic_closed_form(p, dtype, tol):
    with jax.enable_x64(dtype == np.float64):
        params, grad_fn, a = quadratic(dtype)
        tx = sharpness.sam(RHO, p)
        updates, state = update(tx, grad_fn, params)
        a, w = a.astype(np.float64), flat(params).astype(np.float64)
        eps = ball_step(a @ w, RHO, p)
        np.testing.assert_allclose(flat(updates), a @ (w + eps), rtol=tol, atol=tol)
        np.testing.assert_allclose(state.perturbation_norm, RHO, rtol=tol)
        assert flat(updates).dtype == dtype
        jitted, _ = jax.jit(functools.partial(update, tx, grad_fn))(params)
        np.testing.assert_allclose(flat(jitted), a @ (w + eps), rtol=tol, atol=tol)


@pytest.mark.parametrize('p', PS + [1.05, 7.0])
def test_step_is_the_maximiser_in_the_ball(p, x64):
    """||eps||_p = rho and <g, eps> = rho ||g||_q: by Hoelder no eps in the ball does better."""
    tree, *_ = quadratic(np.float64)
    ball = sharpness.ascent.lp_ball(RHO, p)
    g, eps = flat(tree), flat(ball.update(tree, ball.init(tree))[0])
    np.testing.assert_allclose(np.linalg.norm(eps, p), RHO, rtol=1e-12)
    np.testing.assert_allclose(g @ eps, RHO * np.linalg.norm(g, 1 / (1 - 1 / p)), rtol=1e-12)


@pytest.mark.parametrize('p, scale', [
    *itertools.product([1.05, 1.5, 3.0, 7.0, np.inf], [1e-30, 1e-12, 1e12, 1e30]),
    *itertools.product([2.0], [1e-15, 1e15])])  # there the squares are still in range
def test_step_does_not_depend_on_the_scale_of_the_gradient(p, scale):
    """In float32 |g|^(q-1) leaves the float range long before g does (q = 21 for p = 1.05)."""
    tree, *_ = quadratic()
    scaled = jax.tree.map(lambda x: x * np.float32(scale), tree)
    ball = sharpness.ascent.lp_ball(RHO, p)
    eps, _ = ball.update(scaled, ball.init(tree))
    np.testing.assert_allclose(flat(eps), ball_step(flat(tree), RHO, p), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
        sharpness.ascent.lp_norm(scaled, p) / np.float32(scale),
        np.linalg.norm(flat(tree), p), rtol=1e-5)


# The laws


@pytest.mark.parametrize('rho', [0.0, np.float32(0), lambda count: 0.0 * count])
@pytest.mark.parametrize('p', PS)
def test_rho_zero_gives_the_base_gradient_bitwise(p, rho):
    """Whatever comes back from grad_fn: even NaN is left aside, so nothing is blended."""
    params, grad_fn, _ = quadratic()
    grads = grad_fn(params)
    tx = sharpness.sam(rho, p)
    for run in (tx.update, jax.jit(tx.update, static_argnames='grad_fn')):
        updates, state = run(grads, tx.init(params), params, grad_fn=nans)
        helpers.assert_trees_equal(updates, grads)
        assert state.perturbation_norm == 0


@pytest.mark.parametrize('p', PS + [1.05])
def test_zero_gradient_gives_zero_perturbation(p):
    """Alone, under jit, and as one row of a vmap whose other row is perturbed as ever."""
    params, grad_fn, a = quadratic()
    tx = sharpness.sam(RHO, p)
    seen = []

    def spy(moved):
        seen.append(moved)
        return grad_fn(moved)

    zero = jax.tree.map(jnp.zeros_like, params)
    for run in (tx.update, jax.jit(tx.update, static_argnames='grad_fn')):
        updates, state = run(zero, tx.init(params), params, grad_fn=spy)
        helpers.assert_trees_equal(updates, zero)
        assert state.perturbation_norm == 0
    helpers.assert_trees_equal(seen[0], params)

    stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
    rows, _ = jax.vmap(lambda g: tx.update(g, tx.init(params), params, grad_fn=grad_fn))(
        stack(zero, grad_fn(params)))
    helpers.assert_trees_equal(jax.tree.map(lambda x: x[0], rows), zero)
    w = flat(params)
    np.testing.assert_allclose(
        flat(jax.tree.map(lambda x: x[1], rows)), a @ (w + ball_step(a @ w, RHO, p)), rtol=1e-4)


@pytest.mark.parametrize('p', PS)
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_diverged_gradient_stays_visible(value, p):
    params, grad_fn, _ = quadratic()
    grads = grad_fn(params)
    grads['b'][1]['c'] = jnp.asarray(value, jnp.float32)
    tx = sharpness.sam(RHO, p)
    updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    if not (p == np.inf and value == np.inf):  # the sign of inf is a good direction
        assert np.isnan(state.perturbation_norm)
        assert np.isnan(flat(updates)).any()


def test_bfloat16_params_are_perturbed_in_float32():
    """And the result has the dtype of the gradient again."""
    params, grad_float32, _ = quadratic()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    seen = []

    def grad_fn(tree):  # in the dtype of its argument, as jax.grad
        seen.append(tree)
        full = grad_float32(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
        return jax.tree.map(lambda g, x: g.astype(x.dtype), full, tree)

    updates, state = update(sharpness.sam(0.05), grad_fn, half)
    _, moved = seen
    assert {x.dtype for x in jax.tree.leaves(moved)} == {np.dtype(np.float32)}
    w, g = (flat(t).astype(np.float64) for t in (half, grad_fn(half)))
    np.testing.assert_allclose(flat(moved) - w, ball_step(g, 0.05), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(state.perturbation_norm, 0.05, rtol=1e-6)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {np.dtype(jnp.bfloat16)}
    expected = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grad_fn(moved))
    helpers.assert_trees_equal(updates, expected)


# Gates


def every_other():
    """Open at updates 0, 2, 4, ..., as a traced decision."""
    return sharpness.gate.Gate(lambda params: (), lambda g, state, count: (count % 2 == 0, state))


def gated_sam(gate):
    return sharpness.sharpness_aware(sharpness.ascent.lp_ball(RHO), gate=gate)


def test_gate_decides_which_steps_pay():
    params, grad_fn, a = quadratic()
    calls = []

    def counted(moved):
        jax.debug.callback(lambda: calls.append(1))
        return grad_fn(moved)

    tx = gated_sam(every_other())
    step = jax.jit(lambda g, state: tx.update(g, state, params, grad_fn=counted))
    grads, state, w = grad_fn(params), tx.init(params), flat(params)
    for count in range(7):
        updates, state = step(grads, state)
        jax.effects_barrier()
        assert len(calls) == count // 2 + 1
        if count % 2:
            helpers.assert_trees_equal(updates, grads)
        else:
            np.testing.assert_allclose(
                flat(updates), a @ (w + ball_step(a @ w, RHO)), rtol=1e-5)
        np.testing.assert_allclose(state.perturbation_norm, RHO * (count % 2 == 0), rtol=1e-6)
        assert state.count == count + 1


def test_shut_gate_leaks_no_nan():
    """Neither through lax.cond nor through the select that vmap makes of it."""
    params, grad_fn, _ = quadratic()
    grads = grad_fn(params)
    tx = gated_sam(every_other())
    state = tx.init(params)._replace(count=jnp.ones((), jnp.int32))
    updates, _ = jax.jit(lambda s: tx.update(grads, s, params, grad_fn=nans))(state)
    helpers.assert_trees_equal(updates, grads)
    counts = jnp.arange(2, dtype=jnp.int32)
    updates, _ = jax.vmap(
        lambda c: tx.update(grads, state._replace(count=c), params, grad_fn=nans))(counts)
    helpers.assert_trees_equal(jax.tree.map(lambda x: x[1], updates), grads)
    assert np.isnan(flat(jax.tree.map(lambda x: x[0], updates))).all()


@pytest.mark.parametrize('tx', [sharpness.erm(), gated_sam(sharpness.gate.never())])
def test_gate_that_is_never_open_does_not_call_grad_fn(tx):
    params, grad_fn, _ = quadratic()

    def forbidden(moved):
        raise AssertionError('called')

    updates, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=forbidden)
    helpers.assert_trees_equal(updates, grad_fn(params))
    assert (state.count, state.perturbation_norm) == (1, 0)


# rho


@pytest.mark.parametrize('kind', [float, np.float32, np.float64, jnp.float32, jnp.asarray])
def test_rho_of_any_scalar_kind(kind):
    params, grad_fn, a = quadratic()
    updates, _ = update(sharpness.sam(kind(RHO)), grad_fn, params)
    w = flat(params)
    np.testing.assert_allclose(flat(updates), a @ (w + ball_step(a @ w, RHO)), rtol=1e-5)


@pytest.mark.parametrize('p', PS)
def test_sweep_over_rho_compiles_once(p):
    params, grad_fn, a = quadratic()
    w = flat(params)
    swept = jax.jit(lambda rho: update(sharpness.sam(rho, p), grad_fn, params)[0])
    for rho in (0.0, 0.05, 0.7):
        np.testing.assert_allclose(
            flat(swept(rho)), a @ (w + ball_step(a @ w, rho, p)), rtol=1e-5, atol=1e-5)
    assert swept._cache_size() == 1


def test_schedule_of_rho_follows_the_count():
    """The k-th update, from 0, uses schedule(k)."""
    params, grad_fn, a = quadratic()
    tx = sharpness.sam(optax.piecewise_constant_schedule(0.1, {1: 3.0, 3: 0.0}))
    step = jax.jit(functools.partial(update, tx, grad_fn))
    state, w = tx.init(params), flat(params)
    for rho in (0.1, 0.3, 0.3, 0.0):
        updates, state = step(params, state)
        np.testing.assert_allclose(flat(updates), a @ (w + ball_step(a @ w, rho)), rtol=1e-5)
        np.testing.assert_allclose(state.perturbation_norm, rho, rtol=1e-6)


# Masks


MASKS = {  # and which of the leaves a, b, c they keep
    'full': ({'a': True, 'b': [False, {'c': True}]}, (1, 0, 1)),
    'prefix': ({'a': True, 'b': False}, (1, 0, 0)),
    'numpy': ({'a': np.False_, 'b': [np.True_, np.False_]}, (0, 1, 0)),
    'function': (lambda params: jax.tree.map(lambda w: w.ndim < 2, params), (0, 1, 1)),
    'everything': (True, (1, 1, 1)),
}


@pytest.mark.parametrize('p', PS)
@pytest.mark.parametrize('kind', MASKS)
def test_mask(kind, p):
    """The norm is over the masked leaves; the result is the gradient of all, there."""
    params, grad_fn, a = quadratic()
    mask, leaves = MASKS[kind]
    keep = np.repeat(leaves, SIZES) == 1
    w = flat(params)
    eps = np.zeros_like(w)
    eps[keep] = ball_step((a @ w)[keep], RHO, p)
    updates, state = update(sharpness.sam(RHO, p, mask), grad_fn, params)
    np.testing.assert_allclose(flat(updates), a @ (w + eps), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.perturbation_norm, RHO, rtol=1e-5)
    ball = sharpness.ascent.lp_ball(RHO, p, mask)
    moved, _ = ball.update(grad_fn(params), ball.init(params), params)
    assert (flat(moved)[~keep] == 0).all()


def test_mask_of_nothing_gives_the_base_gradient():
    params, grad_fn, _ = quadratic()
    updates, _ = update(sharpness.sam(RHO, mask=False), grad_fn, params)
    helpers.assert_trees_equal(updates, grad_fn(params))


# In company: chains, accumulation, masked parts, devices, frameworks


def test_chain_with_clipping_and_momentum_by_hand(x64):
    """Clipping sees the perturbed gradient; Nesterov momentum holds clipped perturbed ones."""
    params, grad_fn, a = quadratic(np.float64)
    lr, momentum, clip = 0.1, 0.9, 3.0
    tx = optax.chain(
        sharpness.sam(RHO), optax.clip_by_global_norm(clip), optax.sgd(lr, momentum, nesterov=True))
    w, trace, expected, norms = flat(params), 0.0, [], []
    for _ in range(8):
        g = a @ (w + ball_step(a @ w, RHO))
        norms.append(np.linalg.norm(g))
        g *= min(1.0, clip / norms[-1])
        trace = g + momentum * trace
        w = w - lr * (g + momentum * trace)
        expected.append(w)
    assert min(norms) < clip < max(norms)
    np.testing.assert_allclose(take_steps(tx, grad_fn, params, 8), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_equals_optax_contrib_sam(momentum, x64):
    params, grad_fn, _ = quadratic(np.float64)
    descent = functools.partial(optax.sgd, 0.05, momentum)
    theirs = optax.contrib.sam(
        descent(), optax.chain(optax.contrib.normalize(), optax.sgd(RHO)),
        sync_period=2, opaque_mode=True)

    def opaque_update(grads, state, params, *, grad_fn):
        return theirs.update(grads, state, params, grad_fn=lambda w, i: grad_fn(w))

    np.testing.assert_allclose(
        take_steps(optax.chain(sharpness.sam(RHO), descent()), grad_fn, params, 20),
        take_steps(optax.GradientTransformationExtraArgs(theirs.init, opaque_update),
                   grad_fn, params, 20), rtol=1e-10, atol=1e-12)


def batches(n, dtype=np.float64):
    """Returns (w, k) -> the gradient of |A_k w - b_k|^2 / 2, the loss on batch k of n."""
    rng = np.random.RandomState(1)
    a, b = (jnp.asarray(rng.randn(*shape), dtype) for shape in [(n, 5, 11), (n, 5)])
    return lambda w, k: a[k].T @ (a[k] @ w - b[k])


def mean_of_ascents(grad, w, n):
    """mean_k grad_k(w + rho g_k / |g_k|): every batch ascends by its own gradient."""
    return np.mean([grad(w + ball_step(grad(w, k), RHO), k) for k in range(n)], axis=0)


def ascent_of_mean(grad, w, n):
    """mean_k grad_k(w + rho g / |g|) with g = mean_k g_k: what must not happen."""
    eps = ball_step(np.mean([grad(w, k) for k in range(n)], axis=0), RHO)
    return np.mean([grad(w + eps, k) for k in range(n)], axis=0)


def test_in_front_of_multi_steps_each_micro_batch_ascends_alone(x64):
    n, lr, grad = 4, 0.01, batches(4)
    params, *_ = quadratic(np.float64)
    w, unravel = ravel_pytree(params)
    assert np.abs(mean_of_ascents(grad, w, n) - ascent_of_mean(grad, w, n)).max() > 0.01
    tx = optax.chain(
        sharpness.sam(RHO), optax.MultiSteps(optax.sgd(lr), n).gradient_transformation())

    @jax.jit
    def micro_step(params, state, k):
        updates, state = update(tx, lambda t: unravel(grad(ravel(t), k)), params, state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for step in range(2 * n):
        params, state = micro_step(params, state, step % n)
        if step % n == n - 1:
            w = w - lr * mean_of_ascents(grad, w, n)
        np.testing.assert_allclose(flat(params), w, rtol=2e-6)  # MultiSteps is float32


@pytest.mark.parametrize('mask, keep', [
    ({'a': True, 'b': [False, {'c': True}]}, [1, 0, 1]), ({'a': False, 'b': True}, [0, 1, 1])])
def test_inside_optax_masked(mask, keep, x64):
    """The part ascends alone; the other params keep their clean gradient."""
    params, grad_fn, a = quadratic(np.float64)
    w, keep = flat(params), np.repeat(keep, SIZES) == 1
    eps = np.zeros_like(w)
    eps[keep] = ball_step((a @ w)[keep], RHO)
    tx = optax.masked(sharpness.sam(RHO), mask)
    state = tx.init(params)
    updates, _ = jax.jit(lambda params: tx.update(
        grad_fn(params), state, params, grad_fn=sharpness.fill_masked(grad_fn, params)))(params)
    np.testing.assert_allclose(flat(updates), np.where(keep, a @ (w + eps), a @ w), rtol=1e-12)
    with pytest.raises(TypeError, match=r'optax\.masked .* grad_fn=sharpness\.fill_masked\('):
        tx.update(grad_fn(params), state, params, grad_fn=grad_fn)


@pytest.mark.parametrize('devices', [2, 8])
def test_under_pmap_each_device_ascends_alone(devices):
    """And the mean comes after: without it, or before the ascent, another step is taken."""
    grad = batches(devices, np.float32)
    params, *_ = quadratic()
    w, unravel = ravel_pytree(params)
    mean = optax.stateless(lambda g, _: jax.lax.pmean(g, 'batch'))

    def run(*links):
        tx = optax.chain(*links)
        per_device = jax.pmap(axis_name='batch', fun=lambda k: ravel(update(
            tx, lambda tree: unravel(grad(ravel(tree), k)), params)[0]))
        return np.asarray(per_device(jnp.arange(devices)))

    expected = mean_of_ascents(grad, w, devices)
    wrong = run(sharpness.sam(RHO))
    assert (np.abs(wrong - expected).max(axis=1) > 0.1).all()
    assert np.abs(ascent_of_mean(grad, w, devices) - expected).max() > 0.01
    np.testing.assert_allclose(
        run(sharpness.sam(RHO), mean), np.tile(expected, (devices, 1)), rtol=1e-4, atol=1e-4)


X = np.random.RandomState(2).randn(8, 3)
Y = np.random.RandomState(3).randn(8, 2)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(4)(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.outer = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.tanh(self.inner(x)))


def linen_net(x):
    net = LinenNet()
    return net.init(jax.random.key(0), x), lambda params: net.apply(params, x)


def nnx_net(x):
    graph, params, rest = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, ...)
    return params, lambda params: nnx.merge(graph, params, rest)(x)


def plain_net(x):
    rng = np.random.RandomState(4)
    params = {'layers': [rng.randn(3, 4), rng.randn(4, 2)], 'scale': rng.randn()}
    return params, lambda p: p['scale'] * jnp.tanh(x @ p['layers'][0]) @ p['layers'][1]


@pytest.mark.parametrize('net', [linen_net, nnx_net, plain_net])
def test_any_framework_takes_the_step_of_the_formula(net, x64):
    """w <- w - lr grad L(w + rho g / |g|), on whatever pytree the framework has."""
    params, predict = net(jnp.asarray(X))
    params = jax.tree.map(lambda w: jnp.asarray(w, float), params)

    def loss(params):
        return jnp.mean((predict(params) - Y) ** 2)

    w, unravel = ravel_pytree(params)
    grad = jax.jit(jax.grad(lambda w: loss(unravel(w))))
    expected = []
    for _ in range(3):
        w = w - 0.1 * grad(w + ball_step(grad(w), RHO))
        expected.append(w)
    tx = optax.chain(sharpness.sam(RHO), optax.sgd(0.1))
    np.testing.assert_allclose(
        take_steps(tx, jax.grad(loss), params, 3), expected, rtol=1e-9)


# The contract: errors, extra arguments, aux, states


@pytest.mark.parametrize('arguments, message', [
    ({'rho': -0.1}, 'rho is -0.1'),
    ({'rho': -1}, 'rho is -1'),
    ({'rho': np.nan}, 'rho is nan'),
    ({'rho': np.inf}, 'rho is inf'),
    ({'rho': 0.1, 'p': 1.0}, 'p is 1.0'),
    ({'rho': 0.1, 'p': 1}, 'p is 1;'),
    ({'rho': 0.1, 'p': 0.5}, 'p is 0.5'),
    ({'rho': 0.1, 'p': -2.0}, 'p is -2.0'),
    ({'rho': 0.1, 'p': np.nan}, 'p is nan'),
])
def test_impossible_ball(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        sharpness.sam(**arguments)
    assert error.type is ValueError


@pytest.mark.parametrize('tx', [sharpness.sam(RHO), sharpness.erm()])
def test_missing_arguments(tx):
    params, grad_fn, _ = quadratic()
    state, message = tx.init(params), 'needs the params and a gradient function'
    with pytest.raises(TypeError, match=message):
        tx.update(params, state, params)
    with pytest.raises(TypeError, match=message):
        tx.update(params, state, grad_fn=grad_fn)


def test_extra_arguments_reach_the_ascent():
    """An ascent may ask for more; one that does not is not disturbed by it."""
    def ascend(grads, state, params, *, factor):
        return jax.tree.map(lambda g: factor * g, grads), state

    params, grad_fn, a = quadratic()
    w = flat(params)
    ascent = optax.GradientTransformationExtraArgs(lambda params: (), ascend)
    updates, state = update(
        sharpness.sharpness_aware(ascent), grad_fn, params, factor=0.5)
    np.testing.assert_allclose(flat(updates), a @ (w + 0.5 * a @ w), rtol=1e-5)
    np.testing.assert_allclose(state.perturbation_norm, 0.5 * np.linalg.norm(a @ w), rtol=1e-5)
    helpers.assert_trees_equal(*(update(sharpness.sam(RHO), grad_fn, params, **extra)[0]
                                 for extra in ({}, {'factor': 0.5})))


def test_aux_of_the_perturbed_pass():
    """With the gate shut it is the aux given; the decision may be traced."""
    params, grad_fn, a = quadratic()
    w = flat(params)

    def loss_at(w):
        return {'loss': w @ a @ w / 2}

    def grad_and_aux(tree):
        return grad_fn(tree), loss_at(ravel(tree))

    grads, clean = grad_and_aux(params)
    moved = w + ball_step(a @ w, RHO)
    opened, shut = (a @ moved, loss_at(moved)), (a @ w, clean)
    assert opened[1]['loss'] > 1.05 * clean['loss']
    for gate, expected in [(sharpness.gate.always(), [opened, opened]),
                           (sharpness.gate.never(), [shut, shut]), (every_other(), [opened, shut])]:
        tx = gated_sam(gate)
        step = jax.jit(functools.partial(tx.update, grad_fn=grad_and_aux))
        state = tx.init(params)
        for expected_updates, expected_aux in expected:
            (updates, aux), state = step(grads, state, params, aux=clean)
            np.testing.assert_allclose(flat(updates), expected_updates, rtol=1e-5)
            helpers.assert_trees_close(aux, expected_aux)


SETTINGS = {'rho': RHO, 'p': 2.0}


@pytest.fixture(params=sharpness.METHODS)
def method(request):
    """A constructor from settings, for each method that config.sam.method may name."""
    return lambda **changes: sharpness.create(request.param, **{**SETTINGS, **changes})


def test_method_is_finite_at_zero_gradient(method):
    params, grad_fn, _ = quadratic()
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = method()
    updates, state = tx.update(zero, tx.init(zero), zero, grad_fn=grad_fn)
    helpers.assert_trees_equal(updates, zero)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_method_with_rho_zero_is_the_base(method):
    params, grad_fn, _ = quadratic()
    updates, _ = update(method(rho=0.0), grad_fn, params)
    helpers.assert_trees_equal(updates, grad_fn(params))


def test_method_keeps_the_type_of_its_state(method):
    """So that the state can be donated and checkpointed, and the step compiles once."""
    params, grad_fn, _ = quadratic()
    tx = method()
    step = jax.jit(lambda params, state: update(tx, grad_fn, params, state), donate_argnums=1)
    state = tx.init(params)
    kinds = jax.tree.map(jax.typeof, state)
    for _ in range(3):
        _, state = step(params, state)
        assert jax.tree.map(jax.typeof, state) == kinds
    assert step._cache_size() == 1
    assert state.count == 3


def test_create_takes_what_the_method_takes():
    params, grad_fn, _ = quadratic()
    made = sharpness.create('sam', rho=RHO, p=3.0, alpha=0.2, k=5)
    helpers.assert_trees_equal(*(update(tx, grad_fn, params)[0]
                                 for tx in (made, sharpness.sam(RHO, p=3.0))))
    base, _ = update(sharpness.create('sgd', **SETTINGS), grad_fn, params)
    helpers.assert_trees_equal(base, grad_fn(params))
