"""Images without TensorFlow: its windows and its resizing, to the last bit, in NumPy.

Pillow decodes the files. Of PNG, BMP and GIF it makes the same pixels; of JPEG, it has the accurate
inverse cosine transform where the SAM paper's code has the fast one, so that single pixels differ
by a few of 255 levels.
"""

import functools
import io

import numpy as np

from sam_jax import limits
from sam_jax.errors import first_line

# Those that Pillow decodes by itself: for some others it starts programs.
FORMATS = ('PNG', 'JPEG', 'BMP', 'GIF', 'WEBP')

TABLE = 1024  # places between two pixels for which TensorFlow has coefficients
ATTEMPTS = 10


def decode(encoded: bytes, keep_grey: bool = False) -> np.ndarray:
    """Returns the pixels of an image, uint8 (H, W, 3); of an animation its first frame.

    Args:
      encoded: bytes of a file.
      keep_grey: whether an image of one channel stays one, (H, W, 1).

    Raises:
      ValueError: the bytes are no image of FORMATS, or one of more pixels than are allowed.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            limits.check_pixels(*image.size)
            if image.mode.startswith('I;16') or image.mode == 'I':
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, -1)
            if keep_grey and image.mode in ('1', 'L'):
                return np.asarray(image.convert('L'))[..., None]
            return np.asarray(image.convert('RGB'))
    except UnidentifiedImageError as e:
        raise ValueError('it is no image of a known format') from e
    except Exception as e:  # whatever its decoders find wrong
        raise ValueError(first_line(e)) from e


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow's v1 bicubic resizing, rounded: uint8 (H, W, 3) -> uint8 (size, size, 3)."""
    rows, columns = (_taps(side, size) for side in pixels.shape[:2])
    x = pixels.astype(np.float32)
    x = _sum((x[place] * weight[:, None, None] for place, weight in zip(*rows)))
    x = _sum((x[:, place] * weight[None, :, None] for place, weight in zip(*columns)))
    return np.clip(x + np.float32(0.5), 0, 255).astype(np.uint8)


def crop(pixels: np.ndarray, window: tuple[int, ...], size: int) -> np.ndarray:
    """The window (y, x, height, width) of an image, resized: uint8 (size, size, 3)."""
    y, x, height, width = window
    return resize(pixels[y : y + height, x : x + width], size)


def _sum(terms):
    # From left to right in float32, as it is done there.
    return functools.reduce(np.add, terms)


@functools.lru_cache(maxsize=4096)
def _taps(side, size):
    """((4, size) places, (4, size) weights) of the pixels that make each pixel of the result."""
    at = np.arange(size, dtype=np.float32) * (np.float32(side) / np.float32(size))
    whole = np.floor(at).astype(np.int64)
    offset = np.rint((at - whole.astype(np.float32)) * np.float32(TABLE)).astype(np.int64)
    inner, outer = _coefficients()
    weights = np.stack([outer[offset], inner[offset], inner[TABLE - offset], outer[TABLE - offset]])
    places = np.clip(whole + np.arange(-1, 3)[:, None], 0, side - 1)
    return places, weights


@functools.cache
def _coefficients():
    """Keys' cubic with a = -0.75 at distances 0 to 1 and 1 to 2, float32."""
    a = -0.75
    x = np.arange(TABLE + 1) / TABLE
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    x = x + 1
    outer = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return inner.astype(np.float32), outer.astype(np.float32)


class _Philox:
    """TensorFlow's stateless random numbers of a seed, two int32."""

    def __init__(self, seed):
        low, high = (int(s) & 0xFFFFFFFFFFFFFFFF for s in seed)  # int32 with its sign
        mixed = _philox(
            (low & 0xFFFFFFFF, low >> 32, high & 0xFFFFFFFF, high >> 32), (0x3EC8F720, 0x02461E29)
        )
        self._key, self._counter = mixed[:2], [0, 0, *mixed[2:]]
        self._left = []

    def integer(self):
        """Uniform in uint32."""
        if not self._left:
            self._left = list(_philox(self._counter, self._key))
            for i in range(4):
                self._counter[i] = (self._counter[i] + 1) & 0xFFFFFFFF
                if self._counter[i]:
                    break
        return self._left.pop(0)

    def below(self, n):
        """Uniform in 0, ..., n - 1."""
        if n & (n - 1) == 0:
            return self.integer() & (n - 1)
        left_over = 0xFFFFFFFF % n + 1
        while (number := self.integer()) < left_over:
            pass
        return number % n

    def share(self):
        """Uniform in [0, 1), float32."""
        bits = np.uint32(0x3F800000 | (self.integer() & 0x7FFFFF))
        return bits.view(np.float32) - np.float32(1)


def _philox(counter, key):
    """Philox-4x32-10 (Salmon et al., SC 2011)."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (
            (second >> 32) ^ b ^ low,
            second & 0xFFFFFFFF,
            (first >> 32) ^ d ^ high,
            first & 0xFFFFFFFF,
        )
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


def random_window(
    height: int,
    width: int,
    seed: np.ndarray,
    area: tuple[float, float],
    aspect: tuple[float, float],
    covered: float,
) -> tuple[int, ...] | None:
    """TensorFlow's `stateless_sample_distorted_bounding_box` with the whole image as the box.

    Args:
      height, width: of the image.
      seed: two int32.
      area: least and greatest share of the image's area.
      aspect: least and greatest ratio of width to height.
      covered: least share of the image that the window must cover.

    Returns:
      (y, x, height, width), or None where all attempts were vain.
    """
    random = _Philox(seed)
    least, most = (np.float32(x) for x in aspect)
    smallest, largest = (np.float32(x) for x in area)
    for _ in range(ATTEMPTS):
        ratio = random.share() * (most - least) + least
        window = _attempt(height, width, ratio, smallest, largest, random)
        if window and np.float32(window[2] * window[3]) >= np.float32(covered) * np.float32(
            height * width
        ):
            return window
    return None


def _attempt(height, width, ratio, least, most, random):
    least, most = (
        np.float32(share * np.float32(width)) * np.float32(height) for share in (least, most)
    )

    def rounded(x):
        return int(np.rint(x))

    h, highest = (rounded(np.sqrt(area / ratio)) for area in (least, most))
    if rounded(highest * ratio) > width:
        highest = int(np.float32((width + 0.5 - np.float32(1e-7)) / ratio))
        highest -= rounded(highest * ratio) > width
    highest = min(highest, height)
    h = min(h, highest)
    if h < highest:
        h += random.below(highest - h + 1)
    w = rounded(h * ratio)
    if np.float32(w * h) < least:
        h += 1
        w = rounded(h * ratio)
    if np.float32(w * h) > most:
        h -= 1
        w = rounded(h * ratio)
    if not (least <= np.float32(w * h) <= most and 0 < w <= width and 0 < h <= height):
        return None
    y = random.below(height - h) if h < height else 0
    x = random.below(width - w) if w < width else 0
    return y, x, h, w
