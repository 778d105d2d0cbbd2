"""What a training step needs of a device's memory, estimated before it is compiled.

State and data are known. What a gradient keeps of its forward pass for its backward pass is counted
as JAX writes it down, and compilers differ in what they make of it: they may need less, since they
fuse, or more, where they fill arrays up to their tiles (docs/targets.md has both). So only what is
known refuses a run; the rest warns.
"""

import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sam_jax import replicas
from sam_jax.errors import UserError
from sam_jax.models.layers import Network

_log = logging.getLogger(__name__)


class Needs(NamedTuple):
    """Bytes of one device.

    Attributes:
      state: what is trained: params, statistics, optimizer, moving average, the method's memory.
      gradients: gradients, and the params where the second one is taken.
      data: the images that lie on the device, and the uint8 images of a step that do not.
      activations: the augmented images of a step, and what the gradient of one replica keeps
        between its passes.
      known: what no compiler can do without: state, one gradient, data.
    """

    state: float
    gradients: float
    data: float
    activations: float
    known: float

    @property
    def all(self) -> float:
        """The estimate."""
        return self.state + self.gradients + self.data + self.activations


def needs(experiment: Any) -> Needs:
    """Returns what a training step of an Experiment needs; its model is traced for it."""
    config, dataset, layout = experiment.config, experiment.dataset, experiment.layout
    state = jax.eval_shape(experiment.create_state)
    params = _size(state.params)
    copies = (config.sam.method != 'sgd') + 1 + (layout.replicas_per_device > 1)
    # Each set of images lies on the device once, see `Experiment.arrays`.
    arrays = {
        (x.ctypes.data, x.shape): x
        for split in (dataset.train, *experiment.evaluated.values())
        for x in dataset.device_arrays(split).values()
    }
    images = layout.replicas_per_device * layout.replica_batch_size
    streamed = 0 if dataset.num_images else images * math.prod(dataset.pixel_shape)
    data = _size(list(arrays.values())) + streamed
    replica = (layout.replica_batch_size, *dataset.image_shape)
    return Needs(
        _size(state),
        copies * params,
        data,
        4 * images * math.prod(dataset.image_shape) + kept(experiment.model, replica),
        _size(state) + params + data,
    )


def kept(model: Network, shape: tuple[int, ...]) -> float:
    """Returns the bytes that a gradient keeps between its passes, besides the params.

    Args:
      model: flax module of `models.create_model`.
      shape: of a replica's images, (N, H, W, C).
    """
    model = model.clone(batch_norm_axis=None)  # no devices are asked
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)

    def backward(variables, x):
        rngs = {name: jax.random.key(0) for name in ('dropout', 'shake')}

        def loss(params):
            return model.apply(
                {**variables, 'params': params}, x, train=True, mutable=['batch_stats'], rngs=rngs
            )[0].sum()

        return jax.vjp(loss, variables['params'])[1]

    residuals = jax.eval_shape(backward, variables, images)
    return max(_size(residuals) - _size(variables['params']), 0)


def _size(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def summary(needed: Needs, memory: float) -> str:
    """Returns the estimate in a sentence, with what a device has."""
    gib = 2**30
    return (
        f'Before compilation a train step is ESTIMATED at {needed.all / gib:.3g} of '
        f'{memory / gib:.3g} GiB of a device: {_figures(needed)}.'
    )


def _figures(needed):
    names = ('state', 'gradients', 'data', 'activations')
    return ', '.join(f'{name} {getattr(needed, name) / 2**30:.3g}' for name in names)


def advice(needed: Needs, experiment: Any, memory: float, compiled: float = 0) -> str:
    """Returns the sentence about a step that a device cannot hold, or ''.

    Args:
      needed: of `needs`.
      experiment: Experiment.
      memory: bytes of a device.
      compiled: what the compiled program needs, where that is known already.
    """
    if (compiled or needed.all) <= memory:
        return ''
    config = experiment.config
    gib = 2**30
    says = (
        f'The compiled step needs {compiled / gib:.3g} GiB of a device'
        if compiled
        else f'A step needs about {needed.all / gib:.3g} GiB of a device ({_figures(needed)})'
    )
    ways = [
        *([] if config.model.remat else ['--config.model.remat=True']),
        *(
            [f'a replica_batch_size below {config.replica_batch_size}']
            if config.replica_batch_size > 1
            else []
        ),
    ]
    more = 'devices with more memory'
    if experiment.layout.replicas_per_device > 1:
        more = 'more devices, or ' + more
    return f'{says}, which has {memory / gib:.3g}; use {", ".join([*ways, more])}.'


def check(experiment: Any) -> None:
    """Looks, before a run is compiled, whether its step fits; on CPU nothing is asked.

    Raises:
      UserError: what is known alone is too much. Of an estimate that is too large the log warns.
    """
    if experiment.layout.devices[0].platform == 'cpu':
        return
    free, _ = replicas.free_memory(experiment.layout.devices)
    needed = needs(experiment)
    sentence = advice(needed, experiment, free)
    if needed.known > free:
        raise UserError(sentence)
    if sentence:
        _log.warning('%s This is an estimate.', sentence)
