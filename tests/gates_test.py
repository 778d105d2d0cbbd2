"""When each gate is open, and what a step does behind a shut one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.linalg import norm
from quadratics import RHO, drive, flat, layers, make, ravel

from sam_jax import sharpness

pytestmark = pytest.mark.usefixtures('x64')


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
    taken = np.array(
        _decisions(sharpness.rst(RHO, probability=0.0, final_probability=1.0, total_steps=600), 600)
    )
    expected = np.arange(600) / 600
    spread = np.sqrt(np.sum((expected * (1 - expected))[:300]))
    for half in (slice(None, 300), slice(300, None)):
        assert abs(taken[half].sum() - expected[half].sum()) < 4 * spread
    assert taken.tolist() == _decisions(
        sharpness.rst(2 * RHO, probability=0.0, final_probability=1.0, total_steps=600), 600
    )


def test_the_mean_of_the_coin(problem):
    """E = Aw + p rho A^2 w / |Aw|, exactly: one value with p, the other with 1 - p."""
    params, loss, a, w, g = problem
    tx = sharpness.rst(RHO, probability=0.3, final_probability=0.3)
    step = jax.jit(lambda t: ravel(drive(tx, loss, params, t=t)[0]))
    values = np.stack([step(t) for t in range(60)])
    climbs = np.abs(values - g).max(axis=1) > 1e-9
    np.testing.assert_allclose(values[~climbs], np.tile(g, (sum(~climbs), 1)), rtol=1e-10)
    np.testing.assert_allclose(
        values[climbs], np.tile(g + RHO * a @ g / norm(g), (sum(climbs), 1)), rtol=1e-10
    )
    assert 8 <= sum(climbs) <= 30


@pytest.mark.parametrize('given', [False, True])
def test_adaptive_gate(given):
    """The rule in NumPy; with gate_norm that decides, and not the gradient's own."""
    params, loss, a = layers(np.float64)
    delta, l1, l2, total = 0.8, -0.5, 1.0, 40
    tx = sharpness.ae_sam(RHO, delta, l1, l2, total)
    rng = np.random.default_rng(0)
    state, mean, variance, decisions = tx.init(params), None, 0.0, []
    step = jax.jit(
        lambda point, state, length: drive(
            tx, loss, point, state, **({'gate_norm': length} if given else {})
        )[1]
    )
    for t in range(total):
        point = jax.tree.map(lambda x: x * rng.uniform(0.5, 2.0), params)
        length = rng.uniform(1.0, 3.0) if given else norm(a @ flat(point))
        square = length**2
        mean = square if mean is None else delta * mean + (1 - delta) * square
        variance = 0.0 if t == 0 else delta * variance + (1 - delta) * (square - mean) ** 2
        c = t / total * l1 + (1 - t / total) * l2
        expected = square >= mean + c * np.sqrt(variance)
        before = int(state.evaluations)
        state = step(point, state, length)
        decisions.append(int(state.evaluations) - before)
        assert decisions[-1] == expected
    assert decisions[0] == 1 and 8 < sum(decisions) < 34


def test_a_gradient_is_asked_for_by_what_it_is_for():
    """What shake models are asked for their true gradient by."""
    params, loss, _ = layers()

    def climbs(name, count, **settings):
        asked = []

        def evaluate(tree, climb=False, **which):
            asked.append(bool(climb))
            return sharpness.Evaluation(jax.grad(loss)(tree), loss(tree))

        tx = make(name, rho=RHO, **settings)
        state = tx.init(params)._replace(count=jnp.int32(count))
        with jax.disable_jit():
            drive(tx, loss, params, state, evaluate=evaluate)
        return asked[0]

    assert climbs('ae_sam', 3) and not climbs('late_phase_sam', 3)
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
        np.testing.assert_allclose(flat(updates), a @ (w + rho * g / norm(g)), rtol=1e-10)
