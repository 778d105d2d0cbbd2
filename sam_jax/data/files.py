"""Datasets in files of arrays: IDX, as MNIST and its relatives have it, and NumPy's npz.

A reader takes `data.dir` and returns (train Split, test Split). What it returns is whole: a file is
refused if it holds less, or more, than its header says.
"""

import gzip
import os
import re
import struct
import zlib
from typing import Any

import numpy as np

from sam_jax import limits
from sam_jax.data.resident import Split
from sam_jax.errors import UserError, first_line

# The names of the splits in the names of IDX files.
IDX_SPLITS = {'train': ('train',), 'test': ('t10k', 'test')}
IDX_NAME = re.compile(r'(.*-)?(train|t10k|test)-(images|labels)[-.]idx\d-ubyte(\.gz)?')

# What an npz file must hold, to train on and to test on.
NPZ_NAMES = (('images', 'labels'), ('test_images', 'test_labels'))

# The last axes that images may have, besides height and width.
CHANNELS = ((), (1,), (3,))

_UINT8 = 8  # IDX's number of the type
_CHUNK = 2**20


def read_idx(data_dir: str) -> tuple[Split, Split]:
    """Reads {train,t10k}-{images-idx3,labels-idx1}-ubyte, each with or without .gz, of a folder.

    For `t10k` a file may say `test`, and a name may begin with that of the dataset, as EMNIST's do.
    Images of several channels are (N, H, W, C), `idx4`.

    Raises:
      UserError: a file is not there, is there twice, is damaged, or does not fit the others.
    """
    root = folder_of(data_dir, 'idx', 'with train-images-idx3-ubyte and its like')
    train, test = (
        checked_split(
            *(
                (idx_array(path), path)
                for path in (_idx_file(root, split, kind) for kind in ('images', 'labels'))
            )
        )
        for split in IDX_SPLITS
    )
    return train, test


def holds_idx(folder: str) -> bool:
    """Whether a folder holds an IDX file by its name."""
    return os.path.isdir(folder) and any(map(IDX_NAME.fullmatch, os.listdir(folder)))


def _idx_file(root, split, kind):
    names = IDX_SPLITS[split]
    found = sorted(
        name
        for name in os.listdir(root)
        if (match := IDX_NAME.fullmatch(name)) and match[2] in names and match[3] == kind
    )
    sets = {name.removesuffix('.gz') for name in found}
    if not found:
        raise UserError(
            f'{root} has no {kind} of the {split} split: a file such as {names[0]}-{kind}-'
            f'idx{3 if kind == "images" else 1}-ubyte, or the same with .gz.'
        )
    if len(sets) > 1:
        raise UserError(
            f'{root} has several files of {kind} of the {split} split, {", ".join(sorted(sets))}; '
            'put those of one dataset into a folder of their own.'
        )
    return os.path.join(root, found[0])


def idx_array(path: str) -> np.ndarray:
    """Reads an IDX file of bytes, compressed by gzip or not.

    Its header is two zeros, the type (8: uint8), the number of axes, and the length of each as a
    big-endian uint32. No more is read, or unpacked, than the header says and one byte.

    Returns:
      uint8 of the header's shape.

    Raises:
      UserError: it is another file, is damaged, or holds less or more than its header says.
    """
    try:
        with open(path, 'rb') as raw:
            packed = raw.read(2) == b'\x1f\x8b'
            raw.seek(0)
            return _idx_content(gzip.GzipFile(fileobj=raw) if packed else raw, path)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f'{path} is damaged or cannot be read: {first_line(e)}.') from e


def _idx_content(file: Any, path):
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b'\0\0' or not 1 <= magic[3] <= 4:
        raise UserError(f'{path} is no IDX file: it begins with the bytes {magic.hex() or "none"}.')
    if magic[2] != _UINT8:
        raise UserError(
            f'{path} holds values of the type 0x{magic[2]:02x}; it must be 0x08, bytes.'
        )
    lengths = file.read(4 * magic[3])
    if len(lengths) < 4 * magic[3]:
        raise UserError(f'{path} ends within its header.')
    shape = struct.unpack(f'>{magic[3]}I', lengths)
    said = int(np.prod(shape, dtype=object))
    # Of what is not packed there is no more than the file has.
    if isinstance(file, gzip.GzipFile):
        limits.check_unpacked(f'{path}, by its header,', said)
    content = bytearray()
    # In pieces: memory is taken for what is there, whatever the header says.
    while len(content) < said and (piece := file.read(min(_CHUNK, said - len(content)))):
        content += piece
    if len(content) < said:
        raise UserError(
            f'{path} is cut off: its header says {_by(shape)} bytes, and {len(content)} are there.'
        )
    if file.read(1):
        raise UserError(f'{path} goes on after the {_by(shape)} bytes that its header says.')
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_npz(data_dir: str) -> tuple[Split, Split]:
    """Reads `images`, `labels`, `test_images`, `test_labels` of an npz file.

    Args:
      data_dir: the file, or a folder with this npz file alone.

    Raises:
      UserError: it is not there, is damaged, lacks an array, or one does not fit the others.
    """
    path = os.path.expanduser(data_dir)
    if not path.endswith('.npz'):
        root = folder_of(data_dir, 'npz', 'with an .npz file, or such a file itself')
        found = sorted(name for name in os.listdir(root) if name.endswith('.npz'))
        if len(found) != 1:
            raise UserError(
                f'data.dir is {data_dir!r}, which holds {", ".join(found) or "no .npz file"}; it '
                'must hold one .npz file, or name one.'
            )
        path = os.path.join(root, found[0])
    train, test = (
        checked_split(*((_npz_array(path, name), f'{name!r} of {path}') for name in names))
        for names in NPZ_NAMES
    )
    return train, test


