"""Schedules of the learning rate and of rho: functions step -> value, finite at every step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# Step -> value.
Schedule = Callable[[ArrayLike], jax.Array]

# The original's exponential schedule ends at 1.2 % of the start.
EXPONENTIAL_END = 0.012


def _share(step, steps):
    # Of an integer step JAX divides in float32, even where there is float64.
    return jnp.asarray(step, float) / steps


def constant(base: float | jax.Array, total_steps: float) -> Schedule:
    """value(t) = base."""
    del total_steps
    return lambda step: jnp.asarray(base, dtype=float)


def cosine(base: float | jax.Array, total_steps: float) -> Schedule:
    """value(t) = base * (1 + cos(pi * t / total_steps)) / 2, and 0 from total_steps on."""
    return lambda step: (
        base * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(_share(step, total_steps), 1.0)))
    )


def exponential(base: float | jax.Array, total_steps: float) -> Schedule:
    """value(t) = base * 0.012^(t / total_steps): 1.2 % of the start at the end."""
    return lambda step: base * EXPONENTIAL_END ** _share(step, total_steps)


SCHEDULES = {'constant': constant, 'cosine': cosine, 'exponential': exponential}


def create(
    name: str, base: float | jax.Array, total_steps: float, warmup_steps: float = 0
) -> Schedule:
    """Returns the schedule `name` times a linear warm-up min(t / warmup_steps, 1).

    Args:
      name: one of SCHEDULES.
      base: value at step 0 without warm-up; a float or a traced scalar.
      total_steps: steps in the run, of which the warm-up is a part.
      warmup_steps: 0 for none.

    Returns:
      A function of the step (0-based, traced or not) that gives a scalar.
    """
    schedule = SCHEDULES[name](base, total_steps)
    if not warmup_steps:
        return schedule
    return lambda step: schedule(step) * jnp.minimum(_share(step, warmup_steps), 1.0)


def of_run(
    config: Any, hparams: Any, step: ArrayLike, steps_per_epoch: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (learning rate, rho) at a step; `hparams` have the values that are scheduled."""
    total_steps = config.total_epochs * steps_per_epoch

    def at(settings, base, name):
        return create(name, base, total_steps, settings.warmup_epochs * steps_per_epoch)(step)

    learning_rate = at(config.optimizer, hparams.learning_rate, config.optimizer.schedule)
    if config.sam.schedule == 'learning_rate':
        peak = hparams.learning_rate
        share = jnp.where(peak > 0, learning_rate / jnp.where(peak > 0, peak, 1.0), 0.0)
        return learning_rate, at(config.sam, 1.0, 'constant') * (
            config.sam.rho_min + (hparams.rho - config.sam.rho_min) * share
        )
    return learning_rate, at(config.sam, hparams.rho, config.sam.schedule)
