"""Every named method: the laws that all keep; and the paper's own variants of SAM."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quadratics import RHO, ball_step, drive, flat, layers, make, quadratic, ravel, update

from sam_jax import sharpness
from sam_jax.sharpness import ascent

KEY = jax.random.key(7)

# Every method with its defaults, and what its other settings make of it.
ROWS = [(name, {}) for name in sharpness.METHODS] + [
    ('sam', {'p': np.inf}),
    ('sam', {'p': 3.0}),
    ('asam', {'adapt': 'all', 'eta': 0.0}),
    ('sam_on', {'p': np.inf}),
    ('sparse_sam', {'period': 1, 'sparsity': 0.8}),
    ('wsam', {'decoupled': False}),
    ('gradient_constrained', {'low': 0.0, 'per_leaf': False}),
    ('looksam', {'k': 2, 'per_leaf': True}),
    ('rst', {'alpha': 1.5}),
    ('late_phase_sam', {'start': 0.5, 'total_steps': 4}),
    ('ae_looksam', {'total_steps': 6}),
    ('trace_sam', {'n': 3}),
    ('det_sam', {'n': 2}),
    ('frob_sam', {'n': 4}),
    ('extrapolated', {'by': 'noise'}),
    ('extrapolated', {'by': 'gradient'}),
    ('esam', {'beta': 1.0, 'gamma': 1.0}),
]

# Those that go on where the gradient is zero.
RESTLESS = {'random_sam', 'trace_sam', 'det_sam', 'frob_sam', 'bsam', 'extrapolated noise'}
# Those of which perturbation_norm is the radius from the first step on.
ON_THE_SPHERE = {
    'sam',
    'asam',
    'fisher_sam',
    'layerwise_sam',
    'sam_on',
    'random_sam',
    'multistep_sam',
    'second_order_sam',
    'vasso',
    'friendly_sam',
    'gsam',
    'wsam',
    'gnp',
    'gradient_constrained',
    'cr_sam',
    'stable_sam',
    'looksam',
    'look_layersam',
    'periodic_sam',
    'ae_sam',
    'ae_looksam',
    'momentum_sam',
    'functional_sam',
}
GATED = {
    'looksam',
    'look_layersam',
    'ae_sam',
    'ae_looksam',
    'periodic_sam',
    'late_phase_sam',
    'rst',
}
NO_RADIUS = {'sgd', 'saf', 'mesa'}
NOT_FIRST_ORDER = {'det_sam', 'frob_sam', 'bsam', 'sampa', 'looksam', 'look_layersam', 'ae_looksam'}


def _update(tx, grad_fn, params, state=None, key=KEY):
    return update(tx, grad_fn, params, state, key=key)


class Row:
    """A method with settings, and its update compiled once for all laws."""

    def __init__(self, name, options):
        self.name, self.options = name, options
        self.calls = []
        self.params, self.loss, _ = layers()

        @functools.partial(jax.jit, donate_argnums=2)
        def step(rho, params, state, t):
            tx = self(rho=rho)
            updates, state = drive(
                tx, self.loss, params, state, t, note=lambda: self.calls.append(1)
            )
            correction = sharpness.add_correction(jax.tree.map(jnp.zeros_like, params), state, 1.0)
            return updates, state, correction

        self.step = step

    def __call__(self, **changes):
        return make(self.name, **{'rho': RHO, **self.options, **changes})

    def trajectory(self, rho, params, steps, factor=1.0):
        """Updates, state and correction of each step, the params shrinking by `factor`."""
        state = self().init(params)
        for t in range(steps):
            updates, state, correction = self.step(rho, params, state, t)
            yield params, updates, jax.device_get(state), correction
            params = jax.tree.map(lambda w: factor * w, params)

    def __str__(self):
        return ' '.join(map(str, (self.name, *self.options.values())))


@pytest.fixture(params=[Row(*row) for row in ROWS], ids=str, scope='module')
def method(request):
    return request.param


# What all of them keep.


def test_zero_gradient_is_finite(method):
    zero = jax.tree.map(jnp.zeros_like, method.params)
    for _, updates, state, correction in method.trajectory(RHO, zero, 2):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
        if not RESTLESS & {method.name, str(method)}:
            helpers.assert_trees_equal((updates, correction), (zero, zero))


def test_rho_zero_is_the_base(method):
    """Bit for bit, at each of several steps, and for what a method adds past the optimizer."""
    if method.name in ('bsam', 'sampa'):
        pytest.skip('their rho = 0 is something else, see other_means_test')
    gradient = jax.jit(jax.grad(method.loss))
    for params, updates, state, correction in method.trajectory(0.0, method.params, 6, 0.9):
        helpers.assert_trees_equal(updates, gradient(params))
        assert state.perturbation_norm == 0 and not flat(correction).any()


def test_state_keeps_its_type_and_the_step_compiles_once(method):
    """So that it can be donated and checkpointed; rho is a value of the one program."""
    state = method().init(method.params)
    kinds = jax.tree.map(jax.typeof, state)
    for t, rho in enumerate((0.1, 0.2, 0.3)):
        _, state, _ = method.step(rho, method.params, state, t)
        assert jax.tree.map(jax.typeof, state) == kinds
    # The three laws above call it with Python numbers, all of one kind.
    assert method.step._cache_size() == 1
    assert state.count == 3


def test_outside_of_jit_an_update_is_compiled_once(method):
    """Where nothing is gated: a branch that is a closure would be compiled at each call."""
    if method.name in GATED or method.name == 'second_order_sam':
        pytest.skip('the two ways of a gate, and what a jvp makes of a branch, are closures')
    tx, state = method(), method().init(method.params)
    for _ in range(2):
        with helpers.compilations() as compiled:
            _, state = drive(tx, method.loss, method.params, state, 1)
    assert not compiled


def test_gradient_evaluations(method):
    """As documented, as counted in the state, and as called; one in a jvp is counted as two."""
    jax.effects_barrier()
    method.calls.clear()
    expected = 0
    for t, (_, _, state, _) in enumerate(method.trajectory(RHO, method.params, 6, 0.9)):
        jax.effects_barrier()
        in_jvp = (t + 1) * (method.name == 'second_order_sam')
        assert len(method.calls) == state.evaluations + (t + 1) - in_jvp
        documented = sharpness.gradients(method.name, t, **method.options)
        if documented:
            expected += documented - 1
            assert state.evaluations == expected


def test_perturbation_is_rho_long(method):
    *_, (_, _, state, _) = method.trajectory(RHO, method.params, 1)
    if method.name in ON_THE_SPHERE:
        np.testing.assert_allclose(state.perturbation_norm, RHO, rtol=1e-6)
    elif method.name in NO_RADIUS:
        assert state.perturbation_norm == 0


def test_rho_scales_what_it_adds(method):
    """A small rho has an effect of first order, so a rho that is ignored is noticed."""
    if method.name in NO_RADIUS | NOT_FIRST_ORDER or str(method) == 'late_phase_sam':
        pytest.skip('see the closed forms')

    def added(rho):
        return np.sum(
            [
                flat(updates) - flat(correction) - flat(jax.grad(method.loss)(params))
                for params, updates, _, correction in method.trajectory(rho, method.params, 8)
            ],
            axis=0,
        )

    one, two = added(2e-3), added(4e-3)
    np.testing.assert_allclose(np.linalg.norm(two) / np.linalg.norm(one), 2, atol=0.1)


def test_bfloat16_params(method):
    """Moved in float32, of the dtype that they had; states are at least float32."""
    params, loss, _ = layers()
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
    tx = method(rho=0.05)
    seen = []

    def noting(tree):
        seen.extend(x.dtype for x in jax.tree.leaves(tree))
        return loss(tree)

    updates, state = drive(tx, noting, narrow)
    expected, _ = drive(tx, loss, wide)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    # An exponent of differences of losses over rho^2 is no matter for bfloat16.
    assert (
        method.name == 'det_sam'
        or helpers.relative_distance(
            jax.tree.map(lambda x: x.astype(jnp.float32), updates), expected
        )
        < 0.02
    )
    if method.name not in NO_RADIUS | {'late_phase_sam', 'rst'}:
        assert jnp.dtype(jnp.float32) in seen
    kept = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert kept <= {jnp.dtype(jnp.float32)}


def test_the_report_is_of_both_passes(method):
    params, loss, _ = layers()
    tx = method()

    def evaluate(tree, **which):
        return sharpness.Evaluation(
            jax.grad(loss)(tree), loss(tree), 2 * loss(tree), {'thrice': 3 * loss(tree)}
        )

    (updates, seen), _ = drive(tx, loss, params, evaluate=evaluate, with_report=True)
    helpers.assert_trees_close(updates, drive(tx, loss, params)[0], rtol=1e-6)
    np.testing.assert_allclose(seen.clean.aux['thrice'], 3 * seen.clean.value, rtol=1e-6)
    for at in (seen.clean, seen.perturbed):
        np.testing.assert_allclose(at.reported, 2 * at.value, rtol=1e-6)
    if method.name in ON_THE_SPHERE - {'momentum_sam'}:
        assert seen.clean.value == loss(params) != seen.perturbed.value


ASKS = {'sampa', 'esam', 'functional_sam', 'trace_sam', 'det_sam', 'frob_sam', 'saf', 'mesa'}


def test_a_link_is_given_gradients_or_a_loss(method):
    """A chain's way, grads and grad_fn, and the train step's are the same; gates, scan and all."""
    if method.name in ASKS:
        pytest.skip('a gradient function is not enough, see below')
    tx, (params, loss, _) = method(), layers()

    def both(params):
        def in_a_chain(state, t):
            key, gate_key = (jax.random.fold_in(jax.random.key(i), t) for i in (7, 8))
            updates, state = optax.chain(tx, optax.scale(1.0)).update(
                jax.grad(loss)(params),
                (state, optax.EmptyState()),
                params,
                grad_fn=jax.grad(loss),
                key=key,
                gate_key=gate_key,
                momentum=params,
                learning_rate=0.1,
            )
            return state[0], updates

        def step(states, t):
            updates, state = drive(tx, loss, params, states[1], t, corrected=False)
            ours = in_a_chain(states[0], t)
            return (ours[0], state), (ours[1], updates)

        states, updates = jax.lax.scan(step, (tx.init(params), tx.init(params)), jnp.arange(3))
        return (states[0], updates[0]), (states[1], updates[1])

    # With traced gates all that a branch returns must have one type, in bfloat16 too.
    narrow = jax.eval_shape(both, jax.tree.map(lambda w: w.astype(jnp.bfloat16), params))
    assert narrow[0] == narrow[1]
    helpers.assert_trees_close(*jax.jit(both)(params), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('rho', [-1.0, np.nan, np.inf])
def test_bad_rho(method, rho):
    if method.name not in NO_RADIUS:
        with pytest.raises(ValueError, match='must be'):
            method(rho=rho)


BAD = [
    ('sam', {'p': 1.0}),
    ('asam', {'eta': -0.1}),
    ('asam', {'adapt': 'none'}),
    ('fisher_sam', {'eta': np.nan}),
    ('sam_on', {'p': 0.5}),
    ('sparse_sam', {'sparsity': 1.0}),
    ('sparse_sam', {'period': 0}),
    ('vasso', {'theta': 0.0}),
    ('friendly_sam', {'lam': 1.0}),
    ('friendly_sam', {'sigma': np.inf}),
    ('gsam', {'alpha': np.nan}),
    ('wsam', {'gamma': 1.0}),
    ('gnp', {'alpha': np.inf}),
    ('gradient_constrained', {'up': np.nan}),
    ('gradient_constrained', {'low': 0.9}),
    ('multistep_sam', {'step_size': np.inf}),
    ('cr_sam', {'beta': np.nan}),
    ('looksam', {'k': 0}),
    ('looksam', {'alpha': np.nan}),
    ('look_layersam', {'k': 0}),
    ('periodic_sam', {'k': -1}),
    ('late_phase_sam', {'start': 1.1}),
    ('late_phase_sam', {'start': 0.5, 'end': 0.5}),
    ('rst', {'probability': 1.1}),
    ('rst', {'final_probability': -0.1}),
    ('rst', {'alpha': np.nan}),
    ('ae_sam', {'delta': 1.0}),
    ('ae_sam', {'lambda1': np.nan}),
    ('ae_looksam', {'alpha': np.inf}),
    ('trace_sam', {'n': 0}),
    ('trace_sam', {'lam': np.nan}),
    ('det_sam', {'h': 0.0}),
    ('det_sam', {'n': 0}),
    ('frob_sam', {'n': 1}),
    ('frob_sam', {'lam': np.nan}),
    ('extrapolated', {'by': 'future'}),
    ('sampa', {'lam': 1.1}),
    ('bsam', {'beta1': 1.0}),
    ('bsam', {'damping': -1.0}),
    ('bsam', {'init_precision': 0.0}),
    ('bsam', {'data_factor': 0.0}),
    ('saf', {'tau': 0.0}),
    ('saf', {'epochs_ago': 0}),
    ('saf', {'lam': -1.0}),
    ('le_sam', {'sigma': 0.0}),
    ('wsam', {'max_norm': -1.0}),
    ('mesa', {'start_epoch': -1}),
    ('esam', {'beta': 0.0}),
    ('esam', {'gamma': 1.1}),
]


@pytest.mark.parametrize('name,settings', BAD, ids=str)
def test_bad_settings(name, settings):
    with pytest.raises(ValueError, match='must be|needs? ') as e:
        make(name, rho=RHO, **settings)
    assert any(key in str(e.value) for key in settings)


def test_create_takes_what_the_method_takes():
    params, grad_fn, _ = quadratic()
    made = sharpness.create('sam', rho=RHO, p=3.0, alpha=0.2, k=5)
    helpers.assert_trees_equal(
        *(update(tx, grad_fn, params)[0] for tx in (made, sharpness.sam(RHO, p=3.0)))
    )
    base, _ = update(sharpness.create('sgd', rho=RHO, p=2.0), grad_fn, params)
    helpers.assert_trees_equal(base, grad_fn(params))


@pytest.mark.parametrize(
    'method_name,words',
    [
        ('random_sam', 'needs a key'),
        ('esam', 'needs a key'),
        ('rst', 'gate_key'),
        ('trace_sam', 'needs a key'),
        ('momentum_sam', 'momentum'),
        ('sampa', 'learning rate'),
        ('bsam', 'bSAM needs a key'),
        ('extrapolated noise', 'needs a key'),
        ('saf', 'losses.trajectory'),
        ('mesa', 'added_loss=True'),
        ('functional_sam', 'cotangents_of'),
    ],
)
def test_what_is_missing_is_named(method_name, words):
    params, loss, _ = layers()
    name, *by = method_name.split()
    tx = make(name, rho=RHO, **({'by': by[0]} if by else {}))
    with pytest.raises(TypeError, match=words):
        tx.update(jax.grad(loss)(params), tx.init(params), params, grad_fn=jax.grad(loss))


@pytest.mark.parametrize(
    'name,words',
    [
        ('esam', 'most_risen'),
        ('sampa', 'previous'),
        ('trace_sam', 'from_loss_fn'),
        ('functional_sam', 'sharpness.Loss'),
    ],
)
def test_what_a_gradient_function_cannot_tell(name, words):
    params, loss, _ = layers()
    tx = make(name, rho=RHO)
    with pytest.raises(TypeError, match=words):
        tx.update(
            jax.grad(loss)(params),
            tx.init(params),
            params,
            grad_fn=jax.grad(loss),
            key=KEY,
            learning_rate=0.1,
        )


# What a plain chain is given: grad_fn, and the few things that are there anyway.
def _in_a_plain_chain(name, params, loss_fn, steps=5, settings=(), **extra):
    tx = optax.chain(make(name, rho=RHO, **dict(settings)), optax.sgd(0.1, momentum=0.9))
    state, result = tx.init(params), []
    for t in range(steps):
        key = jax.random.fold_in(KEY, t)
        given = {
            'key': key,
            'gate_key': key,
            'learning_rate': 0.1,
            'momentum': optax.tree.get(state, 'trace'),
            'value': loss_fn(params),
            **extra,
        }
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params, **given)
        params = optax.apply_updates(params, updates)
        result.append(flat(params))
    return np.stack(result)


@pytest.mark.parametrize('name', sorted(set(sharpness.METHODS) - {'sgd'}))
def test_no_method_is_silently_sgd(name):
    """Five steps in a plain chain differ from SGD's, or a sentence says what is missing."""
    params, loss, _ = layers()
    sgd = _in_a_plain_chain('sgd', params, loss, grad_fn=jax.grad(loss))
    settings = {'total_steps': 5, 'start': 0.5} if name == 'late_phase_sam' else {}
    if name in ASKS:
        with pytest.raises(TypeError, match='tx.update|losses.trajectory'):
            _in_a_plain_chain(name, params, loss, grad_fn=jax.grad(loss))
        if name not in ('trace_sam', 'det_sam', 'frob_sam'):
            return
        ours = _in_a_plain_chain(name, params, loss, loss=sharpness.from_loss_fn(loss))
    else:
        ours = _in_a_plain_chain(name, params, loss, settings=settings, grad_fn=jax.grad(loss))
    assert np.abs(ours - sgd).max() > 1e-4


