"""Command lines: flags that are unknown, of another type, extreme or empty; stray words.

A process of each command imports it once and forks for each command line. It answers an error with
one line on stderr and status 2. Where it would begin to compute or to start runs it is accepted.
"""

import functools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile

from hypothesis import strategies as st

from fuzzing import OUTCOMES, Fault, check_sentence
from fuzzing.files import PUBLISHED, ROOT, encoded
from sam_jax import settings

ACCEPTED, SECONDS = 77, 300

# {command: (its module, whether it takes words that are no flags)}.
COMMANDS = {
    'train': ('main', False),
    **{name: (f'cli.{name}', False) for name in ('sweep', 'analyze', 'predict', 'preview')},
    **{name: (f'cli.{name}', False) for name in ('compile', 'doctor')},
    **{name: (f'cli.{name}', True) for name in ('report', 'figure', 'export', 'evaluate')},
}

SERVER = """
import importlib, json, os, sys
module = importlib.import_module('sam_jax.' + sys.argv[1])
from absl import flags
import jax
from jax._src import compiler
from sam_jax.experiments import engines
def accepted(*args, **kwargs):
    sys.stderr.flush()
    os._exit(ACCEPTED)
compiler.compile_or_get_cached = engines.execute = accepted
names = sorted(flags.FLAGS.flags_by_module_dict().get(module.__name__, []), key=lambda f: f.name)
print(json.dumps([f.name for f in names]), flush=True)
for line in sys.stdin:
    argv, folder = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        null = os.open('/dev/null', os.O_RDONLY)
        file = os.open('said', os.O_CREAT | os.O_WRONLY)
        os.dup2(null, 0), os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = ['sam-jax', *argv]
        code = 0
        try:
            module.run()
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 98)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(status), flush=True)
"""


@functools.cache
def server(command: str) -> tuple[subprocess.Popen, list[str]]:
    """Returns (the process of a command, the names of its flags)."""
    process = subprocess.Popen(
        [sys.executable, '-c', SERVER.replace('ACCEPTED', str(ACCEPTED)), COMMANDS[command][0]],
        cwd=ROOT,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    return process, json.loads(process.stdout.readline())


# What a shell may pass, and names of files that are there, see `_place`.
VALUES = st.sampled_from(
    [
        *('', 'abc', '-1', '0', '1', '2', '1.5', '1e400', 'nan', 'inf', '9' * 30, 'true', 'False'),
        *('a,b', ',', ';', '=', ':', '1:2', '2:1', '1:', '--', '-', ' ', 'a\nb', 'é', '\udcff'),
        *('digits', 'digits:smoke', 'digits:x=1', 'cifar', 'configs/none.py', 'x.py', '../x', '~'),
        *('net', 'images', 'images/a.png', 'broken', 'empty', 'x.npz', '/dev/null', 'no/where'),
        *('out.csv', 'out.json', 'out.png', 'sam.rho=0.1,0.2', 'sam.rho=', ':seed=1', 'seed=1;'),
        *('test', 'train', 'spectrum', 'tensorboard', 'wandb', 'print', 'here', 'cpu:1', 'tpu:v5e'),
        *('table-1', '3-right', 'tpu:v5e:2x4', 'cpu:0', 'gpu:h100:x', 'float16', 'x' * 3000),
    ]
)
_WORDS = st.sampled_from(['--help=x', '--x', '-', '--=', '--config', '--no', '--flagfile=net', '='])


@st.composite
def cases(draw) -> dict:
    """A case: {'command', 'argv'}."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    names = server(command)[1]
    argv = []
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.integers(0, 9))
        if kind < 6 and names:
            argv.append(f'--{draw(st.sampled_from(names))}={draw(VALUES)}')
        elif kind == 6 and 'config' in names:
            key = draw(st.sampled_from(sorted(settings.KEYS)))
            argv.append(f'--config.{key}={draw(VALUES)}')
        elif kind == 7:
            argv.append(draw(_WORDS))
        elif kind == 8 and names:
            argv += [f'--{draw(st.sampled_from(names))}', draw(VALUES)]
        else:
            argv.append(draw(VALUES))
    return {'command': command, 'argv': argv}


@functools.cache
def _files():
    folder = tempfile.mkdtemp(prefix='fuzz-')
    shutil.copytree(PUBLISHED, f'{folder}/net')
    for name in ('images', 'broken', 'empty'):
        os.mkdir(f'{folder}/{name}')
    with open(f'{folder}/images/a.png', 'wb') as file:
        file.write(encoded('png'))
    with open(f'{folder}/broken/config.json', 'w') as text:
        text.write('{"config": {"seed": 0')
    with open(f'{folder}/broken/result.json', 'w') as text:
        text.write('{')
    with open(f'{folder}/x.npz', 'wb') as file:
        file.write(b'PK')
    return folder


def check(case: dict) -> None:
    """Runs a command line as far as computing.

    Raises:
      Fault: a traceback, another status than 0, 1 and 2, or no sentence.
    """
    process, _ = server(case['command'])
    assert process.stdin and process.stdout
    with tempfile.TemporaryDirectory(prefix='fuzz-') as folder:
        place = f'{folder}/place'
        shutil.copytree(_files(), place)
        process.stdin.write(json.dumps([case['argv'], place]) + '\n')
        process.stdin.flush()
        if not select.select([process.stdout], [], [], SECONDS)[0]:
            process.kill()
            server.cache_clear()
            raise Fault(f'hangs: {SECONDS} s')
        status = json.loads(process.stdout.readline())
        with open(f'{place}/said', errors='replace') as file:
            said = file.read()
    if 'Traceback' in said or status not in (0, 1, 2, ACCEPTED):
        raise Fault(f'status {status}: {said[-600:]}')
    lines = said.strip().splitlines()
    if status == 2:
        if not lines or not lines[-1].startswith('error: '):
            raise Fault(f'no line of an error: {said[-300:]!r}')
        check_sentence(lines[-1])
    OUTCOMES[{ACCEPTED: 'accepted', 2: 'refused', 1: 'failed', 0: 'done'}[status]] += 1
