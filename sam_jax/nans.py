"""Where a number stops being finite: the first layer of a step that has one that is not.

Each step is looked at before the next one is made, and the state before it is kept: slower, and
twice the memory of the state. The numbers of the run are the same.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam_jax import gradients, optimizers, schedules, sharpness, train_step
from sam_jax.errors import UserError
from sam_jax.train_state import TrainState


def finite(tree: Any) -> jax.Array:
    """Whether all numbers of a pytree are finite; of none they are."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.ones((), bool), *(jnp.isfinite(x).all() for x in leaves)]))


def _leaves(tree):
    """[(name, leaf), ...] of a pytree."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator='/'), x) for path, x in found]


class Finder:
    """Makes the steps of a run, and names the first layer that is not finite."""

    def __init__(self, experiment: Any) -> None:
        self._experiment = experiment
        self._names = []
        layout = experiment.layout
        self._look = layout.map(self._flags, in_axes=(None, 0, None, None), out_axes=0)

    def step(
        self, state: TrainState, feed: dict[str, Any], *constants: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        """Makes a step; arguments as of `Experiment.train_step`.

        Returns:
          (state after it, metrics), as the train step has them.

        Raises:
          UserError: something in it is not finite; with the name of what is the first.
        """
        experiment = self._experiment
        before = jax.tree.map(jnp.copy, state)
        after, metrics = experiment.train_step(state, feed, *constants)
        bad = int(np.asarray(jax.device_get(metrics['bad_step'])))
        if bad:
            raise UserError(
                f'The loss or the gradient is not finite at step {bad}; the first that is not: '
                f'{self.find(before, feed, after)}.'
            )
        return after, metrics

    def find(self, before: TrainState, feed: dict[str, Any], after: TrainState) -> str:
        """Returns what of a step is the first that is not finite, in words.

        Args:
          before: state before the step.
          feed: of the step.
          after: state after it.
        """
        flags = self._look(before, feed, *self._experiment.constants)
        # Of the devices of this process; a row a replica.
        rows = np.concatenate([np.asarray(s.data)[0] for s in flags.addressable_shards])
        bad = np.flatnonzero(~rows.all(0))
        if len(bad):
            many = int((~rows[:, bad[0]]).sum())
            return f'{self._names[bad[0]]} (in {many} of {len(rows)} replicas)'
        for name, x in _leaves(jax.device_get(after.params)):
            if not np.isfinite(x).all():
                return f'the update of {name} by the optimizer'
        return 'none in a plain pass forward and backward at the params; see the method of sam'

    def _flags(self, state, feed, arrays, hparams):
        """(Replicas of this device, names): whether each is finite; leaves the names behind."""
        experiment = self._experiment
        config, layout = experiment.config, experiment.layout
        feed = {name: x for name, x in feed.items() if name != 'previous'}
        replicas = train_step.keyed_replicas(
            state.step, feed, arrays, hparams, layout, experiment.dataset.train_batch
        )
        _, rho = schedules.of_run(config, hparams, state.step, experiment.steps_per_epoch)
        model = experiment.model
        if getattr(model, 'remat', False):
            # Not computed anew: what a layer returns must be there to be looked at.
            model = model.clone(remat=False)
        training = gradients.Training.from_config(
            config,
            model,
            optimizers.penalty_factor(config.optimizer, hparams.weight_decay),
            frozen=arrays.get('frozen'),
        )
        ball = sharpness.ascent.lp_ball(rho)

        def of_replica(_, replica):
            self._names, found = [], []

            def note(name, tree):
                self._names.append(name)
                found.append(finite(tree))

            note('the images', replica['image'])
            for name, x in _leaves({'params': state.params, 'batch_stats': state.batch_stats}):
                note(f'{name} before the step', x)
            grads = _pass(training, state.params, state, replica, '', note)
            if config.sam.method != 'sgd':
                eps = ball.update(grads, ball.init(state.params), state.params)[0]
                up = sharpness.trees.move(state.params, eps)
                note('the ascent, which divides by the norm of the gradient', up)
                _pass(training, up, state, replica, ' at the perturbed params', note)
            return _, jnp.stack(found)

        return lax.scan(of_replica, 0, replicas)[1]


def _pass(training, params, state, replica, where, note):
    """A pass forward and backward; notes each layer in its order, and the gradient in its own."""
    layers = []

    def listen(call, arguments, options, context):
        result = call(*arguments, **options)
        if context.method_name == '__call__':
            layers.append('/'.join(context.module.path))
            outputs.append(finite(result))
        return result

    def objective(params):
        nonlocal outputs
        outputs = []
        layers.clear()
        with nn.intercept_methods(listen):
            logits, _ = training.forward(params, state.batch_stats, replica)
        total, _ = training.of_logits(logits, replica)
        return total + training.penalty(params), (total, outputs)

    outputs = []
    (whole, (loss, flags)), grads = jax.value_and_grad(objective, has_aux=True)(params)
    for name, flag in zip(layers, flags):
        note(f'layer {name or "(the whole network)"}{where}', jnp.where(flag, 0.0, jnp.nan))
    note(f'the loss{where}', loss)
    note(f'the L2 penalty{where}', whole)
    # Backward the last layer comes first.
    order = {name: i for i, name in enumerate(layers)}
    found = _leaves(grads)
    found.sort(key=lambda leaf: -order.get(leaf[0].rpartition('/')[0], -1))
    for name, x in found:
        note(f'the gradient of {name}{where}', x)
    return grads
