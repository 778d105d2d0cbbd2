"""The resident input path: uint8 data lies on every device, a step receives indices.

The batch of step t is a slice of a permutation that depends on (seed, epoch) alone, and an
example's augmentation on (seed, step, place in the global batch), so neither the number of devices
nor a restart changes what the network sees.
"""

import dataclasses
import functools

import numpy as np

from sam_jax import rngs
from sam_jax.data import augment
from sam_jax.data.sources import SOURCES, Split, add_label_noise, split_validation
from sam_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ResidentDataset:
    """A dataset held on the devices.

    Attributes:
      name: its name.
      num_classes: number of classes.
      mean, std: for normalisation, per channel.
      train: the training Split, with noisy labels if asked for.
      evals: name -> Split for evaluation: 'test', 'validation' if asked for, 'train' and, under
        label noise, 'train_true_labels'.
      augmentation: augment.Augmentation of the training images.
    """

    name: str
    num_classes: int
    mean: tuple
    std: tuple
    train: Split
    evals: dict
    augmentation: augment.Augmentation

    @property
    def num_train_examples(self):
        return len(self.train)

    @property
    def image_shape(self):
        return self.train.images.shape[1:]

    def device_arrays(self, split):
        """Returns the arrays of a Split that the compiled functions take, on the host."""
        return {'images': split.images, 'labels': split.labels}

    def train_feed(self, seed, step, layout):
        """Returns what the training step `step` (0-based) of this process's devices receives.

        Returns:
          {'index': int32 (local devices, replicas per device, replica batch size)}.
        """
        batch_size = layout.num_replicas * layout.replica_batch_size
        steps_per_epoch = self.num_train_examples // batch_size
        epoch, i = divmod(step, steps_per_epoch)
        order = _epoch_order(seed, epoch, self.num_train_examples)
        index = order[i * batch_size:(i + 1) * batch_size]
        index = index.reshape(len(layout.devices), layout.replicas_per_device, -1)
        return {'index': index[layout.local_positions]}

    def eval_feeds(self, split, batch_size, layout):
        """Yields what evaluation steps receive: every example once, padded under a mask.

        Yields:
          {'index': int32 (local devices, n), 'mask': float32 of that shape}, n the smallest number
          for which all devices together hold `batch_size`.
        """
        num_devices = len(layout.devices)
        per_device = -(-min(batch_size, len(split)) // num_devices)
        for start in range(0, len(split), per_device * num_devices):
            index = np.arange(start, start + per_device * num_devices, dtype=np.int32)
            mask = (index < len(split)).astype(np.float32)
            feed = {'index': np.minimum(index, len(split) - 1), 'mask': mask}
            yield {name: x.reshape(num_devices, per_device)[layout.local_positions]
                   for name, x in feed.items()}

    def train_batch(self, arrays, feed, keys, batch_key):
        """Gathers, augments and normalises; runs inside the compiled step.

        Args:
          arrays: of the training split, on the device.
          feed: one device's row of `train_feed`, index (...).
          keys: one key an example, (...).
          batch_key: one key for the whole global batch.

        Returns:
          {'image': (..., H, W, C) float, 'label': (...) int32}.
        """
        index, keys = feed['index'], keys.reshape(-1)
        images = augment.augment(
            arrays['images'][index.reshape(-1)], keys, self.augmentation)
        images = augment.finish(images, keys, batch_key, self.augmentation, self.mean, self.std)
        return {'image': images.reshape(*index.shape, *self.image_shape),
                'label': arrays['labels'][index]}

    def eval_batch(self, arrays, feed):
        """Gathers and normalises; runs inside the compiled evaluation step.

        Returns:
          {'image', 'label', 'mask'} for one device's row of `eval_feeds`.
        """
        index = feed['index']
        return {'image': augment.normalize(arrays['images'][index], self.mean, self.std),
                'label': arrays['labels'][index], 'mask': feed['mask']}

    def to_pixels(self, images):
        """Undoes the normalisation: float images -> NumPy images in [0, 1], for pictures."""
        return np.clip(np.asarray(images) * np.array(self.std) + np.array(self.mean), 0.0, 1.0)


@functools.lru_cache(maxsize=2)
def _epoch_order(seed, epoch, n):
    # Remembered, since every step of an epoch asks for a slice of it.
    return rngs.permutation(seed, 'order', n, epoch)


def load_dataset(settings):
    """Reads the dataset that `config.data` names.

    Args:
      settings: `config.data`.

    Raises:
      UserError: the dataset is not known or not on disk.
    """
    if settings.name not in SOURCES:
        raise UserError(f'data.name is {settings.name!r}; the datasets are {", ".join(SOURCES)}.')
    source = SOURCES[settings.name]
    train, test = source.read(settings.dir)
    evals = {'test': test}
    if settings.validation:
        train, evals['validation'] = split_validation(train, source.validation_size)
    true_train = train
    if settings.label_noise:
        train = add_label_noise(train, settings.label_noise, source.num_classes,
                                settings.label_noise_seed, settings.label_noise_kind)
        evals['train_true_labels'] = true_train
    evals['train'] = train
    return ResidentDataset(
        settings.name, source.num_classes, source.mean, source.std, train, evals,
        augment.Augmentation(
            settings.augment, settings.padding, source.policy, settings.corrected_ops,
            settings.cutout_size, settings.cutout_per_image, settings.randaugment_layers,
            settings.randaugment_magnitude))
