"""Gradients of a replica, of a group, and a group's sharpness-aware gradient."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sam_jax import losses, metrics, sharpness
from sam_jax.replicas import AXIS, Layout


def mean_over(function: Callable[[Any], tuple[Any, Any]], xs: Any, unroll: bool) -> tuple[Any, Any]:
    """Returns the mean of a function over the leading axis of the pytree xs, and what it keeps.

    One after the other, so only one x's intermediates are in memory; integer leaves (counters) are
    taken from the last x, since they are equal.

    Args:
      function: x -> (result to be averaged, result to be kept).
      xs: pytree.
      unroll: whether the loop is unrolled or scanned.

    Returns:
      (mean, kept), the latter with a leading axis.
    """
    n = jax.tree.leaves(xs)[0].shape[0]

    def add(total, x):
        result, kept = function(x)
        return jax.tree.map(
            lambda t, y: t + y if jnp.issubdtype(t.dtype, jnp.inexact) else y, total, result
        ), kept

    def x_at(i):
        return jax.tree.map(lambda x: x[i], xs)

    if n == 1 or unroll:
        total, first = function(x_at(0))
        kept = [first]
        for i in range(1, n):
            total, keep = add(total, x_at(i))
            kept.append(keep)
        kept = jax.tree.map(lambda *k: jnp.stack(k), *kept)
    else:
        function = jax.jit(function)  # traced once, for the shapes of its sums and for the loop
        shapes, _ = jax.eval_shape(function, x_at(0))
        total, kept = lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), xs)
    return jax.tree.map(lambda t: t / n if jnp.issubdtype(t.dtype, jnp.inexact) else t, total), kept


def mean_over_devices(tree: Any, axis_index_groups: list[list[int]] | None = None) -> Any:
    """Mean over the devices of the axis, or over each group of them; integer leaves stay."""
    leaves, structure = jax.tree.flatten(tree)
    inexact = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
    means = lax.pmean([leaves[i] for i in inexact], AXIS, axis_index_groups=axis_index_groups)
    for i, mean in zip(inexact, means):
        leaves[i] = mean
    return jax.tree.unflatten(structure, leaves)


class Training(NamedTuple):
    """The loss of the training: what a gradient needs besides params, statistics and examples.

    Attributes:
      model: flax module of `models.create_model`.
      loss: (logits, labels) -> the loss of each example.
      decay_norm_and_bias: of the config.
      weight_decay: factor of the L2 penalty, a scalar, perhaps traced.
      added: None, or (logits, replica) -> a further term.
      frozen: the model's variables that no step changes.
    """

    model: Any
    loss: Any
    decay_norm_and_bias: bool
    weight_decay: Any
    added: Any = None
    frozen: Any = None

    @classmethod
    def from_config(
        cls, config: Any, model: Any, weight_decay: Any, added: Any = None, frozen: Any = None
    ) -> 'Training':
        fixed = losses.of_config(config), config.optimizer.decay_norm_and_bias
        return cls(model, *fixed, weight_decay, added, frozen)

    def forward(
        self, params: Any, batch_stats: Any, replica: dict[str, Any], **options
    ) -> tuple[jax.Array, Any]:
        """Returns (logits, updated variables) of a training pass of one replica."""
        return self.model.apply(
            {'params': params, 'batch_stats': batch_stats, 'frozen': self.frozen or {}},
            replica['image'],
            train=True,
            mutable=['batch_stats'],
            rngs=replica['rngs'],
            **options,
        )

    def of_logits(self, logits: jax.Array, replica: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        """Returns (sum of all terms but the penalty, loss of each example)."""
        each = self.loss(logits, replica['label'])
        total = jnp.mean(each)
        return (total if self.added is None else total + self.added(logits, replica)), each

    def penalty(self, params: Any) -> Any:
        return losses.l2_penalty(params, self.weight_decay, self.decay_norm_and_bias)


def replica_gradient(
    params: Any,
    batch_stats: Any,
    replica: dict[str, Any],
    training: Training,
    true_gradient: bool | jax.Array = False,
    cotangents: jax.Array | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of one replica's mean cross entropy plus the L2 penalty.

    Args:
      params, batch_stats: the model's variables.
      replica: {'image', 'label', 'rngs'}: R examples and the keys of the replica's dropout and
        shakes.
      training: Training.
      true_gradient: whether shake models return the gradient of the loss they compute; a boolean,
        traced or not. Models that do not take it always do.
      cotangents: None, or the derivative by the logits that is pulled back in place of that of the
        loss here (`sharpness.functional_sam`).

    Returns:
      ((gradient, aux), kept): aux = {'reported': 'loss', the cross entropy without the other
      terms, and 'error_rate'; 'objective': the loss with them; 'batch_stats': running statistics
      after this pass}; kept = {'losses': cross entropy of each example, 'logits'}.
    """
    options = {}
    if 'true_gradient' in inspect.signature(type(training.model).__call__).parameters:
        options['true_gradient'] = true_gradient

    def objective(params):
        logits, updated = training.forward(params, batch_stats, replica, **options)
        total, each = training.of_logits(logits, replica)
        penalty = training.penalty(params)
        aux = {
            'reported': reported(each, logits, replica),
            'objective': (total + penalty).astype(float),
            'batch_stats': updated.get('batch_stats', {}),
        }
        if cotangents is not None:
            total = jnp.sum(logits * lax.stop_gradient(cotangents))
        return total + penalty, (aux, {'losses': each, 'logits': logits})

    grads, (aux, kept) = jax.grad(objective, has_aux=True)(params)
    return (grads, aux), kept


