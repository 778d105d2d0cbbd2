"""The train step: a pure function of one device's part of the batch, and its pmap.

    per replica   gradient of (cross entropy + L2 penalty), BatchNorm statistics of the clean pass
    per group     mean gradient -> sharpness-aware gradient, by the group's own second gradient
    all groups    mean, in one all-reduce -> clip -> optimizer -> moving average
"""

import functools
import inspect
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sam_jax import losses, metrics, optimizers, rngs, schedules, sharpness
from sam_jax.models import pretrained
from sam_jax.replicas import AXIS

# Reported as means over the steps since the last report, in this order; the rest as last values.
_AVERAGED = ('loss', 'perturbed_loss', 'error_rate', 'clean_grad_norm', 'grad_norm',
             'perturbation_norm')


class HParams(flax.struct.PyTreeNode):
    """Settings that enter the compiled step as values: sweeping them compiles nothing anew."""

    learning_rate: Any
    rho: Any
    weight_decay: Any
    seed: Any

    @classmethod
    def from_config(cls, config):
        return cls(
            learning_rate=jnp.asarray(config.optimizer.learning_rate, float),
            rho=jnp.asarray(config.sam.rho, float),
            weight_decay=jnp.asarray(config.optimizer.weight_decay, float),
            seed=jnp.asarray(config.seed, jnp.uint32))


class TrainState(flax.struct.PyTreeNode):
    """Everything a step changes; the same on all devices, so a checkpoint knows no topology.

    Attributes:
      step: number of steps made, int32.
      params, batch_stats: the model's variables.
      opt_state: state of clipping and optimizer.
      sharpness_state: state of the sharpness-aware method.
      ema: {'params', 'batch_stats'} averaged over steps, or None.
      sums: sums of the averaged metrics since the last report.
      bad_step: first step (1-based) whose loss or gradient was not finite; 0 if none was.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    sharpness_state: Any
    ema: Any
    sums: Any
    bad_step: Any


def _method(config, rho):
    other = ('rho', 'schedule', 'warmup_epochs', 'replicas_per_group')
    settings = {name: value for name, value in config.sam.items() if name not in other}
    return sharpness.create(rho=rho, **settings)


def _scheduled(settings, base, step, config, steps_per_epoch):
    """The value of a schedule of `config.sam` or `config.optimizer` at a step."""
    return schedules.create(
        settings.schedule, base, config.total_epochs * steps_per_epoch,
        settings.warmup_epochs * steps_per_epoch)(step)


def create_train_state(config, model, image_shape):
    """Initialises params, statistics and all states, on the host's default device.

    Args:
      config: the run's config; its seed decides the params.
      model: flax module of `models.create_model`.
      image_shape: (H, W, C).
    """
    images = jnp.zeros((1, *image_shape), float)
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init({'params': rngs.key(config.seed, 'init')}, images)
    params, batch_stats = variables['params'], variables.get('batch_stats', {})
    # Flax starts statistics in float32 even where a float64 model then keeps them in float64.
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    batch_stats = jax.tree.map(lambda x: x.astype(dtype), batch_stats)
    ema = None
    if config.ema.decay:
        # A copy: the step donates its arguments, and no buffer may be given away twice.
        ema = jax.tree.map(jnp.copy, {'params': params, 'batch_stats': batch_stats})
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, batch_stats=batch_stats,
        opt_state=optimizers.create(config.optimizer, 0.0).init(params),
        sharpness_state=_method(config, 0.0).init(params), ema=ema,
        sums={name: jnp.zeros((), float) for name in _AVERAGED},
        bad_step=jnp.zeros((), jnp.int32))


def load_pretrained(state, model, path):
    """Returns the state with the weights of a file, see `models.pretrained.load`.

    Args:
      state: of `create_train_state`, before the first step.
      model: its model.
      path: `config.model.init_from`.
    """
    variables = pretrained.load(
        path, model, {'params': state.params, 'batch_stats': state.batch_stats})
    ema = state.ema and jax.tree.map(np.copy, variables)
    return state.replace(ema=ema, **variables)


def mean_over(function, xs, unroll):
    """Returns the mean of function(x) over the leading axis of the pytree xs.

    One after the other, so only one x's intermediates are in memory; integer leaves (counters) are
    taken from the last x, since they are equal.
    """
    n = jax.tree.leaves(xs)[0].shape[0]
    first = function(jax.tree.map(lambda x: x[0], xs))
    rest = jax.tree.map(lambda x: x[1:], xs)

    def add(total, x):
        return jax.tree.map(
            lambda t, y: t + y if jnp.issubdtype(t.dtype, jnp.inexact) else y, total, function(x))

    if n == 1:
        return first
    if unroll:
        total = first
        for i in range(n - 1):
            total = add(total, jax.tree.map(lambda x, i=i: x[i], rest))
    else:
        total, _ = lax.scan(lambda t, x: (add(t, x), None), first, rest)
    return jax.tree.map(
        lambda t: t / n if jnp.issubdtype(t.dtype, jnp.inexact) else t, total)


def mean_over_devices(tree, axis_index_groups=None):
    """Mean over the devices of the axis, or over each group of them; integer leaves stay."""
    leaves, structure = jax.tree.flatten(tree)
    inexact = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
    means = lax.pmean([leaves[i] for i in inexact], AXIS, axis_index_groups=axis_index_groups)
    for i, mean in zip(inexact, means):
        leaves[i] = mean
    return jax.tree.unflatten(structure, leaves)


def replica_gradient(params, batch_stats, replica, *, model, config, weight_decay,
                     true_gradient=False):
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

    Returns:
      (gradient, aux), aux = {'loss': cross entropy without the penalty, 'error_rate',
      'batch_stats': running statistics after this pass}.
    """
    options = {}
    if 'true_gradient' in inspect.signature(type(model).__call__).parameters:
        options['true_gradient'] = true_gradient

    def objective(params):
        logits, updated = model.apply(
            {'params': params, 'batch_stats': batch_stats}, replica['image'], train=True,
            mutable=['batch_stats'], rngs=replica['rngs'], **options)
        loss = jnp.mean(losses.cross_entropy(logits, replica['label'], config.label_smoothing))
        penalty = losses.l2_penalty(
            params, weight_decay, config.optimizer.decay_norm_and_bias)
        aux = {'loss': loss.astype(float),
               'error_rate': jnp.mean(metrics.top1_error(logits, replica['label'])).astype(float),
               'batch_stats': updated.get('batch_stats', {})}
        return loss + penalty, aux

    return jax.grad(objective, has_aux=True)(params)


