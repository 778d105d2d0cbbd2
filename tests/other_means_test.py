"""Methods of random probes, one gradient, some examples and losses, against their formulas."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.linalg import norm
from quadratics import RHO, drive, flat, ravel, under

from sam_jax import sharpness
from sam_jax.sharpness.methods import probes as universal
from sam_jax.sharpness.methods import two_at_once

pytestmark = pytest.mark.usefixtures('x64')


# Random probes.


def _probes(tx, loss, params, n, draws, key=7):
    """Mean and standard error of the results over keys, flat."""
    grads = jax.grad(loss)(params)

    @jax.jit
    @jax.vmap
    def one(key):
        updates, _ = tx.update(
            grads, tx.init(params), params, loss=sharpness.from_loss_fn(loss), key=key
        )
        return ravel(updates)

    values = np.asarray(one(jax.random.split(jax.random.key(key), draws)))
    return values.mean(axis=0), values.std(axis=0) / np.sqrt(draws)


def _drawn(params, i, draw=universal.gaussian):
    key = jax.random.fold_in(jax.random.key(7), 0)
    return flat(draw(jax.random.fold_in(key, i), params))


@pytest.mark.parametrize('n', [1, 3])
def test_trace(problem, n):
    params, loss, a, w, g = problem
    z = np.stack([_drawn(params, i) for i in range(n)])
    updates, state = drive(sharpness.trace_sam(RHO, 0.6, n), loss, params)
    np.testing.assert_allclose(flat(updates), g + 0.6 * RHO * a @ z.mean(axis=0), rtol=1e-9)
    assert state.evaluations == n
    np.testing.assert_allclose(state.perturbation_norm, RHO * norm(z[0]), rtol=1e-9)


@pytest.mark.parametrize('n', [1, 3])
def test_det(problem, n):
    """Against the gradient of L + lam rho^2 phi(mean psi((L(w + rho z_i) - L(w)) / rho^2))."""
    params, loss, *_ = problem
    z = [
        jax.tree.map(
            lambda x: x,
            universal.cube(0.05)(
                jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 0), i), params
            ),
        )
        for i in range(n)
    ]
    assert np.abs([flat(x) for x in z]).max() <= 0.05

    def objective(tree):
        d = jnp.stack(
            [
                (loss(jax.tree.map(lambda w, x: w + RHO * x, tree, probe)) - loss(tree)) / RHO**2
                for probe in z
            ]
        )
        return loss(tree) + 0.7 * RHO**2 * jnp.mean(jnp.exp(-d / 2)) ** -2

    updates, _ = drive(sharpness.det_sam(RHO, 0.7, 0.05, n), loss, params)
    helpers.assert_trees_close(updates, jax.grad(objective)(params), rtol=1e-9)
    if n == 1:
        moved = jax.tree.map(lambda w, x: w + RHO * x, params, z[0])
        d = (loss(moved) - loss(params)) / RHO**2
        g, g_1 = (flat(jax.grad(loss)(tree)) for tree in (params, moved))
        np.testing.assert_allclose(flat(updates), g + 0.7 * np.exp(d) * (g_1 - g), rtol=1e-9)


def test_det_does_not_overflow():
    params = {'w': jnp.zeros(3, jnp.float32)}
    tx = sharpness.det_sam(1e-3, h=10.0)
    updates, _ = drive(tx, lambda tree: 1e4 * jnp.sum(tree['w'] ** 2), params)
    assert np.isfinite(jnp.sum(updates['w'] ** 2))


@pytest.mark.parametrize('n', [2, 4])
def test_frob(problem, n):
    """Against the gradient of L + lam / (2 rho^2) Var_{n-1}(L(w + rho z_i))."""
    params, loss, *_ = problem
    z = [_drawn(params, i) for i in range(n)]
    unravel = jax.flatten_util.ravel_pytree(params)[1]

    def objective(tree):
        values = jnp.stack([loss(unravel(ravel(tree) + RHO * x)) for x in z])
        return loss(tree) + 0.4 / (2 * RHO**2) * jnp.var(values, ddof=1)

    updates, _ = drive(sharpness.frob_sam(RHO, 0.4, n), loss, params)
    helpers.assert_trees_close(updates, jax.grad(objective)(params), rtol=1e-8)


def test_what_the_probes_see_on_average(problem):
    """Trace: the gradient of a quadratic. Frob: Aw + lam A^2 w, for any rho and n."""
    params, loss, a, w, g = problem
    for tx, expected in (
        (sharpness.trace_sam(0.2, 0.5, 2), g),
        (sharpness.frob_sam(0.1, 0.3, 2), g + 0.3 * a @ g),
        (sharpness.frob_sam(0.3, 0.3, 4), g + 0.3 * a @ g),
    ):
        mean, error = _probes(tx, loss, params, 2, 20000)
        assert (np.abs(mean - expected) < 5 * error).all()
        assert (error < 0.1).all()


def test_trace_is_blind_to_a_saddle_and_frob_is_not():
    """L = a^2 - b^2 has no trace anywhere."""
    params = {'a': jnp.array(0.0), 'b': jnp.array(0.0)}

    def loss(tree):
        return tree['a'] ** 2 - tree['b'] ** 2 + tree['a'] ** 4

    mean, error = _probes(sharpness.trace_sam(0.1), loss, params, 1, 4000)
    assert (np.abs(mean) < 4 * error).all()
    params = {'a': jnp.array(0.5), 'b': jnp.array(0.5)}
    mean, error = _probes(sharpness.frob_sam(0.05, 1.0), loss, params, 2, 4000)
    assert mean[1] > -1.0 + 4 * error[1], 'it is held back where the loss falls away'


# One gradient, taken elsewhere.


def test_momentum_sam(problem):
    params, loss, a, w, _ = problem
    v = jax.tree.map(lambda x: x + 1.0, params)
    updates, state = drive(sharpness.momentum_sam(RHO), loss, params, momentum=v)
    v = flat(v)
    np.testing.assert_allclose(flat(updates), a @ (w - RHO * v / norm(v)), rtol=1e-10)
    np.testing.assert_allclose(state.perturbation_norm, RHO, rtol=1e-10)
    assert state.evaluations == 0


def test_extrapolated(problem):
    params, loss, a, w, g = problem
    updates, state = drive(sharpness.extrapolated(RHO, 'gradient'), loss, params)
    np.testing.assert_allclose(flat(updates), a @ (np.eye(len(w)) - RHO * a) @ w, rtol=1e-10)
    assert state.evaluations == 1

    updates, state = drive(sharpness.extrapolated(RHO, 'past'), loss, params)
    np.testing.assert_allclose(flat(updates), g, rtol=1e-10)
    last = flat(updates)
    for t in (1, 2):
        updates, state = drive(sharpness.extrapolated(RHO, 'past'), loss, params, state, t)
        np.testing.assert_allclose(flat(updates), a @ (w - RHO * last), rtol=1e-10)
        last = flat(updates)

    updates, state = drive(sharpness.extrapolated(RHO, 'noise'), loss, params)
    eps = np.linalg.solve(a, flat(updates)) - w
    np.testing.assert_allclose(state.perturbation_norm, norm(eps), rtol=1e-8)
    assert 0.3 < norm(eps) / RHO / np.sqrt(len(w)) < 2 and state.evaluations == 0


def test_sampa(problem):
    """The paper's first step, y_0 = x_0: (1 - lam) A (w + rho Aw / |Aw|) + lam A (w - lr Aw)."""
    params, loss, a, w, g = problem
    lam, lr = 0.2, 0.07
    tx = sharpness.sampa(RHO, lam)
    state = tx.init(params)._replace(memory=jax.grad(loss)(params))
    updates, state = drive(tx, loss, params, state, learning_rate=lr)
    expected = (1 - lam) * a @ (w + RHO * g / norm(g)) + lam * a @ (w - lr * g)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-10)
    np.testing.assert_allclose(flat(state.memory), a @ (w - lr * g), rtol=1e-10)
    first, _ = drive(tx, loss, params)
    np.testing.assert_allclose(flat(first), g, rtol=1e-10)


