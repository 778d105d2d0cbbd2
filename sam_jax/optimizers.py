"""Descent: what happens to the mean gradient. Optax's parts, in the order of the paper's code."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ('sgd', 'rmsprop', 'adam')


def create(settings: Any, learning_rate: float | jax.Array) -> optax.GradientTransformation:
    """Returns clipping by global norm, then the optimizer, as one optax chain.

    sgd: m <- g + momentum m; w <- w - lr (g + momentum m) if nesterov, else w - lr m.
    rmsprop (TF1, as EfficientNet uses it): v <- decay v + (1 - decay) g^2 with v = 1 at the start;
    m <- momentum m + lr g / sqrt(v + epsilon); w <- w - m.
    adam: m <- momentum m + (1 - momentum) g; v <- decay v + (1 - decay) g^2, both corrected for
    their start; w <- w - lr m / (sqrt(v) + epsilon), nesterov as NAdam.

    Args:
      settings: `config.optimizer`.
      learning_rate: a number or a traced scalar.
    """
    clip = settings.clip_norm
    clipping = optax.clip_by_global_norm(clip) if clip else optax.identity()
    if settings.name == 'sgd':
        descent = optax.sgd(learning_rate, settings.momentum, settings.nesterov)
    elif settings.name == 'adam':
        descent = optax.adam(
            learning_rate,
            settings.momentum,
            settings.decay,
            settings.epsilon,
            nesterov=settings.nesterov,
        )
    else:
        descent = optax.rmsprop(
            learning_rate,
            settings.decay,
            settings.epsilon,
            initial_scale=1.0,
            eps_in_sqrt=True,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
        )
    return optax.chain(clipping, descent)


def momentum(settings: Any, opt_state: optax.OptState) -> optax.Updates:
    """Returns the optimizer's momentum v, a pytree like the params; it descends along -v.

    Of sgd the sum of gradients, of adam its first moment, of rmsprop (whose momentum comes after
    the preconditioner and the learning rate) the sum of past steps with the sign turned.
    """
    if settings.name == 'adam':
        return optax.tree.get(opt_state, 'mu')
    trace = optax.tree.get(opt_state, 'trace')
    return jax.tree.map(jnp.negative, trace) if settings.name == 'rmsprop' else trace


def ema_update(
    average: Any, values: Any, step: jax.Array, decay: float | jax.Array, warmup_steps: int = 0
) -> Any:
    """One step of an exponential moving average, with TensorFlow's warm-up rule.

    With s = step - warmup_steps: average <- d average + (1 - d) values with
    d = min(decay, (1 + s) / (10 + s)) for s >= 0; before, average <- values. Finite at every step
    (the original code divides by zero ten steps before its warm-up ends).

    Args:
      average, values: pytrees of the same structure.
      step: number of updates of `values` so far, 1 at the first.
      decay: in [0, 1].
      warmup_steps: before this step the average is a copy.
    """
    s = jnp.maximum(step - warmup_steps, 0).astype(float)
    d = jnp.minimum(decay, (1.0 + s) / (10.0 + s))
    return jax.tree.map(
        lambda a, v: jnp.where(
            step >= warmup_steps, d.astype(a.dtype) * a + (1.0 - d).astype(a.dtype) * v, v
        ),
        average,
        values,
    )
