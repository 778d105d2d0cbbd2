"""The labels to train on, where they are not the dataset's own: noise, and a model's predictions.

A relabelling is a function (positions in the training set, their true labels) -> labels.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from sam_jax import limits, rngs
from sam_jax.errors import UserError

# (positions in the training set, their true labels) -> labels.
Relabelling = Callable[[np.ndarray, np.ndarray], np.ndarray]

# What becomes of a label that is hit by noise: (true label, a draw, number of classes) -> label.
LABEL_NOISE = {
    # Any class, the true one included (MentorNet's convention; the SAM paper does not say): about
    # rate x (1 - 1 / number of classes) of the labels end up wrong.
    'uniform': lambda true, draw, n: draw % n,
    # Any other class.
    'other': lambda true, draw, n: (true + 1 + draw % (n - 1)) % n,
    # The next class: each is taken for one other ("pair flip", asymmetric noise).
    'pair': lambda true, draw, n: (true + 1) % n,
}


def unchanged(index: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The relabelling that changes nothing."""
    del index
    return labels


def noise(
    num_examples: int, rate: float, num_classes: int, seed: int, kind: str = 'uniform'
) -> Relabelling:
    """Returns the relabelling that gives a fraction `rate` of the examples another label.

    Args:
      num_examples: N, of the training set.
      rate: exactly round(rate N) examples are hit.
      num_classes: number of classes.
      seed: decides which examples, and what they get.
      kind: one of LABEL_NOISE.
    """
    hit = np.zeros(num_examples, bool)
    hit[rngs.permutation(seed, 'noisy_examples', num_examples)[: round(rate * num_examples)]] = True
    draws = rngs.integers(seed, 'noisy_labels', num_examples, num_classes * (num_classes - 1))

    def relabel(index, labels):
        noisy = LABEL_NOISE[kind](labels, draws[index], num_classes)
        return np.where(hit[index], noisy, labels).astype(np.int32)

    return relabel


@dataclasses.dataclass(frozen=True)
class Given:
    """The relabelling that takes the labels from a table, whatever the true ones are.

    Attributes:
      table: classes int32 (N,), or distributions float32 (N, classes).
    """

    table: np.ndarray

    def __call__(self, index: np.ndarray, labels: np.ndarray) -> np.ndarray:
        del labels
        return self.table[index]

    @property
    def checksum(self) -> str:
        """16 hexadecimal digits of the table."""
        return hashlib.sha256(self.table.tobytes()).hexdigest()[:16]


def predicted(path: str, name: str, examples: Any, num_classes: int, soft: bool) -> Given:
    """Returns the relabelling by a file of predictions, as `sam-jax-predict` writes it.

    Args:
      path: .npz with 'probabilities' (N, classes), 'dataset', and the checksum 'examples', which
        older files lack.
      name, num_classes: of the training set, which must be the file's.
      examples: its split: has len, and `checksum`, '' where that is not known.
      soft: whether the labels are the probabilities themselves, or their largest class.

    Raises:
      UserError: no such file, or one of other examples.
    """
    key = f'data.labels_from is {path!r}'
    try:
        # Opened here: of a damaged file NumPy leaves its own open.
        with open(os.path.expanduser(path), 'rb') as opened, np.load(opened) as file:
            size = sum(member.file_size for member in file.zip.infolist())
            limits.check_unpacked(f'data.labels_from, {path!r},', size)
            probabilities, dataset = file['probabilities'], str(file['dataset'])
            checksum = str(file['examples']) if 'examples' in file else ''
    except UserError:
        raise
    except FileNotFoundError as e:
        raise UserError(f'{key}; there is no such file. `sam-jax-predict` writes one.') from e
    except Exception as e:  # whatever NumPy and zipfile find wrong
        raise UserError(f'{key}; it cannot be read as a file of predictions: {e!r}.') from e
    if probabilities.ndim != 2 or not np.issubdtype(probabilities.dtype, np.floating):
        raise UserError(
            f'{key}; its probabilities are {probabilities.dtype} {probabilities.shape}, and must '
            'be numbers (N, classes).'
        )
    if (dataset, *probabilities.shape) != (name, len(examples), num_classes):
        n, classes = probabilities.shape
        raise UserError(
            f'{key}; it holds predictions for {n} examples of {dataset} in {classes} classes, and '
            f'the training set is {len(examples)} examples of {name} in {num_classes} classes.'
        )
    if checksum and examples.checksum not in ('', checksum):
        raise UserError(
            f'{key}; it holds predictions for {len(examples)} other examples of {name} than those '
            'of the training set: what chooses them, such as data.dir, data.fraction, data.shots '
            'and data.fraction_seed, must be as in the run that predicted.'
        )
    if not (np.isfinite(probabilities).all() and (probabilities >= 0).all()):
        raise UserError(f'{key}; some of its probabilities are not finite, or below 0.')
    table = (
        probabilities.astype(np.float32) if soft else probabilities.argmax(axis=1).astype(np.int32)
    )
    return Given(table)


def create(settings: Any, name: str, examples: Any, num_classes: int) -> Relabelling:
    """Returns the relabelling that `config.data` asks for.

    Args:
      settings: `config.data`.
      name, num_classes: of the training set.
      examples: its split, as `predicted` takes it.
    """
    if settings.labels_from:
        return predicted(settings.labels_from, name, examples, num_classes, settings.soft_labels)
    if settings.label_noise:
        return noise(
            len(examples),
            settings.label_noise,
            num_classes,
            settings.label_noise_seed,
            settings.label_noise_kind,
        )
    return unchanged


def true_class(labels: np.ndarray) -> np.ndarray:
    """Classes of labels that are classes already, or distributions (their largest entry)."""
    return labels if labels.ndim == 1 else labels.argmax(axis=-1)
