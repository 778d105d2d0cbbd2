"""The train and eval step of a config, for devices that are not there.

Nothing is allocated: all arguments are shapes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sam_jax import replicas, train_step
from sam_jax.experiment import Experiment
from sam_jax.targets import absent, operations
from sam_jax.train_state import HParams


class _SeenWhole(replicas.Layout):
    """A layout as if one process had all of its devices."""

    @functools.cached_property
    def local_positions(self) -> list[int]:
        return list(range(len(self.devices)))


def experiment_for(config: Any, devices: Sequence[replicas.Device]) -> Experiment:
    """Returns the experiment of a config on devices that can be compiled for and not used.

    Its dataset is of the shapes of the config's, and need not be there either.

    Raises:
      UserError: as `Experiment.from_config`.
    """
    experiment = Experiment.of_any_size(config, devices, load=absent.load_dataset)
    layout = experiment.layout
    whole = _SeenWhole(**{f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)})
    return dataclasses.replace(experiment, layout=whole)


def shapes(tree: Any) -> Any:
    """Returns the shapes and types of a tree's arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


class Step(NamedTuple):
    """A compiled function's input.

    Attributes:
      lowered: what the compiler is given.
      flops: operations of one device, by `operations.flops`.
    """

    lowered: jax.stages.Lowered
    flops: float


def train_step_of(experiment: Experiment) -> Step:
    """Returns the train step; its arguments are state, feed, arrays, HParams."""
    dataset, config = experiment.dataset, experiment.config
    state = jax.eval_shape(experiment.create_state)
    feed = dataset.train_feed(config.seed, 0, experiment.layout)
    feed = shapes(experiment.with_past(feed, 0))
    if train_step.asks_for_previous(config):
        feed = train_step.paired(feed, None)
    arrays = shapes(experiment.host_arrays(dataset.train))
    hparams = shapes(HParams.from_config(config))
    return _step(experiment.train_program, state, feed, arrays, hparams)


def eval_step_of(experiment: Experiment) -> Step:
    """Returns the evaluation step; its arguments are params, statistics, arrays, feed."""
    dataset, split = experiment.dataset, experiment.dataset.evals['test']
    state = jax.eval_shape(experiment.create_state)
    feeds = dataset.eval_feeds(split, experiment.config.eval.batch_size, experiment.layout)
    return _step(
        experiment.eval_step,
        state.params,
        state.batch_stats,
        shapes(experiment.host_arrays(split)),
        shapes(next(feeds)),
    )


def _step(function: Any, *arguments: Any) -> Step:
    # JAX traces once for both.
    return Step(function.lower(*arguments), operations.flops(jax.make_jaxpr(function)(*arguments)))


STEPS: dict[str, Callable[[Experiment], Step]] = {'train': train_step_of, 'eval': eval_step_of}
