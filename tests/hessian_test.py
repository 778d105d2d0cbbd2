"""Products, Lanczos, density and trace against dense Hessians and known spectra."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysed import examples, layout, network, objective
from flax import linen as nn
from helpers import UnderWay, relative_distance
from jax.flatten_util import ravel_pytree

from sam_jax.analysis import hessian

pytestmark = pytest.mark.accelerator


def dense(
    model, variables, weight_decay=0.0, smoothing=0.0, gauss_newton=False, decays=lambda w: 1
):
    """The loss as a function of flat params and its dense matrix, written out."""
    flat, unravel = ravel_pytree(variables['params'])
    images, labels = examples()

    def logits(w):
        return model.apply({'params': unravel(w), 'batch_stats': variables['batch_stats']}, images)

    target = (1 - smoothing) * np.eye(10)[labels] + smoothing / 10
    decayed = ravel_pytree(
        jax.tree.map(lambda w: jnp.full_like(w, decays(w)), variables['params'])
    )[0]

    def loss(w):
        cross = -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits(w)), axis=-1))
        return cross + 0.5 * weight_decay * jnp.sum(decayed * w**2)

    if not gauss_newton:
        return loss, flat, np.asarray(jax.hessian(loss)(flat))
    jacobian = jax.jacobian(logits)(flat)
    p = jax.nn.softmax(logits(flat))
    middle = jnp.einsum('nc,cd->ncd', p, jnp.eye(10)) - jnp.einsum('nc,nd->ncd', p, p)
    matrix = jnp.einsum('nci,ncd,ndj->ij', jacobian, middle, jacobian) / len(p)
    return loss, flat, np.asarray(matrix + weight_decay * jnp.diag(decayed))


def flat_of(the_objective, params, kind='hessian_product'):
    return hessian.flat(getattr(the_objective, kind), params, the_objective.layout)


@pytest.mark.parametrize(
    ['devices', 'options'],
    [
        (1, {}),
        (4, {'weight_decay': 0.1}),
        (2, {'weight_decay': 0.1, 'decay_norm_and_bias': False}),
        (4, {'label_smoothing': 0.2}),
    ],
    ids=str,
)
def test_loss_gradient_and_product_are_those_of_the_dense_hessian(x64, devices, options):
    model, variables = network(dtype='float64')
    measured, params = objective(devices=devices, model_and_variables=(model, variables), **options)
    loss, flat, matrix = dense(
        model,
        variables,
        options.get('weight_decay', 0.0),
        options.get('label_smoothing', 0.0),
        decays=lambda w: options.get('decay_norm_and_bias', True) or w.ndim > 1,
    )
    np.testing.assert_allclose(measured.value(params)['loss'], loss(flat), rtol=1e-12)
    assert (
        relative_distance(measured.gradient(params), ravel_pytree(jax.grad(loss)(flat))[0]) < 1e-10
    )
    product = flat_of(measured, params)
    v = np.random.RandomState(0).randn(product.size)
    np.testing.assert_allclose(product.product(v), matrix @ v, rtol=0, atol=1e-9)


class Linear(nn.Module):
    """Softmax regression."""

    dtype: str = 'float64'

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(10, use_bias=False, param_dtype='float64')(images.reshape(len(images), -1))


def test_softmax_regression_has_its_hessian_in_closed_form(x64):
    """H = mean of (diag p - p p') (x) x x', which is its Gauss-Newton matrix as well."""
    images, _ = examples()
    x = images.reshape(len(images), -1)
    w = 0.3 * np.random.RandomState(0).randn(64, 10)
    exp = np.exp(x @ w)
    p = exp / exp.sum(axis=1, keepdims=True)
    middle = p[:, :, None] * np.eye(10) - p[:, :, None] * p[:, None, :]
    matrix = np.einsum('na,ncd,nb->acbd', x, middle, x, optimize=True)
    matrix = matrix.reshape(640, 640) / len(x)
    measured, params = objective(
        devices=2,
        model_and_variables=(Linear(), {'params': {'Dense_0': {'kernel': w}}, 'batch_stats': {}}),
    )
    v = np.random.RandomState(1).randn(640)
    for kind in ('hessian_product', 'gauss_newton_product'):
        np.testing.assert_allclose(
            flat_of(measured, params, kind).product(v), matrix @ v, rtol=0, atol=1e-11
        )


def test_gauss_newton_product(x64):
    model, variables = network(dtype='float64')
    measured, params = objective(
        devices=4, model_and_variables=(model, variables), weight_decay=0.1
    )
    matrix = dense(model, variables, 0.1, gauss_newton=True)[2]
    product = flat_of(measured, params, 'gauss_newton_product')
    v = np.random.RandomState(0).randn(product.size)
    np.testing.assert_allclose(product.product(v), matrix @ v, rtol=0, atol=1e-9)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_top_eigenpairs_of_a_network_in_float32(dtype):
    """Also for a network that trains in bfloat16: it is measured in the dtype of its params."""
    model, variables = network(dtype=dtype)
    measured, params = objective(devices=2, model_and_variables=(model, variables))
    product = flat_of(measured, params)
    matrix = dense(network(dtype='float32')[0], variables)[2]
    values, vectors = np.linalg.eigh(matrix.astype(np.float64))
    found = hessian.top_eigenpairs(product.product, product.size, k=5, steps=60, tolerance=1e-5)
    np.testing.assert_allclose(found.values, values[::-1][:5], rtol=1e-4)
    overlaps = np.abs(np.sum(found.vectors * vectors[:, ::-1][:, :5].T, axis=1))
    np.testing.assert_allclose(overlaps, 1, atol=1e-3)
    assert found.lowest >= values[0] - 1e-4 * values[-1]


def test_one_device_and_four_find_the_same(x64):
    found = []
    for devices in (1, 4):
        measured, params = objective(devices=devices)
        product = flat_of(measured, params)
        found.append(
            (
                hessian.top_eigenpairs(product.product, product.size, steps=20, tolerance=0),
                hessian.trace(measured.hessian_product, params, measured.layout, 3),
            )
        )
    np.testing.assert_allclose(found[0][0].values, found[1][0].values, rtol=1e-9)
    np.testing.assert_allclose(found[0][1].mean, found[1][1].mean, rtol=1e-9)


def symmetric(n, seed=0):
    a = np.random.RandomState(seed).randn(n, n)
    return (a + a.T) / np.sqrt(2 * n)


def test_no_batch_is_dispatched_before_the_one_before_it_is_done(x64):
    counts = {'now': 0, 'most': 0}
    loss, params = objective(batch_size=8)
    steps = {'gradient': lambda *_: UnderWay(counts), 'gradient_mean': lambda total, *_: total}
    dataclasses.replace(loss, steps={**loss.steps, **steps}).gradient(params)
    assert counts == {'now': 0, 'most': 1}


def test_lanczos_reduces_a_matrix_to_its_tridiagonal_form():
    a = symmetric(40)
    found = hessian.lanczos(lambda v: a @ v, np.random.RandomState(1).randn(40), 40)
    q = found.basis
    np.testing.assert_allclose(q @ q.T, np.eye(40), atol=1e-12)
    t = np.diag(found.diagonal) + np.diag(found.off_diagonal, 1) + np.diag(found.off_diagonal, -1)
    np.testing.assert_allclose(q @ a @ q.T, t, atol=1e-12)
    np.testing.assert_allclose(found.eigen()[0], np.linalg.eigvalsh(a), atol=1e-12)


def test_lanczos_keeps_its_vectors_orthogonal_in_float32():
    """Without re-orthogonalisation, converged values come twice and the vectors grow parallel."""
    values = np.concatenate([10.0 ** np.arange(4), np.linspace(0, 1, 300)]).astype(np.float32)
    found = hessian.lanczos(lambda v: values * v, np.ones(len(values), np.float32), 60)
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(60), atol=1e-5)
    np.testing.assert_allclose(found.eigen()[0][-4:], 10.0 ** np.arange(4), rtol=1e-3)


def test_lanczos_ends_where_the_space_is_exhausted():
    values = np.repeat([3.0, 2.0, -1.0], 10)
    found = hessian.lanczos(lambda v: values * v, np.random.RandomState(0).randn(30), 20)
    assert found.remainder == 0
    np.testing.assert_allclose(found.eigen()[0], [-1, 2, 3], atol=1e-12)


def test_lanczos_refuses_what_is_not_finite():
    with pytest.raises(FloatingPointError, match='Product 1'):
        hessian.lanczos(lambda v: v * np.nan, np.ones(3), 3)


def test_eigenvalues_converge_with_steps_and_the_residual_bounds_the_error():
    a = symmetric(300)
    truth = np.linalg.eigvalsh(a)[::-1][:3]
    errors = []
    for steps in (10, 20, 40, 80):
        found = hessian.top_eigenpairs(lambda v: a @ v, 300, k=3, steps=steps, tolerance=0)
        assert found.steps == steps
        errors.append(np.abs(found.values - truth).max())
        nearest = np.abs(np.linalg.eigvalsh(a)[:, None] - found.values).min(axis=0)
        assert np.all(nearest <= found.residuals + 1e-6)
        residuals = np.linalg.norm(a @ found.vectors.T - found.vectors.T * found.values, axis=0)
        np.testing.assert_allclose(residuals, found.residuals, rtol=1e-2, atol=1e-5)
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[3] < 1e-4


def test_it_stops_when_the_residuals_are_small():
    a = np.diag(np.concatenate([[100.0, 50.0], np.linspace(0, 1, 200)]))
    found = hessian.top_eigenpairs(lambda v: a @ v, 202, k=2, steps=100, tolerance=1e-3)
    assert found.steps < 20
    np.testing.assert_allclose(found.values, [100, 50], rtol=1e-4)


def test_wigner_semicircle():
    """The density of a large symmetric matrix of independent entries is (1/2 pi) sqrt(4 - x^2)."""
    a = symmetric(800)
    found = hessian.density(lambda v: a @ v, 800, probes=8, steps=60)
    grid = np.linspace(-1.6, 1.6, 50)
    np.testing.assert_allclose(found.on(grid, 0.1), np.sqrt(4 - grid**2) / (2 * np.pi), atol=0.03)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1)
    for power, catalan in ((1, 0.0), (2, 1.0), (4, 2.0)):
        mean, error = found.moment(power)
        assert abs(mean - catalan) < 4 * error + 0.01


def test_trace_of_a_diagonal_matrix_is_exact_and_of_a_network_within_its_error(x64):
    params = {'a': jnp.ones(3), 'b': jnp.ones((2, 2))}
    scales = {'a': jnp.arange(3.0), 'b': jnp.full((2, 2), 2.0)}
    diagonal = hessian.trace(
        lambda p, v: jax.tree.map(jnp.multiply, scales, v), params, layout(1), probes=4
    )
    assert (diagonal.mean, diagonal.standard_error) == (11, 0)
    assert diagonal.layers == {'a': (3, 0), 'b': (8, 0)}

    model, variables = network(dtype='float64')
    measured, params = objective(model_and_variables=(model, variables))
    matrix = dense(model, variables)[2]
    found = hessian.trace(measured.hessian_product, params, measured.layout, probes=60)
    assert 0 < found.standard_error < 0.2 * abs(np.trace(matrix))
    assert abs(found.mean - np.trace(matrix)) < 4 * found.standard_error
    names = [
        'BatchNorm_0/bias',
        'BatchNorm_0/scale',
        'Conv_0/bias',
        'Conv_0/kernel',
        'Dense_0/bias',
        'Dense_0/kernel',
    ]
    assert list(found.layers) == names
    ends = np.cumsum([0] + [x.size for x in jax.tree.leaves(variables['params'])])
    for (mean, error), start, end in zip(found.layers.values(), ends, ends[1:]):
        assert abs(mean - np.trace(matrix[start:end, start:end])) < 4 * error + 1e-9
