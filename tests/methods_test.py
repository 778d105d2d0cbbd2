"""Every named method: laws that all keep, and the rule of each against closed forms."""


import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quadratics import RHO, ball_step, flat, quadratic, ravel, update

from sam_jax import sharpness
from sam_jax.sharpness import ascent

SETTINGS = {'rho': RHO, 'p': 2.0}
KEY = jax.random.key(7)

# Those that go on where the gradient is zero.
RESTLESS = {'random_sam'}


def _update(tx, grad_fn, params, state=None, key=KEY):
    return update(tx, grad_fn, params, state, key=key)


@pytest.fixture(params=sharpness.METHODS)
def method(request):
    """A constructor from settings, for each method that config.sam.method may name."""
    def create(**changes):
        return sharpness.create(request.param, **{**SETTINGS, **changes})

    create.name = request.param
    return create


# What all of them keep.


def test_zero_gradient_is_finite(method):
    params, grad_fn, _ = quadratic()
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, state = _update(method(), grad_fn, zero)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    if method.name not in RESTLESS:
        helpers.assert_trees_equal(updates, zero)


def test_rho_zero_is_the_base(method):
    params, grad_fn, _ = quadratic()
    updates, state = _update(method(rho=0.0), grad_fn, params)
    helpers.assert_trees_equal(updates, grad_fn(params))
    assert state.perturbation_norm == 0


def test_state_keeps_its_type(method):
    """So that it can be donated and checkpointed, and the step compiles once."""
    params, grad_fn, _ = quadratic()
    tx = method()
    step = jax.jit(lambda params, state: _update(tx, grad_fn, params, state), donate_argnums=1)
    state = tx.init(params)
    kinds = jax.tree.map(jax.typeof, state)
    for _ in range(3):
        _, state = step(params, state)
        assert jax.tree.map(jax.typeof, state) == kinds
    assert step._cache_size() == 1
    assert state.count == 3


def test_gradient_evaluations(method):
    """As documented, as counted in the state, and as called; one in a jvp is counted as two."""
    params, grad_fn, _ = quadratic()
    calls = []

    def counted(tree):
        jax.debug.callback(lambda: calls.append(1))
        return grad_fn(tree)

    tx = method()
    grads, state = grad_fn(params), tx.init(params)
    step = jax.jit(lambda state: tx.update(grads, state, params, grad_fn=counted, key=KEY)[1])
    for count in (1, 2):
        state = step(state)
        jax.effects_barrier()
        assert state.evaluations == count * (helpers.EVALUATIONS[method.name] - 1)
        in_jvp = count * (method.name == 'second_order_sam')
        assert len(calls) == state.evaluations - in_jvp


def test_perturbation_is_rho_long(method):
    params, grad_fn, _ = quadratic()
    _, state = _update(method(), grad_fn, params)
    np.testing.assert_allclose(
        state.perturbation_norm, RHO * (method.name != 'sgd'), rtol=1e-6)


def test_perturbed_losses_and_a_gradient_of_its_own_for_the_ascent(method):
    """With aux, and an ascent along another gradient than that of the descent."""
    params, grad_fn, a = quadratic()
    tx = method()

    def with_aux(tree):
        w = ravel(tree)
        return grad_fn(tree), w @ a @ w / 2

    clean = with_aux(params)[1]
    extra = dict(grad_fn=with_aux, aux=clean, key=KEY)
    (updates, loss), _ = tx.update(grad_fn(params), tx.init(params), params, **extra)
    expected, _ = _update(tx, grad_fn, params)
    helpers.assert_trees_close(updates, expected, rtol=1e-6)
    assert (loss == clean) == (method.name == 'sgd')
    (updates, _), _ = tx.update(
        grad_fn(params), tx.init(params), params, **extra,
        ascent_grad_fn=lambda tree: jax.tree.map(lambda g: -g, grad_fn(tree)))
    same = np.allclose(flat(updates), flat(expected), rtol=1e-6)
    assert same == (method.name not in ('multistep_sam', 'second_order_sam'))


@pytest.mark.parametrize('settings', [{'rho': -1.0}, {'p': 1.0}])
def test_bad_settings(method, settings):
    if method.name != 'sgd':
        with pytest.raises(ValueError, match='must be|need'):
            method(**settings)


def test_create_takes_what_the_method_takes():
    params, grad_fn, _ = quadratic()
    made = sharpness.create('sam', rho=RHO, p=3.0, alpha=0.2, k=5)
    helpers.assert_trees_equal(*(update(tx, grad_fn, params)[0]
                                 for tx in (made, sharpness.sam(RHO, p=3.0))))
    base, _ = update(sharpness.create('sgd', **SETTINGS), grad_fn, params)
    helpers.assert_trees_equal(base, grad_fn(params))


# Random directions.


@pytest.mark.parametrize('p', [2.0, np.inf])
def test_random_sam(p):
    """The gradient somewhere on the sphere, by the key alone, and on average in the middle."""
    params, grad_fn, a = quadratic()
    w = flat(params)
    tx = sharpness.random_sam(RHO, p)
    state = tx.init(params)

    @jax.jit
    def eps(key, scale=1.0):
        grads = jax.tree.map(lambda g: scale * g, grad_fn(params))
        updates, _ = tx.update(grads, state, params, grad_fn=grad_fn, key=key)
        return jnp.linalg.solve(a, ravel(updates)) - w

    several = np.stack([eps(jax.random.key(i)) for i in range(400)])
    np.testing.assert_allclose(
        np.linalg.norm(several, ord=p, axis=1), RHO, rtol=2e-4)
    np.testing.assert_array_equal(eps(KEY), eps(KEY, -3.0))
    values = len(np.unique(several[:, 0].round(5)))
    assert values == 2 if p == np.inf else values > 350
    # Of a uniform direction each entry has variance rho^2 / dimension; 400 draws.
    spread = RHO * (1 if p == np.inf else w.size ** -0.5)
    assert (np.abs(several.mean(axis=0)) < 4.5 * spread / 20).all()
    np.testing.assert_allclose(several.std(axis=0), spread, rtol=0.2)


