"""What each method computes, against its formula in NumPy on a quadratic or another known loss."""


import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quadratics import RHO, drive, flat, layers, ravel

from sam_jax import sharpness
from sam_jax.sharpness import combine, direction, gate, mask, universal

pytestmark = pytest.mark.usefixtures('x64')


@pytest.fixture(autouse=True)
def problem(x64):
    """Sets what the formulas are of: w, A, g = A w, and the gradient at w + eps."""
    params, loss, a = layers(np.float64)
    w = flat(params)
    return params, loss, a, w, a @ w


def _norm(x):
    return np.linalg.norm(x)


def _of(tree, name):
    """Which entries of flat(tree) lie under a path that contains the name."""
    marks = jax.tree_util.tree_map_with_path(
        lambda path, x: np.full(np.shape(x), name in jax.tree_util.keystr(path)), tree)
    return flat(marks).astype(bool)


# Ascents.


def test_unnormalized(problem):
    params, loss, a, w, g = problem
    updates, state = drive(sharpness.unnormalized_sam(RHO), loss, params)
    np.testing.assert_allclose(flat(updates), a @ (np.eye(len(w)) + RHO * a) @ w, rtol=1e-10)
    np.testing.assert_allclose(state.perturbation_norm, RHO * _norm(g), rtol=1e-10)


@pytest.mark.parametrize('adapt', ['weights', 'kernels', 'all'])
@pytest.mark.parametrize('eta', [0.0, 0.2])
def test_asam(problem, adapt, eta):
    params, loss, a, w, g = problem
    t = np.abs(w) + eta
    if adapt != 'all':
        t = np.where(_of(params, 'bias'), 1.0, t)
    if adapt == 'kernels':
        t = np.where(_of(params, 'scale'), 1.0, t)
    eps = RHO * t ** 2 * g / _norm(t * g)
    updates, state = drive(sharpness.asam(RHO, eta, adapt), loss, params)
    np.testing.assert_allclose(flat(updates), a @ (w + eps), rtol=1e-10)
    np.testing.assert_allclose([_norm(eps / t), state.perturbation_norm], RHO, rtol=1e-10)


@pytest.mark.parametrize('eta', [0.5, 3.0])
def test_fisher(problem, eta):
    params, loss, a, w, g = problem
    inverse = 1 / (1 + eta * g ** 2)
    eps = RHO * inverse * g / np.sqrt(g @ (inverse * g))
    np.testing.assert_allclose(eps @ (eps / inverse), RHO ** 2)
    updates, _ = drive(sharpness.fisher_sam(RHO, eta), loss, params)
    np.testing.assert_allclose(flat(updates), a @ (w + eps), rtol=1e-10)


def test_layerwise(problem):
    params, loss, a, w, g = problem
    params['dense']['bias'] = jnp.zeros(2)  # no way to move in units of its own norm
    w = flat(params)
    g = a @ w
    eps = np.zeros_like(w)
    for layer, leaf in (('dense', 'kernel'), ('norm', 'bias'), ('norm', 'scale')):
        part = _of(params, layer) & _of(params, leaf)
        eps[part] = RHO * _norm(w[part]) * g[part] / _norm(g[part])
    assert np.count_nonzero(eps) == len(w) - 2
    updates, _ = drive(sharpness.layerwise_sam(RHO), loss, params)
    np.testing.assert_allclose(flat(updates), a @ (w + eps), rtol=1e-10)


@pytest.mark.parametrize('p', [2.0, np.inf])
def test_sam_on(problem, p):
    """The norm is over the normalisation layers alone; everything descends."""
    params, loss, a, w, g = problem
    m = _of(params, 'norm')
    eps = RHO * m * (np.sign(g) if p == np.inf else g / _norm(m * g))
    updates, _ = drive(sharpness.sam_on(RHO, p), loss, params)
    np.testing.assert_allclose(flat(updates), a @ (w + eps), rtol=1e-10)


