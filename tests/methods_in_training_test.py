"""Every method inside the pmapped step: devices, groups, loops, seeds, compilation."""

from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from helpers import EVALUATIONS, assert_trees_equal, relative_distance
from train_step_test import Session, count_compilations, step_config

from sam_jax import sharpness

# Other files have these two in all details.
METHODS = [name for name in sharpness.METHODS if name not in ('sgd', 'sam')]
STEPS = 3


def _session(method, num_devices=1, **overrides):
    """8 replicas of 4 examples, in groups of 4; a group covers two of four devices."""
    return Session(step_config(**{
        'sam__method': method, 'replica_batch_size': 4, 'sam__replicas_per_group': 4,
        'sam__rho': 0.1, **overrides}), num_devices)


@pytest.mark.parametrize('method', METHODS)
def test_devices_and_loops(method, x64):
    """The same on one device that scans over its groups, and on four."""
    def variables(num_devices, loop):
        state, metrics = _session(
            method, num_devices, model__dtype='float64', model__dropout_rate=0.2,
            replica_loop=loop).run(STEPS)
        extra = int(state.sharpness_state.evaluations)
        assert extra == STEPS * (EVALUATIONS[method] - 1)
        np.testing.assert_allclose(metrics['train/perturbation_norm'], 0.1, rtol=1e-9)
        return state.params, state.batch_stats

    assert relative_distance(variables(4, 'auto'), variables(1, 'scan')) < 1e-9


@pytest.mark.parametrize('method', METHODS)
def test_rho_zero_is_sgd_and_rho_is_a_value_of_the_one_program(method):
    session = _session(method, 2)
    still, _ = session.run(2, rho=np.float32(0.0))
    state, arguments = session.start(), session.arguments(0)
    compilations = count_compilations()
    moved, _ = session.step_fn(state, *arguments)
    assert not compilations
    assert relative_distance(moved.params, session.start().params) > 1e-5
    sgd, _ = _session('sgd', 2).run(2)
    for part in ('params', 'batch_stats', 'opt_state'):
        assert_trees_equal(getattr(still, part), getattr(sgd, part))


def test_random_directions_are_of_the_seed_the_step_and_the_group():
    session = _session('random_sam')
    keys = []

    def note(grads, state, params=None, *, key=None, **extra_args):
        jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key))
        return grads, state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharpness.ascent, 'gaussian', lambda: optax.GradientTransformationExtraArgs(
            lambda params: (), note))
        session.run(2)
        session.run(1, seed=np.uint32(1))
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 2 * (2 + 1), 'two groups in each of three steps'


class _Noting(nn.Module):
    """A model of two gradients, as the shake models, that notes which one is asked for."""

    note: Callable

    @nn.compact
    def __call__(self, x, train=False, true_gradient=False):
        if train:
            jax.debug.callback(lambda flag: self.note(bool(flag)), true_gradient)
        return nn.Dense(10)(x.reshape(len(x), -1))


@pytest.mark.parametrize('method,expected', [
    ('sgd', [False]), ('sam', [True, False]), ('random_sam', [True, False]),
    ('multistep_sam', [True, True, False]), ('second_order_sam', [True, False, True])])
def test_what_is_climbed_is_the_loss(method, expected):
    """The ascent's gradients are true ones, and the Hessian is that of the loss."""
    flags = []
    session = Session(step_config(sam__method=method, replica_batch_size=32),
                      model=_Noting(flags.append))
    state = session.start()
    flags.clear()
    jax.block_until_ready(session.step_fn(state, *session.arguments(0)))
    jax.effects_barrier()
    assert sorted(flags) == sorted(expected)
