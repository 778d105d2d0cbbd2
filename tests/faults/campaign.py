"""A campaign of faults on real runs.

    python scripts/faults.py --minutes=20 --seed=0 --out=FOLDER

Each run of 24 steps is started, disturbed, started again, and so on until it has ended; then its
last checkpoint, its metrics.jsonl and its result.json are compared with those of the same run left
alone. FOLDER/faults.jsonl gets a line for each fault, FOLDER/faults.md a table; a run that was lost
leaves its folder. Given again, it goes on. --life=N does one life again.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib
import itertools
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from faults import kinds, runs
from faults.life import Fault, Life, Waiting
from faults.process import LEFT_OUT
from sam_jax import run_log

MISSED, FAILED = 'missed', 'FAILED'
IDENTICAL = 'went on, bit-identical'
REFUSED = 'ended with one sentence, then bit-identical'
NOT_COMPARED = 'went on; the run was lost later'
ABORTED = 'aborted by XLA or JAX, then bit-identical'
WATCHED = 'ended by --hang_minutes, then bit-identical'
LINES = 'lines of metrics.jsonl lost, and said so; else bit-identical'

ENDED = (-signal.SIGKILL, -signal.SIGTERM)
_TRACES = ('Traceback (most recent call last)', 'Fatal Python error', 'Segmentation fault')


def live(life: Life, undisturbed: Waiting, only: Sequence[str] = ()) -> Waiting:
    """Lives a life.

    Args:
      life: Life.
      undisturbed: finds the End of the run if it is left alone.
      only: names of kinds; default all.

    Returns:
      Its faults, each with an outcome.
    """
    faults: list[Fault] = []
    alone = yield from undisturbed
    starts = life.rng.randint(3, 7) if life.setup.processes == 1 else life.rng.randint(1, 3)
    for start in range(starts + 1):
        drawn = _draw(life, only) if start < starts else []
        faults += drawn
        problem = yield from _round(life, drawn)
        if problem:
            for fault in [f for f in drawn if f.moment] or drawn or faults[-1:]:
                fault.outcome = f'{FAILED}: {problem}'
            for fault in faults:
                fault.outcome = fault.outcome or (NOT_COMPARED if fault.moment else MISSED)
            return faults
        if _finished(life):
            break
    damaged = any(fault.lines and fault.moment for fault in faults)
    problem, lost = yield from _compare(life, alone, damaged)
    for fault in faults:
        if not fault.moment:
            fault.outcome = MISSED
        elif problem:
            fault.outcome = f'{FAILED}: {problem}'
        elif fault.lines:
            fault.outcome = LINES if lost else IDENTICAL
        elif not fault.outcome:
            fault.outcome = IDENTICAL
    return faults


def _draw(life, only):
    """Up to four kinds for one start; one of them at most may end the processes."""
    drawn, ending = {}, False
    for _ in range(life.rng.choice((1, 2, 3, 3, 4))):
        fitting = {
            name: kind
            for name, kind in kinds.KINDS.items()
            if name not in drawn
            and not (kind.ends and ending)
            and not {name, *drawn} >= kinds.EXCLUSIVE
            and kind.fits(life)
            and (not only or name in only)
        }
        if fitting:
            weights = [kind.weight for kind in fitting.values()]
            (name,) = life.rng.choices(list(fitting), weights)
            drawn[name] = fitting[name]
            ending |= drawn[name].ends
    return [Fault(name) for name in drawn]


def _round(life, faults):
    """One start with its faults; returns what is wrong, or ''."""
    acts = [kinds.KINDS[fault.kind].act(life, fault) for fault in faults]
    for act in acts:
        _until(act, kinds.START)
    life.start()
    going = list(acts)
    try:
        waiting = life.wait()
        while True:
            going = [act for act in going if next(act) != kinds.END]
            try:
                next(waiting)
            except StopIteration as done:
                problem = done.value
                break
            yield
        for act in going:  # the run has ended: they see it
            _until(act, kinds.END)
        problem = problem or _judge(life, faults)
    finally:
        life.close()
    for act in acts:
        for _ in act:  # mend
            pass
    return problem


def _until(act, mark):
    for said in act:
        if said == mark:
            return


def _judge(life, faults):
    """Looks at how the processes have ended; notes it in the faults, and returns what is wrong."""
    allowed = {0}.union(*(fault.allows for fault in faults if fault.moment))
    if life.killed_by_launcher:
        allowed.add(-signal.SIGKILL)
    if len(life.processes) > 1 and {p.status for p in life.processes} & {kinds.REFUSED, *ENDED}:
        allowed.add(-signal.SIGABRT)  # JAX aborts the others
    others = [process for process in life.processes if not _watched(process)]
    watched = len(others) < len(life.processes)
    if watched:
        allowed |= {-signal.SIGABRT, kinds.REFUSED}
    for process in others:
        aborted = process.status in kinds.CRASHES and process.status in allowed
        for trace in _TRACES:
            # Where memory is used up in C++, and where JAX learns that another process is gone,
            # it aborts, and Python tells where it was.
            if trace in process.text and not (aborted and trace == 'Fatal Python error'):
                return f'it said {trace!r}'
        if process.status not in allowed:
            return f'it ended with status {process.status}'
        errors = [line for line in process.text.splitlines() if line.startswith('error: ')]
        if len(errors) != (process.status == kinds.REFUSED) and not (aborted and len(errors) == 1):
            return f'it ended with status {process.status} and {len(errors)} lines "error: "'
    sentences = [line for line in life.text.splitlines() if _tells(line)]
    aborted_some = any(process.status in kinds.CRASHES for process in life.processes)
    refused = any(process.status == kinds.REFUSED for process in life.processes)
    for fault in faults:
        if watched and fault.moment:
            fault.outcome = WATCHED
        elif fault.moment and (fault.allows or 'damaged' in fault.kind):
            fault.said = sentences[-1] if sentences else ''
            if refused and kinds.REFUSED in fault.allows:
                fault.outcome = REFUSED
            elif aborted_some and kinds.CRASHES & fault.allows:
                fault.outcome = ABORTED
            if life.killed_by_launcher:
                fault.said += ' (the others were ended after a minute, as launch_local.sh does)'
    return ''


def _watched(process):
    """Whether it stood still and its watchdog has ended it."""
    return process.status == 1 and 'Timeout (0:' in process.text


def _tells(line):
    words = ('damaged', 'Stopped by', 'Interrupted', 'metrics.jsonl', 'compilation cache')
    return line.startswith('error: ') or any(word in line for word in words)


def _finished(life):
    return os.path.exists(os.path.join(life.workdir, 'result.json'))


def _compare(life, alone, damaged):
    """Compares what a run has ended in with what it ends in if it is left alone.

    With `damaged` lines of metrics.jsonl may be missing, if a start has said so; what is there is
    right but for a damaged value. Returns (what is wrong or '', whether lines are missing).
    """
    try:
        end = yield from runs.end(life.workdir)
    except (OSError, ValueError, TypeError) as e:
        return f'what the run left cannot be read: {e}', False
    lost = damaged and end.lines != alone.lines
    if lost and not life.named_metrics:
        return 'lines of metrics.jsonl are lost, and nothing said so', True
    if lost:
        steps = [line['step'] for line in end.lines]
        if steps != sorted(steps):
            return 'the lines of metrics.jsonl are in disorder', True
        end = end._replace(lines=alone.lines)
    return end.differs(alone), lost


# The whole.


def life_of(number: int, seed: int, out: str, names: Sequence[str] = ()) -> Life:
    """Returns the life of a number; all that is random in it is a function of seed and number.

    `names` are those of the setups among which one is drawn; default all.
    """
    rng = random.Random(f'{seed}/{number}')
    setups = [setup for setup in runs.SETUPS if not names or setup.name in names]
    (setup,) = rng.choices(setups, [setup.weight for setup in setups])
    return Life(os.path.join(out, f'life-{number}'), setup, rng, out)


def reference(setup: runs.Setup, folder: str, out: str) -> Waiting:
    """Returns how a run ends that is left alone; trains it where that is not known yet.

    Args:
      setup: Setup.
      folder: where it is trained.
      out: folder of the campaign.

    Raises:
      RuntimeError: it does not end well.
    """
    path = os.path.join(out, 'reference', setup.name.replace(' ', '_') + '.json')
    if not os.path.exists(path):
        life = Life(folder, setup, random.Random(0), out)
        try:
            problem = yield from _round(life, [])
            if problem:
                raise ValueError(problem)
            found = yield from runs.end(life.workdir)
        except (OSError, ValueError) as e:
            raise RuntimeError(f'{setup.name} does not end well, see {folder}: {e}') from e
        life.leave(keep=False)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        run_log.write_json(path, found._asdict())
    return runs.read_end(path)


def read(out: str) -> list[dict[str, Any]]:
    """Returns the faults of a campaign so far, as faults.jsonl has them."""
    path = os.path.join(out, 'faults.jsonl')
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith('}\n')]


def forget_lost(out: str) -> None:
    """Takes lives that were lost out of faults.jsonl, so that they are lived again."""
    faults = read(out)
    lost = {fault['life'] for fault in faults if fault['outcome'].startswith(FAILED)}
    with open(os.path.join(out, 'faults.jsonl'), 'w') as file:
        file.writelines(json.dumps(f) + '\n' for f in faults if f['life'] not in lost)


def table(faults: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table of the outcomes by kind, of faults that came to it."""
    names = (IDENTICAL, REFUSED, ABORTED, WATCHED, LINES, FAILED)
    counts = collections.defaultdict(collections.Counter)
    for fault in faults:
        if fault['outcome'] != MISSED:
            for kind in (fault['kind'], 'all'):
                counts[kind][fault['outcome'].partition(':')[0]] += 1
    head = ['kind', 'faults', *names]
    rows = [
        [kind, sum(counts[kind].values()), *(counts[kind][name] for name in names)]
        for kind in (*kinds.KINDS, 'all')
        if kind in counts
    ]
    lines = [head, ['---', *['---:'] * (len(head) - 1)], *rows]
    return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines)


