"""What each ascent computes, against its formula in NumPy on a quadratic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.linalg import norm
from quadratics import RHO, drive, flat, layers, under

from sam_jax import sharpness
from sam_jax.sharpness import direction, gate, mask

pytestmark = [pytest.mark.usefixtures('x64'), pytest.mark.accelerator]


def test_unnormalized(problem):
    params, loss, a, w, g = problem
    updates, state = drive(sharpness.unnormalized_sam(RHO), loss, params)
    np.testing.assert_allclose(flat(updates), a @ (np.eye(len(w)) + RHO * a) @ w, rtol=1e-10)
    np.testing.assert_allclose(state.perturbation_norm, RHO * norm(g), rtol=1e-10)


@pytest.mark.parametrize('adapt', ['weights', 'kernels', 'all'])
@pytest.mark.parametrize('eta', [0.0, 0.2])
def test_asam(problem, adapt, eta):
    params, loss, a, w, g = problem
    t = np.abs(w) + eta
    if adapt != 'all':
        t = np.where(under(params, 'bias'), 1.0, t)
    if adapt == 'kernels':
        t = np.where(under(params, 'scale'), 1.0, t)
    eps = RHO * t**2 * g / norm(t * g)
    updates, state = drive(sharpness.asam(RHO, eta, adapt), loss, params)
    np.testing.assert_allclose(flat(updates), a @ (w + eps), rtol=1e-10)
    np.testing.assert_allclose([norm(eps / t), state.perturbation_norm], RHO, rtol=1e-10)


@pytest.mark.parametrize('eta', [0.0, 0.2])
def test_asam_on(problem, eta):
    """T = 0 but for normalisation layers, the norm is over these alone, and everything descends."""
    params, loss, a, w, g = problem
    t = under(params, 'norm') * (np.abs(w) + eta)
    eps = RHO * t**2 * g / norm(t * g)
    updates, state = drive(sharpness.asam(RHO, eta, 'norm_only'), loss, params)
    np.testing.assert_allclose(flat(updates), a @ (w + eps), rtol=1e-10)
    np.testing.assert_allclose(state.perturbation_norm, RHO, rtol=1e-10)
    with pytest.raises(ValueError, match='no normalisation layer'):
        sharpness.asam(RHO, adapt='norm_only').init({'dense': {'kernel': jnp.ones((2, 2))}})


@pytest.mark.parametrize('eta', [0.5, 3.0])
def test_fisher(problem, eta):
    params, loss, a, w, g = problem
    inverse = 1 / (1 + eta * g**2)
    eps = RHO * inverse * g / np.sqrt(g @ (inverse * g))
    np.testing.assert_allclose(eps @ (eps / inverse), RHO**2)
    updates, _ = drive(sharpness.fisher_sam(RHO, eta), loss, params)
    np.testing.assert_allclose(flat(updates), a @ (w + eps), rtol=1e-10)


def test_layerwise(problem):
    params, loss, a, w, g = problem
    params['dense']['bias'] = jnp.zeros(2)  # no way to move in units of its own norm
    w = flat(params)
    g = a @ w
    eps = np.zeros_like(w)
    for layer, leaf in (('dense', 'kernel'), ('norm', 'bias'), ('norm', 'scale')):
        part = under(params, layer) & under(params, leaf)
        eps[part] = RHO * norm(w[part]) * g[part] / norm(g[part])
    assert np.count_nonzero(eps) == len(w) - 2
    updates, _ = drive(sharpness.layerwise_sam(RHO), loss, params)
    np.testing.assert_allclose(flat(updates), a @ (w + eps), rtol=1e-10)


@pytest.mark.parametrize('p', [2.0, np.inf])
def test_sam_on(problem, p):
    """The norm is over the normalisation layers alone; everything descends."""
    params, loss, a, w, g = problem
    m = under(params, 'norm')
    eps = RHO * m * (np.sign(g) if p == np.inf else g / norm(m * g))
    updates, _ = drive(sharpness.sam_on(RHO, p), loss, params)
    np.testing.assert_allclose(flat(updates), a @ (w + eps), rtol=1e-10)


def test_sam_on_without_normalisation():
    params = {'dense': {'kernel': jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match='no normalisation layer'):
        sharpness.sam_on(RHO).init(params)


def test_mask_of_normalisation_layers():
    made = mask.normalization(
        {
            'stem': {'kernel': 1, 'bias': 2},
            'block': {'bn': {'scale': 3, 'bias': 4}, 'conv': {'kernel': 5}},
            'head': {'kernel': 6},
        }
    )
    assert made == {
        'stem': {'kernel': False, 'bias': False},
        'block': {'bn': {'scale': True, 'bias': True}, 'conv': {'kernel': False}},
        'head': {'kernel': False},
    }


def test_sparse(problem):
    """The largest mean squares since the last mask; the norm is that of all entries."""
    params, loss, a, w, _ = problem
    tx = sharpness.sparse_sam(RHO, sparsity=0.6, period=2)
    state, squares, keep = tx.init(params), [], np.ones(len(w))
    for t in range(6):
        point = jax.tree.map(lambda x, t=t: x * (1 + t) + t, params)
        w = flat(point)
        g = a @ w
        if t and t % 2 == 0:
            mean = np.mean(squares[-2:], axis=0)
            keep = mean >= np.sort(mean)[int(0.6 * len(w))]
            assert keep.sum() == len(w) - int(0.6 * len(w))
        squares.append(g**2)
        updates, state = drive(tx, loss, point, state, t)
        np.testing.assert_allclose(flat(updates), a @ (w + keep * RHO * g / norm(g)), rtol=1e-10)
        assert (state.perturbation_norm < RHO * 0.999) == (t >= 2)


@pytest.mark.parametrize('theta', [0.3, 0.9])
def test_vasso(problem, theta):
    params, loss, a, _, _ = problem
    tx, state, d = sharpness.vasso(RHO, theta), None, None
    for t in range(4):
        point = jax.tree.map(lambda x, t=t: x + t**2, params)
        w = flat(point)
        g = a @ w
        d = g if d is None else (1 - theta) * d + theta * g
        updates, state = drive(tx, loss, point, state, t)
        np.testing.assert_allclose(flat(updates), a @ (w + RHO * d / norm(d)), rtol=1e-10)


@pytest.mark.parametrize('sigma,lam', [(1.0, 0.9), (0.4, 0.6)])
def test_friendly(problem, sigma, lam):
    params, loss, a, _, _ = problem
    tx, state, m = sharpness.friendly_sam(RHO, sigma, lam), None, None
    for t in range(4):
        point = jax.tree.map(lambda x, t=t: x + t**2, params)
        w = flat(point)
        g = a @ w
        d = g if m is None else g - sigma * m
        m = g if m is None else lam * m + (1 - lam) * g
        updates, state = drive(tx, loss, point, state, t)
        np.testing.assert_allclose(flat(updates), a @ (w + RHO * d / norm(d)), rtol=1e-10)


def test_friendly_with_a_gradient_that_stays_is_the_base():
    params, loss, _ = layers(np.float32)
    tx = sharpness.friendly_sam(RHO, sigma=1.0)
    _, state = drive(tx, loss, params)
    for _ in range(5):
        updates, state = drive(tx, loss, params, state)
        np.testing.assert_array_equal(flat(updates), flat(jax.grad(loss)(params)))
        assert state.perturbation_norm == 0


def test_averages_are_those_of_the_ascents():
    """Behind a shut gate they stay, as documented."""
    params, loss, _ = layers(np.float64)
    tx = sharpness.sharpness_aware(direction.averaged(0.5), gate=gate.every(2))
    state = tx.init(params)
    kept = []
    for t in range(4):
        _, state = drive(tx, loss, jax.tree.map(lambda x, t=t: x + t, params), state, t)
        kept.append(flat(state.memory.ascent.average))
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[2], kept[3])
    assert np.abs(kept[1] - kept[2]).max() > 0.1
