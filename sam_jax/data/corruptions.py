"""Corrupted images: noise, blur, weather and compression, each at five severities.

They are those of Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations" (ICLR 2019), with the parameters of CIFAR-10-C for images with a side
below 100 pixels, and those of ImageNet-C for larger ones. Lengths in pixels are as there, whatever
the size; only those of `elastic` go with it, as they do there. Not here: frost, which needs
photographs, snow, and glass blur.

An image's corruption is a function of (seed, corruption, severity, number of the image): neither
batches nor devices nor the version of NumPy change what is drawn. JPEG is that of Pillow.
"""

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage, special

from sam_jax import rngs
from sam_jax.errors import UserError

SEVERITIES = (1, 2, 3, 4, 5)

# Images with a side of so many pixels have the parameters of ImageNet-C.
LARGE = 100


class Corruption(NamedTuple):
    """A corruption.

    Attributes:
      apply: (images, parameter, draw) -> images, both float64 (N, H, W, C) in [0, 1]; of the result
        what lies outside is clipped. `draw(shape)` returns uniform numbers (N, *shape).
      small: its parameter at each severity, of CIFAR-10-C.
      large: the same of ImageNet-C.
    """

    apply: Callable
    small: tuple
    large: tuple


def corrupt(
    images: np.ndarray, name: str, severity: int, seed: int = 0, numbers: np.ndarray | None = None
) -> np.ndarray:
    """Returns corrupted images.

    Args:
      images: uint8 (N, H, W, C), C being 1 or 3.
      name: of CORRUPTIONS.
      severity: 1 to 5.
      seed: of what is random.
      numbers: of the images in their dataset, (N,); default from 0.

    Returns:
      uint8 (N, H, W, C), rounded down as there.

    Raises:
      UserError: no such corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise UserError(f'corruption is {name!r}; it must be one of {", ".join(CORRUPTIONS)}.')
    if severity not in SEVERITIES:
        raise UserError(f'severity is {severity}; it must be 1, 2, 3, 4 or 5.')
    corruption = CORRUPTIONS[name]
    large = min(images.shape[1:3]) >= LARGE
    parameter = (corruption.large if large else corruption.small)[severity - 1]
    numbers = np.arange(len(images)) if numbers is None else numbers
    # Drawn once for each call: no corruption asks twice for the same numbers.
    calls = iter(range(1000))

    def draw(shape):
        call, count = next(calls), math.prod(shape)
        rows = [rngs.uniform(seed, f'corrupt_{name}', count, severity, call, i) for i in numbers]
        return np.reshape(rows, (len(images), *shape))

    corrupted = corruption.apply(images / 255.0, parameter, draw)
    return (np.clip(corrupted, 0, 1) * 255 + 1e-9).astype(np.uint8)


# Noise.


def _gaussian_noise(x, deviation, draw):
    return x + deviation * special.ndtri(draw(x.shape[1:]))


def _shot_noise(x, photons, draw):
    """Poisson's law by its inverse distribution; there are no more than 256 rates."""
    levels = np.rint(255 * x).astype(int)
    most = math.ceil(photons + 12 * math.sqrt(photons) + 12)
    uniform, counts = draw(x.shape[1:]), np.zeros(x.shape)
    for level in np.unique(levels):
        below = special.pdtr(np.arange(most), photons * level / 255)
        here = levels == level
        counts[here] = np.searchsorted(below, uniform[here])
    return counts / photons


def _impulse_noise(x, share, draw):
    uniform = draw(x.shape[1:])
    return np.where(uniform < share / 2, 0.0, np.where(uniform < share, 1.0, x))


# Blur.


def _gaussian_blur(x, deviation, draw):
    del draw
    return ndimage.gaussian_filter(x, (0, deviation, deviation, 0), mode='nearest')


def _defocus_blur(x, parameters, draw):
    """By a disk whose edge is softened."""
    del draw
    radius, softness = parameters
    half = max(8, math.ceil(radius))
    across = np.arange(-half, half + 1)
    disk = (across[:, None] ** 2 + across**2 <= radius**2).astype(float)
    reach = 1 if radius <= 8 else 2
    bell = np.exp(-np.square(np.arange(-reach, reach + 1)) / (2 * softness**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, bell / bell.sum(), axis, mode='mirror')
    rows = np.flatnonzero(disk.any(1))
    kernel = disk[rows[0] : rows[-1] + 1, rows[0] : rows[-1] + 1]
    return ndimage.correlate(x, (kernel / kernel.sum())[None, :, :, None], mode='mirror')


def _motion_blur(x, parameters, draw):
    """Along a line of a random direction, within 45 degrees of the horizontal; ImageMagick's."""
    radius, deviation = parameters
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * deviation**2))
    weights /= weights.sum()
    angles = np.deg2rad(90 * draw((1,))[:, 0] - 45)
    height, width = x.shape[1:3]
    result = np.empty_like(x)
    for i, angle in enumerate(angles):
        across, down = (
            np.ceil(steps * side - 0.5).astype(int) for side in (np.cos(angle), np.sin(angle))
        )
        rows = np.clip(np.arange(height) + down[:, None], 0, height - 1)
        columns = np.clip(np.arange(width) + across[:, None], 0, width - 1)
        shifted = x[i][rows[:, :, None], columns[:, None, :]]
        result[i] = np.tensordot(weights, shifted, 1)
    return result


