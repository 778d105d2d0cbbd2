"""Several processes: starting them, agreeing between them."""

import faulthandler
import os
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam_jax.errors import UserError

# Seconds after which JAX ends the processes that wait for one that died, and says so.
_HEARTBEAT_TIMEOUT = 30

# Seconds for which the process that the others are connected to lives on when it has failed.
_LAST_WORDS = 2


def initialize(
    coordinator_address: str = '',
    num_processes: int = 0,
    process_id: int = -1,
    cluster: bool = False,
) -> None:
    """Connects this process to the others of the run; does nothing where it is alone.

    Under Slurm (`srun`) nothing need be given. On a TPU pod `cluster` lets JAX ask where the others
    are. Elsewhere every process gets the same coordinator address (host:port of process 0), the
    number of processes and its own number.

    Raises:
      UserError: some but not all of the three are given.
    """
    given = [bool(coordinator_address), num_processes > 0, process_id >= 0]
    if any(given) and not all(given):
        raise UserError(
            'A run of several processes needs --coordinator_address, --num_processes and '
            f'--process_id together; got {coordinator_address!r}, {num_processes}, {process_id}.'
        )
    if not (all(given) or cluster or _inside_cluster()):
        return
    # Collectives between CPU processes; other platforms bring their own and ignore it.
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    if all(given):
        # Not to be mixed with what a Slurm job around it says, one GPU a process for instance.
        options = dict(
            coordinator_address=coordinator_address,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method='deactivate',
        )
    else:
        options = {}
    jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT, **options)
    # If another process dies, JAX says so and aborts this one; where Python was tells nothing.
    faulthandler.disable()


def _inside_cluster():
    tpu_workers = os.environ.get('TPU_WORKER_HOSTNAMES', '').split(',')
    slurm_tasks = os.environ.get('SLURM_STEP_NUM_TASKS', '1')
    return len(tpu_workers) > 1 or int(slurm_tasks) > 1


def is_main() -> bool:
    """Whether this process writes files and talks."""
    return jax.process_index() == 0


def broadcast(value: float) -> float:
    """Returns process 0's `value` (a number) on every process; a collective."""
    if jax.process_count() == 1:
        return value
    return multihost_utils.broadcast_one_to_all(np.asarray(value)).item()


def abandon(status: int) -> None:
    """Ends a process of several at once with a status; does nothing where it is alone.

    Otherwise JAX would wait minutes for the others, which wait for this one. The others hear of it.
    """
    if jax.distributed.is_initialized():
        if jax.process_index() == 0:
            time.sleep(_LAST_WORDS)  # with it the others end, who may have the same to say
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