def test_sam_on_without_normalisation():
    params = {'dense': {'kernel': jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match='no normalisation layer'):
        sharpness.sam_on(RHO).init(params)


def test_mask_of_normalisation_layers():
    made = mask.normalization({
        'stem': {'kernel': 1, 'bias': 2}, 'block': {'bn': {'scale': 3, 'bias': 4}, 'conv': {
            'kernel': 5}}, 'head': {'kernel': 6}})
    assert made == {
        'stem': {'kernel': False, 'bias': False},
        'block': {'bn': {'scale': True, 'bias': True}, 'conv': {'kernel': False}},
        'head': {'kernel': False}}


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
        squares.append(g ** 2)
        updates, state = drive(tx, loss, point, state, t)
        np.testing.assert_allclose(flat(updates), a @ (w + keep * RHO * g / _norm(g)), rtol=1e-10)
        assert (state.perturbation_norm < RHO * 0.999) == (t >= 2)


@pytest.mark.parametrize('theta', [0.3, 0.9])
def test_vasso(problem, theta):
    params, loss, a, _, _ = problem
    tx, state, d = sharpness.vasso(RHO, theta), None, None
    for t in range(4):
        point = jax.tree.map(lambda x, t=t: x + t ** 2, params)
        w = flat(point)
        g = a @ w
        d = g if d is None else (1 - theta) * d + theta * g
        updates, state = drive(tx, loss, point, state, t)
        np.testing.assert_allclose(flat(updates), a @ (w + RHO * d / _norm(d)), rtol=1e-10)


@pytest.mark.parametrize('sigma,lam', [(1.0, 0.9), (0.4, 0.6)])
def test_friendly(problem, sigma, lam):
    params, loss, a, _, _ = problem
    tx, state, m = sharpness.friendly_sam(RHO, sigma, lam), None, None
    for t in range(4):
        point = jax.tree.map(lambda x, t=t: x + t ** 2, params)
        w = flat(point)
        g = a @ w
        d = g if m is None else g - sigma * m
        m = g if m is None else lam * m + (1 - lam) * g
        updates, state = drive(tx, loss, point, state, t)
        np.testing.assert_allclose(flat(updates), a @ (w + RHO * d / _norm(d)), rtol=1e-10)


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
        kept.append(flat(state.ascent.average))
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[2], kept[3])
    assert np.abs(kept[1] - kept[2]).max() > 0.1


# Combinations.


def _two(problem, rho=RHO):
    _, _, a, w, g = problem
    return g, a @ (w + rho * g / _norm(g))


@pytest.mark.parametrize('alpha', [0.4, 1.3])
def test_gsam(problem, alpha):
    params, loss, *_ = problem
    g, g_p = _two(problem)
    orthogonal = g - (g @ g_p) / (g_p @ g_p) * g_p
    updates, _ = drive(sharpness.gsam(RHO, alpha), loss, params)
    np.testing.assert_allclose(flat(updates), g_p - alpha * orthogonal, rtol=1e-10)
    np.testing.assert_allclose(orthogonal @ g_p, 0, atol=1e-10)
    np.testing.assert_allclose(
        flat(updates) @ flat(updates), g_p @ g_p + alpha ** 2 * orthogonal @ orthogonal)


def test_gnp_is_the_gradient_of_the_penalty(problem):
    """To first order: (result - g) / alpha -> rho grad ||grad L||, on a loss with a Hessian."""
    params, *_ = problem

    def loss(tree):
        return jnp.sum(jnp.cosh(ravel(tree))) + jnp.prod(ravel(tree)[:4])

    rho, alpha = 1e-5, 0.8
    updates, _ = drive(sharpness.gnp(rho, alpha), loss, params)
    penalised = jax.grad(lambda tree: loss(tree) + alpha * rho * jnp.linalg.norm(
        ravel(jax.grad(loss)(tree))))(params)
    plain = jax.grad(loss)(params)
    helpers.assert_trees_close(
        jax.tree.map(jnp.subtract, updates, plain),
        jax.tree.map(jnp.subtract, penalised, plain), rtol=1e-3, atol=1e-9)


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
    cosine = g_p @ g / _norm(g_p) / _norm(g)
    z = (g_p + g) / _norm(g_p + g)
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
    leaves = [_of(params, name) & _of(params, leaf) for name, leaf in (
        ('dense', 'kernel'), ('dense', 'bias'), ('norm', 'scale'), ('norm', 'bias'))]
    for part in leaves if per_leaf else [np.ones(len(g), bool)]:
        expected[part] = _constrain(g_p[part], g[part], 0.7, 0.95)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-10)


