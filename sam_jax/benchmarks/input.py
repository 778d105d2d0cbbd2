"""Speed of the input: augmentation on the device, decoding on the host, each beside TensorFlow's.

    python -m sam_jax.benchmarks.input [--recipes=autoaugment_cutout,basic] [--images=2048]
    python -m sam_jax.benchmarks.input --recipes= --jpegs=512 --threads=1     # decoding alone
    python -m sam_jax.benchmarks.input --recipes= --resume=4096               # in mid-epoch
    python -m sam_jax.benchmarks.input --recipes= --share=wrn28_10            # of a training step

Augmentation: images/s of ours (compiled, on JAX's default device, uint8 in and normalised float
out) and of the same recipe in tf.data with parallel calls. Decoding: JPEG files -> uint8 crops of
224x224, ours (files, random windows, Grain, batches) beside bare loops over TensorFlow's operations
in as many threads, on the same windows. Resume: seconds until the first batch in the middle of an
epoch, ours from array_record files beside clu.deterministic_data, which skips what came before it,
from TFRecord files. Share: seconds of a SAM step with its augmentation over
those of the same step on images that are augmented already.
"""

import concurrent.futures
import io
import os
import tempfile
import time
import types
from collections.abc import Iterator

import jax
import numpy as np
from absl import app, flags

from sam_jax import data, replicas, tables
from sam_jax.data import SOURCES, augment, decode, policies
from sam_jax.experiment import Experiment
from sam_jax.settings import schema

_RECIPES = flags.DEFINE_list('recipes', ['basic', 'autoaugment_cutout'], 'Recipes to time.')
_IMAGES = flags.DEFINE_integer('images', 2048, 'Images a call.')
_JPEGS = flags.DEFINE_integer('jpegs', 0, 'JPEG files of 500x375 to decode; 0 for none.')
_THREADS = flags.DEFINE_integer('threads', 0, 'Threads that decode; 0 for one a core.')
_RESUME = flags.DEFINE_integer('resume', 0, 'Examples of an epoch in whose middle to begin.')
_SHARE = flags.DEFINE_string('share', '', 'Model whose step is timed with and without.')
_BATCH = flags.DEFINE_integer('batch', 128, "Examples of that model's step.")


def _best_rate(function, n, rounds=5):
    """Images/s of the best of some rounds, after one that compiles."""
    function()
    seconds = []
    for _ in range(rounds):
        then = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - then)
    return n / min(seconds)


def ours(recipe: str, images: np.ndarray) -> float:
    """Images/s of a recipe with normalisation."""
    source, augmentation = SOURCES['cifar10'], augment.Augmentation(recipe)

    @jax.jit
    def run(images, seed):
        keys = jax.random.split(jax.random.key(seed), len(images))
        pixels = augment.augment(images, keys, augmentation)
        return augment.finish(
            pixels, keys, jax.random.key(seed), augmentation, source.mean, source.std
        )

    images = jax.device_put(images)
    return _best_rate(lambda: run(images, 0).block_until_ready(), len(images))


