"""The train step: a pure function of one device's part of the batch, mapped over the devices.

What is computed where:

    per replica   gradient of (cross entropy + L2 penalty), BatchNorm statistics of the clean pass
                  (at the params, or where the method wants its first gradient)
    per group     mean gradient -> sharpness-aware gradient, by the group's own second gradient
    all groups    mean, in one all-reduce -> clip -> optimizer -> moving average

Devices that share a group exchange the gradient that is climbed. The second one meets the others in
the mean over all groups alone, where the method is linear in it.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from sam_jax import cuda, gradients, metrics, optimizers, rngs, schedules, sharpness, trajectory
from sam_jax.replicas import AXIS, Layout
from sam_jax.train_state import AVERAGED, HParams, TrainState, create_method

# Among a step's metrics what it has for a memory on the host.
KEPT = 'kept'


def paired(feed: dict[str, Any], previous: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the feed of a step with that of the step before, see `asks_for_previous`.

    Args:
      feed: of the step, on the devices.
      previous: of the step before; None at the first, which then is its own.
    """
    return {**feed, 'previous': feed if previous is None else previous}


def asks_for_previous(config: Any) -> bool:
    """Returns whether the config's method takes gradients on the batch of the step before."""
    return create_method(config, 0.0).previous


def train_step(
    state: TrainState,
    feed: dict[str, Any],
    arrays: dict[str, jax.Array],
    hparams: HParams,
    *,
    model: nn.Module,
    config: Any,
    layout: Layout,
    batch_fn: Callable[..., dict[str, jax.Array]],
    steps_per_epoch: int,
) -> tuple[TrainState, dict[str, Any]]:
    """One step on one device of the axis; pure.

    Args:
      state: TrainState, the same on all devices.
      feed: this device's row of the dataset's `train_feed`.
      arrays: the dataset's arrays on the device; 'frozen', the model's variables of that name.
      hparams: HParams.
      model, config, layout: flax module, the run's config, replicas.Layout.
      batch_fn: (arrays, feed, keys of the examples, key of the batch, name of the axis) ->
        {'image', 'label'}, leading axes (replicas of this device, examples of a replica).
      steps_per_epoch: for the schedules.

    Returns:
      (new state, metrics): scalars by their logged names, the same on all devices; and KEPT, what
      a memory on the host is to keep, where `feed` has its 'past'.
    """
    learning_rate, rho = schedules.of_run(config, hparams, state.step, steps_per_epoch)
    method = create_method(
        config,
        rho,
        total_steps=config.total_epochs * steps_per_epoch,
        num_examples=steps_per_epoch * config.batch_size,
    )
    epoch, frozen = state.step // steps_per_epoch, arrays.get('frozen', {})
    training = gradients.Training.from_config(
        config,
        model,
        optimizers.penalty_factor(config.optimizer, hparams.weight_decay),
        trajectory.trajectory_loss(method.trajectory, state, model, epoch, frozen),
        frozen,
    )
    groups = _groups(state, feed, arrays, hparams, layout, batch_fn, epoch)
    shared = {
        'momentum': optimizers.momentum(config.optimizer, state.opt_state),
        'learning_rate': learning_rate,
        'corrected': True,
        'added_loss': True,
        'gate_key': rngs.key(hparams.seed, 'gate', state.step),
    }
    (grads, sharpness_state, batch_stats, report), kept = _over_groups(
        state, groups, training, method, layout, shared, rho > 0, config.log_every_steps
    )
    descent = optimizers.create(config.optimizer, learning_rate, hparams.weight_decay)
    grads = cuda.in_order(grads)
    updates, opt_state = descent.update(grads, state.opt_state, state.params)
    updates = sharpness.add_correction(updates, sharpness_state, learning_rate)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = cuda.settled((params, opt_state))
    report |= {
        'grad_norm': optax.tree.norm(grads),
        'update_norm': optax.tree.norm(updates),
        'param_norm': optax.tree.norm(params),
        'learning_rate': learning_rate,
        'rho': rho,
    }
    memory, to_keep = _remembered(state.memory, feed, kept, epoch)
    ema = _averaged(state, {'params': params, 'batch_stats': batch_stats}, config.ema)
    # What goes past the optimizer is seen in the params only. (Their 2-norm may overflow before.)
    finite = (
        jnp.isfinite(report['loss'])
        & jnp.isfinite(report['grad_norm'])
        & jnp.isfinite(sharpness.trees.lp_norm(params, float('inf')))
    )
    sums, bad_step, logged = _report(state, report, finite, config.log_every_steps)
    new_state = TrainState(
        state.step + 1, params, batch_stats, opt_state, sharpness_state, memory, ema, sums, bad_step
    )
    return new_state, logged if to_keep is None else {**logged, KEPT: to_keep}


def _remembered(memory, feed, kept, epoch):
    """The memory after the step, if the devices have one; and what one on the host is to keep."""
    if memory is not None:
        return trajectory.memorise(memory, feed['index'], kept['logits'], epoch), None
    if 'past' in feed:
        dtype = feed['past']['logits'].dtype
        return None, trajectory.to_keep(feed['index'], kept['logits'], epoch, dtype)
    return None, None


def _averaged(state, variables, settings):
    """The moving average after the step, if there is one."""
    if state.ema is None:
        return None
    return optimizers.ema_update(
        state.ema, variables, state.step + 1, settings.decay, settings.warmup_steps
    )


