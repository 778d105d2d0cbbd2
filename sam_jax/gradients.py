"""Gradients of a replica, of a group, and a group's sharpness-aware gradient."""

import inspect
import math

import jax
import jax.numpy as jnp
from jax import lax

from sam_jax import losses, metrics, sharpness
from sam_jax.replicas import AXIS


def mean_over(function, xs, unroll):
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
            lambda t, y: t + y if jnp.issubdtype(t.dtype, jnp.inexact) else y, total, result), kept

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
        total, kept = lax.scan(
            add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), xs)
    return jax.tree.map(
        lambda t: t / n if jnp.issubdtype(t.dtype, jnp.inexact) else t, total), kept


def mean_over_devices(tree, axis_index_groups=None):
    """Mean over the devices of the axis, or over each group of them; integer leaves stay."""
    leaves, structure = jax.tree.flatten(tree)
    inexact = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
    means = lax.pmean([leaves[i] for i in inexact], AXIS, axis_index_groups=axis_index_groups)
    for i, mean in zip(inexact, means):
        leaves[i] = mean
    return jax.tree.unflatten(structure, leaves)


def replica_gradient(params, batch_stats, replica, *, model, config, weight_decay,
                     true_gradient=False, added_loss=None):
    """Gradient of one replica's mean cross entropy plus the L2 penalty.

    Args:
      params, batch_stats: the model's variables.
      replica: {'image', 'label', 'rngs'}: R examples and the keys of the replica's dropout and
        shakes.
      model: flax module of `models.create_model`.
      config: the run's config.
      weight_decay: factor of the penalty.
      true_gradient: whether shake models return the gradient of the loss they compute; a boolean,
        traced or not. Models that do not take it always do.
      added_loss: None, or (logits, replica) -> a further term.

    Returns:
      ((gradient, aux), kept): aux = {'loss': cross entropy without the other terms, 'objective':
      with them, 'error_rate', 'batch_stats': running statistics after this pass}; kept = {'losses':
      cross entropy of each example, 'logits'}.
    """
    options = {}
    if 'true_gradient' in inspect.signature(type(model).__call__).parameters:
        options['true_gradient'] = true_gradient

    def objective(params):
        logits, updated = model.apply(
            {'params': params, 'batch_stats': batch_stats}, replica['image'], train=True,
            mutable=['batch_stats'], rngs=replica['rngs'], **options)
        each = losses.cross_entropy(logits, replica['label'], config.label_smoothing)
        loss = jnp.mean(each)
        total = loss + losses.l2_penalty(
            params, weight_decay, config.optimizer.decay_norm_and_bias)
        if added_loss is not None:
            total += added_loss(logits, replica)
        aux = {'loss': loss.astype(float), 'objective': total.astype(float),
               'error_rate': jnp.mean(metrics.top1_error(logits, replica['label'])).astype(float),
               'batch_stats': updated.get('batch_stats', {})}
        return total, (aux, {'losses': each, 'logits': logits})

    grads, (aux, kept) = jax.grad(objective, has_aux=True)(params)
    return (grads, aux), kept


def most_risen(params, fraction, replica, old_losses, *, batch_stats, model, config):
    """The share of a replica's examples whose loss rises most, and the mean of all new losses.

    ESAM's selection (arXiv 2110.03141): of R examples max(1, ceil(fraction R)).
    """
    logits, _ = model.apply(
        {'params': params, 'batch_stats': batch_stats}, replica['image'], train=True,
        mutable=['batch_stats'], rngs=replica['rngs'])
    new = losses.cross_entropy(logits, replica['label'], config.label_smoothing)
    _, index = lax.top_k(new - old_losses, max(1, math.ceil(fraction * new.size)))
    chosen = {name: replica[name][index] for name in ('image', 'label')}
    return {**replica, **chosen}, jnp.mean(new).astype(float)


def over_group(gradient, group, layout):
    """Means over all replicas of a group, of which this device holds some; and what they keep."""
    result, kept = mean_over(gradient, group, layout.unroll)
    if layout.devices_per_group > 1:
        result = mean_over_devices(result, layout.axis_index_groups)
    return result, kept


def group_step(state, group, clean, gradient, select, method, layout, shared):
    """One group's sharpness-aware gradient, from the replicas that this device holds of it.

    Args:
      state: TrainState.
      group: the replicas of the group on this device.
      clean: ((grads, aux), kept) of the group, see `replica_gradient`.
      gradient: (params, replica, true_gradient) -> the same of a replica.
      select: (params, fraction, replica, losses) -> (some of the replica's examples, mean loss).
      method: sharpness.Method.
      layout: replicas.Layout.
      shared: what all groups pass to the method.
    """
    (grads, aux), kept = clean

    def at(params, replicas=group, true_gradient=False):
        return over_group(lambda replica: gradient(params, replica, true_gradient), replicas,
                           layout)[0]

    def perturbed_gradient(params, replicas=group):
        grads, aux = at(params, replicas)
        return grads, aux['loss']

    def perturbed_value_and_gradient(params):
        grads, aux = at(params)
        return (aux['objective'], aux['loss']), grads

    def selected_gradient(params, fraction):
        def of(pair):
            chosen, loss = select(params, fraction, *pair)
            (grads, _), _ = gradient(params, chosen, False)
            return (grads, loss), ()

        return over_group(of, (group, kept['losses']), layout)[0]

    (updates, perturbed_loss), sharpness_state = method.update(
        grads, state.sharpness_state, state.params, grad_fn=perturbed_gradient, aux=aux['loss'],
        # What is climbed is the loss: its own gradient, where shake models know two.
        ascent_grad_fn=lambda params: at(params, true_gradient=True)[0],
        selected_grad_fn=selected_gradient, value=aux['objective'],
        value_and_grad_fn=perturbed_value_and_gradient,
        previous_grad_fn=lambda params: perturbed_gradient(params, group['previous']),
        key=group['group_key'][0], **shared)
    report = {'loss': aux['loss'], 'error_rate': aux['error_rate'],
              'perturbed_loss': perturbed_loss,
              # The ascent's own expression, so that XLA computes it once.
              'clean_grad_norm': sharpness.ascent.lp_norm(grads),
              'perturbation_norm': sharpness_state.perturbation_norm}
    return (updates, sharpness_state, aux['batch_stats'], report), kept
