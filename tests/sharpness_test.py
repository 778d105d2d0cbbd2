"""Sharpness-aware gradients against closed forms and their laws."""

import functools
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from quadratics import PS, RHO, SIZES, ball_step, flat, nans, quadratic, ravel, update

from sam_jax import sharpness

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


@pytest.mark.parametrize('platform', ['default', 'cuda'])
@pytest.mark.parametrize(
    'p, scale',
    [
        *itertools.product([1.003, 1.05, 1.5, 3.0, 7.0, 200.0, np.inf], [1e-30, 1e-12, 1e12, 1e30]),
        *itertools.product([2.0], [1e-36, 1e-20, 1.0, 1e19, 1e37]),
    ],
)
def test_step_does_not_depend_on_the_scale_of_the_gradient(monkeypatch, platform, p, scale):
    """In float32 |g|^(q-1) leaves the float range long before g does (q = 21 for p = 1.05)."""
    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, **way: way[platform](*args))
    tree, *_ = quadratic()
    scaled = jax.tree.map(lambda x: x * np.float32(scale), tree)
    ball = sharpness.ascent.lp_ball(RHO, p)
    eps, _ = ball.update(scaled, ball.init(tree))
    np.testing.assert_allclose(flat(eps), ball_step(flat(tree), RHO, p), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
        sharpness.trees.lp_norm(scaled, p) / np.float32(scale),
        np.linalg.norm(flat(tree).astype(float), p),
        rtol=1e-5,
    )


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
        stack(zero, grad_fn(params))
    )
    helpers.assert_trees_equal(jax.tree.map(lambda x: x[0], rows), zero)
    w = flat(params)
    np.testing.assert_allclose(
        flat(jax.tree.map(lambda x: x[1], rows)), a @ (w + ball_step(a @ w, RHO, p)), rtol=1e-4
    )


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
            np.testing.assert_allclose(flat(updates), a @ (w + ball_step(a @ w, RHO)), rtol=1e-5)
        np.testing.assert_allclose(state.perturbation_norm, RHO * (count % 2 == 0), rtol=1e-6)
        assert (state.count, state.evaluations) == (count + 1, count // 2 + 1)


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
        lambda c: tx.update(grads, state._replace(count=c), params, grad_fn=nans)
    )(counts)
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
            flat(swept(rho)), a @ (w + ball_step(a @ w, rho, p)), rtol=1e-5, atol=1e-5
        )
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


# The contract: errors, extra arguments, aux, states


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'rho': -0.1}, 'rho is -0.1'),
        ({'rho': -1}, 'rho is -1'),
        ({'rho': np.nan}, 'rho is nan'),
        ({'rho': np.float32(-1)}, 'rho is -1'),
        ({'rho': jnp.float32(-1)}, 'rho is -1'),
        ({'rho': np.inf}, 'rho is inf'),
        ({'rho': 0.1, 'p': 1.0}, 'p is 1.0'),
        ({'rho': 0.1, 'p': 1}, 'p is 1;'),
        ({'rho': 0.1, 'p': 0.5}, 'p is 0.5'),
        ({'rho': 0.1, 'p': -2.0}, 'p is -2.0'),
        ({'rho': 0.1, 'p': np.nan}, 'p is nan'),
    ],
)
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

    def ascend(grads, state, params, *, factor, **extra_args):
        assert extra_args.keys() == {'grad_fn', 'count'}
        return jax.tree.map(lambda g: factor * g, grads), state

    params, grad_fn, a = quadratic()
    w = flat(params)
    ascent = optax.GradientTransformationExtraArgs(lambda params: (), ascend)
    updates, state = update(sharpness.sharpness_aware(ascent), grad_fn, params, factor=0.5)
    np.testing.assert_allclose(flat(updates), a @ (w + 0.5 * a @ w), rtol=1e-5)
    np.testing.assert_allclose(state.perturbation_norm, 0.5 * np.linalg.norm(a @ w), rtol=1e-5)
    helpers.assert_trees_equal(
        *(
            update(sharpness.sam(RHO), grad_fn, params, **extra)[0]
            for extra in ({}, {'factor': 0.5})
        )
    )


def test_report_of_the_perturbed_pass():
    """With the gate shut it is the clean one's; the decision may be traced."""
    params, grad_fn, a = quadratic()
    w = flat(params)

    def loss_at(w):
        return w @ a @ w / 2

    loss = sharpness.Loss(
        lambda tree, **which: sharpness.Evaluation(
            grad_fn(tree), loss_at(ravel(tree)), 2 * loss_at(ravel(tree))
        )
    )
    moved = w + ball_step(a @ w, RHO)
    opened, shut = (a @ moved, loss_at(moved)), (a @ w, loss_at(w))
    assert opened[1] > 1.05 * shut[1]
    for gate, expected in [
        (sharpness.gate.always(), [opened, opened]),
        (sharpness.gate.never(), [shut, shut]),
        (every_other(), [opened, shut]),
    ]:
        tx = gated_sam(gate)
        state = tx.init(params)
        for expected_updates, value in expected:
            (updates, seen), state = tx.update(None, state, params, loss=loss, with_report=True)
            np.testing.assert_allclose(flat(updates), expected_updates, rtol=1e-5)
            np.testing.assert_allclose(
                [seen.clean.value, seen.perturbed.value, seen.perturbed.reported],
                [shut[1], value, 2 * value],
                rtol=1e-5,
            )
            np.testing.assert_allclose(
                sharpness.trees.lp_norm(seen.clean.grads), np.linalg.norm(a @ w), rtol=1e-5
            )


