"""A small network on some digits, as the tests of the analysis take it."""

import functools

import jax
import numpy as np
from helpers import Net, small_config

from sam_jax import data, replicas
from sam_jax.analysis import objective as objectives


@functools.cache
def digits():
    return data.load_dataset(small_config().data)


def layout(devices, backend='pmap'):
    return replicas.make_layout(64, 8, 1, devices=jax.devices()[:devices], backend=backend)[0]


def network(seed=0, **options):
    """Returns (model, variables): statistics and scales away from where they start."""
    model = Net(**options)
    rng = np.random.RandomState(seed)
    variables = model.init(jax.random.key(seed), np.zeros((1, 8, 8, 1), model.dtype))
    params = jax.tree.map(
        lambda x: x + 0.3 * rng.randn(*x.shape).astype(x.dtype), variables['params']
    )
    stats = jax.tree.map(
        lambda x: x + rng.rand(*x.shape).astype(x.dtype), variables.get('batch_stats', {})
    )
    dtype = jax.tree.leaves(params)[0].dtype
    return model, {'params': params, 'batch_stats': jax.tree.map(lambda x: x.astype(dtype), stats)}


def objective(
    examples=90, devices=1, batch_size=32, model_and_variables=None, backend='pmap', **options
):
    """Returns (Objective, params): 90 examples are no multiple of any batch."""
    model, variables = model_and_variables or network(dtype='float64')
    split = digits().train.subset(np.arange(examples))
    return objectives.create(
        model, variables, digits(), split, layout(devices, backend), batch_size, **options
    )


def examples(count=90):
    """Returns (normalised images, labels), made without the library."""
    train = digits().train
    images = train.images[train.index[:count]].astype(float) / 255
    return (images - np.array(digits().mean)) / np.array(digits().std), train.labels[:count]
