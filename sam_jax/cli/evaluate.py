"""How far trained networks are to be believed: calibration, errors by class, corrupted images.

    sam-jax-evaluate RUN
    sam-jax-evaluate SGD_RUN SAM_RUN --what=calibration,corruptions --out=FOLDER

A RUN is the folder of a run, or one that sam-jax-export has written; its dataset must be there. It
writes RUN/evaluation/, of several networks beside each other that of the first: report.md,
evaluation.json, reliability.png, and a confusion matrix of each network.
"""

import contextlib
import logging
import os

import jax
from absl import flags

from sam_jax import trained
from sam_jax.cli import commands
from sam_jax.errors import UserError
from sam_jax.progress import Bars
from sam_jax.trained import quality, quality_report

_WHAT = flags.DEFINE_list(
    'what', list(quality.WHAT[:1]), f'What to measure: {", ".join(quality.WHAT)}.'
)
_OUT = flags.DEFINE_string('out', '', 'Folder for the results; default RUN/evaluation.')
_SPLIT = flags.DEFINE_string('split', 'test', 'Split: one that the run evaluates on.')
_EXAMPLES = flags.DEFINE_integer('examples', 0, 'Examples of it, drawn by the seed; 0 for all.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the choice of examples, and of corruptions.')
_EPOCH = flags.DEFINE_integer('epoch', None, 'After which epoch; default the newest checkpoint.')
_EMA = flags.DEFINE_bool('ema', None, 'The moving average or not; default if the run keeps one.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 512, 'Images computed at once.')
_DATA_DIR = flags.DEFINE_string('data_dir', '', "Where the dataset lies; default the run's own.")

_log = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """Measures the networks that the arguments name."""
    if jax.process_count() > 1:
        raise UserError(f'There are {jax.process_count()} processes; it takes one.')
    if not arguments:
        raise UserError('Give one run or several: sam-jax-evaluate RUN.')
    for name in _WHAT.value:
        if name not in quality.WHAT:
            raise UserError(f'--what has {name!r}; it must be some of {", ".join(quality.WHAT)}.')
    for flag, least in ((_EXAMPLES, 0), (_BATCH_SIZE, 1), (_SEED, 0)):
        if flag.value < least:
            raise UserError(f'--{flag.name} is {flag.value}; it must be at least {least}.')
    folders = [os.path.expanduser(folder) for folder in arguments]
    out = os.path.expanduser(_OUT.value) or os.path.join(folders[0], 'evaluation')
    models = [
        trained.load(folder, _EPOCH.value, _EMA.value, data_dir=_DATA_DIR.value)
        for folder in folders
    ]
    for name, found in (
        ('dataset', {m.config.data.name for m in models}),
        ('classes', {', '.join(m.classes) for m in models}),
    ):
        if len(found) > 1:
            raise UserError(
                f'The {name} of the networks are {" and ".join(sorted(found))}; they must be the '
                'same to be compared.'
            )
    networks = []
    with contextlib.closing(Bars()) as bars:
        for folder, model in zip(folders, models):
            split = quality.open_split(
                model, _SPLIT.value, _EXAMPLES.value, _SEED.value, _DATA_DIR.value
            )
            name = os.path.basename(os.path.abspath(folder))
            found = quality.measure(
                model,
                split,
                _WHAT.value,
                _SEED.value,
                _BATCH_SIZE.value,
                lambda what, done, total, name=name: bars(f'{name}: {what}', done, total),
            )
            networks.append({'name': name, 'step': model.step, 'ema': model.ema, **found})
    said = {
        'dataset': models[0].config.data.name,
        'split': _SPLIT.value,
        'seed': _SEED.value,
        'what': list(_WHAT.value),
        'classes': list(models[0].classes),
        'networks': networks,
    }
    try:
        report = quality_report.write(said, out)
    except OSError as e:
        raise UserError(f'--out is {out!r}, where nothing can be written: {e.strerror}.') from e
    _log.info('%s\n%s', out, report)


def run() -> None:
    """Console command `sam-jax-evaluate`."""
    commands.run(main, positional=True)


if __name__ == '__main__':
    run()
