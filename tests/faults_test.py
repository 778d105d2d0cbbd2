"""What goes wrong around a run: each fault that the campaign found, and a short campaign."""

import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pytest
from faults import campaign, kinds, life
from helpers import ROOT

from sam_jax import checkpoint, distributed, errors, periodic, run_log, step_log, trackers, train
from sam_jax.checkpoint import Checkpoints
from sam_jax.cli import commands
from sam_jax.errors import UserError


@pytest.fixture
def small_files():
    """Files may have no more than 2,000 bytes, as with a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Checkpoints.

WEIGHTS = {'w': np.random.RandomState(0).standard_normal((64, 64)).astype(np.float32)}


def _checkpoints(folder):
    return Checkpoints(str(folder / 'checkpoints'))


@pytest.mark.parametrize('key,value', [('wall_time', 2.5), ('data', 'x'), ('checksum', 1)])
def test_meta_that_was_changed_is_damage(tmp_path, key, value):
    """It would be taken for another run's, and the run refused."""
    checkpoints = _checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, WEIGHTS, {'wall_time': 1.5, 'data': ''})
        checkpoints.wait()
    checkpoints.close()
    (path,) = (
        p
        for p in (tmp_path / 'checkpoints' / '2').rglob('*')
        if p.is_file() and b'checksums' in p.read_bytes()
    )
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    again = _checkpoints(tmp_path)
    assert again.read_meta(2) is None and again.read_meta(1)['wall_time'] == 1.5
    assert again.restore_newest(WEIGHTS)[0] == 1
    again.close()


def test_a_checkpoint_that_cannot_be_written(tmp_path, request):
    checkpoints = _checkpoints(tmp_path)
    checkpoints.save(1, WEIGHTS, {})
    checkpoints.wait()
    request.getfixturevalue('small_files')
    with pytest.raises(UserError, match=r'checkpoints: File too large\.$'):
        checkpoints.save(2, WEIGHTS, {})
        checkpoints.wait()
    checkpoints.close()  # says it once
    again = _checkpoints(tmp_path)
    step, state, _ = again.restore_newest(WEIGHTS)
    assert step == 1
    np.testing.assert_array_equal(state['w'], WEIGHTS['w'])
    again.close()


def test_threads_of_a_save_that_wait_for_ever():
    """They kept a process that had said why it ends."""
    assert checkpoint.threads_end(60), 'those of the tests before'
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name='async_save')
    thread.start()
    assert not checkpoint.threads_end(0.01)
    release.set()
    assert checkpoint.threads_end(5)


@pytest.mark.parametrize(
    'error',
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError('unable to start watchdog thread'),
    ],
)
def test_a_checkpoint_is_not_damaged_because_memory_is_used_up(tmp_path, monkeypatch, error):
    """It was set aside, and an older one was used."""

    def read(step):
        raise error

    checkpoints = _checkpoints(tmp_path)
    checkpoints.save(1, WEIGHTS, {})
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, 'read', read)
        with pytest.raises(type(error)):
            checkpoints.restore_newest(WEIGHTS)
    assert errors.told(error) == 'The memory of this machine is used up.'
    assert checkpoints.restore_newest(WEIGHTS)[0] == 1
    checkpoints.close()


# Files of a run.


def _metrics(path):
    """A file of two steps, and the mark that a checkpoint of the second has of it."""
    file = run_log.MetricsFile(str(path), 0)
    for step in (1, 2):
        file.write(step, {'train/loss': step / 4})
    mark = file.mark
    file.write(3, {'train/loss': 0.75})
    file.close()
    return mark


