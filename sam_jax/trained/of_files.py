"""Predictions of a trained network for image files, and the table of them: CSV or JSON."""

import concurrent.futures
import csv
import functools
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np

from sam_jax.data import image_files
from sam_jax.trained.model import BATCH_SIZE, Trained

FORMATS = ('.csv', '.json')

# Files that are decoded at once: each may be large.
_THREADS = 8


def predictions(
    model: Trained, paths: Sequence[str], batch_size: int = BATCH_SIZE
) -> Iterator[tuple[str, np.ndarray | ValueError]]:
    """Yields (path, probabilities (classes,), or the reason why it cannot be read), in order.

    Args:
      model: what `load` returns.
      paths: of image files; how they become images of the network, `data.image_files` says.
      batch_size: how many at once.
    """
    read = functools.partial(
        _read,
        shape=model.preprocessing.shape,
        of_files=image_files.is_of_files(model.config.data.name),
    )
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(paths), batch_size):
            part = paths[start : start + batch_size]
            images = list(pool.map(read, part))
            whole = [x for x in images if not isinstance(x, ValueError)]
            rows = iter(model.predict(np.stack(whole), batch_size) if whole else [])
            for path, image in zip(part, images):
                yield path, image if isinstance(image, ValueError) else next(rows)


def _read(path, shape, of_files):
    try:
        return image_files.read(path, shape, of_files)
    except ValueError as e:
        return e


def write(
    path: str, classes: Sequence[str], rows: Iterator[tuple[str, np.ndarray | ValueError]]
) -> tuple[int, dict[str, str]]:
    """Writes predictions as a table, whole or not at all; a file that is no image has no row.

        file,class,cat,dog             [{"file": "a.png", "class": "dog",
        a.png,dog,0.1,0.9                "probabilities": {"cat": 0.1, "dog": 0.9}}]

    Args:
      path: ending in .csv or .json.
      classes: names of the classes.
      rows: (name of a file, probabilities or why there are none).

    Returns:
      (number of rows written, {name of a file that has none: why}).

    Raises:
      OSError: it cannot be written.
    """
    broken: dict[str, str] = {}
    partial = path + '.part'

    def whole():
        for name, row in rows:
            if isinstance(row, ValueError):
                broken[name] = str(row)
            else:
                yield name, classes[int(row.argmax())], [float(f'{p:.6g}') for p in row]

    count = 0
    with open(partial, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        if path.endswith('.csv'):
            table = csv.writer(file, lineterminator='\n')
            table.writerow(['file', 'class', *classes])
            for name, label, row in whole():
                table.writerow([name, label, *row])
                count += 1
        else:
            for name, label, row in whole():
                content = {'file': name, 'class': label, 'probabilities': dict(zip(classes, row))}
                file.write(('[\n' if not count else ',\n') + json.dumps(content))
                count += 1
            file.write('\n]\n' if count else '[]\n')
    if count:
        os.replace(partial, path)
    else:
        os.remove(partial)
    return count, broken
