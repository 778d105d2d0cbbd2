"""Image files of any kind and size, as the uint8 images that a network takes.

Of a network whose dataset consists of image files, they become what its evaluation makes of them:
`decode.center_crop`. Of any other, an image of the network's size stays as it is. Of one of another
size the largest central part of the same proportions is taken, and resized with Pillow's bicubic
filter, which is as wide as a pixel of the result.

Colours are mixed to grey by ITU-R 601, grey is repeated for three channels. Of 16 bits the upper
eight are taken; an alpha channel is dropped, and a palette looked up.
"""

import os

import numpy as np

from sam_jax import limits
from sam_jax.data import decode, pillow, records
from sam_jax.errors import UserError, first_line

EXTENSIONS = (*records.EXTENSIONS, '.webp')


def find(place: str) -> list[str]:
    """Returns the paths of the image files in a folder and below, in the order of their names.

    What begins with a dot is left out; links to folders are not followed. A single file is itself.

    Raises:
      UserError: there is no such folder or file, or no image in it.
    """
    if os.path.isfile(place):
        return [place]
    if not os.path.isdir(place):
        raise UserError(f'--images is {place!r}; it must be a folder of image files, or one file.')
    found = []
    for folder, below, names in os.walk(place):
        below[:] = [name for name in below if not name.startswith('.')]
        found += [
            os.path.join(folder, name)
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith('.')
        ]
    if not found:
        raise UserError(f'--images is {place!r}, which holds no image ({", ".join(EXTENSIONS)}).')
    return sorted(found)


def is_of_files(name: str) -> bool:
    """Whether the dataset of that name consists of image files, cropped by `decode`."""
    return name in records.STREAMS


def read(path: str, shape: tuple[int, ...], of_files: bool) -> np.ndarray:
    """Returns the image of a file, uint8 (H, W, C).

    Args:
      path: of the file.
      shape: (H, W, C) of the network's images, C being 1 or 3.
      of_files: whether they were made of files, see `is_of_files`.

    Raises:
      ValueError: the file is no image, is damaged, or cannot be read; with the reason.
    """
    try:
        encoded = limits.read_file(path)
        if of_files:
            return decode.center_crop(encoded, shape[0])
        return fitted(pillow.decode(encoded), shape)
    except OSError as e:
        raise ValueError(e.strerror or first_line(e)) from e


def fitted(pixels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns uint8 (H, W, 3) as uint8 of another shape, (H, W, 1 or 3), by the rule above."""
    from PIL import Image

    height, width, channels = shape
    image = Image.fromarray(pixels)
    if channels == 1:
        image = image.convert('L')
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        w, h = (max(round(scale * side), 1) for side in (width, height))
        left, top = (image.width - w) // 2, (image.height - h) // 2
        # Cut out first: the filter would see beyond the part.
        image = image.crop((left, top, left + w, top + h))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(shape)
