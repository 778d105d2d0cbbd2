"""Ends a process that stands still for good, so that whatever started it can start it again."""

import faulthandler
import time

from sam_jax.errors import UserError

STDERR = 2  # of the process, whatever Python's sys.stderr is now
MAX_MINUTES = 1e6  # two years, which the clock can count
REARM_SECONDS = 1.0  # how often at most, since each time takes a thread


class Watchdog:
    """While it is entered, the process must say now and then that it is alive.

    If it does not for `minutes`, it prints the stacks of all its threads and ends at once, with
    status 1. The clock is a thread in C, made before: it needs neither Python's lock nor memory.

    Args:
      minutes: of silence, at most MAX_MINUTES; 0 for a dog that sleeps.

    Raises:
      UserError: it is no such number.
    """

    def __init__(self, minutes: float) -> None:
        if not 0 <= minutes <= MAX_MINUTES:
            raise UserError(f'hang_minutes is {minutes}; it must be between 0 and {MAX_MINUTES:g}.')
        self._seconds = 60 * minutes
        self._next = 0.0

    def __enter__(self) -> 'Watchdog':
        self.alive()
        return self

    def __exit__(self, *_) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Begins the time anew."""
        if self._seconds and (now := time.monotonic()) >= self._next:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=STDERR)
            self._next = now + min(REARM_SECONDS, self._seconds / 10)
