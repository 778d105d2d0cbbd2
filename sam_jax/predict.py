"""A trained run's predictions for its training set, to train another run on.

    python -m sam_jax.predict --workdir=RUN --out=predictions.npz
    python -m sam_jax.main --config=... --config.data.labels_from=predictions.npz

This is the SAM paper's bootstrap (its section 3.3): a model is "first trained as usual and then
retrained from scratch on the labels predicted by the initially trained model".
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from sam_jax import commands, evaluate, replicas, train
from sam_jax import config as config_lib
from sam_jax.errors import UserError

_WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of a run, finished or not.')
_OUT = flags.DEFINE_string('out', '', 'File to write, .npz; default WORKDIR/predictions.npz.')
_DATA_DIR = flags.DEFINE_string('data_dir', '', "Where the datasets lie; default the run's own.")

_log = logging.getLogger(__name__)


def predictions(config: Any, workdir: str,
                devices: Sequence[replicas.Device] | None = None) -> dict[str, Any]:
    """Predicts the training set of a run with its newest checkpoint, without augmentation.

    Args:
      config: the run's config; where it keeps a moving average, that predicts.
      workdir: its folder.
      devices: default all devices.

    Returns:
      {'probabilities': float32 (N, classes) in the order of the training set, 'labels': those that
      the run was trained on, 'dataset', 'step', 'error_rate': against these labels}.

    Raises:
      UserError: no checkpoint, or the dataset is missing.
    """
    plan, state, step = train.restore(config, workdir, devices)
    variables = state.ema or {'params': state.params, 'batch_stats': state.batch_stats}
    dataset, layout = plan.dataset, plan.layout
    predict = evaluate.make_predict_step(plan.model, layout, dataset)
    arrays = layout.replicate(dataset.device_arrays(dataset.train))
    parts = []
    for feed in dataset.eval_feeds(dataset.train, config.eval.batch_size, layout):
        rows = jax.device_get(predict(
            variables['params'], variables['batch_stats'], arrays, layout.shard(feed)))
        # Of an image that is passed over nothing is known.
        rows = np.where(feed['mask'][..., None], rows, 1 / rows.shape[-1])
        parts.append([x.reshape(-1, *x.shape[2:]) for x in (rows, feed['label'])])
    # The places that fill up the last batch come last.
    probabilities, labels = (np.concatenate(x)[:len(dataset.train)] for x in zip(*parts))
    true = labels if labels.ndim == 1 else labels.argmax(-1)
    return {'probabilities': probabilities, 'labels': labels, 'dataset': dataset.name,
            'step': step, 'error_rate': float(np.mean(probabilities.argmax(-1) != true))}


def main() -> None:
    """Writes the file that the flags name."""
    if jax.process_count() > 1:
        raise UserError(f'There are {jax.process_count()} processes; predictions are made by one.')
    config = config_lib.of_run(_WORKDIR.value)
    if _DATA_DIR.value:
        config.data.dir = _DATA_DIR.value
    result = predictions(config, _WORKDIR.value)
    out = _OUT.value or os.path.join(_WORKDIR.value, 'predictions.npz')
    out = out if out.endswith('.npz') else out + '.npz'
    np.savez(out, **result)
    _log.info('%s: %d predictions of step %d for %s, %.2f %% of them other than the labels of the '
              'run.', out, len(result['labels']), result['step'], result['dataset'],
              100 * result['error_rate'])


def run() -> None:
    """Console command `sam-jax-predict`."""
    commands.run(main)


if __name__ == '__main__':
    run()