def _npz_array(path, name):
    try:
        # Opened here: of a damaged file NumPy leaves its own open.
        with open(path, 'rb') as opened, np.load(opened, allow_pickle=False) as file:
            if name in file.files:
                limits.check_unpacked(f'{name!r} of {path}', unpacked_size(file, name))
                return file[name]
            held = ', '.join(file.files) or 'nothing'
    except UserError:
        raise
    except FileNotFoundError as e:
        raise UserError(f'There is no file {path}, which data.dir names.') from e
    except Exception as e:  # whatever NumPy and zipfile find wrong
        raise UserError(f'{path} cannot be read as an npz file: {first_line(e)}.') from e
    wanted = ', '.join(name for names in NPZ_NAMES for name in names)
    raise UserError(f'{path} has no array {name!r} but {held}; it must hold {wanted}.')


def unpacked_size(file: Any, name: str) -> int:
    """Returns the bytes of an array in an open npz file: of its member no more are unpacked."""
    members = file.zip.namelist()
    return file.zip.getinfo(name if name in members else f'{name}.npy').file_size


def folder_of(data_dir: str, name: str, described: str) -> str:
    """Returns the folder that `data.dir` names.

    Raises:
      UserError: it is none; the sentence says what the dataset of that name wants of it.
    """
    root = os.path.expanduser(data_dir)
    if not data_dir or not os.path.isdir(root):
        raise UserError(
            f'data.dir is {data_dir!r}; with data.name={name!r} it must be a folder {described}.'
        )
    return root


def _by(shape):
    return ' x '.join(map(str, shape))


def checked_split(images: tuple[np.ndarray, str], labels: tuple[np.ndarray, str]) -> Split:
    """Returns the Split of two arrays, each with its name; (N, H, W) gets an axis of one channel.

    Args:
      images: uint8 (N, H, W), or (N, H, W, C) of 1 or 3 channels.
      labels: integers (N,) of any type.

    Raises:
      UserError: they are something else, or not one for each.
    """
    (pixels, images_name), (classes, labels_name) = images, labels
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[3:] not in CHANNELS:
        raise UserError(
            f'The images {images_name} are {pixels.dtype} {pixels.shape}; they must be uint8 (N, '
            'height, width), or with a last axis of 1 or 3 channels.'
        )
    if not pixels.size:
        raise UserError(f'The images {images_name} are of shape {pixels.shape}: there are none.')
    if classes.ndim != 1 or not np.issubdtype(classes.dtype, np.integer):
        raise UserError(
            f'The labels {labels_name} are {classes.dtype} {classes.shape}; they must be integers '
            '(N,).'
        )
    if len(pixels) != len(classes):
        raise UserError(
            f'There are {len(pixels)} images {images_name}, and {len(classes)} labels '
            f'{labels_name}; each image needs one.'
        )
    return Split(pixels.reshape(*pixels.shape[:3], -1), classes)


def moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns (mean, deviation) of images / 255 per channel, from sums of integers: exact.

    Args:
      images: uint8 (N, H, W, C).

    Returns:
      Two tuples of C numbers. The deviation of a channel that is the same everywhere is 1.
    """
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 1000):
        for channel, count in enumerate(counts):
            pixels = images[start : start + 1000, ..., channel]
            count += np.bincount(pixels.ravel(), minlength=256)
    level, total = np.arange(256), counts[0].sum()
    mean = counts @ level / total
    variance = counts @ level**2 / total - mean**2
    return (
        tuple(float(m) / 255 for m in mean),
        tuple(float(v) ** 0.5 / 255 if v > 0 else 1.0 for v in variance),
    )
