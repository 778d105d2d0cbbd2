"""What a run leaves behind: metrics.jsonl, TensorBoard events, JSON files, progress."""

import contextlib
import json
import logging
import os
import pty
import re
import sys
import termios
import threading

import numpy as np
import pytest

from sam_jax import run_log
from sam_jax.progress import Progress


def _lines(path):
    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# metrics.jsonl.


def _written(path, steps, resume_step=0):
    file = run_log.MetricsFile(str(path), resume_step)
    for step in steps:
        file.write(step, {'train/loss': step / 2, 'epoch': 1.0})
    file.close()


def test_lines(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    _written(path, [1, 2])
    lines = _lines(path)
    assert [line.pop('time') > 1e9 for line in lines] == [True, True]
    assert lines == [
        {'step': 1, 'train/loss': 0.5, 'epoch': 1.0},
        {'step': 2, 'train/loss': 1.0, 'epoch': 1.0},
    ]


def test_each_line_is_on_disk_at_once(tmp_path):
    file = run_log.MetricsFile(str(tmp_path / 'm'), 0)
    file.write(1, {'a': 1.0})
    assert [line['a'] for line in _lines(tmp_path / 'm')] == [1.0]
    file.close()


@pytest.mark.parametrize(
    'value,written',
    [
        (float('nan'), 'nan'),
        (float('inf'), 'inf'),
        (float('-inf'), '-inf'),
        (0.1, 0.1),
        (3, 3),
        (np.float64('nan'), 'nan'),
    ],
)
def test_non_finite_values_are_strings(tmp_path, value, written):
    file = run_log.MetricsFile(str(tmp_path / 'm'), 0)
    file.write(1, {'a': value})
    file.close()
    assert _lines(tmp_path / 'm')[0]['a'] == written


@pytest.mark.parametrize('tail', ['', '{"step": 6', '{"step": 4, "train/lo', '{', '\0\0\0'])
@pytest.mark.parametrize('resume_step', [3, 5, 9])
def test_resume_drops_what_was_behind(tmp_path, resume_step, tail):
    path = tmp_path / 'metrics.jsonl'
    _written(path, range(1, 6))
    before = path.read_text().splitlines(keepends=True)
    path.write_text(path.read_text() + tail)  # the process was killed while it wrote
    _written(path, [resume_step + 1], resume_step)
    after = path.read_text().splitlines(keepends=True)
    assert after[:-1] == before[:resume_step]
    assert _lines(path)[-1]['step'] == resume_step + 1
    assert os.listdir(tmp_path) == ['metrics.jsonl']


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    _written(path, [1, 2])
    _written(path, [1])
    assert [line['step'] for line in _lines(path)] == [1]


def test_resume_without_a_file(tmp_path):
    _written(tmp_path / 'm', [8], resume_step=7)
    assert [line['step'] for line in _lines(tmp_path / 'm')] == [8]


# JSON files.


def test_json_file(tmp_path):
    path = str(tmp_path / 'result.json')
    assert run_log.read_json(path) is None
    content = {'b': [1, 2.5], 'a': {'x': None}}
    run_log.write_json(path, content)
    assert run_log.read_json(path) == content
    with pytest.raises(TypeError):
        run_log.write_json(path, {'a': object()})
    assert run_log.read_json(path) == content  # whole, or as it was


# TensorBoard.


HPARAMS = {'sam.rho': 0.05, 'model.name': 'wrn10_1', 'seed': 3, 'data.validation': False}
IMAGES = np.random.RandomState(0).uniform(size=(3, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope='module')
def events(tmp_path_factory):
    """The events of a run that was resumed once, by tag."""
    import tensorflow as tf

    place = tmp_path_factory.mktemp('run')
    for first_step, steps in [(0, [1, 2]), (2, [3])]:
        writer = run_log.RunWriter(str(place), True, first_step)
        if not first_step:
            writer.start(HPARAMS, {'train_images': IMAGES})
        for step in steps:
            writer.scalars(step, {'train/loss': step / 4, 'test/error_rate': 0.5})
        writer.close()
    found = {}
    for path in sorted(place.glob('events.out.tfevents.*')):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value))
    return place, found