def tf_data(recipe: str, images: np.ndarray) -> float:
    """Images/s of the same recipe in tf.data; of 'basic' and 'autoaugment_cutout'."""
    import tensorflow as tf

    parts = augment.RECIPES[recipe]
    policy = _tf_autoaugment(policies.POLICIES['cifar']) if 'autoaugment' in parts else None

    def one(image):
        if policy:
            image = policy(image)
        image = tf.image.random_flip_left_right(image)
        image = tf.pad(image, [[4, 4], [4, 4], [0, 0]], 'REFLECT')
        image = tf.image.random_crop(image, [32, 32, 3])
        return (tf.cast(image, tf.float32) / 255.0 - 0.5) / 0.25

    def cut(batch):
        center = tf.random.uniform([2], 0, 32, tf.int32)
        inside = [(tf.range(32) >= c - 8) & (tf.range(32) < c + 8) for c in tf.unstack(center)]
        hole = inside[0][:, None] & inside[1][None]
        return tf.where(hole[None, :, :, None], 0.0, batch)

    dataset = (
        tf.data.Dataset.from_tensor_slices(images)
        .map(one, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(128)
    )
    if 'cutout' in parts:
        dataset = dataset.map(cut)
    dataset = dataset.prefetch(2)
    return _best_rate(lambda: [batch for batch in dataset], len(images))


def _tf_autoaugment(policy):
    """AutoAugment in TensorFlow's operations: uint8 image -> uint8 image."""
    import tensorflow as tf

    def warp(*matrix):
        def transform(image, level):
            row = [x(level) if callable(x) else x for x in matrix]
            return tf.raw_ops.ImageProjectiveTransformV3(
                images=image[None],
                transforms=[row + [0.0, 0.0]],
                output_shape=[32, 32],
                fill_value=0.0,
                interpolation='NEAREST',
                fill_mode='CONSTANT',
            )[0]

        return transform

    def signed(scale):
        return lambda level: tf.where(tf.random.uniform([]) < 0.5, level, -level) * scale

    def blend(other):
        def mix(image, level):
            factor = level / 10 * 1.8 + 0.1
            a, b = tf.cast(other(image), tf.float32), tf.cast(image, tf.float32)
            return tf.saturate_cast(a + factor * (b - a), tf.uint8)

        return mix

    def gray(image):
        return tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image))

    def mean(image):
        histogram = tf.histogram_fixed_width(tf.cast(gray(image)[..., 0], tf.int32), [0, 255], 256)
        return tf.fill([32, 32, 3], tf.cast(tf.reduce_sum(histogram) / 256, tf.uint8))

    def smooth(image):
        kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)[:, :, None, None] / 13
        result = tf.nn.depthwise_conv2d(
            tf.cast(image, tf.float32)[None], tf.tile(kernel, [1, 1, 3, 1]), [1] * 4, 'VALID'
        )
        inner = tf.pad(tf.cast(result[0], tf.uint8), [[1, 1], [1, 1], [0, 0]])
        mask = tf.pad(tf.ones([30, 30, 1], tf.bool), [[1, 1], [1, 1], [0, 0]])
        return tf.where(mask, inner, image)

    def stretch(image, level):
        del level
        x = tf.cast(image, tf.float32)
        low, high = (f(x, [0, 1], keepdims=True) for f in (tf.reduce_min, tf.reduce_max))
        scaled = tf.cast(tf.clip_by_value((x - low) * 255 / (high - low), 0, 255), tf.uint8)
        return tf.where(high > low, scaled, image)

    def equalize(image, level):
        del level

        def channel(x):
            counts = tf.histogram_fixed_width(tf.cast(x, tf.int32), [0, 255], 256)
            last = tf.gather(counts, tf.reduce_max(tf.where(counts > 0)))
            step = (tf.reduce_sum(counts) - last) // 255
            table = tf.clip_by_value(
                (tf.cumsum(counts, exclusive=True) + step // 2) // tf.maximum(step, 1), 0, 255
            )
            return tf.where(step > 0, tf.cast(tf.gather(table, tf.cast(x, tf.int32)), tf.uint8), x)

        return tf.stack([channel(image[..., i]) for i in range(3)], axis=-1)

    def rotate(image, level):
        angle = signed(30 / 10 * np.pi / 180)(level)
        c, s = tf.cos(angle), tf.sin(angle)
        return warp(c, -s, 15.5 * (1 - c + s), s, c, 15.5 * (1 - s - c))(image, level)

    def posterize(image, level):
        shift = tf.cast(8 - tf.cast(level / 10 * 4, tf.int32), tf.uint8)
        return tf.bitwise.left_shift(tf.bitwise.right_shift(image, shift), shift)

    operations = {
        'ShearX': warp(1.0, signed(0.03), 0.0, 0.0, 1.0, 0.0),
        'ShearY': warp(1.0, 0.0, 0.0, signed(0.03), 1.0, 0.0),
        'TranslateX': warp(1.0, 0.0, signed(25.0), 0.0, 1.0, 0.0),
        'TranslateY': warp(1.0, 0.0, 0.0, 0.0, 1.0, signed(25.0)),
        'Rotate': rotate,
        'AutoContrast': stretch,
        'Equalize': equalize,
        'Invert': lambda image, level: 255 - image,
        'Solarize': lambda image, level: tf.where(
            tf.cast(image, tf.float32) < level * 25.6, image, 255 - image
        ),
        'Posterize': posterize,
        'Contrast': blend(mean),
        'Color': blend(gray),
        'Brightness': blend(tf.zeros_like),
        'Sharpness': blend(smooth),
        'Cutout': lambda image, level: tf.zeros_like(image),
        'SolarizeAdd': lambda image, level: image,
    }
    names = list(operations)
    kinds = tf.constant([[names.index(name) for name, _, _ in line] for line in policy])
    chances = tf.constant([[float(chance) for _, chance, _ in line] for line in policy])
    levels = tf.constant([[float(level) for _, _, level in line] for line in policy])

    def run(image):
        line = tf.random.uniform([], 0, len(policy), tf.int32)
        for i in range(2):

            def switch(image=image, i=i):
                return tf.switch_case(
                    kinds[line, i],
                    [
                        lambda f=f: tf.ensure_shape(f(image, levels[line, i]), [32, 32, 3])
                        for f in operations.values()
                    ],
                )

            image = tf.cond(tf.random.uniform([]) < chances[line, i], switch, lambda x=image: x)
        return image

    return run


def decoding(n: int, threads: int) -> Iterator[tuple[str, float]]:
    """Yields (name, images/s) of four ways from JPEG files to pixels, in `threads` threads."""
    import tensorflow as tf

    noise = np.random.RandomState(0).randint(0, 256, (n, 24, 32, 3)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as root:
        for i, image in enumerate(noise):
            folder = os.path.join(root, 'train' if i else 'test', f'class{i % 2}')
            os.makedirs(folder, exist_ok=True)
            photo = tf.cast(tf.image.resize(image, (375, 500), 'bicubic'), tf.uint8)
            tf.io.write_file(os.path.join(folder, f'{i}.jpg'), tf.io.encode_jpeg(photo, quality=90))
        config = schema.default_config()
        config.data.update(
            name='folder', dir=root, image_size=224, augment='imagenet', threads=threads
        )
        dataset = data.load_dataset(config.data)
        encoded = [dataset.train[i][0] for i in range(len(dataset.train))]
        windows = [
            decode.random_window(tf.constant([375, 500, 3]), 224, tf.constant([i, 0]))
            for i in range(len(encoded))
        ]

        def crop(i):
            return tf.io.decode_and_crop_jpeg(encoded[i], windows[i], channels=3)

        def resized(i):
            pixels = tf.raw_ops.ResizeBicubic(
                images=crop(i)[None], size=(224, 224), align_corners=False, half_pixel_centers=False
            )[0]
            return tf.cast(tf.clip_by_value(pixels + 0.5, 0.0, 255.0), tf.uint8).numpy()

        indices = range(len(encoded))
        batch = len(encoded) // 4
        layout, _ = replicas.make_layout(batch, batch, 1, devices=jax.devices()[:1])
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            yield (
                'bare decode_and_crop_jpeg',
                _best_rate(lambda: list(pool.map(crop, indices)), len(encoded), 3),
            )
            yield (
                'the same, ResizeBicubic, round and cast',
                _best_rate(lambda: list(pool.map(resized, indices)), len(encoded), 3),
            )
            yield (
                'sam_jax.data.decode.random_crop',
                _best_rate(
                    lambda: list(
                        pool.map(
                            lambda i: decode.random_crop(
                                encoded[i], 224, np.array([i, 0], np.int32)
                            ),
                            indices,
                        )
                    ),
                    len(encoded),
                    3,
                ),
            )
        yield (
            'sam_jax, files to batches',
            _best_rate(lambda: [None for _ in dataset.train_feeds(0, 0, 8, layout)], 8 * batch, 3),
        )


def resuming(n: int, batch: int = 32) -> Iterator[tuple[str, float, float]]:
    """Yields (reader, seconds to the first batch of an epoch, to the one in its middle)."""
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from clu import deterministic_data

    registered = tfds.builder('food101', data_dir='/nowhere')
    encoded = tf.io.encode_jpeg(
        np.random.RandomState(0).randint(0, 256, (375, 500, 3)).astype(np.uint8)
    ).numpy()

    class Photos(tfds.core.GeneratorBasedBuilder):
        """A dataset of one image, many times."""

        VERSION = registered.version

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=registered.info.features)

        def _split_generators(self, dl_manager):
            return {'train': self._generate_examples(n), 'validation': self._generate_examples(8)}

        def _generate_examples(self, n):
            for i in range(n):
                yield i, {'image': io.BytesIO(encoded), 'label': i % 101}

    Photos.name = 'food101'
    middle = n // batch // 2
    with tempfile.TemporaryDirectory() as root:
        for kind in ('tfrecord', 'array_record'):
            Photos(data_dir=os.path.join(root, kind), file_format=kind).download_and_prepare()
        builder = tfds.builder('food101', data_dir=os.path.join(root, 'tfrecord'))

        def crop(example):
            image = tf.io.decode_and_crop_jpeg(example['image'], [50, 50, 224, 224], channels=3)
            return {'image': image, 'label': example['label']}

        def deterministic(step):
            dataset = deterministic_data.create_dataset(
                builder,
                split='train',
                batch_dims=[batch],
                rng=jax.random.key_data(jax.random.key(0)),
                preprocess_fn=crop,
                num_epochs=1,
                shuffle_buffer_size=1000,
                decoders={'image': tfds.decode.SkipDecoding()},
            )
            next(iter(dataset.skip(step)))

        config = schema.default_config()
        config.data.update(
            name='food101',
            dir=os.path.join(root, 'array_record'),
            image_size=224,
            augment='imagenet',
        )
        dataset = data.load_dataset(config.data)
        layout, _ = replicas.make_layout(batch, batch, 1, devices=jax.devices()[:1])
        for name, read in (
            ('sam_jax', lambda step: dataset.train_feed(0, step, layout)),
            ('clu.deterministic_data', deterministic),
        ):
            yield (
                name,
                *(1 / _best_rate(lambda read=read, s=s: read(s), 1, 3) for s in (0, middle)),
            )


def share(name: str, batch: int) -> tuple[float, float]:
    """Returns seconds of a SAM step (with AutoAugment and cutout, without any augmentation).

    Medians of alternating rounds.
    """
    seconds, steps = {}, {}
    for recipe in ('none', 'autoaugment_cutout'):
        config = schema.default_config()
        schema.set_model(config, name)
        config.batch_size, config.replica_batch_size = batch, min(batch, 32)
        config.data.update(name='fake_cifar10', augment=recipe)
        experiment = Experiment.from_config(config, jax.devices()[:1])
        feed = experiment.dataset.train_feed(0, 0, experiment.layout)
        steps[recipe] = types.SimpleNamespace(
            step=experiment.train_step,
            state=experiment.initial_state(),
            arguments=(experiment.layout.shard(feed), *experiment.constants),
        )
        seconds[recipe] = []
    for _ in range(3):
        for recipe, s in steps.items():
            then = time.perf_counter()
            s.state, metrics = s.step(s.state, *s.arguments)
            jax.block_until_ready(metrics)
            seconds[recipe].append(time.perf_counter() - then)
    return tuple(float(np.median(seconds[r][1:])) for r in ('autoaugment_cutout', 'none'))


def _beside(recipe, images):
    try:
        return f'{tf_data(recipe, images):.0f}'
    except ImportError:
        return 'TensorFlow is not installed'


def main(argv: list[str]) -> None:
    """Prints what the flags ask for."""
    del argv
    images = np.random.RandomState(0).randint(0, 256, (_IMAGES.value, 32, 32, 3)).astype(np.uint8)
    if _RECIPES.value:
        print(
            tables.markdown(
                ('recipe', 'sam_jax, images/s', 'tf.data, images/s'),
                [
                    (recipe, f'{ours(recipe, images):.0f}', _beside(recipe, images))
                    for recipe in _RECIPES.value
                ],
            )
        )
    if _JPEGS.value:
        threads = _THREADS.value or os.cpu_count()
        rates = list(decoding(_JPEGS.value, threads))
        print(
            tables.markdown(
                (f'{threads} threads', 'images/s', 'of the bare loop'),
                [(name, f'{rate:.0f}', f'{rate / rates[0][1]:.2f}') for name, rate in rates],
            )
        )
    if _RESUME.value:
        print(
            tables.markdown(
                ('reader', 'first batch (s)', 'batch in mid-epoch (s)'),
                [
                    (name, f'{first:.2f}', f'{middle:.2f}')
                    for name, first, middle in resuming(_RESUME.value)
                ],
            )
        )
    if _SHARE.value:
        whole, without = share(_SHARE.value, _BATCH.value)
        augmentation = _BATCH.value / ours('autoaugment_cutout', images[: _BATCH.value])
        print(
            f'{_SHARE.value}, batch {_BATCH.value}: step {whole:.3f} s, without augmentation '
            f'{without:.3f} s; augmentation alone {augmentation:.4f} s, '
            f'{100 * augmentation / whole:.2f} % of the step'
        )


if __name__ == '__main__':
    app.run(main)
