"""Checks of the settings of methods: each raises a ValueError that names setting and value."""

import numpy as np


def radius(rho):
    """rho, where it is a number and no traced scalar or schedule, must be finite and >= 0."""
    if isinstance(rho, (int, float)) and not 0 <= rho < np.inf:
        raise ValueError(f'rho is {rho}; it must be a finite number >= 0.')


def finite(**values):
    """All must be finite."""
    for name, value in values.items():
        if not np.isfinite(value):
            raise ValueError(f'{name} is {value}; it must be finite.')


def at_least(least, **values):
    """All must be finite and no less than `least`."""
    for name, value in values.items():
        if not least <= value < np.inf:
            raise ValueError(f'{name} is {value}; it must be finite and at least {least}.')


def positive(**values):
    """All must be finite and greater than 0."""
    for name, value in values.items():
        if not 0 < value < np.inf:
            raise ValueError(f'{name} is {value}; it must be finite and greater than 0.')


def ordered(**values):
    """The first must be smaller than the second."""
    (low, a), (high, b) = values.items()
    if not a < b:
        raise ValueError(f'{low} is {a} and {high} is {b}; {low} must be smaller than {high}.')


def fraction(**values):
    """All must be in [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f'{name} is {value}; it must be in [0, 1].')


def share(**values):
    """All must be in (0, 1]."""
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ValueError(f'{name} is {value}; it must be in (0, 1].')


def below_one(**values):
    """All must be in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f'{name} is {value}; it must be in [0, 1).')
