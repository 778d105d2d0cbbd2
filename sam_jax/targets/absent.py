"""Datasets that are not on disk: their shapes are known, and nothing of them is read or held."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sam_jax import data
from sam_jax.data import records
from sam_jax.data.dataset import Dataset
from sam_jax.data.resident import Split
from sam_jax.data.sources import SOURCES, Source


class Sizes(NamedTuple):
    """How large a dataset is.

    Attributes:
      train, test: examples to train on and to test on.
      shape: (H, W, C) of its images; () where `data.image_size` says it.
    """

    train: int
    test: int
    shape: tuple[int, ...] = ()


# As the readers of sam_jax/data make them: SVHN with `extra`, flowers with `validation`.
SIZES = {
    'digits': Sizes(1297, 500, (8, 8, 1)),
    'fake_cifar10': Sizes(5000, 1000, (32, 32, 3)),
    'cifar10': Sizes(50000, 10000, (32, 32, 3)),
    'cifar100': Sizes(50000, 10000, (32, 32, 3)),
    'svhn': Sizes(73257 + 531131, 26032, (32, 32, 3)),
    'fashion_mnist': Sizes(60000, 10000, (28, 28, 1)),
    'imagenet': Sizes(1281167, 50000),
    'flowers': Sizes(2040, 6149),
    'cars': Sizes(8144, 8041),
    'pets': Sizes(3680, 3669),
    'food101': Sizes(75750, 25250),
    'birds': Sizes(5994, 5794),
    # Of a folder that is not named: ImageNet's, in as many classes.
    'folder': Sizes(1281167, 50000),
}
CLASSES = {
    'folder': 1000,
    **{name: s.num_classes for name, s in SOURCES.items() if isinstance(s, Source)},
    **{name: s.num_classes for name, s in records.STREAMS.items() if hasattr(s, 'num_classes')},
}


def load_dataset(settings: Any) -> Dataset:
    """Returns a dataset of the shapes of the one that `config.data` names, all of it zeros.

    A folder that `data.dir` names is looked at, for the number of its images and classes. A dataset
    of which no sizes are known is read as for training.

    Args:
      settings: `config.data`.

    Raises:
      UserError: the dataset is not known, or something in the settings is wrong.
    """
    sizes = SIZES.get(settings.name)
    if sizes is None:
        return data.load_dataset(settings)
    if sizes.shape:
        source = dataclasses.replace(
            SOURCES[settings.name], read=lambda _: (_split(sizes, 'train'), _split(sizes, 'test'))
        )
        return data.load_dataset(settings, {settings.name: source})
    stream = _Stream(sizes, CLASSES[settings.name])
    found = data.load_dataset(
        settings,
        streams=records.STREAMS
        if settings.name == 'folder' and settings.dir
        else {settings.name: stream},
    )
    return _Streamed(**{f.name: getattr(found, f.name) for f in dataclasses.fields(found)})


def _split(sizes, name):
    count = getattr(sizes, name)
    # Of all classes some, so that there are shots and new classes.
    labels = np.arange(count, dtype=np.int32) % 10
    return _Zeros(_zeros((count, *sizes.shape), np.uint8), labels)


class _Zeros(Split):
    """Zeros in place of examples of which nothing is known."""

    @property
    def checksum(self) -> str:
        return ''


def _zeros(shape, dtype):
    """Zeros that take no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


class _Stream(NamedTuple):
    """As `records.Stream`, of images that nobody will read: of each split there is a length."""

    sizes: Sizes
    num_classes: int

    def open(self, data_dir):
        del data_dir
        return range(self.sizes.train), range(self.sizes.test), self.num_classes


class _Streamed(data.StreamingDataset):
    """Feeds of zeros."""

    def train_feed(self, seed: int, step: int, layout: Any) -> dict[str, np.ndarray]:
        del seed, step
        places = (
            len(layout.local_positions),
            layout.replicas_per_device,
            layout.replica_batch_size,
        )
        return {**self._feed(self.train, places), 'index': _zeros(places, np.int32)}

    def eval_feeds(
        self, split: records.Records, batch_size: int, layout: Any
    ) -> Iterator[dict[str, np.ndarray]]:
        for index, mask in self.eval_index(split, batch_size, layout):
            yield {**self._feed(split, index.shape), 'mask': mask}

    def _feed(self, split, places):
        label = split.relabel(np.zeros(1, int), np.zeros(1, np.int32))[0]
        return {
            'pixels': _zeros((*places, *self.pixel_shape), np.uint8),
            'label': _zeros((*places, *label.shape), label.dtype),
        }
