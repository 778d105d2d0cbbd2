"""Analysis during training and of a finished run, as users start it, on real digits."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from helpers import ROOT, Net, assert_trees_equal, lean_environment, small_config

from sam_jax import models, train
from sam_jax.analysis import landscape, study
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment
from sam_jax.experiments import flatness, results


@pytest.fixture(scope='module', autouse=True)
def tiny():
    """A network that compiles soon, in the place of the config's."""

    def build(settings, num_classes):
        return Net(settings.dtype)

    with mock.patch.object(models, 'from_config', build):
        yield


@pytest.fixture(scope='module')
def folders(tmp_path_factory, tiny):
    """Two finished runs; the first one was analysed after each of its epochs."""
    names = {
        'sgd': dict(analysis__every_epochs=1, analysis__examples=100, analysis__steps=30),
        'sam': dict(sam__rho=0.2),
    }
    folder = tmp_path_factory.mktemp('runs')
    for method, settings in names.items():
        train.train_and_evaluate(
            small_config(sam__method=method, checkpoint__every_epochs=1, **settings),
            str(folder / method),
            devices=jax.devices()[:1],
        )
    return folder


def logged(workdir):
    with open(workdir / 'metrics.jsonl') as file:
        return [json.loads(line) for line in file]


def test_training_is_the_same_with_and_without_analysis_bit_for_bit(folders, tmp_path):
    config = small_config(sam__method='sgd')
    without = train.train_and_evaluate(config, str(tmp_path / 'w'), devices=jax.devices()[:1])
    analysed, _ = Experiment.from_config(config, jax.devices()[:1]).restore(str(folders / 'sgd'))
    for name in ('params', 'batch_stats', 'opt_state', 'sums'):
        assert_trees_equal(getattr(analysed, name), getattr(without, name))
    plain, beside = logged(tmp_path / 'w'), logged(folders / 'sgd')
    assert not any('analysis/lambda_max' in line for line in plain)
    for lines in plain, beside:
        for line in lines:
            for name in [n for n in line if n == 'time' or n.startswith(('perf/', 'analysis/'))]:
                del line[name]
    assert plain == [line for line in beside if len(line) > 1]


def test_what_training_logs_is_what_the_command_finds(folders):
    lines = [line for line in logged(folders / 'sgd') if 'analysis/lambda_max' in line]
    assert [line['step'] for line in lines] == [20, 40]
    result = json.loads((folders / 'sgd' / 'result.json').read_text())
    assert 0 < result['analysis/share'] < 1
    for name in ('lambda_max', 'lambda_ratio', 'sharpness', 'gap', 'edge', 'seconds'):
        assert lines[1][f'analysis/{name}'] == result[f'analysis/{name}']
    run = study.open_run(str(folders / 'sgd'), examples=100)
    spectrum, _ = study.measure_spectrum(run, study.Settings(steps=30, probes=1))
    for name, rtol in (('lambda_max', 1e-3), ('lambda_ratio', 1e-2)):
        np.testing.assert_allclose(spectrum[name], result[f'analysis/{name}'], rtol=rtol)
    measured = study.measure_sharpness(run, study.Settings(m=(64,)))
    np.testing.assert_allclose(
        measured['SAM step']['sharpness'], result['analysis/sharpness'], rtol=1e-2
    )
    np.testing.assert_allclose(measured['m = 64']['sharpness'], result['analysis/gap'], rtol=1e-2)
    # Gradient descent's edge, of the learning rate of the epoch's last step.
    (line,) = (x for x in logged(folders / 'sgd') if x['step'] == 20 and 'train/learning_rate' in x)
    np.testing.assert_allclose(
        lines[0]['analysis/edge'], 2 / line['train/learning_rate'], rtol=1e-5
    )


FILES = {
    'analysis.json',
    'report.md',
    'spectrum.png',
    'spectrum_1.npz',
    'spectrum_2.npz',
    'landscape.png',
    'landscape_1.npz',
    'landscape_2.npz',
    'path.png',
    'path.npz',
}


