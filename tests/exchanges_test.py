"""What devices of a group exchange: one gradient to climb, and the rest in the last mean."""

from unittest import mock

import jax
import numpy as np
import pytest
from helpers import relative_distance
from methods_in_training_test import _session

from sam_jax import gradients, metrics, replicas, sharpness
from sam_jax.sharpness import builder, combine
from sam_jax.targets import hlo

NEIGHBOURS, ALL = [[0, 1], [2, 3]], [[0, 1, 2, 3]]


def _exchanged(method, logged=False, **overrides):
    """{groups: gradients that they exchange in a step}: 4 devices, two of them a group.

    In a step that is not logged; or with what only logged ones do.
    """
    session = _session(method, 4, dtype='float32', **overrides)
    state = session.start()
    size = 4 * sum(x.size for x in jax.tree.leaves(state.params))
    text = session.step_fn.lower(state, *session.arguments(0)).compile().as_text()
    text = text.replace(metrics.LOGGED, 'as_any_other') if logged else text
    total = {}
    for exchange in hlo.collectives(hlo.instructions(text)):
        assert exchange.opcode.startswith('all-reduce')
        groups = hlo.groups(exchange)
        # All together JAX 0.12 writes by the name of the axis.
        assert groups in (NEIGHBOURS, ALL) or f"{{'{replicas.AXIS}'}}" in exchange.operands
        name = 'neighbours' if groups == NEIGHBOURS else 'all'
        total[name] = total.get(name, 0) + exchange.bytes / size
    # Statistics, losses and memories are small beside a gradient, or counted as one.
    return {name: round(x, 1) for name, x in total.items()}


@pytest.mark.parametrize(
    'method,neighbours,everyone',
    [
        ('sam', 1, 1),
        ('asam', 1, 1),
        ('gnp', 1, 1),
        ('cr_sam', 1, 1),
        ('rst', 1, 1),
        ('gsam', 2, 1),  # its angle is that of the group's two gradients
        ('sgd', 1, 1),  # the norm of the group's gradient is in the log
    ],
)
def test_gradients_exchanged_in_a_step(method, neighbours, everyone):
    assert _exchanged(method) == {'neighbours': neighbours, 'all': everyone}


def test_one_group_of_all_exchanges_two():
    """Its second mean is the last one."""
    assert _exchanged('sam', sam__replicas_per_group=4) == {'all': 2}


def test_a_logged_step_exchanges_more_for_its_cosines():
    """Where the gradients are those of parts, whose lengths tell nothing of the group's."""
    assert _exchanged('sam', logged=True)['neighbours'] > 1
    assert _exchanged('sam', logged=True, sam__replicas_per_group=4) == {'all': 2}


def _after_two_steps(method):
    # So short that it clips.
    clip = {'optimizer__clip_norm': 0.1} if method == 'wsam' else {}
    state, metrics = _session(method, 4, **clip).run(2)
    return jax.device_get((state.replace(step=0), metrics))


def _of_whole_groups(*arguments):
    loss = _group_loss(*arguments)
    return sharpness.Loss(loss.evaluate, None, loss.compare)


_group_loss = gradients.group_loss

LINEAR = {'sam', 'cr_sam', 'rst', 'sampa', 'esam', 'functional_sam'}


@pytest.mark.parametrize(
    'method',
    [
        pytest.param(method, marks=() if method in LINEAR else pytest.mark.slow)
        for method in sharpness.METHODS
    ],
)
def test_a_part_is_as_good_as_the_group(method, x64):
    """State and metrics are those of a step whose groups exchange every gradient."""
    parts = _after_two_steps(method)
    with mock.patch.object(gradients, 'group_loss', _of_whole_groups):
        whole = _after_two_steps(method)
    for name in ('params', 'batch_stats', 'opt_state', 'sharpness_state', 'ema'):
        a, b = (
            jax.tree.map(lambda x: np.asarray(x, float), getattr(state, name))
            for state, _ in (parts, whole)
        )
        assert not jax.tree.leaves(a) or relative_distance(a, b) < 1e-12, name
    for name, value in whole[1].items():
        np.testing.assert_allclose(parts[1][name], value, rtol=1e-11, err_msg=name)


def test_of_a_method_that_is_not_linear_it_is_not(x64):
    """So the test above would see one that says so of itself."""
    truth = _after_two_steps('gsam')[0].params
    real = combine.surrogate_gap
    with mock.patch.object(combine, 'surrogate_gap', lambda a: real(a)._replace(linear=True)):
        wrong = _after_two_steps('gsam')[0].params
    assert relative_distance(wrong, truth) > 1e-6


def test_a_loss_without_parts_is_whole():
    """That of a chain: `linear` asks nothing of those who make one."""
    asked = []

    def evaluate(params, **which):
        asked.append(which)
        return sharpness.Evaluation(params)

    loss = sharpness.Loss(evaluate)
    loss(np.ones(2), linear=True)
    part = sharpness.Loss(None, lambda params, **which: evaluate(params, part=True, **which))
    part.uncounted()(np.ones(2), linear=True, climb=True)
    part.knowing(np.zeros(2), None)(np.ones(2), linear=True)
    assert asked == [{}, {'part': True, 'climb': True}, {'part': True}]
    assert builder.combinations.perturbed().linear and not combine.renormalized().linear
