"""SAM in chains, accumulation, masked parts, on several devices, in any framework."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from quadratics import RHO, SIZES, ball_step, flat, quadratic, ravel, take_steps, update

from sam_jax import sharpness

# In company: chains, accumulation, masked parts, devices, frameworks


def test_chain_with_clipping_and_momentum_by_hand(x64):
    """Clipping sees the perturbed gradient; Nesterov momentum holds clipped perturbed ones."""
    params, grad_fn, a = quadratic(np.float64)
    lr, momentum, clip = 0.1, 0.9, 3.0
    tx = optax.chain(
        sharpness.sam(RHO), optax.clip_by_global_norm(clip), optax.sgd(lr, momentum, nesterov=True)
    )
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
        descent(),
        optax.chain(optax.contrib.normalize(), optax.sgd(RHO)),
        sync_period=2,
        opaque_mode=True,
    )

    def opaque_update(grads, state, params, *, grad_fn):
        return theirs.update(grads, state, params, grad_fn=lambda w, i: grad_fn(w))

    np.testing.assert_allclose(
        take_steps(optax.chain(sharpness.sam(RHO), descent()), grad_fn, params, 20),
        take_steps(
            optax.GradientTransformationExtraArgs(theirs.init, opaque_update), grad_fn, params, 20
        ),
        rtol=1e-10,
        atol=1e-12,
    )


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
        sharpness.sam(RHO), optax.MultiSteps(optax.sgd(lr), n).gradient_transformation()
    )

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


@pytest.mark.parametrize(
    'mask, keep',
    [({'a': True, 'b': [False, {'c': True}]}, [1, 0, 1]), ({'a': False, 'b': True}, [0, 1, 1])],
)
def test_inside_optax_masked(mask, keep, x64):
    """The part ascends alone; the other params keep their clean gradient."""
    params, grad_fn, a = quadratic(np.float64)
    w, keep = flat(params), np.repeat(keep, SIZES) == 1
    eps = np.zeros_like(w)
    eps[keep] = ball_step((a @ w)[keep], RHO)
    tx = optax.masked(sharpness.sam(RHO), mask)
    state = tx.init(params)
    updates, _ = jax.jit(
        lambda params: tx.update(
            grad_fn(params), state, params, grad_fn=sharpness.fill_masked(grad_fn, params)
        )
    )(params)
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
        per_device = jax.pmap(
            axis_name='batch',
            fun=lambda k: ravel(update(tx, lambda tree: unravel(grad(ravel(tree), k)), params)[0]),
        )
        return np.asarray(per_device(jnp.arange(devices)))

    expected = mean_of_ascents(grad, w, devices)
    wrong = run(sharpness.sam(RHO))
    assert (np.abs(wrong - expected).max(axis=1) > 0.1).all()
    assert np.abs(ascent_of_mean(grad, w, devices) - expected).max() > 0.01
    np.testing.assert_allclose(
        run(sharpness.sam(RHO), mean), np.tile(expected, (devices, 1)), rtol=1e-4, atol=1e-4
    )


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
    np.testing.assert_allclose(take_steps(tx, jax.grad(loss), params, 3), expected, rtol=1e-9)
