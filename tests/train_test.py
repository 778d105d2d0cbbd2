"""Whole runs: what they leave behind, how they resume, how they stop."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import (
    QUICK_TO_COMPILE,
    ROOT,
    Net,
    assert_trees_equal,
    at_step,
    lean_environment,
    small_config,
)

from sam_jax import data, evaluate, models, replicas, settings, step_log, train, train_step
from sam_jax.data import pictures
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment


@pytest.fixture(autouse=True)
def tiny_model(request):
    """Runs in this process use a network that compiles quickly."""

    def build(settings, num_classes):
        return Net(settings.dtype, settings.dropout_rate)

    with mock.patch.object(models, 'from_config', build):
        yield


def _metrics(workdir):
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != 'time' and 'perf/' not in k}
        for line in lines
    ]


def _run(config, workdir, devices=1, **how):
    return train.train_and_evaluate(config, str(workdir), jax.devices()[:devices], **how)


def test_what_a_run_leaves_behind(tmp_path):
    config = small_config(
        eval__top5=True,
        eval__train_set=True,
        ema__decay=0.9,
        data__validation=True,
        data__label_noise=0.2,
        batch_size=58,
        replica_batch_size=29,
    )
    state = _run(config, tmp_path, devices=2)
    result = json.loads((tmp_path / 'result.json').read_text())
    assert int(state.step) == result['step'] == 40
    assert result['gradient_evaluations'] == 2 * 40
    for split in ('test', 'validation', 'train_set', 'train_true_labels_set'):
        for name in ('loss', 'error_rate', 'top5_error_rate', 'ema_error_rate'):
            assert result[f'{split}/{name}'] >= 0
    assert result['wall_time'] > 0 and result['perf/images_per_second'] > 0
    written = json.loads((tmp_path / 'config.json').read_text())
    assert written['config']['sam.rho'] == 0.5 and written['device_count'] == 2
    assert set(written) >= {'versions', 'git_revision', 'device_kind'}
    assert list(tmp_path.glob('events.out.tfevents.*'))
    lines = _metrics(tmp_path)
    assert [line['step'] for line in lines] == [20, 20, 40, 40]
    assert set(lines[0]) >= {
        'train/loss',
        'train/perturbed_loss',
        'train/error_rate',
        'train/perturbed_error_rate',
        'train/rho',
        'train/clean_grad_norm',
        'train/grad_norm',
        'train/param_norm',
        'train/perturbation_norm',
        'train/learning_rate',
    }
    assert lines[-1]['test/error_rate'] == result['test/error_rate']


def test_the_picture_at_the_start_is_the_first_batch():
    experiment = Experiment.from_config(small_config(), jax.devices()[:1])
    grid = pictures.grid(pictures.training_images(experiment.dataset, 0, 0, experiment.layout))
    assert grid.shape == (1, 64, 64, 1)
    first = experiment.dataset.train_feed(0, 0, experiment.layout)['index'].reshape(8, 8)
    for row, column in ((0, 0), (0, 5), (6, 2)):
        tile = grid[0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        image = experiment.dataset.train.images[first[row, column]] / 255
        np.testing.assert_allclose(tile, image, atol=1e-6)


def test_evaluation_is_exact_on_any_device_count(tmp_path):
    """Against a plain NumPy computation over the whole split; 500 is no multiple of 3 or 8."""
    config = small_config(total_epochs=1, eval__top5=True, eval__batch_size=96)
    state = _run(config, tmp_path)
    dataset = data.load_dataset(config.data)
    test = dataset.evals['test']
    images = (test.images / 255.0 - dataset.mean) / dataset.std
    logits = np.asarray(
        Net().apply(
            {'params': state.params, 'batch_stats': state.batch_stats}, images.astype(np.float32)
        )
    )
    order = np.argsort(-logits, axis=-1)
    expected = {
        'test/error_rate': np.mean(order[:, 0] != test.labels),
        'test/top5_error_rate': np.mean((order[:, :5] != test.labels[:, None]).all(1)),
    }
    for n in (1, 3, 8):
        layout, _ = replicas.make_layout(64 * n, 64, 1, devices=jax.devices()[:n])
        step = evaluate.make_eval_step(Net(), layout, dataset, top5=True)
        variables = layout.replicate(jax.device_get((state.params, state.batch_stats)))
        means = evaluate.evaluate(
            step,
            *variables,
            layout.replicate(dataset.device_arrays(test)),
            dataset.eval_feeds(test, 96, layout),
            layout,
        )
        for name, value in expected.items():
            assert means[name.removeprefix('test/')] == pytest.approx(value, abs=1e-12)


VARIANTS = {
    'sgd': dict(sam__method='sgd'),
    'sam': {},
    'ema': dict(ema__decay=0.9, ema__warmup_steps=5),
    'label noise': dict(data__label_noise=0.4),
    'dropout': dict(model__dropout_rate=0.3),
    'rmsprop': dict(optimizer__name='rmsprop', optimizer__learning_rate=0.01),
    'augmentation, replicas': dict(
        data__augment='basic',
        data__padding=2,
        batch_size=64,
        replica_batch_size=16,
        sam__replicas_per_group=2,
    ),
}


# By default those that have most parts between them.
@pytest.mark.accelerator
@pytest.mark.parametrize(
    'name',
    [
        name
        if name in ('dropout', 'ema', 'augmentation, replicas')
        else pytest.param(name, marks=pytest.mark.slow)
        for name in VARIANTS
    ],
)
def test_resume_is_exact(name, tmp_path):
    """Stopped by SIGTERM within an epoch and within a report, then killed, then left to finish."""
    config = small_config(log_every_steps=8, checkpoint__every_epochs=1, **VARIANTS[name])
    undisturbed = _run(config, tmp_path / 'a')
    with (
        at_step(12, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        pytest.raises(train.Preempted, match='SIGTERM at step 13 of 40'),
    ):
        _run(config, tmp_path / 'b')
    with at_step(27, mock.Mock(side_effect=KeyboardInterrupt)), pytest.raises(KeyboardInterrupt):
        _run(config, tmp_path / 'b')
    resumed = _run(config, tmp_path / 'b')
    assert_trees_equal(resumed, undisturbed)
    assert _metrics(tmp_path / 'a') == _metrics(tmp_path / 'b')


def test_a_run_stops_after_an_epoch_and_goes_on_as_if_it_had_not(tmp_path):
    config = small_config(eval__every_epochs=2)
    undisturbed = _run(config, tmp_path / 'a')
    state = _run(config, tmp_path / 'b', until_epoch=1)
    at_one = json.loads((tmp_path / 'b' / 'result_at_1.json').read_text())
    assert int(state.step) == at_one['step'] == 20 and at_one['epochs'] == 1
    assert at_one['gradient_evaluations'] == 40 and at_one['test/error_rate'] >= 0
    assert not (tmp_path / 'b' / 'result.json').exists()
    assert_trees_equal(_run(config, tmp_path / 'b'), undisturbed)
    there = [line for line in _metrics(tmp_path / 'b') if (line['step'], len(line)) != (20, 3)]
    assert there == _metrics(tmp_path / 'a'), 'but for the evaluation at step 20'


@pytest.mark.slow
def test_epochs_that_a_run_has_reached_and_those_it_cannot_stop_after(tmp_path, caplog):
    for _ in range(2):
        with caplog.at_level(logging.INFO, 'sam_jax'):
            _run(small_config(), tmp_path, until_epoch=1)
    assert 'has reached epoch 1; nothing to do' in caplog.text
    _run(small_config(), tmp_path)
    (tmp_path / 'result_at_1.json').unlink()
    for epoch, words in ((1, 'is beyond that, at step 40'), (3, 'from 0 to total_epochs, 2')):
        with pytest.raises(UserError, match=f'--until_epoch is {epoch}; .*{words}'):
            _run(small_config(), tmp_path, until_epoch=epoch)


def test_resume_on_other_devices(tmp_path):
    config = small_config(replica_batch_size=16, checkpoint__every_epochs=1)
    reference = _run(config, tmp_path / 'a', devices=1)
    with at_step(25, mock.Mock(side_effect=KeyboardInterrupt)), pytest.raises(KeyboardInterrupt):
        _run(config, tmp_path / 'b', devices=1)
    resumed = _run(config, tmp_path / 'b', devices=4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0.02, atol=2e-3),
        jax.device_get(resumed.params),
        jax.device_get(reference.params),
    )


def test_one_compilation_in_a_run_and_one_after_a_resume(tmp_path):
    config = small_config(checkpoint__every_epochs=1)
    compiled, counts = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: (
            compiled.append(1) if name.endswith('backend_compile_duration') else None
        )
    )
    real = train_step.make_train_step

    def counting(*args):
        step = real(*args)

        def call(*arguments):
            before = len(compiled)
            result = step(*arguments)
            counts.append(len(compiled) - before)
            return result

        return call

    with mock.patch.object(train_step, 'make_train_step', counting):
        with (
            at_step(25, mock.Mock(side_effect=KeyboardInterrupt)),
            pytest.raises(KeyboardInterrupt),
        ):
            _run(config, tmp_path, devices=2)
        assert counts == [1] + [0] * 24
        counts.clear()
        _run(config, tmp_path, devices=2)
        assert counts == [1] + [0] * 19


def _fingerprint(folder):
    return {
        str(p): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in pathlib.Path(folder).rglob('*')
        if p.is_file()
    }


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, caplog):
    state = _run(small_config(), tmp_path)
    before = _fingerprint(tmp_path)
    with caplog.at_level(logging.INFO, 'sam_jax'):
        again = _run(small_config(), tmp_path)
    assert 'is finished; nothing to do' in caplog.text and 'test error' in caplog.text
    assert _fingerprint(tmp_path) == before
    assert_trees_equal(again, state)


def test_a_run_killed_before_its_result_gets_it(tmp_path):
    _run(small_config(), tmp_path)
    result, metrics = json.loads((tmp_path / 'result.json').read_text()), _metrics(tmp_path)
    (tmp_path / 'result.json').unlink()
    _run(small_config(), tmp_path)
    again = json.loads((tmp_path / 'result.json').read_text())
    assert again['test/error_rate'] == result['test/error_rate']
    assert again['test/loss'] == result['test/loss']
    assert _metrics(tmp_path) == metrics


def test_resuming_with_other_mathematics_is_refused(tmp_path):
    _run(small_config(), tmp_path)
    before = _fingerprint(tmp_path)
    with pytest.raises(UserError, match=r'sam\.rho \(was 0\.5, now 0\.1\), total_epochs \(was 2'):
        _run(small_config(sam__rho=0.1, total_epochs=3), tmp_path)
    with pytest.raises(UserError, match=r'model\.name \(was .wrn10_1., now .wrn16_1.\)'):
        _run(small_config(model__name='wrn16_1'), tmp_path)
    assert _fingerprint(tmp_path) == before
    _run(small_config(checkpoint__every_epochs=1, replica_loop='scan'), tmp_path)


@pytest.mark.parametrize('step', [3, 25])
def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(step, tmp_path):
    real = train_step.make_train_step

    def poisoned(*args):
        step_fn = real(*args)

        def call(state, *rest):
            if int(state.step) == step - 1:
                state = state.replace(params=jax.tree.map(lambda w: w * np.nan, state.params))
            return step_fn(state, *rest)

        return call

    config = small_config(checkpoint__every_epochs=1, checkpoint__every_minutes=0.0)
    kept = 'that of step 20' if step > 20 else 'no checkpoint was written yet'
    with (
        mock.patch.object(train_step, 'make_train_step', poisoned),
        pytest.raises(UserError, match=f'not finite at step {step};.*{kept}'),
    ):
        _run(config, tmp_path)
    steps = sorted(os.listdir(tmp_path / 'checkpoints'))
    assert steps == (['20'] if step > 20 else [])
    assert not (tmp_path / 'result.json').exists()


def test_checkpoints_by_minutes_and_kept_epochs(tmp_path):
    _run(
        small_config(
            checkpoint__keep_epochs=(1,), log_every_steps=100, checkpoint__every_minutes=1e-9
        ),
        tmp_path,
    )
    steps = sorted(int(s) for s in os.listdir(tmp_path / 'checkpoints'))
    assert steps == [20, 39, 40]


@pytest.mark.parametrize(
    'overrides, expected',
    [
        ({}, 'sam is on: perturbation norm 0.5, rho 0.5'),
        (dict(sam__p=np.inf, sam__rho=0.01), 'sam is on: perturbation norm 0.01, rho 0.01'),
        (dict(sam__warmup_epochs=1.0), 'sam is on'),
        (dict(sam__rho=0.0), 'WARNING: sam is not doing its work'),
    ],
)
def test_says_whether_sam_is_on(overrides, expected, tmp_path, caplog):
    with caplog.at_level(logging.INFO, 'sam_jax'):
        _run(small_config(total_epochs=1, **overrides), tmp_path)
    assert caplog.text.count('sam is ') == 1 and expected in caplog.text


def test_warns_when_the_perturbation_does_not_climb():
    lines = []
    metrics = {
        'train/rho': 0.5,
        'train/perturbation_norm': 0.5,
        'train/loss': 2.0,
        'train/perturbed_loss': 1.9,
    }
    assert step_log.sharpness_check(small_config(), metrics, lines.append)
    metrics.update({'train/perturbed_loss': 2.1, 'train/perturbation_norm': 0.4})
    assert step_log.sharpness_check(small_config(), metrics, lines.append)
    assert all(line.startswith('WARNING') for line in lines) and len(lines) == 2


def test_several_steps_may_end_within_the_ball():
    config, lines = small_config(sam__method='multistep_sam'), []
    metrics = {
        'train/rho': 0.5,
        'train/perturbation_norm': 0.4,
        'train/loss': 2.0,
        'train/perturbed_loss': 2.1,
    }
    for norm in (0.4, 0.51):
        metrics['train/perturbation_norm'] = norm
        step_log.sharpness_check(config, metrics, lines.append)
    assert [line.startswith('multistep_sam is on') for line in lines] == [True, False]


def test_fewer_replicas_than_devices_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO, 'sam_jax'):
        _run(small_config(total_epochs=1, replica_batch_size=16), tmp_path, devices=8)
    assert 'has 4 replicas of 16 for 8 devices: 4 of them are used' in caplog.text


# Real processes.

FLAGS = [
    '--config.total_epochs=2',
    '--config.ema.decay=0.9',
    '--config.model.dropout_rate=0.2',
    '--config.data.label_noise=0.3',
    '--config.data.augment=basic',
    '--config.data.padding=2',
    '--config.eval.every_epochs=1',
    '--config.log_every_steps=4',
    '--config.checkpoint.every_minutes=1e-9',
]


def _start(workdir, cache, lean=False):
    environment = {
        **(lean_environment(cache.parent) if lean else os.environ),
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': QUICK_TO_COMPILE,
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    return subprocess.Popen(
        [
            sys.executable,
            '-m',
            'sam_jax.main',
            '--config=configs/digits.py',
            f'--workdir={workdir}',
            *FLAGS,
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_for(process, condition):
    while not condition() and process.poll() is None:
        time.sleep(0.002)


def _final_arrays(workdir):
    with ocp.CheckpointManager(workdir / 'checkpoints') as manager:
        return manager.restore(40, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state


def test_killed_processes(tmp_path):
    """SIGKILL at the start and during a save, and a SIGTERM: nothing is lost."""
    cache, workdir = tmp_path / 'cache', tmp_path / 'killed'
    process = _start(tmp_path / 'undisturbed', cache)
    output = process.communicate(timeout=300)[0]
    assert 'Finished.' in output and f'Compiled programs are kept in {cache}.' in output
    assert re.search(r'group0_block0_conv1/kernel *\| \(3, 3, 16, 16\)', output), "clu's overview"

    def steps():
        folder = workdir / 'checkpoints'
        names = os.listdir(folder) if folder.exists() else []
        return [int(n) for n in names if n.isdigit()]

    def saving():
        return any('tmp' in p.name for p in (workdir / 'checkpoints').glob('*'))

    reached = [0]
    for kind in ('first steps', 'save', 'SIGTERM'):
        process = _start(workdir, cache, lean=kind != 'save')
        goal = reached[-1] + (8 if kind != 'first steps' else 0)
        _wait_for(process, lambda goal=goal: max(steps(), default=-1) >= goal)
        if kind == 'save':
            _wait_for(process, saving)
        process.send_signal(signal.SIGTERM if kind == 'SIGTERM' else signal.SIGKILL)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == (143 if kind == 'SIGTERM' else -signal.SIGKILL), output
        reached.append(max(steps()))
    assert 'Stopped by SIGTERM at step' in output and 'the state is saved' in output
    assert reached == sorted(set(reached)) and reached[-1] < 40, reached
    process = _start(workdir, cache, lean=True)
    output = process.communicate(timeout=300)[0]
    assert f'Resuming at step {reached[-1]} of 40' in output and 'Finished.' in output
    assert_trees_equal(_final_arrays(workdir), _final_arrays(tmp_path / 'undisturbed'))
    assert _metrics(workdir) == _metrics(tmp_path / 'undisturbed')


def test_a_split_of_damaged_images_alone_is_no_evaluation():
    layout, _ = replicas.make_layout(8, 8, 1, devices=jax.devices()[:1])
    sums = {'count': 0.0, 'loss': 0.0}
    with pytest.raises(UserError, match='All images of a split to evaluate are damaged'):
        evaluate.evaluate(lambda *_: sums, {}, {}, {}, [np.zeros((1, 8))], layout)


@pytest.mark.parametrize('until', [-1, 3])
def test_where_to_stop_is_looked_at_first(until, tmp_path):
    config = small_config(data__name='npz', data__dir=str(tmp_path / 'nowhere'))
    with pytest.raises(UserError, match=f'--until_epoch is {until}; it must be from 0 to'):
        _run(config, tmp_path / 'run', until_epoch=until)
    assert not (tmp_path / 'run').exists()


def test_a_late_phase_without_a_step_is_refused():
    config = small_config(sam__method='late_phase_sam')
    for start, end, refused in ((0.99, 1.0, True), (0.975, 1.0, False), (0.51, 0.52, True)):
        config.sam.start, config.sam.end = start, end
        with pytest.raises(UserError) if refused else contextlib.nullcontext() as e:
            Experiment.from_config(config, jax.devices()[:1])
        assert not refused or 'none of the 40 steps of the run lies between them' in str(e.value)


def test_an_epoch_is_that_of_the_training_where_other_data_are_evaluated(tmp_path):
    config = small_config(checkpoint__every_epochs=1, checkpoint__keep_epochs=(1,))
    train.train_and_evaluate(config, str(tmp_path), jax.devices()[:1])
    experiment = Experiment.from_config(config, jax.devices()[:1])
    fewer = experiment.dataset.train.part(slice(0, 800))
    fewer = dataclasses.replace(
        experiment, dataset=dataclasses.replace(experiment.dataset, train=fewer)
    )
    assert (experiment.steps_per_epoch, fewer.steps_per_epoch) == (20, 12)
    for opened in experiment, fewer:
        assert opened.restore(str(tmp_path), epoch=1)[1] == 20


def test_the_memory_of_a_method_is_not_compared_where_nothing_is_trained(tmp_path):
    config = small_config(sam__method='saf', total_epochs=4)
    config.sam.start_epoch, config.sam.epochs_ago = 0, 2
    experiment = Experiment.from_config(config, jax.devices()[:1])
    state = experiment.create_state()
    meta = {'config': settings.jsonable(config), 'wall_time': 0.0}
    with experiment.checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(20, state, meta)
    dataset = experiment.dataset
    fewer = dataclasses.replace(dataset, train=dataset.train.part(slice(0, 800)))
    opened, step = dataclasses.replace(experiment, dataset=fewer).restore(str(tmp_path))
    assert step == 20 and opened.memory is None
    assert_trees_equal(jax.device_get(opened.params), jax.device_get(state.params))
