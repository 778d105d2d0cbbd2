"""`load_dataset`: from `config.data` to a dataset of either input path."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sam_jax import rngs
from sam_jax.data import augment, labels, records
from sam_jax.data.resident import ResidentDataset
from sam_jax.data.sources import SOURCES, OwnSource, Source, check_split
from sam_jax.data.streaming import StreamingDataset
from sam_jax.errors import UserError

NAMES = (*SOURCES, *records.STREAMS)

# OpenAI's CLIP, of pixels / 255.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Of these, `data.dir` says which dataset it is.
OWN = ('folder', *(name for name, source in SOURCES.items() if isinstance(source, OwnSource)))


def load_dataset(
    settings: Any,
    sources: Mapping[str, Source | OwnSource] = SOURCES,
    streams: Mapping[str, Any] = records.STREAMS,
) -> ResidentDataset | StreamingDataset:
    """Reads, or for the streaming path opens, the dataset that `config.data` names.

    Args:
      settings: `config.data`.
      sources: {name: Source} of those that are read whole.
      streams: {name: Stream} of those that are read image by image.

    Raises:
      UserError: the dataset is not known, not on disk, or something in it is wrong.
    """
    if settings.name in sources:
        return _resident(settings, sources[settings.name])
    if settings.name in streams:
        return _streaming(settings, streams[settings.name])
    raise UserError(f'data.name is {settings.name!r}; the datasets are {", ".join(NAMES)}.')


def _resident(settings, source):
    train, test, source = source.open(settings.dir)
    for name, split in [('train', train), ('test', test)]:
        check_split(split, source, f'{name} split of {settings.name}')
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f'The images of {settings.name} are {train.images.shape[1:]} in the train split and '
            f'{test.images.shape[1:]} in the test split; they must be of one size.'
        )
    if settings.normalization == 'clip' and len(source.mean) != 3:
        raise UserError(
            f"data.normalization is 'clip', which is of three colours; the images of "
            f"{settings.name} have {len(source.mean)} channel: set it to 'dataset'."
        )
    evals, classes, new_classes = {'test': test}, source.classes, ()
    if settings.base_to_new:
        train, evals, classes, new_classes = _base_and_new(train, test, classes, settings.name)
        source = dataclasses.replace(source, num_classes=len(classes))
    if settings.validation:
        train, evals['validation'] = _held_out(train, source.validation_size)
    train = _part(train, settings)
    relabel = labels.create(settings, settings.name, train, source.num_classes)
    true = train
    if relabel is not labels.unchanged:
        train = true.relabelled(relabel(np.arange(len(true)), true.labels))
        right = labels.true_class(train.labels) == true.labels
        parts = {'train_clean': train.subset(right), 'train_noisy': train.subset(~right)}
        evals.update({name: part for name, part in parts.items() if len(part)})
        evals['train_true_labels'] = true
    evals['train'] = train
    return ResidentDataset(
        settings.name,
        source.num_classes,
        *_normalization(settings, (source.mean, source.std)),
        train.images.shape[1:],
        train,
        evals,
        _augmentation(settings, source.policy, settings.image_size),
        classes,
        new_classes=new_classes,
    )


def _streaming(settings, stream):
    train, test, num_classes = stream.open(settings.dir)
    classes = tuple(getattr(train, 'classes', ()))
    train, test = (records.Records(source, np.arange(len(source))) for source in (train, test))
    evals, new_classes = {'test': test}, ()
    if settings.base_to_new:
        train, evals, classes, new_classes = _base_and_new(train, test, classes, settings.name)
        num_classes = len(classes)
    if settings.validation:
        train, evals['validation'] = _held_out(train)
    train = _part(train, settings)
    relabel = labels.create(settings, settings.name, train, num_classes)
    if relabel is not labels.unchanged:
        evals['train_true_labels'] = train
        train = train.relabelled(relabel)
    evals['train'] = train
    return StreamingDataset(
        settings.name,
        num_classes,
        *_normalization(settings, (records.IMAGENET_MEAN, records.IMAGENET_STD)),
        (settings.image_size, settings.image_size, 3),
        train,
        evals,
        _augmentation(settings, 'imagenet', 0),
        classes,
        settings.skip_corrupt,
        settings.threads,
        new_classes=new_classes,
    )


def _held_out(train, size=0):
    # As the paper's code: the last `size` examples, or the last tenth, but not of none.
    cut = len(train) - (size or max(1, len(train) // 10))
    return train.part(slice(None, cut)), train.part(slice(cut, None))


def _normalization(settings, own):
    return own if settings.normalization == 'dataset' else (CLIP_MEAN, CLIP_STD)


def _base_and_new(train, test, classes, name):
    """(train, evals, classes, new classes) of the first half of the classes, and the others."""
    if len(classes) < 4:
        known = f'{len(classes)} classes' if classes else 'no names for its classes'
        raise UserError(
            f'data.base_to_new is True; {name} has {known}: it needs names for four or more.'
        )
    base = -(-len(classes) // 2)
    evals = {
        'test': test.part(np.flatnonzero(test.labels < base)),
        'new': _from_zero(test.part(np.flatnonzero(test.labels >= base)), base),
    }
    train = train.part(np.flatnonzero(train.labels < base))
    parts = {'training images of the first': train, 'test images of the first': evals['test']}
    for what, part in {**parts, 'test images of the second': evals['new']}.items():
        if not len(part):
            raise UserError(f'data.base_to_new is True; {name} has no {what} half of its classes.')
    return train, evals, classes[:base], classes[base:]


def _from_zero(split, base):
    """A split of labels >= base with labels that count from 0."""
    if isinstance(split, records.Records):
        return split.relabelled(lambda index, true: true - base)
    return split.relabelled(split.labels - base)


def _part(train, settings):
    """The part that `data.fraction` and `data.shots` ask for; labels are read only then."""
    if settings.fraction < 1:
        train = train.part(balanced_part(train.labels, settings.fraction, settings.fraction_seed))
    if settings.shots:
        train = train.part(few_shots(train.labels, settings.shots, settings.fraction_seed))
    return train


def few_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Chooses so many examples of each class; all of a class that has no more.

    They are the first of the random order of `balanced_part`, so fewer shots lie within more.

    Args:
      labels: the class of each example, integers (N,).
      shots: at least 1.
      seed: decides which examples.

    Returns:
      Their positions, ascending.
    """
    chosen = np.zeros(len(labels), bool)
    for label, n in zip(*np.unique(labels, return_counts=True)):
        ranks = rngs.permutation(seed, 'fraction', n, label)
        chosen[labels == label] = ranks < shots
    return np.flatnonzero(chosen)


def balanced_part(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Chooses a part of the examples in which each class keeps its share.

    A random order of each class puts its example of rank r (from 0) of n at (r + 1/2) / n; the part
    is the round(fraction N) examples that come first (Webster's method). So a class has its share
    to within about one example, and a smaller part lies in every larger one of the same seed.

    Args:
      labels: the class of each example, integers (N,).
      fraction: in (0, 1].
      seed: decides which examples.

    Returns:
      Their positions, ascending.
    """
    places = np.empty(len(labels))
    for label, n in zip(*np.unique(labels, return_counts=True)):
        ranks = rngs.permutation(seed, 'fraction', n, label)
        places[labels == label] = (ranks + 0.5) / n
    return np.sort(np.argsort(places, kind='stable')[: round(fraction * len(labels))])


def _augmentation(settings, policy, image_size):
    return augment.Augmentation(
        settings.augment,
        settings.padding,
        policy,
        settings.corrected_ops,
        settings.cutout_size,
        settings.cutout_per_image,
        settings.cutout_probability,
        settings.randaugment_layers,
        settings.randaugment_magnitude,
        settings.mixup_alpha,
        settings.cutmix_alpha,
        settings.mix_per_image,
        image_size,
    )
