"""What a step changes, and the settings that enter it as values."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from sam_jax import optimizers, rngs, sharpness, trajectory
from sam_jax.errors import UserError, first_line

# Reported as means over the steps since the last report, in this order; the rest as last values.
AVERAGED = (
    'loss',
    'perturbed_loss',
    'error_rate',
    'perturbed_error_rate',
    'clean_grad_norm',
    'grad_norm',
    'perturbation_norm',
)


class HParams(flax.struct.PyTreeNode):
    """Settings that enter the compiled step as values: sweeping them compiles nothing anew."""

    learning_rate: Any
    rho: Any
    weight_decay: Any
    seed: Any

    @classmethod
    def from_config(cls, config: Any) -> 'HParams':
        return cls(
            learning_rate=jnp.asarray(config.optimizer.learning_rate, float),
            rho=jnp.asarray(config.sam.rho, float),
            weight_decay=jnp.asarray(config.optimizer.weight_decay, float),
            seed=jnp.asarray(config.seed, jnp.uint32),
        )


class TrainState(flax.struct.PyTreeNode):
    """Everything a step changes; the same on all devices, so a checkpoint knows no topology.

    Attributes:
      step: number of steps made, int32.
      params, batch_stats: the model's variables.
      opt_state: state of clipping and optimizer.
      sharpness_state: state of the sharpness-aware method.
      memory: of the training images' logits, see `trajectory.py`; None for most methods.
      ema: {'params', 'batch_stats'} averaged over steps, or None.
      sums: sums of the averaged metrics since the last report.
      bad_step: first step (1-based) whose loss or gradient was not finite, or that made the params
        so; 0 if none was.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    sharpness_state: Any
    memory: Any
    ema: Any
    sums: Any
    bad_step: Any


def create_method(config: Any, rho: float | jax.Array, **run: Any) -> sharpness.Link:
    """Returns the config's method with a radius; `run` is what only the step knows of the run."""
    # For shapes and checks that is no matter.
    settings = {
        **config.sam,
        'rho': rho,
        'max_norm': config.optimizer.clip_norm or None,
        'total_steps': 1,
        'num_examples': 1,
        **run,
    }
    return sharpness.create(**settings)


def create_train_state(
    config: Any, model: nn.Module, image_shape: tuple[int, ...], num_images: int = 0
) -> TrainState:
    """Initialises params, statistics and all states, on the host's default device.

    Args:
      config: the run's config; its seed decides the params.
      model: flax module of `models.create_model`.
      image_shape: (H, W, C).
      num_images: rows of the memory, for methods that have one.

    Raises:
      UserError: the model cannot work with such images, or the method with these params.
    """

    @jax.jit
    def init(rngs, images):
        variables = model.init(rngs, images, train=False)
        # What no step changes is no part of the state, and comes from elsewhere.
        return {name: x for name, x in variables.items() if name != 'frozen'}

    def create_variables():
        images = jnp.zeros((1, *image_shape), float)
        return init({'params': rngs.key(config.seed, 'init')}, images)

    try:
        shapes = jax.eval_shape(create_variables)
    except UserError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as e:  # layers that find no pixel left, say
        raise UserError(
            f'model.name is {config.model.name!r}; it cannot be made for images of '
            f'{"x".join(map(str, image_shape))} ({first_line(e)}): set data.image_size to the side '
            'of others.'
        ) from e
    method = create_method(config, 0.0)
    try:
        jax.eval_shape(method.init, shapes['params'])
    except ValueError as e:  # what the method has to say of params of these shapes
        raise UserError(f'sam.method is {config.sam.method!r}: {e}') from e
    variables = create_variables()
    params, batch_stats = variables['params'], variables.get('batch_stats', {})
    # Flax starts statistics in float32 even where a float64 model then keeps them in float64.
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    batch_stats = jax.tree.map(lambda x: x.astype(dtype), batch_stats)
    ema = None
    if config.ema.decay:
        # A copy: the step donates its arguments, and no buffer may be given away twice.
        ema = jax.tree.map(jnp.copy, {'params': params, 'batch_stats': batch_stats})
    memory = trajectory.create_memory(
        method.trajectory, num_images, getattr(model, 'num_classes', 0), dtype
    )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizers.create(config.optimizer, 0.0).init(params),
        sharpness_state=method.init(params),
        memory=memory,
        ema=ema,
        sums={name: jnp.zeros((), float) for name in AVERAGED},
        bad_step=jnp.zeros((), jnp.int32),
    )
