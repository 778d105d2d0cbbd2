"""Checks of a run's settings, all before any long work: types, names, ranges, and changes."""

import math
from typing import Any

from sam_jax import data, models, sharpness
from sam_jax.data.dataset import Dataset
from sam_jax.errors import UserError
from sam_jax.models.prompts import Prompts
from sam_jax.replicas import Layout
from sam_jax.settings.overrides import flatten, jsonable, nearest
from sam_jax.settings.schema import KEYS, WHOLE, Config, Key, completed, model_options

# What may differ when a run is resumed: it does not change what is computed.
FREE_AT_RESUME = (
    'replica_loop',
    'replica_backend',
    'data.dir',
    'data.threads',
    'eval.',
    'checkpoint.',
    'analysis.',
)


def check(config: Config) -> None:
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
    for key, described in KEYS.items():
        if key not in flat:
            raise UserError(f'The config lacks the key {key} ({described.kind.__name__}).')
        described.check(key, flat[key])
    if not flat['sam.p'] > 1:
        raise UserError(f'sam.p is {flat["sam.p"]}; it must be greater than 1 (inf is allowed).')
    _check_method(flat)
    if not all(isinstance(e, int) and e > 0 for e in flat['checkpoint.keep_epochs']):
        raise UserError(
            f'checkpoint.keep_epochs is {flat["checkpoint.keep_epochs"]}; it must hold epochs, '
            'counted from 1.'
        )
    late = [epoch for epoch in flat['checkpoint.keep_epochs'] if epoch > flat['total_epochs']]
    if late:
        raise UserError(
            f'checkpoint.keep_epochs has {late[0]}; the run ends after total_epochs, '
            f'{flat["total_epochs"]}.'
        )
    if flat['ema.warmup_steps'] and not flat['ema.decay']:
        raise UserError(
            f'ema.warmup_steps is {flat["ema.warmup_steps"]}; it needs ema.decay, such as 0.999.'
        )
    for key in ('sam.warmup_epochs', 'optimizer.warmup_epochs'):
        if flat[key] > flat['total_epochs']:
            raise UserError(
                f'{key} is {flat[key]}; it must not exceed total_epochs, {flat["total_epochs"]}.'
            )
    _check_optimizer(flat)
    _check_data_settings(config.data)
    for option, described in model_options(config.model.name).items():
        if option in config.model:
            described.check(f'model.{option}', config.model[option])
    # Its options do not depend on the data.
    model = models.from_config(config.model, num_classes=1)
    _check_prompts(flat, model)


def _check_prompts(flat, model):
    reads_names = isinstance(model, Prompts)
    if flat['data.base_to_new'] and not reads_names:
        raise UserError(
            'data.base_to_new is True; classes of which nothing was trained are told apart by '
            f'their names, which {flat["model.name"]} does not read: use a clip-<size><patch>.'
        )
    if flat['model.head_bias'] and reads_names:
        raise UserError(
            f'model.head_bias is {flat["model.head_bias"]:g}; the logits of '
            f'{flat["model.name"]} are similarities and have no bias: set it to 0.'
        )
    if flat['analysis.every_epochs'] and reads_names:
        raise UserError(
            f'analysis.every_epochs is {flat["analysis.every_epochs"]}; learned prompts cannot be '
            'analysed yet: set it to 0.'
        )


def _check_optimizer(flat):
    name, schedule = flat['optimizer.name'], flat['optimizer.schedule']
    if name not in ('sgd', 'lion') and not flat['optimizer.epsilon'] > 0:
        raise UserError(f'optimizer.epsilon is 0; {name} needs a positive one.')
    if flat['optimizer.warmup_steps'] and flat['optimizer.warmup_epochs']:
        raise UserError(
            f'optimizer.warmup_steps is {flat["optimizer.warmup_steps"]} and '
            f'optimizer.warmup_epochs is {flat["optimizer.warmup_epochs"]}; one of them must be 0.'
        )
    epochs = flat['optimizer.milestones']
    if not all(isinstance(e, int) and 0 < e <= flat['total_epochs'] for e in epochs):
        raise UserError(
            f'optimizer.milestones is {epochs}; it must hold epochs of the run, from 1 to '
            f'{flat["total_epochs"]}.'
        )
    if bool(epochs) != (schedule == 'milestones'):
        needs = 'at least one epoch' if not epochs else "optimizer.schedule='milestones'"
        raise UserError(
            f'optimizer.milestones is {epochs} and optimizer.schedule is {schedule!r}; that needs '
            f'{needs}.'
        )
    if flat['optimizer.end'] and schedule != 'linear':
        raise UserError(
            f'optimizer.end is {flat["optimizer.end"]}; it is where optimizer.schedule '
            f"'linear' ends, and the schedule is {schedule!r}: set it to 0."
        )


