"""What a run leaves behind but for checkpoints: TensorBoard, metrics.jsonl, JSON; progress."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
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


def read_json(path: str) -> Any:
    """Returns the content of a JSON file, or None if there is none."""
    if not os.path.exists(path):
        return None
    with open(path) as f:
        return json.load(f)


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
                lines = [line for line in f.read().splitlines()
                         if _step_of(line) <= resume_step]
        with open(path + '.part', 'w') as f:
            f.writelines(f'{line}\n' for line in lines)
        os.replace(path + '.part', path)
        self._file = open(path, 'a')

    def write(self, step: int, scalars: dict[str, float]) -> None:
        content = {'step': step, **{k: _jsonable(v) for k, v in scalars.items()},
                   'time': time.time()}
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

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """images: {name: float array (N, H, W, C) in [0, 1]}."""
        if self._writer:
            self._writer.write_images(step, images)

    def hparams(self, hparams: dict[str, int | float | str]) -> None:
        if self._writer:
            self._writer.write_hparams(hparams)

    def close(self) -> None:
        if self._writer:
            self._writer.close()


class RunWriter:
    """Everything above for one run; on the main process only (elsewhere it writes nothing)."""

    def __init__(self, workdir, active, resume_step=0):
        self._tensorboard = None
        if active:
            self._tensorboard = TensorBoard(workdir)
            self._metrics = MetricsFile(os.path.join(workdir, 'metrics.jsonl'), resume_step)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        if self._tensorboard:
            self._metrics.write(step, scalars)
            self._tensorboard.scalars(step, scalars)

    def start(self, hparams: dict[str, int | float | str], images: dict[str, np.ndarray]) -> None:
        """At the start of a run: its settings, and training images {name: (N, H, W, C)}."""
        if self._tensorboard:
            self._tensorboard.hparams(hparams)
            self._tensorboard.images(0, images)

    def close(self) -> None:
        if self._tensorboard:
            self._tensorboard.close()
            self._metrics.close()


class Progress:
    """A bar on a terminal, plain log lines otherwise; on the main process only."""

    def __init__(self, first_step, total_steps, batch_size, active):
        self._total = total_steps
        self._batch_size = batch_size
        self._last = (first_step, None)
        self._images, self._seconds, self._waited = 0, 0.0, 0.0
        self._bar = None
        self._active = active
        if active and sys.stderr.isatty():
            import tqdm
            self._bar = tqdm.tqdm(total=total_steps, initial=first_step, unit='step')

    def start_clock(self, step: int) -> None:
        """From here on time counts as training: after compilation, after an evaluation."""
        self._last, self._waited = (step, time.perf_counter()), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what the loop does only to get its next input."""
        then = time.perf_counter()
        yield
        self._waited += time.perf_counter() - then

    def input_wait(self) -> float:
        """Returns the fraction of the time since the clock was started that waited for input."""
        _, then = self._last
        return 0.0 if then is None else min(self._waited / (time.perf_counter() - then), 1.0)

    def images_per_second(self, step: int) -> float:
        """Returns the speed since the clock was started or this was called, and starts it anew."""
        before, then = self._last
        now = time.perf_counter()
        self._last, self._waited = (step, now), 0.0
        if then is None or step == before:
            return 0.0
        images = (step - before) * self._batch_size
        self._images += images
        self._seconds += now - then
        return images / (now - then)

    def overall_speed(self) -> float:
        """Returns images per second of training, compilation and evaluation left out."""
        return self._images / self._seconds if self._seconds else 0.0

    def line(self, step: int, loss: float, error_rate: float, images_per_second: float) -> None:
        if not self._active:
            return
        eta = (self._total - step) * self._batch_size / max(images_per_second, 1e-9)
        text = f'loss {loss:.4f}, error {100 * error_rate:.2f} %, {images_per_second:.0f} images/s'
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            self._bar.update(step - self._bar.n)
        else:
            eta = f'{eta:.0f} s' if images_per_second else 'unknown'
            _log.info('step %d/%d: %s, ETA %s', step, self._total, text, eta)

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            _log.info('%s', text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Bars:
    """How far a long work is: a bar for each part on a terminal, else a line every ten seconds."""

    def __init__(self):
        self._what, self._bar = None, None
        self._said_at = time.perf_counter()

    def __call__(self, what, done, total):
        if sys.stderr.isatty():
            self._draw(what, done, total)
        elif time.perf_counter() - self._said_at > 10:
            _log.info('%s: %d of %d', what, done, total)
            self._said_at = time.perf_counter()

    def _draw(self, what, done, total):
        import tqdm
        if what != self._what:
            self.close()
            self._what, self._bar = what, tqdm.tqdm(total=total, desc=what)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
