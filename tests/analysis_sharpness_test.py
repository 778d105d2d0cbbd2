"""Measures of sharpness: closed forms on quadratics, and m-sharpness written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysed import examples, network, objective
from jax.flatten_util import ravel_pytree
from quadratics import ball_step, flat, quadratic

from sam_jax.analysis import sharpness
from sam_jax.sharpness import ascent, sam

RHO = 0.3


class Quadratic:
    """L(w) = w'Aw / 2 as an objective; its error rate is L / 10."""

    def __init__(self, grad_fn):
        self.gradient = grad_fn

    def value(self, params):
        w = flat(params).astype(np.float64)
        loss = w @ flat(self.gradient(params)) / 2
        return {'loss': loss, 'error_rate': loss / 10}


def test_the_cosine_of_the_orders_on_a_quadratic(x64):
    """The whole gradient is that of w -> L(w + rho Aw / |Aw|), here by its closed form."""
    params, grad_fn, a = quadratic(np.float64)
    w = flat(params)
    g = a @ w
    n = g / np.linalg.norm(g)
    first = a @ (w + RHO * n)
    jacobian = np.eye(len(w)) + RHO / np.linalg.norm(g) * (np.eye(len(w)) - np.outer(n, n)) @ a
    whole = jacobian.T @ first
    expected = first @ whole / np.linalg.norm(first) / np.linalg.norm(whole)
    assert expected < 1 - 1e-6
    at = Quadratic(grad_fn)
    at.hessian_product = lambda params, v: grad_fn(v)
    found = sharpness.order_cosine(at, params, RHO)
    np.testing.assert_allclose(1 - found, 1 - expected, rtol=1e-6)


def test_the_cosine_of_the_orders_of_a_network(x64):
    """Against differences of its gradients."""
    at, params = objective()
    w, unravel = ravel_pytree(jax.device_get(params))

    def placed(vector):
        return at.layout.replicate(unravel(vector))

    def gradient(vector):
        return ravel_pytree(jax.device_get(at.gradient(placed(vector))))[0]

    def point(vector):
        g = gradient(vector)
        return vector + RHO * g / np.linalg.norm(g)

    first = gradient(point(w))
    n = gradient(w) / np.linalg.norm(gradient(w))
    across, h = first - (n @ first) * n, 1e-5
    bent = (gradient(w + h * across) - gradient(w - h * across)) / (2 * h)
    whole = first + RHO / np.linalg.norm(gradient(w)) * bent
    expected = first @ whole / np.linalg.norm(first) / np.linalg.norm(whole)
    assert expected < 1 - 1e-5
    found = sharpness.order_cosine(at, params, RHO)
    np.testing.assert_allclose(1 - found, 1 - expected, rtol=1e-4)


@pytest.mark.parametrize('p', [2.0, 1.5, np.inf])
def test_the_sam_step_on_a_quadratic(x64, p):
    params, grad_fn, a = quadratic(np.float64)
    rise = sharpness.of_ball(Quadratic(grad_fn), params, ascent.lp_ball(RHO, p))
    g = a @ flat(params)
    eps = ball_step(g, RHO, p)
    np.testing.assert_allclose(rise.sharpness, g @ eps + eps @ a @ eps / 2, rtol=1e-10)
    np.testing.assert_allclose(rise.error_rise, rise.sharpness / 10, rtol=1e-10)
    assert rise.count == 1 and np.isnan(rise.standard_error)


def test_projected_steps_climb_to_the_maximum_over_the_ball(x64):
    """At the maximum of a quadratic on the sphere A (w + eps) is parallel to eps."""
    params, grad_fn, a = quadratic(np.float64)
    w = flat(params)
    # (mu - A) eps = A w with mu above A's largest eigenvalue: |eps| falls as mu grows.
    low, high = np.linalg.eigvalsh(a)[-1] + 1e-9, 1e3
    for _ in range(200):
        mu = (low + high) / 2
        eps = np.linalg.solve(mu * np.eye(len(a)) - a, a @ w)
        low, high = (mu, high) if np.linalg.norm(eps) > RHO else (low, mu)
    highest = w @ a @ eps + eps @ a @ eps / 2
    rises = [
        sharpness.of_ball(
            Quadratic(grad_fn), params, ascent.projected_steps(RHO, k, step_size=0.5)
        ).sharpness
        for k in (2, 5, 30)
    ]
    assert rises[0] < rises[1] < rises[2] <= highest + 1e-12
    np.testing.assert_allclose(rises[2], highest, rtol=1e-3)


def test_adaptive_sharpness_is_that_of_the_ellipsoid(x64):
    """max of g'eps over |eps / |w|| <= rho is rho ||w g||, here with the curvature's term."""
    params, grad_fn, a = quadratic(np.float64)
    rise = sharpness.of_ball(
        Quadratic(grad_fn), params, ascent.metric_ball(RHO, ascent.adaptive_metric(0.0, 'all'))
    )
    w = flat(params)
    g = a @ w
    eps = RHO * w**2 * g / np.linalg.norm(w * g)
    np.testing.assert_allclose(rise.sharpness, g @ eps + eps @ a @ eps / 2, rtol=1e-10)


