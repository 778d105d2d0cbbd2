"""A config as flat settings, and changes to it by key."""

import ast
import difflib
from collections.abc import Sequence
from typing import Any

import ml_collections

from sam_jax.errors import UserError
from sam_jax.settings.schema import KEYS, Config, Key


def flatten(config: Config) -> dict[str, Any]:
    """Returns {'section.key': value} of a ConfigDict."""
    flat = {}
    for name, value in config.items():
        if hasattr(value, 'items'):
            flat.update({f'{name}.{k}': v for k, v in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def jsonable(config: Any) -> dict[str, Any]:
    """Returns the flat settings as JSON holds them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(config).items()}


def unflatten(flat: dict[str, Any]) -> Config:
    """Returns the locked ConfigDict of {'section.key': value}, as a run's config.json holds it."""
    config: Config = ml_collections.ConfigDict()
    for key, value in flat.items():
        *sections, name = key.split('.')
        section: Config = config
        for part in sections:
            if part not in section:
                section[part] = ml_collections.ConfigDict()
            section = section[part]
        section[name] = tuple(value) if isinstance(value, list) else value
    return config.lock()


def override(config: Config, key: str, value: Any) -> None:
    """Sets a key of a config; text is read as the type that the key has.

    Raises:
      UserError: there is no such key, or the value is not of its type.
    """
    known = flatten(config)
    if key not in known:
        raise UserError(f'Unknown config key {key}{nearest(key, list(known))}.')
    kind = type(known[key])
    if isinstance(value, str) and kind is not str:
        try:
            value = (
                {'true': True, 'false': False}[value.lower()]
                if kind is bool
                else ast.literal_eval(value)
                if kind is tuple
                else kind(value)
            )
        except (ValueError, KeyError, SyntaxError) as e:
            raise UserError(f'{key} is {value!r}; it must be of type {kind.__name__}.') from e
    KEYS.get(key, Key(known[key], '')).check(key, value)
    *sections, name = key.split('.')
    for section in sections:
        config = config[section]
    with config.ignore_type():
        config[name] = kind(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Returns {key: its last part, or all of it where two keys end the same}."""
    last = [key.rpartition('.')[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last)}


def nearest(name: str, known: Sequence[str]) -> str:
    """Returns ' (did you mean X?)' with the known name, or names, most like `name`, or ''."""
    close = difflib.get_close_matches(name, known, 1)
    if not close:
        ends = {k: k.rpartition('.')[2] for k in known}
        end = difflib.get_close_matches(name.rpartition('.')[2], ends.values(), 1)
        close = sorted(k for k in known if ends[k] in end)
    return f' (did you mean {" or ".join(close)}?)' if close else ''