@pytest.mark.slow
def test_the_command(tmp_path):
    """A real network, from a process of its own."""
    for method in ('sgd', 'sam'):
        done = subprocess.run(
            [
                sys.executable,
                '-m',
                'sam_jax.main',
                f'--config=configs/digits.py:method={method}',
                '--config.total_epochs=1',
                f'--workdir={tmp_path / method}',
            ],
            cwd=ROOT,
            env=lean_environment(tmp_path),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'sam_jax.cli.analyze',
            f'--workdir={tmp_path / "sgd"}',
            f'--compare={tmp_path / "sam"}',
            '--examples=50',
            '--steps=6',
            '--probes=2',
            '--m=1,25',
            '--points=3',
        ],
        cwd=ROOT,
        env=lean_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {*os.listdir(tmp_path / 'sgd' / 'analysis')} == FILES
    assert '| lambda_max | ' in done.stderr


def test_two_runs_and_all_that_is_written_of_them(folders, tmp_path):
    runs = [study.open_run(str(folders / name), examples=120) for name in ('sgd', 'sam')]
    study.analyze(
        runs, str(tmp_path / 'out'), study.Settings(steps=12, probes=2, m=(1, 60, 1000), points=3)
    )
    assert {*os.listdir(tmp_path / 'out')} == FILES
    said = json.loads((tmp_path / 'out' / 'analysis.json').read_text())
    first, second = said['runs']
    for run in said['runs']:
        assert run['weight_decay'] == 0 and run['examples'] == 120 and run['split'] == 'train'
    assert (first['name'], second['name']) == ('sgd, sgd', 'sam, sam')
    for run in said['runs']:
        assert run['spectrum']['lambda_max'] == run['spectrum']['eigenvalues'][0] > 0
        assert {*run['sharpness']} == {
            'SAM step',
            '5 projected steps',
            'adaptive, rho 0.5',
            'average direction',
            'm = 1',
            'm = 60',
        }
        rises = {name: rise['sharpness'] for name, rise in run['sharpness'].items()}
        assert rises['m = 1'] > rises['m = 60'] > rises['average direction']
        layers = run['spectrum']['layers'].values()
        np.testing.assert_allclose(sum(x['trace'] for x in layers), run['spectrum']['trace'])
    for i, run in enumerate(said['runs']):
        with np.load(tmp_path / 'out' / f'landscape_{i + 1}.npz') as surface:
            np.testing.assert_allclose(surface['loss'][4], run['loss'], rtol=1e-5)
    with np.load(tmp_path / 'out' / 'path.npz') as path:
        ends = [path['loss'][np.isclose(path['places'][:, 0], t)][0] for t in (0, 1)]
    np.testing.assert_allclose(ends, [first['loss'], second['loss']], rtol=1e-4)
    text = (tmp_path / 'out' / 'report.md').read_text()
    assert '| lambda_max / lambda_5 |' in text and 'without penalty' in text
    assert 'There are too few examples for m = 1000.' in text
    assert f'| lambda_max | {first["spectrum"]["lambda_max"]:.4g} |' in text


# The command several times in a process of its own, with the network of `tiny`.
COMMANDS = """
import json, sys
from absl import flags
from helpers import Net
from sam_jax import models
from sam_jax.cli import analyze

models.from_config = lambda settings, num_classes: Net(settings.dtype)
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    flags.FLAGS.unparse_flags()
    try:
        analyze.run()
    except SystemExit as ended:
        print(ended.code or 0, flush=True)
"""


