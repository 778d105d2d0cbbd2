"""The loss of a whole split as a function of the params: its values, gradients and products.

    L(w) = mean over the split of the cross entropy (with the run's label smoothing)
           [+ 0.5 weight_decay sum w^2]

BatchNorm is in evaluation mode, nothing is augmented and nothing dropped, so that L and its
derivatives are means over examples: sums over batches and devices are those of the whole split,
however it is cut. All is computed in the dtype of the params, with products of full precision, also
for a model that trains in bfloat16.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam_jax import losses, metrics
from sam_jax.errors import UserError
from sam_jax.replicas import AXIS, Layout, free_memory


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a split, as a function of params that lie on all devices of the layout.

    Attributes:
      model: flax module that computes in the dtype of the params.
      dataset: of `data.load_dataset`.
      split: the examples, one of its splits.
      layout: replicas.Layout, whose devices share the batches.
      batch_size: examples that are computed at once, by all devices together.
      batch_stats: BatchNorm's statistics, on the devices.
      arrays: the split's arrays, on the devices.
      steps: {kind: step on all devices}, of `create`.
      placed: the batches, of `create`.
      loss, label_smoothing, weight_decay, decay_norm_and_bias: as in a run's config.
    """

    model: Any
    dataset: Any
    split: Any
    layout: Any
    batch_size: int
    batch_stats: Any
    arrays: Any
    steps: Any = None
    placed: Any = None
    loss: str = 'softmax'
    label_smoothing: float = 0.0
    weight_decay: float = 0.0
    decay_norm_and_bias: bool = True

    def __len__(self):
        return len(self.split)

    @property
    def feeds(self) -> list[Any]:
        """The batches of the split, on the devices."""
        return self.placed.feeds

    @property
    def count(self) -> float:
        """Examples in the mean: all but images that are passed over because they are damaged."""
        return self.placed.count

    def with_statistics(self, batch_stats: Any) -> 'Objective':
        """Returns the same loss with other statistics of BatchNorm; the batches stay in place."""
        return dataclasses.replace(self, batch_stats=batch_stats)

    def of_split(self, split: Any) -> 'Objective':
        """Returns the same loss of other examples, of the same arrays."""
        other = dataclasses.replace(self, split=split)
        return dataclasses.replace(other, placed=_Placed(other))

    def logits(self, params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> jax.Array:
        """Logits of a batch; pure."""
        with jax.default_matmul_precision('highest'):
            return self.model.apply(
                {'params': params, 'batch_stats': batch_stats}, batch['image'], train=False
            )

    def of_logits(self, logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        """Sum of the losses of a batch, without those that only fill it up; pure."""
        each = losses.LOSSES[self.loss](logits, batch['label'], self.label_smoothing)
        return jnp.sum(jnp.where(batch['mask'] > 0, each, 0.0))

    def penalty(self, params: Any) -> Any:
        """The L2 penalty; pure."""
        return losses.l2_penalty(params, self.weight_decay, self.decay_norm_and_bias)

    def sums(
        self, params: Any, batch_stats: Any, batch: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """{'loss', 'error_rate'}: sums over a batch; pure."""
        logits = self.logits(params, batch_stats, batch)
        wrong = metrics.top1_error(logits, batch['label'])
        return {
            'loss': self.of_logits(logits, batch).astype(float),
            'error_rate': jnp.sum(jnp.where(batch['mask'] > 0, wrong, 0.0)).astype(float),
        }

    def value(self, params: Any) -> dict[str, float]:
        """Returns {'loss': L(w), 'error_rate'} as Python floats."""
        sums = self._total('sums', params, ())
        result = {name: float(x) / self.count for name, x in jax.device_get(sums).items()}
        result['loss'] += float(self.penalty(params))
        return result

    def gradient(self, params: Any) -> Any:
        """Returns dL/dw, on the devices."""
        return self._mean('gradient', params)

    def hessian_product(self, params: Any, vector: Any) -> Any:
        """Returns H v with H the Hessian of L: one forward-over-reverse product a batch.

        Args:
          params, vector: pytrees of the same shapes, on the devices.
        """
        return self._mean('hessian', params, vector)

    def gauss_newton_product(self, params: Any, vector: Any) -> Any:
        """Returns G v with G = mean of J' (d^2 loss / d logits^2) J, J the Jacobian of the logits.

        G is H without the curvature of the network itself, and has no negative eigenvalue. The
        penalty is in G as it is in H. Arguments as of `hessian_product`.
        """
        return self._mean('gauss_newton', params, vector)

    def _mean(self, kind, params, *vectors):
        total = self._total(kind, params, vectors)
        return self.steps[f'{kind}_mean'](total, self.count, params, *vectors)

    def _total(self, kind, params, vectors):
        like = {'loss': 0.0, 'error_rate': 0.0} if kind == 'sums' else params
        total = self.layout.replicate(
            jax.tree.map(lambda x: np.zeros(np.shape(x), jnp.result_type(x)), like)
        )
        for feed in self.feeds:
            total = self.steps[kind](total, params, self.batch_stats, self.arrays, feed, vectors)
            jax.block_until_ready(total)  # not ahead of the devices, see `replicas.paced`
        return total


def create(
    model: Any,
    variables: dict[str, Any],
    dataset: Any,
    split: Any,
    layout: Layout,
    batch_size: int,
    arrays: Any = None,
    **options,
) -> tuple[Objective, Any]:
    """Returns (Objective, params on the devices).

    Args:
      model: flax module of `models.create_model`.
      variables: {'params', 'batch_stats'}.
      dataset, split, layout, batch_size, options: see `Objective`.
      arrays: the split's, where they lie on the devices already.

    Raises:
      UserError: the images do not fit on the devices, or the network has learned prompts.
    """
    if getattr(model, 'frozen', False):
        raise UserError(
            'A network with learned prompts cannot be analysed yet: the loss of an analysis is a '
            'function of params and images alone.'
        )
    params, batch_stats = (
        layout.replicate(jax.device_get(variables[name])) for name in ('params', 'batch_stats')
    )
    arrays = arrays if arrays is not None else layout.replicate(dataset.device_arrays(split))
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    objective = Objective(
        model.clone(dtype=dtype), dataset, split, layout, batch_size, batch_stats, arrays, **options
    )
    objective = dataclasses.replace(objective, steps=_make_steps(objective))
    return dataclasses.replace(objective, placed=_Placed(objective)), params


class _Placed:
    """The batches of an objective's split, placed on the devices when they are first asked for."""

    def __init__(self, objective):
        self._objective = objective

    @functools.cached_property
    def feeds(self):
        of = self._objective
        return place_feeds(of.dataset, of.split, of.batch_size, of.layout, of.layout.shard)

    @functools.cached_property
    def count(self):
        return sum(float(self._objective.steps['count'](feed['mask'])) for feed in self.feeds)


def place_feeds(
    dataset: Any, split: Any, batch_size: int, layout: Layout, place: Callable[[Any], Any]
) -> list[Any]:
    """Returns all evaluation feeds of a split, on the devices, where they stay.

    Raises:
      UserError: they do not fit.
    """
    free, share = free_memory(layout.devices)
    placed = []
    for feed in dataset.eval_feeds(split, batch_size, layout):
        size = sum(x.nbytes for x in jax.tree.leaves(feed)) * -(-len(split) // batch_size)
        # A feed holds the rows of this process's devices, as does their memory.
        if size > free * len(layout.local_positions) / share:
            raise UserError(
                f'An analysis keeps its {len(split)} examples on the devices: that is '
                f'{size / 2**30:.3g} GiB, and {free / 2**30:.3g} are free. Take fewer '
                'examples.'
            )
        placed.append(place(feed))
    return placed


def _make_steps(objective):
    """The steps of each kind, a total with the sum over a batch added, and their means."""

    def loss(params, batch_stats, batch):
        return objective.of_logits(objective.logits(params, batch_stats, batch), batch)

    def hessian(params, batch_stats, batch, vector):
        return jax.jvp(lambda p: jax.grad(loss)(p, batch_stats, batch), (params,), (vector,))[1]

    def gauss_newton(params, batch_stats, batch, vector):
        def network(p):
            return objective.logits(p, batch_stats, batch)

        logits, back = jax.vjp(network, params)
        moved = jax.jvp(network, (params,), (vector,))[1]
        curved = jax.jvp(jax.grad(lambda x: objective.of_logits(x, batch)), (logits,), (moved,))[1]
        return back(curved)[0]

    def make(part):
        def step(total, params, batch_stats, arrays, feed, vectors):
            batch = objective.dataset.eval_batch(arrays, feed)
            return jax.tree.map(
                jnp.add, total, lax.psum(part(params, batch_stats, batch, *vectors), AXIS)
            )

        return objective.layout.map(
            step, in_axes=(None, None, None, None, 0, None), donate_argnums=0
        )

    def make_mean(of_penalty):
        return jax.jit(
            lambda total, count, params, *vectors: jax.tree.map(
                lambda x, y: x / count + y, total, of_penalty(params, *vectors)
            )
        )

    gradient = jax.grad(objective.penalty)
    curvature = make_mean(lambda params, v: jax.jvp(gradient, (params,), (v,))[1])
    count = objective.layout.map(lambda mask: lax.psum(jnp.sum(mask), AXIS), in_axes=(0,))
    return {
        'sums': make(objective.sums),
        'count': count,
        'gradient': make(jax.grad(loss)),
        'gradient_mean': make_mean(gradient),
        'hessian': make(hessian),
        'hessian_mean': curvature,
        'gauss_newton': make(gauss_newton),
        'gauss_newton_mean': curvature,
    }
