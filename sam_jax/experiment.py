"""An experiment: all that a config says, checked and built, before or after it is trained.

A loop of one's own:

    experiment = Experiment.from_config(config)
    state = experiment.initial_state()
    step, constants = experiment.train_step, experiment.constants
    for feed in experiment.feeds():
        state, metrics = step(state, feed, *constants)
    print(experiment.evaluate(state))
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sam_jax import (
    data,
    evaluate,
    metrics,
    models,
    replicas,
    schedules,
    settings,
    train_state,
    train_step,
    trajectory,
)
from sam_jax.checkpoint import Checkpoints
from sam_jax.data.dataset import Dataset
from sam_jax.errors import UserError
from sam_jax.models import clip_files, pretrained
from sam_jax.models.layers import Network
from sam_jax.models.prompts import Prompts
from sam_jax.train_state import HParams, TrainState


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is known of a run before it starts.

    Attributes:
      config: its settings.
      layout: which device computes what.
      note: a line about the layout that its user should see, or ''.
      dataset: its data.
      model: its network.
    """

    config: Any
    layout: replicas.Layout
    note: str
    dataset: Dataset
    model: Network

    @classmethod
    def from_config(
        cls, config: Any, devices: Sequence[replicas.Device] | None = None, to_train: bool = True
    ) -> 'Experiment':
        """Checks a config and builds what it names.

        Args:
          config: ConfigDict with the keys of `settings.KEYS`.
          devices: default all devices.
          to_train: False where it is only evaluated, which any number of devices can.

        Raises:
          UserError: one sentence about the first thing wrong.
        """
        experiment = cls.of_any_size(config, devices, to_train)
        experiment.dataset.check_memory(
            [experiment.dataset.train, *experiment.evaluated.values()],
            *replicas.free_memory(experiment.layout.devices),
        )
        if to_train and experiment.host_memory:
            experiment.host_memory.check()
        return experiment

    @classmethod
    def of_any_size(
        cls,
        config: Any,
        devices: Sequence[replicas.Device] | None = None,
        to_train: bool = True,
        load: Callable[[Any], Dataset] = data.load_dataset,
    ) -> 'Experiment':
        """As `from_config`, but whether the devices can hold the data is not asked.

        `load` makes the dataset of `config.data`.
        """
        settings.check(config)
        layout, note = replicas.make_layout(
            config.batch_size,
            config.replica_batch_size,
            config.sam.replicas_per_group,
            config.replica_loop,
            devices,
            config.replica_backend,
            to_train,
        )
        if to_train:
            settings.check_with_layout(config, layout)
        dataset = load(config.data)
        settings.check_with_data(config, dataset)
        if to_train:
            settings.check_to_train(config, dataset)
        model = models.from_config(config.model, dataset.num_classes)
        if isinstance(model, Prompts):
            clip_files.require_names(dataset.classes)
        return cls(config, layout, note, dataset, model)

    @classmethod
    def of_run(
        cls, workdir: str, devices: Sequence[replicas.Device] | None = None, data_dir: str = ''
    ) -> 'Experiment':
        """Returns the experiment of a run that was trained, to evaluate it.

        Args:
          workdir: the run's folder.
          devices: default all devices.
          data_dir: where the datasets lie; '' for the run's own place.

        Raises:
          UserError: it is no folder of a run, or the dataset is missing.
        """
        config = settings.of_run(workdir)
        if data_dir:
            config.data.dir = data_dir
        return cls.from_config(config, devices, to_train=False)

    @property
    def steps_per_epoch(self) -> int:
        return self.dataset.num_train_examples // self.config.batch_size

    @property
    def total_steps(self) -> int:
        return self.config.total_epochs * self.steps_per_epoch

    @property
    def evaluated(self) -> dict[str, Any]:
        """{name: split} of the splits that the config wants evaluated."""
        return {
            name: split
            for name, split in self.dataset.evals.items()
            if self.config.eval.train_set or not name.startswith('train')
        }

    # Training.

    def create_state(self) -> TrainState:
        """Returns the TrainState before the first step, with random weights, where JAX puts it."""
        return train_state.create_train_state(
            self.config, self.model, self.dataset.image_shape, self.dataset.num_images
        )

    def initial_state(self) -> TrainState:
        """Returns the TrainState before the first step on the devices.

        Its weights are random, or those of `model.init_from`.
        """
        self._check_start()
        return self._begun(self.create_state())

    def _check_start(self):
        """Weights that are not there are said before anything is compiled."""
        if self.config.model.init_from and not isinstance(self.model, Prompts):
            pretrained.find(self.config.model.init_from)

    def _begun(self, state):
        """A state of random weights on the devices; with those of `model.init_from`, if set."""
        path = self.config.model.init_from
        if self.host_memory:
            self.host_memory.forget()
        if isinstance(self.model, Prompts):
            towers = self.frozen(self.dataset.train)['clip']
            params = clip_files.begun(self.model, path, towers, state.params)
            state = state.replace(params=params)
        elif path:
            variables = pretrained.load(
                path, self.model, {'params': state.params, 'batch_stats': state.batch_stats}
            )
            state = state.replace(ema=state.ema and jax.tree.map(np.copy, variables), **variables)
        return self.on_devices(state)

    def on_devices(self, state: TrainState) -> TrainState:
        """Returns a state with a copy on each device."""
        return self.layout.replicate(jax.device_get(state))

    @functools.cached_property
    def train_program(self) -> jax.stages.Wrapped:
        """The step as it is compiled."""
        return train_step.make_train_step(self.model, self.config, self.layout, self.dataset)

    @functools.cached_property
    def train_step(self) -> Any:
        """The step: (state, feed, *constants) -> (state, metrics); state is donated.

        It is `train_program`, and where there is a `host_memory`, that takes its part of it.
        """
        memory = self.host_memory
        if memory is None:
            return self.train_program

        def step(state, feed, *constants):
            state, metrics = self.train_program(state, feed, *constants)
            memory.keep(metrics.pop(train_step.KEPT))
            return state, metrics

        return step

    @functools.cached_property
    def host_memory(self) -> trajectory.HostMemory | None:
        """What SAF remembers of images that are streamed; None for other runs."""
        asked = train_state.create_method(self.config, 0.0).trajectory
        if not asked or not asked.epochs_ago or self.dataset.num_images:
            return None
        return trajectory.HostMemory(
            asked.epochs_ago,
            self.dataset.num_train_examples,
            self.dataset.num_classes,
            np.dtype('float64' if self.config.model.dtype == 'float64' else 'float32'),
        )

    def with_past(self, feed: dict[str, Any], step: int) -> dict[str, Any]:
        """Returns a feed of the host, and what `host_memory` knows of its images, if there is one.

        Args:
          feed: of the step.
          step: 0-based; those before it were made.
        """
        if self.host_memory is None:
            return feed
        past = self.host_memory.past(feed['index'], step // self.steps_per_epoch)
        return {**feed, 'past': past}

    def whole(self, state: TrainState) -> TrainState:
        """Returns a state with what lies on the host, as checkpoints hold it."""
        if self.host_memory is None:
            return state
        return state.replace(memory=self.host_memory.arrays())

    @functools.cached_property
    def constants(self) -> tuple[dict[str, jax.Array], HParams]:
        """What every step is given: the training set's arrays and the HParams, on the devices."""
        return self.arrays(self.dataset.train), self.layout.replicate(
            HParams.from_config(self.config)
        )

    def feeds(
        self, first_step: int = 0, waiting: Callable[[], Any] = contextlib.nullcontext
    ) -> Iterator[dict[str, Any]]:
        """Yields the feeds of the steps from a step to the last one, on the devices.

        For methods that ask for it the feed of the step before is with it; before the first step
        there is none, and it is its own.

        Args:
          first_step: 0-based.
          waiting: returns a context for the time in which nothing but input is waited for.
        """
        asks = train_step.asks_for_previous(self.config)
        begin = max(first_step - 1, 0) if asks else first_step
        feeds = self.dataset.train_feeds(self.config.seed, begin, self.total_steps, self.layout)
        previous = None
        for step in range(begin, self.total_steps):
            with waiting():
                feed = next(feeds)
            # The copy to the devices goes on while they still compute the steps before; what is
            # remembered waits for them.
            placed = self.layout.shard(feed)
            if self.host_memory:
                placed |= self.layout.shard({'past': self.with_past(feed, step)['past']})
            feed = placed
            if step >= first_step:
                yield train_step.paired(feed, previous) if asks else feed
            previous = feed

    def scheduled(self, step: int) -> tuple[float, float]:
        """Returns (learning rate, rho) at a step."""
        learning_rate, rho = schedules.of_run(
            self.config, HParams.from_config(self.config), step, self.steps_per_epoch
        )
        return float(learning_rate), float(rho)

    # Evaluation.

    @functools.cached_property
    def _placed(self):
        return {}

    @functools.cached_property
    def _frozen(self):
        return {}

    def frozen(self, split: Any) -> dict[str, Any]:
        """Returns the variables of the model that no step changes, on the host; {} for most.

        Of learned prompts these are CLIP and the names of the split's classes.
        """
        dataset, config = self.dataset, self.config
        new = split is dataset.evals.get('new')
        if new not in self._frozen:
            self._frozen[new] = clip_files.frozen(
                self.model,
                config.model.init_from,
                dataset.new_classes if new else dataset.classes,
                dataset.image_shape,
                config.seed,
                self._frozen.get(not new, {}).get('clip'),
            )
        return self._frozen[new]

    @functools.cached_property
    def frozen_checksum(self) -> str:
        """16 hexadecimal digits of what `frozen` holds for the training set; '' of nothing."""
        return clip_files.checksum(self.frozen(self.dataset.train))

    def host_arrays(self, split: Any) -> dict[str, Any]:
        """Returns what `arrays` does, on the host."""
        frozen = self.frozen(split)
        return {**self.dataset.device_arrays(split), **({'frozen': frozen} if frozen else {})}

    def arrays(self, split: Any) -> dict[str, Any]:
        """Returns a split's arrays on the devices, each once, however many splits share it.

        Under 'frozen' are the variables of the model that no step changes, if it has any.
        """
        return jax.tree.map(self._on_devices, self.host_arrays(split))

    def _on_devices(self, array):
        # Views of the same memory are the same images.
        key = array.ctypes.data, array.shape
        if key not in self._placed:
            self._placed[key] = self.layout.replicate(array)
        return self._placed[key]

    @functools.cached_property
    def eval_step(self) -> jax.stages.Wrapped:
        """The step of evaluations: (params, batch_stats, arrays, feed) -> sums."""
        return evaluate.make_eval_step(
            self.model, self.layout, self.dataset, self.config.eval.top5, self.config.loss
        )

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Returns {'test/error_rate': ..., 'test/ema_error_rate': ..., ...} of a state."""
        versions = {'': (state.params, state.batch_stats)}
        if state.ema is not None:
            versions['ema_'] = (state.ema['params'], state.ema['batch_stats'])
        results = {}
        for name, split in self.evaluated.items():
            prefix = name if name in ('test', 'validation', 'new') else f'{name}_set'
            for version, variables in versions.items():
                feeds = self.dataset.eval_feeds(split, self.config.eval.batch_size, self.layout)
                means = evaluate.evaluate(
                    self.eval_step, *variables, self.arrays(split), feeds, self.layout
                )
                results.update({f'{prefix}/{version}{k}': v for k, v in means.items()})
        for version in versions if 'new' in self.evaluated else ():
            errors = (results[f'{part}/{version}error_rate'] for part in ('test', 'new'))
            results[f'new/{version}harmonic_mean'] = metrics.harmonic_mean(*(1 - e for e in errors))
        return results

    @staticmethod
    def weights(state: TrainState) -> dict[str, Any]:
        """Returns {'params', 'batch_stats'} that a state is judged by: its EMA if it has one."""
        return state.ema or {'params': state.params, 'batch_stats': state.batch_stats}

    # Checkpoints.

    def checkpoints(self, workdir: str, read_only: bool = False) -> Checkpoints:
        """Opens the checkpoints of a run of this experiment."""
        return Checkpoints(
            os.path.join(os.path.abspath(workdir), 'checkpoints'),
            [epoch * self.steps_per_epoch for epoch in self.config.checkpoint.keep_epochs],
            read_only,
        )

    def restore_from(
        self, checkpoints: Checkpoints, epoch: int | None = None, to_train: bool = True
    ) -> tuple[TrainState, int, float]:
        """Returns (state on the devices, its step, wall time so far) of a checkpoint.

        Args:
          checkpoints: of `checkpoints`.
          epoch: after which epoch of the training; default the newest whole one, or the beginning
            where there is none.
          to_train: False where it is only evaluated, which may be on other data; the state then
            has no memory of the images.

        Raises:
          UserError: it is not there, or of other settings, or, to train, of other data.
        """
        # The settings are compared first: of another model they say more than shapes do.
        metas = (checkpoints.read_meta(step) for step in reversed(checkpoints.steps()))
        meta = next(filter(None, metas), None)
        if meta:
            settings.check_same_mathematics(self.config, meta['config'])
            if to_train:
                settings.check_same_data(self.dataset, meta.get('data', ''))
                settings.check_same_frozen(self.frozen_checksum, meta.get('frozen', ''))
        elif not checkpoints.steps():
            self._check_start()
        beginning = self.create_state()
        # What a method remembers of images is of no use to an evaluation, perhaps of others.
        target = self.whole(beginning) if to_train else beginning.replace(memory=None)
        of = target, () if to_train else ('memory.',)
        if epoch is None:
            found = checkpoints.restore_newest(*of)
        else:
            # The data here may be more or fewer than those that the run was trained on.
            steps = (meta or {}).get('steps_per_epoch', self.steps_per_epoch)
            found = checkpoints.restore(epoch * steps, *of)
        if not found:
            return self._begun(beginning), 0, 0.0
        step, state, meta = found
        if to_train and self.host_memory:
            self.host_memory.load(state.memory)
            state = state.replace(memory=None)
        return self.on_devices(state), step, meta['wall_time']

    def restore(self, workdir: str, epoch: int | None = None) -> tuple[TrainState, int]:
        """Opens a run without training it on, or changing anything of it.

        Args:
          workdir: the run's folder.
          epoch: after which epoch; default that of the newest checkpoint.

        Returns:
          (state, step): the TrainState of the checkpoint on the devices, and its number of steps.

        Raises:
          UserError: there is no such checkpoint, or it is of other settings.
        """
        none = UserError(
            f'workdir {workdir!r} holds no checkpoint; the run has to be trained first.'
        )
        if not os.path.isdir(os.path.join(workdir, 'checkpoints')):
            raise none
        with contextlib.closing(self.checkpoints(workdir, read_only=True)) as checkpoints:
            if not checkpoints.steps():
                raise none
            state, step, _ = self.restore_from(checkpoints, epoch, to_train=False)
        return state, step