@pytest.mark.parametrize(
    'name,missing',
    [
        ('late_phase_sam', 'total_steps'),
        ('ae_sam', 'total_steps'),
        ('ae_looksam', 'total_steps'),
        ('bsam', 'num_examples'),
    ],
)
def test_what_only_the_caller_knows_has_no_default(name, missing):
    with pytest.raises(ValueError, match=f'{missing} is not given'):
        sharpness.create(name, rho=RHO)


# What each gradient that a method asks for is for, in order, where that is not SAM's way.
ASKED = {
    **dict.fromkeys(['sgd', 'momentum_sam', 'extrapolated', 'saf', 'mesa'], [False]),
    **dict.fromkeys(['trace_sam', 'det_sam', 'sampa'], [False, False]),
    'frob_sam': [False] * 3,
    'cr_sam': [True, False, False],
    'multistep_sam': [True, True, False],
    'second_order_sam': [True, False, True],
    'late_phase_sam': [False],
}


@pytest.mark.parametrize('name', sharpness.METHODS)
def test_what_is_climbed_is_asked_for_as_such(name):
    """The gradient of an ascent and of a Hessian; that which descends is another (shake models)."""
    params, loss, _ = layers()
    asked = []

    def evaluate(tree, climb=False, **which):
        asked.append(bool(climb))
        return sharpness.Evaluation(jax.grad(loss)(tree), loss(tree))

    with jax.disable_jit():
        drive(
            make(name, rho=RHO, probability=1.0, final_probability=1.0),
            loss,
            params,
            evaluate=evaluate,
        )
    assert asked == ASKED.get(name, [True, False])


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
    np.testing.assert_allclose(np.linalg.norm(several, ord=p, axis=1), RHO, rtol=2e-4)
    np.testing.assert_array_equal(eps(KEY), eps(KEY, -3.0))
    values = len(np.unique(several[:, 0].round(5)))
    assert values == 2 if p == np.inf else values > 350
    # Of a uniform direction each entry has variance rho^2 / dimension; 400 draws.
    spread = RHO * (1 if p == np.inf else w.size**-0.5)
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
    helpers.assert_trees_equal(
        *(
            update(tx, grad_fn, params)[0]
            for tx in (sharpness.multistep_sam(RHO, 1, p=p), sharpness.sam(RHO, p))
        )
    )


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
            flat(updates), values[-1] * (2.0 + RHO) * vectors[:, -1], rtol=1e-4, atol=1e-5
        )


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


@pytest.mark.parametrize(
    'settings,words',
    [({'p': 3.0}, 'need 2 or inf'), ({'steps': 0}, 'at least 1'), ({'step_size': 0.0}, 'greater')],
)
def test_bad_steps(settings, words):
    with pytest.raises(ValueError, match=words):
        sharpness.multistep_sam(RHO, **settings)


# The second-order term.


def _loss(w):
    """Neither quadratic nor symmetric."""
    x = jnp.linspace(-1.0, 2.0, w.size)
    return jnp.sum(jnp.cos(w * x)) + jnp.sum(w**4) / 10 + jnp.prod(w[:4] + 0.5) + w @ x


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
