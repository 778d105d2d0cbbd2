"""Gates: whether this step pays for a perturbed gradient.

A decision is a function of the step, of a key or of a norm that all share, never of one device's
part of the batch, so that all devices take the same branch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from sam_jax.sharpness import ranges
from sam_jax.sharpness.trees import lp_norm, progress


class Gate(NamedTuple):
    """A gate.

    Attributes:
      init: params -> state.
      decide: (grads, state, count, **extra_args) -> (decision, state), where count is the number of
        updates so far and extra_args are those of the update. A Python bool decides while tracing;
        a traced bool becomes a `lax.cond` and must be the same on all devices.
      looks: whether it looks at the gradients (else they may be None).
    """

    init: Callable[[Any], Any]
    decide: Callable[..., tuple[Any, Any]]
    looks: bool = False


def _stateless(decide):
    return Gate(
        init=lambda params: (),
        decide=lambda grads, state, count, **extra: (decide(count, **extra), state),
    )


def always() -> Gate:
    """Open at every step."""
    return _stateless(lambda count, **extra: True)


def never() -> Gate:
    """Shut at every step: the base gradient, for one gradient evaluation."""
    return _stateless(lambda count, **extra: False)


def every(k: int) -> Gate:
    """Open at the updates 0, k, 2k, ...

    Raises:
      ValueError: k < 1.
    """
    ranges.at_least(1, k=k)
    return always() if k == 1 else _stateless(lambda count, **extra: count % k == 0)


def window(start: float, end: float) -> Gate:
    """Open at the updates start <= count < end; numbers, which need not be whole."""
    return _stateless(lambda count, **extra: (count >= start) & (count < end))


def bernoulli(probability: float | Callable[[Int[ArrayLike, '']], Float[Array, '']]) -> Gate:
    """Open with a probability, by a draw from `gate_key`, which is the step's and not a group's.

    Args:
      probability: in [0, 1], or a function from the number of updates to it.

    Raises:
      ValueError: the number is not in [0, 1].
      TypeError (from update): no `gate_key`.
    """
    if not callable(probability):
        ranges.zero_to_one(probability=probability)

    def decide(count, *, gate_key=None, **extra):
        del extra
        if gate_key is None:
            raise TypeError(
                'A random gate needs a key that all devices share: tx.update(..., '
                'gate_key=jax.random.key(step)).'
            )
        p = probability(count) if callable(probability) else probability
        return jax.random.bernoulli(gate_key, p)

    return _stateless(decide)


class AdaptiveState(NamedTuple):
    """State of `adaptive`: moving mean and variance of the squared norm of the gradient."""

    mean: Float[Array, '']
    variance: Float[Array, '']


def adaptive(delta: float, lambda1: float, lambda2: float, total_steps: int) -> Gate:
    """AE-SAM's gate (2304.14647): open where the gradient is long, measured by its own history.

    With s = |g|^2, at every step, whatever is decided:
      mean <- delta mean + (1 - delta) s;  variance <- delta variance + (1 - delta) (s - mean)^2;
    open if s >= mean + c sqrt(variance), with c = (t / T) lambda1 + (1 - t / T) lambda2. At the
    first step mean = s and variance = 0, so it is open. For s the mean over all groups is taken
    where the loop gives it (`gate_norm`, the square root of that mean), else that of the gradient
    given. State: two scalars.

    Args:
      delta: in [0, 1).
      lambda1, lambda2: c at the end and at the start.
      total_steps: T, the number of updates in the run.

    Raises:
      ValueError: delta is not in [0, 1), or a lambda not finite.
    """
    ranges.zero_to_below_one(delta=delta)
    ranges.finite(lambda1=lambda1, lambda2=lambda2)

    def decide(grads, state, count, *, gate_norm=None, **extra):
        del extra
        square = jnp.square(lp_norm(grads) if gate_norm is None else gate_norm).astype(float)
        first = count == 0
        mean = jnp.where(first, square, delta * state.mean + (1 - delta) * square)
        variance = jnp.where(
            first, 0.0, delta * state.variance + (1 - delta) * jnp.square(square - mean)
        )
        past = progress(count, total_steps)
        c = past * lambda1 + (1 - past) * lambda2
        return square >= mean + c * jnp.sqrt(variance), AdaptiveState(mean, variance)

    return Gate(
        init=lambda params: AdaptiveState(jnp.zeros((), float), jnp.zeros((), float)),
        decide=decide,
        looks=True,
    )