def test_gradient_constrained_of_a_zero_gradient():
    zero, one = {'w': jnp.zeros(2)}, {'w': jnp.ones(2)}
    for g, g_p in ((zero, one), (one, zero), (zero, zero)):
        for low in (0.5, 0.0):
            result, _ = combine.gradient_constrained(low, 0.8).combine(g, g_p, (), None)
            assert np.isfinite(result['w']).all()


@pytest.mark.parametrize('gamma,beta', [(0.1, 0.01), (0.7, 0.3)])
def test_cr_sam(problem, gamma, beta):
    """On a quartic, where the second difference does not vanish."""
    params, *_ = problem

    def loss(tree):
        return jnp.sum(ravel(tree) ** 4) / 4

    w = flat(params)
    g = w ** 3
    eps = RHO * g / _norm(g)
    up, down = (w + eps) ** 3, (w - eps) ** 3
    updates, _ = drive(sharpness.cr_sam(RHO, gamma, beta), loss, params)
    np.testing.assert_allclose(
        flat(updates), up + gamma * (up + down - 2 * g) + beta * (up - down), rtol=1e-10)


def test_stable(problem):
    params, loss, *_ = problem
    g, g_p = _two(problem)
    updates, _ = drive(sharpness.stable_sam(RHO), loss, params)
    np.testing.assert_allclose(flat(updates), _norm(g) / _norm(g_p) * g_p, rtol=1e-10)


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
    parts = [_of(params, layer) & _of(params, leaf) for layer, leaf in (
        ('dense', 'kernel'), ('dense', 'bias'), ('norm', 'scale'), ('norm', 'bias'))]
    parts = parts if per_leaf else [np.ones(flat(params).size, bool)]
    state, kept = tx.init(params), None
    for t in range(5):
        point = jax.tree.map(lambda x, t=t: x + t ** 2, params)
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
                    expected[part] += 0.3 * _norm(g[part]) / _norm(kept[part]) * kept[part]
        np.testing.assert_allclose(flat(updates), expected, rtol=1e-8)


def test_ae_looksam_reuses_where_the_gate_is_shut():
    params, loss, a = layers(np.float64)
    tx = sharpness.ae_looksam(RHO, alpha=0.3, lambda1=1e9, lambda2=1e9)
    _, state = drive(tx, loss, params)
    kept = flat(state.combine.orthogonal)
    point = jax.tree.map(lambda x: 2 * x, params)
    g = a @ flat(point)
    updates, state = drive(tx, loss, point, state, 1)
    assert state.evaluations == 1
    np.testing.assert_allclose(flat(updates), g + 0.3 * _norm(g) / _norm(kept) * kept, rtol=1e-9)


def test_what_looksam_adds_has_the_length_of_the_gradient(problem):
    """At the same point the reused gradient has the norm |g| sqrt(1 + alpha^2)."""
    params, loss, _, _, g = problem
    tx = sharpness.looksam(RHO, k=2, alpha=0.7)
    _, state = drive(tx, loss, params)
    updates, _ = drive(tx, loss, params, state, 1)
    np.testing.assert_allclose(_norm(flat(updates)), _norm(g) * np.sqrt(1 + 0.49), rtol=1e-10)


# Gates.


