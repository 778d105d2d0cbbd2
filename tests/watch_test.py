"""How a run is watched: trackers, traces of steps, and where a number stops being finite."""

import collections
import json
import subprocess
import sys
import time
import types
from unittest import mock

import jax
import numpy as np
import pytest
from helpers import ROOT, Net, assert_trees_equal, lean_environment, small_config

from sam_jax import models, nans, profiling, run_log, trackers, train, watchdog
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment

# Trackers.

HPARAMS = {'sam.rho': 0.05, 'model.name': 'wrn10_1', 'seed': 3}
IMAGES = {'train_images': np.zeros((2, 8, 8, 1), np.float32)}


class Noted:
    """A tracker that notes what it is told, or fails at it."""

    def __init__(self, *opened, fails=False):
        self.told, self._fails = [opened], fails

    def start(self, hparams, images):
        self.told.append(('start', hparams, {*images}))

    def scalars(self, step, scalars):
        if self._fails:
            raise ConnectionError('the network is gone')
        self.told.append(('scalars', step, scalars))

    def close(self):
        self.told.append('close')


def test_trackers_are_told_what_metrics_jsonl_is_told(tmp_path, monkeypatch):
    """A run that is resumed is the same one to them; another run in its folder is not."""
    opened = []
    (tmp_path / 'run').mkdir()
    monkeypatch.setitem(
        trackers.TRACKERS, 'wandb', lambda *told: opened.append(Noted(*told)) or opened[-1]
    )
    for first_step in (0, 2, 0):
        found = trackers.create(['wandb'], str(tmp_path / 'run'), first_step > 0)
        writer = run_log.RunWriter(str(tmp_path / 'run'), True, first_step, found)
        writer.start(HPARAMS, IMAGES)
        writer.scalars(first_step + 1, {'train/loss': 0.5})
        writer.close()
    for first_step, noted in zip((0, 2, 0), opened):
        assert noted.told[1:] == [
            ('start', HPARAMS, {'train_images'}),
            ('scalars', first_step + 1, {'train/loss': 0.5}),
            'close',
        ]
        assert noted.told[0][:2] == (str(tmp_path / 'run'), 'run')
    first, resumed, other = (noted.told[0][2] for noted in opened)
    assert first == resumed != other
    assert not [path for path in (tmp_path / 'run').iterdir() if 'tfevents' in path.name]


def test_trackers_are_closed_where_metrics_cannot_be_written(tmp_path):
    (tmp_path / 'metrics.jsonl').mkdir()
    tracker = Noted()
    with pytest.raises((OSError, UserError)):
        run_log.RunWriter(str(tmp_path), True, 0, [tracker])
    assert tracker.told[-1] == 'close'


def test_a_tracker_that_fails_does_not_end_the_run(caplog):
    noted = Noted(fails=True)
    guarded = trackers.Guarded('wandb', noted)
    guarded.scalars(1, {})
    guarded.scalars(2, {})
    guarded.close()
    (record,) = caplog.records
    assert 'wandb takes no more metrics (the network is gone)' in record.getMessage()
    assert noted.told == [()]


def test_what_is_no_tracker(tmp_path, monkeypatch):
    for name in trackers.TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=f'`pip install {name}` installs it'):
            trackers.create([name], str(tmp_path))
    for names, words in ((['comet'], "has 'comet'"), (2 * ['wandb'], 'may be named once')):
        with pytest.raises(UserError, match=words):
            trackers.check(names)

    def refused(*_):
        raise PermissionError('no key')

    monkeypatch.setitem(trackers.TRACKERS, 'wandb', refused)
    with pytest.raises(UserError, match='cannot be opened: no key'):
        trackers.create(['wandb'], str(tmp_path))


