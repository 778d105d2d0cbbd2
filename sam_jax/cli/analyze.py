"""How flat a run's minimum is: its spectrum, its sharpness and its landscape, in pictures and JSON.

    sam-jax-analyze --workdir=RUN
    sam-jax-analyze --workdir=SGD_RUN --compare=SAM_RUN --what=spectrum --epoch=50

writes RUN/analysis/: report.md, analysis.json, spectrum.png, landscape.png, path.png and the
numbers behind them as .npz. A landscape that was interrupted goes on where it stopped.

    sam-jax-analyze --runs=SWEEP --what=spectrum,sharpness

does so for every finished run in a folder and below that has no such measurements yet; then
`sam-jax-report SWEEP` has their means. With --epoch=50 it writes to RUN/analysis/epoch=50/.
"""

import contextlib
import logging
import os

import jax
from absl import flags

from sam_jax.analysis import study
from sam_jax.cli import commands
from sam_jax.errors import UserError
from sam_jax.experiments import results
from sam_jax.progress import Bars

_DEFAULT = study.Settings()

_WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of a run, finished or not.')
_RUNS = flags.DEFINE_string('runs', '', 'Folder of many runs, each to be measured.')
_COMPARE = flags.DEFINE_string('compare', '', 'Folder of another run, to be drawn beside it.')
_OUT = flags.DEFINE_string('out', '', 'Folder for the results; default WORKDIR/analysis.')
_DATA_DIR = flags.DEFINE_string('data_dir', '', "Where the datasets lie; default the run's own.")
_SPLIT = flags.DEFINE_string(
    'split',
    study.SPLIT,
    "Split: 'train' with the labels trained on, or one that the run evaluates on, such as test.",
)
_EXAMPLES = flags.DEFINE_integer('examples', study.EXAMPLES, 'Examples of it; 0 for all.')
_EPOCH = flags.DEFINE_integer(
    'epoch',
    None,
    'After which epoch (checkpoint.keep_epochs keeps some); default the newest checkpoint.',
)
_BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 0, "Examples computed at once; 0 for the run's eval.batch_size."
)
_PENALTY = flags.DEFINE_bool('penalty', False, "Whether the run's L2 penalty is part of the loss.")
_WHAT = flags.DEFINE_list('what', list(_DEFAULT.what), f'What to measure: {", ".join(study.WHAT)}.')
_M = flags.DEFINE_list('m', [str(m) for m in _DEFAULT.m], 'Group sizes of m-sharpness.')
_DIRECTIONS = flags.DEFINE_enum(
    'directions', _DEFAULT.directions, ['random', 'eigenvectors'], 'Axes of the landscape.'
)
_NUMBERS = [
    flags.DEFINE_integer('steps', _DEFAULT.steps, 'Products of Lanczos, at most.'),
    flags.DEFINE_integer(
        'probes', _DEFAULT.probes, 'Starts of the density; the trace takes five times as many.'
    ),
    flags.DEFINE_float('rho', _DEFAULT.rho, 'Radius of the ball.'),
    flags.DEFINE_float(
        'adaptive_rho', _DEFAULT.adaptive_rho, "Radius of ASAM's ellipsoid, in its own units."
    ),
    flags.DEFINE_integer('points', _DEFAULT.points, 'Places along each axis of the landscape.'),
    flags.DEFINE_float(
        'extent', _DEFAULT.extent, 'How far it goes along each filter-normalised axis.'
    ),
    flags.DEFINE_integer('seed', _DEFAULT.seed, 'Of the examples, the probes and the directions.'),
]

_log = logging.getLogger(__name__)


def main() -> None:
    """Analyses the runs that the flags name."""
    if jax.process_count() > 1:
        raise UserError(f'There are {jax.process_count()} processes; a run is analysed by one.')
    if not all(m.isdigit() for m in _M.value):
        raise UserError(
            f'--m is {",".join(_M.value)!r}; it must be numbers of examples, such as 1,16,64.'
        )
    for flag in (_EXAMPLES, _BATCH_SIZE):
        if flag.value < 0:
            raise UserError(f'--{flag.name} is {flag.value}; it must be at least 0.')
    settings = study.Settings(
        tuple(_WHAT.value),
        m=tuple(map(int, _M.value)),
        directions=_DIRECTIONS.value,
        **{flag.name: flag.value for flag in _NUMBERS},
    )
    with contextlib.closing(Bars()) as bars:
        if _RUNS.value:
            _all_of(_RUNS.value, settings, bars)
            return
        out = _OUT.value or os.path.join(_WORKDIR.value, 'analysis')
        folders = [_WORKDIR.value] + ([_COMPARE.value] if _COMPARE.value else [])
        study.analyze([_open(folder, settings) for folder in folders], out, settings, bars)
    with open(os.path.join(out, 'report.md')) as file:
        _log.info('%s\n%s', out, file.read())


def _open(folder, settings):
    return study.open_run(
        folder,
        _SPLIT.value,
        _EXAMPLES.value,
        _PENALTY.value,
        settings.seed,
        _DATA_DIR.value,
        _EPOCH.value,
        _BATCH_SIZE.value,
    )


def _all_of(folder, settings, bars):
    for flag in (_WORKDIR, _COMPARE, _OUT):
        if flag.value:
            raise UserError(
                f'--{flag.name} is {flag.value!r} and --runs is {folder!r}; give one of them.'
            )
    finished = [record for record in results.find([folder]) if record.result]
    if not finished:
        raise UserError(f'--runs is {folder!r}; none of the runs in it is finished.')
    asked = _SPLIT.value, _EXAMPLES.value, _PENALTY.value
    for record in finished:
        # Each epoch in a folder of its own: they are drawn beside each other.
        parts = [] if _EPOCH.value is None else [f'epoch={_EPOCH.value}']
        out = os.path.join(record.workdir, 'analysis', *parts)
        if not study.is_done(out, settings, _step(record), *asked):
            study.analyze([_open(record.workdir, settings)], out, settings, bars)
            _log.info('%s is measured.', os.path.relpath(record.workdir))


def _step(record):
    """Returns the step of the checkpoint that is asked for."""
    if _EPOCH.value is None:
        return record.result['step']
    return round(_EPOCH.value / record.epochs_per_step)


def run() -> None:
    """Console command `sam-jax-analyze`."""
    commands.run(main)


if __name__ == '__main__':
    run()
