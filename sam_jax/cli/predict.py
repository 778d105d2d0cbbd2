"""A trained run's predictions for its training set, to train another run on.

    sam-jax-predict --workdir=RUN --out=predictions.npz
    sam-jax-train --config=... --config.data.labels_from=predictions.npz

This is the SAM paper's bootstrap (its section 3.3): a model is "first trained as usual and then
retrained from scratch on the labels predicted by the initially trained model".
"""

import logging
import os
from typing import Any

import jax
import numpy as np
from absl import flags

from sam_jax import trained
from sam_jax.cli import commands
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment

_WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of a run, finished or not.')
_OUT = flags.DEFINE_string('out', '', 'File to write, .npz; default WORKDIR/predictions.npz.')
_DATA_DIR = flags.DEFINE_string('data_dir', '', "Where the datasets lie; default the run's own.")

_log = logging.getLogger(__name__)


def predictions(experiment: Experiment, workdir: str) -> dict[str, Any]:
    """Predicts the training set of a run with its newest checkpoint, without augmentation.

    Args:
      experiment: of the run; where it keeps a moving average, that predicts.
      workdir: its folder.

    Returns:
      {'probabilities': float32 (N, classes) in the order of the training set, 'labels': those that
      the run was trained on, 'dataset', 'step', 'error_rate': against these labels}.

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
        'step': model.step,
        'error_rate': float(np.mean(probabilities.argmax(-1) != true)),
    }


def main() -> None:
    """Writes the file that the flags name."""
    if jax.process_count() > 1:
        raise UserError(f'There are {jax.process_count()} processes; predictions are made by one.')
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
