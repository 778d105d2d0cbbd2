"""What the train step takes on devices that are here, beside what was estimated of it."""

import statistics
import time
from typing import Any

import jax
import numpy as np

from sam_jax import replicas, train_step
from sam_jax.experiment import Experiment
from sam_jax.train_state import HParams

ROUNDS, ROUND_SECONDS = 10, 0.3


def arguments(experiment: Experiment) -> tuple[Any, ...]:
    """Returns state, feed, arrays, HParams on the devices: random weights, images and labels."""
    dataset, config, layout = experiment.dataset, experiment.config, experiment.layout
    rng = np.random.default_rng(config.seed)
    feed = experiment.with_past(dataset.train_feed(config.seed, 0, layout), 0)
    feed = _random(rng, feed, dataset.num_classes)
    if train_step.asks_for_previous(config):
        feed = train_step.paired(feed, feed)
    return (
        layout.replicate(experiment.create_state()),
        layout.shard(feed),
        layout.replicate(_random(rng, dataset.device_arrays(dataset.train), dataset.num_classes)),
        layout.replicate(HParams.from_config(config)),
    )


def _random(rng, arrays, classes):
    """The same arrays, of pixels and labels with random content: of zeros a chip is faster."""

    def drawn(name, x):
        if name in ('images', 'pixels'):
            return rng.integers(0, 256, x.shape, np.uint8)
        if name != 'label':
            return x
        if np.issubdtype(x.dtype, np.integer):
            return rng.integers(0, classes, x.shape, x.dtype)
        return np.eye(classes, dtype=x.dtype)[rng.integers(0, classes, x.shape[:-1])]

    return {name: drawn(name, x) for name, x in arrays.items()}


def of_train_step(compiled: Any, experiment: Experiment) -> dict[str, float]:
    """Runs a compiled train step again and again, and returns what it took.

    {'measured_seconds': of a step, the median of ten rounds of at least 0.3 s; 'measured_spread':
    (longest - shortest round) / median; 'measured_memory': the most bytes that a device's
    allocator ever held in this process, 0 where it does not say}.

    Args:
      compiled: train step.
      experiment: that it is of.
    """
    state, *constants = arguments(experiment)

    def run(steps):
        nonlocal state
        then = time.perf_counter()
        for _ in range(steps):
            state, _ = compiled(state, *constants)
        jax.block_until_ready(state)
        return (time.perf_counter() - then) / steps

    run(3)
    steps = max(1, round(ROUND_SECONDS / run(3)))
    times = [run(steps) for _ in range(ROUNDS)]
    middle = statistics.median(times)
    return {
        'measured_seconds': middle,
        'measured_spread': (max(times) - min(times)) / middle,
        'measured_memory': replicas.peak_memory(experiment.layout.devices[0]),
    }
