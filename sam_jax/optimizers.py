"""Descent: what happens to the mean gradient. Optax's parts, in the order of the paper's code."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from sam_jax import losses

OPTIMIZERS = ('sgd', 'rmsprop', 'adam', 'adamw', 'lamb', 'lion', 'muon')

# Those whose weight decay is a part of the step, and not of the loss.
DECOUPLED = ('adamw', 'lamb', 'lion', 'muon')

# Moonshot's (2502.16982): so large are Adam's steps, and one learning rate serves both.
_MUON_RMS = 0.2


def penalty_factor(settings: Any, weight_decay: float | jax.Array) -> float | jax.Array:
    """Returns the factor of the L2 penalty in the loss: 0 where the optimizer itself decays.

    Args:
      settings: `config.optimizer`.
      weight_decay: its `weight_decay`, or a traced scalar in its place.
    """
    return 0.0 if settings.name in DECOUPLED else weight_decay


def create(
    settings: Any, learning_rate: float | jax.Array, weight_decay: float | jax.Array = 0.0
) -> optax.GradientTransformation:
    """Returns clipping by global norm, then the optimizer, as one optax chain.

    sgd: m <- g + momentum m; w <- w - lr (g + momentum m) if nesterov, else w - lr m.
    rmsprop (TF1, as EfficientNet uses it): v <- decay v + (1 - decay) g^2 with v = 1 at the start;
    m <- momentum m + lr g / sqrt(v + epsilon); w <- w - m.
    adam: m <- momentum m + (1 - momentum) g; v <- decay v + (1 - decay) g^2, both corrected for
    their start; w <- w - lr m / (sqrt(v) + epsilon), nesterov as NAdam.

    Those of DECOUPLED take `weight_decay`, a, into their steps:

    adamw: w <- w - lr (adam's u + a w).
    lamb: w <- w - lr |w| / |u + a w| (u + a w) with adam's u, for each leaf; 1 where a norm is 0.
    lion: w <- w - lr (sign(momentum m + (1 - momentum) g) + a w); m <- decay m + (1 - decay) g.
    muon: m <- momentum m + (1 - momentum) g; w <- w - lr (0.2 sqrt(max(i, o)) O + a w), O the
    matrix m with its singular values near 1 (five steps of Newton and Schulz; of momentum m +
    (1 - momentum) g if nesterov), for every kernel but the head's. A kernel of a convolution is
    the matrix i x o of all its inputs. The other params descend by adamw.

    Args:
      settings: `config.optimizer`.
      learning_rate: a number or a traced scalar.
      weight_decay: likewise; the others ignore it, see `penalty_factor`.
    """
    clip = settings.clip_norm
    clipping = optax.clip_by_global_norm(clip) if clip else optax.identity()
    return optax.chain(clipping, _descent(settings, learning_rate, weight_decay))


def _descent(settings, learning_rate, weight_decay):
    b1, b2, epsilon, nesterov = (
        settings.momentum,
        settings.decay,
        settings.epsilon,
        settings.nesterov,
    )

    def mask(params):
        return losses.decayed(params, settings.decay_norm_and_bias)

    decay = {'weight_decay': weight_decay, 'mask': mask}
    match settings.name:
        case 'sgd':
            return optax.sgd(learning_rate, b1, nesterov)
        case 'adam':
            return optax.adam(learning_rate, b1, b2, epsilon, nesterov=nesterov)
        case 'adamw':
            return optax.adamw(learning_rate, b1, b2, epsilon, nesterov=nesterov, **decay)
        case 'lamb':
            return optax.lamb(learning_rate, b1, b2, epsilon, **decay)
        case 'lion':
            return optax.lion(learning_rate, b1, b2, **decay)
        case 'muon':
            return optax.chain(
                contrib.muon(
                    learning_rate,
                    beta=b1,
                    eps=epsilon,
                    nesterov=nesterov,
                    adam_b1=b1,
                    adam_b2=b2,
                    muon_weight_dimension_numbers=_matrices,
                    consistent_rms=_MUON_RMS,
                ),
                # Its own decay has a mask for the matrices alone.
                optax.add_decayed_weights(-learning_rate * weight_decay, mask),
            )
        case _:
            return optax.rmsprop(
                learning_rate,
                b2,
                epsilon,
                initial_scale=1.0,
                eps_in_sqrt=True,
                momentum=b1,
                nesterov=nesterov,
            )


def _matrices(params):
    """Which axes of a param are a matrix's inputs and outputs; None where Adam descends."""

    def numbers(path, w):
        names = [getattr(key, 'key', '') for key in path]
        if names[-1:] != ['kernel'] or w.ndim < 2 or 'head' in names:
            return None
        return contrib.MuonDimensionNumbers(tuple(range(w.ndim - 1)), (w.ndim - 1,))

    return jax.tree_util.tree_map_with_path(numbers, params)


def momentum(settings: Any, opt_state: optax.OptState) -> optax.Updates:
    """Returns the optimizer's momentum v, a pytree like the params; it descends along -v.

    Of sgd the sum of gradients, of rmsprop (whose momentum comes after the preconditioner and the
    learning rate) the sum of past steps with the sign turned, of the others their first moment.
    """
    if settings.name == 'muon':
        return _joined(*(m for _, m in optax.tree.get_all_with_path(opt_state, 'mu')))
    if settings.name in ('sgd', 'rmsprop'):
        trace = optax.tree.get(opt_state, 'trace')
        return jax.tree.map(jnp.negative, trace) if settings.name == 'rmsprop' else trace
    return optax.tree.get(opt_state, 'mu')


def _joined(one, other):
    """Two trees of momenta, each with a MaskedNode where the other has an array, as one."""

    def masked(x):
        return isinstance(x, optax.MaskedNode)

    return jax.tree.map(lambda a, b: b if masked(a) else a, one, other, is_leaf=masked)


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
