"""On a GPU or TPU: the same numbers as on CPU.

./scripts/test_accelerator.sh runs this where there is one, with the tests of other files that are
marked `accelerator`, which run on CPU, too.
"""

import itertools

import jax
import numpy as np
import pytest
from helpers import relative_distance, small_config

from sam_jax.experiment import Experiment
from sam_jax.sharpness import registry

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(jax.default_backend() == 'cpu', reason='there is no accelerator'),
]


def _trained(device, steps=3, **settings):
    config = small_config(
        replica_batch_size=16, total_epochs=20, model__dtype='float64', **settings
    )
    experiment = Experiment.from_config(config, [device])
    with jax.default_device(device):
        state, step = experiment.initial_state(), experiment.train_step
        for feed in itertools.islice(experiment.feeds(), steps):
            state, _ = step(state, feed, *experiment.constants)
    return jax.device_get({'params': state.params, 'batch_stats': state.batch_stats})


@pytest.mark.parametrize('method', registry.METHODS)
def test_three_steps_are_those_of_a_cpu(method, x64):
    """Four replicas, in float64: of both the same, but for rounding."""
    here, there = (
        _trained(device, sam__method=method) for device in (jax.devices()[0], jax.devices('cpu')[0])
    )
    assert relative_distance(here, there) < 1e-9


@pytest.mark.parametrize('augment', ['basic', 'autoaugment_cutout', 'randaugment'])
def test_augmented_images_are_those_of_a_cpu(augment):
    images = []
    for device in (jax.devices()[0], jax.devices('cpu')[0]):
        config = small_config(data__name='fake_cifar10', data__augment=augment)
        dataset = Experiment.from_config(config, [device]).dataset
        with jax.default_device(device):
            feed = {'index': np.arange(64), 'label': np.zeros(64, np.int32)}
            keys = jax.random.split(jax.random.key(3), 64)
            arrays = dataset.device_arrays(dataset.train)
            batch = jax.jit(dataset.train_batch)(arrays, feed, keys, jax.random.key(4))
            images.append(jax.device_get(batch['image']))
    np.testing.assert_allclose(*images, rtol=1e-6, atol=1e-6)
