"""The runs of a fault campaign: small ones, of several methods and sizes, and what they end in."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from faults.process import Hooks, Process, training
from sam_jax import run_log
from sam_jax.checkpoint import Checkpoints
from sam_jax.settings import shipped

EPOCHS, STEPS_PER_EPOCH, BATCH = 4, 6, 16
HANG_SECONDS = 75  # less than a campaign takes for a hang
STEPS = EPOCHS * STEPS_PER_EPOCH


class Setup(NamedTuple):
    """One kind of run.

    Attributes:
      name: its own.
      method: of `sharpness.METHODS`.
      flags: settings besides.
      processes: how many it has.
      devices: of each process.
      streams: whether it reads image files and not an array.
      weight: how often it is drawn, against others.
    """

    name: str
    method: str
    flags: tuple[str, ...] = ()
    processes: int = 1
    devices: int = 1
    streams: bool = False
    weight: float = 1.0


_M_SHARPNESS = ('--config.sam.replicas_per_group=2', '--config.ema.decay=0.9')

SETUPS = (
    Setup('sam', 'sam', weight=3),
    Setup('sgd', 'sgd', ('--config.log_every_steps=4',)),
    Setup('looksam', 'looksam'),
    Setup('gsam on 2 devices', 'gsam', _M_SHARPNESS, devices=2),
    Setup('saf', 'saf', ('--config.sam.start_epoch=1', '--config.sam.epochs_ago=1')),
    Setup('asam, streaming', 'asam', ('--config.log_every_steps=4',), streams=True, weight=2),
    Setup(
        'saf, streaming',
        'saf',
        ('--config.sam.start_epoch=1', '--config.sam.epochs_ago=1'),
        streams=True,
    ),
    Setup('sam, 2 processes', 'sam', processes=2, weight=0.7),
    Setup('vasso, 2 processes, streaming', 'vasso', processes=2, streams=True, weight=0.4),
    Setup('sam, 4 processes', 'sam', _M_SHARPNESS, processes=4, weight=0.25),
    Setup('asam, 4 processes, streaming', 'asam', processes=4, streams=True, weight=0.15),
)


def write_data(folder: str) -> None:
    """Writes random images, as an array and as files of images, unless they are there."""
    from PIL import Image

    if os.path.exists(os.path.join(folder, 'data.npz')):
        return
    rng = np.random.RandomState(0)
    arrays = {}
    for part, prefix, n in (('train', '', STEPS_PER_EPOCH * BATCH), ('test', 'test_', 16)):
        arrays[f'{prefix}images'] = rng.randint(0, 256, (n, 12, 12, 3)).astype(np.uint8)
        arrays[f'{prefix}labels'] = np.arange(n) % 4
        for i, image in enumerate(arrays[f'{prefix}images']):
            place = os.path.join(folder, 'images', part, f'class{i % 4}')
            os.makedirs(place, exist_ok=True)
            Image.fromarray(image).save(os.path.join(place, f'{i}.png'))
    np.savez(os.path.join(folder, 'data.npz'), **arrays)


def arguments(setup: Setup, workdir: str, data: str) -> list[str]:
    """Returns the arguments of sam-jax-train for a run.

    Args:
      setup: Setup.
      workdir: its folder.
      data: the folder of `write_data`.
    """
    of_data = (
        ('folder', os.path.join(data, 'images'), 'imagenet', 16)
        if setup.streams
        else ('npz', os.path.join(data, 'data.npz'), 'none', 0)
    )
    names = ('name', 'dir', 'augment', 'image_size')
    config = os.path.join(shipped.folder(), 'cifar.py')
    return [
        f'--config={config}:model=lenet5,method={setup.method}',
        f'--workdir={workdir}',
        '--tracker=',
        f'--hang_minutes={HANG_SECONDS / 60}',
        f'--config.total_epochs={EPOCHS}',
        f'--config.batch_size={BATCH}',
        f'--config.replica_batch_size={BATCH // (setup.processes * setup.devices)}',
        '--config.eval.batch_size=16',
        '--config.log_every_steps=2',
        '--config.checkpoint.every_epochs=1',
        '--config.data.threads=2',
        *(f'--config.data.{name}={value}' for name, value in zip(names, of_data)),
        *setup.flags,
    ]


def start(
    setup: Setup, workdir: str, data: str, cache: str, hooks: Hooks, more: tuple[str, ...] = ()
) -> list[Process]:
    """Starts the processes of a run.

    Args:
      setup, workdir, data: as of `arguments`.
      cache: folder of the compiled programs.
      hooks: of all processes.
      more: further arguments.
    """
    given = [*arguments(setup, workdir, data), *more]
    environment = {
        'XDG_CACHE_HOME': cache,
        'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} '
        f'--xla_force_host_platform_device_count={setup.devices}',
    }
    if setup.processes == 1:
        return [Process(training(given, environment, hooks))]
    with socket.socket() as s:
        s.bind(('localhost', 0))
        address = f'localhost:{s.getsockname()[1]}'
    return [
        Process(
            training(
                [
                    *given,
                    f'--coordinator_address={address}',
                    f'--num_processes={setup.processes}',
                    f'--process_id={i}',
                ],
                environment,
                hooks,
            )
        )
        for i in range(setup.processes)
    ]


class End(NamedTuple):
    """What a run has ended in.

    Attributes:
      arrays: a digest of all that its last checkpoint holds.
      lines: of metrics.jsonl, without what is of time.
      result: of result.json, without what is of time.
    """

    arrays: str
    lines: list[dict[str, Any]]
    result: dict[str, Any]

    def differs(self, other: 'End') -> str:
        """Says in what it is not the same as the other one; '' for nothing."""
        if self.arrays != other.arrays:
            return 'the last checkpoint is another'
        if self.result != other.result:
            return 'result.json is another'
        return '' if self.lines == other.lines else 'metrics.jsonl is another'


def write_digest(workdir: str, path: str) -> Callable[[], None]:
    """Returns what a process does that writes the digest of a run's last checkpoint to a file."""

    def digest():
        checkpoints = Checkpoints(os.path.join(workdir, 'checkpoints'), read_only=True)
        arrays, _ = checkpoints.read(STEPS)
        found = hashlib.sha256()
        for name, x in sorted(arrays.items()):
            found.update(f'{name} {x.dtype} {x.shape} '.encode())
            found.update(np.ascontiguousarray(x).tobytes())
        with open(path, 'w') as file:
            file.write(found.hexdigest())
        checkpoints.close()

    return digest