def _group_step(state, group, gradient, method, layout, ascends):
    """One group's sharpness-aware gradient, from the replicas that this device holds of it."""

    def group_gradient(params, true_gradient=False):
        result = mean_over(functools.partial(gradient, params, true_gradient=true_gradient),
                           group, layout.unroll)
        if layout.devices_per_group > 1:
            result = mean_over_devices(result, layout.axis_index_groups)
        return result

    def perturbed_gradient(params):
        grads, aux = group_gradient(params)
        return grads, aux['loss']

    # What is climbed is the loss: its own gradient, where shake models know two.
    grads, aux = group_gradient(state.params, true_gradient=ascends)
    (updates, perturbed_loss), sharpness_state = method.update(
        grads, state.sharpness_state, state.params, grad_fn=perturbed_gradient, aux=aux['loss'],
        ascent_grad_fn=lambda params: group_gradient(params, true_gradient=True)[0],
        key=group['group_key'][0])
    report = {'loss': aux['loss'], 'error_rate': aux['error_rate'],
              'perturbed_loss': perturbed_loss,
              # The ascent's own expression, so that XLA computes it once.
              'clean_grad_norm': sharpness.ascent.lp_norm(grads),
              'perturbation_norm': sharpness_state.perturbation_norm}
    return updates, sharpness_state, aux['batch_stats'], report


