"""Settings with which one method is another: on trajectories of momentum SGD, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from quadratics import RHO, drive, flat, layers, make, ravel

from sam_jax import sharpness
from sam_jax.sharpness import combine, gate

STEPS = 12


def _trajectory(tx, steps=STEPS, momentum=0.9, lr=0.05, rho_of=None):
    """Params after every step, flat, of a method in front of SGD; a quartic, noisy by the step."""
    params, loss, _ = layers(np.float64)

    def noisy(t):
        shift = jax.random.normal(jax.random.key(t), (ravel(params).size,))
        return lambda tree: loss(tree) + jnp.sum(ravel(tree) ** 4) / 8 + shift @ ravel(tree)

    descent = optax.sgd(lr, momentum)
    state, opt_state, result = tx.init(params), descent.init(params), []

    @jax.jit
    def step(params, state, opt_state, t):
        updates, state = drive(tx, noisy(t), params, state, t, opt_state[0].trace, lr)
        updates, opt_state = descent.update(updates, opt_state, params)
        updates = sharpness.add_correction(updates, state, lr)
        return optax.apply_updates(params, updates), state, opt_state

    for t in range(steps):
        params, state, opt_state = step(params, state, opt_state, t)
        result.append(flat(params))
    return np.stack(result)


def _make(name, **settings):
    return make(name, rho=RHO, **settings)


# Each is SAM.
TO_SAM = [
    ('sam', {'mask': True}),
    ('fisher_sam', {'eta': 0.0}),
    ('le_sam', {'sigma': 1e9}),
    ('sparse_sam', {'sparsity': 0.0, 'period': 2}),
    ('multistep_sam', {'steps': 1}),
    ('vasso', {'theta': 1.0}),
    ('friendly_sam', {'sigma': 0.0}),
    ('gsam', {'alpha': 0.0}),
    ('wsam', {'gamma': 0.5, 'decoupled': False}),
    ('gnp', {'alpha': 1.0}),
    ('gradient_constrained', {'up': -1.0, 'low': 0.0}),
    ('gradient_constrained', {'up': -1.0, 'low': 0.0, 'per_leaf': False}),
    ('cr_sam', {'gamma': 0.0, 'beta': 0.0}),
    ('looksam', {'k': 1}),
    ('periodic_sam', {'k': 1}),
    ('late_phase_sam', {'start': 0.0, 'total_steps': STEPS}),
    ('rst', {'probability': 1.0, 'final_probability': 1.0}),
    ('ae_sam', {'lambda1': -1e9, 'lambda2': -1e9}),
    ('ae_looksam', {'lambda1': -1e9, 'lambda2': -1e9, 'total_steps': STEPS}),
    ('esam', {'beta': 1.0, 'gamma': 1.0}),
]
# Each is the base optimizer.
TO_BASE = [
    ('wsam', {'gamma': 0.0}),
    ('wsam', {'gamma': 0.0, 'decoupled': False}),
    ('gnp', {'alpha': 0.0}),
    ('gradient_constrained', {'low': 1.01, 'up': 1.02}),
    ('gradient_constrained', {'low': 1.01, 'up': 1.02, 'per_leaf': False}),
    ('late_phase_sam', {'start': 0.999, 'total_steps': STEPS}),
    ('rst', {'probability': 0.0, 'final_probability': 0.0}),
    ('trace_sam', {'lam': 0.0}),
    ('det_sam', {'lam': 0.0}),
    ('frob_sam', {'lam': 0.0}),
    ('saf', {}),
    ('mesa', {}),
]


@functools.cache
def _known(name):
    return _trajectory(_make(name))


@pytest.mark.parametrize('name,settings', TO_SAM, ids=str)
def test_is_sam(name, settings, x64):
    sam = _known('sam')
    np.testing.assert_allclose(_trajectory(_make(name, **settings)), sam, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name,settings', TO_BASE, ids=str)
def test_is_the_base(name, settings, x64):
    base = _known('sgd')
    np.testing.assert_allclose(_trajectory(_make(name, **settings)), base, rtol=1e-9, atol=1e-12)


def test_neither_is_the_other(x64):
    sam, base = _known('sam'), _known('sgd')
    assert np.linalg.norm(sam[-1] - base[-1]) > 0.01


@pytest.mark.parametrize(
    'one,other',
    [
        (('gnp', {'alpha': 9.0}), ('wsam', {'gamma': 0.9, 'decoupled': False})),
        (
            ('rst', {'alpha': 0.3, 'probability': 1.0, 'final_probability': 1.0}),
            ('gnp', {'alpha': 0.3}),
        ),
        (('gsam', {'alpha': 0.0}), ('gradient_constrained', {'low': 0.0, 'up': -1.0})),
        (('ae_looksam', {'alpha': 0.0}), ('ae_sam', {})),
        (('looksam', {'k': 3, 'alpha': 0.0}), ('periodic_sam', {'k': 3})),
        (('look_layersam', {'k': 1}), ('layerwise_sam', {})),
    ],
    ids=str,
)
def test_are_the_same(one, other, x64):
    a, b = (_trajectory(_make(name, **settings)) for name, settings in (one, other))
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    sam = _known('sam')
    assert one[0] == 'gsam' or np.abs(a - sam).max() > 1e-3


def test_wsam_decoupled_is_coupled_without_momentum_only(x64):
    for momentum, same in ((0.0, True), (0.9, False)):
        a, b = (
            _trajectory(_make('wsam', gamma=0.7, decoupled=d), momentum=momentum)
            for d in (True, False)
        )
        assert np.allclose(a, b, rtol=1e-9, atol=1e-12) == same


def test_asam_of_weights_that_are_not_adapted_is_sam(x64):
    """Where T = |w| + eta = 1, or nothing is adapted."""
    params = {'bias': jnp.arange(3.0), 'more': {'bias': jnp.ones(2)}}

    def loss(tree):
        return jnp.sum(ravel(tree) ** 4) + jnp.sum(jnp.sin(ravel(tree)))

    ones = jax.tree.map(jnp.ones_like, params)
    for point, settings in ((params, {'eta': 0.3}), (ones, {'eta': 0.0, 'adapt': 'all'})):
        a, b = (
            drive(tx, loss, point)[0]
            for tx in (sharpness.asam(RHO, **settings), sharpness.sam(RHO))
        )
        np.testing.assert_allclose(flat(a), flat(b), rtol=1e-12)
    other, _ = drive(sharpness.asam(RHO, adapt='all'), loss, params)
    assert np.abs(flat(other) - flat(drive(sharpness.sam(RHO), loss, params)[0])).max() > 0.01


@pytest.mark.parametrize('beta', [0.0, 0.3])
def test_cr_sam_on_a_quadratic_is_a_mixture(beta, x64):
    """The second difference vanishes there: g + (1 + 2 beta) (g_p - g), whatever gamma is."""
    params, loss, _ = layers(np.float64)
    a, b = (
        drive(tx, loss, params)[0]
        for tx in (
            sharpness.cr_sam(RHO, gamma=0.7, beta=beta),
            sharpness.gnp(RHO, alpha=1 + 2 * beta),
        )
    )
    np.testing.assert_allclose(flat(a), flat(b), rtol=1e-9)


def test_sampa_with_the_clean_gradient_and_lam_zero_is_sam(x64):
    params, loss, _ = layers(np.float64)
    tx = sharpness.sampa(RHO, lam=0.0)
    state = tx.init(params)._replace(memory=jax.grad(loss)(params))
    np.testing.assert_allclose(
        *(flat(drive(t, loss, params, s)[0]) for t, s in ((tx, state), (sharpness.sam(RHO), None))),
        rtol=1e-12,
    )


@pytest.mark.parametrize('steps', [2, 3])
def test_several_short_steps_are_optax_s(steps, x64):
    """optax.contrib.sam with sync_period = steps + 1 does not project; nor need short steps."""
    params, loss, _ = layers(np.float64)
    theirs = optax.contrib.sam(
        optax.sgd(0.1, 0.9),
        optax.chain(optax.contrib.normalize(), optax.sgd(RHO / steps)),
        sync_period=steps + 1,
        opaque_mode=True,
    )
    ours = optax.chain(
        sharpness.multistep_sam(RHO, steps, step_size=1 / steps), optax.sgd(0.1, 0.9)
    )
    grad_fn = jax.grad(loss)
    ends = []
    for tx, fn in ((ours, grad_fn), (theirs, lambda w, i: grad_fn(w))):
        w, state = params, tx.init(params)
        for _ in range(8):
            updates, state = tx.update(grad_fn(w), state, w, grad_fn=fn)
            w = optax.apply_updates(w, updates)
        ends.append(flat(w))
    np.testing.assert_allclose(*ends, rtol=1e-9, atol=1e-12)


def test_momentum_sam_is_the_paper_s_algorithm(x64):
    """Algorithm 1 of 2401.12033: perturbed params, undone before each step and made anew after."""
    params, loss, a = layers(np.float64)
    rho, mu, lr = 0.3, 0.9, 0.05
    w = visible = flat(params)
    v = np.zeros_like(w)
    expected = []
    for _ in range(STEPS):
        g = a @ visible
        w = visible + rho * v / (np.linalg.norm(v) or 1.0)
        v = mu * v + g
        w = w - lr * v
        visible = w - rho * v / np.linalg.norm(v)
        expected.append(w)
    np.testing.assert_allclose(
        _on_quadratic(sharpness.momentum_sam(rho), loss, params, mu, lr), expected, rtol=1e-10
    )


def _on_quadratic(tx, loss, params, mu, lr):
    descent = optax.sgd(lr, mu)
    state, opt_state, result = tx.init(params), descent.init(params), []
    for t in range(STEPS):
        updates, state = drive(tx, loss, params, state, t, opt_state[0].trace, lr)
        updates, opt_state = descent.update(updates, opt_state, params)
        params = optax.apply_updates(params, updates)
        result.append(flat(params))
    return result


def test_the_shift_by_the_next_step_is_nesterov(x64):
    """w - lr mu v in place of w - rho v / |v|: the look-ahead form of Nesterov's momentum."""
    from sam_jax.sharpness import ascent
    from sam_jax.sharpness.methods import one_gradient

    params, loss, a = layers(np.float64)
    mu, lr = 0.9, 0.05
    tx = one_gradient.elsewhere(ascent.unnormalized(lr * mu), one_gradient.against_momentum)
    w, v, expected = flat(params), 0.0, []
    for _ in range(STEPS):
        v = mu * v + a @ (w - lr * mu * v)
        w = w - lr * v
        expected.append(w)
    np.testing.assert_allclose(_on_quadratic(tx, loss, params, mu, lr), expected, rtol=1e-10)


def test_a_gate_that_is_always_open_costs_a_gradient_each_time(x64):
    params, loss, _ = layers(np.float64)
    for tx, extra in (
        (sharpness.periodic_sam(RHO, 5), 4),
        (sharpness.sam(RHO), 20),
        (
            sharpness.sharpness_aware(
                sharpness.ascent.lp_ball(RHO), combine.perturbed(), gate.every(1)
            ),
            20,
        ),
    ):
        state = tx.init(params)
        step = jax.jit(lambda state, t, tx=tx: drive(tx, loss, params, state, t)[1])
        for t in range(20):
            state = step(state, t)
        assert state.evaluations == extra