def _check_method(flat):
    method = flat['sam.method']
    wanted = {f'sam.{name}': default for name, default in sharpness.options(method).items()}
    given = {key for key in flat if key.startswith('sam.') and key not in KEYS}
    for key in sorted(given - wanted.keys()):
        takes = ', '.join(wanted) or 'none'
        raise UserError(
            f'The setting {key} is not one of sam.method {method!r}, whose own are: {takes}. To '
            "change the method use the config's argument method=NAME."
        )
    for key, default in wanted.items():
        if key not in given:
            raise UserError(
                f'The config lacks {key} of sam.method {method!r}; choose the method by the '
                f"config's argument method={method}."
            )
        Key(default, '').check(key, flat[key])
    settings = {
        key.removeprefix('sam.'): value for key, value in flat.items() if key.startswith('sam.')
    }
    try:
        made = sharpness.create(**settings, total_steps=1, num_examples=1)
    except ValueError as e:
        raise UserError(f'sam.method is {method!r}: {e}') from e
    if flat['sam.p'] != 2 and method != 'sgd' and 'p' not in sharpness.takes(method):
        raise UserError(f'sam.p is {flat["sam.p"]}; sam.method {method!r} knows only 2.0.')
    if flat['sam.rho_min'] and flat['sam.schedule'] != 'learning_rate':
        raise UserError(
            f'sam.rho_min is {flat["sam.rho_min"]}; it is rho at learning rate 0 with sam.schedule '
            f"'learning_rate', and the schedule is {flat['sam.schedule']!r}: set it to 0."
        )
    if flat['sam.rho_min'] > flat['sam.rho']:
        raise UserError(
            f'sam.rho_min is {flat["sam.rho_min"]}; it must not exceed sam.rho, {flat["sam.rho"]}.'
        )
    _check_company(flat, made)


def _check_company(flat, made):
    """What a method wants of the optimizer, the averages and the data."""
    begin = f'sam.method is {flat["sam.method"]!r}, which'
    if flat['sam.method'] == 'momentum_sam' and not flat['optimizer.momentum']:
        raise UserError(
            f'{begin} moves along the momentum; optimizer.momentum is 0 and must be '
            'greater, such as 0.9.'
        )
    entry = sharpness.METHODS[flat['sam.method']]
    for key, value in entry.refuses.items():
        if flat[key] != value:
            raise UserError(f'{begin} {entry.why}; {key} is {flat[key]!r} and must be {value!r}.')
    if made.trajectory is None:
        return
    epochs = flat['total_epochs']
    for key, last in (('sam.start_epoch', epochs - 2), ('sam.epochs_ago', epochs - 1)):
        if flat.get(key, 0) > last:
            raise UserError(
                f'{begin} then never adds its loss: {key} is {flat[key]} in a run of '
                f'{epochs} epochs, and must be at most {last}.'
            )
    if not made.trajectory.epochs_ago and not flat['ema.decay']:
        raise UserError(
            f'{begin} learns from a moving average of the weights; ema.decay is 0 and '
            'must be greater, such as 0.9998.'
        )
    if made.trajectory.epochs_ago:
        for key in ('data.mixup_alpha', 'data.cutmix_alpha'):
            if flat[key]:
                raise UserError(
                    f'{begin} remembers what the network says of each image; {key} is '
                    f'{flat[key]} and must be 0, since mixed images are of no one.'
                )


def _check_data_settings(settings):
    streams = settings.name not in data.SOURCES
    if streams and not settings.image_size:
        raise UserError(
            f'data.image_size is 0; {settings.name} has images of all sizes: set the side of the '
            "network's input, such as 224."
        )
    if not streams and 'resized_crop' in data.RECIPES[settings.augment]:
        raise UserError(
            f'data.augment is {settings.augment!r}, which crops large images; {settings.name} is '
            'not of that kind: use one of '
            f'{", ".join(k for k, parts in data.RECIPES.items() if "resized_crop" not in parts)}.'
        )
    if not streams and settings.skip_corrupt:
        raise UserError(
            f'data.skip_corrupt is True; the images of {settings.name} are read as a whole, and '
            'none of them is passed over.'
        )
    if streams and settings.name != 'folder' and settings.fraction < 1:
        raise UserError(
            f'data.fraction is {settings.fraction}; {settings.name} is streamed, and to know its '
            "classes all of it would be read: set it to 1, or use data.name='folder'."
        )
    for key in ('shots', 'base_to_new'):
        if streams and settings.name != 'folder' and settings[key]:
            raise UserError(
                f'data.{key} is {settings[key]}; {settings.name} is streamed, and to know its '
                "classes all of it would be read: use data.name='folder'."
            )
    if settings.mixup_alpha and settings.cutmix_alpha:
        raise UserError(
            f'data.mixup_alpha is {settings.mixup_alpha} and data.cutmix_alpha is '
            f'{settings.cutmix_alpha}; one of them must be 0.'
        )
    if settings.mix_per_image and not (settings.mixup_alpha or settings.cutmix_alpha):
        raise UserError(
            'data.mix_per_image is True; it needs data.mixup_alpha or data.cutmix_alpha.'
        )
    if settings.labels_from and settings.label_noise:
        raise UserError(
            f'data.labels_from is {settings.labels_from!r} and data.label_noise is '
            f'{settings.label_noise}; labels come from one of them: set data.label_noise to 0.'
        )
    if settings.soft_labels and not settings.labels_from:
        raise UserError('data.soft_labels is True; it needs data.labels_from.')


