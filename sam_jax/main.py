"""Command line.

    python -m sam_jax.main --config=configs/digits.py --workdir=DIR [--config.sam.rho=0.1]
"""

import importlib.util
import logging
import os
import re
import sys

from absl import app, flags
from ml_collections import config_flags

from sam_jax import config as config_lib
from sam_jax import distributed, train
from sam_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'File with get_config(), e.g. configs/digits.py:noise=0.4.',
    lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of the run; give it again to resume.')
_COORDINATOR = flags.DEFINE_string(
    'coordinator_address', '', 'host:port of process 0; not needed on TPU pods and under Slurm.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'Processes of the run.')
_PROCESS_ID = flags.DEFINE_integer('process_id', -1, 'Number of this process.')

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 143  # what a shell reports of a process that SIGTERM ended


def _parse(argv):
    """absl's parser, with one sentence for what it or ml_collections would answer at length."""
    try:
        _check_config_flags(argv)
        return flags.FLAGS(argv)
    except UserError as e:
        _exit(str(e))
    except (flags.Error, ValueError) as e:
        _exit(' '.join(str(e).split()))


def _check_config_flags(argv):
    """Checks the file of --config and the names of the --config.KEY flags."""
    given = dict(re.fullmatch(r'--?(config[^=]*)(?:=(.*))?', a, re.DOTALL).groups()
                 for a in argv if re.match(r'--?config(?=[.=]|$)', a))
    path, _, argument = (given.pop('config', None) or '').partition(':')
    if not path:
        return
    if not os.path.isfile(path):
        raise UserError(f'--config is {path!r}: No such file.')
    spec = importlib.util.spec_from_file_location('checked_config', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
        raise UserError(f'--config is {path!r}; that file must define get_config().')
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except ValueError as e:
        raise UserError(f'--config={path}:{argument}: {e}') from e
    known = config_lib.flatten(config)
    sections = {key.rpartition('.')[0] for key in known}
    for key in (name.removeprefix('config.') for name in given):
        if key not in known and key not in sections:
            raise UserError(f'Unknown config key {key}{config_lib.nearest(key, list(known))}.')


def _exit(message, status=EXIT_USER_ERROR):
    print(f'error: {message}' if status == EXIT_USER_ERROR else message, file=sys.stderr)
    sys.exit(status)


def main(argv):
    """Trains what the flags say; bad input ends with one sentence and status 2."""
    logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S', force=True)
    logging.getLogger('sam_jax').setLevel(logging.INFO)
    logging.getLogger('absl').setLevel(logging.WARNING)  # orbax tells of every file there
    try:
        if argv[1:]:
            raise UserError(f'Unexpected argument {argv[1]!r}; flags begin with --.')
        if _CONFIG.value is None:
            raise UserError('--config is missing; for example --config=configs/digits.py.')
        distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        train.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    except UserError as e:
        _exit(str(e))
    except train.Preempted as e:
        _exit(str(e), EXIT_PREEMPTED)


def run():
    """Console command `sam-jax-train`."""
    app.run(main, flags_parser=_parse)


def run_tests():
    """Console command `sam-jax-test`: the suite of the checkout this package lies in."""
    import pytest
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.exit(pytest.main(['--rootdir', root, '-c', os.path.join(root, 'pyproject.toml'),
                          os.path.join(root, 'tests'), *sys.argv[1:]]))


if __name__ == '__main__':
    run()
