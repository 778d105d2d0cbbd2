"""Random input for everything that is read; prints how it ended, and the least case of each fault.

    python scripts/fuzz.py --kind=settings --cases=2000 --seed=0
    python scripts/fuzz.py --kind=train --minutes=30
    python scripts/fuzz.py --kind=files --case="{'form': 'png', ...}"

Kinds: `settings` are refused by a sentence or start, without compilation, as are `keys`, of which
one is odd; `traces` are traced, too; `train` are two steps, resumed and on two devices; `commands`
are command lines; `files` are damaged files of each form. With --minutes it stops after so long.
Ends with status 1 if there was a fault.
"""

import argparse
import ast
import collections
import os
import pathlib
import re
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
import quick

# As tests have it: quick to compile, two devices and more.
os.environ.setdefault('XLA_FLAGS', quick.flags(devices=4))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')  # a run is resumed
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(pathlib.Path.home() / '.cache/sam_jax/fuzz'))

import hypothesis
from fuzzing import OUTCOMES, isolated, kinds


def main() -> int:
    """Runs what the flags say; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--kind', choices=sorted(kinds.KINDS), default='settings')
    parser.add_argument('--cases', type=int, default=1000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--minutes', type=float, default=float('inf'))
    parser.add_argument('--case', type=ast.literal_eval, help='one case, as a fault prints it')
    flags = parser.parse_args()
    kind = kinds.KINDS[flags.kind]
    if flags.case:
        kind.check(flags.case)
        print(dict(OUTCOMES))
        return 0
    told = time.time()
    end, faults, count = time.time() + 60 * flags.minutes, collections.defaultdict(list), 0

    def run(case):
        nonlocal count, told
        if time.time() > end:
            return
        count += 1
        try:
            if kind.isolated:
                OUTCOMES.update(isolated.call(kind.check, case, kind.seconds))
            else:
                kind.check(case)
        except Exception as e:
            key = _place(e)
            if key not in faults:
                print(f'case {count}: {type(e).__name__}: {str(e)[:400]}\n  {case}', flush=True)
            faults[key].append(case)
        if time.time() > told + 20:
            told = time.time()
            print(f'{count} cases: {_counts()}', flush=True)

    began = time.time()
    test = hypothesis.given(kind.cases())(run)
    settings = hypothesis.settings(
        max_examples=flags.cases,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    settings(hypothesis.seed(flags.seed)(test))()
    print(f'{count} cases of {flags.kind} in {time.time() - began:.0f} s: {_counts()}')
    for key, cases in faults.items():
        print(f'\n{len(cases)} times {key}:\n  {min(cases, key=lambda case: len(str(case)))}')
    return 1 if faults else 0


def _place(error):
    """What went wrong, and where in the code: the same for one fault in all of its cases."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f'{ROOT}/sam_jax' in f.filename] or frames
    where = f'{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}'
    message = re.sub(r'\S*/fuzz-\w+/|[0-9]+', '', ' '.join(str(error).split()))
    return f'{type(error).__name__} at {where}: {message[:100]}'


def _counts():
    return ', '.join(f'{n} {outcome}' for outcome, n in OUTCOMES.most_common())


if __name__ == '__main__':
    sys.exit(main())
