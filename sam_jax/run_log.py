"""What a run leaves behind but for checkpoints: TensorBoard, metrics.jsonl, JSON files."""

import contextlib
import json
import logging
import math
import os
import time
import zlib
from typing import Any

import jax
import numpy as np

from sam_jax.errors import UserError, first_line, of_system

_log = logging.getLogger(__name__)


def write_json(path: str, content: Any) -> None:
    """Writes a JSON file so that it is there whole or not at all; what is not finite as text."""
    text = json.dumps(_jsonable(content), indent=2, sort_keys=True, allow_nan=False)
    _replace(path, f'{text}\n'.encode())


def _replace(path, content):
    """Puts bytes in the place of a file, whole or not at all; UserError if they cannot be there."""
    try:
        with open(path + '.part', 'wb') as f:
            f.write(content)
        os.replace(path + '.part', path)
    except OSError as e:
        raise UserError(f'{path} cannot be written: {of_system(e)}.') from e


def result_path(workdir: str, until_epoch: int = 0) -> str:
    """Returns the file of a run's result: at its end, or where `--until_epoch` stopped it."""
    name = f'result_at_{until_epoch}.json' if until_epoch else 'result.json'
    return os.path.join(workdir, name)


def read_json(path: str) -> Any:
    """Returns the content of a JSON file, or None if there is none.

    Raises:
      UserError: it is damaged.
    """
    if not os.path.exists(path):
        return None
    try:
        with open(path) as f:
            return json.load(f)
    except ValueError as e:
        raise UserError(f'{path} is damaged: {first_line(e)}.') from e


def read_lines(path: str) -> list[dict[str, Any]]:
    """Returns what a metrics.jsonl holds; [] if there is none.

    A line that is not yet whole, or is damaged, is left out.
    """
    if not os.path.exists(path):
        return []
    with open(path, 'rb') as f:
        return [content for line in f if line.endswith(b'}\n') and (content := _content(line))]


def _content(line):
    """What a line of metrics.jsonl holds; None if it is damaged."""
    try:
        content = json.loads(line)
        return content if isinstance(content['step'], int) else None
    except (ValueError, KeyError, TypeError):  # of zeros, for instance, or the line of a kill
        return None


def parameter_overview(params: Any) -> str:
    """Returns clu's table of names, shapes and sizes; without clu only the number of params."""
    try:
        from clu import parameter_overview as clu_overview
    except ImportError:
        return f'{sum(x.size for x in jax.tree.leaves(params))} parameters.'
    return clu_overview.get_parameter_overview(params, include_stats=False)


def _jsonable(value):
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """metrics.jsonl: one JSON object a line, {'step', metric: value, ..., 'time'}, in step order.

    Non-finite values are written as the strings 'nan', 'inf' and '-inf'. Each line is handed to the
    system at once, so a killed process loses none that came before its last checkpoint.
    """

    def __init__(self, path, resume_step, mark=None):
        """Opens the file; what lies behind `resume_step` (a killed run's lines) is dropped.

        If what is left is not what `mark`, a checkpoint's, tells of, the log says so, and the file
        as it was is kept beside.
        """
        self._path, content = path, b''
        if resume_step:
            found = _read(path)
            content = b''.join(
                line + b'\n'
                for line in found.splitlines()
                if (said := _content(line)) and said['step'] <= resume_step
            )
            if mark and mark != _mark(content):
                _log.warning(
                    '%s is damaged: up to step %d it is not what the run has written. It is kept '
                    'as metrics.jsonl.damaged, and the run goes on with the lines that are whole.',
                    path,
                    resume_step,
                )
                _replace(path + '.damaged', found)
        _replace(path, content)
        self._mark = _mark(content)
        self._file = open(path, 'ab')

    @property
    def mark(self) -> dict[str, int]:
        """Length and checksum of what is written, for a checkpoint to know it by."""
        return dict(self._mark)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        content = {
            'step': step,
            **{k: _jsonable(v) for k, v in scalars.items()},
            'time': time.time(),
        }
        line = (json.dumps(content) + '\n').encode()
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as e:
            with contextlib.suppress(OSError):  # what could not be written is tried once more
                self._file.close()
            raise UserError(f'{self._path} cannot be written: {of_system(e)}.') from e
        self._mark = _mark(line, self._mark)

    def close(self) -> None:
        self._file.close()


def _mark(content, before=None):
    before = before or {'bytes': 0, 'crc32': 0}
    return {'bytes': before['bytes'] + len(content), 'crc32': zlib.crc32(content, before['crc32'])}


def _read(path):
    if not os.path.exists(path):
        return b''
    with open(path, 'rb') as f:
        return f.read()


class TensorBoard:
    """clu's summary writer, in the background; nothing, with one line, where TensorFlow is not."""

    def __init__(self, workdir):
        self._writer = None
        try:
            from clu import metric_writers
        except ImportError as e:
            _log.warning('No TensorBoard files: %s.', e)
            return
        self._writer = metric_writers.AsyncWriter(metric_writers.SummaryWriter(workdir))

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        if self._writer:
            self._writer.write_scalars(step, scalars)

    def start(self, hparams: dict[str, int | float | str], images: dict[str, np.ndarray]) -> None:
        """images: {name: float array (N, H, W, C) in [0, 1]}."""
        if self._writer:
            self._writer.write_hparams(hparams)
            self._writer.write_images(0, images)

    def close(self) -> None:
        if self._writer:
            self._writer.close()


class RunWriter:
    """metrics.jsonl and trackers of one run; on the main process only, elsewhere it writes nothing.

    `trackers` are those of `sam_jax.trackers`; by default TensorBoard.
    """

    def __init__(self, workdir, active, resume_step=0, trackers=None, mark=None):
        self._metrics, self._trackers = None, []
        if active:
            self._trackers = [TensorBoard(workdir)] if trackers is None else trackers
            path = os.path.join(workdir, 'metrics.jsonl')
            try:
                self._metrics = MetricsFile(path, resume_step, mark)
            except BaseException:
                self.close()  # the trackers, which are open
                raise

    @property
    def mark(self) -> dict[str, int] | None:
        """What a checkpoint knows metrics.jsonl by."""
        return self._metrics and self._metrics.mark

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        if self._metrics:
            self._metrics.write(step, scalars)
        for tracker in self._trackers:
            tracker.scalars(step, scalars)

    def start(self, hparams: dict[str, int | float | str], images: dict[str, np.ndarray]) -> None:
        """At the start of a run: its settings, and training images {name: (N, H, W, C)}."""
        for tracker in self._trackers:
            tracker.start(hparams, images)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
        if self._metrics:
            self._metrics.close()