def _record(out, number, life, faults, seconds):
    with open(os.path.join(out, 'faults.jsonl'), 'a') as file:
        for i, fault in enumerate(faults):
            content = {
                'life': number,
                'fault': i,
                'setup': life.setup.name,
                **{k: v for k, v in dataclasses.asdict(fault).items() if k not in ('allows',)},
                'seconds': round(seconds, 1),
            }
            file.write(json.dumps(content) + '\n')
    with open(os.path.join(out, 'faults.md'), 'w') as file:
        file.write(table(read(out)))


def campaign(
    out: str,
    minutes: float,
    seed: int,
    lives: int | None = None,
    at_once: int = 2,
    only: Sequence[str] = (),
    one: int | None = None,
    setups: Sequence[str] = (),
) -> int:
    """Throws faults for so long; returns how many runs were lost.

    Args:
      out: folder of the campaign; what is in it already is not done again.
      minutes: after which no further life begins.
      seed: of all that is random.
      lives: how many lives at most.
      at_once: how many lives are lived at once.
      only: names of kinds; default all.
      one: the number of one life, which is lived again and alone.
      setups: names of setups; default all.
    """
    runs.write_data(os.path.join(out, 'data'))
    os.makedirs(os.path.join(out, 'cache'), exist_ok=True)
    os.chmod(os.path.join(out, 'cache'), 0o777)  # of those who are not root, too
    done = {fault['life'] for fault in read(out)}
    numbers = itertools.count() if lives is None else range(lives)
    todo = (n for n in numbers if n not in done) if one is None else iter([one])
    end, lost = time.monotonic() + 60 * minutes, 0
    going: list[tuple[int, Life, Any, float]] = []
    try:
        while True:
            if len(going) < at_once and time.monotonic() < end:
                number = next(todo, None)
                if number is not None:
                    life = life_of(number, seed, out, setups)
                    lived = live(life, reference(life.setup, f'{life.folder}-alone', out), only)
                    going.append((number, life, lived, time.monotonic()))
            if not going:
                return lost
            for entry in list(going):
                number, life, lived, since = entry
                try:
                    next(lived)
                except StopIteration as finished:
                    going.remove(entry)
                    failed = [f for f in finished.value if f.outcome.startswith(FAILED)]
                    lost += bool(failed)
                    life.leave(keep=bool(failed))
                    _record(out, number, life, finished.value, time.monotonic() - since)
                    for fault in failed:
                        where = f'life {number} ({life.setup.name})'
                        print(f'{where}: {fault.kind}, {fault.moment}: {fault.outcome}', flush=True)
            time.sleep(0.008)
    finally:
        for _, life, lived, _ in going:
            lived.close()
            life.close()
            life.leave(keep=False)