def _groups(state, feed, arrays, hparams, layout, batch_fn, epoch):
    """This device's replicas, with what their method remembers of them; leading axis groups."""
    previous, past = feed.get('previous'), feed.get('past')
    feed = {name: x for name, x in feed.items() if name not in ('previous', 'past')}
    replicas = keyed_replicas(state.step, feed, arrays, hparams, layout, batch_fn)
    if previous is not None:
        replicas['previous'] = keyed_replicas(
            jnp.maximum(state.step - 1, 0), previous, arrays, hparams, layout, batch_fn
        )
    if state.memory is not None:
        replicas['past'] = trajectory.recall(state.memory, feed['index'], epoch)
    elif past is not None:
        logits = past['logits'].astype(jnp.promote_types(past['logits'].dtype, jnp.float32))
        replicas['past'] = {**past, 'logits': logits}
    return jax.tree.map(lambda x: x.reshape(layout.groups_per_device, -1, *x.shape[1:]), replicas)


def _over_groups(state, groups, training, method, layout, shared, climbable, log_every_steps):
    """Means over all groups of what `gradients.group_step` returns, and what is kept."""
    is_logged = (state.step + 1) % log_every_steps == 0

    def loss(group):
        return gradients.group_loss(
            state.batch_stats, group, training, layout, climbable, is_logged
        )

    def step(group, clean=None, **more):
        return gradients.group_step(
            state, loss(group), method, {**shared, **more, 'key': group['group_key'][0]}, clean
        )

    if method.gate_norm:
        # The gate is one for all: the gradients of all groups are there before the first ascent.
        _, cleans = gradients.mean_over(
            lambda group: ((), loss(group)(state.params, climb=True)), groups, layout.unroll
        )
        squares = jax.vmap(lambda g: jnp.square(sharpness.trees.lp_norm(g)))(cleans.grads)
        gate_norm = jnp.sqrt(gradients.mean_over_devices(jnp.mean(squares)))
        result, kept = gradients.mean_over(
            lambda pair: step(*pair, gate_norm=gate_norm), (groups, cleans), layout.unroll
        )
    else:
        result, kept = gradients.mean_over(step, groups, layout.unroll)
    if layout.devices_per_group < len(layout.devices):
        # The host of an NVIDIA GPU would wait for the condition.
        result = lax.platform_dependent(
            is_logged,
            cuda.settled(result),
            cuda=lambda is_logged, result: gradients.mean_over_devices(result),
            default=_mean_with_cosines_if_logged,
        )
    return result, kept


def _mean_with_cosines_if_logged(is_logged, result):
    """Means over the devices, of what is 0 in steps that are not logged in the others only."""
    *result, report = result
    cosines = {name: report.pop(name) for name in [*report] if name.endswith('_cosine')}
    *result, report = gradients.mean_over_devices((*result, report))
    with jax.named_scope(metrics.LOGGED):
        cosines = lax.cond(is_logged, gradients.mean_over_devices, lambda same: same, cosines)
    return (*result, report | cosines)


def keyed_replicas(
    step: jax.Array,
    feed: dict[str, Any],
    arrays: dict[str, jax.Array],
    hparams: HParams,
    layout: Layout,
    batch_fn: Callable[..., dict[str, jax.Array]],
) -> dict[str, Any]:
    """Returns this device's replicas, with leading axis replicas.

    {'image', 'label', 'rngs', 'group_key'}: the keys, of the examples' augmentation, of the
    replicas' dropout and shakes, and of what a group shares, are functions of seed, step and place
    in the global batch alone. Arguments as of `train_step`.
    """
    replica = lax.axis_index(AXIS) * layout.replicas_per_device + jnp.arange(
        layout.replicas_per_device
    )
    place = jnp.arange(layout.replicas_per_device * layout.replica_batch_size) + (
        replica[0] * layout.replica_batch_size
    )
    augment_key = rngs.key(hparams.seed, 'augment', step)
    example_keys = jax.vmap(functools.partial(jax.random.fold_in, augment_key))(place)

    def of_replicas(key):
        return jax.vmap(functools.partial(jax.random.fold_in, key))(replica)

    replica_rngs = {
        'dropout': of_replicas(rngs.key(hparams.seed, 'dropout', step)),
        'shake': of_replicas(rngs.key(hparams.seed, 'shake', step)),
    }
    example_keys = example_keys.reshape(layout.replicas_per_device, -1)
    batch_key = rngs.key(hparams.seed, 'augment_batch', step)
    group_key = jax.vmap(
        functools.partial(jax.random.fold_in, rngs.key(hparams.seed, 'ascent', step))
    )(replica // layout.replicas_per_group)
    return {
        **batch_fn(arrays, feed, example_keys, batch_key, AXIS),
        'rngs': replica_rngs,
        'group_key': group_key,
    }


def _report(state, report, finite, log_every_steps):
    """Adds a step's metrics to the sums, which live in the state so that a restart loses none."""
    position = state.step % log_every_steps
    sums = {
        name: jnp.where(position == 0, 0.0, state.sums[name]) + report[name].astype(float)
        for name in AVERAGED
    }
    bad_step = jnp.where((state.bad_step == 0) & ~finite, state.step + 1, state.bad_step)
    last = {f'train/{name}': x for name, x in report.items() if name not in AVERAGED}
    means = {f'train/{name}': sums[name] / (position + 1) for name in AVERAGED}
    logged = {**means, **last, 'bad_step': bad_step}
    return sums, bad_step, logged


def make_train_step(
    model: nn.Module, config: Any, layout: Layout, dataset: Any
) -> jax.stages.Wrapped:
    """Returns the step on all devices: (state, feed, arrays, hparams) -> (state, metrics).

    `feed` is sharded over the devices (`layout.shard`), everything else replicated
    (`layout.replicate`); the state's buffers are donated.
    """
    step = functools.partial(
        train_step,
        model=model,
        config=config,
        layout=layout,
        batch_fn=dataset.train_batch,
        steps_per_epoch=dataset.num_train_examples // config.batch_size,
    )
    return layout.map(step, in_axes=(None, 0, None, None), donate_argnums=0)
