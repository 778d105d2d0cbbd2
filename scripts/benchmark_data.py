"""Speed of augmentation on the device, beside the same recipe in tf.data; a table.

    python scripts/benchmark_data.py [--recipes=autoaugment_cutout,basic] [--images=2048]

Images/s of ours (compiled, on JAX's default device, uint8 in and normalised float out) and, where
TensorFlow is installed, of flip, pad and crop in tf.data with parallel calls.
"""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import numpy as np
from absl import app, flags

from sam_jax.data import SOURCES, augment

_RECIPES = flags.DEFINE_list('recipes', list(augment.RECIPES), 'Recipes to time.')
_IMAGES = flags.DEFINE_integer('images', 2048, 'Images a call.')


def _best_rate(function, n, rounds=5):
    """Images/s of the best of some rounds, after one that compiles."""
    function()
    seconds = []
    for _ in range(rounds):
        then = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - then)
    return n / min(seconds)


def ours(recipe, images):
    """Images/s of a recipe with normalisation."""
    source, augmentation = SOURCES['cifar10'], augment.Augmentation(recipe)

    @jax.jit
    def run(images, seed):
        keys = jax.random.split(jax.random.key(seed), len(images))
        pixels = augment.augment(images, keys, augmentation)
        return augment.finish(
            pixels, keys, jax.random.key(seed), augmentation, source.mean, source.std)

    images = jax.device_put(images)
    return _best_rate(lambda: run(images, 0).block_until_ready(), len(images))


def tf_data_basic(images):
    """Images/s of flip, reflect-pad, crop and normalisation in tf.data."""
    import tensorflow as tf

    def one(image):
        image = tf.image.random_flip_left_right(image)
        image = tf.pad(image, [[4, 4], [4, 4], [0, 0]], 'REFLECT')
        image = tf.image.random_crop(image, [32, 32, 3])
        return (tf.cast(image, tf.float32) / 255.0 - 0.5) / 0.25

    dataset = tf.data.Dataset.from_tensor_slices(images).map(
        one, num_parallel_calls=tf.data.AUTOTUNE).batch(128).prefetch(2)
    return _best_rate(lambda: [batch for batch in dataset], len(images))


def main(argv):
    del argv
    images = np.random.RandomState(0).randint(
        0, 256, (_IMAGES.value, 32, 32, 3)).astype(np.uint8)
    print('| recipe | images/s |\n|---|---|')
    for recipe in _RECIPES.value:
        print(f'| {recipe} | {ours(recipe, images):.0f} |', flush=True)
    try:
        print(f'| basic, in tf.data | {tf_data_basic(images):.0f} |')
    except ImportError:
        print('tf.data is not measured: TensorFlow is not installed.')


if __name__ == '__main__':
    app.run(main)
