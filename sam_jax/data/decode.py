"""Encoded images -> uint8 crops of one size, on the host, by TensorFlow's operations.

The numbers are the SAM paper's code's: the same windows, TensorFlow's v1 bicubic resizing; its
result is rounded to uint8 (the code trains on floats that overshoot [0, 255] at edges). All of it
is one TensorFlow function, so that a thread which decodes does not hold Python's lock. Where
TensorFlow is not installed, `pillow` does the same.
"""

import functools
import importlib.util
import logging
import struct
from typing import Any

import numpy as np

from sam_jax import limits
from sam_jax.data import pillow
from sam_jax.errors import first_line

# The window of the training: shares of the image's area, ratios of width to height, and the share
# of the image that it must cover, by TensorFlow's default.
AREA, ASPECT, COVERED = (0.08, 1.0), (3 / 4, 4 / 3), 0.1

_PNG = b'\x89PNG\r\n\x1a\n'

_log = logging.getLogger(__name__)

# Around the centre crop of the evaluation, in pixels at the size of the network's input.
CROP_PADDING = 32


@functools.cache
def has_tensorflow() -> bool:
    """Whether TensorFlow decodes the images; says it if not."""
    if importlib.util.find_spec('tensorflow'):
        return True
    _log.info(
        'TensorFlow is not installed: Pillow decodes the images. JPEG files differ by a few '
        'of 255 levels in single pixels from what TensorFlow makes of them.'
    )
    return False


@functools.cache
def tensorflow() -> Any:
    """Returns the module, which here works on the host: the accelerator's memory is JAX's."""
    import tensorflow as tf

    tf.config.set_visible_devices([], 'GPU')
    return tf


def random_crop(encoded: bytes, size: int, seed: np.ndarray) -> np.ndarray:
    """A random window of the image, resized: uint8 (size, size, 3).

    The window has 8 to 100 % of the area and an aspect ratio between 3/4 and 4/3; after 10 vain
    attempts it is the centre crop.

    Args:
      encoded: bytes of a JPEG, PNG, BMP, GIF or WebP file. The last two are always decoded by
        Pillow, of which the first frame is enough.
      size: side of the result.
      seed: two int32, which decide the window.

    Raises:
      ValueError: the bytes are no image, or one of more pixels than `limits.PIXELS`.
    """
    if _is_tensorflow_s(encoded):
        return _run(_function(random_window, size), encoded, seed)
    pixels = pillow.decode(encoded)
    height, width, _ = pixels.shape
    window = pillow.random_window(height, width, seed, AREA, ASPECT, COVERED)
    return pillow.crop(pixels, window or _center(height, width, size), size)


def center_crop(encoded: bytes, size: int) -> np.ndarray:
    """The central square of size / (size + 32) of the shorter side, resized: (size, size, 3).

    Arguments and errors as of `random_crop`.
    """
    if _is_tensorflow_s(encoded):
        return _run(_function(center_window, size), encoded, np.zeros(2, np.int32))
    pixels = pillow.decode(encoded)
    height, width, _ = pixels.shape
    return pillow.crop(pixels, _center(height, width, size), size)


def _is_tensorflow_s(encoded):
    """Whether TensorFlow decodes an image; what the others are, Pillow says."""
    if not encoded.startswith((b'\xff\xd8', _PNG, b'BM')) or not has_tensorflow():
        return False
    if encoded.startswith(_PNG) and len(encoded) >= 24:  # of a JPEG `_function` asks
        limits.check_pixels(*struct.unpack('>II', encoded[16:24]))
    return True


def random_window(shape: Any, size: int, seed: Any) -> Any:
    """The window of `random_crop` as a tensor (y, x, height, width) of an image (H, W, 3)."""
    tf = tensorflow()

    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed,
        min_object_covered=COVERED,
        aspect_ratio_range=ASPECT,
        area_range=AREA,
        max_attempts=pillow.ATTEMPTS,
        use_image_if_no_bounding_boxes=True,
    )
    # The whole image is what TensorFlow gives when all attempts have failed.
    failed = tf.reduce_all(extent[:2] == shape[:2])
    return tf.where(
        failed, center_window(shape, size, seed), tf.concat([begin[:2], extent[:2]], axis=0)
    )


def center_window(shape: Any, size: int, seed: Any) -> Any:
    """The window of `center_crop`; arguments as of `random_window`."""
    tf = tensorflow()

    del seed
    shorter = tf.cast(tf.minimum(shape[0], shape[1]), tf.float64)
    side = tf.maximum(tf.cast(size / (size + CROP_PADDING) * shorter, tf.int32), 1)
    return tf.stack([(shape[0] - side + 1) // 2, (shape[1] - side + 1) // 2, side, side])


def _center(height, width, size):
    """The window of `center_crop` without TensorFlow."""
    side = max(int(size / (size + CROP_PADDING) * min(height, width)), 1)
    return (height - side + 1) // 2, (width - side + 1) // 2, side, side


@functools.cache
def _function(window_of, size):
    """A compiled (encoded, seed) -> pixels."""
    tf = tensorflow()

    def jpeg(encoded, seed):
        shape = tf.image.extract_jpeg_shape(encoded)
        pixels = tf.cast(shape[0], tf.int64) * tf.cast(shape[1], tf.int64)
        few = tf.debugging.Assert(pixels <= limits.PIXELS, ['it has too many pixels:', shape])
        with tf.control_dependencies([few]):
            window = window_of(shape, size, seed)
        return tf.io.decode_and_crop_jpeg(encoded, window, channels=3)

    def other(encoded, seed):
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        y, x, height, width = tf.unstack(window_of(tf.shape(image), size, seed))
        return image[y : y + height, x : x + width]

    def crop(encoded, seed):
        # Not tf.io.is_jpeg, which wants a third byte that some files do not have.
        image = tf.cond(
            tf.strings.substr(encoded, 0, 2) == b'\xff\xd8',
            lambda: jpeg(encoded, seed),
            lambda: other(encoded, seed),
        )
        resized = tf.raw_ops.ResizeBicubic(
            images=image[None], size=(size, size), align_corners=False, half_pixel_centers=False
        )
        return tf.cast(tf.clip_by_value(resized[0] + 0.5, 0.0, 255.0), tf.uint8)

    return tf.function(crop).get_concrete_function(
        tf.TensorSpec((), tf.string), tf.TensorSpec((2,), tf.int32)
    )


def _run(function, encoded, seed):
    tf = tensorflow()

    try:
        return function(tf.constant(encoded), tf.constant(seed, tf.int32)).numpy()
    except tf.errors.InvalidArgumentError as e:
        raise ValueError(first_line(e.message)) from e
