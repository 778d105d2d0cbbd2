"""A trace of some steps by jax.profiler, and which operations took longest in it."""

import collections
import glob
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sam_jax.errors import UserError

FOLDER = 'profile'
SHOWN = 5


class Steps(NamedTuple):
    """Steps of a run, both counted from 1 and both included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> 'Steps | None':
        """Reads '10:15'; None of ''.

        Raises:
          UserError: it is something else.
        """
        if not text:
            return None
        first, colon, last = text.partition(':')
        if not (colon and first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
            raise UserError(
                f'--profile_steps is {text!r}; it must be the first and the last step, counted '
                'from 1, such as 10:15.'
            )
        return cls(int(first), int(last))


NO_STEPS = Steps(0, 0)


class Profiler:
    """Traces steps of a run into WORKDIR/profile, and says what took longest."""

    def __init__(self, steps: Steps, workdir: str, say: Callable[[str], None]) -> None:
        self._steps, self._say = steps, say
        self._folder = os.path.join(workdir, FOLDER)
        self._on = self._traced = False

    def before(self, step: int, state: Any) -> None:
        """Called before a step, counted from 1, with the state that it gets."""
        # Also where a run goes on in the midst of them.
        if not self._on and self._steps.first <= step <= self._steps.last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._on = self._traced = True
            self._began = step

    def after(self, step: int, state: Any) -> None:
        """Called after a step, with the state that it made."""
        if self._on and step == self._steps.last:
            jax.block_until_ready(state)
            self.close(step)

    def close(self, step: int | None = None) -> None:
        """Ends the trace, if it goes on; with the step that was the last one says what it shows."""
        if not self._on:
            if self._steps != NO_STEPS and not self._traced:
                first, last = self._steps
                self._say(f'--profile_steps is {first}:{last}; no step of these was made.')
            return
        self._on = False
        jax.profiler.stop_trace()
        if step is not None:
            steps = step - self._began + 1
            self._say(summary(longest(self._folder), steps, self._folder))


def longest(folder: str) -> list[tuple[str, float, float]]:
    """Returns (operation, its seconds, its share of all) of the newest trace in a folder.

    The longest comes first. An operation's time is without that of operations within it, and is
    summed over devices, threads and steps.
    """
    paths = glob.glob(os.path.join(folder, '**', '*.xplane.pb'), recursive=True)
    if not paths:
        return []
    data = jax.profiler.ProfileData.from_file(max(paths, key=os.path.getmtime))
    times = collections.Counter()
    for plane in data.planes:
        for line in plane.lines:
            _add_own_times(line.events, times)
    total = sum(times.values())
    return [(name, ns / 1e9, ns / total) for name, ns in times.most_common()]


def _add_own_times(events, times):
    """Adds the nanoseconds of each operation of a line, those of operations within it taken off."""
    found = []
    for event in events:
        stats = dict(event.stats)
        if 'hlo_op' in stats:
            name = f'{stats["hlo_op"]}'
            source = str(stats.get('tf_op') or stats.get('name') or '')
            found.append((event.start_ns, -event.duration_ns, name, source))
    open_ones = []  # [end, name] of the operations around
    for start, negative, name, source in sorted(found):
        duration = -negative
        while open_ones and open_ones[-1][0] <= start:
            open_ones.pop()
        if open_ones:
            times[open_ones[-1][1]] -= duration
        label = f'{name} ({source})' if source else name
        times[label] += duration
        open_ones.append((start + duration, label))


def summary(operations: list[tuple[str, float, float]], steps: int, folder: str) -> str:
    """Returns the lines that a run prints: the most expensive operations of its traced steps."""
    lines = [
        f'  {100 * share:5.1f} %  {1e3 * seconds / steps:9.3f} ms a step  {name}'
        for name, seconds, share in operations[:SHOWN]
    ]
    if not lines:
        return f'The trace of {steps} steps is in {folder}; no operation of a device is in it.'
    return '\n'.join(
        [f'The most expensive operations of {steps} steps, of {len(operations)}:', *lines]
        + [f'  The trace is in {folder}; TensorBoard, XProf and Perfetto show it.']
    )
