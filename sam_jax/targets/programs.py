"""The train and eval step of a config, compiled for devices that are not there.

Nothing is allocated: all arguments are shapes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sam_jax import replicas, train_step
from sam_jax.experiment import Experiment
from sam_jax.train_state import HParams


class _SeenWhole(replicas.Layout):
    """A layout as if one process had all of its devices."""

    @functools.cached_property
    def local_positions(self) -> list[int]:
        return list(range(len(self.devices)))


def experiment_for(config: Any, devices: Sequence[replicas.Device]) -> Experiment:
    """Returns the experiment of a config on devices that can be compiled for and not used.

    Raises:
      UserError: as `Experiment.from_config`.
    """
    experiment = Experiment.of_any_size(config, devices)
    layout = experiment.layout
    whole = _SeenWhole(**{f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)})
    return dataclasses.replace(experiment, layout=whole)


def shapes(tree: Any) -> Any:
    """Returns the shapes and types of a tree's arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


def lower_train_step(experiment: Experiment) -> jax.stages.Lowered:
    """Returns the train step, lowered: its arguments are state, feed, arrays, HParams."""
    dataset, config = experiment.dataset, experiment.config
    state = jax.eval_shape(experiment.create_state)
    feed = shapes(dataset.train_feed(config.seed, 0, experiment.layout))
    if train_step.asks_for_previous(config):
        feed = train_step.paired(feed, None)
    arrays = shapes(dataset.device_arrays(dataset.train))
    hparams = shapes(HParams.from_config(config))
    return experiment.train_step.lower(state, feed, arrays, hparams)


def lower_eval_step(experiment: Experiment) -> jax.stages.Lowered:
    """Returns the evaluation step, lowered: params, statistics, arrays, feed."""
    dataset, split = experiment.dataset, experiment.dataset.evals['test']
    state = jax.eval_shape(experiment.create_state)
    feeds = dataset.eval_feeds(split, experiment.config.eval.batch_size, experiment.layout)
    return experiment.eval_step.lower(
        state.params, state.batch_stats, shapes(dataset.device_arrays(split)), shapes(next(feeds))
    )
