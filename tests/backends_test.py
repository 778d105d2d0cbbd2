"""What runs a step on all devices, pmap or shard_map, changes no bit of anything."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import quick
from analysed import network, objective
from helpers import ROOT, Net, assert_trees_equal, free_port, small_config
from jax import lax

from sam_jax import models, replicas, train
from sam_jax.analysis import landscape
from sam_jax.experiment import Experiment
from sam_jax.replicas import AXIS, BACKENDS

# 8 replicas of 20 examples, one epoch of 8 steps.
SETTINGS = dict(
    total_epochs=1,
    batch_size=160,
    replica_batch_size=20,
    log_every_steps=4,
    model__dropout_rate=0.1,
    data__mixup_alpha=0.2,
    analysis__every_epochs=1,
    analysis__examples=50,
    analysis__steps=5,
    ema__decay=0.5,
)


def _small(settings, num_classes):
    return Net(settings.dtype, settings.dropout_rate)


@functools.cache
def _trained(backend, devices, replicas_per_group):
    """(state, result.json, metrics.jsonl) of a run, without its times."""
    config = small_config(
        **SETTINGS, sam__replicas_per_group=replicas_per_group, replica_backend=backend
    )
    with tempfile.TemporaryDirectory() as workdir, mock.patch.object(models, 'from_config', _small):
        state = train.train_and_evaluate(config, workdir, jax.devices()[:devices])
        with open(f'{workdir}/result.json') as file:
            result = json.load(file)
        with open(f'{workdir}/metrics.jsonl') as file:
            metrics = [json.loads(line) for line in file]
    return jax.device_get(state), *([_without_times(x) for x in y] for y in ([result], metrics))


def _without_times(x):
    times = ('time', 'wall_time', 'perf/', 'analysis/seconds', 'analysis/share')
    return {name: value for name, value in x.items() if not name.startswith(times)}


@pytest.mark.slow
@pytest.mark.parametrize('devices,replicas_per_group', [(8, 2), (1, 1), (4, 1), (4, 4)])
def test_a_run_is_the_same_bit_for_bit(devices, replicas_per_group):
    """Steps, moving average, evaluations, and the analysis between epochs."""
    (state, result, metrics), (other, *rest) = (
        _trained(backend, devices, replicas_per_group) for backend in BACKENDS
    )
    assert_trees_equal(state, other)
    assert [result, metrics] == rest
    assert 'test/ema_error_rate' in result[0] and result[0]['analysis/lambda_max'] > 0


def test_a_run_goes_on_with_the_other(tmp_path):
    """From the middle, 8 of 16 steps; the whole is that of a run with one of them."""
    ends = []
    for first, then in [('pmap', 'pmap'), ('pmap', 'shard_map'), ('shard_map', 'pmap')]:
        workdir = tmp_path / f'{first}-{then}'
        with mock.patch.object(models, 'from_config', _small):
            for backend, stop in ((first, 8), (then, 0)):
                config = small_config(
                    **{**SETTINGS, 'total_epochs': 2, 'analysis__every_epochs': 0},
                    checkpoint__every_epochs=1,
                    replica_backend=backend,
                )
                ends.append(_until(stop, config, str(workdir), jax.devices()[:4]))
    assert_trees_equal(ends[1], ends[3])
    assert_trees_equal(ends[1], ends[5])


def _until(step, config, workdir, devices):
    """Trains to the end, or until a step and no further."""
    real = train.StepLog.add

    def add(log, done, metrics):
        real(log, done, metrics)
        if done == step + 1 and step:
            raise KeyboardInterrupt

    with mock.patch.object(train.StepLog, 'add', add):
        try:
            return jax.device_get(train.train_and_evaluate(config, workdir, devices))
        except KeyboardInterrupt:
            return None


def test_evaluations_and_landscapes_are_the_same_bit_for_bit():
    found = []
    for backend in BACKENDS:
        config = small_config(**SETTINGS, replica_backend=backend)
        with mock.patch.object(models, 'from_config', _small):
            experiment = Experiment.from_config(config, jax.devices()[:4])
        assert experiment.layout.backend == backend
        state = experiment.initial_state()
        measured, params = objective(
            devices=4, model_and_variables=network(), backend=backend, weight_decay=0.1
        )
        assert measured.layout.backend == backend
        surface = landscape.make_surface(
            measured, params, [landscape.random_direction(params, 0, i) for i in range(2)]
        )
        found.append(
            (
                experiment.evaluate(state),
                surface(landscape.grid(0.5, 3, 2)[1]),
                measured.gradient(params),
                measured.hessian_product(params, params),
                measured.gauss_newton_product(params, params),
            )
        )
    assert_trees_equal(*found)


@pytest.mark.parametrize('backend', BACKENDS)
def test_what_a_function_sees_and_gives(backend):
    """Its row without an axis, its place, sums over groups; rows come back in order."""
    layout, _ = replicas.make_layout(16, 2, 2, devices=jax.devices()[::-1], backend=backend)

    def function(x, shared):
        assert x.shape == (3,) and shared.shape == (2,)
        return {
            'place': lax.axis_index(AXIS),
            'row': 10 * x,
            'group': lax.psum(x, AXIS, axis_index_groups=layout.axis_index_groups),
            'mirrored': lax.ppermute(x, AXIS, [(i, 7 - i) for i in range(8)]),
            'shared': shared,
        }

    x = np.arange(24.0, dtype='float32').reshape(8, 3)
    arguments = layout.shard(x), layout.replicate(np.ones(2, 'float32'))
    found = layout.map(function, in_axes=(0, None), out_axes=0)(*arguments)
    assert [shard.device for shard in found['row'].addressable_shards] == list(layout.devices)
    found = jax.device_get(found)
    assert found['place'].tolist() == list(range(8))
    np.testing.assert_array_equal(found['row'], 10 * x)
    np.testing.assert_array_equal(found['group'], np.repeat(x[::2] + x[1::2], 2, axis=0))
    np.testing.assert_array_equal(found['mirrored'], x[::-1])
    np.testing.assert_array_equal(found['shared'], np.ones((8, 2)))


@pytest.mark.parametrize('backend', BACKENDS)
def test_given_memory_is_taken(backend):
    layout, _ = replicas.make_layout(8, 2, 1, devices=jax.devices()[:4], backend=backend)
    add = layout.map(
        lambda total, x: total + lax.psum(x, AXIS), in_axes=(None, 0), donate_argnums=0
    )
    total = layout.replicate(np.zeros(3))
    result = add(total, layout.shard(np.ones((4, 3))))
    assert total.is_deleted() and np.asarray(result).tolist() == [4.0] * 3


# One of two processes, with a network that is quick to compile: each backend, then one after the
# other from the middle.
WORKER = """
import sys
from unittest import mock
import backends_test
from sam_jax import distributed, models
number, address, workdir, group, method = sys.argv[1:]
distributed.initialize(address, 2, int(number))
with mock.patch.object(models, 'from_config', backends_test._small):
    for backends in (['pmap'], ['shard_map'], ['shard_map', 'pmap']):
        for i, backend in enumerate(backends):
            stop = 8 if i + 1 < len(backends) else 0
            config = backends_test.small_config(
                sam__method=method,
                replica_backend=backend,
                sam__replicas_per_group=int(group),
                checkpoint__every_epochs=1,
                **{**backends_test.SETTINGS, 'total_epochs': 2, 'replica_batch_size': 40},
            )
            backends_test._until(stop, config, f'{workdir}/{"-".join(backends)}', None)
"""


@pytest.mark.parametrize(
    'method,replicas_per_group',
    [
        pytest.param('sam', 2, marks=pytest.mark.slow),
        pytest.param('sam', 1, marks=pytest.mark.slow),
        pytest.param('sam', 4, marks=pytest.mark.slow),
        pytest.param('ae_looksam', 2, marks=pytest.mark.slow),
    ],
)
def test_two_processes_of_two_devices(method, replicas_per_group, tmp_path):
    environment = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': quick.flags(devices=2, level=1),
        'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')]),
    }
    arguments = [f'localhost:{free_port()}', str(tmp_path), str(replicas_per_group), method]
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', WORKER, str(i), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=300)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], outputs
    (arrays, result), *others = map(_of_run, sorted(tmp_path.iterdir()))
    assert len(others) == 2 and len(arrays) > 20 and result['analysis/lambda_max'] > 0
    for other, result_too in others:
        assert_trees_equal(other, arrays)
        assert result_too == result


def _of_run(workdir):
    """(arrays of the last checkpoint, result.json without its times)."""
    with ocp.CheckpointManager(workdir / 'checkpoints') as manager:
        arrays = manager.restore(16, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    return dict(arrays.state), _without_times(json.loads((workdir / 'result.json').read_text()))