def _tell(name, folder):
    """A run that is stopped and goes on, as one of the libraries gets it."""
    for resumes, steps in ((False, (1, 2)), (True, (2, 3))):
        (tracker,) = trackers.create([name], str(folder), resumes)
        if not resumes:
            tracker.start(HPARAMS, IMAGES)
        for step in steps:
            tracker.scalars(step, {'train/loss': 1 / step, 'test/loss': float('nan')})
        tracker.close()
        assert tracker._tracker is not None  # it has not failed


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_mlflow_has_the_run_in_its_database(tmp_path, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{tmp_path}/mlflow.db')
    folder = tmp_path / 'rho=0.1'
    folder.mkdir()
    _tell('mlflow', folder)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name('sam_jax').experiment_id])
    assert run.info.run_name == 'rho=0.1' and run.info.status == 'FINISHED'
    assert run.data.params == {key: str(x) for key, x in HPARAMS.items()}
    history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, 'train/loss')}
    assert history == {step: pytest.approx(1 / step) for step in (1, 2, 3)}


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_wandb_has_the_run_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    tmp_path = tmp_path / 'run'
    tmp_path.mkdir()
    _tell('wandb', tmp_path)
    found = sorted(tmp_path.glob('wandb/offline-run-*/*.wandb'))
    identity = json.loads((tmp_path / 'trackers.json').read_text())['id']
    assert len(found) == 2 and all(identity in path.name for path in found)
    for _ in range(300):  # another process of wandb writes it
        whole = all(b'train/loss' in path.read_bytes() for path in found)
        if whole:
            break
        time.sleep(0.1)
    assert whole and wandb.run is None


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_trackio_has_the_run_on_this_machine(tmp_path, monkeypatch):
    pytest.importorskip('trackio')
    import sqlite3

    # Where it writes is read when it is imported.
    utils = sys.modules['trackio.utils']
    monkeypatch.setattr(utils, 'TRACKIO_DIR', tmp_path / 'trackio')
    for module in list(sys.modules.values()):
        if getattr(module, '__name__', '').startswith('trackio') and hasattr(module, 'TRACKIO_DIR'):
            monkeypatch.setattr(module, 'TRACKIO_DIR', tmp_path / 'trackio')
    folder = tmp_path / 'run'
    folder.mkdir()
    _tell('trackio', folder)
    (path,) = (tmp_path / 'trackio').rglob('sam_jax*.db')
    with sqlite3.connect(path) as database:
        rows = database.execute('SELECT step, metrics FROM metrics ORDER BY step').fetchall()
    told = [(step, json.loads(metrics)) for step, metrics in rows]
    losses = {step: metrics['train/loss'] for step, metrics in told if 'train/loss' in metrics}
    assert losses == {step: pytest.approx(1 / step) for step in (1, 2, 3)}


# Traces.


def test_which_steps_are_traced():
    assert profiling.Steps.parse('10:15') == (10, 15) and profiling.Steps.parse('') is None
    for wrong in ('10', '0:3', '5:4', 'a:b', '1:2:3', ':', '-1:2'):
        with pytest.raises(UserError, match='must be the first and the last step'):
            profiling.Steps.parse(wrong)


def _event(name, start, duration, **stats):
    return types.SimpleNamespace(
        start_ns=start, duration_ns=duration, stats=[('hlo_op', name), *stats.items()]
    )


def test_steps_that_are_not_made_are_no_trace(tmp_path):
    said = []
    profiler = profiling.Profiler(profiling.Steps(90, 95), str(tmp_path), said.append)
    for step in range(1, 20):
        profiler.before(step, None)
        profiler.after(step, None)
    profiler.close()
    assert said == ['--profile_steps is 90:95; no step of these was made.']
    profiling.Profiler(profiling.NO_STEPS, str(tmp_path), said.append).close()
    assert len(said) == 1 and not list(tmp_path.iterdir())


def test_operations_count_without_those_within_them():
    line = [
        _event('while.1', 0, 100),
        _event('dot.1', 10, 20),
        _event('fusion.1', 40, 30, tf_op='jit(step)/relu'),
        _event('add.1', 50, 5),
        _event('dot.1', 100, 7),
        types.SimpleNamespace(start_ns=0, duration_ns=9999, stats=[]),
    ]
    times = collections.Counter()
    profiling._add_own_times(line, times)
    assert times == {'while.1': 50, 'dot.1': 27, 'fusion.1 (jit(step)/relu)': 25, 'add.1': 5}
    rows = [(name, ns / 1e9, ns / 107) for name, ns in times.most_common()]
    text = profiling.summary(rows, 2, 'DIR')
    assert text.splitlines()[1].split() == ['46.7', '%', '0.000', 'ms', 'a', 'step', 'while.1']
    assert 'no operation' in profiling.summary([], 2, 'DIR') and profiling.longest('absent') == []