def _decisions(tx, steps, point=lambda params, t: params):
    params, loss, _ = layers(np.float64)
    state, taken = tx.init(params), []

    @jax.jit
    def step(state, t):
        return drive(tx, loss, point(params, t), state, t)[1]

    for t in range(steps):
        before = state.evaluations
        state = step(state, t)
        taken.append(int(state.evaluations - before))
    return taken


def test_windows_and_periods():
    assert _decisions(sharpness.periodic_sam(RHO, 3), 7) == [1, 0, 0, 1, 0, 0, 1]
    late = sharpness.late_phase_sam(RHO, start=0.5, end=0.8, total_steps=10)
    assert _decisions(late, 10) == [0] * 5 + [1] * 3 + [0] * 2


def test_the_coin():
    """As often as its probability says, which may change; the key of the step decides."""
    taken = np.array(_decisions(sharpness.rst(
        RHO, probability=0.0, final_probability=1.0, total_steps=600), 600))
    expected = np.arange(600) / 600
    spread = np.sqrt(np.sum((expected * (1 - expected))[:300]))
    for half in (slice(None, 300), slice(300, None)):
        assert abs(taken[half].sum() - expected[half].sum()) < 4 * spread
    assert taken.tolist() == _decisions(sharpness.rst(
        2 * RHO, probability=0.0, final_probability=1.0, total_steps=600), 600)


def test_the_mean_of_the_coin(problem):
    """E = Aw + p rho A^2 w / |Aw|, exactly: one value with p, the other with 1 - p."""
    params, loss, a, w, g = problem
    tx = sharpness.rst(RHO, probability=0.3, final_probability=0.3)
    step = jax.jit(lambda t: ravel(drive(tx, loss, params, t=t)[0]))
    values = np.stack([step(t) for t in range(60)])
    climbs = np.abs(values - g).max(axis=1) > 1e-9
    np.testing.assert_allclose(values[~climbs], np.tile(g, (sum(~climbs), 1)), rtol=1e-10)
    np.testing.assert_allclose(
        values[climbs], np.tile(g + RHO * a @ g / _norm(g), (sum(climbs), 1)), rtol=1e-10)
    assert 8 <= sum(climbs) <= 30


@pytest.mark.parametrize('given', [False, True])
def test_adaptive_gate(given):
    """The rule in NumPy; with gate_norm that decides, and not the gradient's own."""
    params, loss, a = layers(np.float64)
    delta, l1, l2, total = 0.8, -0.5, 1.0, 40
    tx = sharpness.ae_sam(RHO, delta, l1, l2, total)
    rng = np.random.default_rng(0)
    state, mean, variance, decisions = tx.init(params), None, 0.0, []
    step = jax.jit(lambda point, state, norm: drive(
        tx, loss, point, state, **({'gate_norm': norm} if given else {}))[1])
    for t in range(total):
        point = jax.tree.map(lambda x: x * rng.uniform(0.5, 2.0), params)
        norm = rng.uniform(1.0, 3.0) if given else _norm(a @ flat(point))
        square = norm ** 2
        mean = square if mean is None else delta * mean + (1 - delta) * square
        variance = 0.0 if t == 0 else delta * variance + (1 - delta) * (square - mean) ** 2
        c = t / total * l1 + (1 - t / total) * l2
        expected = square >= mean + c * np.sqrt(variance)
        before = int(state.evaluations)
        state = step(point, state, norm)
        decisions.append(int(state.evaluations) - before)
        assert decisions[-1] == expected
    assert decisions[0] == 1 and 8 < sum(decisions) < 34


def test_climbs_says_whether_the_given_gradient_is_climbed():
    """What shake models are asked for their true gradient by."""
    params, _, _ = layers()

    def climbs(name, count, **settings):
        tx = sharpness.create(name, rho=RHO, **settings)
        state = tx.init(params)._replace(count=jnp.int32(count))
        return bool(tx.climbs(state, gate_key=jax.random.key(0)))

    assert all(climbs(name, 3) for name in ('sam', 'gsam', 'ae_sam', 'bsam'))
    for name in ('sgd', 'momentum_sam', 'extrapolated', 'trace_sam', 'sampa', 'saf'):
        assert not climbs(name, 0)
    assert climbs('periodic_sam', 5) and not climbs('periodic_sam', 4)
    assert climbs('rst', 0, probability=1.0, final_probability=1.0)
    assert not climbs('rst', 0, probability=0.0, final_probability=0.0)


