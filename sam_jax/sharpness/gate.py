"""Gates: whether this step pays for a perturbed gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Gate(NamedTuple):
    """A gate.

    Attributes:
      init: params -> state.
      decide: (grads, state, count) -> (decision, state), where count is the number of updates so
        far. A Python bool decides while tracing; a traced bool becomes a `lax.cond` and must be
        the same on all devices of a group.
    """

    init: Callable[[Any], Any]
    decide: Callable[[Any, Any, Any], tuple[Any, Any]]


def always():
    """Open at every step."""
    return Gate(init=lambda params: (), decide=lambda grads, state, count: (True, state))


def never():
    """Shut at every step: the base gradient, for one gradient evaluation."""
    return Gate(init=lambda params: (), decide=lambda grads, state, count: (False, state))
