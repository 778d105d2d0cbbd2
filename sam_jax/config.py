"""Checks of a run's settings, all before any long work: types, names, ranges, and changes."""

import ast
import difflib
import importlib.util
import json
import math
import os
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import ml_collections

from sam_jax import data, models, optimizers, schedules, sharpness, shipped
from sam_jax.data.dataset import Dataset
from sam_jax.errors import UserError
from sam_jax.models.layers import Network
from sam_jax.replicas import AXIS, Layout

# Every key and its type. Further keys under `model` are options of the model's family, and under
# `sam` of the method.
KEYS = {
    'seed': int, 'total_epochs': int, 'batch_size': int, 'replica_batch_size': int,
    'replica_loop': str, 'label_smoothing': float, 'log_every_steps': int,
    'model.name': str, 'model.dtype': str, 'model.init_from': str,
    'model.frozen_batch_norm': bool, 'model.sync_batch_norm': bool, 'model.remat': bool,
    'data.name': str, 'data.dir': str, 'data.augment': str, 'data.padding': int,
    'data.corrected_ops': bool, 'data.cutout_size': int, 'data.cutout_per_image': bool,
    'data.randaugment_layers': int, 'data.randaugment_magnitude': int,
    'data.mixup_alpha': float, 'data.cutmix_alpha': float, 'data.mix_per_image': bool,
    'data.image_size': int, 'data.skip_corrupt': bool, 'data.threads': int,
    'data.validation': bool, 'data.label_noise': float, 'data.label_noise_kind': str,
    'data.label_noise_seed': int, 'data.labels_from': str, 'data.soft_labels': bool,
    'sam.method': str, 'sam.rho': float, 'sam.p': float, 'sam.replicas_per_group': int,
    'sam.schedule': str, 'sam.rho_min': float, 'sam.warmup_epochs': float,
    'optimizer.name': str, 'optimizer.learning_rate': float, 'optimizer.schedule': str,
    'optimizer.warmup_epochs': float, 'optimizer.momentum': float, 'optimizer.nesterov': bool,
    'optimizer.decay': float, 'optimizer.epsilon': float, 'optimizer.weight_decay': float,
    'optimizer.decay_norm_and_bias': bool, 'optimizer.clip_norm': float,
    'ema.decay': float, 'ema.warmup_steps': int,
    'eval.every_epochs': int, 'eval.batch_size': int, 'eval.top5': bool, 'eval.train_set': bool,
    'checkpoint.every_minutes': float, 'checkpoint.every_epochs': int,
    'checkpoint.keep_epochs': tuple,
    'analysis.every_epochs': int, 'analysis.examples': int, 'analysis.steps': int,
    'analysis.rho': float,
}

DTYPES = ('float32', 'bfloat16', 'float64')

_CHOICES = {
    'replica_loop': ('auto', 'unroll', 'scan'), 'model.dtype': DTYPES,
    'data.name': data.NAMES, 'data.augment': tuple(data.RECIPES),
    'data.label_noise_kind': tuple(data.LABEL_NOISE),
    'sam.method': sharpness.METHODS,
    'sam.schedule': (*schedules.SCHEDULES, 'learning_rate'),
    'optimizer.name': optimizers.OPTIMIZERS, 'optimizer.schedule': tuple(schedules.SCHEDULES),
}

# Key -> (lowest, highest, whether the highest itself is allowed).
_RANGES = {
    'seed': (0, 2 ** 32 - 1, True), 'total_epochs': (1, math.inf, False),
    'batch_size': (1, math.inf, False), 'replica_batch_size': (1, math.inf, False),
    'label_smoothing': (0, 1, False), 'log_every_steps': (1, math.inf, False),
    'data.padding': (0, math.inf, False), 'data.cutout_size': (1, math.inf, False),
    'data.randaugment_layers': (1, math.inf, False),
    'data.randaugment_magnitude': (0, math.inf, False),
    'data.mixup_alpha': (0, math.inf, False), 'data.cutmix_alpha': (0, math.inf, False),
    'data.image_size': (0, math.inf, False), 'data.threads': (0, math.inf, False),
    'data.label_noise': (0, 1, True), 'data.label_noise_seed': (0, 2 ** 32 - 1, True),
    'sam.rho': (0, math.inf, False), 'sam.rho_min': (0, math.inf, False),
    'sam.replicas_per_group': (1, math.inf, False),
    'sam.warmup_epochs': (0, math.inf, False), 'optimizer.learning_rate': (0, math.inf, False),
    'optimizer.warmup_epochs': (0, math.inf, False), 'optimizer.momentum': (0, 1, False),
    'optimizer.decay': (0, 1, False), 'optimizer.epsilon': (0, math.inf, False),
    'optimizer.weight_decay': (0, math.inf, False), 'optimizer.clip_norm': (0, math.inf, False),
    'ema.decay': (0, 1, False), 'ema.warmup_steps': (0, math.inf, False),
    'eval.every_epochs': (0, math.inf, False), 'eval.batch_size': (1, math.inf, False),
    'checkpoint.every_minutes': (0, math.inf, False),
    'checkpoint.every_epochs': (0, math.inf, False),
    'analysis.every_epochs': (0, math.inf, False), 'analysis.examples': (1, math.inf, False),
    'analysis.steps': (5, math.inf, False), 'analysis.rho': (0, math.inf, False),
}