def test_a_schedule_of_rho_counts_updates_behind_a_gate():
    params, loss, a = layers(np.float64)
    w = flat(params)
    g = a @ w
    tx = sharpness.periodic_sam(lambda count: 0.1 * (count + 1), k=3)
    state = tx.init(params)
    for t in range(7):
        updates, state = drive(tx, loss, params, state, t)
        rho = 0.1 * (t + 1) * (t % 3 == 0)
        np.testing.assert_allclose(flat(updates), a @ (w + rho * g / _norm(g)), rtol=1e-10)


# Random probes.


def _probes(tx, loss, params, n, draws, key=7):
    """Mean and standard error of the results over keys, flat."""
    grads = jax.grad(loss)(params)

    @jax.jit
    @jax.vmap
    def one(key):
        updates, _ = tx.update(
            grads, tx.init(params), params, value=loss(params),
            value_and_grad_fn=jax.value_and_grad(loss), key=key)
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
    np.testing.assert_allclose(state.perturbation_norm, RHO * _norm(z[0]), rtol=1e-9)


@pytest.mark.parametrize('n', [1, 3])
def test_det(problem, n):
    """Against the gradient of L + lam rho^2 phi(mean psi((L(w + rho z_i) - L(w)) / rho^2))."""
    params, loss, *_ = problem
    z = [jax.tree.map(lambda x: x, universal.cube(0.05)(
        jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 0), i), params))
         for i in range(n)]
    assert np.abs([flat(x) for x in z]).max() <= 0.05

    def objective(tree):
        d = jnp.stack([(loss(jax.tree.map(lambda w, x: w + RHO * x, tree, probe)) - loss(tree))
                       / RHO ** 2 for probe in z])
        return loss(tree) + 0.7 * RHO ** 2 * jnp.mean(jnp.exp(-d / 2)) ** -2

    updates, _ = drive(sharpness.det_sam(RHO, 0.7, 0.05, n), loss, params)
    helpers.assert_trees_close(updates, jax.grad(objective)(params), rtol=1e-9)
    if n == 1:
        moved = jax.tree.map(lambda w, x: w + RHO * x, params, z[0])
        d = (loss(moved) - loss(params)) / RHO ** 2
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
        return loss(tree) + 0.4 / (2 * RHO ** 2) * jnp.var(values, ddof=1)

    updates, _ = drive(sharpness.frob_sam(RHO, 0.4, n), loss, params)
    helpers.assert_trees_close(updates, jax.grad(objective)(params), rtol=1e-8)


def test_what_the_probes_see_on_average(problem):
    """Trace: the gradient of a quadratic. Frob: Aw + lam A^2 w, for any rho and n."""
    params, loss, a, w, g = problem
    for tx, expected in (
            (sharpness.trace_sam(0.2, 0.5, 2), g),
            (sharpness.frob_sam(0.1, 0.3, 2), g + 0.3 * a @ g),
            (sharpness.frob_sam(0.3, 0.3, 4), g + 0.3 * a @ g)):
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
    np.testing.assert_allclose(flat(updates), a @ (w - RHO * v / _norm(v)), rtol=1e-10)
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
    np.testing.assert_allclose(state.perturbation_norm, _norm(eps), rtol=1e-8)
    assert 0.3 < _norm(eps) / RHO / np.sqrt(len(w)) < 2 and state.evaluations == 0


