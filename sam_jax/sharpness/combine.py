"""Combinations: the clean and the perturbed gradient -> the gradient handed on."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Combine(NamedTuple):
    """A combination of the two gradients.

    Attributes:
      init: params -> state.
      combine: (grads, perturbed_grads, state, params) -> (updates, state), when the gate is open.
      skip: (grads, state, params) -> (updates, state), when it is shut.
    """

    init: Callable[[Any], Any]
    combine: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    skip: Callable[[Any, Any, Any], tuple[Any, Any]]


def perturbed():
    """SAM's own: the perturbed gradient; the clean one when the gate is shut. No state."""
    return Combine(
        init=lambda params: (),
        combine=lambda grads, perturbed_grads, state, params: (perturbed_grads, state),
        skip=lambda grads, state, params: (grads, state),
    )
