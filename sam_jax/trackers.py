"""Where the metrics of a run go besides metrics.jsonl: TensorBoard, and services for experiments.

    sam-jax-train --config=digits --workdir=DIR --tracker=tensorboard,wandb

A tracker is opened with the folder of the run, and has three methods. Another one is a class here
and a row of TRACKERS. All but TensorBoard are optional and imported when they are asked for; where
they write is said by their own variables of the environment (WANDB_MODE, MLFLOW_TRACKING_URI, ...).
A run that is resumed goes on in the same run of theirs, which trackers.json remembers.
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from sam_jax import run_log
from sam_jax.errors import UserError, first_line

PROJECT = 'sam_jax'
FILE = 'trackers.json'

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a run tells as it goes on; its steps come in order, and after a restart once more."""

    def start(self, hparams: dict[str, int | float | str], images: dict[str, np.ndarray]) -> None:
        """Takes the settings, and images {name: (N, H, W, C) in [0, 1]}, of a run that begins."""
        ...

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Takes metrics."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


class Wandb:
    """Weights & Biases; the project is WANDB_PROJECT or sam_jax."""

    def __init__(self, workdir: str, name: str, identity: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get('WANDB_PROJECT', PROJECT),
            name=name,
            id=identity,
            dir=workdir,
            resume='allow',
            reinit='create_new',
            settings=wandb.Settings(console='off'),
        )

    def start(self, hparams: dict[str, int | float | str], images: dict[str, np.ndarray]) -> None:
        self._run.config.update(hparams, allow_val_change=True)
        pictures = {
            key: [self._wandb.Image((255 * x).astype(np.uint8).squeeze()) for x in batch]
            for key, batch in images.items()
        }
        self._run.log(pictures, step=0)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """MLflow; the experiment is MLFLOW_EXPERIMENT_NAME or sam_jax."""

    def __init__(self, workdir: str, name: str, identity: str) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow, self._client = mlflow, mlflow.MlflowClient()
        experiment = os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        where = found.experiment_id if found else self._client.create_experiment(experiment)
        # MLflow names its runs itself; ours is a tag of it.
        runs = self._client.search_runs([where], f"tags.sam_jax = '{identity}'")
        run = runs[0] if runs else self._client.create_run(where, run_name=name)
        self._id = run.info.run_id
        self._client.set_tag(self._id, PROJECT, identity)
        self._client.set_tag(self._id, 'workdir', workdir)
        self._client.update_run(self._id, status='RUNNING')

    def start(self, hparams: dict[str, int | float | str], images: dict[str, np.ndarray]) -> None:
        del images  # would need matplotlib or Pillow on its side
        params = [self._mlflow.entities.Param(key, str(x)) for key, x in hparams.items()]
        for i in range(0, len(params), 100):  # what it takes at once
            self._client.log_batch(self._id, params=params[i : i + 100])

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        now, metric = int(1000 * time.time()), self._mlflow.entities.Metric
        metrics = [metric(key, float(x), now, step) for key, x in scalars.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id, 'FINISHED')


class Trackio:
    """Trackio of Hugging Face; on this machine, unless TRACKIO_SPACE_ID names a space."""

    def __init__(self, workdir: str, name: str, identity: str) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        del workdir
        self._trackio = trackio
        self._name = f'{name}-{identity}'
        self._open({})

    def _open(self, hparams):
        self._run = self._trackio.init(
            project=PROJECT,
            name=self._name,
            space_id=os.environ.get('TRACKIO_SPACE_ID'),
            config=hparams,
            resume='allow',
            embed=False,
        )

    def start(self, hparams: dict[str, int | float | str], images: dict[str, np.ndarray]) -> None:
        del images
        self._run.finish()
        self._open(hparams)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[..., Tracker]] = {'wandb': Wandb, 'mlflow': Mlflow, 'trackio': Trackio}
NAMES = ('tensorboard', *TRACKERS)


class Guarded:
    """A tracker whose failures end itself, with one line in the log, and not the run."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker

    def start(self, hparams: dict[str, int | float | str], images: dict[str, np.ndarray]) -> None:
        self._call('start', hparams, images)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._call('scalars', step, scalars)

    def close(self) -> None:
        self._call('close')

    def _call(self, method, *arguments):
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as e:  # whatever a service or its network do
            _log.warning(
                '%s takes no more metrics (%s); the run goes on, metrics.jsonl has all of them.',
                self._name,
                first_line(e),
            )
            self._tracker = None


def check(names: Sequence[str]) -> None:
    """Raises UserError if one of the names is that of no tracker, or is there twice."""
    for name in names:
        if name not in NAMES:
            raise UserError(f'--tracker has {name!r}; it must be some of {", ".join(NAMES)}.')
    if len({*names}) < len(names):
        raise UserError(f'--tracker is {",".join(names)!r}; each may be named once.')


def create(names: Sequence[str], workdir: str, resumes: bool = False) -> list[Tracker]:
    """Opens the trackers of a run.

    Args:
      names: some of NAMES.
      workdir: folder of the run; the last part of its path is the run's name.
      resumes: whether the run goes on where it was stopped.

    Raises:
      UserError: no such tracker, its library is not installed, or it cannot be opened.
    """
    check(names)
    path = os.path.join(workdir, FILE)
    others = set(names) - {'tensorboard'}
    known = run_log.read_json(path) if resumes and others else None
    identity = (known or {}).get('id') or uuid.uuid4().hex[:12]
    found: list[Tracker] = []
    for name in names:
        if name == 'tensorboard':
            found.append(Guarded(name, run_log.TensorBoard(workdir)))
            continue
        run = os.path.basename(os.path.abspath(workdir))
        try:
            found.append(Guarded(name, TRACKERS[name](os.path.abspath(workdir), run, identity)))
        except ImportError as e:
            raise UserError(
                f'--tracker has {name!r}, which cannot be imported ({first_line(e)}); '
                f'`pip install {name}` installs it.'
            ) from e
        except Exception as e:  # a key that is missing, a server that is not there
            raise UserError(f'--tracker has {name!r}; it cannot be opened: {first_line(e)}.') from e
    if others:
        run_log.write_json(path, {'id': identity})
    return found
