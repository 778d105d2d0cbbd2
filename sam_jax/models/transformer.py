"""What transformers share: dense layers, norms, attention, patches."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam_jax.errors import UserError


class Size(NamedTuple):
    """Numbers of each token, of blocks, and of heads of each attention."""

    width: int
    depth: int
    heads: int


def causal(length: int) -> jax.Array:
    """Returns which tokens each token sees if none that come after it: (1, 1, length, length)."""
    order = jnp.arange(length)
    return (order[:, None] >= order[None])[None, None]


def require_whole_patches(images: jax.Array, patch: int) -> None:
    """Raises UserError unless images (N, H, W, C) are a whole number of patches high and wide."""
    height, width = images.shape[1:3]
    if height % patch or width % patch:
        raise UserError(
            f'The patches of model.name are {patch}x{patch}; images of {height}x{width} are no '
            f'whole number of them: set data.image_size to a multiple of {patch}.'
        )


class Transformer:
    """A part of flax modules that are transformers.

    Attention and perceptrons give `dtype`; the sum that runs through the blocks is `wide`.

    Attributes:
      dtype, param_dtype: of the module.
      layer_norm_epsilon: added to the variance.
      dense_init: initialiser of the kernels of dense layers.
    """

    dtype: Any
    param_dtype: Any

    # No annotations: constants of the architecture and no options.
    layer_norm_epsilon = 1e-5
    dense_init: Callable[..., jax.Array] = staticmethod(nn.initializers.xavier_uniform())

    @property
    def wide(self) -> Any:
        """Dtype of the sum that runs through the blocks: float32 at least."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def dense(self, x: jax.Array, width: int, name: str, **options) -> jax.Array:
        """A dense layer on the last axis."""
        options = {'kernel_init': self.dense_init, 'dtype': self.dtype, **options}
        return nn.Dense(width, param_dtype=self.param_dtype, name=name, **options)(x)

    def layer_norm(self, x: jax.Array, name: str, dtype: Any = None) -> jax.Array:
        """LayerNorm, its mean and variance in float32 at least."""
        return nn.LayerNorm(
            epsilon=self.layer_norm_epsilon,
            dtype=dtype or self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )(x)

    def attention(
        self, x: jax.Array, heads: int, name: str, seen: jax.Array | None = None
    ) -> jax.Array:
        """softmax(q k^T / sqrt(d)) v in each head, of tokens (N, T, C).

        Args:
          x: tokens.
          heads: their number; d is C / heads.
          name: in front of those of the four dense layers.
          seen: (N or 1, 1, T or 1, T), which tokens each token sees; None for all.
        """
        shape = (*x.shape[:-1], heads, x.shape[-1] // heads)
        q, k, v = (
            self.dense(x, x.shape[-1], f'{name}_{part}').reshape(shape)
            for part in ('query', 'key', 'value')
        )
        scores = jnp.einsum('nqhd,nkhd->nhqk', q / math.sqrt(shape[-1]), k).astype(self.wide)
        if seen is not None:
            # The lowest number and not -inf: a token that sees none has finite numbers as well.
            scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum('nhqk,nkhd->nqhd', jax.nn.softmax(scores).astype(v.dtype), v)
        return self.dense(mixed.reshape(x.shape), x.shape[-1], f'{name}_out')
