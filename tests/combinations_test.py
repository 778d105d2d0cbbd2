"""What each combination of gradients computes, against its formula in NumPy on a quadratic."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.linalg import norm
from quadratics import RHO, drive, flat, layers, ravel, under

from sam_jax import sharpness
from sam_jax.sharpness import combine

pytestmark = pytest.mark.usefixtures('x64')


def _two(problem, rho=RHO):
    _, _, a, w, g = problem
    return g, a @ (w + rho * g / norm(g))


@pytest.mark.parametrize('alpha', [0.4, 1.3])
def test_gsam(problem, alpha):
    params, loss, *_ = problem
    g, g_p = _two(problem)
    orthogonal = g - (g @ g_p) / (g_p @ g_p) * g_p
    updates, _ = drive(sharpness.gsam(RHO, alpha), loss, params)
    np.testing.assert_allclose(flat(updates), g_p - alpha * orthogonal, rtol=1e-10)
    np.testing.assert_allclose(orthogonal @ g_p, 0, atol=1e-10)
    np.testing.assert_allclose(
        flat(updates) @ flat(updates), g_p @ g_p + alpha**2 * orthogonal @ orthogonal
    )


def test_gnp_is_the_gradient_of_the_penalty(problem):
    """To first order: (result - g) / alpha -> rho grad ||grad L||, on a loss with a Hessian."""
    params, *_ = problem

    def loss(tree):
        return jnp.sum(jnp.cosh(ravel(tree))) + jnp.prod(ravel(tree)[:4])

    rho, alpha = 1e-5, 0.8
    updates, _ = drive(sharpness.gnp(rho, alpha), loss, params)
    penalised = jax.grad(
        lambda tree: loss(tree) + alpha * rho * jnp.linalg.norm(ravel(jax.grad(loss)(tree)))
    )(params)
    plain = jax.grad(loss)(params)
    helpers.assert_trees_close(
        jax.tree.map(jnp.subtract, updates, plain),
        jax.tree.map(jnp.subtract, penalised, plain),
        rtol=1e-3,
        atol=1e-9,
    )


@pytest.mark.parametrize('gamma', [0.2, 0.9])
def test_wsam(problem, gamma):
    params, loss, *_ = problem
    g, g_p = _two(problem)
    a = gamma / (1 - gamma)
    coupled, _ = drive(sharpness.wsam(RHO, gamma, decoupled=False), loss, params)
    np.testing.assert_allclose(flat(coupled), (1 - a) * g + a * g_p, rtol=1e-10)
    updates, state = drive(sharpness.wsam(RHO, gamma), loss, params)
    np.testing.assert_allclose(flat(updates), g, rtol=1e-10)
    total = sharpness.add_correction(jax.tree.map(lambda u: -0.1 * u, updates), state, 0.1)
    np.testing.assert_allclose(flat(total), -0.1 * g - 0.1 * a * (g_p - g), rtol=1e-10)


def _constrain(g_p, g, low, up):
    cosine = g_p @ g / norm(g_p) / norm(g)
    z = (g_p + g) / norm(g_p + g)
    if cosine >= up:
        return g_p
    return g if low > 0 and cosine <= low else (g_p @ z) * z


@pytest.mark.parametrize('low', [0.5, 0.0])
@pytest.mark.parametrize('angle', [0.3, 0.9, 1.5, 2.5])
def test_gradient_constrained_at_several_angles(angle, low):
    """Unit vectors g_p at an angle to g with |g| = 2: g_p; the projection (0.672, 0.469); g."""
    g_p, g = np.array([1.0, 0.0]), 2 * np.array([np.cos(angle), np.sin(angle)])
    made = combine.gradient_constrained(low, 0.8)
    result, _ = made.combine({'w': jnp.array(g)}, {'w': jnp.array(g_p)}, (), None)
    expected = _constrain(g_p, g, low, 0.8)
    np.testing.assert_allclose(result['w'], expected, rtol=1e-10)
    if low:
        known = {0.3: g_p, 0.9: [0.672, 0.469], 1.5: g, 2.5: g}[angle]
        np.testing.assert_allclose(result['w'], known, atol=1e-3)


@pytest.mark.parametrize('per_leaf', [True, False])
def test_gradient_constrained(problem, per_leaf):
    params, loss, *_ = problem
    g, g_p = _two(problem, 3.0)
    updates, _ = drive(sharpness.gradient_constrained(3.0, 0.7, 0.95, per_leaf), loss, params)
    expected = np.zeros_like(g)
    leaves = [
        under(params, name) & under(params, leaf)
        for name, leaf in (
            ('dense', 'kernel'),
            ('dense', 'bias'),
            ('norm', 'scale'),
            ('norm', 'bias'),
        )
    ]
    for part in leaves if per_leaf else [np.ones(len(g), bool)]:
        expected[part] = _constrain(g_p[part], g[part], 0.7, 0.95)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-10)


def test_gradient_constrained_of_a_zero_gradient():
    zero, one = {'w': jnp.zeros(2)}, {'w': jnp.ones(2)}
    for g, g_p in ((zero, one), (one, zero), (zero, zero)):
        for low in (0.5, 0.0):
            result, _ = combine.gradient_constrained(low, 0.8).combine(g, g_p, (), None)
            assert np.isfinite(result['w']).all()


@pytest.mark.parametrize('scale', [2.0**-100, 2.0**-66, 2.0**66, 2.0**100])
@pytest.mark.parametrize(
    'made',
    [
        combine.lerp(0.3),
        combine.surrogate_gap(0.4),
        combine.renormalized(),
        *(
            combine.gradient_constrained(0.3, up, per_leaf)
            for up in (0.5, 0.99)
            for per_leaf in (True, False)
        ),
        *(combine.reused(0.7, per_leaf) for per_leaf in (True, False)),
    ],
)
def test_combinations_of_tiny_and_huge_gradients(made, scale):
    """All are proportional to the gradients, in float32 too, whose squares leave its range."""
    rng = np.random.RandomState(0)
    g = {'a': rng.normal(size=(3, 2)).astype(np.float32), 'b': np.float32([2.0, 1.0])}
    g_p = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), g)

    def results(factor):
        def of(tree):
            return jax.tree.map(lambda x: np.float32(factor) * x, tree)

        combined, state = made.combine(of(g), of(g_p), made.init(g), g)
        return combined, made.skip(of(g), state, g)[0]

    for found, expected in zip(results(scale), results(1.0), strict=True):
        np.testing.assert_allclose(flat(found) / np.float32(scale), flat(expected), rtol=1e-5)


@pytest.mark.parametrize('gamma,beta', [(0.1, 0.01), (0.7, 0.3)])
def test_cr_sam(problem, gamma, beta):
    """On a quartic, where the second difference does not vanish."""
    params, *_ = problem

    def loss(tree):
        return jnp.sum(ravel(tree) ** 4) / 4

    w = flat(params)
    g = w**3
    eps = RHO * g / norm(g)
    up, down = (w + eps) ** 3, (w - eps) ** 3
    updates, _ = drive(sharpness.cr_sam(RHO, gamma, beta), loss, params)
    np.testing.assert_allclose(
        flat(updates), up + gamma * (up + down - 2 * g) + beta * (up - down), rtol=1e-10
    )


def test_stable(problem):
    params, loss, *_ = problem
    g, g_p = _two(problem)
    updates, _ = drive(sharpness.stable_sam(RHO), loss, params)
    np.testing.assert_allclose(flat(updates), norm(g) / norm(g_p) * g_p, rtol=1e-10)


@pytest.mark.parametrize('per_leaf', [False, True])
@pytest.mark.parametrize('name', ['looksam', 'look_layersam'])
def test_looksam(problem, name, per_leaf):
    params, loss, a, _, _ = problem
    if name == 'look_layersam':
        tx, base = sharpness.look_layersam(RHO, k=3, alpha=0.3), sharpness.layerwise_sam(RHO)
        per_leaf = False
    else:
        tx = sharpness.looksam(RHO, k=3, alpha=0.3, per_leaf=per_leaf)
        base = sharpness.sam(RHO)
    parts = [
        under(params, layer) & under(params, leaf)
        for layer, leaf in (
            ('dense', 'kernel'),
            ('dense', 'bias'),
            ('norm', 'scale'),
            ('norm', 'bias'),
        )
    ]
    parts = parts if per_leaf else [np.ones(flat(params).size, bool)]
    state, kept = tx.init(params), None
    for t in range(5):
        point = jax.tree.map(lambda x, t=t: x + t**2, params)
        g = a @ flat(point)
        updates, state = drive(tx, loss, point, state, t)
        expected = flat(drive(base, loss, point)[0])
        if t % 3 == 0:
            kept = expected.copy()
            for part in parts:
                kept[part] -= (g[part] @ expected[part]) / (g[part] @ g[part]) * g[part]
                np.testing.assert_allclose(kept[part] @ g[part], 0, atol=1e-8)
        else:
            expected = g.copy()
            for part in parts:
                # Of one entry nothing is orthogonal to it.
                if part.sum() > 1:
                    expected[part] += 0.3 * norm(g[part]) / norm(kept[part]) * kept[part]
        np.testing.assert_allclose(flat(updates), expected, rtol=1e-8)


def test_ae_looksam_reuses_where_the_gate_is_shut():
    params, loss, a = layers(np.float64)
    tx = sharpness.ae_looksam(RHO, alpha=0.3, lambda1=1e9, lambda2=1e9, total_steps=9)
    _, state = drive(tx, loss, params)
    kept = flat(state.memory.combine.orthogonal)
    point = jax.tree.map(lambda x: 2 * x, params)
    g = a @ flat(point)
    updates, state = drive(tx, loss, point, state, 1)
    assert state.evaluations == 1
    np.testing.assert_allclose(flat(updates), g + 0.3 * norm(g) / norm(kept) * kept, rtol=1e-9)


def test_what_looksam_adds_has_the_length_of_the_gradient(problem):
    """At the same point the reused gradient has the norm |g| sqrt(1 + alpha^2)."""
    params, loss, _, _, g = problem
    tx = sharpness.looksam(RHO, k=2, alpha=0.7)
    _, state = drive(tx, loss, params)
    updates, _ = drive(tx, loss, params, state, 1)
    np.testing.assert_allclose(norm(flat(updates)), norm(g) * np.sqrt(1 + 0.49), rtol=1e-10)
