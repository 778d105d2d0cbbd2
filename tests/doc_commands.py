"""The commands that README, the pages and the configs show, tried without what they would start.

`shown` finds them in a text and `problems` says what is wrong with each. A command is parsed as
`python -m` would do it: by its own flags. Its config is made and checked; the runs of a sweep are
made. Importing takes longest, so all is one process that forks, for each module and each command.
"""

import ast
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib

from helpers import ROOT

SCRIPTS = {
    name: entry.partition(':')[0]
    for name, entry in tomllib.loads((ROOT / 'pyproject.toml').read_text())['project'][
        'scripts'
    ].items()
}
BEGIN = (
    r'(?:[A-Z_]+=\S+ |taskset -c \S+ )*'
    r'(?:sam-jax-\w|\./scripts/\w|python -m sam_jax\.|configs/\w+\.py\b)'
)
# What stands for something of the reader's; files of these names are made for the commands.
PLACEHOLDERS = {
    r'\bHOST:PORT\b': 'localhost:1',
    r'\bN\b': '2',
    r'\bI\b': '0',
    r'\bCONFIG\b': 'configs/digits.py',
    r'\bZONE\b': 'us-central2-b',
}
MINE = 'from configs import digits\n\n\ndef get_config():\n    return digits.get_config()\n'


def shown(text: str) -> list[str]:
    """Returns the commands of a text: lines of blocks, indented or fenced, and inline code."""
    fences = re.findall(r'^ *```\w*\n(.*?)^ *```', text, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r'^ {4,}.*$', text, re.MULTILINE)
    inline = re.findall(rf'`({BEGIN}[^`\n]*)`', text)
    lines = re.sub(r'\\\n\s*', '', '\n'.join(blocks + fences + inline)).splitlines()
    commands = []
    for line in dict.fromkeys(x.strip() for x in lines):
        if re.match(BEGIN, line):
            commands += [part for part in re.split(r' & ', line) if re.match(BEGIN, part)]
    return commands


def split(command: str) -> tuple[str, list[str]]:
    """Returns (a module or a script, its arguments), placeholders replaced."""
    for placeholder, value in PLACEHOLDERS.items():
        command = re.sub(placeholder, value, command)
    words = [w.strip('[]') for w in shlex.split(command, comments=True)]
    words = [re.sub(r'[,:]\.\.\.', '', w) for w in words if w != '...']
    while not re.match(r'sam-jax-|\./|python$|configs/', words[0]):
        del words[0]  # variables of the environment, taskset
    if words[0] == 'python':
        return words[2], words[3:]
    if words[0].startswith('configs/'):  # 'train.sh' is said once above the table
        return './scripts/train.sh', words
    return SCRIPTS.get(words[0], words[0]), words[1:]


def _script(name, arguments):
    """Returns (what is wrong with a script's command, the flags it hands to sam_jax.main)."""
    file = ROOT / name
    if not os.access(file, os.X_OK):
        return f'{name} is not there', None
    stem = file.stem
    if stem == 'docs':
        task = arguments[0] if arguments else 'build'
        known = re.search(rf'^  {re.escape(task)}\)', file.read_text(), re.MULTILINE)
        return '' if known else f'docs.sh has no task {task!r}', None
    if not stem.startswith(('train', 'launch')):
        return '', None
    if stem.startswith('launch'):
        done = subprocess.run(
            [file, *arguments[:1], '--dry_run', *arguments[1:]], capture_output=True, text=True
        )
        if done.returncode:
            return done.stderr.strip(), None
    config = next((a for a in arguments if re.match(r'[a-z]\S*$', a)), 'configs/digits.py')
    flags = [a for a in arguments if a.startswith('--')]
    if stem != 'train':  # the others are the launcher's own
        flags = [a for a in flags if re.match(r'--(workdir|config)\b', a)]
    return '', [f'--config={config}', '--workdir=DIR', *flags]


