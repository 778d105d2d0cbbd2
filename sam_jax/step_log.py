"""Metrics of the steps on their way from the device: late, checked, and whether SAM is on."""

import collections
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from sam_jax import sharpness
from sam_jax.errors import NOT_FINITE, UserError
from sam_jax.replicas import IN_FLIGHT


class StepLog:
    """Metrics on their way from the device: fetched late, so that the device never waits."""

    def __init__(self, config, writer, progress, steps_per_epoch, first_step):
        self._config, self._writer, self._progress = config, writer, progress
        self._steps_per_epoch, self._first_step = steps_per_epoch, first_step
        self._began = time.monotonic()
        self._waiting = collections.deque()
        # Of a method that begins late it may not have been seen before.
        self._checked = first_step > 0 and not sharpness.METHODS[config.sam.method].late
        self._bad_step = 0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the step just dispatched; handles those that are ready."""
        self._waiting.append((step, metrics))
        while len(self._waiting) > IN_FLIGHT:
            self._take()

    def flush(self, refuse_bad: bool = False) -> None:
        """Waits for all steps; with refuse_bad raises if any of them was not finite."""
        while self._waiting:
            self._take()
        if refuse_bad:
            refuse_bad_step(self._bad_step)

    def _take(self):
        step, metrics = self._waiting.popleft()
        self._bad_step = jax.block_until_ready(metrics)['bad_step']
        due = step % self._config.log_every_steps == 0
        if not (due or step == self._first_step + 1):
            return
        metrics = {name: x.item() for name, x in jax.device_get(metrics).items()}
        refuse_bad_step(metrics.pop('bad_step'))
        if step == self._first_step + 1:
            self._progress.say(
                f'The first step was done after {time.monotonic() - self._began:.1f} s.'
            )
        if not self._checked:
            self._checked = sharpness_check(self._config, metrics, self._progress.say)
        if not due:
            self._progress.start_clock(step)  # the first step includes compilation
            return
        input_wait = self._progress.input_wait()  # before the clock starts anew
        speed = self._progress.images_per_second(step)
        metrics['epoch'] = step / self._steps_per_epoch
        self._writer.scalars(
            step, {**metrics, 'perf/images_per_second': speed, 'perf/input_wait': input_wait}
        )
        self._progress.line(step, metrics['train/loss'], metrics['train/error_rate'], speed)


def refuse_bad_step(bad_step: int | jax.Array) -> None:
    """Raises UserError if a step (its number, or 0) was not finite."""
    if bad_step:
        raise UserError(
            f'The loss or the gradient {NOT_FINITE} {int(bad_step)}; the run stops. '
            'Lower optimizer.learning_rate or sam.rho, or set optimizer.clip_norm.'
        )


def sharpness_check(config: Any, metrics: dict[str, float], say: Callable[[str], None]) -> bool:
    """Says whether the sharpness-aware gradient is really on; a warning where it is not.

    Args:
      config: the run's config.
      metrics: of the first step, or, while rho still is 0 in a warm-up, of the first report.
      say: where the line goes.

    Returns:
      Whether the check is done (False: rho warms up, or the method has not begun; ask again).
    """
    method = config.sam.method
    entry = sharpness.METHODS[method]
    if not entry.norm:
        return True
    rho, norm = metrics['train/rho'], metrics['train/perturbation_norm']
    loss, perturbed = metrics['train/loss'], metrics['train/perturbed_loss']
    warms_up = config.sam.warmup_epochs or config.sam.schedule == 'learning_rate'
    if config.sam.rho > 0 and not norm and (warms_up or entry.late):
        return False
    facts = (
        f'perturbation norm {norm:.4g}, rho {rho:.4g}, loss {loss:.4f} -> {perturbed:.4f} at '
        'the perturbed weights'
    )
    climbs = perturbed > loss or entry.late or not entry.uphill
    right_norm = norm > 0
    if config.sam.schedule == 'constant' and not config.sam.warmup_epochs:
        # Of a method that begins late the norm is a mean over steps with and without an ascent.
        if entry.norm == 'rho' and not entry.late:
            right_norm = math.isclose(norm, rho, rel_tol=1e-3)
        elif entry.norm in ('rho', 'at most rho'):
            right_norm = 0 < norm <= rho * (1 + 1e-3)
    if right_norm and climbs:
        say(f'{method} is on: {facts}.')
    else:
        say(f'WARNING: {method} is not doing its work: {facts}.')
    return True