def test_all_runs_of_a_folder(folders, tmp_path):
    for name in ('sgd', 'sam'):
        shutil.copytree(folders / name, tmp_path / 'runs' / name)
    (tmp_path / 'runs' / 'unfinished').mkdir()
    shutil.copy(folders / 'sgd' / 'config.json', tmp_path / 'runs' / 'unfinished')
    command = [f'--runs={tmp_path / "runs"}', '--what=sharpness', '--m=16', '--examples=50']
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            COMMANDS,
            json.dumps(
                [
                    command,
                    command,
                    [*command, f'--workdir={tmp_path / "runs" / "sgd"}'],
                    [*command, '--what=order', '--epoch=1'],
                    [*command, '--what=order', '--epoch=1'],
                    [*command, '--examples=0'],
                    [*command, '--examples=0'],
                ]
            ),
        ],
        cwd=ROOT,
        env={**lean_environment(tmp_path), 'PYTHONPATH': str(ROOT / 'tests')},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ['0', '0', '2', '0', '0', '0', '0'], done.stderr
    # Once each, once after the first epoch, and once on all examples, however often they are asked.
    assert [done.stderr.count(f'{name} is measured.') for name in ('sam', 'sgd', 'unfinished')] == [
        3,
        3,
        0,
    ]
    assert '--workdir is ' in done.stderr and 'give one of them' in done.stderr

    groups, _ = results.group(results.find([str(tmp_path / 'runs')]))
    for group in groups:
        found = flatness.analyses(group.finished[0])
        assert [os.path.basename(folder) for folder, _ in found] == ['analysis', 'epoch=1']
        assert 0 < found[1][1]['runs'][0]['order_cosine'] <= 1 + 1e-6
    names = [g.settings['sam.method'] for g in groups]
    rows = {row['measure']: row for row in flatness.rows(groups, names)}
    for name in ('sam', 'sgd'):
        file = tmp_path / 'runs' / name / 'analysis' / 'analysis.json'
        (run,) = json.loads(file.read_text())['runs']
        rise = run['sharpness']['m = 16']['sharpness']
        assert rows['rise of the loss: m = 16'][name] == f'{rise:.4g}'


def test_only_the_same_measurements_of_the_same_step_are_done(tmp_path):
    """What an older version has written, without `asked`, stands for what it certainly answers."""
    settings = study.Settings(what=('spectrum',))
    run = {'step': 40, 'split': 'train', 'examples': 90, 'weight_decay': 0.0}

    def is_done(*asked, now=settings, **noted):
        said = {'settings': dataclasses.asdict(settings), 'runs': [{**run, **noted}]}
        (tmp_path / 'analysis.json').write_text(json.dumps(said))
        return study.is_done(str(tmp_path), now, *asked)

    for noted in ({}, {'asked': {'examples': 90, 'penalty': False}}):
        assert is_done(40, 'train', 90, **noted)
        for asked in ((20, 'train', 90), (40, 'test', 90), (40, 'train', 0), (40, 'train', 50)):
            assert not is_done(*asked, **noted), asked
        assert not is_done(40, 'train', 90, True, **noted)
        assert not is_done(40, 'train', 90, now=dataclasses.replace(settings, rho=0.1), **noted)
        assert not is_done(40, 'train', 90, now=study.Settings(what=('landscape',)), **noted)
    # More than there are, and all there are.
    for examples in (1000, 0):
        assert is_done(40, 'train', examples, asked={'examples': examples, 'penalty': False})
    # A penalty of a run whose weight decay is 0.
    assert is_done(40, 'train', 0, True, asked={'examples': 0, 'penalty': True})


def test_a_landscape_goes_on_where_it_stopped(folders, tmp_path, monkeypatch):
    # On one device a place is computed at a time, so that three of five can be done.
    run = study.open_run(str(folders / 'sgd'), examples=50, devices=jax.devices()[:1])
    directions = [landscape.random_direction(run.params, 0)]
    places = landscape.grid(1.0, 5, 1)[1]
    path = str(tmp_path / 'surface.npz')
    whole = study.measure_surface(run, directions, places, str(tmp_path / 'whole.npz'), 'key')

    class Killed(Exception):
        pass

    def die(what, done, total):
        if done == 3:
            raise Killed

    clock = iter(range(0, 10**6, 100))  # each place takes so long that it is saved
    monkeypatch.setattr(study.time, 'perf_counter', lambda: next(clock))
    with pytest.raises(Killed):
        study.measure_surface(run, directions, places, path, 'key', die)
    told = []
    found = study.measure_surface(
        run, directions, places, path, 'key', lambda *progress: told.append(progress[1:])
    )
    assert told == [(4, 5), (5, 5)]
    assert_trees_equal(found, whole)
    told.clear()
    study.measure_surface(
        run, directions, places, path, 'another', lambda *progress: told.append(progress[1:])
    )
    assert len(told) == 5