def problems(commands: list[str], folder) -> list[str]:
    """Returns what is wrong with each command, or ''.

    Args:
      commands: as `shown` returns them.
      folder: an empty one, a pathlib.Path, for the process and what it writes.
    """
    answers, argvs = [''] * len(commands), {}
    for i, command in enumerate(commands):
        name, arguments = split(command)
        if name.startswith('./'):
            answers[i], arguments = _script(name, arguments)
            name = 'sam_jax.main'
        if arguments is not None:
            argvs.setdefault(name, []).append((i, arguments))
    here = folder / 'here'
    (here / 'my').mkdir(parents=True)
    (here / 'my' / 'config.py').write_text(MINE)
    (here / 'mine.py').write_text(MINE)
    path = os.pathsep.join([str(ROOT), str(ROOT / 'tests'), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, __file__, str(folder / 'answers')],
        input=json.dumps(argvs),
        cwd=here,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': path},
    )
    assert done.returncode == 0, done.stderr
    for i, answer in json.loads((folder / 'answers').read_text()):
        answers[i] = answer
    return answers


# What runs in the process.


class Parsed(BaseException):
    """The command line was read: all that follows would start something."""


def _forked(call):
    """Returns what call() returns, text or lists of it, from a process of its own."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        try:
            answer = call()
        except BaseException as e:
            answer = f'{type(e).__name__}: {e}'
        with os.fdopen(send, 'w') as file:
            json.dump(answer, file)
        os._exit(0)  # at once: taking down what was imported takes longest
    os.close(send)
    with os.fdopen(receive) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else 'the process ended'


def _try(module, argv):
    """Says what is wrong with the arguments of a module, or ''."""
    import argparse
    import contextlib
    import io
    import runpy

    from absl import app, flags

    from sam_jax import settings, sharpness
    from sam_jax.analysis import study
    from sam_jax.experiments import engines

    def parse(main, argv=None, flags_parser=None):
        rest = flags_parser(sys.argv) if flags_parser else flags.FLAGS(sys.argv)
        if rest[1:] and not module.endswith(('.report', '.figure', '.export', '.evaluate')):
            raise ValueError(f'{rest[1]!r} is no flag')
        if sys.argv[1:] and module.endswith(('.sweep', '.jobset')):  # not where it is only named
            main(rest)  # a sweep as far as `execute`
        known = flags.FLAGS
        if 'config' in known:
            settings.check(known.config)
        if 'methods' in known and set(known.methods or ()) - {*sharpness.METHODS}:
            raise ValueError(f'--methods={known.methods}')
        if module.endswith('.analyze'):
            study.Settings(tuple(known.what))
        raise Parsed

    def stop(*args, **kwargs):
        raise Parsed

    read = argparse.ArgumentParser.parse_args
    app.run, engines.execute = parse, stop
    argparse.ArgumentParser.parse_args = lambda self: stop(read(self))
    sys.argv = [module, *argv]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            runpy.run_module(module, run_name='__main__', alter_sys=True)
    except Parsed:
        return ''
    except SystemExit as e:
        return said.getvalue().strip() or f'it ends with {e.code}'
    return f'it ran: {said.getvalue()}'


def _try_all(module, commands):
    """Imports what the module imports, once, and tries its commands: [(number, what is wrong)]."""
    file = ROOT / f'{module.replace(".", "/")}.py'
    for node in ast.parse(file.read_text()).body if file.exists() else ():
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(ast.unparse(node), {})
    return [(i, _forked(functools.partial(_try, module, argv))) for i, argv in commands]


def main():
    """Reads {module: [(number, arguments)]}, writes [(number, what is wrong)]."""
    import sam_jax.analysis.study
    import sam_jax.cli.commands
    import sam_jax.experiments.engines  # noqa: F401

    answers = []
    for module, commands in json.load(sys.stdin).items():
        answers += _forked(functools.partial(_try_all, module, commands))
    with open(sys.argv[1], 'w') as file:
        json.dump(answers, file)


if __name__ == '__main__':
    main()
