"""What a run is told: the schema of all settings, checks, changes by key, and config files."""

from sam_jax.settings.checks import (
    FREE_AT_RESUME,
    check,
    check_same_data,
    check_same_frozen,
    check_same_mathematics,
    check_to_train,
    check_with_data,
    check_with_layout,
)
from sam_jax.settings.files import check_flags, load, of_run
from sam_jax.settings.overrides import flatten, jsonable, nearest, override, short_names, unflatten
from sam_jax.settings.schema import DTYPES, KEYS, Config, Key, completed, default_config

__all__ = [
    'Config',
    'DTYPES',
    'FREE_AT_RESUME',
    'KEYS',
    'Key',
    'check',
    'check_flags',
    'check_same_data',
    'check_same_frozen',
    'check_same_mathematics',
    'check_to_train',
    'check_with_data',
    'check_with_layout',
    'completed',
    'default_config',
    'flatten',
    'jsonable',
    'load',
    'nearest',
    'of_run',
    'override',
    'short_names',
    'unflatten',
]