def check_with_data(config: Config, dataset: Dataset) -> None:
    """Checks a config against its dataset, to evaluate on it.

    Raises:
      UserError: top-5 of fewer than six classes.
    """
    if config.eval.top5 and dataset.num_classes < 6:
        raise UserError(
            f'eval.top5 is True; {dataset.name} has only {dataset.num_classes} classes.'
        )


def check_to_train(config: Config, dataset: Dataset) -> None:
    """Checks a config against its dataset, to train on it.

    Raises:
      UserError: fewer training examples than a batch, more steps than are counted, a warm-up longer
        than the run, a window of `late_phase_sam` without a step, a shift wider than the image.
    """
    n = dataset.num_train_examples
    if config.batch_size > n:
        raise UserError(
            f'batch_size is {config.batch_size}; the training set of {dataset.name} has only {n} '
            'examples.'
        )
    total_steps = config.total_epochs * (n // config.batch_size)
    if config.optimizer.warmup_steps > total_steps:
        raise UserError(
            f'optimizer.warmup_steps is {config.optimizer.warmup_steps}; it must not exceed the '
            f'steps of the run, {total_steps}.'
        )
    if config.sam.method == 'late_phase_sam':
        start, end = config.sam.start, config.sam.end
        if math.ceil(start * total_steps) >= math.ceil(end * total_steps):
            raise UserError(
                f'sam.start is {start} and sam.end is {end}; none of the {total_steps} steps of '
                'the run lies between them: choose a wider window.'
            )
    if total_steps > WHOLE:
        raise UserError(
            f'total_epochs is {config.total_epochs}, which are {total_steps} steps of '
            f'{config.batch_size} examples; a run may have {WHOLE}.'
        )
    shifts = 'shift' in data.RECIPES[config.data.augment]
    if shifts and config.data.padding >= min(dataset.pixel_shape[:2]):
        raise UserError(
            f'data.padding is {config.data.padding}; it must be smaller than the images of '
            f'{dataset.name}, {dataset.pixel_shape[0]}x{dataset.pixel_shape[1]}.'
        )


def check_with_layout(config: Config, layout: Layout) -> None:
    """Checks a config against the devices.

    Raises:
      UserError: BatchNorm over all replicas, several of which are on one device.
    """
    if config.model.sync_batch_norm and layout.replicas_per_device > 1:
        raise UserError(
            f'model.sync_batch_norm is True; it needs each of the {layout.num_replicas} replicas '
            f'on a device of its own, and here are {len(layout.devices)} devices: set '
            f'replica_batch_size to {config.batch_size // len(layout.devices)}.'
        )


def check_same_mathematics(config: Config, before: dict[str, Any]) -> None:
    """Refuses to resume with settings that change what is computed.

    Args:
      config: the config of this start.
      before: flat dict of the config of the checkpoint, as read from JSON.

    Raises:
      UserError: naming the keys with both values.
    """
    now, before = jsonable(config), completed(before)
    changed = [
        f'{key} (was {before.get(key)!r}, now {now.get(key)!r})'
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and not key.startswith(FREE_AT_RESUME)
    ]
    if changed:
        raise UserError(
            f'The workdir holds a run with other settings: {", ".join(changed)}; use them again to '
            'resume it, or choose a new workdir.'
        )


def check_same_data(dataset: Dataset, before: str) -> None:
    """Refuses to resume on other data.

    Args:
      dataset: that of this start.
      before: the fingerprint of the data of the checkpoint; '' where it is not known.

    Raises:
      UserError: with both fingerprints.
    """
    now = before and dataset.fingerprint
    if now != before:
        raise UserError(
            f'The workdir holds a run on other data: the fingerprint of {dataset.name} was '
            f'{before} and is {now}; let data.dir, and data.labels_from if set, name the same '
            'files again to resume it, or choose a new workdir.'
        )


def check_same_frozen(now: str, before: str) -> None:
    """Refuses to resume with other variables that no step changes, such as those of another CLIP.

    Args:
      now: their checksum at this start; '' where there are none.
      before: that of the checkpoint.

    Raises:
      UserError: with both.
    """
    if now != before:
        raise UserError(
            f'The workdir holds a run with another CLIP or other names of classes: their checksum '
            f'was {before or "(none)"} and is {now or "(none)"}; let model.init_from name the same '
            'folder again to resume it, or choose a new workdir.'
        )
