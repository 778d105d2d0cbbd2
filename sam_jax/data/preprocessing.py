"""From the pixels of images to the input of a network: the one place that says how."""

from typing import Any, NamedTuple

import jax
import numpy as np

from sam_jax.data import augment
from sam_jax.errors import UserError


class Preprocessing(NamedTuple):
    """What becomes of images before a network gets them, wherever nothing is augmented.

    Attributes:
      shape: (H, W, C) of the images.
      mean, std: per channel, of pixels / 255.
      size: side of the square that the images are resized to; 0 to leave them as they are.
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int = 0

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Returns (pixels / 255 - mean) / std, resized: uint8 (N, H, W, C) -> float."""
        return augment.enlarge(augment.normalize(pixels, self.mean, self.std), self.size)

    def checked(self, images: Any) -> np.ndarray:
        """Returns images as uint8 (N, H, W, C).

        Args:
          images: an array of them; grey ones may also be (N, H, W).

        Raises:
          UserError: they are of another type or shape; the sentence says of which they must be.
        """
        wanted = ', '.join(map(str, self.shape))
        try:
            array = np.asarray(images)
        except ValueError as e:  # lists of unequal lengths
            raise UserError(f'The images are no array; they must be uint8 (N, {wanted}).') from e
        grey = array.ndim == 3 and self.shape[-1] == 1
        pixels = array[..., None] if grey else array
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != self.shape:
            raise UserError(
                f'The images are {array.dtype} {array.shape}; they must be uint8 (N, {wanted}), '
                'values from 0 to 255, as those that the network was trained on.'
            )
        return pixels

    def described(self) -> dict[str, Any]:
        """Returns it as JSON holds it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self._asdict().items()}

    @classmethod
    def of_description(cls, described: Any) -> 'Preprocessing':
        """Reads what `described` returns.

        Raises:
          ValueError: it is something else.
        """
        try:
            shape, mean, std = (tuple(described[k]) for k in ('shape', 'mean', 'std'))
            size = described['size']
        except (KeyError, TypeError) as e:
            raise ValueError(f'the preprocessing is {described!r}') from e
        if not (
            len(shape) == 3
            and all(type(n) is int for n in (*shape, size))
            and min(shape) > 0 <= size
            and len(mean) == len(std) == shape[2]
            and all(type(x) in (int, float) and np.isfinite(x) for x in (*mean, *std))
            and min(std) > 0
        ):
            raise ValueError(f'the preprocessing is {described!r}')
        return cls(shape, tuple(map(float, mean)), tuple(map(float, std)), size)