def test_the_average_direction_rises_by_the_mean_curvature(x64):
    """E over the sphere of L(rho u) - L(0) = rho^2 tr A / 2n."""
    params, grad_fn, a = quadratic(np.float64)
    rise = sharpness.of_average_direction(
        Quadratic(grad_fn), jax.tree.map(jnp.zeros_like, params), RHO, draws=200
    )
    expected = RHO**2 * np.trace(a) / (2 * len(a))
    assert rise.count == 200 and 0 < rise.standard_error < 0.1 * expected
    assert abs(rise.sharpness - expected) < 4 * rise.standard_error


def literal(m, count, rho, variables, model, weight_decay=0.0):
    """Loss and error, at w and above it, of each group of m examples, one after the other."""
    w, unravel = ravel_pytree(variables['params'])
    images, labels = examples(count)

    def loss(w, x, y):
        logits = model.apply({'params': unravel(w), 'batch_stats': variables['batch_stats']}, x)
        cross = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])
        wrong = (jnp.argmax(logits, -1) != y).astype(float)
        return cross + 0.5 * weight_decay * w @ w, jnp.mean(wrong)

    gradient = jax.jit(jax.grad(lambda *args: loss(*args)[0]))
    found = []
    for i in range(0, count - m + 1, m):
        part = images[i : i + m], labels[i : i + m]
        g = gradient(w, *part)
        found.append([*loss(w, *part), *loss(w + rho * g / jnp.linalg.norm(g), *part)])
    return np.array(found)


@pytest.mark.parametrize(
    ['m', 'devices', 'batch_size'],
    [
        (1, 4, 32),
        (7, 2, 32),
        (8, 4, 32),  # within devices, side by side
        (8, 4, 16),
        (40, 2, 32),
        (90, 2, 32),
    ],
)  # over devices
def test_m_sharpness_is_the_mean_over_groups(x64, m, devices, batch_size, monkeypatch):
    monkeypatch.setitem(sharpness._COPIED, 'cpu', 2**28)
    model, variables = network(dtype='float64')
    measured, params = objective(
        devices=devices,
        batch_size=batch_size,
        weight_decay=0.1,
        model_and_variables=(model, variables),
    )
    rise = sharpness.make_m_sharpness(measured, m, ascent.lp_ball(RHO))(
        params, measured.batch_stats
    )
    each = literal(m, 90, RHO, variables, model, weight_decay=0.1)
    assert rise.count == len(each) == 90 // m
    np.testing.assert_allclose(
        [rise.loss, rise.error_rate, rise.perturbed_loss, rise.perturbed_error_rate],
        each.mean(axis=0),
        rtol=1e-9,
    )
    rises = each[:, 2] - each[:, 0]
    np.testing.assert_allclose(
        rise.standard_error,
        rises.std(ddof=1) / np.sqrt(len(rises)) if len(rises) > 1 else np.nan,
        rtol=1e-6,
    )


def test_m_sharpness_with_other_statistics_and_one_copy_at_once(x64):
    model, variables = network(dtype='float64')
    measured, params = objective(devices=2, model_and_variables=(model, variables))
    other = jax.tree.map(lambda x: 2 * x, variables['batch_stats'])
    rise = sharpness.make_m_sharpness(measured, 4, ascent.lp_ball(RHO))(
        params, measured.layout.replicate(other)
    )
    each = literal(4, 90, RHO, {**variables, 'batch_stats': other}, model)
    np.testing.assert_allclose(rise.perturbed_loss, each[:, 2].mean(), rtol=1e-9)
    whole = sharpness.make_m_sharpness(measured, 90, ascent.lp_ball(RHO))
    replaced = dataclasses.replace(measured, batch_stats=measured.layout.replicate(other))
    assert whole(params, replaced.batch_stats).loss == replaced.value(params)['loss']


@pytest.mark.parametrize('m', [0, 91])
def test_groups_that_are_not_there_are_refused(m):
    measured, _ = objective(model_and_variables=network())
    with pytest.raises(ValueError, match=f'm is {m}; it must be at least 1 and at most the 90'):
        sharpness.make_m_sharpness(measured, m, ascent.lp_ball(RHO))


@pytest.mark.parametrize('rho,length', [(0.0, 1.0), (0.05, 2.0), (0.5, 0.1), (1e-9, 3.0)])
def test_edge_of_stability(rho, length):
    """There SAM's step with a gradient of that length turns a small deviation to its opposite."""
    lr = 0.1
    edge = sharpness.edge_of_stability(length, lr, rho)
    curvatures = jnp.array([edge, 0.5])
    w = jnp.array([0.0, length / 0.5])  # so that |g| hardly sees the deviation along the first axis
    tx = sam(rho)

    def step(w):
        def grad_fn(w):
            return curvatures * w

        return w - lr * tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]

    factor = jax.jacobian(step)(w)[0, 0]
    np.testing.assert_allclose(factor, -1.0, rtol=1e-4)
    below = sharpness.edge_of_stability(length, lr, 2 * rho + 0.01)
    assert below < edge <= 2 / lr * (1 + 1e-9)


def test_edge_of_stability_at_its_ends():
    assert sharpness.edge_of_stability(0.0, 0.1, 0.05) == 0
    assert (
        sharpness.edge_of_stability(0.0, 0.1, 0.0)
        == sharpness.edge_of_stability(1.0, 0.1, 0.0)
        == 20
    )
    assert sharpness.edge_of_stability(1.0, 0.0, 0.05) == np.inf
