"""Vision Transformer (Dosovitskiy et al., ICLR 2021), as in its authors' big_vision.

LayerNorm stands in front of attention and perceptron. Positions are added to the patches before the
class token joins them; a position of its own would be the same as another class token.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam_jax.errors import UserError
from sam_jax.models import layers, shake, transformer
from sam_jax.models.layers import Learned
from sam_jax.models.transformer import Size, Transformer

SIZES = {
    'tiny': Size(32, 2, 2),  # for tests; not Ti
    'ti': Size(192, 12, 3),
    's': Size(384, 12, 6),
    'b': Size(768, 12, 12),
    'l': Size(1024, 24, 16),
    'h': Size(1280, 32, 16),
}

POSITIONS = ('learned', 'sincos2d')

_TEMPERATURE = 10_000.0
_nearly_zero = nn.initializers.normal(1e-6)


def sincos2d(rows: int, columns: int, width: int, dtype: Any = jnp.float32) -> jax.Array:
    """Positions of a grid of patches that are not learned, as MoCo v3 has them.

    With w_k = 10000^(-k / (width / 4 - 1)), k < width / 4, the patch at row y and column x has
    sin(w_k x), cos(w_k x), sin(w_k y), cos(w_k y), all k of each in turn.

    Returns:
      (rows * columns, width), row by row.
    """
    k = jnp.arange(width // 4, dtype=dtype)
    omega = _TEMPERATURE ** -(k / max(width // 4 - 1, 1))
    y, x = (jnp.arange(n, dtype=dtype)[:, None] * omega[None] for n in (rows, columns))
    y, x = jnp.repeat(y, columns, axis=0), jnp.tile(x, (rows, 1))
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)


class ViT(Transformer, layers.Network, kw_only=True):
    """Vision Transformer.

    The sum that runs through the blocks stays in float32 at least; norms, attention and perceptrons
    give `dtype`.

    Attributes:
      patch: side of a patch in pixels.
      width: numbers of each token; the perceptrons are four times as wide.
      depth: number of blocks.
      heads: of each attention.
      class_token: whether the head reads a class token; otherwise the mean over the patches.
      positions: 'learned', one vector for each patch, or 'sincos2d'.
      exact_gelu: Gauss's integral, as timm and transformers have it; otherwise its approximation by
        tanh, with which big_vision trains.
      dropout_rate: behind the positions, within each perceptron, and of what each branch adds (rng
        'dropout').
      stochastic_depth_rate: rate at which both branches of the last block are dropped; block k of K
        (from 0) has k / (K - 1) of it (rng 'dropout').
    """

    patch: int
    width: int
    depth: int
    heads: int
    class_token: bool = True
    positions: str = 'learned'
    exact_gelu: bool = False
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0

    layer_norm_epsilon = 1e-6
    head_init = staticmethod(nn.initializers.zeros)

    def __post_init__(self):
        if self.patch < 1:
            raise UserError(f'A ViT with patches of {self.patch} does not exist: at least 1.')
        if self.positions not in POSITIONS:
            raise UserError(
                f'model.positions is {self.positions!r}; it must be one of {", ".join(POSITIONS)}.'
            )
        layers.require_rate('dropout_rate', self.dropout_rate)
        layers.require_rate('stochastic_depth_rate', self.stochastic_depth_rate)
        super().__post_init__()

    def _dropout(self, x, train):
        return nn.Dropout(self.dropout_rate, deterministic=not train)(x)

    def _perceptron(self, x, train, name):
        x = self.dense(x, 4 * self.width, f'{name}_mlp1', bias_init=_nearly_zero)
        x = self._dropout(nn.gelu(x, approximate=not self.exact_gelu), train)
        return self.dense(x, self.width, f'{name}_mlp2', bias_init=_nearly_zero)

    def _add(self, x, branch, drop_rate, train):
        branch = self._dropout(branch, train)
        if train and drop_rate:
            branch = shake.random_stochastic_depth(branch, self.make_rng('dropout'), 1 - drop_rate)
        return x + branch.astype(x.dtype)

    def _block(self, x, drop_rate, train, name):
        branch = self.attention(self.layer_norm(x, f'{name}_ln1'), self.heads, name)
        x = self._add(x, branch, drop_rate, train)
        branch = self._perceptron(self.layer_norm(x, f'{name}_ln2'), train, name)
        return self._add(x, branch, drop_rate, train)

    def _embed(self, images):
        """Tokens (N, T, C) of images, with the positions of the patches."""
        transformer.require_whole_patches(images, self.patch)
        x = self.conv(
            images.astype(self.dtype),
            self.width,
            self.patch,
            self.patch,
            'embedding',
            padding='VALID',
            use_bias=True,
        ).astype(self.wide)
        n, rows, columns, channels = x.shape
        if self.positions == 'learned':
            positions = Learned(
                leaf='position',
                shape=(rows * columns, channels),
                initializer=nn.initializers.normal(channels**-0.5),
                param_dtype=self.param_dtype,
                name='positions',
            )()
        else:
            positions = sincos2d(rows, columns, channels, x.dtype)
        x = x.reshape(n, rows * columns, channels) + positions[None].astype(x.dtype)
        if self.class_token:
            token = Learned(
                leaf='token',
                shape=(channels,),
                initializer=nn.initializers.zeros,
                param_dtype=self.param_dtype,
                name='class_token',
            )()
            token = jnp.broadcast_to(token.astype(x.dtype), (n, 1, channels))
            x = jnp.concatenate([token, x], axis=1)
        return x

    @nn.compact
    def __call__(self, images, train=False):
        x = self._dropout(self._embed(images), train)
        for block in range(self.depth):
            drop_rate = self.stochastic_depth_rate * block / max(self.depth - 1, 1)
            x = self.run_block(
                functools.partial(
                    ViT._block, drop_rate=drop_rate, train=train, name=f'block{block}'
                ),
                x,
            )
        x = self.layer_norm(x, 'ln_final', self.wide)
        return self.head(x[:, 0] if self.class_token else jnp.mean(x, axis=1))
