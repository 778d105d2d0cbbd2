"""Language models: OPT's decoder and BERT's encoder, as transformers has them.

Both take tokens as integers (N, L) or as distributions over the vocabulary (N, L, V), which are
what a generator that is differentiated gives; an integer is the distribution of one token.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam_jax.errors import UserError
from sam_jax.models import layers
from sam_jax.models.layers import Learned
from sam_jax.models.transformer import Transformer, causal

_init = nn.initializers.normal(0.02)


class LanguageModel(Transformer, layers.Network, kw_only=True):
    """What both have in common.

    The sum that runs through the blocks stays in float32 at least; attention and perceptrons give
    `dtype`.

    Attributes:
      num_classes: of the sentence; 0 for logits over the vocabulary at every token.
      vocabulary: number of tokens.
      length: number of positions, the longest text.
      width: numbers of each token.
      depth: number of blocks.
      heads: of each attention.
      hidden: width within the perceptrons; 0 for four times `width`.
      dropout_rate: of the embeddings and of what each branch adds (rng 'dropout').
    """

    num_classes: int = 0
    vocabulary: int
    length: int
    width: int
    depth: int
    heads: int
    hidden: int = 0
    dropout_rate: float = 0.0

    dense_init = staticmethod(_init)

    def __post_init__(self):
        layers.require_rate('dropout_rate', self.dropout_rate)
        if self.width % self.heads:
            raise UserError(
                f'A width of {self.width} does not divide among {self.heads} heads: it must be a '
                'multiple of them.'
            )
        super().__post_init__()

    def _dropout(self, x, train):
        return nn.Dropout(self.dropout_rate, deterministic=not train)(x)

    def _table(self, leaf, shape, name):
        """A param by itself, such as the embedding of each token."""
        return Learned(
            leaf=leaf, shape=shape, initializer=_init, param_dtype=self.param_dtype, name=name
        )()

    def _require(self, tokens):
        if tokens.shape[1] > self.length:
            raise UserError(
                f'A text of {tokens.shape[1]} tokens is too long for this model: it has '
                f'{self.length} positions.'
            )

    def _perceptron(self, x, activation, name):
        x = activation(self.dense(x, self.hidden or 4 * self.width, f'{name}_mlp1'))
        return self.dense(x, self.width, f'{name}_mlp2')

    def _pre_norm(self, x, branch, train, name):
        """x + branch(norm(x))."""
        added = self._dropout(branch(self.layer_norm(x, name)), train)
        return x + added.astype(x.dtype)

    def _post_norm(self, x, branch, train, name):
        """norm(x + branch(x))."""
        added = self._dropout(branch(x), train)
        return self.layer_norm(x + added.astype(x.dtype), name, self.wide)

    def _block(self, x, seen, activation, pre_norm, train, name):
        add = self._pre_norm if pre_norm else self._post_norm
        x = add(x, lambda x: self.attention(x, self.heads, name, seen), train, f'{name}_ln1')
        return add(x, lambda x: self._perceptron(x, activation, name), train, f'{name}_ln2')

    def _blocks(self, x, seen, activation, pre_norm, train):
        for i in range(self.depth):
            block = functools.partial(
                LanguageModel._block,
                seen=seen,
                activation=activation,
                pre_norm=pre_norm,
                train=train,
                name=f'block{i}',
            )
            x = self.run_block(block, x)
        return x


def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the embeddings (N, L, C) of tokens (N, L), or means of them for (N, L, V).

    Args:
      table: (V, C).
      tokens: integers, or distributions over the vocabulary.
    """
    return table[tokens] if jnp.issubdtype(tokens.dtype, jnp.integer) else tokens @ table


def _mask(tokens, mask):
    return jnp.ones(tokens.shape[:2], bool) if mask is None else mask.astype(bool)