# What may differ when a run is resumed: it does not change what is computed.
FREE_AT_RESUME = ('replica_loop', 'data.dir', 'data.threads', 'eval.', 'checkpoint.',
                  'analysis.')


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns {'section.key': value} of a ConfigDict."""
    flat = {}
    for name, value in config.items():
        if hasattr(value, 'items'):
            flat.update({f'{name}.{k}': v for k, v in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def unflatten(flat: dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns the locked ConfigDict of {'section.key': value}, as a run's config.json holds it."""
    config = ml_collections.ConfigDict()
    for key, value in flat.items():
        *sections, name = key.split('.')
        section = config
        for part in sections:
            if part not in section:
                section[part] = ml_collections.ConfigDict()
            section = section[part]
        section[name] = tuple(value) if isinstance(value, list) else value
    return config.lock()


# Keys that came later, with what is computed without them.
ADDED = {'analysis.every_epochs': 0, 'analysis.examples': 1000, 'analysis.steps': 20,
          'analysis.rho': 0.05}


def of_run(workdir: str) -> ml_collections.ConfigDict:
    """Returns the config of the run in a folder.

    Raises:
      UserError: it is no folder of a run.
    """
    path = os.path.join(workdir, 'config.json')
    try:
        with open(path) as file:
            settings = json.load(file)['config']
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f'{workdir!r} must be the folder of a run, but {path} cannot be read: '
                        f'{e}.') from e
    return unflatten({**ADDED, **settings})


