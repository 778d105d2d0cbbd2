"""Image operations of AutoAugment and RandAugment on uint8, equal to the original's TensorFlow ops.

`resolve` turns a name, a level in [0, 10] and a sign into an `Op`: a few small arrays, made on the
host, that can be stacked and picked from inside of a compiled program. `apply` carries one out on
one image. The sixteen are of four kinds: a warp reads each pixel at another place, a table says
what becomes of a value, a blend mixes the image with another one, a cut leaves grey in a square.

What is read at a place that is computed (a pixel of a warp, an entry of a table, a count of a
histogram) is read in one of two ways that give the same pixels: by its index, as CPUs and GPUs
like it, or by comparison with all the indices there are, in matrix products, as a TPU likes it,
which reads single elements one after the other.

Products are rounded before anything is added to them, as in the original: see `_product`.

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
      kind: identity, warp, table, blend or cut, by its place in _VARIANTS, int32.
      variant: which of that kind, by its place there, int32.
      columns, rows, offset: of a warp, float32 (2, W), (2, H), (2,): output pixel (x, y) is read
        at columns[:, x] + rows[:, y] + offset, (x, y) again.
      table: uint8 (256,), where what becomes of a pixel depends on its value alone.
      factor: float32 (2,), of a blend, as `_halves`: 0 for the degenerate image, 1 for the image.
      size: half the side of a cut square, int32.
    """

    kind: Int32[Numbers, '*stack']
    variant: Int32[Numbers, '*stack']
    columns: Float32[Numbers, '*stack 2 width']
    rows: Float32[Numbers, '*stack 2 height']
    offset: Float32[Numbers, '*stack 2']
    table: UInt8[Numbers, '*stack 256']
    factor: Float32[Numbers, '*stack 2']
    size: Int32[Numbers, '*stack']


_VARIANTS = {
    'identity': ('identity',),
    'warp': ('warp',),
    'table': ('table', 'AutoContrast', 'Equalize', 'Contrast'),
    'blend': ('Color', 'Sharpness'),
    'cut': ('Cutout',),
}
_VALUES = np.arange(256)


