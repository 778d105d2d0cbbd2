"""Every method inside the pmapped step: devices, groups, loops, seeds, compilation."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_equal, compilations, relative_distance
from train_step_test import Session, step_config

from sam_jax import settings, sharpness
from sam_jax.checkpoint import Checkpoints

# Gates that are open at some of the four steps and shut at others; memories that speak.
SETTINGS = {
    'looksam': {'k': 2},
    'look_layersam': {'k': 2},
    'periodic_sam': {'k': 2},
    'late_phase_sam': {'start': 2 / 80, 'end': 3 / 80},
    'sparse_sam': {'period': 2},
    'saf': {'start_epoch': 0, 'epochs_ago': 1},
    'mesa': {'start_epoch': 0},
    'rst': {'probability': 0.7},
}
# Of these an epoch has two steps.
TRAJECTORY = ('saf', 'mesa')
NO_RHO = ('sgd', 'saf', 'mesa')
STEPS = 4


def _init(key, shape, dtype):
    """Waves, the same for all keys: what is random here takes longer to compile than to train."""
    del key
    return (
        (jnp.sin(jnp.arange(math.prod(shape)) * 1.7) / math.sqrt(shape[0]))
        .reshape(shape)
        .astype(dtype)
    )


class _Mlp(nn.Module):
    """Normalisation, dropout and a head: quick to compile."""

    num_classes: int = 10
    dtype: str = 'float64'

    @nn.compact
    def __call__(self, x, train=False):
        common = dict(
            dtype=self.dtype, param_dtype='float64' if self.dtype == 'float64' else 'float32'
        )
        x = nn.Dense(12, kernel_init=_init, **common)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, **common)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        x = nn.Dense(self.num_classes, kernel_init=_init, **common)(x)
        return x.astype(common['param_dtype'])


def _session(method, num_devices=1, **overrides):
    """4 replicas of 8 examples, in groups of 2; a group covers two of four devices."""
    dtype = overrides.pop('dtype', 'float64')
    size = overrides.pop('size', 160 if method in TRAJECTORY else 8)
    options = {f'sam__{key}': value for key, value in SETTINGS.get(method, {}).items()}
    config = step_config(
        **{
            'sam__method': method,
            'batch_size': 4 * size,
            'replica_batch_size': size,
            'sam__replicas_per_group': 2,
            'sam__rho': 0.1,
            'model__dtype': dtype,
            'optimizer__learning_rate': 0.05,
            **options,
            **overrides,
        }
    )
    settings.check(config)
    return Session(config, num_devices, _Mlp(dtype=dtype))


def _continue(session, state, first, last, **hparams):
    for step in range(first, last):
        state, metrics = session.step_fn(state, *session.arguments(step, **hparams))
    return state, metrics


# One of each kind by default, all of them with `-m slow`: the others go through the same lines.
KINDS = {'ae_looksam', 'saf', 'mesa', 'esam', 'functional_sam'}


@pytest.mark.bitwise
@pytest.mark.parametrize(
    'method',
    [
        pytest.param(method, marks=() if method in KINDS else pytest.mark.slow)
        for method in sharpness.METHODS
    ],
)
def test_devices_restarts_and_values(method, x64, tmp_path):
    """Four devices; stopped on disk and gone on there, bit for bit; and on one that scans.

    The program is compiled once for all steps and all rho, with rho = 0 it is SGD's, and it takes
    as many gradients as the method says.
    """
    session = _session(method, 4)
    halfway, _ = session.run(2)
    with contextlib.closing(Checkpoints(str(tmp_path))) as checkpoints:
        checkpoints.save(2, halfway, {})
        checkpoints.wait()
        end, metrics = _continue(session, halfway, 2, STEPS)
        _, saved, _ = checkpoints.restore_newest(session.start())
        again, _ = _continue(session, session.layout.replicate(saved), 2, STEPS)
        assert_trees_equal(again, end)
        other = _session(method, 1, replica_loop='scan')
        moved, logged = _continue(other, other.layout.replicate(saved), 2, STEPS)
    for part in ('params', 'batch_stats', 'opt_state', 'sharpness_state', 'memory', 'ema'):
        a, b = (
            jax.tree.map(lambda x: np.asarray(x, float), getattr(s, part)) for s in (end, moved)
        )
        assert not jax.tree.leaves(a) or relative_distance(a, b) < 1e-9, part
    for name, value in metrics.items():
        np.testing.assert_allclose(logged[name], value, rtol=1e-7, err_msg=name)
    documented = [sharpness.gradients(method, step, **session.config.sam) for step in range(STEPS)]
    if None not in documented:
        assert end.sharpness_state.evaluations == sum(documented) - STEPS
    elif method == 'late_phase_sam':
        assert end.sharpness_state.evaluations == 1, "of the window's four steps"
    assert np.isfinite(metrics['train/loss']) and np.isfinite(metrics['train/perturbed_loss'])
    optimizer = session.config.optimizer
    sgd = _run_sgd(session.config.replica_batch_size, optimizer.momentum, optimizer.nesterov)
    assert relative_distance(end.params, sgd.params) > 1e-6 or method == 'sgd'
    if method not in (*NO_RHO, 'bsam', 'sampa'):
        start = session.start()
        with compilations() as compiled:
            still, _ = _continue(session, start, 0, STEPS, rho=np.float64(0.0))
        assert not compiled
        assert_trees_equal(
            [still.params, still.batch_stats, still.opt_state],
            [sgd.params, sgd.batch_stats, sgd.opt_state],
        )


@functools.cache
def _run_sgd(size, momentum, nesterov):
    """A run of SGD with what a method's config says besides `sam`; bSAM's has no momentum."""
    company = (
        {'optimizer__nesterov': nesterov}
        if momentum
        else {
            'optimizer__momentum': 0.0,
            'optimizer__nesterov': False,
            'optimizer__weight_decay': 0.0,
            'optimizer__clip_norm': 0.0,
        }
    )
    return jax.device_get(_session('sgd', 4, size=size, **company).run(STEPS)[0])


OPTIMIZERS = {'sgd': 0.2, 'rmsprop': 0.02, 'adam': 0.02}
BY_DEFAULT = {
    ('looksam', 'rmsprop'),
    ('momentum_sam', 'adam'),
    ('frob_sam', 'rmsprop'),
    ('extrapolated', 'adam'),
    ('esam', 'adam'),
    ('bsam', 'sgd'),
}


@pytest.mark.parametrize(
    'method,optimizer',
    [
        pytest.param(*row, marks=() if row in BY_DEFAULT else pytest.mark.slow)
        for row in itertools.product(sharpness.METHODS, OPTIMIZERS)
        if row not in {('bsam', 'rmsprop'), ('bsam', 'adam')}
    ],
)
def test_bfloat16_and_every_optimizer(method, optimizer):
    """The loss falls; the params stay in float32."""
    session = _session(
        method,
        1,
        dtype='bfloat16',
        optimizer__name=optimizer,
        sam__rho=0.02,
        optimizer__learning_rate=OPTIMIZERS[optimizer],
    )
    state, first = session.run(1)
    state, last = _continue(session, state, 1, 20)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype('float32')}
    assert last['train/loss'] < 0.9 * first['train/loss'] and not last['bad_step']


def test_random_directions_are_of_the_seed_the_step_and_the_group():
    session = _session('random_sam', dtype='float32')
    keys = []

    def note(grads, state, params=None, *, key=None, **extra_args):
        jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key))
        return grads, state

    with pytest.MonkeyPatch.context() as patch:
        noting = optax.GradientTransformationExtraArgs(lambda params: (), note)
        patch.setattr(sharpness.direction, 'gaussian', lambda: noting)
        session.run(2)
        session.run(1, seed=np.uint32(1))
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 2 * (2 + 1), 'two groups in each of three steps'


def test_the_coin_is_thrown_anew_at_each_step():
    """And is that of the seed."""
    session = _session('rst', dtype='float32', sam__probability=0.5, sam__final_probability=0.5)
    state, taken = session.start(), []
    for step in range(12):
        state, metrics = session.step_fn(state, *session.arguments(step))
        taken.append(bool(metrics['train/perturbation_norm']))
    assert 1 < sum(taken) < 11
    assert state.sharpness_state.evaluations == sum(taken)


class _Noting(nn.Module):
    """A model of two gradients, as the shake models, that notes which one is asked for."""

    note: Callable

    @nn.compact
    def __call__(self, x, train=False, true_gradient=False):
        if train:
            jax.debug.callback(lambda flag: self.note(bool(flag)), true_gradient)
        return nn.Dense(10)(x.reshape(len(x), -1))


@pytest.mark.parametrize(
    'method,expected',
    [
        ('sgd', [False]),
        ('sam', [True, False]),
        ('random_sam', [True, False]),
        ('multistep_sam', [True, True, False]),
        ('second_order_sam', [True, False, True]),
    ],
)
def test_what_is_climbed_is_the_loss(method, expected):
    """The ascent's gradients are true ones, and the Hessian is that of the loss."""
    flags = []
    session = Session(
        step_config(sam__method=method, replica_batch_size=32), model=_Noting(flags.append)
    )
    state = session.start()
    flags.clear()
    jax.block_until_ready(session.step_fn(state, *session.arguments(0)))
    jax.effects_barrier()
    assert sorted(flags) == sorted(expected)
