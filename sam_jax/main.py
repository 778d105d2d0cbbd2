"""Command line.

    sam-jax-train --config=digits --workdir=DIR [--config.sam.rho=0.1]

or, in a checkout, `python -m sam_jax.main` with the same.
"""

from absl import flags

from sam_jax import distributed, profiling, train
from sam_jax.cli import commands, watching

_CONFIG = commands.define_config(
    'A config by name, digits:noise=0.4, or a file with get_config(): my/config.py:noise=0.4.'
)
_WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of the run; give it again to resume.')
_COORDINATOR = flags.DEFINE_string(
    'coordinator_address', '', 'host:port of process 0; not needed on TPU pods and under Slurm.'
)
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'One of the processes of a TPU pod or of another cluster that JAX knows.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'Processes of the run.')
_PROCESS_ID = flags.DEFINE_integer('process_id', -1, 'Number of this process.')
_PROFILE = flags.DEFINE_string(
    'profile_steps', '', 'Steps to trace, such as 10:15; the trace is in WORKDIR/profile.'
)
_DEBUG_NANS = flags.DEFINE_bool(
    'debug_nans', False, 'Whether to look for the first layer that is not finite; slower.'
)
_UNTIL = flags.DEFINE_integer(
    'until_epoch', 0, 'Stop after this epoch, saved; without it the run goes on. 0: the end.', 0
)


def main() -> None:
    """Trains what the flags say."""
    distributed.initialize(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value
    )
    watch = train.Watch(
        watching.named_trackers(),
        profiling.Steps.parse(_PROFILE.value),
        _DEBUG_NANS.value,
        watching.HANG_MINUTES.value,
    )
    try:
        train.train_and_evaluate(
            _CONFIG.value, _WORKDIR.value, watch=watch, until_epoch=_UNTIL.value
        )
    except train.Preempted as e:
        commands.leave(str(e), commands.EXIT_PREEMPTED)


def run() -> None:
    """Console command `sam-jax-train`."""
    commands.run(main)


if __name__ == '__main__':
    run()