def _halves(x):
    """float32 (...) -> (2, ...) that add up to it, of 12 significant bits each."""
    x = np.asarray(x, np.float32)
    high = (x.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    return np.stack([high, x - high])


def _product(halves, x):
    """Returns the product of a float32 and an integer |x| < 4096, rounded once, as float32.

    A device may multiply and add in one rounding, which would put other pixels on the other side of
    a half than the original. So no sum may have a product for a term that is not exact: each half
    times x is, and their sum is rounded either way as the original's product.
    """
    high, low = halves
    return high * x + low * x


_THIRTEENTH, _FIVE_THIRTEENTHS = (_halves(np.float32(n) / np.float32(13)) for n in (1, 5))
# Of AutoContrast: 255 / range.
_STRETCH = _halves(np.float32(255) / np.maximum(np.arange(256, dtype=np.float32), 1))
# What each channel's values give to the luminance, in [0, 1]: (3, 256).
_LUMINANCE = np.array([[0.2989], [0.5870], [0.1140]], np.float32) * (
    np.arange(256, dtype=np.float32) * np.float32(1 / 255)
)


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
    variant, matrix, table, size = name, (1, 0, 0, 0, 1, 0), _VALUES, 0
    factor = _halves(strength * 1.8 + 0.1)
    if name == 'Rotate':
        variant, matrix = 'warp', _rotation(sign * strength * 30, height, width)
    elif name == 'ShearX':
        variant, matrix = 'warp', (1, sign * strength * 0.3, 0, 0, 1, 0)
    elif name == 'ShearY':
        variant, matrix = 'warp', (1, 0, 0, sign * strength * 0.3, 1, 0)
    elif name == 'TranslateX':
        variant, matrix = 'warp', (1, 0, sign * strength * constants.translate, 0, 1, 0)
    elif name == 'TranslateY':
        variant, matrix = 'warp', (1, 0, 0, 0, 1, sign * strength * constants.translate)
    elif name == 'Cutout':
        size = int(strength * constants.cutout)
    elif name == 'Invert':
        variant, table = 'table', 255 - _VALUES
    elif name == 'Solarize':
        threshold = int(strength * 256)
        threshold = threshold % 256 if constants.wrap else threshold
        variant, table = 'table', np.where(_VALUES < threshold, _VALUES, 255 - _VALUES)
    elif name == 'SolarizeAdd':
        added = np.clip(_VALUES + int(strength * 110), 0, 255)
        variant, table = 'table', np.where(_VALUES < 128, added, _VALUES)
    elif name == 'Posterize':
        # TensorFlow clamps the shift by 8 bits and by less than 0 to 7.
        bits = int(strength * 4)
        shift = 8 - bits if 1 <= bits <= 8 else 7
        variant, table = 'table', _VALUES >> shift << shift
    elif name == 'Brightness':
        variant, table = 'table', _blend(np, np.zeros(256, int), _VALUES, factor)
    elif name == 'Contrast' and not constants.true_mean:
        mean = int(min(height * width / 256, 255))
        variant, table = 'table', _blend(np, np.full(256, mean), _VALUES, factor)
    elif name == 'Identity' or (name == 'Color' and channels == 1):
        variant = 'identity'
    kind = next(kind for kind, variants in _VARIANTS.items() if variant in variants)
    matrix = np.array(matrix, np.float32).reshape(2, 3)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    return Op(
        np.int32(list(_VARIANTS).index(kind)),
        np.int32(_VARIANTS[kind].index(variant)),
        matrix[:, :1] * x,
        matrix[:, 1:2] * y,
        matrix[:, 2],
        np.asarray(table).astype(np.uint8),
        factor,
        np.int32(size),
    )


def _rotation(degrees, height, width):
    """Around the middle of the image."""
    angle = np.float32(np.deg2rad(degrees))
    cos, sin = np.cos(angle), np.sin(angle)
    w, h = np.float32(width - 1), np.float32(height - 1)
    return (cos, -sin, (w - (cos * w - sin * h)) / 2, sin, cos, (h - (sin * w + cos * h)) / 2)


def apply(
    op: Op,
    image: UInt8[Array, 'height width channels'],
    center: Float[Array, '2'],
    indexed: bool = True,
) -> UInt8[Array, 'height width channels']:
    """Carries out an operation on one image.

    Args:
      op: Op.
      image: uint8 (H, W, C).
      center: uniform numbers in [0, 1), (2,): where a square is cut, (y, x).
      indexed: whether values are read by index or by comparison. The pixels are the same.
    """
    shape = (image.shape[-1], 256)
    tables = (
        lambda: jnp.broadcast_to(jnp.asarray(op.table)[None], shape),
        lambda: _autocontrast(image, indexed),
        lambda: _equalize(image, indexed),
        lambda: jnp.broadcast_to(_contrast(image, op.factor, indexed)[None], shape),
    )
    degenerate = (lambda: _grey(image, indexed), lambda: _smooth(image))
    branches = (
        lambda: image,
        lambda: _warp(image, op, indexed),
        lambda: _look_up(lax.switch(op.variant, tables), image, indexed),
        lambda: _blend(jnp, lax.switch(op.variant, degenerate), image, op.factor),
        lambda: _cut(image, op.size, center),
    )
    return lax.switch(op.kind, branches)


def pick(table: Op, row: jax.Array, indexed: bool = True) -> Op:
    """Returns the operation of a row of stacked ones.

    Args:
      table: Op, stacked.
      row: int32 ().
      indexed: as of `apply`.
    """
    if indexed:
        return jax.tree.map(lambda x: jnp.asarray(x)[row], table)
    return jax.tree.map(lambda x: _row(jnp.asarray(x), row), table)


# How values are read: by index or by comparison


def _matches(places, number, dtype):
    """(..., number): 1 where `places` (...) is the index of the last axis, 0 elsewhere."""
    index = lax.broadcasted_iota(jnp.int32, (1,) * places.ndim + (number,), places.ndim)
    return (places[..., None] == index).astype(dtype)


def _row(table, row):
    """table[row] of an array, by comparison: exact, see `_entries`."""
    matches = _matches(row, len(table), jnp.float32)
    return jnp.tensordot(matches, table.astype(jnp.float32), 1, precision='highest').astype(
        table.dtype
    )


def _entries(tables, rows, columns):
    """tables[c, rows[c, p], columns[c, p]] of (C, A, B), (C, P), (C, P), by comparison.

    A matrix product picks the rows. All of its terms but one are 0, so it is exact: bfloat16 has
    the integers up to 256, and 'highest' adds up all bits of a float32. Of the columns the largest
    entry is taken: none is negative, and no compiler can round a maximum.
    """
    narrow = tables.dtype == jnp.uint8
    dtype, precision = (jnp.bfloat16, None) if narrow else (jnp.float32, 'highest')
    picked = jnp.einsum(
        'cpa,cab->cpb',
        _matches(rows, tables.shape[1], dtype),
        tables.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    matches = _matches(columns, tables.shape[2], jnp.bool_)
    return jnp.max(jnp.where(matches, picked, 0.0), -1).astype(tables.dtype)


def _channels(image):
    """(H, W, C) -> int32 (C, HW)."""
    return image.reshape(-1, image.shape[-1]).T.astype(jnp.int32)


def _look_up(table, image, indexed):
    """table[c, image[y, x, c]] of a table (C, 256)."""
    if indexed:
        start = 256 * np.arange(image.shape[-1], dtype=np.uint32)[None, None]
        return table.reshape(-1).at[image.astype(jnp.uint32) + start].get(mode='promise_in_bounds')
    # An index of two digits.
    values = _channels(image)
    return _entries(table.reshape(-1, 16, 16), values // 16, values % 16).T.reshape(image.shape)


def _below(image, indexed):
    """How many pixels of each channel are smaller than 0, ..., 255: int32 (C, 256)."""
    channels, values = image.shape[-1], _channels(image)
    if indexed:
        places = (values + 256 * np.arange(channels, dtype=np.int32)[:, None]).reshape(-1)
        counts = jnp.zeros(256 * channels, jnp.int32).at[places].add(1).reshape(-1, 256)
        return jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts
    # Whole numbers, which float32 has up to 2^24.
    digits = (_matches(digit, 16, jnp.bfloat16) for digit in (values // 16, values % 16))
    counts = jnp.einsum('cpa,cpb->cab', *digits, preferred_element_type=jnp.float32)
    smaller = jnp.asarray(np.triu(np.ones((256, 256), np.float32), 1))
    return jnp.dot(counts.reshape(-1, 256), smaller, precision='highest').astype(jnp.int32)


def _read(image, y, x, indexed):
    """image[y, x] of places (H, W) that lie inside; whatever of others."""
    height, width, channels = image.shape
    if indexed:
        place = jnp.clip(y, 0, height - 1) * width + jnp.clip(x, 0, width - 1)
        return image.reshape(-1, channels)[place.reshape(-1)].reshape(image.shape)
    y, x = (jnp.broadcast_to(place.reshape(1, -1), (channels, height * width)) for place in (y, x))
    return _entries(image.transpose(2, 0, 1), y, x).T.reshape(image.shape)


# The operations


def _blend(xp, degenerate, image, factor):
    """degenerate + factor (image - degenerate), clipped, fractions cut off; uint8."""
    difference = image.astype(xp.float32) - degenerate.astype(xp.float32)
    mixed = degenerate.astype(xp.float32) + _product(factor, difference)
    return _byte(xp, mixed)


def _byte(xp, x):
    """Clips, cuts fractions off; uint8."""
    # `floor`, as XLA's CPU compiler (jax 0.10) has casts that round: those after a reduction.
    return xp.floor(xp.clip(x, 0, 255)).astype(xp.uint8)


def _grey(image, indexed):
    """Luminance, (H, W, C) with equal channels: as tf.image.rgb_to_grayscale does it on uint8."""
    if image.shape[-1] == 1:
        return image
    red, green, blue = (
        _look_up(jnp.asarray(_LUMINANCE[c : c + 1]), image[..., c : c + 1], indexed)
        for c in range(3)
    )
    grey = _byte(jnp, (red + green + blue) * 255.5)
    return jnp.broadcast_to(grey, image.shape)


def _warp(image, op, indexed):
    """Reads every pixel at the nearest place of the inverse map; grey comes from outside."""
    height, width, _ = image.shape
    places, insides = [], []
    for i, size in enumerate((width, height)):
        place = (
            jnp.asarray(op.columns)[i][None]
            + jnp.asarray(op.rows)[i][:, None]
            + jnp.asarray(op.offset)[i]
        )
        # Halves are rounded away from zero.
        place = jnp.where(place < 0, jnp.ceil(place - 0.5), jnp.floor(place + 0.5))
        insides.append((place >= 0) & (place < size))
        places.append(place.astype(jnp.int32))
    (x, y), (x_inside, y_inside) = places, insides
    moved = _read(image, y, x, indexed)
    return jnp.where((x_inside & y_inside)[..., None], moved, jnp.uint8(GREY))


def _autocontrast(image, indexed):
    """Table (C, 256) that stretches each channel to [0, 255]; a constant one stays."""
    low, high = (f(image.astype(jnp.int32), axis=(0, 1))[:, None] for f in (jnp.min, jnp.max))
    scale = [
        _look_up(jnp.asarray(part)[None], (high - low)[..., None], indexed) for part in _STRETCH
    ]
    scale = [part[..., 0] for part in scale]
    values = jnp.asarray(_VALUES, jnp.int32)[None]
    stretched = _product(scale, values) - _product(scale, low)
    return jnp.where(high > low, _byte(jnp, stretched), values.astype(jnp.uint8))


def _equalize(image, indexed):
    """Table (C, 256) that makes each channel's histogram flat, by integers as PIL does."""
    height, width, _ = image.shape
    below = _below(image, indexed)
    highest = jnp.max(image, axis=(0, 1), keepdims=True)
    step = (height * width - jnp.sum(image == highest, (0, 1), dtype=jnp.int32)[:, None]) // 255
    safe = jnp.maximum(step, 1)
    table = jnp.clip((below + safe // 2) // safe, 0, 255)
    return jnp.where(step == 0, jnp.asarray(_VALUES, jnp.int32)[None], table).astype(jnp.uint8)


def _smooth(image):
    """The mean of 3x3 pixels, the middle one counted five times; the border stays."""
    height, width = image.shape[0] - 2, image.shape[1] - 2
    pixels = image.astype(jnp.float32)
    once, five_times = (_product(part, pixels) for part in (_THIRTEENTH, _FIVE_THIRTEENTHS))
    total = 0.0  # row by row: another order rounds otherwise
    for dy in range(3):
        for dx in range(3):
            term = five_times if dy == dx == 1 else once
            total += term[dy : dy + height, dx : dx + width]
    return lax.dynamic_update_slice(image, _byte(jnp, total), (1, 1, 0))


def _contrast(image, factor, indexed):
    """Table (256,) that blends with the rounded mean of the luminance."""
    number = image.shape[0] * image.shape[1]
    total = jnp.sum(_grey(image, indexed)[..., 0], dtype=jnp.int32)
    return _blend(jnp, (2 * total + number) // (2 * number), jnp.asarray(_VALUES), factor)


def _cut(image, size, center):
    """Leaves grey in a square of side 2 size around a pixel, clipped at the border."""
    height, width, _ = image.shape
    y, x = (lax.broadcasted_iota(jnp.int32, (height, width, 1), axis) for axis in (0, 1))
    cy, cx = ((center[i] * n).astype(jnp.int32) for i, n in ((0, height), (1, width)))
    inside = (y >= cy - size) & (y < cy + size) & (x >= cx - size) & (x < cx + size)
    return jnp.where(inside, jnp.uint8(GREY), image)
