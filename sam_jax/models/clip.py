"""CLIP (Radford et al., ICML 2021): a tower for images, a causal one for text, and one space.

As in Hugging Face's transformers, whose files `pretrained` reads. LayerNorm stands in front of
attention and perceptron, and once more in front of the image tower's first block.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam_jax.models import layers, transformer
from sam_jax.models.transformer import Size as TowerSize


class Size(NamedTuple):
    """The two towers, the space they share, the number of tokens, and the longest text."""

    image: TowerSize
    text: TowerSize
    projection: int
    vocabulary: int = 49_408
    length: int = 77


SIZES = {
    # For tests, and for what a CPU trains in minutes. Its tokens are bytes, see `bpe`.
    'tiny': Size(TowerSize(32, 2, 2), TowerSize(32, 2, 2), 32, vocabulary=514, length=40),
    'b': Size(TowerSize(768, 12, 12), TowerSize(512, 12, 8), 512),
    'l': Size(TowerSize(1024, 24, 16), TowerSize(768, 12, 12), 768),
}

LOGIT_SCALE = math.log(1 / 0.07)  # where training from scratch begins


class Tower(transformer.Transformer, nn.Module, kw_only=True):
    """Blocks of attention and perceptron; the sum that runs through them stays float32 at least.

    Attributes:
      size: width, depth and heads.
      exact_gelu: Gauss's integral; otherwise x sigmoid(1.702 x), as OpenAI's.
      causal: whether a token sees none that come after it.
      remat: compute the activations within a block anew in the backward pass.
      dtype, param_dtype: of the computation, of the params.
    """

    size: TowerSize
    exact_gelu: bool = False
    causal: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def learned(self, leaf: str, shape: tuple[int, ...], deviation: float, name: str) -> jax.Array:
        """A param by itself, normal at the start."""
        return layers.Learned(
            leaf=leaf,
            shape=shape,
            initializer=nn.initializers.normal(deviation),
            param_dtype=self.param_dtype,
            name=name,
        )().astype(self.wide)

    def _perceptron(self, x, name):
        x = self.dense(x, 4 * self.size.width, f'{name}_mlp1')
        x = nn.gelu(x, approximate=False) if self.exact_gelu else x * nn.sigmoid(1.702 * x)
        return self.dense(x, self.size.width, f'{name}_mlp2')

    def _block(self, x, name):
        seen = transformer.causal(x.shape[1]) if self.causal else None
        branch = self.attention(self.layer_norm(x, f'{name}_ln1'), self.size.heads, name, seen)
        x = x + branch.astype(x.dtype)
        return x + self._perceptron(self.layer_norm(x, f'{name}_ln2'), name).astype(x.dtype)

    def blocks(self, x: jax.Array) -> jax.Array:
        """All blocks, of tokens (N, T, C)."""
        for i in range(self.size.depth):
            block = functools.partial(Tower._block, name=f'block{i}')
            x = (nn.remat(block) if self.remat else block)(self, x)
        return x


class ImageTower(Tower, kw_only=True):
    """Images (N, H, W, C) -> what the class token says of each, (N, width).

    Attributes:
      patch: side of a patch in pixels.
    """

    patch: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        transformer.require_whole_patches(images, self.patch)
        channels = self.size.width
        x = nn.Conv(
            channels,
            (self.patch, self.patch),
            (self.patch, self.patch),
            padding='VALID',
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name='embedding',
        )(images.astype(self.dtype))
        n, rows, columns, _ = x.shape
        x = x.astype(self.wide).reshape(n, rows * columns, channels)
        token = self.learned('token', (channels,), channels**-0.5, 'class_token')
        x = jnp.concatenate([jnp.broadcast_to(token, (n, 1, channels)), x], axis=1)
        x = x + self.learned('position', x.shape[1:], 0.02, 'positions')[None]
        x = self.blocks(self.layer_norm(x, 'ln_pre', self.wide))
        return self.layer_norm(x[:, 0], 'ln_final', self.wide)


class TextTower(Tower, kw_only=True):
    """Embedded texts (N, T, C) and the places of their last tokens (N,) -> (N, width).

    Attributes:
      length: of the longest text.
    """

    length: int

    @nn.compact
    def __call__(self, embedded: jax.Array, last: jax.Array) -> jax.Array:
        n, tokens, channels = embedded.shape
        positions = self.learned('position', (self.length, channels), 0.01, 'positions')
        x = self.blocks(embedded.astype(self.wide) + positions[None, :tokens])
        return self.layer_norm(x[jnp.arange(n), last], 'ln_final', self.wide)


class CLIP(nn.Module, kw_only=True):
    """Both towers, their projections, and the scale of the similarities.

    Attributes:
      size: Size.
      patch, exact_gelu, remat, dtype, param_dtype: of the towers.
    """

    size: Size
    patch: int
    exact_gelu: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        shared = {
            name: getattr(self, name) for name in ('exact_gelu', 'remat', 'dtype', 'param_dtype')
        }
        size = self.size
        self.image = ImageTower(size=size.image, patch=self.patch, **shared)
        self.text = TextTower(size=size.text, length=size.length, causal=True, **shared)
        self.tokens = nn.Embed(
            size.vocabulary,
            size.text.width,
            embedding_init=nn.initializers.normal(0.02),
            param_dtype=self.param_dtype,
        )
        self.image_projection, self.text_projection = (
            nn.Dense(
                size.projection,
                use_bias=False,
                param_dtype=self.param_dtype,
                kernel_init=nn.initializers.normal(width**-0.5),
            )
            for width in (size.image.width, size.text.width)
        )
        self.logit_scale = layers.Learned(
            leaf='scale',
            shape=(),
            initializer=nn.initializers.constant(LOGIT_SCALE),
            param_dtype=self.param_dtype,
        )

    def encode_images(self, images: jax.Array) -> jax.Array:
        """Images (N, H, W, C) -> (N, projection), float32 at least."""
        return self.image_projection(self.image(images))

    def embed(self, ids: jax.Array) -> jax.Array:
        """Tokens by number (N, T) -> (N, T, width)."""
        return self.tokens(ids)

    def encode_texts(self, embedded: jax.Array, last: jax.Array) -> jax.Array:
        """Embedded texts (N, T, width), and the places of their end tokens -> (N, projection)."""
        return self.text_projection(self.text(embedded, last))

    def similarities(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """exp(scale) cos(image, text) of projections: (N, projection), (M, ...) -> (N, M)."""
        images, texts = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
        return jnp.exp(self.logit_scale()) * images @ texts.T

    def __call__(self, images: jax.Array, ids: jax.Array) -> jax.Array:
        """Images and texts, whose end token has the highest number -> similarities (N, M)."""
        texts = self.encode_texts(self.embed(ids), jnp.argmax(ids, axis=-1))
        return self.similarities(self.encode_images(images), texts)
