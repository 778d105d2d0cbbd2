"""What both input paths share: the order of the examples, and what becomes of a batch of pixels.

The batch of step t is a slice of a permutation that depends on (seed, epoch) alone, and an
example's augmentation on (seed, step, place in the global batch), so neither the number of devices
nor a restart changes what the network sees.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sam_jax import rngs
from sam_jax.data import augment
from sam_jax.data.preprocessing import Preprocessing


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset; the two input paths are its subclasses.

    Attributes:
      name: its name.
      num_classes: number of classes.
      mean, std: for normalisation, per channel.
      pixel_shape: (H, W, C) of the uint8 images that reach the device.
      train: the training split, with noisy or predicted labels if asked for.
      evals: name -> split for evaluation: 'test', 'validation' if asked for, 'train', and, where
        the labels to train on are not the true ones, 'train_true_labels' and parts of it.
      augmentation: augment.Augmentation of the training images.
      classes: names of the classes; () where they are not known.
      new_classes: with `data.base_to_new`, names of those that are evaluated alone: the split 'new'
        of `evals`, whose labels count from 0 again.
    """

    name: str
    num_classes: int
    mean: tuple
    std: tuple
    pixel_shape: tuple
    train: Any
    evals: dict
    augmentation: augment.Augmentation
    classes: tuple[str, ...] = ()
    new_classes: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    @property
    def num_train_examples(self) -> int:
        return len(self.train)

    @property
    def num_images(self) -> int:
        """Number of training images that a resident feed's `index` may name; 0 if streamed."""
        return 0

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C) of the images that reach the network."""
        size = self.augmentation.image_size
        return (size, size, self.pixel_shape[2]) if size else self.pixel_shape

    @property
    def preprocessing(self) -> Preprocessing:
        """What becomes of images that are not augmented."""
        return Preprocessing(
            tuple(self.pixel_shape), self.mean, self.std, self.augmentation.image_size
        )

    # What the two input paths do each in its own way.

    @property
    def fingerprint(self) -> str:
        """What tells this data from other data in its place; '' where that would mean reading all.

        Training goes on only on data of the same one.
        """
        raise NotImplementedError

    def device_arrays(self, split: Any) -> dict[str, np.ndarray]:
        """Returns the arrays of a split that the compiled functions take, on the host."""
        raise NotImplementedError

    def pixels(self, arrays: dict[str, Any], feed: dict[str, Any]) -> Any:
        """Returns the uint8 images of a feed, (examples, H, W, C), where its arrays are."""
        raise NotImplementedError

    def train_feed(self, seed: int, step: int, layout: Any) -> dict[str, np.ndarray]:
        """Returns what a training step (0-based) of this process's devices receives."""
        raise NotImplementedError

    def eval_feeds(
        self, split: Any, batch_size: int, layout: Any
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields what the evaluation steps of this process's devices receive."""
        raise NotImplementedError

    def original_images(self, count: int) -> np.ndarray:
        """Returns the first training images before augmentation, uint8 (n, H, W, C)."""
        raise NotImplementedError

    def check_memory(self, splits: list[Any], memory: float, num_devices: int) -> None:
        """Refuses what the devices cannot hold."""
        raise NotImplementedError

    # What they share.

    def train_index(self, seed: int, step: int, layout: Any) -> np.ndarray:
        """Returns the training examples of step `step` (0-based), as positions in `train`.

        Returns:
          int32 (local devices, replicas per device, replica batch size), the part of this process.
        """
        batch_size = layout.num_replicas * layout.replica_batch_size
        epoch, i = divmod(step, self.num_train_examples // batch_size)
        order = _epoch_order(seed, epoch, self.num_train_examples)
        index = order[i * batch_size : (i + 1) * batch_size]
        return index.reshape(len(layout.devices), layout.replicas_per_device, -1)[
            layout.local_positions
        ]

    def eval_index(
        self, split: Any, batch_size: int, layout: Any
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields the examples of evaluation steps: every one once, padded under a mask.

        Yields:
          (index, mask): int32 and float32 (local devices, n), n the smallest number for which all
          devices together hold `batch_size`.
        """
        num_devices = len(layout.devices)
        per_device = -(-min(batch_size, len(split)) // num_devices)
        for start in range(0, len(split), per_device * num_devices):
            index = np.arange(start, start + per_device * num_devices, dtype=np.int32)
            mask = (index < len(split)).astype(np.float32)
            yield tuple(
                x.reshape(num_devices, per_device)[layout.local_positions]
                for x in (np.minimum(index, len(split) - 1), mask)
            )

    def train_feeds(
        self, seed: int, first_step: int, last_step: int, layout: Any
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields what the training steps first_step ... last_step - 1 of this process receive.

        Whatever is read ahead, feed t is a function of (seed, t) alone.
        """
        for step in range(first_step, last_step):
            yield self.train_feed(seed, step, layout)

    def train_batch(
        self,
        arrays: dict[str, jax.Array],
        feed: dict[str, jax.Array],
        keys: jax.Array,
        batch_key: jax.Array,
        axis_name: str | None = None,
    ) -> dict[str, jax.Array]:
        """Augments and normalises; runs inside the compiled step.

        Args:
          arrays: of the training split, on the device.
          feed: one device's row of `train_feed`, leading axes (...).
          keys: one key an example, (...).
          batch_key: one key for the whole global batch.
          axis_name: of the devices that share the global batch; None if all of it is here.

        Returns:
          {'image': (..., H, W, C) float, 'label': (...) int32, or distributions (..., classes)}.
        """
        shape, keys = feed['label'].shape[: keys.ndim], keys.reshape(-1)
        labels = feed['label'].reshape(len(keys), *feed['label'].shape[len(shape) :])
        images = augment.augment(self.pixels(arrays, feed), keys, self.augmentation)
        images = augment.finish(images, keys, batch_key, self.augmentation, self.mean, self.std)
        images, labels = augment.mix(
            images, labels, keys, batch_key, self.augmentation, self.num_classes, axis_name
        )
        images = augment.enlarge(images, self.augmentation.image_size)
        return {
            'image': images.reshape(*shape, *self.image_shape),
            'label': labels.reshape(*shape, *labels.shape[1:]),
        }

    def eval_batch(
        self, arrays: dict[str, jax.Array], feed: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Preprocesses; runs inside the compiled evaluation step.

        Returns:
          {'image', 'label', 'mask'} for one device's row of `eval_feeds`.
        """
        shape = feed['mask'].shape
        images = self.preprocessing(self.pixels(arrays, feed))
        return {
            'image': images.reshape(*shape, *self.image_shape),
            'label': feed['label'],
            'mask': feed['mask'],
        }

    def to_pixels(self, images: jax.Array | np.ndarray) -> np.ndarray:
        """Undoes the normalisation: float images -> NumPy images in [0, 1], for pictures."""
        return np.clip(np.asarray(images) * np.array(self.std) + np.array(self.mean), 0.0, 1.0)


@functools.lru_cache(maxsize=2)
def _epoch_order(seed, epoch, n):
    # Remembered, since every step of an epoch asks for a slice of it.
    return rngs.permutation(seed, 'order', n, epoch)
