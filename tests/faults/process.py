"""A process of a run that is to be disturbed, with what it says and how it ends.

It is forked off a process that has imported everything and has not begun to compute: a run of 24
steps then takes a second and a half, most of it tracing. A cold one is Python started anew.
"""

import atexit
import errno
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import sam_jax

# What takes seconds to import and is not needed but for TensorBoard.
LEFT_OUT = ('tensorflow', 'tensorflow_datasets', 'clu')

SIGNALS = {signal.SIGTERM, signal.SIGINT}
_VERSION_3 = 0x20080522  # of the system call for capabilities
_OVERRIDE = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


class Hooks(NamedTuple):
    """What is done to a process from within.

    Attributes:
      pace: seconds that each step waits, so that there is time to disturb it.
      poison: (where, 0-based step, value): a number that is not finite in the 'batch', the
        'gradient' or the 'perturbed gradient' of a step.
      clock: (0-based step, seconds): by which `time.time` jumps before the step.
      file_size: the most bytes that a file may have (RLIMIT_FSIZE); 0 for any.
      obeys: whether the process gives up root's right to write what is read-only.
      cold: whether Python is started anew; then no other hook is there.
    """

    pace: float = 0.01
    poison: tuple[str, int, float] | None = None
    clock: tuple[int, float] | None = None
    file_size: int = 0
    obeys: bool = False
    cold: bool = False


class Process:
    """One process of a run."""

    def __init__(self, function: Callable[[], None]) -> None:
        """Starts it.

        Args:
          function: what it does; `training` makes one that trains.
        """
        self.began, self.heard = time.monotonic(), time.monotonic()
        self.status: int | None = None  # as subprocess has it: negative is the signal
        self.text = ''
        self._pipe, write = os.pipe()
        os.set_blocking(self._pipe, False)
        sys.stdout.flush()
        # A signal that comes at once is not for the campaign's own handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self.pid = os.fork()
        if not self.pid:
            os.close(self._pipe)
            _become(function, write)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(write)

    def poll(self) -> bool:
        """Reads what it says; returns whether it still is there."""
        if self.status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.status = os.waitstatus_to_exitcode(status)
        while True:
            try:
                read = os.read(self._pipe, 65536)
            except OSError as e:
                if e.errno in (errno.EAGAIN, errno.EBADF):
                    break
                raise
            if not read:
                break
            self.text += read.decode(errors='replace')
            self.heard = time.monotonic()
        return self.status is None

    def send(self, number: int) -> None:
        """Sends it a signal, if it still is there."""
        if self.poll():
            os.kill(self.pid, number)

    def limit_memory(self, more: int) -> None:
        """Lets its address space grow by so many bytes and no more."""
        with open(f'/proc/{self.pid}/statm') as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.prlimit(self.pid, resource.RLIMIT_AS, (size + more, size + more))

    def seconds(self) -> float:
        """Returns the time that processors have spent on it."""
        try:
            with open(f'/proc/{self.pid}/stat') as file:
                fields = file.read().rpartition(')')[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

    def close(self) -> None:
        """Ends it, whatever it does, and lets go of its pipe."""
        self.send(signal.SIGKILL)
        while self.poll():
            time.sleep(0.001)
        os.close(self._pipe)


def training(
    arguments: Sequence[str], environment: Mapping[str, str], hooks: Hooks
) -> Callable[[], None]:
    """Returns what a process does that trains.

    Args:
      arguments: those of sam-jax-train.
      environment: variables that it has besides ours.
      hooks: Hooks.
    """

    def train():
        os.environ.update(environment)
        if hooks.cold:
            os.environ['PYTHONPATH'] = os.path.dirname(os.path.dirname(sam_jax.__file__))
            os.execv(sys.executable, [sys.executable, '-m', 'sam_jax.main', *arguments])
        # Here, since these modules are imported once, and not by who only looks at a campaign.
        from faults import hooked
        from sam_jax import main

        if '--tracker=tensorboard' in arguments:
            for name in LEFT_OUT:
                sys.modules.pop(name, None)
        hooked.install(hooks)
        sys.argv = ['sam-jax-train', *arguments]
        main.run()

    return train


def obey() -> None:
    """Gives up the right of root to write what is read-only, for this process."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    libc.capget(head, sets)
    for i in (0, 1):
        sets[i] &= ~_OVERRIDE
    if libc.capset(head, sets):
        raise OSError(ctypes.get_errno(), 'capset')


def _become(function, output):
    """What the forked process does; never returns."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.dup2(output, 1)
        os.dup2(output, 2)
        function()
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            # As Python ends: threads are joined, and what waits for the end is called.
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