def test_sampa(problem):
    """The paper's first step, y_0 = x_0: (1 - lam) A (w + rho Aw / |Aw|) + lam A (w - lr Aw)."""
    params, loss, a, w, g = problem
    lam, lr = 0.2, 0.07
    tx = sharpness.sampa(RHO, lam)
    state = tx.init(params)._replace(memory=jax.grad(loss)(params))
    updates, state = drive(tx, loss, params, state, learning_rate=lr)
    expected = (1 - lam) * a @ (w + RHO * g / _norm(g)) + lam * a @ (w - lr * g)
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

    def previous(tree):
        places.append(flat(tree))
        return jax.tree.map(lambda x: 7.0 * jnp.ones_like(x), tree)

    outcomes = [tx.update(jax.tree.map(lambda x, c=c: c * x, memory), state, params,
                          previous_grad_fn=previous, learning_rate=0.1)[0] for c in (1.0, 5.0)]
    np.testing.assert_array_equal(*places)
    np.testing.assert_allclose(places[0], w + RHO / np.sqrt(len(w)), rtol=1e-10)
    for c, updates in zip((1.0, 5.0), outcomes):
        np.testing.assert_allclose(flat(updates), 0.8 * 7 + 0.2 * c, rtol=1e-10)


def test_bsam(problem):
    """Three steps of the paper's rule, the draw read off the method's own point."""
    params, loss, a, _, _ = problem
    b1, b2, damping, prior, n, lr = 0.8, 0.95, 0.1, 40.0, 500, 0.05
    tx = sharpness.bsam(RHO, prior, b1, b2, damping, 0.7, data_factor=2.0, num_examples=n / 2)
    state, w = tx.init(params), flat(params)
    m, s, delta = np.zeros_like(w), np.full_like(w, 0.7), prior / n
    for t in range(3):
        key = jax.random.fold_in(jax.random.key(7), t)
        theta = flat(tx.point(state, params, key=key))
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
    tx = sharpness.bsam(RHO, init_precision=s, data_factor=1.0, num_examples=n)
    state = tx.init(params)
    draws = np.stack([flat(tx.point(state, params, key=jax.random.key(i))) for i in range(300)])
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
        for layer, leaf in (('dense', 'kernel'), ('dense', 'bias'), ('norm', 'scale'),
                            ('norm', 'bias')):
            part = _of(params, layer) & _of(params, leaf)
            keep[part] = np.abs(eps[part]).max() > 1e-6
        seen.add(tuple(keep))
        if keep.any():
            np.testing.assert_allclose(
                eps, RHO / beta * keep * g / _norm(keep * g), rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(state.perturbation_norm, RHO / beta, rtol=1e-9)
    assert len(seen) > 4


def test_esam_asks_for_its_share_of_the_examples(problem):
    params, loss, *_ = problem
    asked = []

    def selected(tree, fraction):
        asked.append(fraction)
        return jax.tree.map(lambda x: 3.0 * jnp.ones_like(x), tree)

    updates, _ = drive(sharpness.esam(RHO, 1.0, 0.3), loss, params, selected_grad_fn=selected)
    assert asked == [0.3] and (flat(updates) == 3.0).all()


# Losses.


def test_trajectory_loss():
    from sam_jax import losses
    rng = np.random.default_rng(0)
    z, y = jnp.asarray(rng.normal(size=(2, 5, 4)))
    tau = 3.0

    def soft(x):
        return jax.nn.softmax(x / tau)

    expected = tau ** 2 * jnp.sum(soft(y) * (jnp.log(soft(y)) - jnp.log(soft(z))), axis=-1)
    np.testing.assert_allclose(losses.trajectory(z, y, tau), expected, rtol=1e-9)
    by_logits = jax.grad(lambda z: jnp.mean(losses.trajectory(z, y, tau)))(z)
    np.testing.assert_allclose(by_logits, tau / 5 * (soft(z) - soft(y)), rtol=1e-9)
    np.testing.assert_allclose(losses.trajectory(y, y, tau), 0, atol=1e-12)
    centred = (z - y) - jnp.mean(z - y, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        losses.trajectory(z, y, 1e4), jnp.sum(centred ** 2, axis=-1) / 8, rtol=1e-3)


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


