"""Per-example counts of right and wrong; they are summed and divided once, under a mask."""

import jax
import jax.numpy as jnp
import numpy as np

# The scope of what only logged steps compute; sam_jax.targets does not count it.
LOGGED = 'logged_steps_only'


def _true_class(labels):
    return labels if jnp.issubdtype(labels.dtype, jnp.integer) else jnp.argmax(labels, axis=-1)


def top1_error(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns 1.0 where the largest logit is not the true class, else 0.0; shape (...,).

    Of equal logits the first counts as largest. A NaN among the logits is an error.

    Args:
      logits: (..., C).
      labels: integer classes (...,) or distributions (..., C), whose largest entry is the truth.
    """
    wrong = jnp.argmax(logits, axis=-1) != _true_class(labels)
    return (wrong | jnp.isnan(logits).any(axis=-1)).astype(jnp.float32)


def topk_error(logits: jax.Array, labels: jax.Array, k: int = 5) -> jax.Array:
    """Returns 1.0 where k or more other classes score at least as high as the true one, else 0.0.

    Ties therefore count against the model, as does a NaN. (The original code multiplied an (N, 1)
    by an (N,) array here; this one is tested by definition.)

    Args:
      logits: (..., C) with C >= k.
      labels: integer classes (...,) or distributions (..., C).
      k: how many guesses are allowed.
    """
    truth = jnp.take_along_axis(logits, _true_class(labels)[..., None], axis=-1)
    not_below = jnp.sum(~(logits < truth), axis=-1) - 1
    return (not_below >= k).astype(jnp.float32)


def masked_sums(values: dict[str, jax.Array], mask: jax.Array) -> dict[str, jax.Array]:
    """Returns {name: sum of values where mask is 1} and 'count', the sum of the mask.

    Where the mask is 0 the value is ignored, even if it is not finite.

    Args:
      values: dict of arrays of one shape.
      mask: 0/1 array of that shape.
    """
    sums = {name: jnp.sum(jnp.where(mask > 0, v, 0.0)) for name, v in values.items()}
    return {**sums, 'count': jnp.sum(mask)}


def standard_error(samples: np.ndarray) -> float:
    """Returns the standard error of the mean of NumPy samples (n,); NaN for one."""
    return float(np.std(samples, ddof=1) / np.sqrt(len(samples))) if len(samples) > 1 else np.nan


def harmonic_mean(a: float, b: float) -> float:
    """Returns 2 a b / (a + b) of two accuracies, as base-to-new results are told; 0 if one is 0."""
    return 2 * a * b / (a + b) if a + b else 0.0
