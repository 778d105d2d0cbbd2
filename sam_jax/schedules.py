"""Schedules of the learning rate and of rho: functions step -> value, finite at every step."""

from collections.abc import Callable, Sequence
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


def linear(base: float | jax.Array, total_steps: float, end: float = 0.0) -> Schedule:
    """value(t) = base * (1 - (1 - end) * t / total_steps), and base * end from total_steps on."""
    return lambda step: base * (1.0 - (1.0 - end) * jnp.minimum(_share(step, total_steps), 1.0))


def milestones(
    base: float | jax.Array, total_steps: float, steps: Sequence[float] = (), factor: float = 0.1
) -> Schedule:
    """value(t) = base * factor^(number of `steps` that are at most t)."""
    del total_steps
    return lambda step: (
        base
        * factor
        ** sum(((jnp.asarray(step) >= at).astype(float) for at in steps), jnp.zeros((), float))
    )


SCHEDULES = {
    'constant': constant,
    'cosine': cosine,
    'exponential': exponential,
    'linear': linear,
    'milestones': milestones,
}

# Those that rho may have by itself. Milestones are the learning rate's.
OF_RHO = ('constant', 'cosine', 'exponential', 'linear')


def create(
    name: str,
    base: float | jax.Array,
    total_steps: float,
    warmup_steps: float = 0,
    after_warmup: bool = False,
    **options,
) -> Schedule:
    """Returns the schedule `name` times a linear warm-up min(t / warmup_steps, 1).

    Args:
      name: one of SCHEDULES.
      base: value at step 0 without warm-up; a float or a traced scalar.
      total_steps: steps in the run, of which the warm-up is a part.
      warmup_steps: 0 for none.
      after_warmup: whether the schedule begins where the warm-up ends, so that it has
        total_steps - warmup_steps of its own; otherwise both begin at step 0. Milestones are steps
        of the run all the same.
      **options: of the schedule's function.

    Returns:
      A function of the step (0-based, traced or not) that gives a scalar.
    """
    begin = warmup_steps if after_warmup and name != 'milestones' else 0
    schedule = SCHEDULES[name](base, max(total_steps - begin, 1), **options)
    if not warmup_steps:
        return schedule
    return lambda step: (
        schedule(jnp.maximum(step - begin, 0)) * jnp.minimum(_share(step, warmup_steps), 1.0)
    )


def of_run(
    config: Any, hparams: Any, step: ArrayLike, steps_per_epoch: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (learning rate, rho) at a step; `hparams` have the values that are scheduled."""
    total_steps = config.total_epochs * steps_per_epoch

    def of_rho(base, name):
        warmup_steps = config.sam.warmup_epochs * steps_per_epoch
        return create(name, base, total_steps, warmup_steps)(step)

    optimizer = config.optimizer
    warmup_steps = optimizer.warmup_steps or optimizer.warmup_epochs * steps_per_epoch
    options: dict[str, Any] = {'after_warmup': optimizer.schedule_after_warmup}
    if optimizer.schedule == 'linear':
        options['end'] = optimizer.end
    if optimizer.schedule == 'milestones':
        options['steps'] = [epoch * steps_per_epoch for epoch in optimizer.milestones]
        options['factor'] = optimizer.milestone_factor
    schedule = create(
        optimizer.schedule, hparams.learning_rate, total_steps, warmup_steps, **options
    )
    learning_rate = schedule(step)
    if config.sam.schedule == 'learning_rate':
        peak = hparams.learning_rate
        share = jnp.where(peak > 0, learning_rate / jnp.where(peak > 0, peak, 1.0), 0.0)
        return learning_rate, of_rho(1.0, 'constant') * (
            config.sam.rho_min + (hparams.rho - config.sam.rho_min) * share
        )
    return learning_rate, of_rho(hparams.rho, config.sam.schedule)
