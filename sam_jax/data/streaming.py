"""The streaming input path: images are read by number, decoded and cropped on the host, by threads.

Grain reads ahead in threads; what it reads stands here: the example and the window at each place of
each batch are functions of (seed, step, place), so any process can start at any step, reads its own
share alone, and needs no state of the reader in its checkpoint.
"""

import dataclasses
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sam_jax import rngs
from sam_jax.data import decode, labels, records
from sam_jax.data.dataset import Dataset
from sam_jax.errors import UserError

_log = logging.getLogger(__name__)

# How many damaged images in a row are passed over; with more the dataset is damaged as a whole.
_PATIENCE = 100


@dataclasses.dataclass(frozen=True)
class StreamingDataset(Dataset):
    """A dataset whose splits are `records.Records`.

    Attributes:
      skip_corrupt: whether a damaged image is passed over: in training the next example takes its
        place, in evaluation it does not count. Otherwise it ends the run.
      threads: that read and decode; 0 for one a core.
      corrupt: the damaged images met so far.
    """

    skip_corrupt: bool = False
    threads: int = 0
    corrupt: 'Corrupt' = dataclasses.field(default_factory=lambda: Corrupt())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the names and sizes of a folder's files, and of labels from a file; else ''."""
        sources = (split.source for split in (self.train, self.evals['test']))
        prints = [
            source.fingerprint() for source in sources if isinstance(source, records.FolderSource)
        ]
        if isinstance(self.train.relabel, labels.Given):
            prints.append(self.train.relabel.checksum)
        return '-'.join(prints)

    def device_arrays(self, split: records.Records) -> dict[str, np.ndarray]:
        """Nothing of a split lies on the devices."""
        del split
        return {}

    def check_memory(self, splits: list[records.Records], memory: float, num_devices: int) -> None:
        """What does not lie on the devices fits."""
        del splits, memory, num_devices

    def pixels(self, arrays: dict[str, Any], feed: dict[str, Any]) -> Any:
        """Returns the uint8 images of a feed, (examples, H, W, C), where its arrays are."""
        del arrays
        return feed['pixels'].reshape(-1, *self.pixel_shape)

    def original_images(self, count: int) -> np.ndarray:
        """Returns the first training images before augmentation, uint8 (n, H, W, C)."""
        crop = functools.partial(decode.center_crop, size=self.pixel_shape[0])
        examples = (self.decoded(self.train, i, crop) for i in range(len(self.train)))
        return np.stack([e['pixels'] for e in itertools.islice(filter(None, examples), count)])

    def train_feeds(
        self, seed: int, first_step: int, last_step: int, layout: Any
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields what the training steps of this process's devices receive, read ahead.

        Yields:
          {'pixels': uint8 (local devices, replicas per device, replica batch size, H, W, C),
          'label': (local devices, replicas per device, replica batch size[, classes]),
          'index': int32, of the same leading axes, the images' positions in `train`}.

        Raises:
          UserError: a damaged image, where skip_corrupt is False.
        """
        examples = _TrainExamples(self, seed, first_step, last_step, layout)
        return self._read(examples, examples.shape)

    def train_feed(self, seed: int, step: int, layout: Any) -> dict[str, np.ndarray]:
        """Returns one of `train_feeds`."""
        return next(iter(self.train_feeds(seed, step, step + 1, layout)))

    def eval_feeds(
        self, split: records.Records, batch_size: int, layout: Any
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields {'pixels', 'label', 'mask'} of the evaluation steps, see `eval_index`."""
        batches = list(self.eval_index(split, batch_size, layout))
        examples = _EvalExamples(
            self, split, *(np.concatenate([x.ravel() for x in part]) for part in zip(*batches))
        )
        return self._read(examples, batches[0][0].shape)

    def _read(self, examples, shape):
        import grain

        decode.has_tensorflow()  # says so once, before several threads ask
        threads, batch = self.threads or os.cpu_count() or 1, int(np.prod(shape))
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=batch + 2 * threads)
        batches = grain.MapDataset.source(examples).to_iter_dataset(ahead).batch(batch)
        # The images of a batch are put together in a thread of its own.
        for feed in grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1):
            yield {name: x.reshape(*shape, *x.shape[1:]) for name, x in feed.items()}

    def decoded(
        self, split: records.Records, i: int, crop: Callable[[bytes], np.ndarray]
    ) -> dict[str, Any] | None:
        """Returns {'pixels', 'label'} of the i-th example, None if it is passed over.

        Args:
          split: records.Records.
          i: position in it.
          crop: bytes -> uint8 image.
        """
        encoded, label, name = split[i]
        try:
            return {'pixels': crop(encoded), 'label': label}
        except ValueError as e:
            if not self.skip_corrupt:
                raise UserError(
                    f'{name} cannot be decoded ({e}); data.skip_corrupt=True passes '
                    'over damaged images.'
                ) from e
            self.corrupt.note(name, e)
            return None