def train_step(state, feed, arrays, hparams, *, model, config, layout, batch_fn,
               steps_per_epoch):
    """One step on one device of the pmap axis; pure.

    Args:
      state: TrainState, the same on all devices.
      feed: this device's row of the dataset's `train_feed`.
      arrays: the dataset's arrays on the device.
      hparams: HParams.
      model: flax module of `models.create_model`.
      config: the run's config.
      layout: replicas.Layout.
      batch_fn: (arrays, feed, keys of the examples, key of the batch, name of the axis) ->
        {'image', 'label'}, leading axes (replicas of this device, examples of a replica).
      steps_per_epoch: for the schedules.

    Returns:
      (new state, metrics): scalars by their logged names, the same on all devices.
    """
    learning_rate = _scheduled(
        config.optimizer, hparams.learning_rate, state.step, config, steps_per_epoch)
    rho = _scheduled(config.sam, hparams.rho, state.step, config, steps_per_epoch)
    method = _method(config, rho)
    descent = optimizers.create(config.optimizer, learning_rate)

    replicas = keyed_replicas(state.step, feed, arrays, hparams, layout, batch_fn)
    groups = jax.tree.map(
        lambda x: x.reshape(layout.groups_per_device, -1, *x.shape[1:]), replicas)

    def gradient(params, replica, true_gradient):
        return replica_gradient(
            params, state.batch_stats, replica, model=model, config=config,
            weight_decay=hparams.weight_decay, true_gradient=true_gradient)

    # With rho = 0 the clean gradient is what descends, and nothing is climbed.
    ascends = rho > 0 if config.sam.method != 'sgd' else False
    result = mean_over(
        lambda group: _group_step(state, group, gradient, method, layout, ascends),
        groups, layout.unroll)
    if layout.devices_per_group < len(layout.devices):
        result = mean_over_devices(result)
    grads, sharpness_state, batch_stats, report = result
    report['grad_norm'] = optax.tree.norm(grads)

    updates, opt_state = descent.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = optimizers.ema_update(
            ema, {'params': params, 'batch_stats': batch_stats}, state.step + 1,
            config.ema.decay, config.ema.warmup_steps)
    sums, bad_step, logged = _report(state, report, config.log_every_steps)
    logged.update({
        'train/param_norm': optax.tree.norm(params), 'train/learning_rate': learning_rate,
        'train/rho': rho})
    new_state = TrainState(
        state.step + 1, params, batch_stats, opt_state, sharpness_state, ema, sums, bad_step)
    return new_state, logged


def keyed_replicas(step, feed, arrays, hparams, layout, batch_fn):
    """Returns this device's replicas, with leading axis replicas.

    {'image', 'label', 'rngs', 'group_key'}: the keys, of the examples' augmentation, of the
    replicas' dropout and shakes, and of what a group shares, are functions of seed, step and place
    in the global batch alone. Arguments as of `train_step`.
    """
    replica = lax.axis_index(AXIS) * layout.replicas_per_device + jnp.arange(
        layout.replicas_per_device)
    place = jnp.arange(layout.replicas_per_device * layout.replica_batch_size) + (
        replica[0] * layout.replica_batch_size)
    augment_key = rngs.key(hparams.seed, 'augment', step)
    example_keys = jax.vmap(functools.partial(jax.random.fold_in, augment_key))(place)

    def of_replicas(key):
        return jax.vmap(functools.partial(jax.random.fold_in, key))(replica)

    replica_rngs = {'dropout': of_replicas(rngs.key(hparams.seed, 'dropout', step)),
                    'shake': of_replicas(rngs.key(hparams.seed, 'shake', step))}
    example_keys = example_keys.reshape(layout.replicas_per_device, -1)
    batch_key = rngs.key(hparams.seed, 'augment_batch', step)
    group_key = jax.vmap(functools.partial(jax.random.fold_in, rngs.key(
        hparams.seed, 'ascent', step)))(replica // layout.replicas_per_group)
    return {**batch_fn(arrays, feed, example_keys, batch_key, AXIS), 'rngs': replica_rngs,
            'group_key': group_key}


def _report(state, report, log_every_steps):
    """Adds a step's metrics to the sums, which live in the state so that a restart loses none."""
    position = state.step % log_every_steps
    sums = {name: jnp.where(position == 0, 0.0, state.sums[name]) + report[name].astype(float)
            for name in _AVERAGED}
    finite = jnp.isfinite(report['loss']) & jnp.isfinite(report['grad_norm'])
    bad_step = jnp.where((state.bad_step == 0) & ~finite, state.step + 1, state.bad_step)
    logged = {f'train/{name}': sums[name] / (position + 1) for name in _AVERAGED}
    logged['bad_step'] = bad_step
    return sums, bad_step, logged


def make_train_step(model, config, layout, dataset):
    """Returns the pmapped step: (state, feed, arrays, hparams) -> (state, metrics).

    `feed` is sharded over the devices (`layout.shard`), everything else replicated
    (`layout.replicate`); the state's buffers are donated.
    """
    step = functools.partial(
        train_step, model=model, config=config, layout=layout,
        batch_fn=dataset.train_batch,
        steps_per_epoch=dataset.num_train_examples // config.batch_size)
    return jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0, None, None), out_axes=(None, None),
        donate_argnums=0, devices=layout.devices)
