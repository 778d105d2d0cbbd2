"""Where a config comes from: a file that --config names, or the folder of a run."""

import importlib.util
import inspect
import json
import os
import re
from collections.abc import Sequence
from types import ModuleType

import ml_collections

from sam_jax.errors import UserError, first_line
from sam_jax.settings import shipped
from sam_jax.settings.overrides import flatten, nearest, unflatten
from sam_jax.settings.schema import Config, completed


def of_run(workdir: str) -> Config:
    """Returns the config of the run in a folder.

    Raises:
      UserError: it is no folder of a run.
    """
    path = os.path.join(workdir, 'config.json')
    try:
        with open(path) as file:
            return unflatten(completed(json.load(file)['config']))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(
            f'{workdir!r} must be the folder of a run, but {path} cannot be read: {e}.'
        ) from e


def check_flags(argv: Sequence[str], default: str) -> str:
    """Checks the file of --config and the names of the --config.KEY flags.

    Args:
      argv: the command line.
      default: the config file where none is given.

    Returns:
      The path of the file.

    Raises:
      UserError: no such file, a bad argument of the config, or a key that it does not have.
    """
    matches = (
        re.fullmatch(r'--?(?:no)?(config(?:\.[^=]*)?)(?:=(.*))?', argument, re.DOTALL)
        for argument in argv
    )
    given: dict[str, str] = {match[1]: match[2] for match in matches if match}
    for flag, value in zip(argv, argv[1:]):
        if flag in ('--config', '-config'):  # the form with a space
            given['config'] = value
    flag = given.pop('config', None) or default
    known = flatten(load(flag)[1])
    sections = {key.rpartition('.')[0] for key in known}
    for key in (name.removeprefix('config.') for name in given):
        if key not in known and key not in sections:
            raise UserError(f'Unknown config key {key}{nearest(key, list(known))}.')
    return shipped.resolve(flag).partition(':')[0]


def load(flag: str) -> tuple[ModuleType, Config]:
    """Loads a config as --config names it.

    Args:
      flag: 'FILE', 'FILE:ARGUMENT', or the same with the name of a config of ours.

    Returns:
      (the file as a module, what its get_config returns).

    Raises:
      UserError: no such file, one that is not Python or imports what is not there, no get_config in
        it, one that returns no ConfigDict, or a bad argument.
    """
    path, _, argument = shipped.resolve(flag).partition(':')
    if not os.path.isfile(path):
        raise UserError(
            f'--config is {path!r}: No such file; by name there are {", ".join(shipped.names())}.'
        )
    module = _executed(path)
    arguments = (argument,) if argument else ()
    get_config = getattr(module, 'get_config', None)
    if not callable(get_config):
        raise UserError(f'--config is {path!r}; that file must define get_config().')
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as e:
        given = (
            f'with the argument {argument!r}' if argument else 'without an argument, FILE:ARGUMENT'
        )
        raise UserError(
            f'--config is {path!r}; its get_config() cannot be called {given} ({e}).'
        ) from e
    try:
        config = get_config(*arguments)
    except ValueError as e:
        raise UserError(f'--config={path}:{argument}: {e}') from e
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f'--config is {path!r}; its get_config() returns a {type(config).__name__}, and must '
            'return a ConfigDict.'
        )
    return module, config


def _executed(path):
    """The file of a config as a module."""
    spec = importlib.util.spec_from_file_location('checked_config', path)
    if not (spec and spec.loader):
        raise UserError(f'--config is {path!r}; it must be a file of Python, NAME.py.')
    module = importlib.util.module_from_spec(spec)
    try:
        with shipped.importable(path):
            spec.loader.exec_module(module)
    except SyntaxError as e:
        raise UserError(f'--config is {path!r}; it is not Python: {first_line(e)}.') from e
    except ImportError as e:
        raise UserError(
            f'--config is {path!r}; what it imports cannot be found: {first_line(e)}.'
        ) from e
    return module
