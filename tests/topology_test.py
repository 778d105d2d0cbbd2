"""The result does not depend on how many devices or processes computed it."""

import functools
import json
import os
import tempfile
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import Net, relative_distance, run_processes, small_config

from sam_jax import models, train

# 8 replicas of 5 examples, one epoch of 32 steps; float64 separates a bug from rounding.
SETTINGS = dict(
    total_epochs=1,
    batch_size=40,
    replica_batch_size=5,
    data__augment='basic',
    data__padding=2,
    model__dropout_rate=0.1,
    sam__rho=0.1,
    log_every_steps=8,
    optimizer__learning_rate=0.05,
)


def _config(replicas_per_group, dtype, **overrides):
    return small_config(
        **{
            **SETTINGS,
            'sam__replicas_per_group': replicas_per_group,
            'model__dtype': dtype,
            **overrides,
        }
    )


@functools.cache
def _run(replicas_per_group, num_devices, dtype, model='tiny', **overrides):
    """Returns ((params, statistics), result) of a whole run; 'tiny' is quick to compile."""
    build = (
        models.from_config
        if model != 'tiny'
        else (lambda settings, num_classes: Net(dtype, settings.dropout_rate))
    )
    config = _config(replicas_per_group, dtype, **overrides)
    with tempfile.TemporaryDirectory() as workdir, mock.patch.object(models, 'from_config', build):
        state = train.train_and_evaluate(config, workdir, jax.devices()[:num_devices])
        with open(os.path.join(workdir, 'result.json')) as f:
            return jax.device_get((state.params, state.batch_stats)), json.load(f)


@pytest.mark.parametrize(
    'num_devices', [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8]
)
@pytest.mark.parametrize('replicas_per_group', [1, pytest.param(2, marks=pytest.mark.slow), 8])
def test_devices_float64(replicas_per_group, num_devices, x64):
    reference, expected = _run(replicas_per_group, 1, 'float64')
    variables, result = _run(replicas_per_group, num_devices, 'float64')
    assert relative_distance(variables, reference) < 1e-9
    assert result['test/error_rate'] == expected['test/error_rate']


def test_groups_matter(x64):
    runs = [_run(g, 1, 'float64')[0] for g in (1, 2, 8)]
    assert min(relative_distance(runs[0], runs[1]), relative_distance(runs[1], runs[2])) > 1e-3


@pytest.mark.slow
def test_devices_float32():
    """To rounding: float32 keeps 7 digits, and 32 steps at ReLU's kinks lose some of them."""
    reference, _ = _run(1, 1, 'float32')
    variables, _ = _run(1, 8, 'float32')
    assert relative_distance(variables, reference) < 2e-2


# By default, pods_test.py compares 4 processes, 2 and 1, with all replicas in one group.
@pytest.mark.slow
@pytest.mark.parametrize(
    ['replicas_per_group', 'method'],
    [(1, 'sam'), (2, 'sam'), (4, 'sam'), (1, 'ae_looksam'), (2, 'sampa'), (1, 'saf')],
)
def test_two_processes(replicas_per_group, method, tmp_path):
    """2 processes x 2 devices against one process with 4; only process 0 writes."""
    epochs = 2 if method == 'saf' else 1
    settings = {**SETTINGS, 'replica_batch_size': 10, 'total_epochs': epochs}
    flags = [f'--config.{key.replace("__", ".")}={value}' for key, value in settings.items()]
    flags += [
        f'--config.sam.replicas_per_group={replicas_per_group}',
        '--config.model.dtype=float64',
        '--config.eval.every_epochs=1',
        '--config.analysis.every_epochs=1',
        '--config.analysis.examples=30',
    ]
    if method == 'saf':
        flags += ['--config.sam.start_epoch=0', '--config.sam.epochs_ago=1']
    states, results = [], []
    for num_processes in (1, 2):
        workdir = tmp_path / str(num_processes)
        outputs = run_processes(
            flags, workdir, num_processes, 4 // num_processes, f'configs/digits.py:method={method}'
        )
        assert ['Finished.' in output for output in outputs] == [True, False][:num_processes]
        with ocp.CheckpointManager(workdir / 'checkpoints') as manager:
            arrays = manager.restore(
                manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore())
            ).state
        states.append(
            {name: x for name, x in arrays.items() if name.startswith(('params.', 'batch_stats.'))}
        )
        results.append(json.loads((workdir / 'result.json').read_text()))
        lines = (workdir / 'metrics.jsonl').read_text().splitlines()
        steps = [json.loads(line)['step'] for line in lines]
        assert steps == sorted(steps) and {*steps} == {*range(8, 32 * epochs + 1, 8)}
        written = json.loads((workdir / 'config.json').read_text())
        assert (written['process_count'], written['device_count']) == (num_processes, 4)
    assert len(states[0]) > 20 and states[0].keys() == states[1].keys()
    assert relative_distance(*states) < 1e-9
    assert results[0]['test/error_rate'] == results[1]['test/error_rate']
    for name in ('lambda_max', 'sharpness', 'gap'):
        np.testing.assert_allclose(*(r[f'analysis/{name}'] for r in results), rtol=1e-6)
