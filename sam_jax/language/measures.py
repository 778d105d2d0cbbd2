"""A model's loss on a text, and its accuracy on sentences; masked positions do not count."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import losses

BATCH = 64


def masked_mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns sum(m v) / sum(m), a scalar; 0 where nothing is there.

    Args:
      values: any shape.
      mask: of that shape, or None for all.
    """
    if mask is None:
        return jnp.mean(values)
    weights = mask.astype(values.dtype)
    # A value that does not count may be anything, NaN too.
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(weights), 1)


class Total(NamedTuple):
    """The loss on a text.

    Attributes:
      nats: the sum over all tokens that count.
      tokens: their number.
    """

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits(self) -> float:
        """Bits a token: of characters, bits per character."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; the size of the vocabulary for a model that knows nothing."""
        return math.exp(self.loss)

    def perplexity_per(self, units: int) -> float:
        """exp(nats / units): of words, where tokens are pieces of them or characters."""
        return math.exp(self.nats / units)


def of_text(
    logits_of: Callable[[jax.Array], jax.Array],
    windows: np.ndarray,
    mask: np.ndarray | None = None,
    batch: int = BATCH,
) -> Total:
    """Returns the loss of predicting each token but the first of each window from those before.

    Args:
      logits_of: tokens (batch, L) -> logits (batch, L, V).
      windows: (N, L + 1) tokens, see `texts.windows`. A context begins with its window.
      mask: (N, L), which of the predicted tokens windows[:, 1:] count; None for all.
      batch: windows at a time; the last ones are filled up and what fills them does not count.
    """
    if mask is None:
        mask = np.ones((len(windows), windows.shape[1] - 1), bool)
    nats = 0.0
    for begin in range(0, len(windows), batch):
        part, counts = windows[begin : begin + batch], mask[begin : begin + batch]
        rows = batch - len(part)
        part = np.pad(part, ((0, rows), (0, 0)))
        counts = np.pad(counts, ((0, rows), (0, 0)))
        values = losses.cross_entropy(
            logits_of(jnp.asarray(part[:, :-1])), jnp.asarray(part[:, 1:])
        )
        nats += float(np.sum(np.asarray(values, np.float64), where=counts))
    return Total(nats, int(mask.sum()))


def of_sentences(
    logits_of: Callable[..., jax.Array],
    inputs: tuple[np.ndarray, ...],
    labels: np.ndarray,
    batch: int = BATCH,
) -> float:
    """Returns the share of sentences whose class has the largest logit, in %.

    Args:
      logits_of: (tokens, mask, types), each (batch, L) -> logits (batch, classes).
      inputs: (tokens, mask, types) of all, see `sentences.encode`.
      labels: (N,).
      batch: sentences at a time; the last ones are filled up and what fills them does not count.
    """
    right = 0
    for begin in range(0, len(labels), batch):
        parts = [x[begin : begin + batch] for x in inputs]
        rows = batch - len(parts[0])
        logits = np.asarray(logits_of(*(np.pad(x, ((0, rows), (0, 0))) for x in parts)))
        wanted = labels[begin : begin + batch]
        right += int(np.sum(logits[: len(wanted)].argmax(-1) == wanted))
    return 100 * right / len(labels)
