"""Losses and penalties: per-example values in at least float32."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

# Classes, or distributions over them.
Labels = Integer[Array, '*batch'] | Float[Array, '*batch classes']


def _float32(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def target_distribution(
    labels: Labels, num_classes: int, dtype: Any
) -> Float[Array, '*batch classes']:
    """Returns labels as distributions: integer labels (...,) become one-hot (..., num_classes)."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return jax.nn.one_hot(labels, num_classes, dtype=dtype)
    return labels.astype(dtype)


def cross_entropy(
    logits: Float[Array, '*batch classes'], labels: Labels, label_smoothing: float = 0.0
) -> Float[Array, '*batch']:
    """Cross entropy of each example, with label smoothing.

    With y the target distribution, C classes and smoothing a:
    loss = -sum_c ((1 - a) y_c + a / C) log softmax(logits)_c. Non-finite logits give non-finite
    losses: a diverged model must be seen.

    Args:
      logits: (..., C), any float dtype.
      labels: integer classes (...,) or distributions (..., C).
      label_smoothing: a in [0, 1).

    Returns:
      Losses in nats, (...,), float32 (float64 if the logits are).
    """
    logits = _float32(logits)
    targets = _smoothed(logits, labels, label_smoothing)
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def sigmoid_cross_entropy(
    logits: Float[Array, '*batch classes'], labels: Labels, label_smoothing: float = 0.0
) -> Float[Array, '*batch']:
    """Sum over the classes of the cross entropies of a yes or no each, with label smoothing.

    With y' the smoothed target distribution of `cross_entropy`, whose arguments and result these
    are: loss = -sum_c (y'_c log sigmoid(z_c) + (1 - y'_c) log sigmoid(-z_c)). As big_vision trains
    Vision Transformers (Beyer et al., arXiv 2006.07159, section 4).
    """
    logits = _float32(logits)
    targets = _smoothed(logits, labels, label_smoothing)
    yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -jnp.sum(targets * yes + (1.0 - targets) * no, axis=-1)


def _smoothed(logits, labels, label_smoothing):
    num_classes = logits.shape[-1]
    targets = target_distribution(labels, num_classes, logits.dtype)
    return (1.0 - label_smoothing) * targets + label_smoothing / num_classes


# config.loss -> (logits, labels, label_smoothing) -> loss of each example.
LOSSES = {'softmax': cross_entropy, 'sigmoid': sigmoid_cross_entropy}


def of_config(config: Any) -> Callable[[Any, Any], Any]:
    """Returns (logits, labels) -> the training's loss of each example."""
    return functools.partial(LOSSES[config.loss], label_smoothing=config.label_smoothing)


def trajectory(
    logits: Float[Array, '*batch classes'], past: Float[Array, '*batch classes'], tau: float
) -> Float[Array, '*batch']:
    """Distance of each example's prediction from a past one (SAF and MESA, arXiv 2205.14083).

    tau^2 KL(softmax(past / tau) || softmax(logits / tau)), whose gradient by the logits is
    tau (softmax(logits / tau) - softmax(past / tau)); 0 where they agree, and for large tau
    (1 / 2C) ||logits - past||^2 of centred logits. The factor tau^2 is that of the authors' code.

    Args:
      logits, past: (..., C), any float dtype.
      tau: temperature > 0.

    Returns:
      (...,), float32 (float64 if the logits are).
    """
    new, old = (jax.nn.log_softmax(_float32(x) / tau) for x in (logits, past))
    return tau**2 * jnp.sum(jnp.exp(old) * (old - new), axis=-1)


def decayed(params: Any, decay_norm_and_bias: bool = True) -> Any:
    """Returns the pytree of bools that says which params are decayed.

    Args:
      params: pytree of parameters.
      decay_norm_and_bias: False leaves out every parameter with fewer than two axes, i.e. the
        scales and biases of norms, the biases of dense layers and class tokens, and learned
        `position`s of patches.
    """

    def is_decayed(path, w):
        is_position = bool(path) and getattr(path[-1], 'key', None) == 'position'
        return decay_norm_and_bias or (jnp.ndim(w) > 1 and not is_position)

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def l2_penalty(
    params: Any, weight_decay: float | Float[Array, ''], decay_norm_and_bias: bool = True
) -> float | Float[Array, '']:
    """Returns 0.5 * weight_decay * sum of w^2, a scalar (SAM paper's code: part of the loss).

    Args:
      params: pytree of parameters.
      weight_decay: scalar, may be traced.
      decay_norm_and_bias: of `decayed`.
    """
    mask = decayed(params, decay_norm_and_bias)
    leaves = [w for w, yes in zip(jax.tree.leaves(params), jax.tree.leaves(mask)) if yes]
    return 0.5 * weight_decay * sum((jnp.sum(jnp.square(_float32(w))) for w in leaves), 0.0)
