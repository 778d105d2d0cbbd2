"""Image operations of AutoAugment and RandAugment on uint8, equal to the original's TensorFlow ops.

`resolve` turns a name, a level in [0, 10] and a sign into an `Op`: a few small arrays, made on the
host, that can be stacked and picked from inside of a compiled program. `apply` carries one out on
one image. What an operation does with a single pixel whatever the image is (Invert, Solarize,
Posterize, ...) is a table of 256 entries. The products of a warp and of a blend come from tables
too: a device that multiplies and adds in one rounding would put other pixels on the other side of
a half than the original.

Sources: Cubuk et al., "AutoAugment" (CVPR 2019), "RandAugment" (2020). The numbers and quirks are
those of the SAM paper's code, see `Constants`; `FAITHFUL` has them and `corrected` mends them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, UInt8

GREY = 128  # what warps move in and cutout leaves

NAMES = (
    'AutoContrast',
    'Equalize',
    'Invert',
    'Rotate',
    'Posterize',
    'Solarize',
    'Color',
    'Contrast',
    'Brightness',
    'Sharpness',
    'ShearX',
    'ShearY',
    'TranslateX',
    'TranslateY',
    'Cutout',
    'SolarizeAdd',
)


class Constants(NamedTuple):
    """Numbers of the operations that differ between codebases.

    Attributes:
      translate: pixels of a translation at level 10.
      cutout: half the side of the cut square at level 10, in pixels.
      true_mean: whether Contrast moves towards the image's mean grey. The original moves towards
        (number of pixels) / 256, whatever the image.
      wrap: whether Solarize's threshold 256 becomes 0, as in a uint8, which inverts the image
        instead of leaving it as it is.
    """

    translate: float
    cutout: float
    true_mean: bool
    wrap: bool


# The original uses the numbers of ImageNet for images of any size: on 32x32 images a translation
# of level 2 or more leaves nothing of the image.
FAITHFUL = Constants(translate=250.0, cutout=100.0, true_mean=False, wrap=True)
FAITHFUL_RANDAUGMENT = FAITHFUL._replace(translate=100.0, cutout=40.0)


def corrected(side: int) -> Constants:
    """Constants in proportion to the image, true mean, no wrap-around.

    AutoAugment's paper moves by up to 150 of 331 pixels and cuts a square of up to 60.
    """
    return Constants(translate=150 / 331 * side, cutout=30 / 331 * side, true_mean=True, wrap=False)


# Of `resolve` they are NumPy's.
Numbers = jax.Array | np.ndarray | np.number


class Op(NamedTuple):
    """An operation with its numbers, as arrays that can be stacked.

    Attributes:
      kind: which of the branches of `apply`, int32.
      columns, rows, offset: of a warp, float32 (2, W), (2, H), (2,): output pixel (x, y) is read
        at columns[:, x] + rows[:, y] + offset, (x, y) again.
      table: uint8 (256,), where what becomes of a pixel depends on its value alone.
      scaled: float32 (511,): the blend's factor times -255 to 255. The factor is 0 for the
        degenerate image and 1 for the image.
      size: half the side of a cut square, int32.
    """

    kind: Int32[Numbers, '*stack']
    columns: Float32[Numbers, '*stack 2 width']
    rows: Float32[Numbers, '*stack 2 height']
    offset: Float32[Numbers, '*stack 2']
    table: UInt8[Numbers, '*stack 256']
    scaled: Float32[Numbers, '*stack 511']
    size: Int32[Numbers, '*stack']


_KINDS = (
    'identity',
    'warp',
    'table',
    'AutoContrast',
    'Equalize',
    'Color',
    'Sharpness',
    'Contrast',
    'Cutout',
)
_VALUES = np.arange(256)
_FLOATS = np.arange(256, dtype=np.float32)
_THIRTEENTHS = _FLOATS * (np.float32(1) / np.float32(13))
_FIVE_THIRTEENTHS = _FLOATS * (np.float32(5) / np.float32(13))
# Of AutoContrast: values times 255 / range, by (range, value).
_STRETCHED = (np.float32(255) / np.maximum(_FLOATS, 1))[:, None] * _FLOATS
# What each channel's values give to the luminance, in [0, 1].
_LUMINANCE = np.array([[0.2989], [0.5870], [0.1140]], np.float32) * (_FLOATS * np.float32(1 / 255))
_DIFFERENCES = np.arange(-255, 256, dtype=np.float32)


def resolve(
    name: str, level: float, negative: bool, shape: tuple[int, int, int], constants: Constants
) -> Op:
    """Returns the Op `name` at a level, of NumPy arrays.

    Args:
      name: one of NAMES, or 'Identity'.
      level: strength, 0 to 10 (RandAugment goes beyond).
      negative: whether the sign is turned around; only warps have one.
      shape: (H, W, C) of the images.
      constants: Constants.
    """
    height, width, channels = shape
    strength = level / 10
    sign = -1.0 if negative else 1.0
    # Output pixel (x, y) of a warp is read at (m0 x + m1 y + m2, m3 x + m4 y + m5).
    kind, matrix, table, size = name, (1, 0, 0, 0, 1, 0), _VALUES, 0
    scaled = np.float32(strength * 1.8 + 0.1) * _DIFFERENCES
    if name == 'Rotate':
        kind, matrix = 'warp', _rotation(sign * strength * 30, height, width)
    elif name == 'ShearX':
        kind, matrix = 'warp', (1, sign * strength * 0.3, 0, 0, 1, 0)
    elif name == 'ShearY':
        kind, matrix = 'warp', (1, 0, 0, sign * strength * 0.3, 1, 0)
    elif name == 'TranslateX':
        kind, matrix = 'warp', (1, 0, sign * strength * constants.translate, 0, 1, 0)
    elif name == 'TranslateY':
        kind, matrix = 'warp', (1, 0, 0, 0, 1, sign * strength * constants.translate)
    elif name == 'Cutout':
        size = int(strength * constants.cutout)
    elif name == 'Invert':
        kind, table = 'table', 255 - _VALUES
    elif name == 'Solarize':
        threshold = int(strength * 256)
        threshold = threshold % 256 if constants.wrap else threshold
        kind, table = 'table', np.where(_VALUES < threshold, _VALUES, 255 - _VALUES)
    elif name == 'SolarizeAdd':
        added = np.clip(_VALUES + int(strength * 110), 0, 255)
        kind, table = 'table', np.where(_VALUES < 128, added, _VALUES)
    elif name == 'Posterize':
        # TensorFlow clamps the shift by 8 bits and by less than 0 to 7.
        bits = int(strength * 4)
        shift = 8 - bits if 1 <= bits <= 8 else 7
        kind, table = 'table', _VALUES >> shift << shift
    elif name == 'Brightness':
        kind, table = 'table', _blend(np, np.zeros(256, int), _VALUES, scaled)
    elif name == 'Contrast' and not constants.true_mean:
        mean = int(min(height * width / 256, 255))
        kind, table = 'table', _blend(np, np.full(256, mean), _VALUES, scaled)
    elif name == 'Identity' or (name == 'Color' and channels == 1):
        kind = 'identity'
    matrix = np.array(matrix, np.float32).reshape(2, 3)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    return Op(
        np.int32(_KINDS.index(kind)),
        matrix[:, :1] * x,
        matrix[:, 1:2] * y,
        matrix[:, 2],
        np.asarray(table).astype(np.uint8),
        scaled,
        np.int32(size),
    )


def _rotation(degrees, height, width):
    """Around the middle of the image."""
    angle = np.float32(np.deg2rad(degrees))
    cos, sin = np.cos(angle), np.sin(angle)
    w, h = np.float32(width - 1), np.float32(height - 1)
    return (cos, -sin, (w - (cos * w - sin * h)) / 2, sin, cos, (h - (sin * w + cos * h)) / 2)


def apply(
    op: Op, image: UInt8[Array, 'height width channels'], center: Float[Array, '2']
) -> UInt8[Array, 'height width channels']:
    """Carries out an operation on one image.

    Args:
      op: Op.
      image: uint8 (H, W, C).
      center: uniform numbers in [0, 1), (2,): where a square is cut, (y, x).
    """
    branches = (
        lambda: image,
        lambda: _warp(image, op),
        lambda: jnp.asarray(op.table)[image],
        lambda: _autocontrast(image),
        lambda: _equalize(image),
        lambda: _blend(jnp, _grey(image), image, op.scaled),
        lambda: _sharpness(image, op.scaled),
        lambda: _contrast(image, op.scaled),
        lambda: _cut(image, op.size, center),
    )
    return lax.switch(op.kind, branches)


def _blend(xp, degenerate, image, scaled):
    """degenerate + factor (image - degenerate), clipped, fractions cut off; uint8."""
    difference = image.astype(xp.int32) - degenerate.astype(xp.int32)
    mixed = degenerate.astype(xp.float32) + xp.asarray(scaled)[difference + 255]
    return xp.clip(mixed, 0, 255).astype(xp.uint8)


def _grey(image):
    """Luminance, (H, W, C) with equal channels: as tf.image.rgb_to_grayscale does it on uint8."""
    if image.shape[-1] == 1:
        return image
    red, green, blue = (jnp.asarray(t)[image[..., c]] for c, t in enumerate(_LUMINANCE))
    grey = ((red + green + blue) * 255.5).astype(jnp.uint8)
    return jnp.broadcast_to(grey[..., None], image.shape)


def _warp(image, op):
    """Reads every pixel at the nearest place of the inverse map; grey comes from outside."""
    height, width, channels = image.shape
    places = []
    for i, size in enumerate((width, height)):
        place = jnp.asarray(op.columns)[i][None] + jnp.asarray(op.rows)[i][:, None] + op.offset[i]
        # Halves are rounded away from zero.
        place = jnp.where(place < 0, jnp.ceil(place - 0.5), jnp.floor(place + 0.5))
        places.append(
            (jnp.clip(place, 0, size - 1).astype(jnp.int32), (place >= 0) & (place < size))
        )
    (x, x_inside), (y, y_inside) = places
    moved = image.reshape(-1, channels)[(y * width + x).reshape(-1)].reshape(image.shape)
    return jnp.where((x_inside & y_inside)[..., None], moved, jnp.uint8(GREY))


def _autocontrast(image):
    """Stretches each channel to [0, 255]; a constant one stays."""
    low, high = (f(image, axis=(0, 1), keepdims=True) for f in (jnp.min, jnp.max))
    products = jnp.asarray(_STRETCHED)
    stretched = products[high - low, image] - products[high - low, low]
    return jnp.where(high > low, jnp.clip(stretched, 0, 255).astype(jnp.uint8), image)


def _equalize(image):
    """Makes each channel's histogram flat, by integer arithmetic as PIL does."""

    def channel(values):
        counts = jnp.zeros(256, jnp.int32).at[values.reshape(-1)].add(1)
        step = (values.size - counts[values.max()]) // 255
        safe = jnp.maximum(step, 1)
        table = (jnp.cumsum(counts) - counts + safe // 2) // safe
        table = jnp.clip(table, 0, 255).at[0].set(0).astype(jnp.uint8)
        return jnp.where(step == 0, values, table[values])

    return jnp.stack([channel(image[..., c]) for c in range(image.shape[-1])], axis=-1)


def _sharpness(image, scaled):
    """Blends with the mean of 3x3 pixels, the middle one counted five times; the border stays."""
    height, width = image.shape[0] - 2, image.shape[1] - 2
    once, five_times = (jnp.asarray(t)[image] for t in (_THIRTEENTHS, _FIVE_THIRTEENTHS))
    total = 0.0  # row by row: another order rounds otherwise
    for dy in range(3):
        for dx in range(3):
            term = five_times if dy == dx == 1 else once
            total += term[dy : dy + height, dx : dx + width]
    smooth = image.at[1:-1, 1:-1].set(jnp.clip(total, 0, 255).astype(jnp.uint8))
    return _blend(jnp, smooth, image, scaled)


def _contrast(image, scaled):
    """Blends with the rounded mean of the luminance."""
    mean = jnp.floor(jnp.mean(_grey(image)[..., 0].astype(jnp.float32)) + 0.5)
    return _blend(jnp, jnp.full(image.shape, mean), image, scaled)


def _cut(image, size, center):
    """Leaves grey in a square of side 2 size around a pixel, clipped at the border."""
    height, width, _ = image.shape
    y, x = (lax.broadcasted_iota(jnp.int32, (height, width, 1), axis) for axis in (0, 1))
    cy, cx = ((center[i] * n).astype(jnp.int32) for i, n in ((0, height), (1, width)))
    inside = (y >= cy - size) & (y < cy + size) & (x >= cx - size) & (x < cx + size)
    return jnp.where(inside, jnp.uint8(GREY), image)
