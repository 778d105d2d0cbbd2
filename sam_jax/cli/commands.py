"""What the commands share: flags, one sentence for bad input, lines of progress."""

import functools
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import app, flags
from ml_collections import config_flags

from sam_jax import checkpoint, distributed, settings
from sam_jax.errors import EXIT_USER_ERROR, NO_MEMORY, UserError, is_memory, told
from sam_jax.settings import shipped

DEFAULT_CONFIG = os.path.join(shipped.folder(), 'digits.py')

EXIT_PREEMPTED = 143  # what a shell reports of a process that SIGTERM ended
EXIT_INTERRUPTED = 130  # the same of SIGINT

# TensorFlow tells of itself at every import. It only reads images and writes logs here, for which
# oneDNN has nothing to offer.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '1')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')


flags.disclaim_key_flags()  # --config below is one of the module that asks for it


def define_config(meaning: str) -> flags.FlagHolder:
    """Defines the flag --config: a config by name, or a file, with an argument behind a colon."""
    # With --help the default is loaded at once.
    with shipped.importable(DEFAULT_CONFIG):
        return config_flags.DEFINE_config_file('config', DEFAULT_CONFIG, meaning, lock_config=True)


def leave(message: str, status: int = EXIT_USER_ERROR, at_once: bool = False) -> NoReturn:
    """Ends the process with a line on stderr, which tells of an error if the status does.

    With `at_once` nothing is tidied up, for which there may be no memory.
    """
    print(f'error: {message}' if status == EXIT_USER_ERROR else message, file=sys.stderr)
    if status != EXIT_PREEMPTED:
        distributed.abandon(status)
        if at_once or not checkpoint.threads_end(seconds=1):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)


def _parse(argv):
    """absl's parser, with one sentence for what it or ml_collections would answer at length."""
    try:
        argv = with_paths(argv)
        file = settings.check_flags(argv, DEFAULT_CONFIG)
        with shipped.importable(file):
            return flags.FLAGS(argv)
    except UserError as e:
        leave(str(e))
    except (flags.Error, ValueError) as e:
        message = ' '.join(str(e).split())
        leave(message if message.endswith('.') else f'{message}.')


def with_paths(argv: list[str]) -> list[str]:
    """Returns a command line with the path of the file in place of the name of a config of ours."""
    argv = [
        f'{flag}={shipped.resolve(value)}'
        if equals and flag in ('--config', '-config')
        else argument
        for argument in argv
        for flag, equals, value in [argument.partition('=')]
    ]
    for i, flag in enumerate(argv[:-1]):
        if flag in ('--config', '-config'):  # the form with a space
            argv[i + 1] = shipped.resolve(argv[i + 1])
    return argv


def _keep_compiled_programs():
    """Sets JAX's persistent compilation cache, unless JAX has been told of one or of none."""
    if jax.config.jax_enable_compilation_cache and not jax.config.jax_compilation_cache_dir:
        caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
        jax.config.update('jax_compilation_cache_dir', os.path.join(caches, 'sam_jax', 'compiled'))


def run(main: Callable[..., None], positional: bool = False) -> None:
    """Parses the command line and calls main(); a UserError ends with its sentence and status 2.

    With positional, main is called with the list of the arguments that are no flags; without, there
    must be none.
    """
    # --help shows the flags and the docstring of the command, also when a script of pip's calls it.
    entry = sys.modules['__main__']
    entry.__doc__ = entry.__doc__ or sys.modules[main.__module__].__doc__
    for flag in flags.FLAGS.get_key_flags_for_module(main.__module__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(functools.partial(_call, main, positional), flags_parser=_parse)


def _call(main, positional, argv):
    logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S', force=True)
    logging.getLogger('sam_jax').setLevel(logging.INFO)
    logging.getLogger('jax').setLevel(logging.WARNING)  # it tells of each backend it lacks
    # Orbax tells of every file, and of a write that fails at length: what it raises is told. Of
    # several tasks that fail, it raises the error of one, and asyncio tells of the others.
    for name in ('absl', 'asyncio'):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook, threading.excepthook = _unraisable, _of_thread
    try:
        if argv[1:] and not positional:
            raise UserError(f'Unexpected argument {argv[1]!r}; flags begin with --.')
        _keep_compiled_programs()
        main(*([argv[1:]] if positional else []))
    except KeyboardInterrupt:
        leave('Interrupted.', EXIT_INTERRUPTED)
    except Exception as e:
        said = told(e)
        if said is None:
            if jax.distributed.is_initialized():
                traceback.print_exc()
                distributed.abandon(1)
            raise
        leave(said, at_once=is_memory(e))


# Given back where memory ends, so that it can be said.
_RESERVE = [bytearray(2**20)]


def _unraisable(unraisable):
    """Python's own hook, but for memory that ends.

    And for what TensorStore says of writes under way when one has failed.
    """
    if unraisable.exc_type is MemoryError:
        _RESERVE.clear()  # here: a call of our own takes memory
        _end_without_memory()
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def _of_thread(args):
    """Python's own hook of a thread that ends with an error, unless it is of memory."""
    if args.exc_type is MemoryError:
        _RESERVE.clear()
        _end_without_memory()
    threading.__excepthook__(args)


def _end_without_memory():
    """Ends the process, since others would wait for good for the thread that got no memory."""
    os.write(2, f'error: {NO_MEMORY}\n'.encode())
    os._exit(EXIT_USER_ERROR)