def test_sampa_takes_the_perturbed_gradient_on_the_previous_batch(problem):
    """And neither gradient waits for the other: both places are known before the step."""
    params, loss, _, w, _ = problem
    tx = sharpness.sampa(RHO, 0.2)
    memory = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)._replace(memory=memory)
    places = []

    def previous_gradient(tree):
        places.append(flat(tree))
        return jax.tree.map(lambda x: 7.0 * jnp.ones_like(x), tree)

    def evaluate(c, tree, previous=False):
        if previous:
            return sharpness.Evaluation(previous_gradient(tree))
        return sharpness.Evaluation(jax.tree.map(lambda x: c * x, memory))

    outcomes = [
        tx.update(
            None,
            state,
            params,
            learning_rate=0.1,
            loss=sharpness.Loss(functools.partial(evaluate, c)),
        )[0]
        for c in (1.0, 5.0)
    ]
    np.testing.assert_array_equal(*places)
    np.testing.assert_allclose(places[0], w + RHO / np.sqrt(len(w)), rtol=1e-10)
    for c, updates in zip((1.0, 5.0), outcomes):
        np.testing.assert_allclose(flat(updates), 0.8 * 7 + 0.2 * c, rtol=1e-10)


def test_bsam(problem):
    """Three steps of the paper's rule, the draw read off the place of the first gradient."""
    params, loss, a, _, _ = problem
    b1, b2, damping, prior, n, lr = 0.8, 0.95, 0.1, 40.0, 500, 0.05
    tx = sharpness.bsam(RHO, prior, b1, b2, damping, 0.7, data_factor=2.0, num_examples=n / 2)
    state, w = tx.init(params), flat(params)
    m, s, delta = np.zeros_like(w), np.full_like(w, 0.7), prior / n
    for t in range(3):
        key = jax.random.fold_in(jax.random.key(7), t)
        theta = flat(two_at_once.drawn(key, params, state.memory.precision, n))
        g = a @ theta
        m = b1 * m + (1 - b1) * (a @ (w + RHO * g / s) + delta * w)
        updates, state = drive(tx, loss, params, state, t)
        np.testing.assert_allclose(flat(updates), m / s, rtol=1e-9)
        s = b2 * s + (1 - b2) * (np.sqrt(s) * np.abs(g) + damping + delta)
        np.testing.assert_allclose(flat(state.memory.precision), s, rtol=1e-9)
        params = jax.tree.map(lambda x, u: x - lr * u, params, updates)
        w = flat(params)