class Corrupt:
    """The damaged images met so far, each named once in the log; reading threads share it."""

    def __init__(self):
        self._names, self._lock = set(), threading.Lock()

    def __len__(self):
        return len(self._names)

    def note(self, name: str, error: Exception) -> None:
        """Adds an image and says so, if it is new."""
        with self._lock:
            if name in self._names:
                return
            self._names.add(name)
            _log.warning(
                '%s cannot be decoded (%s); it is passed over, number %d so far.',
                name,
                error,
                len(self._names),
            )


class _TrainExamples:
    """The training examples of this process in the order of its steps, for Grain to read."""

    def __init__(self, dataset, seed, first_step, last_step, layout):
        self._dataset, self._seed, self._layout = dataset, seed, layout
        self._first_step, self._steps = first_step, last_step - first_step
        self.shape = (
            len(layout.local_positions),
            layout.replicas_per_device,
            layout.replica_batch_size,
        )
        per_device = layout.replicas_per_device * layout.replica_batch_size
        self._places = np.add.outer(
            np.array(layout.local_positions) * per_device, np.arange(per_device)
        ).ravel()

    def __len__(self):
        return self._steps * len(self._places)

    def __getitem__(self, k):
        dataset = self._dataset
        step, j = divmod(k, len(self._places))
        step += self._first_step
        i = int(dataset.train_index(self._seed, step, self._layout).ravel()[j])
        size = dataset.pixel_shape[0]
        crop = functools.partial(decode.center_crop, size=size)
        if 'resized_crop' in dataset.augmentation.parts:
            window = rngs.integers(self._seed, 'crop', 2, 2**31, step, self._places[j])
            crop = functools.partial(decode.random_crop, size=size, seed=window)
        for attempt in range(_PATIENCE):
            position = (i + attempt) % len(dataset.train)
            example = dataset.decoded(dataset.train, position, crop)
            if example:
                return {**example, 'index': np.int32(position)}
        raise UserError(f'{_PATIENCE} training images in a row cannot be decoded.')


class _EvalExamples:
    """The examples of this process's evaluation batches, for Grain to read."""

    def __init__(self, dataset, split, index, mask):
        self._dataset, self._split, self._index, self._mask = dataset, split, index, mask

    def __len__(self):
        return len(self._index)

    def __getitem__(self, k):
        shape = self._dataset.pixel_shape
        if self._mask[k]:
            crop = functools.partial(decode.center_crop, size=shape[0])
            example = self._dataset.decoded(self._split, int(self._index[k]), crop)
            if example:
                return {**example, 'mask': np.float32(1)}
        # What the mask hides still needs a label of the right shape.
        label = np.zeros_like(self._split.relabel(np.array([0]), np.array([0], np.int32))[0])
        return {'pixels': np.zeros(shape, np.uint8), 'label': label, 'mask': np.float32(0)}