def override(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
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
            value = ({'true': True, 'false': False}[value.lower()] if kind is bool
                     else ast.literal_eval(value) if kind is tuple else kind(value))
        except (ValueError, KeyError, SyntaxError) as e:
            raise UserError(f'{key} is {value!r}; it must be of type {kind.__name__}.') from e
    _check_value(key, kind, value)
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


def check(config: ml_collections.ConfigDict) -> None:
    """Checks a config by itself: keys, types, names, ranges, the model and its options.

    Raises:
      UserError: one sentence about the first thing wrong.
    """
    flat = flatten(config)
    options = {k for k in flat if k.startswith('model.')}
    options |= {f'sam.{name}' for method in sharpness.METHODS for name in sharpness.options(method)}
    for key in flat:
        if key not in KEYS and key not in options:
            raise UserError(f'Unknown config key {key}{nearest(key, list(KEYS))}.')
    for key, kind in KEYS.items():
        if key not in flat:
            raise UserError(f'The config lacks the key {key} ({kind.__name__}).')
        _check_value(key, kind, flat[key])
    if not flat['sam.p'] > 1:
        raise UserError(f'sam.p is {flat["sam.p"]}; it must be greater than 1 (inf is allowed).')
    _check_method(flat)
    if not all(isinstance(e, int) and e > 0 for e in flat['checkpoint.keep_epochs']):
        raise UserError(
            f'checkpoint.keep_epochs is {flat["checkpoint.keep_epochs"]}; it must hold epochs, '
            'counted from 1.')
    for key in ('sam.warmup_epochs', 'optimizer.warmup_epochs'):
        if flat[key] > flat['total_epochs']:
            raise UserError(
                f'{key} is {flat[key]}; it must not exceed total_epochs, {flat["total_epochs"]}.')
    if flat['optimizer.name'] != 'sgd' and not flat['optimizer.epsilon'] > 0:
        raise UserError(
            f'optimizer.epsilon is 0; {flat["optimizer.name"]} needs a positive one.')
    _check_data_settings(config.data)
    create_model(config, num_classes=1)  # names and options do not depend on the data


def _check_method(flat):
    method = flat['sam.method']
    wanted = {f'sam.{name}': default for name, default in sharpness.options(method).items()}
    given = {key for key in flat if key.startswith('sam.') and key not in KEYS}
    for key in sorted(given - wanted.keys()):
        takes = ', '.join(wanted) or 'none'
        raise UserError(
            f'The setting {key} is not one of sam.method {method!r}, whose own are: {takes}. To '
            "change the method use the config's argument method=NAME.")
    for key, default in wanted.items():
        if key not in given:
            raise UserError(
                f'The config lacks {key} of sam.method {method!r}; choose the method by the '
                f"config's argument method={method}.")
        _check_value(key, type(default), flat[key])
    settings = {key.removeprefix('sam.'): value for key, value in flat.items()
                if key.startswith('sam.')}
    try:
        made = sharpness.create(**settings, total_steps=1, num_examples=1)
    except ValueError as e:
        raise UserError(f'sam.method is {method!r}: {e}') from e
    if flat['sam.p'] != 2 and method != 'sgd' and 'p' not in sharpness.takes(method):
        raise UserError(f'sam.p is {flat["sam.p"]}; sam.method {method!r} knows only 2.0.')
    if flat['sam.rho_min'] and flat['sam.schedule'] != 'learning_rate':
        raise UserError(
            f"sam.rho_min is {flat['sam.rho_min']}; it is rho at learning rate 0 with sam.schedule "
            f"'learning_rate', and the schedule is {flat['sam.schedule']!r}: set it to 0.")
    if flat['sam.rho_min'] > flat['sam.rho']:
        raise UserError(f'sam.rho_min is {flat["sam.rho_min"]}; it must not exceed sam.rho, '
                        f'{flat["sam.rho"]}.')
    _check_company(flat, made)


def _check_company(flat, made):
    """What a method wants of the optimizer, the averages and the data."""
    begin = f"sam.method is {flat['sam.method']!r}, which"
    if flat['sam.method'] == 'momentum_sam' and not flat['optimizer.momentum']:
        raise UserError(f'{begin} moves along the momentum; optimizer.momentum is 0 and must be '
                        'greater, such as 0.9.')
    entry = sharpness.METHODS[flat['sam.method']]
    for key, value in entry.refuses.items():
        if flat[key] != value:
            raise UserError(f'{begin} {entry.why}; {key} is {flat[key]!r} and must be {value!r}.')
    if made.trajectory is None:
        return
    epochs = flat['total_epochs']
    for key, last in (('sam.start_epoch', epochs - 2), ('sam.epochs_ago', epochs - 1)):
        if flat.get(key, 0) > last:
            raise UserError(f'{begin} then never adds its loss: {key} is {flat[key]} in a run of '
                            f'{epochs} epochs, and must be at most {last}.')
    if not made.trajectory.epochs_ago and not flat['ema.decay']:
        raise UserError(f'{begin} learns from a moving average of the weights; ema.decay is 0 and '
                        'must be greater, such as 0.9998.')
    if made.trajectory.epochs_ago:
        if flat['data.name'] not in data.SOURCES:
            raise UserError(
                f'{begin} keeps the logits of every image on the device; data.name is '
                f'{flat["data.name"]!r}, which is streamed, and must be one of '
                f'{", ".join(data.SOURCES)}.')
        for key in ('data.mixup_alpha', 'data.cutmix_alpha'):
            if flat[key]:
                raise UserError(f'{begin} remembers what the network says of each image; {key} is '
                                f'{flat[key]} and must be 0, since mixed images are of no one.')


def _check_data_settings(settings):
    streams = settings.name not in data.SOURCES
    if streams and not settings.image_size:
        raise UserError(
            f'data.image_size is 0; {settings.name} has images of all sizes: set the side of the '
            "network's input, such as 224.")
    if not streams and 'resized_crop' in data.RECIPES[settings.augment]:
        raise UserError(
            f'data.augment is {settings.augment!r}, which crops large images; {settings.name} is '
            'not of that kind: use one of '
            f'{", ".join(k for k, parts in data.RECIPES.items() if "resized_crop" not in parts)}.')
    if not streams and settings.skip_corrupt:
        raise UserError(
            f'data.skip_corrupt is True; the images of {settings.name} are read as a whole, and '
            'none of them is passed over.')
    if settings.mixup_alpha and settings.cutmix_alpha:
        raise UserError(
            f'data.mixup_alpha is {settings.mixup_alpha} and data.cutmix_alpha is '
            f'{settings.cutmix_alpha}; one of them must be 0.')
    if settings.mix_per_image and not (settings.mixup_alpha or settings.cutmix_alpha):
        raise UserError('data.mix_per_image is True; it needs data.mixup_alpha or '
                        'data.cutmix_alpha.')
    if settings.labels_from and settings.label_noise:
        raise UserError(
            f'data.labels_from is {settings.labels_from!r} and data.label_noise is '
            f'{settings.label_noise}; labels come from one of them: set data.label_noise to 0.')
    if settings.soft_labels and not settings.labels_from:
        raise UserError('data.soft_labels is True; it needs data.labels_from.')


def _check_value(key, kind, value):
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f'{key} is {value!r}; it must be of type {kind.__name__}.')
    if key in _CHOICES and value not in _CHOICES[key]:
        raise UserError(f'{key} is {value!r}; it must be one of {", ".join(_CHOICES[key])}.')
    if key in _RANGES:
        low, high, closed = _RANGES[key]
        if not (low <= value < high or (closed and value == high)):
            upper = '' if high == math.inf else f' and {"at most" if closed else "below"} {high}'
            raise UserError(f'{key} is {value}; it must be at least {low}{upper}.')


