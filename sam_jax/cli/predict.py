"""A trained network's predictions: for image files, or for the training set of its run.

    sam-jax-predict --workdir=RUN --images=FOLDER --out=predictions.csv

writes a row for each image file in the folder and below: its class, and the probability of each
class. RUN is the folder of a run, or one that sam-jax-export has written. With --out=FILE.json the
same is JSON. PNG, JPEG, BMP, GIF and WebP files of any size are made to what the network takes.

    sam-jax-predict --workdir=RUN --out=predictions.npz
    sam-jax-train --config=... --config.data.labels_from=predictions.npz

writes the predictions for the training set of a run, to train another run on. This is the SAM
paper's bootstrap (its section 3.3): a model is "first trained as usual and then retrained from
scratch on the labels predicted by the initially trained model".
"""

import logging
import os
from typing import Any

import jax
import numpy as np
from absl import flags

from sam_jax import trained
from sam_jax.cli import commands
from sam_jax.data import image_files
from sam_jax.errors import UserError, first_line
from sam_jax.experiment import Experiment
from sam_jax.trained import of_files

_WORKDIR = flags.DEFINE_string(
    'workdir', '', 'Folder of a run, finished or not; for --images also one of published weights.'
)
_IMAGES = flags.DEFINE_string(
    'images', '', 'Folder of image files, with those in folders below; or one such file.'
)
_OUT = flags.DEFINE_string(
    'out',
    '',
    'File to write: .csv or .json for --images, default predictions.csv here; else .npz, default '
    'WORKDIR/predictions.npz.',
)
_DATA_DIR = flags.DEFINE_string('data_dir', '', "Where the datasets lie; default the run's own.")

_log = logging.getLogger(__name__)


def predictions(experiment: Experiment, workdir: str) -> dict[str, Any]:
    """Predicts the training set of a run with its newest checkpoint, without augmentation.

    Args:
      experiment: of the run; where it keeps a moving average, that predicts.
      workdir: its folder.

    Returns:
      {'probabilities': float32 (N, classes) in the order of the training set, 'labels': those that
      the run was trained on, 'dataset', 'examples': the checksum of the training set, by which
      another run knows it, 'step', 'error_rate': against these labels}.

    Raises:
      UserError: there is no checkpoint.
    """
    model = trained.of_experiment(experiment, workdir)
    dataset, batch_size = experiment.dataset, experiment.config.eval.batch_size
    arrays, parts = dataset.device_arrays(dataset.train), []
    for feed in dataset.eval_feeds(dataset.train, batch_size, experiment.layout):
        mask, labels = (x.reshape(-1, *x.shape[2:]) for x in (feed['mask'], feed['label']))
        rows = model.predict(dataset.pixels(arrays, feed), batch_size)
        # Of an image that is passed over nothing is known: all classes alike.
        parts.append((np.where(mask[:, None], rows, 1 / rows.shape[1]), labels))
    # The places that fill up the last batch come last.
    probabilities, labels = (np.concatenate(x)[: len(dataset.train)] for x in zip(*parts))
    true = labels if labels.ndim == 1 else labels.argmax(-1)
    return {
        'probabilities': probabilities,
        'labels': labels,
        'dataset': dataset.name,
        'examples': dataset.train.checksum,
        'step': model.step,
        'error_rate': float(np.mean(probabilities.argmax(-1) != true)),
    }


def of_images(workdir: str, images: str, out: str, data_dir: str = '') -> None:
    """Writes the predictions of a trained network for image files.

    Args:
      workdir: folder that `trained.load` reads.
      images: folder of image files, or one.
      out: file to write, .csv or .json; names in it are relative to the folder.
      data_dir: where the dataset of a run lies; '' for the run's own place.

    Raises:
      UserError: a flag is wrong, no file is an image, or some are not: the others are written.
    """
    if not out.endswith(of_files.FORMATS):
        raise UserError(f'--out is {out!r}; with --images it must end in .csv or .json.')
    paths = image_files.find(images)
    model = trained.load(workdir, data_dir=data_dir)
    folder = os.path.dirname(images) if os.path.isfile(images) else images
    rows = (
        (os.path.relpath(path, folder or '.'), row)
        for path, row in of_files.predictions(model, paths)
    )
    try:
        count, broken = of_files.write(out, model.classes, rows)
    except OSError as e:
        raise UserError(f'--out is {out!r}; it cannot be written: {e.strerror}.') from e
    if not count:
        name, reason = next(iter(broken.items()))
        raise UserError(
            f'None of the {len(paths)} files in {images!r} can be decoded; the first is {name} '
            f'({reason}).'
        )
    _log.info('%s: predictions for %d images, %d classes.', out, count, len(model.classes))
    if broken:
        raise UserError(
            f'{len(broken)} of {len(paths)} files cannot be decoded and have no row in {out}: '
            f'{_listed(broken)}.'
        )


def _listed(broken, most=10):
    """The first of the files that cannot be decoded, in a sentence."""
    named = [f'{name} ({first_line(reason)})' for name, reason in broken.items()]
    more = [f'{len(named) - most} more'] if len(named) > most else []
    return ', '.join(named[:most] + more)


def main() -> None:
    """Writes the file that the flags name."""
    if jax.process_count() > 1:
        raise UserError(f'There are {jax.process_count()} processes; predictions are made by one.')
    if _IMAGES.value:
        images = os.path.expanduser(_IMAGES.value)
        of_images(_WORKDIR.value, images, _OUT.value or 'predictions.csv', _DATA_DIR.value)
        return
    experiment = Experiment.of_run(_WORKDIR.value, data_dir=_DATA_DIR.value)
    result = predictions(experiment, _WORKDIR.value)
    out = _OUT.value or os.path.join(_WORKDIR.value, 'predictions.npz')
    out = out if out.endswith('.npz') else out + '.npz'
    np.savez(out, **result)
    _log.info(
        '%s: %d predictions of step %d for %s, %.2f %% of them other than the labels of the run.',
        out,
        len(result['labels']),
        result['step'],
        result['dataset'],
        100 * result['error_rate'],
    )


def run() -> None:
    """Console command `sam-jax-predict`."""
    commands.run(main)


if __name__ == '__main__':
    run()
