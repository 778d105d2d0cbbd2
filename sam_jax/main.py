"""Command line.

    python -m sam_jax.main --config=configs/digits.py --workdir=DIR [--config.sam.rho=0.1]
"""

import logging
import os
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from sam_jax import config as config_lib
from sam_jax import distributed, train
from sam_jax.errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEFAULT_CONFIG = os.path.join(ROOT, 'configs', 'digits.py')

_CONFIG = config_flags.DEFINE_config_file(
    'config', DEFAULT_CONFIG, 'File with get_config(), e.g. configs/digits.py:noise=0.4.',
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
        config_lib.check_flags(argv, DEFAULT_CONFIG)
        return flags.FLAGS(argv)
    except UserError as e:
        _exit(str(e))
    except (flags.Error, ValueError) as e:
        _exit(' '.join(str(e).split()))


def _exit(message, status=EXIT_USER_ERROR):
    print(f'error: {message}' if status == EXIT_USER_ERROR else message, file=sys.stderr)
    sys.exit(status)


def _keep_compiled_programs():
    """Sets JAX's persistent compilation cache, unless JAX has been told of one or of none."""
    if jax.config.jax_enable_compilation_cache and not jax.config.jax_compilation_cache_dir:
        caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
        jax.config.update('jax_compilation_cache_dir', os.path.join(caches, 'sam_jax', 'compiled'))


def main(argv):
    """Trains what the flags say; bad input ends with one sentence and status 2."""
    logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S', force=True)
    logging.getLogger('sam_jax').setLevel(logging.INFO)
    logging.getLogger('absl').setLevel(logging.WARNING)  # orbax tells of every file there
    try:
        if argv[1:]:
            raise UserError(f'Unexpected argument {argv[1]!r}; flags begin with --.')
        _keep_compiled_programs()
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
    arguments = sys.argv[1:]
    if not any(os.path.exists(a.partition('::')[0]) for a in arguments):
        arguments.append(os.path.join(ROOT, 'tests'))
    sys.exit(pytest.main(
        ['--rootdir', ROOT, '-c', os.path.join(ROOT, 'pyproject.toml'), *arguments]))


if __name__ == '__main__':
    run()
