"""Schedules of the learning rate and of rho: functions step -> value, finite at every step."""

import jax.numpy as jnp

# The original's exponential schedule ends at 1.2 % of the start.
EXPONENTIAL_END = 0.012


def constant(base, total_steps):
    """value(t) = base."""
    del total_steps
    return lambda step: jnp.asarray(base, dtype=float)


def cosine(base, total_steps):
    """value(t) = base * (1 + cos(pi * t / total_steps)) / 2, and 0 from total_steps on."""
    return lambda step: base * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(step / total_steps, 1.0)))


def exponential(base, total_steps):
    """value(t) = base * 0.012^(t / total_steps): 1.2 % of the start at the end."""
    return lambda step: base * EXPONENTIAL_END ** (step / total_steps)


SCHEDULES = {'constant': constant, 'cosine': cosine, 'exponential': exponential}


def create(name, base, total_steps, warmup_steps=0):
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
    return lambda step: schedule(step) * jnp.minimum(step / warmup_steps, 1.0)
