"""The kinds of cases by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st

from fuzzing import commands, configs, files, training


class Kind(NamedTuple):
    """A kind of cases.

    Attributes:
      cases: returns its strategy.
      check: raises on a fault.
      isolated: whether each is checked in a process of its own.
      seconds: that it may take there.
    """

    cases: Callable[[], Any]
    check: Callable[[dict], None]
    isolated: bool = False
    seconds: float = 300.0


KINDS = {
    'settings': Kind(configs.cases, configs.check),
    'keys': Kind(lambda: st.sampled_from(configs.single_changes()), configs.check),
    'traces': Kind(
        lambda: configs.cases(wild=0, of=configs.TINY), lambda case: configs.check(case, trace=True)
    ),
    'train': Kind(training.cases, training.check, isolated=True, seconds=600.0),
    'commands': Kind(commands.cases, commands.check),
    'files': Kind(files.cases, files.check),
}