def test_tensorboard_scalars(events):
    import tensorflow as tf

    place, found = events
    for tag, expected in [('train/loss', [0.25, 0.5, 0.75]), ('test/error_rate', [0.5] * 3)]:
        assert [step for step, _ in found[tag]] == [1, 2, 3]
        values = [float(tf.make_ndarray(value.tensor)) for _, value in found[tag]]
        assert values == expected
    assert [line['train/loss'] for line in _lines(place / 'metrics.jsonl')] == [0.25, 0.5, 0.75]


def test_tensorboard_images(events):
    import tensorflow as tf

    ((step, value),) = events[1]['train_images']
    assert step == 0
    width, height, *pngs = tf.make_ndarray(value.tensor)
    assert (int(width), int(height), len(pngs)) == (8, 8, 3)
    for png, image in zip(pngs, IMAGES):
        np.testing.assert_allclose(tf.io.decode_png(png) / 255, image, atol=1 / 255)


def test_tensorboard_hparams(events):
    from tensorboard.plugins.hparams import plugin_data_pb2

    (value,) = (
        value for tag, values in events[1].items() for _, value in values if 'session_start' in tag
    )
    content = plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
    hparams = {
        name: getattr(x, x.WhichOneof('kind'))
        for name, x in content.session_start_info.hparams.items()
    }
    assert hparams == HPARAMS


def test_tensorboard_shows_all_runs_of_a_sweep_with_their_errors(tmp_path):
    """What its HParams tab asks its own reader of the files: a row a run, a column a metric."""
    from tensorboard import context
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    errors = {'rho=0.05': 0.25, 'rho=0.1': 0.125}
    for name, error in errors.items():
        writer = run_log.RunWriter(str(tmp_path / name), True)
        writer.start({**HPARAMS, 'sam.rho': float(name[4:])}, {'train_images': IMAGES})
        for step, value in ((1, 0.5), (2, error)):
            writer.scalars(step, {'test/error_rate': value, 'validation/error_rate': value})
        writer.close()

    files = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    files.Reload()
    provider = data_provider.MultiplexerDataProvider(files, str(tmp_path))
    reader = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = context.RequestContext()
    tab = reader.experiment_from_metadata(
        request, '', True, reader.hparams_metadata(request, ''), []
    )
    assert 'sam.rho' in {column.name for column in tab.hparam_infos}
    columns = {column.name.tag for column in tab.metric_infos}
    assert {'test/error_rate', 'validation/error_rate'} <= columns
    shown = list_session_groups.Handler(
        request,
        reader,
        '',
        api_pb2.ListSessionGroupsRequest(
            allowed_statuses=[api_pb2.STATUS_UNKNOWN],
            start_index=0,
            slice_size=10,
            col_params=[api_pb2.ColParams(metric=metric.name) for metric in tab.metric_infos],
        ),
    ).run()
    assert {
        session.name: {
            value.name.tag: value.value
            for value in session.metric_values
            if value.name.tag == 'test/error_rate'
        }
        for group in shown.session_groups
        for session in group.sessions
    } == {name: {'test/error_rate': error} for name, error in errors.items()}
    assert {group.hparams['sam.rho'].number_value for group in shown.session_groups} == {0.05, 0.1}


def test_without_tensorflow_one_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'clu', None)
    with caplog.at_level(logging.INFO, 'sam_jax'):
        writer = run_log.RunWriter(str(tmp_path), True)
        writer.start(HPARAMS, {'train_images': IMAGES})
        writer.scalars(1, {'a': 1.0})
        writer.close()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and 'No TensorBoard files' in record.getMessage()
    assert os.listdir(tmp_path) == ['metrics.jsonl']
    assert _lines(tmp_path / 'metrics.jsonl')[0]['a'] == 1.0


def test_only_the_main_process_writes(tmp_path):
    writer = run_log.RunWriter(str(tmp_path), False)
    writer.start(HPARAMS, {'train_images': IMAGES})
    writer.scalars(1, {'a': 1.0})
    writer.close()
    assert not os.listdir(tmp_path)


# Progress.


