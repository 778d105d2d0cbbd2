"""Directions: optax transformations put in front of a ball, that choose where the ascent goes.

Their averages are kept in at least float32 and are those of the ascents alone: behind a gate that
is shut they stay as they are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Int32, PRNGKeyArray

from sam_jax.sharpness import ranges
from sam_jax.sharpness.trees import promote, wide_zeros


def gaussian() -> optax.GradientTransformationExtraArgs:
    """A direction that knows nothing of the loss: z ~ N(0, I) in place of the gradient.

    In front of `lp_ball` with p = 2 it gives eps = rho z / ||z||_2 (SAM paper, appendix C.5, which
    by a slip of the pen prints the square of the norm). No state.

    Raises (from update):
      TypeError: no `key`.
    """

    def update(updates, state, params=None, *, key=None, **extra_args):
        del params, extra_args
        if key is None:
            raise TypeError(
                'A random ascent needs a key: tx.update(..., key=jax.random.key(step)).'
            )
        return random_like(key, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def random_like(key: PRNGKeyArray, tree: Any) -> Any:
    """Returns z ~ N(0, I) of the shapes of a pytree, in at least float32."""
    leaves, structure = jax.tree.flatten(jax.tree.map(promote, tree))
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
    )


class AverageState(NamedTuple):
    """State of the directions that remember: how many ascents there were, and their average."""

    count: Int32[ArrayLike, '']
    average: Any


def _start(params):
    return AverageState(jnp.zeros((), jnp.int32), wide_zeros(params))


def averaged(theta: float) -> optax.GradientTransformation:
    """VaSSO's direction: d <- g at the first ascent, then (1 - theta) d + theta g (2309.15639).

    State: one pytree. theta = 1 is the gradient itself.

    Raises:
      ValueError: theta is not in (0, 1].
    """
    ranges.above_zero_to_one(theta=theta)

    def update(updates, state, params=None):
        del params
        average = jax.tree.map(
            lambda d, g: jnp.where(state.count == 0, g, (1 - theta) * d + theta * g),
            state.average,
            jax.tree.map(promote, updates),
        )
        return average, AverageState(optax.safe_increment(state.count), average)

    return optax.GradientTransformation(_start, update)


def without_average(sigma: float, lam: float) -> optax.GradientTransformation:
    """Friendly SAM's direction: the gradient without its persistent part (2403.12350).

    d = g - sigma m, then m <- lam m + (1 - lam) g; at the first ascent d = m = g. In this order as
    in the authors' code (their text averages first, which for sigma = 1 gives the same direction).
    State: one pytree. sigma = 0 is the gradient itself.

    Raises:
      ValueError: sigma is not finite, or lam is not in [0, 1).
    """
    ranges.finite(sigma=sigma)
    ranges.zero_to_below_one(lam=lam)

    def update(updates, state, params=None):
        del params
        grads = jax.tree.map(promote, updates)
        first = state.count == 0
        direction = jax.tree.map(
            lambda m, g: jnp.where(first, g, g - sigma * m), state.average, grads
        )
        average = jax.tree.map(
            # In this form a gradient that stays leaves m = g, without rounding.
            lambda m, g: jnp.where(first, g, m + (1 - lam) * (g - m)),
            state.average,
            grads,
        )
        return direction, AverageState(optax.safe_increment(state.count), average)

    return optax.GradientTransformation(_start, update)