# What is not finite.


@pytest.fixture(scope='module')
def tiny():
    with mock.patch.object(
        models, 'from_config', lambda settings, num_classes: Net(settings.dtype)
    ):
        yield


def _config(**overrides):
    return small_config(
        **{'batch_size': 128, 'replica_batch_size': 64, 'total_epochs': 1, **overrides}
    )


def _with_leaf(state, module, leaf, value):
    params = jax.tree.map(np.asarray, jax.device_get(state.params))
    params[module][leaf] = np.full_like(params[module][leaf], value)
    return state.replace(params=params)


def test_the_first_layer_that_is_not_finite(tiny):
    experiment = Experiment.from_config(_config(), jax.devices()[:2])
    finder = nans.Finder(experiment)
    feed = next(experiment.feeds())
    plain = jax.device_get(experiment.create_state())
    cases = {
        ('Conv_0', 'kernel', np.inf): 'params/Conv_0/kernel before the step (in 2 of 2 replicas)',
        ('Conv_0', 'kernel', 3e38): 'layer Conv_0 (in 2 of 2 replicas)',
        ('Dense_0', 'kernel', 3e38): 'layer Dense_0 (in 2 of 2 replicas)',
        ('Dense_0', 'kernel', 1e20): 'the L2 penalty (in 2 of 2 replicas)',
    }
    for (module, leaf, value), words in cases.items():
        state = experiment.on_devices(_with_leaf(plain, module, leaf, value))
        assert finder.find(state, feed, state) == words
    good = experiment.on_devices(plain)
    assert finder.find(good, feed, good).startswith('none in a plain pass')
    after = experiment.on_devices(_with_leaf(plain, 'Dense_0', 'bias', np.nan))
    assert finder.find(good, feed, after) == 'the update of Dense_0/bias by the optimizer'


@pytest.mark.slow
def test_a_run_is_the_same_whether_it_is_watched_or_not(tiny, tmp_path, caplog):
    watch = train.Watch((), profiling.Steps(2, 4), debug_nans=True)
    states = [
        train.train_and_evaluate(_config(), str(tmp_path / name), jax.devices()[:2], seen)
        for name, seen in (('plain', None), ('watched', watch))
    ]
    assert_trees_equal(*(state.params for state in states))
    assert list((tmp_path / 'watched' / 'profile').rglob('*.xplane.pb'))
    operations = profiling.longest(str(tmp_path / 'watched' / 'profile'))
    assert len(operations) > 10 and sum(share for _, _, share in operations) == pytest.approx(1)
    result = json.loads((tmp_path / 'watched' / 'result.json').read_text())
    assert 1e7 < result['perf/memory_at_start'] <= result['perf/memory_peak']


@pytest.mark.slow
@pytest.mark.parametrize('changes,words', [
    ({'sam__rho': 1e38}, 'at the perturbed params'),
    ({'sam__rho': 1e38, 'replica_backend': 'shard_map'}, 'at the perturbed params'),
    ({'optimizer__learning_rate': 1e25}, 'layer|penalty'),
])  # fmt: skip
def test_a_run_says_what_is_not_finite(tiny, tmp_path, changes, words):
    watch = train.Watch((), debug_nans=True)
    with pytest.raises(UserError, match=f'the first that is not: .*({words})') as e:
        train.train_and_evaluate(_config(**changes), str(tmp_path), jax.devices()[:2], watch)
    assert f'In {tmp_path} no checkpoint was written yet.' in str(e.value)


# A run that stands still.

STANDS = """
import os
import time

from sam_jax import main, periodic, watchdog

evaluate, alive, soon = periodic.Evaluation.__call__, watchdog.Watchdog.alive, []


def impatient(dog):
    if soon:
        dog._seconds, dog._next = 1.0, 0.0
    alive(dog)


def stands_still(action, done, state):
    if done == 3:
        soon.append(done)
    while done == 4:
        time.sleep(1000)
    evaluate(action, done, state)


if os.environ['STANDS'] == 'still':
    watchdog.Watchdog.alive = impatient
    periodic.Evaluation.__call__ = stands_still
main.run()
"""


