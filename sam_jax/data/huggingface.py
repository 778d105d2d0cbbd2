"""Datasets of Hugging Face that lie on disk: Parquet files, or what `save_to_disk` has written.

Both are tables of Arrow with encoded images in them; pyarrow and Pillow read them, without the
library `datasets`.
"""

import importlib.util
import json
import os
import re
from typing import Any

import numpy as np

from sam_jax import limits
from sam_jax.data import pillow
from sam_jax.data.files import checked_split, folder_of
from sam_jax.data.resident import Split
from sam_jax.errors import UserError, first_line

# The splits to test on; the first that there is.
TEST_SPLITS = ('test', 'validation', 'val', 'valid')
# The column of labels, where several could be.
LABEL_NAMES = ('label', 'labels', 'fine_label')

# Examples that are read at once.
_BATCH = 256

_SHARD = re.compile(r'(.*)-(\d+)-of-(\d+)\.(arrow|parquet)')


def read_huggingface(data_dir: str) -> tuple[Split, Split, tuple[str, ...]]:
    """Reads a dataset of a folder, of which all images have one size.

    A file belongs to a split if its name, or that of its folder within `data_dir`, begins with the
    split's: `train/data-00000-of-00001.arrow`, `data/train-00000-of-00002.parquet`, `test.parquet`.

    Returns:
      (train Split, test Split, names of the classes of the feature ClassLabel, () without one).

    Raises:
      UserError: pyarrow, a split, a file of it or a column is not there, a file belongs to two
        splits, or something is damaged.
    """
    root = folder_of(
        data_dir,
        'huggingface',
        'that `save_to_disk` wrote, or with Parquet files such as train.parquet and test.parquet',
    )
    if not importlib.util.find_spec('pyarrow'):
        raise UserError(
            "data.name is 'huggingface', which needs pyarrow: pip install 'sam_jax[huggingface]'."
        )
    files = _files(root)
    splits = {path: _split_of(path, root) for path in files}
    by_split = {
        split: [path for path in files if splits[path] == split]
        for split in ('train', *TEST_SPLITS)
    }
    test = next((split for split in TEST_SPLITS if by_split[split]), None)
    if not by_split['train'] or test is None:
        raise UserError(
            f'data.dir {data_dir!r} holds the files '
            f'{", ".join(os.path.relpath(f, root) for f in files[:4]) or "none"}'
            f'{", ..." if len(files) > 4 else ""}; it needs some of train and of one of '
            f'{", ".join(TEST_SPLITS)}, Parquet or as `save_to_disk` writes them.'
        )
    train, names = _read_split(by_split['train'])
    evaluated, test_names = _read_split(by_split[test])
    if names != test_names:
        raise UserError(
            f'The classes of data.dir {data_dir!r} are called {", ".join(names) or "nothing"} in '
            f'train and {", ".join(test_names) or "nothing"} in {test}; they must be the same.'
        )
    return train, evaluated, names


def _files(root):
    """The tables in a folder and below, sorted; without those that `datasets` keeps for itself."""
    for kind in ('parquet', 'arrow'):
        # Links to folders are not followed: they may lead in circles.
        found = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(root)
            for name in names
            if name.endswith(f'.{kind}') and not name.startswith(('cache-', 'tmp', '.'))
        )
        if found:
            return found
    return []


def _split_of(path, root):
    """The split that a file belongs to by its name and its folder's; None for none."""
    # Below `root`: what the folder of the dataset is called says nothing.
    names = os.path.relpath(path, root).split(os.sep)[-2:]
    begins = [re.split(r'[-_.]', name)[0] for name in names]
    found = list(dict.fromkeys(x for x in begins if x in ('train', *TEST_SPLITS)))
    if len(found) > 1:
        raise UserError(
            f'{path} belongs to {found[0]} by its folder and to {found[1]} by its name; it must '
            'belong to one of them.'
        )
    return found[0] if found else None


def _check_shards(paths):
    """Refuses shards I-of-N that are not N."""
    for path in paths:
        match = _SHARD.fullmatch(path)
        if match:
            begin, _, number, kind = match.groups()
            for i in range(int(number)):
                name = f'{begin}-{i:0{len(match[2])}d}-of-{number}.{kind}'
                if name not in paths:
                    raise UserError(f'There is no file {name}, one of the {int(number)} of {path}.')