def test_along_the_first_eigenvectors_the_loss_curves_by_their_eigenvalues(folders):
    run = study.open_run(str(folders / 'sgd'), examples=100)
    spectrum, _ = study.measure_spectrum(run, study.Settings(steps=40, probes=1))
    directions = study._axes_of(
        run, study.Settings(steps=40, directions='eigenvectors'), lambda *progress: None
    )
    length = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(directions[0])))
    h = 0.01 / length
    loss = landscape.make_surface(run.objective, run.params, directions[:1])([[-h], [0.0], [h]])[
        'loss'
    ]
    np.testing.assert_allclose(
        (loss[0] - 2 * loss[1] + loss[2]) / 0.01**2, spectrum['lambda_max'], rtol=0.1
    )


def test_the_penalty_is_in_the_loss_if_asked_for(folders):
    runs = [study.open_run(str(folders / 'sgd'), examples=50, penalty=p) for p in (False, True)]
    plain, penalised = (run.objective.value(run.params)['loss'] for run in runs)
    squares = sum(
        float(np.sum(np.square(x))) for x in jax.tree.leaves(jax.device_get(runs[0].params))
    )
    np.testing.assert_allclose(penalised - plain, 0.5 * 5e-4 * squares, rtol=1e-4)
    assert runs[1].objective.weight_decay == 5e-4


@pytest.mark.parametrize(
    ['settings', 'sentence'],
    [
        ({'what': ('flatness',)}, "what has 'flatness'; it must be some of spectrum, sharpness"),
        ({'points': 4}, 'points is 4; it must be odd'),
        ({'points': 1}, 'it must be at least 3'),
        ({'rho': -1.0}, 'rho is -1.0; it must be greater than 0'),
        ({'m': (0,)}, 'it must hold numbers of examples'),
        ({'steps': 4}, 'steps is 4; it must be at least 5'),
    ],
    ids=str,
)
def test_bad_settings_get_a_sentence(settings, sentence):
    with pytest.raises(UserError) as refused:
        study.Settings(**settings)
    assert sentence in str(refused.value)


def test_a_run_is_analysed_on_any_number_of_devices(folders):
    """Its one replica was trained on one device; 3 divide neither the batch nor the examples."""
    runs = [
        study.open_run(str(folders / 'sgd'), examples=100, devices=jax.devices()[:n])
        for n in (1, 3)
    ]
    assert [len(run.objective.layout.devices) for run in runs] == [1, 3]
    losses = [run.objective.value(run.params)['loss'] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_earlier_epoch_can_be_opened(folders):
    runs = [study.open_run(str(folders / 'sgd'), examples=100, epoch=e) for e in (1, 2, None)]
    assert [run.step for run in runs] == [20, 40, 40]
    assert_trees_equal(runs[1].params, runs[2].params)
    losses = [run.objective.value(run.params)['loss'] for run in runs]
    assert losses[0] > losses[1] == losses[2]


def test_a_run_with_synchronised_batch_norm_opens_on_fewer_devices(tmp_path):
    config = small_config(model__sync_batch_norm=True, total_epochs=1, replica_batch_size=8)
    train.train_and_evaluate(config, str(tmp_path))
    experiment = Experiment.from_config(config, jax.devices()[:1], to_train=False)
    _, step = experiment.restore(str(tmp_path))
    layout = experiment.layout
    assert (len(layout.devices), layout.replicas_per_device, step) == (1, 8, 20)


def test_bad_runs_get_a_sentence(folders, tmp_path):
    with pytest.raises(UserError, match="'' must be the folder of a run"):
        study.open_run('')
    with pytest.raises(UserError, match="split is 'dev'; it must be one of .*test.*train"):
        study.open_run(str(folders / 'sgd'), split='dev')
    with pytest.raises(UserError, match='no checkpoint of step 60 .* there are those of 20, 40'):
        study.open_run(str(folders / 'sgd'), epoch=3)
    ended = subprocess.run(
        [sys.executable, '-m', 'sam_jax.cli.analyze', f'--workdir={folders / "sgd"}', '--m=1,x'],
        cwd=ROOT,
        env=lean_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr == "error: --m is '1,x'; it must be numbers of examples, such as 1,16,64.\n"
