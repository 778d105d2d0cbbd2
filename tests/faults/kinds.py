"""The kinds of faults.

A kind is a generator of (life, fault). What it does before its first START is done before the run
is started; until it yields END, while the run goes on; what follows mends what the fault needs to
be mended, as a person would who reads the sentence. All other yields wait.
"""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from typing import NamedTuple

from faults import runs
from faults.life import Fault, Life, files
from faults.process import Hooks
from sam_jax import sharpness

START, END = 'start', 'end'
REFUSED, PREEMPTED = 2, 143
# Of C++, and of the C library, which has a sentence of its own for memory that is used up.
ABORTS = {-signal.SIGABRT, 127}
CRASHES = {*ABORTS, -signal.SIGSEGV}  # where C++ does not look at what malloc gave


class Kind(NamedTuple):
    """A kind of fault.

    Attributes:
      act: generator of (life, fault), see above.
      weight: how often it is drawn, against others.
      ends: whether it may end the processes; one of these in a round.
      fits: whether a life can have it now.
    """

    act: Callable
    weight: float = 1.0
    ends: bool = False
    fits: Callable[[Life], bool] = lambda life: True


# Signals.


def _kill_one(life: Life, fault: Fault):
    yield START
    fault.moment = yield from life.moment()
    if fault.moment:
        victim = life.rng.randrange(len(life.processes))
        life.processes[victim].send(signal.SIGKILL)
        fault.moment += f', process {victim}' if len(life.processes) > 1 else ''
        # What the others end with is theirs; what they say is looked at.
        fault.allows |= {-signal.SIGKILL, REFUSED, 1, -signal.SIGABRT}
    yield END


def _kill_all(life, fault, *among):
    yield START
    fault.moment = yield from life.moment(*among)
    if fault.moment:
        for process in life.processes:
            process.send(signal.SIGKILL)
        fault.allows.add(-signal.SIGKILL)
    yield END


def _kill_cold(life, fault):
    life.hooks = Hooks(cold=True)
    yield START
    seconds = life.rng.uniform(0.05, 4)
    if (yield from life.pause(seconds)):
        fault.moment = f'{seconds:.2f} s after the start of Python'
        for process in life.processes:
            process.send(signal.SIGKILL)
        fault.allows.add(-signal.SIGKILL)
    yield END


def _coordinator_gone(life, fault):
    yield START
    fault.moment = yield from life.moment('step', 'save')
    if fault.moment:
        life.processes[0].send(signal.SIGKILL)
        fault.allows |= {-signal.SIGKILL, REFUSED, 1, -signal.SIGABRT}
    yield END


def _terms(life, fault):
    yield START
    fault.moment = yield from life.moment('start', 'step', 'save')
    if fault.moment:
        count = life.rng.randint(2, 20)
        fault.moment += f', {count} signals'
        fault.allows |= {PREEMPTED, -signal.SIGTERM}
        for _ in range(count):
            life.rng.choice(life.processes).send(signal.SIGTERM)
            if not (yield from life.pause(life.rng.uniform(0, 0.03))):
                break
    yield END


def _interrupt(life, fault):
    yield START
    fault.moment = yield from life.moment('start', 'step', 'save')
    if fault.moment:
        for process in life.processes:
            process.send(signal.SIGINT)
        fault.allows |= {130, -signal.SIGINT}
    yield END


def _stop_and_go_on(life, fault):
    yield START
    fault.moment = yield from life.moment()
    if fault.moment:
        process = life.rng.choice(life.processes)
        process.send(signal.SIGSTOP)
        yield from life.pause(life.rng.uniform(0.05, 2))
        process.send(signal.SIGCONT)
    yield END


def _hang(life, fault):
    yield START
    fault.moment = yield from life.moment('step')
    if fault.moment:
        victim = life.rng.choice(life.processes)
        victim.send(signal.SIGSTOP)
        fault.allows |= {-signal.SIGKILL, REFUSED, 1, -signal.SIGABRT}
        while any(p.poll() for p in life.processes if p is not victim):
            yield
        victim.send(signal.SIGKILL)
    yield END