def check_with_data(config: ml_collections.ConfigDict, dataset: Dataset) -> None:
    """Checks a config against its dataset.

    Raises:
      UserError: fewer training examples than a batch, a shift wider than the image, top-5 of fewer
        than six classes.
    """
    n = dataset.num_train_examples
    if config.batch_size > n:
        raise UserError(
            f'batch_size is {config.batch_size}; the training set of {dataset.name} has only {n} '
            'examples.')
    shifts = 'shift' in data.RECIPES[config.data.augment]
    if shifts and config.data.padding >= min(dataset.pixel_shape[:2]):
        raise UserError(
            f'data.padding is {config.data.padding}; it must be smaller than the images of '
            f'{dataset.name}, {dataset.pixel_shape[0]}x{dataset.pixel_shape[1]}.')
    if config.eval.top5 and dataset.num_classes < 6:
        raise UserError(
            f'eval.top5 is True; {dataset.name} has only {dataset.num_classes} classes.')


def check_with_layout(config: ml_collections.ConfigDict, layout: Layout) -> None:
    """Checks a config against the devices.

    Raises:
      UserError: BatchNorm over all replicas, several of which are on one device.
    """
    if config.model.sync_batch_norm and layout.replicas_per_device > 1:
        raise UserError(
            f'model.sync_batch_norm is True; it needs each of the {layout.num_replicas} replicas '
            f'on a device of its own, and here are {len(layout.devices)} devices: set '
            f'replica_batch_size to {config.batch_size // len(layout.devices)}.')


def create_model(config: ml_collections.ConfigDict, num_classes: int) -> Network:
    """Builds the model of `config.model`: its other keys are the family's options.

    Raises:
      UserError: unknown model, impossible sizes, or an option that the family does not have.
    """
    own = ('name', 'init_from', 'sync_batch_norm')
    options = {k: v for k, v in config.model.items() if k not in own}
    if config.model.sync_batch_norm:
        options['batch_norm_axis'] = AXIS
    if config.model.dtype == 'float64':
        # To tell a bug from rounding; then params and statistics are float64 as well.
        if not jax.config.jax_enable_x64:
            raise UserError('model.dtype is float64; that needs JAX_ENABLE_X64=1.')
        options['param_dtype'] = 'float64'
    try:
        return models.create_model(config.model.name, num_classes, **options)
    except TypeError as e:
        raise UserError(
            f"config.model: {e} To change the family use the config's argument, model=NAME.") from e


def check_same_mathematics(config: ml_collections.ConfigDict, before: dict[str, Any]) -> None:
    """Refuses to resume with settings that change what is computed.

    Args:
      config: the config of this start.
      before: flat dict of the config of the checkpoint, as read from JSON.

    Raises:
      UserError: naming the keys with both values.
    """
    now = {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(config).items()}
    changed = [
        f'{key} (was {before.get(key)!r}, now {now.get(key)!r})'
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and not key.startswith(FREE_AT_RESUME)]
    if changed:
        raise UserError(
            f'The workdir holds a run with other settings: {", ".join(changed)}; use them again to '
            'resume it, or choose a new workdir.')


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
    given = dict(re.fullmatch(r'--?(?:no)?(config[^=]*)(?:=(.*))?', a, re.DOTALL).groups()
                 for a in argv if re.match(r'--?(?:no)?config(?=[.=]|$)', a))
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


def load(flag: str) -> tuple[ModuleType, ml_collections.ConfigDict]:
    """Loads a config as --config names it.

    Args:
      flag: 'FILE', 'FILE:ARGUMENT', or the same with the name of a config of ours.

    Returns:
      (the file as a module, what its get_config returns).

    Raises:
      UserError: no such file, no get_config in it, or a bad argument.
    """
    path, _, argument = shipped.resolve(flag).partition(':')
    if not os.path.isfile(path):
        raise UserError(f'--config is {path!r}: No such file; by name there are '
                        f'{", ".join(shipped.names())}.')
    spec = importlib.util.spec_from_file_location('checked_config', path)
    module = importlib.util.module_from_spec(spec)
    with shipped.importable(path):
        spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
        raise UserError(f'--config is {path!r}; that file must define get_config().')
    try:
        return module, module.get_config(argument) if argument else module.get_config()
    except ValueError as e:
        raise UserError(f'--config={path}:{argument}: {e}') from e
