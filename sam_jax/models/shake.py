"""Random scaling of branches, one coefficient an image: shake-shake, ShakeDrop, stochastic depth.

Shake-shake and ShakeDrop multiply by one random coefficient on the way forward and by another one
on the way backward, so what comes back is not the gradient of anything. Where the true gradient is
wanted (SAM's ascent: the perturbation shall climb the loss), the forward coefficient serves for
both. `true_gradient` may be a traced boolean.
"""

import jax
import jax.numpy as jnp
from jax import lax


def _shape(x):
    return (x.shape[0],) + (1,) * (x.ndim - 1)


def _forward_and_backward(forward, backward):
    """The value of one and the gradient of the other."""
    return backward + lax.stop_gradient(forward - backward)


def shake_shake(a: jax.Array, b: jax.Array, forward: jax.Array, backward: jax.Array) -> jax.Array:
    """a c + b (1 - c), with c = `forward` for the value and c = `backward` for the gradient.

    Args:
      a, b: the branches, (N, H, W, C).
      forward, backward: coefficients in [0, 1], (N, 1, 1, 1).

    Source: Gastaldi, "Shake-Shake regularization", 2017.
    """
    return _forward_and_backward(a * forward + b * (1 - forward), a * backward + b * (1 - backward))


def random_shake_shake(
    a: jax.Array, b: jax.Array, key: jax.Array, true_gradient: bool | jax.Array = False
) -> jax.Array:
    """`shake_shake` with coefficients from U[0, 1], independent unless `true_gradient`."""
    forward, backward = (
        jax.random.uniform(k, _shape(a)).astype(a.dtype) for k in jax.random.split(key)
    )
    return shake_shake(a, b, forward, jnp.where(true_gradient, forward, backward))


def shake_drop(x: jax.Array, mask: jax.Array, forward: jax.Array, backward: jax.Array) -> jax.Array:
    """x (m + c - m c): as it is where the mask m is 1, times a random c where it is 0.

    Args:
      x: the branch, (N, H, W, C).
      mask: 0 or 1, (N, 1, 1, 1).
      forward, backward: coefficients c of the value and of the gradient, (N, 1, 1, 1).

    Source: Yamada et al., "ShakeDrop Regularization for Deep Residual Learning", equation 6.
    """
    return _forward_and_backward(*(x * (mask + c - mask * c) for c in (forward, backward)))


def random_shake_drop(
    x: jax.Array, key: jax.Array, keep_rate: float, true_gradient: bool | jax.Array = False
) -> jax.Array:
    """`shake_drop` with P(mask = 1) = keep_rate, forward from U[-1, 1] and backward from U[0, 1].

    With `true_gradient` the forward coefficient serves for both.
    """
    keys = jax.random.split(key, 3)
    mask = jax.random.bernoulli(keys[0], keep_rate, _shape(x)).astype(x.dtype)
    forward = jax.random.uniform(keys[1], _shape(x), minval=-1.0).astype(x.dtype)
    backward = jax.random.uniform(keys[2], _shape(x)).astype(x.dtype)
    return shake_drop(x, mask, forward, jnp.where(true_gradient, forward, backward))


def stochastic_depth(x: jax.Array, keep: jax.Array, keep_rate: float) -> jax.Array:
    """x / keep_rate where `keep` is 1, and 0 where it is 0, so that the mean is x.

    Args:
      x: the branch, (N, H, W, C).
      keep: 0 or 1, (N, 1, 1, 1).
      keep_rate: probability of 1.

    Source: Huang et al., "Deep Networks with Stochastic Depth", scaled as in EfficientNet.
    """
    return x / keep_rate * keep


def random_stochastic_depth(x: jax.Array, key: jax.Array, keep_rate: float) -> jax.Array:
    """`stochastic_depth` with P(keep = 1) = keep_rate for each image."""
    keep = jax.random.bernoulli(key, keep_rate, _shape(x)).astype(x.dtype)
    return stochastic_depth(x, keep, keep_rate)