def end(workdir: str) -> Iterator[None]:
    """Finds the End of a run; yields while it waits, and returns it.

    Raises:
      ValueError: its last checkpoint, or a file, cannot be read.
    """
    path = os.path.join(os.path.dirname(workdir), 'digest')
    process = Process(write_digest(workdir, path))
    while process.poll():
        yield
    process.close()
    if process.status:
        raise ValueError(f'the last checkpoint cannot be read: {process.text[-500:]}')
    with open(path) as file:
        digest = file.read()
    result = run_log.read_json(os.path.join(workdir, 'result.json'))
    lines = run_log.read_lines(os.path.join(workdir, 'metrics.jsonl'))
    if not 0 <= result['wall_time'] < 3600:
        raise ValueError(f'the wall time is {result["wall_time"]}')
    return End(digest, [timeless(line) for line in lines], timeless(result))


def timeless(values: dict[str, Any]) -> dict[str, Any]:
    """Returns metrics without those that are of time."""
    return {
        name: value
        for name, value in values.items()
        if name not in ('time', 'wall_time') and not name.startswith('perf/')
    }


def read_end(path: str) -> End:
    """Reads an End from a JSON file."""
    with open(path) as file:
        return End(**json.load(file))


def copy(source: str, place: str) -> None:
    """Makes a folder the copy of another."""
    shutil.rmtree(place, ignore_errors=True)
    if os.path.isdir(source):
        shutil.copytree(source, place)