# Files that lie there damaged.


def _damage(life, path, how=''):
    """Damages a file; returns how."""
    how = how or life.rng.choice(('truncated', 'zeroed', 'a bit flipped', 'removed'))
    size = os.path.getsize(path)
    at = life.rng.randrange(size)
    if how == 'truncated':
        os.truncate(path, at)
    elif how == 'removed':
        os.remove(path)
    else:
        with open(path, 'r+b') as file:
            if how == 'zeroed':
                file.seek(at if life.rng.random() < 0.5 else 0)
                file.write(bytes(size - file.tell()))
            else:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << life.rng.randrange(8)]))
    where = '' if how == 'removed' else f' at byte {at} of {size}'
    return f'{os.path.relpath(path, life.disk)} {how}{where}'


def _has_checkpoint(life):
    return bool(life.steps())


def _damaged_checkpoint(life, fault):
    steps = life.steps()
    place = os.path.join(life.workdir, 'checkpoints', str(steps[-1]))
    if len(steps) == 1:  # as it will be used after a sentence
        runs.copy(place, os.path.join(life.folder, 'backup'))
    found = files(place)
    fault.moment = _damage(life, life.rng.choice(found)) if found else 'nothing left of it'
    fault.allows.add(REFUSED if len(steps) == 1 else 0)
    yield START
    yield END
    if len(steps) == 1 and life.steps() in ([], steps):
        runs.copy(os.path.join(life.folder, 'backup'), place)


def _all_checkpoints_damaged(life, fault):
    place, backup = (os.path.join(life.workdir, 'checkpoints'), os.path.join(life.folder, 'all'))
    runs.copy(place, backup)
    damages = []
    for step in life.steps():
        largest = max(files(os.path.join(place, str(step))), key=os.path.getsize)
        damages.append(_damage(life, largest, life.rng.choice(('truncated', 'zeroed', 'removed'))))
    fault.moment = '; '.join(damages)
    fault.allows.add(REFUSED)
    yield START
    yield END
    if 'damaged' in fault.said:
        runs.copy(backup, place)
        shutil.rmtree(os.path.join(life.workdir, 'damaged'), ignore_errors=True)


def _stray_files(life, fault):
    place = os.path.join(life.workdir, 'checkpoints')
    step = life.rng.randrange(1000)
    name = life.rng.choice((f'{step}.orbax-checkpoint-tmp-7', 'notes.txt', 'old', '.DS_Store'))
    os.makedirs(os.path.join(place, name), exist_ok=True)
    fault.moment = f'checkpoints/{name}'
    yield START
    yield END
    shutil.rmtree(os.path.join(place, name), ignore_errors=True)


def _of_file(name, lines=False):
    def damaged(life, fault):
        fault.moment = _damage(life, os.path.join(life.workdir, name))
        fault.lines = lines
        yield START
        yield END

    def fits(life):
        path = os.path.join(life.workdir, name)
        return os.path.isfile(path) and os.path.getsize(path) > 0

    return damaged, fits


_damaged_metrics, _has_metrics = _of_file('metrics.jsonl', True)
_damaged_config, _has_config = _of_file('config.json')


def _damaged_cache(life, fault):
    own = os.path.join(life.folder, 'cache')
    runs.copy(life.cache, own)
    life.cache = own
    programs = [path for path in files(own) if path.endswith('-cache')]
    train = [path for path in programs if 'wrapped' in path or '_fun' in path]
    for path in life.rng.sample(programs, min(5, len(programs))) + train:
        if os.path.exists(path):
            how = _damage(life, path, life.rng.choice(('truncated', 'zeroed', 'a bit flipped')))
            fault.moment = how
    yield START
    yield END
    life.cache = os.path.join(life.shared, 'cache')