DAMAGES = {
    'a digit': (lambda text: text.replace('0.25', '0.35'), [1, 2]),
    'a line that is gone': (lambda text: ''.join(text.splitlines(True)[1:]), [2]),
    'no object': (lambda text: '7\n' + ''.join(text.splitlines(True)[1:]), [2]),
    'another step': (lambda text: text.replace('"step": 1', '"step": "1"'), [2]),
    'zeros': (lambda text: '\0' * 30 + text[30:], [2]),
    'no text': (lambda text: '\udcff' + text[1:], [2]),
    'nothing': (lambda text: '', []),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_metrics_file_is_named_and_kept(tmp_path, caplog, damage):
    path, (change, left) = tmp_path / 'metrics.jsonl', DAMAGES[damage]
    mark = _metrics(path)
    before = change(path.read_text())
    path.write_text(before, errors='surrogateescape')
    assert [line['step'] for line in run_log.read_lines(path)] == [*left, *([3] if before else [])]
    with caplog.at_level(logging.WARNING, 'sam_jax'):
        run_log.MetricsFile(str(path), 2, mark).close()
    (said,) = caplog.messages
    assert 'metrics.jsonl is damaged: up to step 2' in said and '\n' not in said
    assert [line['step'] for line in run_log.read_lines(path)] == left
    kept = tmp_path / 'metrics.jsonl.damaged'
    assert kept.read_text(errors='surrogateescape') == before


def test_a_whole_metrics_file_is_silent(tmp_path, caplog):
    path = tmp_path / 'metrics.jsonl'
    mark = _metrics(path)
    for given in (mark, None):  # a checkpoint of before has none
        file = run_log.MetricsFile(str(path), 2, given)
        assert file.mark == mark
        file.close()
    assert not caplog.messages and os.listdir(tmp_path) == ['metrics.jsonl']


def test_files_that_cannot_be_written(tmp_path, small_files):
    path = str(tmp_path / 'config.json')
    run_log.write_json(path, {'a': 1})
    with pytest.raises(UserError, match=r'config.json cannot be written: File too large\.'):
        run_log.write_json(path, {'a': 'x' * 3000})
    assert run_log.read_json(path) == {'a': 1}
    file = run_log.MetricsFile(str(tmp_path / 'metrics.jsonl'), 0)
    with pytest.raises(UserError, match=r'metrics.jsonl cannot be written: File too large\.'):
        file.write(1, {'x' * 3000: 1.0})
    file.close()


def test_a_damaged_result_is_made_anew(tmp_path, caplog):
    path = tmp_path / 'result.json'
    path.write_text('{"step": 2')
    with pytest.raises(UserError, match=r'result.json is damaged: Expecting'):
        run_log.read_json(str(path))
    with caplog.at_level(logging.WARNING, 'sam_jax'):
        assert train._result(str(path)) is None
    assert 'It is written anew.' in caplog.text


def test_tensorboard_that_cannot_write_ends_itself_alone(tmp_path, caplog, monkeypatch):
    class Full:
        def scalars(self, step, scalars):
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(run_log, 'TensorBoard', lambda workdir: Full())
    (tracker,) = trackers.create(['tensorboard'], str(tmp_path))
    with caplog.at_level(logging.WARNING, 'sam_jax'):
        tracker.scalars(1, {'a': 1.0})
        tracker.scalars(2, {'a': 1.0})
        tracker.close()
    assert len(caplog.messages) == 1 and 'the run goes on' in caplog.text


def test_no_duration_is_of_a_clock_that_can_jump():
    """A run whose clock is set back would not save for so long."""
    for module in (periodic, step_log, train):
        assert 'time.time(' not in (ROOT / 'sam_jax' / module.__file__).read_text()


# What is said.


def _raised_at(cause):
    """As JAX does where a backend cannot be made."""
    try:
        try:
            raise cause
        except BaseException as e:
            raise RuntimeError('Unable to initialize backend') from e
    except RuntimeError as e:
        return e


@pytest.mark.parametrize(
    'error,said',
    [
        (UserError('rho is 3.'), 'rho is 3.'),
        (OSError(28, 'No space left on device', 'a/b'), 'a/b: No space left on device.'),
        (MemoryError(), 'The memory of this machine is used up.'),
        (_raised_at(MemoryError()), 'The memory of this machine is used up.'),
        (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'), 'The memory is used up'),
        (jax.errors.JaxRuntimeError('UNAVAILABLE: gone'), 'Another process of the run is gone'),
        (jax.errors.JaxRuntimeError('INTERNAL: x'), None),
        (OSError('without a number'), None),
        (KeyError('x'), None),
    ],
)
def test_what_a_person_can_mend_is_told(error, said):
    found = errors.told(error)
    assert found == said if said is None else found.startswith(said)


@pytest.mark.parametrize(
    'error,status,said',
    [
        (KeyboardInterrupt(), 130, 'Interrupted.\n'),
        (OSError(30, 'Read-only file system', 'x'), 2, 'error: x: Read-only file system.\n'),
    ],
)
def test_how_a_command_ends(error, status, said, capsys):
    def fail():
        raise error

    handlers = logging.root.handlers[:]
    try:
        with pytest.raises(SystemExit) as left:
            commands._call(fail, False, ['x'])
    finally:
        logging.root.handlers[:] = handlers
        sys.unraisablehook = sys.__unraisablehook__
    assert left.value.code == status and capsys.readouterr().err == said


@pytest.mark.parametrize('together', [False, True])
def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch, together):
    ended = []
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: together)
    monkeypatch.setattr(distributed, '_LAST_WORDS', 0)
    monkeypatch.setattr(os, '_exit', ended.append)
    with pytest.raises(SystemExit):
        commands.leave('Bad.')
    with pytest.raises(SystemExit):  # all of them save and end together
        commands.leave('Stopped.', commands.EXIT_PREEMPTED)
    assert ended == [2] * together