def _read_split(paths):
    """(Split, names of the classes, () if they are not said) of the tables in some files."""
    folders = sorted({os.path.dirname(path) for path in paths})
    if len(folders) > 1:
        raise UserError(
            f'One split has files in several folders, {", ".join(folders)}; data.dir must be a '
            'folder with one dataset.'
        )
    _check_shards(paths)
    images, labels, names = [], [], ()
    for path in paths:
        done = 0
        for batch in _batches(path):
            image_column, label_column, names = _columns(batch.schema, path)
            if batch[label_column].null_count:
                raise UserError(f'{path} has examples without a {label_column!r}.')
            labels.append(np.asarray(batch[label_column].to_numpy(zero_copy_only=False)))
            for number, encoded in enumerate(batch[image_column].to_pylist(), done):
                images.append(_pixels(encoded, f'Example {number} of {path}'))
                if images[-1].shape != images[0].shape:
                    raise UserError(
                        f'Example {number} of {path} is an image {_by(images[-1].shape)}, and the '
                        f"first one is {_by(images[0].shape)}; data.name='huggingface' is for "
                        "images of one size, 'folder' for others."
                    )
            done += len(batch)
            # As much again when they are put together.
            limits.check_unpacked(f'{path}, decoded,', sum(x.nbytes for x in images))
    if not images:
        raise UserError(f'{paths[0]} holds no examples.')
    name = f'of {paths[0]}' + (' and its like' if len(paths) > 1 else '')
    return checked_split((np.stack(images), name), (np.concatenate(labels), name)), names


def _batches(path):
    """Yields a table piece by piece: few bytes of a file may say that there are many examples."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.endswith('.parquet'):
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(_BATCH)
        else:
            with pa.memory_map(path) as file:
                yield from pa.ipc.open_stream(file)
    except UserError:
        raise
    except Exception as e:  # whatever Arrow finds wrong
        raise UserError(f'{path} is damaged or cannot be read: {first_line(e)}.') from e


def _columns(schema: Any, path):
    """(name of the images, of the labels, names of the classes or ()) in a table."""
    import pyarrow as pa

    features = _features(schema, path)
    images = [
        field.name
        for field in schema
        if pa.types.is_binary(field.type)
        or (pa.types.is_struct(field.type) and field.type.get_field_index('bytes') >= 0)
    ]
    labels = [
        name
        for name, f in features.items()
        if f.get('_type') == 'ClassLabel' and name in schema.names
    ]
    labels = labels or [field.name for field in schema if pa.types.is_integer(field.type)]
    if len(labels) > 1:
        labels = [name for name in LABEL_NAMES if name in labels][:1] or labels
    for what, found in (('images', images), ('labels', labels)):
        if len(found) != 1:
            raise UserError(
                f'{path} has the columns {", ".join(schema.names)}; one of them must hold {what}, '
                f'and {", ".join(found) or "none"} could.'
            )
    names = features.get(labels[0], {}).get('names') or ()
    if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise UserError(f'{path} must hold a list with the names of its classes; it has {names!r}.')
    return images[0], labels[0], tuple(names)


def _features(schema, path):
    """What the library `datasets` says of the columns: {name: {'_type': ..., ...}}."""
    try:
        said = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))
        found = said.get('info', {}).get('features', {})
        return {name: x for name, x in found.items() if isinstance(x, dict)}
    except (ValueError, AttributeError, RecursionError) as e:
        raise UserError(f'{path} says of its columns what cannot be read: {first_line(e)}.') from e


def _pixels(encoded, what):
    encoded = encoded['bytes'] if isinstance(encoded, dict) else encoded
    if encoded is None:
        raise UserError(f'{what} has no bytes of an image.')
    try:
        return pillow.decode(encoded, keep_grey=True)
    except ValueError as e:
        raise UserError(f'{what} cannot be decoded: {first_line(e)}.') from e


def _by(shape):
    return 'x'.join(map(str, shape))