def _zoom_blur(x, factors, draw):
    """The mean of the image and of enlarged ones."""
    del draw
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _zoomed(x, factor):
    """The middle of the images, enlarged to their size."""
    middle = tuple(_middle(side, math.ceil(side / factor)) for side in x.shape[1:3])
    enlarged = ndimage.zoom(x[:, *middle], (1, factor, factor, 1), order=1)
    found = tuple(_middle(big, side) for big, side in zip(enlarged.shape[1:3], x.shape[1:3]))
    return enlarged[:, *found]


def _middle(side, part):
    start = (side - part) // 2
    return slice(start, start + part)


# Weather.


def _fog(x, parameters, draw):
    strength, decay = parameters
    height, width = x.shape[1:3]
    size = 2 ** max(math.ceil(math.log2(max(height, width))), 5)
    haze = _plasma(draw((size * size,)), size, decay)[:, :height, :width, None]
    most = x.max((1, 2, 3), keepdims=True)
    return (x + strength * haze) * most / (most + strength)


def _plasma(uniform, size, decay):
    """Heights in [0, 1] by diamonds and squares on a torus: uniform (N, size^2) -> (N, size, size).

    From coarse to fine, each new point is the mean of four neighbours and a random part, which is
    divided by `decay` from one scale to the next.
    """
    heights, used, step, spread = np.zeros((len(uniform), size, size)), 0, size, 100.0

    def moved(corners):
        nonlocal used
        count = corners[0].size // len(uniform)
        random = uniform[:, used : used + count].reshape(corners[0].shape)
        used += count
        return sum(corners) / 4 + spread * spread * (2 * random - 1)

    while step >= 2:
        half = step // 2
        old = heights[:, ::step, ::step]
        right, below = np.roll(old, -1, 2), np.roll(old, -1, 1)
        centre = moved([old, right, below, np.roll(right, -1, 1)])
        heights[:, half::step, half::step] = centre
        heights[:, ::step, half::step] = moved([old, right, centre, np.roll(centre, 1, 1)])
        heights[:, half::step, ::step] = moved([old, below, centre, np.roll(centre, 1, 2)])
        step, spread = half, spread / decay
    heights -= heights.min((1, 2), keepdims=True)
    return heights / heights.max((1, 2), keepdims=True)


def _brightness(x, more, draw):
    """The value of HSV is raised: hue and saturation stay."""
    del draw
    value = x.max(-1, keepdims=True)
    brighter = np.minimum(value + more, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


def _contrast(x, share, draw):
    del draw
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * share + mean


# Digital.


def _elastic(x, parameters, draw):
    """A random affine map, then a smooth random displacement of each pixel."""
    height, width = x.shape[1:3]
    strength, smoothness, affine = (share * min(height, width) for share in parameters)
    third = min(height, width) // 3
    centre = np.array([height // 2, width // 2], float)
    corners = centre + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + affine * (2 * draw((3, 2)) - 1)
    field = 2 * draw((2, height, width)) - 1
    if smoothness:
        deviation = (0, 0, smoothness, smoothness)
        field = ndimage.gaussian_filter(field, deviation, mode='reflect', truncate=3)
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing='ij')).astype(float)
    result = np.empty_like(x)
    for i, image in enumerate(x):
        # The affine map takes the corners to where they are moved; each pixel asks where it is of.
        rows = np.concatenate([moved[i], np.ones((3, 1))], 1)
        back = np.linalg.solve(rows, corners)
        places = np.tensordot(back[:2].T, grid, 1) + back[2][:, None, None]
        for channel in range(x.shape[-1]):
            straight = ndimage.map_coordinates(image[..., channel], places, order=1, mode='mirror')
            result[i, ..., channel] = ndimage.map_coordinates(
                straight, grid + strength * field[i], order=1, mode='reflect'
            )
    return result


def _pixelate(x, share, draw):
    from PIL import Image

    del draw
    height, width = x.shape[1:3]
    small = max(int(width * share), 1), max(int(height * share), 1)
    box = Image.Resampling.BOX
    return _by_pillow(x, lambda image: image.resize(small, box).resize((width, height), box))


def _jpeg(x, quality, draw):
    from PIL import Image

    del draw

    def compressed(image):
        file = io.BytesIO()
        image.save(file, 'JPEG', quality=quality)
        return Image.open(file)

    return _by_pillow(x, compressed)


def _by_pillow(x, change):
    from PIL import Image

    images = np.rint(255 * x).astype(np.uint8)
    grey = x.shape[-1] == 1
    changed = [np.asarray(change(Image.fromarray(i[..., 0] if grey else i))) for i in images]
    return np.reshape(changed, x.shape) / 255.0


def _factors(*ends):
    return tuple(tuple(np.arange(1, end, step)) for end, step in ends)


_OVER = 244 / 224  # of the lengths of `elastic` in ImageNet-C, which are those of 244 pixels

CORRUPTIONS = {
    'gaussian_noise': Corruption(
        _gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    'shot_noise': Corruption(_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    'impulse_noise': Corruption(
        _impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)
    ),
    'gaussian_blur': Corruption(_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6)),
    'defocus_blur': Corruption(
        _defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    'motion_blur': Corruption(
        _motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    'zoom_blur': Corruption(
        _zoom_blur,
        _factors((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        _factors((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    'fog': Corruption(
        _fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    'brightness': Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    'contrast': Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    'elastic': Corruption(
        _elastic,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        tuple(
            tuple(_OVER * length for length in lengths)
            for lengths in (
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            )
        ),
    ),
    'pixelate': Corruption(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    'jpeg': Corruption(_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
