"""The life of one run: started, disturbed, started again, until it has ended."""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Generator
from typing import Any

from faults import runs
from faults.process import Hooks, Process

# A fault is waited for by a generator, which yields while it waits.
Waiting = Generator[None, None, Any]

# Silence of so long is a hang, if the processes do not work meanwhile, or do for as long.
HANG_SECONDS, IDLE_SECONDS = 90, 3
# After one of several processes has failed, launch_local.sh lets the others live so long.
GRACE_SECONDS = 60


@dataclasses.dataclass
class Fault:
    """A fault, and what became of it.

    Attributes:
      kind: its name.
      moment: when it came, or what was damaged; '' if it did not come to it.
      allows: statuses with which processes may end by it.
      lines: whether lines of metrics.jsonl may be lost by it.
      outcome: how the run took it.
      said: the sentence with which the run ended, or named what is damaged.
    """

    kind: str
    moment: str = ''
    allows: set[int] = dataclasses.field(default_factory=set)
    lines: bool = False
    outcome: str = ''
    said: str = ''


class Life:
    """A run and its folder.

    Attributes:
      rng: decides all that is random.
      setup: runs.Setup.
      folder: of its own: `disk/run` is the workdir, `log.txt` what it said.
      data, cache: folders of the data and of compiled programs, which all lives share; a fault
        that damages one of them gives the life its own.
      hooks, more: of the next start.
      processes: those of the last start.
      killed_by_launcher: whether some of them were ended as launch_local.sh does.
      named_metrics: whether a start has said that metrics.jsonl is damaged.
    """

    def __init__(self, folder: str, setup: runs.Setup, rng: random.Random, shared: str) -> None:
        self.rng, self.setup, self.folder = rng, setup, folder
        self.shared = shared
        self.data, self.cache = os.path.join(shared, 'data'), os.path.join(shared, 'cache')
        self.disk = os.path.join(folder, 'disk')
        self.workdir = os.path.join(self.disk, 'run')
        self.hooks, self.more = Hooks(), ()
        self.processes: list[Process] = []
        self.killed_by_launcher = False
        self.named_metrics = False
        unmount(self.disk)  # of a campaign that was killed
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(self.disk)
        self.small_disk = mount(self.disk)

    def start(self) -> None:
        """Starts the run, with the hooks of this round."""
        self.killed_by_launcher = False
        self.processes = runs.start(
            self.setup, self.workdir, self.data, self.cache, self.hooks, self.more
        )
        self.hooks, self.more = Hooks(), ()

    def poll(self) -> bool:
        """Reads what the processes say; returns whether one of them still is there."""
        return any([process.poll() for process in self.processes])

    def _seconds(self):
        return sum(process.seconds() for process in self.processes)

    @property
    def text(self) -> str:
        return ''.join(process.text for process in self.processes)

    def wait(self) -> Waiting:
        """Waits until all processes have ended, as launch_local.sh does; returns what hangs.

        Returns:
          '' or what is wrong.
        """
        failed, since, spent = 0.0, time.monotonic(), 0.0
        while self.poll():
            now = time.monotonic()
            statuses = {process.status for process in self.processes}
            if not failed and statuses - {None, 0}:
                failed = now
            if failed and now - failed > GRACE_SECONDS:
                self.killed_by_launcher = True
                for process in self.processes:
                    process.send(signal.SIGKILL)
            heard = max(process.heard for process in self.processes)
            if heard > since or failed:
                since, spent = now, self._seconds()
            if now - since > HANG_SECONDS:
                busy = self._seconds() - spent
                # On a machine that others use a start may take minutes; then it has worked little.
                if busy < IDLE_SECONDS or busy > HANG_SECONDS or now - since > 10 * HANG_SECONDS:
                    return f'it hung for {now - since:.0f} s, of which it worked {busy:.0f} s'
            yield
        return ''

    def close(self) -> None:
        """Ends what is left of the processes and keeps what they said."""
        self.named_metrics |= 'metrics.jsonl is damaged' in self.text
        for process in self.processes:
            process.close()
        with open(os.path.join(self.folder, 'log.txt'), 'a') as log:
            for i, process in enumerate(self.processes):
                log.write(f'--- process {i}, status {process.status}\n{process.text}')
        self.processes = []

    def leave(self, keep: bool) -> None:
        """Gives up the folder; a small disk's content is kept as a plain folder, if asked for."""
        if keep and self.small_disk:
            shutil.copytree(self.disk, self.disk + '-kept', symlinks=True)
        unmount(self.disk)
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    # Moments.

    def steps(self) -> list[int]:
        """Returns the steps with a checkpoint, ascending."""
        place = os.path.join(self.workdir, 'checkpoints')
        names = os.listdir(place) if os.path.isdir(place) else []
        return sorted(int(name) for name in names if name.isdigit())

    def saves(self) -> bool:
        """Returns whether a checkpoint is being written, by this start and not one before."""
        if 'The first step' not in self.text:
            return False
        try:
            return any('tmp' in name for name in os.listdir(f'{self.workdir}/checkpoints'))
        except OSError:
            return False

    def moment(self, *among: str) -> Waiting:
        """Waits for a random moment; returns it in words, or '' if the run ended before.

        `among` are 'start', 'step', 'save', 'end'; all of them by default.
        """
        what = self.rng.choice(among or ('start', 'step', 'step', 'save', 'save', 'end'))
        seconds = self.rng.uniform(0, 0.06)
        if what == 'start':
            seconds = self.rng.uniform(0, 1.2 + 0.8 * (self.setup.processes - 1))
            words = f'{seconds:.2f} s after the start'
            if not (yield from self.pause(seconds)):
                return ''
            return words
        if what == 'step':
            # Any of the next lines of the log.
            step = max([0, *self.steps()]) + self.rng.randint(1, 8)
            step = min(step + step % 2, runs.STEPS)
            found = f'step {step}', lambda: self._reached(step)
        elif what == 'save':
            found = 'in a save', self.saves
            seconds /= 4
        else:
            found = 'at the end', lambda: 'Finished.' in self.text
        while not found[1]():
            if not self.poll():
                return ''
            yield
        yield from self.pause(seconds)
        return f'{seconds:.3f} s after {found[0]}' if self.poll() else ''

    def _reached(self, step):
        return any(f'step {s}/' in self.text for s in range(step, runs.STEPS + 1))

    def pause(self, seconds: float) -> Waiting:
        """Waits; returns whether a process still is there."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.poll():
            yield
        return self.poll()

    # The disk.

    def fill_disk(self, leave: int) -> None:
        """Fills the small disk but for so many bytes."""
        place = os.statvfs(self.disk)
        size = place.f_bavail * place.f_frsize - leave
        with open(os.path.join(self.disk, 'ballast'), 'wb') as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
            except OSError:  # it filled up meanwhile
                pass

    def empty_disk(self) -> None:
        """Undoes `fill_disk`."""
        path = os.path.join(self.disk, 'ballast')
        if os.path.exists(path):
            os.remove(path)


def mount(folder: str) -> bool:
    """Makes a folder a small disk, where root may; returns whether it is one."""
    command = ['mount', '-t', 'tmpfs', '-o', 'size=64m,mode=755', 'tmpfs', folder]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def unmount(folder: str) -> None:
    """Undoes `mount`."""
    if os.path.ismount(folder):
        subprocess.run(['umount', '-l', folder], check=False)


def files(folder: str) -> list[str]:
    """Returns the paths of all files of a folder that are not empty, in order."""
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if os.path.getsize(os.path.join(place, name))
    )
