"""The configs that come with the package: found by name, wherever one is.

In a wheel they are the package `sam_jax.configs`, in a checkout the folder `configs` at its top.
They import each other as `configs.NAME`, which the name `configs` must stand for while one is
loaded; no package of that name is installed.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType


@functools.cache
def _package() -> ModuleType:
    root = pathlib.Path(__file__).resolve().parents[2]
    file = str(root / 'configs' / '__init__.py')
    # Those of this checkout, and not of another one that is installed editable; only a wheel's
    # package has the folder inside.
    if (root / 'sam_jax' / 'configs').exists() or not os.path.exists(file):
        return importlib.import_module('sam_jax.configs')
    loaded = sys.modules.get('configs')
    if loaded and getattr(loaded, '__file__', None) == file:
        return loaded
    spec = importlib.util.spec_from_file_location(
        'configs', file, submodule_search_locations=[os.path.dirname(file)]
    )
    assert spec, file
    return importlib.util.module_from_spec(spec)


def folder() -> str:
    """Returns the folder of the configs."""
    return os.path.dirname(os.path.abspath(_package().__file__ or ''))


def names() -> list[str]:
    """Returns the names of the configs, sorted."""
    return sorted(
        name.removesuffix('.py')
        for name in os.listdir(folder())
        if name.endswith('.py') and name not in ('__init__.py', 'common.py')
    )


def resolve(flag: str) -> str:
    """Returns what --config names with the path of its file: 'digits:noise=0.4' or 'my/file.py:x'.

    A name without a folder and without '.py' is that of a config of ours; a path 'configs/NAME.py'
    that does not lead to a file is, too, so that the commands of the documentation work from any
    folder.
    """
    path, colon, argument = flag.partition(':')
    head, tail = os.path.split(path)
    name = tail.removesuffix('.py')
    ours = not head and '.' not in path or head == 'configs' and not os.path.exists(path)
    if ours and name in names():
        path = os.path.join(folder(), f'{name}.py')
    return path + colon + argument


@contextlib.contextmanager
def importable(path: str) -> Iterator[None]:
    """Within it `configs` is the package of the file at `path`, if that is one of ours.

    For a file of somebody else's it is whatever Python finds, and ours where it finds nothing.
    """
    package = _package()
    ours = os.path.dirname(os.path.abspath(path)) == folder()
    taken = {
        name: module for name, module in sys.modules.items() if name.partition('.')[0] == 'configs'
    }
    if not ours and (taken or importlib.util.find_spec('configs')):
        yield
        return
    for name in taken if taken.get('configs') is not package else ():
        del sys.modules[name]
    sys.modules['configs'] = package
    try:
        yield
    finally:
        if taken and taken.get('configs') is not package:
            for name in [n for n in sys.modules if n.partition('.')[0] == 'configs']:
                del sys.modules[name]
            sys.modules.update(taken)
