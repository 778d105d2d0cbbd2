r"""Runs a sweep: a folder, with the folder of a run for each of its settings.

    sam-jax-sweep --config=configs/digits.py --sweep=sam.rho=0,0.05,0.1 --seeds=5 \
        --workdir=runs/rho [--config.total_epochs=20] [--engine=local --parallel=2]

--sweep may be given several times, and every value of one meets every value of the others;
'sam.rho=0.1,0.2;optimizer.learning_rate=0.1,0.05' go together; ':model=wrn16_4,resnet20' is an
argument of the config. Without --sweep, the config's own `get_hyper(h)` decides, see
sam_jax/experiments/grid.py.

The same command goes on where a sweep was stopped: finished runs are skipped, broken ones resume.
Engines: `local` runs --parallel runs at once, each with a GPU, a share of one, or of the cores;
`slurm` submits them as a job array, requeued when preempted, and waits; `print` only prints the
commands. Ends with status 1 if a run failed, and names it.

With --search=halving most runs end early, and one setting is chosen by the validation split: see
sam_jax/experiments/halving.py. Where it was stopped, the same command goes on to the same choice.

--tracker and --hang_minutes are handed on to the runs.

Meanwhile WORKDIR/index.html, one file that loads itself anew, shows how far the runs are.
`tensorboard --logdir=WORKDIR` compares them in its HParams tab.
"""

import collections
import dataclasses
import shlex
import sys

from absl import flags
from ml_collections import config_flags

from sam_jax import settings
from sam_jax.cli import commands, watching
from sam_jax.errors import UserError
from sam_jax.experiments import engines, grid, halving

_CONFIG = commands.define_config('Config file of the runs.')
_SWEEP = flags.DEFINE_multi_string('sweep', [], 'KEY=VALUE,VALUE; several of them are multiplied.')
_SEEDS = flags.DEFINE_integer('seeds', 0, "Seeds 0, 1, ...: the config's argument `seed`.", 0)
_WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of the sweep.')
_ENGINE = flags.DEFINE_enum('engine', 'local', ['local', 'slurm', 'print'], 'What runs the runs.')
_PARALLEL = flags.DEFINE_integer(
    'parallel', 0, 'Runs at once; 0: local as many as GPUs, or one; Slurm as many as it lets.', 0
)
_RETRIES = flags.DEFINE_integer('retries', 1, 'How often a run that broke is started again.', 0)
_SEARCH = flags.DEFINE_enum(
    'search', 'grid', ['grid', 'halving'], 'All runs to their end, or most of them stopped early.'
)
_FACTOR = flags.DEFINE_integer('factor', 3, 'Halving: one setting in so many goes on.')
_SLURM = flags.DEFINE_multi_string(
    'slurm',
    [],
    "submitit's parameters, such as slurm_partition=gpu, gpus_per_node=1, "
    'timeout_min=600; several times.',
)


def _engine():
    if _ENGINE.value == 'local':
        return engines.Local(_PARALLEL.value, _RETRIES.value)
    parameters = {}
    for text in _SLURM.value:
        key, equals, value = text.partition('=')
        if not equals:
            raise UserError(f'--slurm is {text!r}; it must be of the form NAME=VALUE.')
        parameters[key] = int(value) if value.isdigit() else value
    return engines.Slurm(_WORKDIR.value, _PARALLEL.value, parameters)


def main() -> None:
    """Sweeps what the flags say."""
    if not _WORKDIR.value:
        raise UserError("--workdir is ''; it must name the folder of the sweep.")
    config_flag = config_flags.get_config_filename(flags.FLAGS['config'])
    hyper = [grid.parse(text) for text in _SWEEP.value]
    module, _ = settings.load(config_flag)
    if not hyper and hasattr(module, 'get_hyper'):
        hyper = [module.get_hyper(grid)]
    if _SEEDS.value:
        hyper.append(grid.sweep(':seed', range(_SEEDS.value)))
    if not hyper:
        raise UserError(
            f'Nothing is swept: give --sweep or --seeds, or define get_hyper(h) in {config_flag}.'
        )
    overrides = config_flags.get_override_values(flags.FLAGS['config'])
    watched = watching.handed_on()
    runs = [
        dataclasses.replace(run, flags=(*run.flags, *watched))
        for run in grid.make_runs(config_flag, grid.product(hyper), overrides, _WORKDIR.value)
    ]
    if _ENGINE.value == 'print' and _SEARCH.value == 'halving':
        raise UserError(
            '--engine is print, but what --search=halving runs next is known only when runs have '
            'ended; it must be local or slurm.'
        )
    if _ENGINE.value == 'print':
        for run in runs:
            print(shlex.join(engines.command(run)))
        return
    if _SEARCH.value == 'halving':
        _halve(runs)
        return
    _end(engines.execute(_engine(), runs))


def _halve(runs):
    engine = _engine()

    def execute(rung, behind):
        aside = [(run, engines.Status('stopped', why)) for run, why in behind]
        return engines.execute(engine, rung, aside)

    try:
        found = halving.search(runs, _FACTOR.value, execute)
    except halving.Interrupted as e:
        _end(e.statuses)
        return
    halving.save(_WORKDIR.value, found)
    print(halving.summary(found))


def _end(statuses):
    counts = collections.Counter(status.state for status in statuses.values())
    print(', '.join(f'{n} {state}' for state, n in counts.items()) + '.', file=sys.stderr)
    for name, status in statuses.items():
        if status.state == 'failed':
            print(f'failed: {name}: {status.line}', file=sys.stderr)
    if counts['stopped']:
        print('Stopped; the same command goes on from here.', file=sys.stderr)
    sys.exit(1 if counts['failed'] else commands.EXIT_PREEMPTED if counts['stopped'] else 0)


def run() -> None:
    """Console command `sam-jax-sweep`."""
    commands.run(main)


if __name__ == '__main__':
    run()
