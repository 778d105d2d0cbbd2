"""How far a trained network is to be believed: calibration, errors by class, corrupted images."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sam_jax import data, replicas, rngs
from sam_jax.data import corruptions
from sam_jax.errors import UserError
from sam_jax.trained.model import Trained

BINS = 15
WHAT = ('calibration', 'corruptions')

# Takes (what, done, total) of the progress.
Tell = Callable[[str, int, int], None]


class Batch(NamedTuple):
    """Images of a split.

    Attributes:
      numbers: of the images in the split, (n,).
      images: uint8 (n, H, W, C).
      labels: the classes that are right for them, (n,): the true ones, but of a training set with
        noisy or predicted labels these.
    """

    numbers: np.ndarray
    images: np.ndarray
    labels: np.ndarray


class Reliability(NamedTuple):
    """The predictions by their confidence, in bins of equal width; NaN where a bin is empty.

    Attributes:
      count: predictions in each bin, (bins,).
      confidence: their mean confidence.
      accuracy: the share of them that is right.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: sum over bins of count / n |accuracy - confidence|.

        Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), equation 3.
        """
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float(gaps @ self.count / self.count.sum())


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """Returns how often predictions are right, by how sure they are.

    Bin m of M holds the confidences in ((m - 1) / M, m / M]. The confidence is the largest
    probability, and the prediction its class, the first one of equals.

    Args:
      probabilities: (N, classes).
      labels: true classes, (N,).
      bins: how many.
    """
    confidence = probabilities.max(1).astype(np.float64)
    right = probabilities.argmax(1) == labels
    # As exact as float32 is: m / M itself lies in bin m.
    place = np.clip(np.ceil(np.round(confidence * bins, 5)).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid='ignore'):
        sums = (np.bincount(place, x, minlength=bins) / count for x in (confidence, right))
        return Reliability(count, *sums)


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of -log softmax(logits)[label]: logits (N, classes), labels (N,)."""
    x = logits.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(x).sum(1)) - x[np.arange(len(x)), labels]))


def confusion(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns how many images of each class, a row, are taken for each class, a column."""
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a network's dataset, opened; or a part of it, the same for every network.

    Attributes:
      name: of the split.
      dataset: of it.
      split: as the dataset has it.
      numbers: of the images that are taken, ascending.
    """

    name: str
    dataset: Any
    split: Any
    numbers: np.ndarray

    def batches(self, size: int) -> Iterator[Batch]:
        """Yields the images, so many at once; one that is damaged is left out."""
        layout, _ = replicas.make_layout(1, 1, 1, devices=jax.local_devices()[:1])
        chosen, start = self.split.subset(self.numbers), 0
        arrays = self.dataset.device_arrays(chosen)
        for feed in self.dataset.eval_feeds(chosen, size, layout):
            mask, labels = (x.reshape(-1, *x.shape[2:]) for x in (feed['mask'], feed['label']))
            rows = np.flatnonzero(mask)
            true = labels if labels.ndim == 1 else labels.argmax(-1)
            images = self.dataset.pixels(arrays, feed)
            yield Batch(self.numbers[start + rows], np.asarray(images)[rows], true[rows])
            start += len(mask)


def open_split(
    model: Trained, name: str = 'test', examples: int = 0, seed: int = 0, data_dir: str = ''
) -> Split:
    """Opens a split of the dataset of a network.

    Args:
      model: what `load` returns.
      name: of the split: test, train, or another one that the run evaluates on; not 'new'.
      examples: how many of it, drawn by the seed; 0 for all.
      seed: of the choice.
      data_dir: where the dataset lies; '' for the run's own place.

    Raises:
      UserError: there is no such dataset or split, or its images are of another shape.
    """
    if name == 'new':
        raise UserError(
            "split is 'new'; the network answers with the names of the other classes: it must be a "
            "split of those, such as 'test'."
        )
    settings = model.config.data.copy_and_resolve_references()
    settings.dir = data_dir or settings.dir
    if not name.startswith('train'):
        settings.labels_from = ''  # that file may be elsewhere, and is of the training set alone
    dataset = data.load_dataset(settings)
    known = [split for split in dataset.evals if split != 'new']
    if name not in known:
        raise UserError(f'split is {name!r}; it must be one of {", ".join(known)}.')
    if tuple(dataset.pixel_shape) != model.preprocessing.shape:
        raise UserError(
            f'The images of {settings.name} are {tuple(dataset.pixel_shape)}, and those of the '
            f'network {model.preprocessing.shape}; the data must be that of its run.'
        )
    split = dataset.evals[name]
    order = rngs.permutation(seed, 'quality', len(split))
    return Split(name, dataset, split, np.sort(order[: examples or len(split)]))


def _quiet(what, done, total):
    """Shows no progress."""


def measure(
    model: Trained,
    split: Split,
    what: Sequence[str] = WHAT[:1],
    seed: int = 0,
    batch_size: int = 512,
    tell: Tell = _quiet,
) -> dict[str, Any]:
    """Measures a network on a split.

    Args:
      model: what `load` returns.
      split: of `open_split`.
      what: some of WHAT.
      seed: of what is random in corruptions.
      batch_size: images computed at once.
      tell: takes (what, done, total) of the progress.

    Returns:
      {'examples', 'error_rate', 'nll', 'ece', 'confidence', 'reliability': {'count', 'confidence',
      'accuracy'}, 'confusion': rows of counts}, and with corruptions {'corruptions': {name: error
      rates at the five severities}}.
    """
    logits, labels = [], []
    variants = [
        (name, severity)
        for name in (corruptions.CORRUPTIONS if 'corruptions' in what else ())
        for severity in corruptions.SEVERITIES
    ]
    wrong = np.zeros(len(variants))
    done, total = 0, len(split.numbers)
    for batch in split.batches(batch_size):
        if not len(batch.labels):
            continue
        logits.append(model.logits(batch.images, batch_size))
        labels.append(batch.labels)
        for i, (name, severity) in enumerate(variants):
            images = corruptions.corrupt(batch.images, name, severity, seed, batch.numbers)
            found = model.logits(images, batch_size).argmax(1)
            wrong[i] += np.sum(found != batch.labels)
        done += len(batch.labels)
        tell('images', done, total)
    if not labels:
        raise UserError(f'None of the images of the split {split.name!r} can be decoded.')
    logits, labels = np.concatenate(logits), np.concatenate(labels)
    probabilities = np.asarray(jax.nn.softmax(logits.astype(np.float32)))
    bins = reliability(probabilities, labels)
    said = {
        'examples': len(labels),
        'error_rate': float(np.mean(logits.argmax(1) != labels)),
        'nll': negative_log_likelihood(logits, labels),
        'ece': bins.error,
        'confidence': float(probabilities.max(1).mean()),
        'reliability': {name: x.tolist() for name, x in bins._asdict().items()},
        'confusion': confusion(logits.argmax(1), labels, len(model.classes)).tolist(),
    }
    if variants:
        rates = (wrong / len(labels)).reshape(-1, len(corruptions.SEVERITIES))
        said['corruptions'] = dict(zip(corruptions.CORRUPTIONS, rates.tolist()))
    return said
