"""Ranges of the settings of methods: each raises a ValueError that names setting and value.

A traced setting has no value yet and is let through. (What chooses between programs must be a
Python value all the same: p, k, n, steps, and weights where 0 or 1 takes a shorter way.)
"""

from typing import Any

import numpy as np
from jax.core import Tracer


def _known(values):
    return [(name, value) for name, value in values.items() if not isinstance(value, Tracer)]


def radius(rho: Any) -> None:
    """rho, where it is no traced scalar or schedule, must be finite and >= 0."""
    for name, value in () if callable(rho) else _known({'rho': rho}):
        if not 0 <= value < np.inf:
            raise ValueError(f'{name} is {value}; it must be a finite number >= 0.')


def finite(**values) -> None:
    """All must be finite."""
    for name, value in _known(values):
        if not np.isfinite(float(value)):
            raise ValueError(f'{name} is {value}; it must be finite.')


def at_least(least: float, **values) -> None:
    """All must be finite and no less than `least`."""
    for name, value in _known(values):
        if not least <= value < np.inf:
            raise ValueError(f'{name} is {value}; it must be finite and at least {least}.')


def positive(**values) -> None:
    """All must be finite and greater than 0."""
    for name, value in _known(values):
        if not 0 < value < np.inf:
            raise ValueError(f'{name} is {value}; it must be finite and greater than 0.')


def above_zero(**values) -> None:
    """All must be greater than 0, and may be infinite."""
    for name, value in _known(values):
        if not value > 0:
            raise ValueError(f'{name} is {value}; it must be greater than 0.')


def given(**values) -> None:
    """None must be missing: what only the caller knows has no default."""
    for name, value in values.items():
        if value is None:
            raise ValueError(f'{name} is not given; it must be, since only the caller knows it.')


def ordered(**values) -> None:
    """The first must be smaller than the second."""
    known = _known(values)
    if len(known) == 2 and not known[0][1] < known[1][1]:
        (low, a), (high, b) = known
        raise ValueError(f'{low} is {a} and {high} is {b}; {low} must be smaller than {high}.')


def zero_to_one(**values) -> None:
    """All must be in [0, 1]."""
    for name, value in _known(values):
        if not 0 <= value <= 1:
            raise ValueError(f'{name} is {value}; it must be in [0, 1].')


def above_zero_to_one(**values) -> None:
    """All must be in (0, 1]."""
    for name, value in _known(values):
        if not 0 < value <= 1:
            raise ValueError(f'{name} is {value}; it must be in (0, 1].')


def zero_to_below_one(**values) -> None:
    """All must be in [0, 1)."""
    for name, value in _known(values):
        if not 0 <= value < 1:
            raise ValueError(f'{name} is {value}; it must be in [0, 1).')