def risen_most(
    params: Any,
    batch_stats: Any,
    replica: dict[str, Any],
    old_losses: jax.Array,
    fraction: float,
    training: Training,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The share of a replica's examples whose loss rises most, and 'loss', 'error_rate' of all.

    ESAM's selection (arXiv 2110.03141): of R examples max(1, ceil(fraction R)).
    """
    logits, _ = training.forward(params, batch_stats, replica)
    new = training.loss(logits, replica['label'])
    _, index = lax.top_k(new - old_losses, max(1, math.ceil(fraction * new.size)))
    chosen = {name: replica[name][index] for name in ('image', 'label')}
    return {**replica, **chosen}, reported(new, logits, replica)


def reported(each: jax.Array, logits: jax.Array, replica: dict[str, Any]) -> dict[str, jax.Array]:
    """Returns what the log has of a point: means of the cross entropies and of the errors."""
    return {
        'loss': jnp.mean(each).astype(float),
        'error_rate': jnp.mean(metrics.top1_error(logits, replica['label'])).astype(float),
    }


def over_group(
    gradient: Callable[[Any], tuple[Any, Any]], group: Any, layout: Layout, part: bool = False
) -> tuple[Any, Any]:
    """Means over all replicas of a group, of which this device holds some; and what they keep.

    With `part` over those of this device alone.
    """
    result, kept = mean_over(gradient, group, layout.unroll)
    if layout.devices_per_group > 1 and not part:
        result = mean_over_devices(result, layout.axis_index_groups)
    return result, kept


def group_loss(
    batch_stats: Any,
    group: dict[str, Any],
    training: Training,
    layout: Layout,
    climbable: bool | jax.Array = True,
    compares: jax.Array | None = None,
) -> sharpness.Loss:
    """The loss of one group as a method sees it, by the replicas that this device holds of it.

    Its Evaluations report cross entropy and error rate, and have aux = (aux, kept) of
    `replica_gradient`, the latter with a leading axis; of the examples that rise most there is no
    aux. Where each of several groups covers several devices, the `part` is that of this device's
    replicas.

    Args:
      batch_stats: before the step.
      group: the replicas of the group on this device; 'previous', where a method asks for it, are
        those of the step before.
      training: Training.
      layout: replicas.Layout.
      climbable: False, or a traced bool, where an ascent goes nowhere (rho = 0): the gradient that
        is climbed elsewhere then is the one that descends.
      compares: whether the report has cosines, a traced bool; where it is False they are 0 and cost
        nothing. None: there are none.
    """

    def evaluate(
        params, climb=False, previous=False, most_risen=None, cotangents_of=None, part=False
    ):
        mean = functools.partial(over_group, layout=layout, part=part)
        climb = jnp.logical_and(climb, climbable) if climb is not False else False
        if most_risen is not None:
            return of_most_risen(mean, params, *most_risen)
        if cotangents_of is not None:
            return of_cotangents(mean, params, cotangents_of.aux[1]['logits'])
        return told(
            mean(
                lambda replica: replica_gradient(params, batch_stats, replica, training, climb),
                group['previous'] if previous else group,
            )
        )

    def told(result):
        (grads, aux), kept = result
        return sharpness.Evaluation(grads, aux['objective'], aux['reported'], (aux, kept))

    def of_cotangents(mean, params, logits):
        def gradient(pair):
            replica, logits = pair
            cotangents = jax.grad(lambda z: training.of_logits(z, replica)[0])(logits)
            return replica_gradient(params, batch_stats, replica, training, cotangents=cotangents)

        return told(mean(gradient, (group, logits)))

    def of_most_risen(mean, params, fraction, since):
        _, kept = since.aux

        def gradient(pair: tuple[Any, jax.Array]):
            chosen, of_all = risen_most(params, batch_stats, *pair, fraction, training)
            (grads, _), _ = replica_gradient(params, batch_stats, chosen, training)
            return (grads, of_all), ()

        (grads, of_all), _ = mean(gradient, (group, kept['losses']))
        return sharpness.Evaluation(grads, reported=of_all)

    # One group of all devices has its means already, and no mean over all groups follows.
    shared = 1 < layout.devices_per_group < len(layout.devices)
    return sharpness.Loss(
        evaluate,
        functools.partial(evaluate, part=True) if shared else None,
        None if compares is None else functools.partial(_cosine, compares, layout, shared),
    )


def _cosine(compares, layout, shared, a, b):
    def cosine():
        # The length of a part's gradient is not that of the group's.
        whole = mean_over_devices((a, b), layout.axis_index_groups) if shared else (a, b)
        return sharpness.trees.cosine(*whole).astype(float)

    with jax.named_scope(metrics.LOGGED):
        return lax.cond(compares, cosine, lambda: jnp.zeros((), float))


def group_step(
    state: Any,
    loss: sharpness.Loss,
    link: sharpness.Link,
    shared: dict[str, Any],
    clean: sharpness.Evaluation | None = None,
) -> tuple[Any, Any]:
    """One group's sharpness-aware gradient.

    Args:
      state: TrainState.
      loss: of the group, see `group_loss`.
      link: sharpness.Link.
      shared: keyword arguments of the link's update.
      clean: None, or the Evaluation at the params, where it is there already.

    Returns:
      ((updates, sharpness_state, batch_stats, report), kept) of the first gradient: batch_stats are
      those of its pass, and so is what it keeps.
    """
    if clean is not None:
        loss = loss.knowing(state.params, clean)
    (updates, seen), sharpness_state = link.update(
        None, state.sharpness_state, state.params, loss=loss, with_report=True, **shared
    )
    aux, kept = seen.clean.aux
    report = {
        **seen.clean.reported,
        **{f'perturbed_{name}': x for name, x in seen.perturbed.reported.items()},
        # The ascent has the same sums in it, which XLA computes once.
        'clean_grad_norm': sharpness.trees.lp_norm(seen.clean.grads),
        'perturbation_norm': sharpness_state.perturbation_norm,
        **{f'{name}_cosine': x for name, x in seen.cosines.items()},
    }
    return (updates, sharpness_state, aux['batch_stats'], report), kept
