"""The resident input path: uint8 data lies on every device, a step receives indices."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from sam_jax.data.dataset import Dataset
from sam_jax.errors import UserError


@dataclasses.dataclass
class Split:
    """Examples on the host.

    Attributes:
      images: uint8 (N, H, W, C).
      labels: int32 (n,), or distributions float32 (n, classes).
      index: which image each label is of, int32 (n,); None for all of them in order. Splits that
        share their images lie on the devices once.
    """

    images: np.ndarray
    labels: np.ndarray
    index: np.ndarray | None = None

    def __post_init__(self):
        if self.index is None:
            self.index = np.arange(len(self.labels), dtype=np.int32)

    def __len__(self):
        return len(self.labels)

    @property
    def checksum(self) -> str:
        """16 hexadecimal digits of the images of a whole split: which examples it holds."""
        return hashlib.sha256(np.ascontiguousarray(self.images)).hexdigest()[:16]

    def part(self, chosen: slice | np.ndarray) -> 'Split':
        """Returns the chosen examples of a whole split, as a split with images of its own."""
        return dataclasses.replace(
            self, images=self.images[chosen], labels=self.labels[chosen], index=None
        )

    def subset(self, chosen: slice | np.ndarray) -> 'Split':
        """Returns the chosen examples, on the same images."""
        return Split(self.images, self.labels[chosen], self.index[chosen])

    def relabelled(self, labels: np.ndarray) -> 'Split':
        """Returns the same images with other labels."""
        return Split(self.images, labels, self.index)


class ResidentDataset(Dataset):
    """A dataset whose images lie on the devices; its splits are `Split`s."""

    @property
    def num_images(self) -> int:
        return len(self.train.images)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of all images and labels, to train on and to test on."""
        digest = hashlib.sha256()
        for split in (self.train, self.evals['test']):
            for array in (split.images, split.labels):
                digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()[:16]

    def original_images(self, count: int) -> np.ndarray:
        """Returns the first training images before augmentation, uint8 (n, H, W, C)."""
        return self.train.images[self.train.index[:count]]

    def device_arrays(self, split: Split) -> dict[str, np.ndarray]:
        """Returns the arrays of a split that the compiled functions take, on the host."""
        # Flat: of images as they are, a TPU makes a copy in another layout at every step.
        return {'images': split.images.reshape(len(split.images), -1)}

    def train_feed(self, seed: int, step: int, layout: Any) -> dict[str, np.ndarray]:
        """Returns what the training step `step` (0-based) of this process's devices receives.

        Returns:
          {'index', 'label'}: int32 (local devices, replicas per device, replica batch size); labels
          may be distributions, (..., classes) float32.
        """
        index = self.train_index(seed, step, layout)
        return {'index': self.train.index[index], 'label': self.train.labels[index]}

    def eval_feeds(
        self, split: Split, batch_size: int, layout: Any
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields {'index', 'label', 'mask'} of the evaluation steps, see `eval_index`."""
        for index, mask in self.eval_index(split, batch_size, layout):
            yield {'index': split.index[index], 'label': split.labels[index], 'mask': mask}

    def pixels(self, arrays: dict[str, Any], feed: dict[str, Any]) -> Any:
        """Returns the uint8 images of a feed, (examples, H, W, C), where its arrays are."""
        return arrays['images'][feed['index'].reshape(-1)].reshape(-1, *self.pixel_shape)

    def check_memory(self, splits: list[Split], memory: float, num_devices: int) -> None:
        """Refuses what the devices cannot hold.

        Args:
          splits: the splits that are placed on each device, each set of images once.
          memory: free bytes of the place that holds `num_devices` devices' copies.
          num_devices: how many copies that is.

        Raises:
          UserError: with the sizes.
        """
        size = sum({id(s.images): s.images.nbytes for s in splits}.values())
        if size * num_devices > memory:
            raise UserError(
                f'data.name is {self.name!r}; its images are {size / 2**30:.3g} GiB, which each '
                f'device holds whole: the {num_devices} on this memory need '
                f'{size * num_devices / 2**30:.3g} GiB, and {memory / 2**30:.3g} are free. Use '
                "fewer devices, one with more memory, or image files with data.name='folder'."
            )