# The campaign.


def test_damage_is_what_it_says(tmp_path):
    made = types.SimpleNamespace(rng=random.Random(0), disk=str(tmp_path))
    content = bytes(range(1, 101))
    for how in ('truncated', 'zeroed', 'a bit flipped', 'removed'):
        path = tmp_path / 'file'
        path.write_bytes(content)
        assert kinds._damage(made, str(path), how).startswith(f'file {how}')
        found = path.read_bytes() if path.exists() else None
        assert found != content
        if how == 'a bit flipped':
            different = np.frombuffer(found, np.uint8) ^ np.frombuffer(content, np.uint8)
            assert sum(int(x).bit_count() for x in different) == 1


def _ended(text='', status=0, faults=(), launcher=False):
    process = types.SimpleNamespace(text=text, status=status)
    made = types.SimpleNamespace(processes=[process], text=text, killed_by_launcher=launcher)
    return campaign._judge(made, faults)


def test_the_judge():
    assert not _ended('Finished.\n')
    assert 'Traceback' in _ended('Traceback (most recent call last):\n')
    assert 'status -11' in _ended(status=-signal.SIGSEGV)
    killed = life.Fault('SIGKILL of all processes', 'at step 3', {-9})
    assert not _ended(status=-9, faults=[killed])
    assert 'status -9' in _ended(status=-9, faults=[life.Fault('', '', {-9})]), 'it did not come'
    memory = life.Fault('out of memory', 'at step 3', {-6})
    assert not _ended('Fatal Python error: Aborted', -6, [memory])
    assert memory.outcome == campaign.ABORTED
    assert 'Fatal' in _ended('Fatal Python error: Aborted', -6)
    full = life.Fault('full disk', 'at step 3', {2})
    assert '0 lines' in _ended(status=2, faults=[full])
    assert not _ended('error: Full.\n', 2, [full]) and full.said == 'error: Full.'
    assert full.outcome == campaign.REFUSED
    assert not _ended('Timeout (0:01:15)!\nThread 0x1', 1, [memory])
    assert memory.outcome == campaign.WATCHED
    assert 'status 1' in _ended('Timeout', 1, [memory])


def test_the_table():
    faults = [
        {'kind': 'full disk', 'outcome': campaign.REFUSED},
        {'kind': 'full disk', 'outcome': f'{campaign.FAILED}: it hung'},
        {'kind': 'stray files', 'outcome': campaign.MISSED},
    ]
    *_, row, total = campaign.table(faults).splitlines()
    assert row == '| full disk | 2 | 0 | 1 | 0 | 0 | 0 | 1 |' and total.startswith('| all | 2 |')


@pytest.mark.slow
def test_a_short_campaign(tmp_path):
    done = subprocess.run(
        [sys.executable, 'scripts/faults.py', f'--out={tmp_path}', '--lives=6', '--minutes=20'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {fault['life'] for fault in campaign.read(str(tmp_path))} == set(range(6))