@pytest.mark.parametrize('platform, outside', [('default', 1), ('cuda', 0)])
def test_on_a_gpu_a_step_behind_a_gate_begins_with_it(monkeypatch, platform, outside):
    """Its host waits for the decision: no gradient is computed before it."""
    tx, params = gated_sam(every_other()), jnp.arange(3.0)
    loss = sharpness.from_loss_fn(lambda w: jnp.sum(jnp.sin(w)))
    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, **way: way[platform](*args))
    traced = jax.make_jaxpr(lambda state: tx.update(None, state, params, loss=loss))(
        tx.init(params)
    )
    names = [equation.primitive.name for equation in traced.eqns]
    assert names.count('cos') == outside
    assert str(traced).count('cos ') == 3 - outside


COSINES = ('ascent', 'perturbed', 'descent')


def _cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


@pytest.mark.parametrize('open_at', ['every', 'every other'])
def test_cosines_of_a_quadratic(open_at, x64):
    """Closed forms with g = Aw: SAM's g_p = A(w + rho n), and what its second order adds to it."""
    params, grad_fn, a = quadratic(np.float64)
    w = flat(params)
    g = a @ w
    n = g / np.linalg.norm(g)
    g_p = a @ (w + RHO * n)
    exact = g_p + RHO / np.linalg.norm(g) * a @ (g_p - n * (n @ g_p))
    scaled = ball_step(g, RHO, 3.0)
    further = w + 0.5 * RHO * n
    n_2 = a @ further / np.linalg.norm(a @ further)
    two = 0.5 * RHO * (n + n_2)
    cases = [
        (sharpness.sam(RHO), (1.0, _cosine(g, g_p), 1.0)),
        (sharpness.sam(RHO, p=3.0), (_cosine(g, scaled), _cosine(g, a @ (w + scaled)), 1.0)),
        (sharpness.second_order_sam(RHO), (1.0, _cosine(g, g_p), _cosine(g_p, exact))),
        (sharpness.multistep_sam(RHO, 2, 0.5), (_cosine(g, two), _cosine(g, a @ (w + two)), 1.0)),
        (sharpness.gnp(RHO, 0.3), (1.0, _cosine(g, g_p), _cosine(g_p, 0.7 * g + 0.3 * g_p))),
    ]
    assert max(_cosine(g, g_p), _cosine(g_p, exact), _cosine(g, two)) < 1 - 1e-7
    if open_at == 'every other':
        cases = [(gated_sam(every_other()), cases[0][1])]
    loss = sharpness.Loss(
        lambda tree, **which: sharpness.Evaluation(grad_fn(tree)), compare=sharpness.trees.cosine
    )
    for tx, expected in cases:
        state = tx.init(params)
        (_, seen), state = tx.update(None, state, params, loss=loss, with_report=True)
        assert seen.cosines.keys() == {*COSINES}
        np.testing.assert_allclose([seen.cosines[name] for name in COSINES], expected, rtol=1e-9)
        (_, unseen), _ = tx.update(
            None, state, params, loss=sharpness.Loss(loss.evaluate), with_report=True
        )
        assert not unseen.cosines
    if open_at == 'every other':
        (_, seen), _ = tx.update(None, state, params, loss=loss, with_report=True)
        np.testing.assert_allclose([seen.cosines[name] for name in COSINES], [0, 1, 1], rtol=1e-12)


def test_the_cosine_of_a_step_that_reuses_an_ascent(x64):
    """LookSAM then hands on g + alpha (|g| / |g_v|) g_v, with g_v orthogonal to g."""
    params, grad_fn, _ = quadratic(np.float64)
    loss = sharpness.Loss(
        lambda tree, **which: sharpness.Evaluation(grad_fn(tree)), compare=sharpness.trees.cosine
    )
    tx = sharpness.looksam(RHO, k=2, alpha=0.7)
    _, state = tx.update(None, tx.init(params), params, loss=loss)
    (_, seen), _ = tx.update(None, state, params, loss=loss, with_report=True)
    expected = [0, 1, 1 / np.sqrt(1 + 0.7**2)]
    np.testing.assert_allclose([seen.cosines[name] for name in COSINES], expected, rtol=1e-12)


def test_the_cosine_of_tiny_huge_and_no_gradients():
    tree = {'a': jnp.array([3.0, 0.0]), 'b': jnp.array(4.0)}
    other = {'a': jnp.array([0.0, 1.0]), 'b': jnp.array(1.0)}
    for scale in (1e-30, 1.0, 1e30):
        scaled = jax.tree.map(lambda x, s=scale: s * x, tree)
        np.testing.assert_allclose(
            sharpness.trees.cosine(scaled, other), 0.8 / np.sqrt(2), rtol=1e-6
        )
    assert sharpness.trees.cosine(tree, jax.tree.map(jnp.zeros_like, tree)) == 0