def _prepare():
    """Imports what a run needs, so that its process has it; TensorFlow stays out but for one."""
    for name in LEFT_OUT:
        sys.modules.setdefault(name, None)  # pyright: ignore[reportArgumentType]
    for name in ('sam_jax.main', 'faults.hooked', 'orbax.checkpoint', 'grain', 'PIL.Image'):
        importlib.import_module(name)
    logging.getLogger('absl').setLevel(logging.WARNING)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--minutes', type=float, default=10.0, help='after which none begins')
    parser.add_argument('--seed', type=int, default=0, help='of all that is random')
    parser.add_argument('--out', default='/tmp/sam_jax_faults', help='folder of the campaign')
    parser.add_argument('--lives', type=int, help='the most runs')
    parser.add_argument('--at_once', type=int, default=2, help='runs at once')
    parser.add_argument('--only', action='append', default=[], help='a kind; may be repeated')
    parser.add_argument('--setup', action='append', default=[], help='a setup; likewise')
    parser.add_argument('--life', type=int, help='the number of one life, to live it again')
    parser.add_argument('--again', action='store_true', help='live lost lives again')
    given = parser.parse_args(argv)
    known = {'only': [*kinds.KINDS], 'setup': [setup.name for setup in runs.SETUPS]}
    for flag, names in known.items():
        for name in getattr(given, flag):
            if name not in names:
                parser.error(f'--{flag} is {name!r}; there are: {"; ".join(names)}.')
    out = os.path.abspath(given.out)
    os.makedirs(out, exist_ok=True)
    if given.again:
        forget_lost(out)
    _prepare()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        lost = campaign(
            out,
            given.minutes,
            given.seed,
            given.lives,
            given.at_once,
            given.only,
            given.life,
            given.setup,
        )
        print(table(read(out)))
        sys.exit(int(lost > 0))
