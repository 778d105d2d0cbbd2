"""What a run leaves behind but for checkpoints: TensorBoard, metrics.jsonl, JSON files."""

import json
import logging
import math
import os
import time
from typing import Any

import jax
import numpy as np

_log = logging.getLogger(__name__)


def write_json(path: str, content: Any) -> None:
    """Writes a JSON file so that it is there whole or not at all; what is not finite as text."""
    with open(path + '.part', 'w') as f:
        json.dump(_jsonable(content), f, indent=2, sort_keys=True, allow_nan=False)
        f.write('\n')
    os.replace(path + '.part', path)


def result_path(workdir: str, until_epoch: int = 0) -> str:
    """Returns the file of a run's result: at its end, or where `--until_epoch` stopped it."""
    name = f'result_at_{until_epoch}.json' if until_epoch else 'result.json'
    return os.path.join(workdir, name)


def read_json(path: str) -> Any:
    """Returns the content of a JSON file, or None if there is none."""
    if not os.path.exists(path):
        return None
    with open(path) as f:
        return json.load(f)


def read_lines(path: str) -> list[dict[str, Any]]:
    """Returns what a metrics.jsonl holds; [] if there is none.

    A line that is not yet whole is left out.
    """
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith('}\n')]


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

    def __init__(self, path, resume_step):
        """Opens the file; what lies behind `resume_step` (a killed run's lines) is dropped."""
        lines = []
        if resume_step and os.path.exists(path):
            with open(path) as f:
                lines = [line for line in f.read().splitlines() if _step_of(line) <= resume_step]
        with open(path + '.part', 'w') as f:
            f.writelines(f'{line}\n' for line in lines)
        os.replace(path + '.part', path)
        self._file = open(path, 'a')

    def write(self, step: int, scalars: dict[str, float]) -> None:
        content = {
            'step': step,
            **{k: _jsonable(v) for k, v in scalars.items()},
            'time': time.time(),
        }
        self._file.write(json.dumps(content) + '\n')
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line):
    try:
        return json.loads(line)['step']
    except json.JSONDecodeError:  # the line during which the process was killed
        return math.inf


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

    def __init__(self, workdir, active, resume_step=0, trackers=None):
        self._metrics, self._trackers = None, []
        if active:
            self._trackers = [TensorBoard(workdir)] if trackers is None else trackers
            self._metrics = MetricsFile(os.path.join(workdir, 'metrics.jsonl'), resume_step)

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