class Decoder(LanguageModel, kw_only=True):
    """OPT (Zhang et al., arXiv 2205.01068): each token sees itself and those before.

    logits = E h / of the last norm's output h, with E the embeddings of the tokens: input and
    output share them.

    Attributes:
      pre_norm: norms in front of the branches and a last one behind all; False for opt-350m's, on
        what each branch was added to.
      embedding_width: of the embeddings, where it is not `width` (opt-350m): one matrix leads in,
        one out.
    """

    pre_norm: bool = True
    embedding_width: int = 0

    # OPT's table has two rows in front: positions are counted from 2, and a masked token has 1.
    first_position = 2

    @nn.compact
    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Returns logits (N, L, vocabulary), in float32 at least.

        Args:
          tokens: (N, L) integers, or (N, L, V) distributions.
          mask: (N, L), which tokens are there; None for all.
          train: whether dropout is on.

        Raises:
          UserError: longer than `length`, or num_classes is not 0.
        """
        self._require(tokens)
        if self.num_classes:
            raise UserError('A decoder has no classes of sentences: leave num_classes at 0.')
        embedding_width = self.embedding_width or self.width
        there = _mask(tokens, mask)
        table = self._table('embedding', (self.vocabulary, embedding_width), 'embedding')
        positions = self._table(
            'position', (self.length + self.first_position, self.width), 'positions'
        )
        x = embed(table, tokens).astype(self.dtype)
        if embedding_width != self.width:
            x = self.dense(x, self.width, 'project_in', use_bias=False)
        number = jnp.cumsum(there, axis=1) * there - 1
        x = x.astype(self.wide) + positions[number + self.first_position].astype(self.wide)
        x = self._dropout(x, train)
        seen = causal(tokens.shape[1]) & there[:, None, None]
        x = self._blocks(x, seen, nn.relu, self.pre_norm, train)
        if self.pre_norm:
            x = self.layer_norm(x, 'ln_final', self.wide)
        if embedding_width != self.width:
            x = self.dense(x, embedding_width, 'project_out', use_bias=False, dtype=self.wide)
        return x @ table.T.astype(x.dtype)


class Encoder(LanguageModel, kw_only=True):
    """BERT (Devlin et al., arXiv 1810.04805): each token sees all.

    With classes, a sentence's logits are those of a dense layer on tanh of a dense layer on the
    first token. Without, every token's are E norm(gelu(dense(h))) + b, as of masked tokens.

    Attributes:
      types: number of kinds of tokens: 0 for the first text, 1 for the second.
    """

    types: int = 2

    layer_norm_epsilon = 1e-12
    head_init = staticmethod(_init)

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        types: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Returns logits (N, num_classes), or (N, L, vocabulary), in float32 at least.

        Args:
          tokens, mask, train: as of `Decoder`.
          types: (N, L) integers; None for 0.

        Raises:
          UserError: longer than `length`.
        """
        self._require(tokens)
        there = _mask(tokens, mask)
        table = self._table('embedding', (self.vocabulary, self.width), 'embedding')
        positions = self._table('position', (self.length, self.width), 'positions')
        of_type = self._table('embedding', (self.types, self.width), 'types')
        kinds = jnp.zeros(tokens.shape[:2], int) if types is None else types
        x = embed(table, tokens) + of_type[kinds] + positions[: tokens.shape[1]][None]
        x = self.layer_norm(x.astype(self.wide), 'ln_embedding', self.wide)
        x = self._dropout(x, train)
        gelu = functools.partial(nn.gelu, approximate=False)
        x = self._blocks(x, there[:, None, None], gelu, False, train)
        if self.num_classes:
            x = jnp.tanh(self.dense(x[:, 0], self.width, 'pooler', dtype=self.wide))
            return self.head(self._dropout(x, train))
        x = gelu(self.dense(x, self.width, 'mlm', dtype=self.wide))
        x = self.layer_norm(x, 'mlm_ln', self.wide)
        bias: Any = self._table('bias', (self.vocabulary,), 'mlm_out')
        return x @ table.T.astype(x.dtype) + bias[None, None]
