"""What a training step needs of a device's memory, estimated before it is compiled.

State and data are known. What a gradient keeps of its forward pass for its backward pass is known
but for what a compiler makes of it: docs/targets.md compares. So only what is known refuses a run;
the rest warns.
"""

import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from sam_jax import replicas, train_state
from sam_jax.errors import UserError
from sam_jax.models.layers import Network

_log = logging.getLogger(__name__)

REMAT = ('remat2', 'checkpoint')  # as versions of JAX have it
PRODUCTS = ('conv_general_dilated', 'dot_general')
ELEMENTWISE = frozenset(
    'abs add add_any and broadcast_in_dim convert_element_type copy div eq exp expand_dims ge gt '
    'integer_pow iota le log logistic lt max min mul ne neg not or pow reshape rsqrt select_n sign '
    'sqrt square squeeze stop_gradient sub tanh erf'.split()
)

TOO_HIGH = 1.7  # an estimate was 1.63 times what a compiled step needs, and less, docs/targets.md


class Needs(NamedTuple):
    """Bytes of one device.

    Attributes:
      state: what is trained: params, statistics, optimizer, moving average, the method's memory.
      gradients: gradients, and the params where the second one is taken.
      data: the images that lie on the device, and the uint8 images of a step that do not;
        variables that no step changes.
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

    def as_json(self) -> dict[str, float]:
        """Returns all of them by their names."""
        return {**self._asdict(), 'all': self.all}


def needs(experiment: Any) -> Needs:
    """Returns what a training step of an Experiment needs; its model is traced for it."""
    config, dataset, layout = experiment.config, experiment.dataset, experiment.layout
    state = jax.eval_shape(experiment.create_state)
    params = _size(state.params)
    copies = (config.sam.method != 'sgd') + 1 + (layout.replicas_per_device > 1)
    if train_state.create_method(config, 0.0).gate_norm:
        copies += layout.groups_per_device - 1  # all groups' gradients are there before an ascent
    # Each set of images lies on the device once, see `Experiment.arrays`.
    arrays = {
        (x.ctypes.data, x.shape): x
        for split in (dataset.train, *experiment.evaluated.values())
        for x in dataset.device_arrays(split).values()
    }
    images = layout.replicas_per_device * layout.replica_batch_size
    streamed = 0 if dataset.num_images else images * math.prod(dataset.pixel_shape)
    frozen = experiment.frozen(dataset.train)
    data = _size(list(arrays.values())) + streamed + _size(frozen)
    replica = (layout.replica_batch_size, *dataset.image_shape)
    variables = {'params': state.params, 'batch_stats': state.batch_stats, 'frozen': frozen}
    activations = kept(experiment.model, variables, replica)
    return Needs(
        _size(state),
        copies * params,
        data,
        4 * images * math.prod(dataset.image_shape) + activations,
        _size(state) + params + data,
    )


def kept(model: Network, variables: dict[str, Any], shape: tuple[int, ...]) -> float:
    """Returns the bytes that a gradient keeps between its passes, besides params and images.

    They are what the backward pass reads, written back to what it is made of: an elementwise
    operation is computed anew, as all compilers do that fuse it with its users. So left are results
    of convolutions, products, reductions and calls, and operands of convolutions and products.

    Args:
      model: flax module of `models.create_model`.
      variables: shapes of its params, batch_stats, frozen.
      shape: of a replica's images, (N, H, W, C).
    """
    model = model.clone(batch_norm_axis=None)  # no devices are asked
    images = jax.ShapeDtypeStruct(shape, jnp.float32)

    def loss(variables, x):
        rngs = {name: jax.random.key(0) for name in ('dropout', 'shake')}
        return model.apply(variables, x, train=True, mutable=['batch_stats'], rngs=rngs)[0].sum()

    def backward(variables, x):
        rest = {name: tree for name, tree in variables.items() if name != 'params'}
        return jax.vjp(lambda p: loss({**rest, 'params': p}, x), variables['params'])[1]

    jaxpr = jax.make_jaxpr(backward)(variables, images).jaxpr
    # With `model.remat` these are the inputs of the blocks. Of each block the rest is made anew.
    forward = jax.make_jaxpr(loss)(variables, images).jaxpr if model.remat else jaxpr
    blocks = [e.params['jaxpr'] for e in forward.eqns if e.primitive.name in REMAT]
    largest = max((_stored(b, [x for e in b.eqns for x in e.outvars]) for b in blocks), default=0)
    return _stored(jaxpr, jaxpr.outvars) + largest


def _stored(jaxpr, read):
    """Bytes of what must be stored so that these variables of a program can be read."""
    makers = {x: equation for equation in jaxpr.eqns for x in equation.outvars}
    operands = {x for e in jaxpr.eqns if e.primitive.name in PRODUCTS for x in _variables(e.invars)}
    found, left = {}, _variables(read)
    while left:
        x = left.pop()
        if x in found or x not in makers:
            continue
        found[x] = x in operands or not _elementwise(makers[x])
        if not found[x]:
            left += _variables(makers[x].invars)
    return _size([x.aval for x, stays in found.items() if stays])


def _elementwise(equation):
    inner = [
        x
        for x in map(lambda x: getattr(x, 'jaxpr', x), equation.params.values())
        if hasattr(x, 'eqns')
    ]
    if inner:  # a function of its own, such as relu
        return all(_elementwise(e) for jaxpr in inner for e in jaxpr.eqns)
    return equation.primitive.name in ELEMENTWISE


def _variables(atoms):
    return [x for x in atoms if not isinstance(x, Literal)]


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


def advice(needed: Needs, experiment: Any, memory: float) -> str:
    """Returns the sentence about a step whose estimate is more than a device has, or ''.

    Args:
      needed: of `needs`.
      experiment: Experiment.
      memory: bytes of a device.
    """
    if needed.all <= memory:
        return ''
    gib = 2**30
    return (
        f'A step needs about {needed.all / gib:.3g} GiB of a device ({_figures(needed)}), which '
        f'has {memory / gib:.3g}; use {ways(experiment)}.'
    )


def ways(experiment: Any) -> str:
    """Returns what helps where a step is too large."""
    config = experiment.config
    found = [] if config.model.remat else ['--config.model.remat=True']
    if config.replica_batch_size > 1:
        found.append(f'a replica_batch_size below {config.replica_batch_size}')
    on_cpu = experiment.layout.devices[0].platform == 'cpu'
    if experiment.layout.replicas_per_device > 1 and not on_cpu:
        found.append('more devices')
    return ', or '.join(filter(None, [', '.join(found), 'devices with more memory']))


def check(experiment: Any) -> None:
    """Looks, before a run is compiled, whether its step fits what its devices tell of their memory.

    On CPU all devices share that of the machine. There the estimate refuses, too, where it is too
    large by more than an estimate may err: no compiler would, and the system ends what takes more
    memory than there is without a word.

    Raises:
      UserError: what is known alone is too much, or on CPU so much of the estimate. Of another
        estimate that is too large the log warns.
    """
    devices = experiment.layout.devices
    local = [d for d in devices if d.process_index == jax.process_index()]
    on_cpu = local[0].platform == 'cpu'
    if not on_cpu and not all(d.memory_stats() for d in local):
        return
    free, sharing = replicas.free_memory(devices)
    needed = needs(experiment)
    sentence = advice(needed, experiment, free / sharing)
    surely = max(needed.known, needed.all / TOO_HIGH if on_cpu else 0)
    if surely > free / sharing:
        raise UserError(sentence)
    if sentence:
        _log.warning('%s This is an estimate.', sentence)