def test_random_sam_needs_a_key():
    params, grad_fn, _ = quadratic()
    with pytest.raises(TypeError, match='needs a key'):
        update(sharpness.random_sam(RHO), grad_fn, params)


# Several steps.


def _project(eps, p):
    if p == np.inf:
        return np.clip(eps, -RHO, RHO)
    return eps / max(1.0, np.linalg.norm(eps) / RHO)


@pytest.mark.parametrize('p', [2.0, np.inf])
@pytest.mark.parametrize('steps,step_size', [(1, 1.0), (2, 1.0), (3, 0.4), (2, 1.7), (5, 0.25)])
def test_multistep_sam(p, steps, step_size):
    """Projected gradient ascent, literally and in float64."""
    params, grad_fn, a = quadratic()
    w, eps = flat(params).astype(float), 0.0
    for _ in range(steps):
        eps = _project(eps + ball_step(a @ (w + eps), step_size * RHO, p), p)
    updates, _ = update(sharpness.multistep_sam(RHO, steps, step_size, p), grad_fn, params)
    np.testing.assert_allclose(flat(updates), a @ (w + eps), rtol=2e-5)


@pytest.mark.parametrize('p', [2.0, np.inf])
def test_one_step_is_sam(p):
    params, grad_fn, _ = quadratic()
    helpers.assert_trees_equal(*(update(tx, grad_fn, params)[0] for tx in (
        sharpness.multistep_sam(RHO, 1, p=p), sharpness.sam(RHO, p))))


def test_steps_on_an_eigenvector_end_on_the_sphere():
    """There every step points the same way: g_p = lambda (c + rho) v, however many there are."""
    _, grad_fn, a = quadratic()
    values, vectors = np.linalg.eigh(a)
    params, _, _ = quadratic()
    unravel = jax.flatten_util.ravel_pytree(params)[1]
    w = unravel(jnp.asarray(2.0 * vectors[:, -1], jnp.float32))
    for steps in (1, 2, 5):
        updates, _ = update(sharpness.multistep_sam(RHO, steps), grad_fn, w)
        np.testing.assert_allclose(
            flat(updates), values[-1] * (2.0 + RHO) * vectors[:, -1], rtol=1e-4, atol=1e-5)


def test_steps_find_a_higher_loss():
    params, grad_fn, a = quadratic()
    w = flat(params)
    reached = []
    for steps in (1, 2, 20):
        tx = ascent.projected_steps(RHO, steps)
        eps, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
        moved = w + flat(eps)
        reached.append(moved @ a @ moved / 2)
    assert reached[0] < reached[1] < reached[2]


@pytest.mark.parametrize('settings,words', [
    ({'p': 3.0}, 'need 2 or inf'), ({'steps': 0}, 'at least 1'), ({'step_size': 0.0}, 'greater')])
def test_bad_steps(settings, words):
    with pytest.raises(ValueError, match=words):
        sharpness.multistep_sam(RHO, **settings)


# The second-order term.


def _loss(w):
    """Neither quadratic nor symmetric."""
    x = jnp.linspace(-1.0, 2.0, w.size)
    return jnp.sum(jnp.cos(w * x)) + jnp.sum(w ** 4) / 10 + jnp.prod(w[:4] + 0.5) + w @ x


@pytest.mark.parametrize('p', [2.0, 3.0, 1.5])
def test_second_order_sam_is_the_gradient_of_the_perturbed_loss(p, x64):
    """Against reverse-mode differentiation of w -> L(w + eps(w)) through equation 2."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=7))
    grad_fn = jax.grad(_loss)
    q = 1 / (1 - 1 / p)

    def perturbed_loss(w):
        g = grad_fn(w)
        total = jnp.sum(jnp.abs(g) ** q)
        return _loss(w + RHO * jnp.sign(g) * jnp.abs(g) ** (q - 1) / total ** (1 / p))

    updates, _ = update(sharpness.second_order_sam(RHO, p), grad_fn, w)
    np.testing.assert_allclose(updates, jax.grad(perturbed_loss)(w), rtol=1e-9)
    first_order, _ = update(sharpness.sam(RHO, p), grad_fn, w)
    assert helpers.relative_distance(first_order, updates) > 0.01


@pytest.mark.parametrize('p', [2.0, 3.0, 1.5])
def test_second_order_sam_where_a_gradient_is_zero(p):
    """An entry of which the loss knows nothing, as of a unit that is dead."""
    def grad_fn(w):
        return jax.grad(lambda w: _loss(w[:6]))(w)

    updates, _ = update(sharpness.second_order_sam(RHO, p), grad_fn, jnp.arange(7.0) / 3)
    assert np.isfinite(updates).all() and updates[6] == 0


def test_second_order_sam_of_a_quadratic(x64):
    """g_p + rho / ||g|| A (I - n n') g_p."""
    params, grad_fn, a = quadratic(np.float64)
    w = flat(params)
    g = a @ w
    n = g / np.linalg.norm(g)
    g_p = a @ (w + RHO * n)
    expected = g_p + RHO / np.linalg.norm(g) * a @ (g_p - n * (n @ g_p))
    updates, _ = update(sharpness.second_order_sam(RHO), grad_fn, params)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-12)


def test_second_order_sam_refuses_p_inf():
    with pytest.raises(ValueError, match='no second-order term'):
        sharpness.second_order_sam(RHO, np.inf)