@pytest.mark.slow
def test_a_run_that_stands_still_ends_and_goes_on(tmp_path):
    """With its stacks, as long after its last sign of life as was said; then it resumes."""

    def started(how):
        return subprocess.run(
            [
                sys.executable,
                '-c',
                STANDS,
                '--config=digits:smoke',
                f'--workdir={tmp_path / "run"}',
                '--config.total_epochs=2',
                '--config.batch_size=640',
                '--config.replica_batch_size=640',
                '--config.checkpoint.every_epochs=1',
                '--hang_minutes=5',
            ],
            cwd=ROOT,
            env=lean_environment(tmp_path, STANDS=how),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    hung = started('still')
    assert hung.returncode == 1, hung.stderr
    assert 'Timeout (0:00:01)!' in hung.stderr and 'in stands_still' in hung.stderr
    again = started('not')
    assert again.returncode == 0 and 'Resuming at step 2 of 4' in again.stderr, again.stderr
    assert 'Timeout' not in again.stderr


def test_a_process_that_stands_still_ends():
    program = (
        'import time\nfrom sam_jax import watchdog\n'
        'with watchdog.Watchdog(0.01) as dog:\n    dog.alive()\n    time.sleep(1000)'
    )
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr.startswith('Timeout (0:00:00.600000)!'), done


def test_a_run_says_at_every_step_that_it_is_alive(tmp_path, monkeypatch):
    """And before what may take long: an evaluation, an analysis, a save; once the data is read."""
    heard = []
    monkeypatch.setattr(
        watchdog.Watchdog, '__init__', lambda dog, minutes: heard.append(minutes) or None
    )
    for name in ('__enter__', '__exit__', 'alive'):

        def noted(dog, *_, name=name):
            heard.append(name)
            return dog if name == '__enter__' else None

        monkeypatch.setattr(watchdog.Watchdog, name, noted)
    config = small_config(total_epochs=1)
    state = train.train_and_evaluate(
        config, str(tmp_path), jax.devices()[:1], train.Watch((), hang_minutes=7)
    )
    steps, actions = int(state.step), 2
    assert heard[:2] == [7, '__enter__'] and heard[-1] == '__exit__'
    read = 1
    assert heard.count('alive') == read + steps * (actions + 1) + actions


def test_the_watchdog_looks_while_the_dataset_is_read(tmp_path, monkeypatch):
    """From a disk that stands still nothing else would wake it."""
    entered, seen = [], []
    enter = watchdog.Watchdog.__enter__
    monkeypatch.setattr(
        watchdog.Watchdog, '__enter__', lambda dog: entered.append(dog) or enter(dog)
    )

    def read(*_):
        seen.extend(entered)
        raise UserError('The dataset cannot be read.')

    monkeypatch.setattr(Experiment, 'from_config', read)
    with pytest.raises(UserError, match='cannot be read'):
        train.train_and_evaluate(
            small_config(), str(tmp_path), watch=train.Watch((), hang_minutes=7)
        )
    assert len(seen) == 1


def test_a_watchdog_that_hears_of_life_does_nothing(monkeypatch):
    """It begins anew at each sign, but not at each of many; one of 0 minutes sleeps."""
    armed, now = [], [100.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(
        watchdog.faulthandler,
        'dump_traceback_later',
        lambda seconds, exit, file: armed.append((now[0], seconds, exit)),
    )
    monkeypatch.setattr(
        watchdog.faulthandler, 'cancel_dump_traceback_later', lambda: armed.append('off')
    )
    with watchdog.Watchdog(2) as dog:
        for now[0] in (100.5, 101.5, 101.75, 102.5):
            dog.alive()
    assert armed == [(100.0, 120, True), (101.5, 120, True), (102.5, 120, True), 'off']
    with watchdog.Watchdog(0) as dog:
        dog.alive()
    assert len(armed) == 4


@pytest.mark.parametrize('minutes', [-1.0, 1e9, np.inf, np.nan])
def test_minutes_that_no_clock_counts(minutes):
    with pytest.raises(
        UserError, match=f'hang_minutes is {minutes}; it must be between 0 and 1e.06'
    ):
        watchdog.Watchdog(minutes)
