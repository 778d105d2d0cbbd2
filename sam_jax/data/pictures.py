"""Pictures of what the network sees: a batch after augmentation, and operation by operation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import rngs
from sam_jax.data import ops
from sam_jax.data.augment import Augmentation
from sam_jax.data.dataset import Dataset


def training_images(
    dataset: Dataset, seed: int, step: int, layout: Any, count: int = 64
) -> np.ndarray:
    """Returns the first images of a training step as the network gets them, of this process.

    Args:
      dataset: Dataset.
      seed: the run's seed.
      step: 0-based.
      layout: replicas.Layout.
      count: at most so many.

    Returns:
      NumPy images in [0, 1], (n, H, W, C).
    """
    feed = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[3:]), dataset.train_feed(seed, step, layout)
    )
    total = len(feed['label'])
    first = min(layout.local_positions, default=0) * (total // len(layout.local_positions))
    count = min(count, total)
    # With those at the other end of the batch, with which `augment.mix` mixes them.
    chosen = np.unique(np.concatenate([np.arange(count), np.arange(total - count, total)]))
    keys = jax.vmap(functools.partial(jax.random.fold_in, rngs.key(seed, 'augment', step)))(
        jnp.asarray(first + chosen)
    )
    batch = jax.jit(dataset.train_batch)(
        dataset.device_arrays(dataset.train),
        jax.tree.map(lambda x: x[chosen], feed),
        keys,
        rngs.key(seed, 'augment_batch', step),
    )
    return dataset.to_pixels(batch['image'][:count])


def operations(
    images: np.ndarray, augmentation: Augmentation, levels: tuple[int, ...] = (2, 5, 8)
) -> tuple[list[str], np.ndarray]:
    """Returns each image after each operation of the policies, a row an operation and level.

    Args:
      images: uint8 (n, H, W, C).
      augmentation: augment.Augmentation; decides between the original's constants and corrected
        ones.
      levels: of 10.

    Returns:
      (names of the rows, NumPy images in [0, 1] of shape (rows * n, H, W, C)); the first row is the
      images themselves.
    """
    constants = (
        ops.corrected(min(images.shape[1:3]))
        if augmentation.corrected
        else ops.FAITHFUL_RANDAUGMENT
        if 'randaugment' in augmentation.parts
        else ops.FAITHFUL
    )
    names, rows = ['original'], [images]
    apply = jax.jit(jax.vmap(ops.apply, in_axes=(None, 0, None)))
    for name in ops.NAMES:
        for level in levels:
            op = jax.tree.map(
                jnp.asarray, ops.resolve(name, level, False, images.shape[1:], constants)
            )
            names.append(f'{name} {level}')
            rows.append(apply(op, images, jnp.full((2,), 0.5)))
    return names, np.concatenate([np.asarray(row) for row in rows]) / 255


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Returns images (n, H, W, C) side by side as one, (1, rows * H, columns * W, C).

    Args:
      images: the first rows * columns of them are shown.
      columns: default as many as rows.
    """
    columns = columns or max(int(len(images) ** 0.5), 1)
    rows = len(images) // columns
    height, width, channels = images.shape[1:]
    tiles = images[: rows * columns].reshape(rows, columns, height, width, channels)
    return tiles.swapaxes(1, 2).reshape(1, rows * height, columns * width, channels)
