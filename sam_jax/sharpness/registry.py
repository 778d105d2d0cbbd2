"""The methods by name, and what is to be known of each: one entry, beside its formula."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from sam_jax import tables
from sam_jax.sharpness.as_optax import Link

# What a method is given by its surroundings and is not an option of its own.
GIVEN = ('rho', 'p', 'mask', 'total_steps', 'num_examples', 'max_norm')


class Entry(NamedTuple):
    """What is to be known of a method.

    Attributes:
      make: its constructor.
      gives: what it hands to the optimizer, in a few words.
      gradients: how many a step takes: a number, or a function of its options and the step; None
        where it depends on the gradient or on chance.
      cost: the same in words, where a number does not say it.
      norm: what `perturbation_norm` is at a step that climbs: 'rho', 'at most rho', 'of its own'
        where rho has another unit, or '' where there is no perturbation.
      uphill: whether the perturbed loss is above the clean one, to first order.
      late: whether the first steps may have no perturbation.
      refuses: {setting of a run: the value it must have}.
      why: what such a refusal says of the method.
    """

    make: Callable[..., Link]
    gives: str
    gradients: Any
    cost: str
    norm: str
    uphill: bool
    late: bool
    refuses: dict
    why: str


METHODS: dict[str, Entry] = {}

Make = TypeVar('Make', bound=Callable[..., Link])


def enter(
    gives: str,
    gradients: Any,
    *,
    name: str | None = None,
    cost: str = '',
    norm: str = 'rho',
    uphill: bool = True,
    late: bool = False,
    refuses: dict[str, Any] | None = None,
    why: str = '',
) -> Callable[[Make], Make]:
    """Enters a constructor among the methods, under its own name or `name`; see `Entry`."""

    def of(make):
        METHODS[name or make.__name__] = Entry(
            make, gives, gradients, cost, norm, uphill, late, refuses or {}, why
        )
        return make

    return of


@functools.cache
def takes(name: str) -> tuple:
    """Returns the names of all that a method's constructor takes."""
    return tuple(inspect.signature(METHODS[name].make).parameters)


def options(name: str) -> dict:
    """Returns {name: default} of what a method takes besides what its surroundings give."""
    return {
        option: parameter.default
        for option, parameter in inspect.signature(METHODS[name].make).parameters.items()
        if option not in GIVEN
    }


def create(method: str, **settings) -> Link:
    """Returns the method of that name, made of the settings that it takes.

    Args:
      method: a name in METHODS.
      **settings: every setting of `config.sam` besides the method, and perhaps total_steps,
        num_examples and max_norm; the method picks its own.
    """
    return METHODS[method].make(
        **{name: value for name, value in settings.items() if name in takes(method)}
    )


def gradients(name: str, step: int, **settings) -> int | None:
    """Returns the gradients that a method takes at a step, with its defaults or other settings."""
    number: Any = METHODS[name].gradients
    if callable(number):
        number = number({**options(name), **settings}, step)
    return number


def table() -> str:
    """Returns the table of all methods, Markdown, as the documentation has it."""
    rows = []
    for name, entry in METHODS.items():
        own = [*options(name), *(['p'] if 'p' in takes(name) else [])]
        rows.append(
            [
                f'`{name}`',
                entry.gives,
                entry.cost or entry.gradients,
                ', '.join(f'`{option}`' for option in own),
            ]
        )
    return tables.markdown(
        ['method', 'what is handed to the optimizer', 'gradients a step', 'settings besides rho'],
        rows,
    )