class _Clock:
    """Stands in for time.perf_counter."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(run_log.time, 'perf_counter', lambda: self.now)


def _report(progress, step, loss=0.12345, error_rate=0.25):
    progress.line(step, loss, error_rate, progress.images_per_second(step))


def test_plain_lines(monkeypatch, caplog):
    clock = _Clock(monkeypatch)
    with caplog.at_level(logging.INFO, 'sam_jax'):
        progress = Progress(0, 100, 64, True)
        _report(progress, 1)  # compilation: no speed is known
        progress.start_clock(1)
        clock.now += 2.0
        _report(progress, 11)
        progress.say('Evaluated.')
        clock.now += 1000.0
        progress.start_clock(11)
        clock.now += 1.0
        _report(progress, 21)
        progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        'step 1/100: loss 0.1235, error 25.00 %, 0 images/s, ETA unknown',
        'step 11/100: loss 0.1235, error 25.00 %, 320 images/s, ETA 18 s',
        'Evaluated.',
        'step 21/100: loss 0.1235, error 25.00 %, 640 images/s, ETA 8 s',
    ]
    # 20 steps of 64 images in the 3 s that were training.
    assert progress.overall_speed() == pytest.approx(20 * 64 / 3)


def test_speed_of_a_resumed_run(monkeypatch):
    clock = _Clock(monkeypatch)
    progress = Progress(50, 100, 10, True)
    assert progress.overall_speed() == 0.0
    progress.start_clock(51)
    clock.now += 2.0
    assert progress.images_per_second(55) == pytest.approx(20.0)
    assert progress.images_per_second(55) == 0.0  # nothing since
    progress.close()


def test_other_processes_are_silent(caplog, capfd):
    with caplog.at_level(logging.INFO, 'sam_jax'):
        progress = Progress(0, 100, 64, False)
        progress.start_clock(1)
        _report(progress, 10)
        progress.say('Nothing.')
        progress.close()
    assert not caplog.records
    assert capfd.readouterr() == ('', '')


class _Terminal:
    """A terminal: `file` to write to, and, when that is closed, `text`, what was shown."""

    def __init__(self):
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 120))
        self._shown = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.file = open(theirs, 'w')

    def _read(self):
        try:
            while chunk := os.read(self._ours, 4096):
                self._shown.append(chunk)
        except OSError:  # the other end is closed
            pass

    def close(self):
        self.file.close()
        self._reader.join()
        os.close(self._ours)

    @property
    def text(self):
        return b''.join(self._shown).decode()


def test_other_processes_are_silent_on_a_terminal(monkeypatch):
    with contextlib.closing(_Terminal()) as terminal:
        monkeypatch.setattr(sys, 'stderr', terminal.file)
        progress = Progress(0, 100, 64, False)
        _report(progress, 10)
        progress.close()
        monkeypatch.undo()
    assert not terminal.text


def test_a_bar_on_a_terminal(monkeypatch, caplog):
    with contextlib.closing(_Terminal()) as terminal, caplog.at_level(logging.INFO, 'sam_jax'):
        monkeypatch.setattr(sys, 'stderr', terminal.file)
        progress = Progress(10, 100, 64, True)
        progress.say('Resuming at step 10.')
        for step in (20, 60, 100):
            _report(progress, step, loss=step / 1000)
            progress._bar.refresh()
        progress.close()
        monkeypatch.undo()
    assert not caplog.records  # the bar instead of the lines
    assert re.search(r'Resuming at step 10\.\r?\n', terminal.text)
    assert ' 10/100 ' in terminal.text  # where the run goes on
    for step, loss in [(20, '0.0200'), (60, '0.0600'), (100, '0.1000')]:
        # 20%|##   | 20/100 [00:00<00:04, 20.00step/s, loss ..., error ..., ... images/s]
        assert re.search(
            rf'{step}%\|[^|]*\| {step}/100 \[\d\d:\d\d<[\d:?]+,[^\r\n]*'
            rf'loss {loss}, error 25\.00 %, \d+ images/s',
            terminal.text,
        )


def test_a_last_line_that_only_lacks_its_end(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    _written(path, [1, 2])
    path.write_text(path.read_text().rstrip('\n'))
    _written(path, [3], resume_step=2)
    assert [line['step'] for line in _lines(path)] == [1, 2, 3]
