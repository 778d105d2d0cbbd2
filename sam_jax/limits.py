"""How much of a file is read: what comes from others may be larger than it says, and endless."""

import os
import stat

from sam_jax.errors import UserError

PIXELS = 2**26  # of an image, 8192 x 8192
FILE = 2**29  # bytes of a file that holds one image


def free_host_memory() -> float:
    """Returns the free bytes of this machine; infinite where it does not tell."""
    try:
        with open('/proc/meminfo') as file:
            fields = dict(line.split(':') for line in file)
        return 1024 * int(fields['MemAvailable'].split()[0])
    except (OSError, KeyError):
        return float('inf')


def check_unpacked(what: str, size: float, most: float | None = None) -> None:
    """Refuses to unpack what is larger than it may be.

    Args:
      what: begins the sentence.
      size: bytes that it takes in memory.
      most: bytes that it may; default what this machine has free.

    Raises:
      UserError: it is larger.
    """
    limit = free_host_memory() if most is None else most
    if size > limit:
        why = 'are free' if most is None else 'are allowed'
        raise UserError(
            f'{what} takes {size / 2**30:.3g} GiB in memory, of which {limit / 2**30:.3g} {why}.'
        )


def read_file(path: str) -> bytes:
    """Returns the content of a file that holds one image.

    Raises:
      OSError: it cannot be read, is no file but a pipe or a device, or has more than FILE bytes.
    """
    # A pipe would be waited for.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 'rb') as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, 'it is no file')
        content = file.read(FILE + 1)
    if len(content) > FILE:
        raise OSError(0, f'it has more than {FILE} bytes')
    return content


def check_pixels(width: int, height: int) -> None:
    """Raises ValueError if an image has more than PIXELS pixels."""
    if width * height > PIXELS:
        raise ValueError(f'it has {width} x {height} pixels, more than {PIXELS}')