def test_bsam_draws_with_the_posterior_s_deviation(problem):
    params, *_ = problem
    n, s = 400, 0.25
    precision = jax.tree.map(lambda x: jnp.full_like(x, s), params)
    draws = np.stack(
        [flat(two_at_once.drawn(jax.random.key(i), params, precision, n)) for i in range(300)]
    )
    np.testing.assert_allclose(draws.mean(axis=0), flat(params), atol=0.03)
    np.testing.assert_allclose(draws.std(axis=0), 1 / np.sqrt(n * s), rtol=0.2)


def test_bsam_without_noise_and_ascent(problem):
    """rho = 0, no prior, many examples, no memory: the gradient over s."""
    params, loss, _, _, g = problem
    tx = sharpness.bsam(0.0, 0.0, 0.0, 0.9, 0.0, 2.0, num_examples=1e30)
    np.testing.assert_allclose(flat(drive(tx, loss, params)[0]), g / 2, rtol=1e-9)


# ESAM.


def test_esam_climbs_with_some_leaves(problem):
    params, loss, a, w, g = problem
    beta, seen = 0.5, set()
    for t in range(12):
        updates, state = drive(sharpness.esam(RHO, beta, 1.0), loss, params, t=t)
        eps = np.linalg.solve(a, flat(updates)) - w
        keep = np.zeros(len(w), bool)
        for layer, leaf in (
            ('dense', 'kernel'),
            ('dense', 'bias'),
            ('norm', 'scale'),
            ('norm', 'bias'),
        ):
            part = under(params, layer) & under(params, leaf)
            keep[part] = np.abs(eps[part]).max() > 1e-6
        seen.add(tuple(keep))
        assert keep.any(), 'a step that climbs nowhere would pay for nothing'
        np.testing.assert_allclose(
            eps, RHO / beta * keep * g / norm(keep * g), rtol=1e-6, atol=1e-9
        )
        np.testing.assert_allclose(state.perturbation_norm, RHO / beta, rtol=1e-9)
    assert len(seen) > 4


def test_esam_asks_for_its_share_of_the_examples(problem):
    params, loss, *_ = problem
    asked = []

    def evaluate(tree, climb=False, most_risen=None):
        if most_risen is None:
            return sharpness.Evaluation(jax.grad(loss)(tree), loss(tree))
        asked.append(most_risen[0])
        assert most_risen[1].value == loss(params), 'since the clean pass'
        return sharpness.Evaluation(jax.tree.map(lambda x: 3.0 * jnp.ones_like(x), tree), 0.0)

    updates, _ = drive(sharpness.esam(RHO, 1.0, 0.3), loss, params, evaluate=evaluate)
    assert asked == [0.3] and (flat(updates) == 3.0).all()


# Losses.


def test_trajectory_loss():
    from sam_jax import losses

    rng = np.random.default_rng(0)
    z, y = jnp.asarray(rng.normal(size=(2, 5, 4)))
    tau = 3.0

    def soft(x):
        return jax.nn.softmax(x / tau)

    expected = tau**2 * jnp.sum(soft(y) * (jnp.log(soft(y)) - jnp.log(soft(z))), axis=-1)
    np.testing.assert_allclose(losses.trajectory(z, y, tau), expected, rtol=1e-9)
    by_logits = jax.grad(lambda z: jnp.mean(losses.trajectory(z, y, tau)))(z)
    np.testing.assert_allclose(by_logits, tau / 5 * (soft(z) - soft(y)), rtol=1e-9)
    np.testing.assert_allclose(losses.trajectory(y, y, tau), 0, atol=1e-12)
    centred = (z - y) - jnp.mean(z - y, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        losses.trajectory(z, y, 1e4), jnp.sum(centred**2, axis=-1) / 8, rtol=1e-3
    )


def test_methods_with_a_loss_say_so():
    assert sharpness.saf(0.2, 4.0, 7, 2).trajectory == sharpness.Trajectory(0.2, 4.0, 7, 2)
    assert sharpness.mesa(0.2, 4.0, 7).trajectory == sharpness.Trajectory(0.2, 4.0, 7, 0)
    assert sharpness.sam(RHO).trajectory is None


def test_methods_are_links_of_a_chain(problem):
    import optax

    params, loss, *_ = problem
    for name in ('sam', 'gsam', 'rst', 'frob_sam', 'esam'):
        tx = optax.chain(sharpness.create(name, rho=RHO), optax.scale(-2.0))
        updates, _ = drive(tx, loss, params)
        alone, _ = drive(sharpness.create(name, rho=RHO), loss, params)
        np.testing.assert_allclose(flat(updates), -2 * flat(alone), rtol=1e-10)