def _corrupt_image(life, fault):
    own = os.path.join(life.folder, 'data')
    if not os.path.isdir(own):
        runs.copy(life.data, own)
    life.data = own
    path = life.rng.choice(files(os.path.join(own, 'images')))
    good = f'{life.folder}/good.png'
    shutil.copy(path, good)
    # A flipped bit may be seen by nobody: PNG's checksum is not looked at by all readers, and the
    # picture is another one then.
    fault.moment = _damage(life, path, life.rng.choice(('truncated', 'zeroed')))
    fault.allows.add(REFUSED)
    yield START
    yield END
    shutil.move(good, path)


# What a run writes to.


def _full_disk(life, fault):
    yield START
    fault.moment = yield from life.moment('start', 'step', 'step', 'save')
    if fault.moment:
        left = life.rng.choice((0, 4096, 65536, 300_000))
        life.fill_disk(left)
        fault.moment += f', {left} bytes left'
        fault.allows.add(REFUSED)
    yield END
    life.empty_disk()


def _full_disk_at_the_start(life, fault):
    left = life.rng.choice((0, 0, 4096, 65536, 300_000))
    life.fill_disk(left)
    fault.moment = f'before the start, {left} bytes left'
    fault.allows.add(REFUSED)
    yield START
    yield END
    life.empty_disk()


def _full_disk_with_tensorboard(life, fault):
    life.more = ('--tracker=tensorboard',)
    yield from _full_disk(life, fault)


def _quota(life, fault):
    limit = life.rng.choice((300, 1500, 4000, 20_000, 100_000, 300_000))
    life.hooks = life.hooks._replace(file_size=limit)
    fault.moment = f'files of {limit} bytes'
    fault.allows.add(REFUSED)
    yield START
    yield END


def _read_only(life, fault):
    os.makedirs(life.workdir, exist_ok=True)
    life.hooks = life.hooks._replace(obeys=True)
    _set_rights(life.workdir, 0o555)
    fault.moment = 'before the start'
    fault.allows.add(REFUSED)
    yield START
    yield END
    _set_rights(life.workdir, 0o755)


def _set_rights(folder, rights):
    """Sets those of a folder and of all folders in it."""
    for place, _, _ in os.walk(folder):
        with contextlib.suppress(FileNotFoundError):  # a save goes on
            os.chmod(place, rights)


def _turns_read_only(life, fault):
    os.makedirs(life.workdir, exist_ok=True)
    life.hooks = life.hooks._replace(obeys=True)
    yield START
    fault.moment = yield from life.moment('start', 'step', 'save')
    if fault.moment:
        _set_rights(life.workdir, 0o555)
        fault.allows.add(REFUSED)
    yield END
    _set_rights(life.workdir, 0o755)


def _vanishes(life, fault):
    gone = os.path.join(life.disk, 'gone')
    yield START
    fault.moment = yield from life.moment('start', 'step', 'save')
    if fault.moment and os.path.isdir(life.workdir):
        os.rename(life.workdir, gone)
        fault.allows.add(REFUSED)
    else:
        fault.moment = ''
    yield END
    if os.path.isdir(gone):
        shutil.rmtree(life.workdir, ignore_errors=True)
        os.rename(gone, life.workdir)


# Within the process.


def _poisoned(where):
    def act(life, fault):
        step = min(max([0, *life.steps()]) + life.rng.randrange(6), runs.STEPS - 1)
        value = life.rng.choice((float('nan'), float('inf'), float('-inf')))
        if where == 'perturbed gradient':
            # Between its ascents LookSAM logs rho and does not use it.
            of = life.setup.method
            climbs = [i for i in range(runs.STEPS) if sharpness.gradients(of, i) != 1]
            step = min((i for i in climbs if i >= step), default=climbs[-1])
            value = abs(value)
        life.hooks = life.hooks._replace(poison=(where, step, value))
        fault.moment = f'{value} at step {step + 1}'
        fault.allows.add(REFUSED)
        yield START
        yield END

    return act


