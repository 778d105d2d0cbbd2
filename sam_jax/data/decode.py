"""Encoded images -> uint8 crops of one size, on the host, by TensorFlow's operations.

The numbers are the SAM paper's code's: the same windows, TensorFlow's v1 bicubic resizing; its
result is rounded to uint8 (the code trains on floats that overshoot [0, 255] at edges).
"""

import numpy as np

# Around the centre crop of the evaluation, in pixels at the size of the network's input.
CROP_PADDING = 32

# The bounding box of the object, of which a window must show a tenth: the whole image.
_WHOLE = np.array([[[0, 0, 1, 1]]], np.float32)


def random_crop(encoded, size, seed):
    """A random window of the image, resized: uint8 (size, size, 3).

    The window has 8 to 100 % of the area and an aspect ratio between 3/4 and 4/3; after 10 vain
    attempts it is the centre crop.

    Args:
      encoded: bytes of a JPEG, PNG, BMP or GIF file.
      size: side of the result.
      seed: two int32, which decide the window.

    Raises:
      ValueError: the bytes are no image.
    """
    import tensorflow as tf

    image, shape = _open(encoded)
    # What tf.image.stateless_sample_distorted_bounding_box calls, with less of Python around it.
    begin, extent, _ = tf.raw_ops.StatelessSampleDistortedBoundingBox(
        image_size=np.array([*shape, 3], np.int32), bounding_boxes=_WHOLE, seed=seed,
        min_object_covered=np.float32(0.1), aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0), max_attempts=10, use_image_if_no_bounding_boxes=True)
    window = (*begin.numpy()[:2], *extent.numpy()[:2])
    if (window[2], window[3]) == shape:  # what TensorFlow gives when all attempts have failed
        window = _central(shape, size)
    return _resize(_cut(encoded, image, window), size)


def center_crop(encoded, size):
    """The central square of size / (size + 32) of the shorter side, resized: (size, size, 3).

    Arguments and errors as of `random_crop`.
    """
    image, shape = _open(encoded)
    return _resize(_cut(encoded, image, _central(shape, size)), size)


def _open(encoded):
    """Returns (the image, or None for a JPEG, of which only a window is decoded; (H, W))."""
    import tensorflow as tf

    try:
        if encoded[:2] == b'\xff\xd8':
            height, width, _ = tf.image.extract_jpeg_shape(encoded).numpy()
            return None, (int(height), int(width))
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        return image, tuple(image.shape[:2])
    except tf.errors.InvalidArgumentError as e:
        raise ValueError(_reason(e)) from e


def _central(shape, size):
    side = max(int(size / (size + CROP_PADDING) * min(shape)), 1)
    return (shape[0] - side + 1) // 2, (shape[1] - side + 1) // 2, side, side


def _cut(encoded, image, window):
    import tensorflow as tf

    if image is not None:
        y, x, height, width = window
        return image[y:y + height, x:x + width]
    try:
        return tf.io.decode_and_crop_jpeg(encoded, window, channels=3)
    except tf.errors.InvalidArgumentError as e:
        raise ValueError(_reason(e)) from e


def _resize(image, size):
    import tensorflow as tf

    resized = tf.raw_ops.ResizeBicubic(
        images=image[None], size=(size, size), align_corners=False, half_pixel_centers=False)
    pixels = resized.numpy()[0]
    pixels += 0.5  # rounds, since the cast cuts off
    np.clip(pixels, 0, 255, out=pixels)
    return pixels.astype(np.uint8)


def _reason(error):
    return error.message.split('[Op:')[0].strip().splitlines()[0]