def _clock(life, fault):
    step = min(max([0, *life.steps()]) + life.rng.randrange(6), runs.STEPS - 1)
    seconds = life.rng.choice((-1, 1)) * life.rng.choice((1.0, 3600.0, 86400.0 * 400))
    life.hooks = life.hooks._replace(clock=(step, seconds))
    fault.moment = f'{seconds:+.0f} s before step {step + 1}'
    yield START
    yield END


def _memory(life, fault):
    yield START
    fault.moment = yield from life.moment('start', 'step', 'save')
    if fault.moment:
        more = life.rng.choice((0, 1 << 20, 8 << 20, 64 << 20))
        for process in life.processes:
            if process.poll():
                process.limit_memory(more)
        fault.moment += f', {more >> 20} MiB more'
        fault.allows |= {REFUSED, *CRASHES}
    yield END


def _alone(life):
    return life.setup.processes == 1


def _together(life):
    return life.setup.processes > 1


def _on_small_disk(life):
    return life.small_disk


def _climbs(life):
    return bool(sharpness.METHODS[life.setup.method].norm)


# Each keeps a copy of what it damages, and one of them would keep what the other has damaged.
EXCLUSIVE = {'damaged checkpoint', 'all checkpoints damaged'}

KINDS = {
    'SIGKILL of one process': Kind(_kill_one, 3, True, _together),
    'SIGKILL of all processes': Kind(_kill_all, 4, True),
    'SIGKILL during a save': Kind(lambda life, fault: _kill_all(life, fault, 'save'), 3, True),
    'SIGKILL during a cold start': Kind(
        _kill_cold, 1, True, lambda life: _alone(life) and not life.setup.streams
    ),
    'coordinator gone': Kind(_coordinator_gone, 1, True, _together),
    'storm of SIGTERM': Kind(_terms, 3, True),
    'SIGINT': Kind(_interrupt, 1, True, _alone),
    'SIGSTOP, then SIGCONT': Kind(_stop_and_go_on, 2),
    'a process hangs': Kind(_hang, 0.5, True, _together),
    'damaged checkpoint': Kind(_damaged_checkpoint, 6, False, _has_checkpoint),
    'all checkpoints damaged': Kind(_all_checkpoints_damaged, 1, True, _has_checkpoint),
    'stray files': Kind(_stray_files, 1, False),
    'damaged metrics.jsonl': Kind(_damaged_metrics, 2, False, _has_metrics),
    'damaged config.json': Kind(_damaged_config, 2, False, _has_config),
    'damaged compile cache': Kind(_damaged_cache, 0.4, False),
    'corrupt image': Kind(_corrupt_image, 2, True, lambda life: life.setup.streams),
    'full disk': Kind(_full_disk, 3, True, _on_small_disk),
    'full disk at the start': Kind(_full_disk_at_the_start, 1, True, _on_small_disk),
    'full disk, TensorBoard': Kind(
        _full_disk_with_tensorboard,
        0.3,
        True,
        lambda life: life.small_disk and _alone(life) and not life.setup.streams,
    ),
    'files too large (quota)': Kind(_quota, 2, True),
    'read-only workdir': Kind(_read_only, 1, True),
    'workdir turns read-only': Kind(_turns_read_only, 1, True),
    'workdir vanishes': Kind(_vanishes, 2, True),
    'not finite: batch': Kind(_poisoned('batch'), 0.5, True),
    'not finite: gradient': Kind(_poisoned('gradient'), 1.5, True),
    'not finite: perturbed gradient': Kind(_poisoned('perturbed gradient'), 1.5, True, _climbs),
    'clock jumps': Kind(_clock, 2, False),
    'out of memory': Kind(_memory, 2, True),
}
