"""Training of a small language model: steps of any optax chain, in one compiled loop."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sam_jax import losses, rngs
from sam_jax.language import measures


def next_token_loss(
    model: Any, params: Any, windows: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Mean cross entropy in nats of each token but the first, predicted from those before.

    Args:
      model: a `models.language.Decoder`.
      params: its params.
      windows: (N, L + 1) tokens.
      mask: (N, L), which of windows[:, 1:] count; None for all.
    """
    logits = model.apply({'params': params}, windows[:, :-1])
    return measures.masked_mean(losses.cross_entropy(logits, windows[:, 1:]), mask)


@functools.partial(jax.jit, static_argnames=('model', 'tx', 'batch', 'length', 'steps'))
def run(
    params: Any,
    opt_state: Any,
    tokens: jax.Array,
    seed: jax.Array,
    *,
    model: Any,
    tx: optax.GradientTransformation,
    batch: int,
    length: int,
    steps: int,
) -> tuple[Any, Any, jax.Array]:
    """Takes steps on windows at random places of a text; returns (params, opt_state, losses).

    Args:
      params, opt_state: where to begin; opt_state is tx.init(params) or that of a run before.
      tokens: (n,) the text, n > length.
      seed: which windows; the k-th step of a seed has always the same.
      model: as of `next_token_loss`.
      tx: given `grad_fn`, so any method of `sam_jax.sharpness` that asks for no more may be in it.
      batch, length: windows a step, and tokens that are predicted of each.
      steps: their number.

    Returns:
      Losses (steps,), each before its step.
    """
    chain = optax.with_extra_args_support(tx)

    def step(now, i):
        params, opt_state = now
        key = rngs.key(seed, 'windows', i)
        begin = jax.random.randint(key, (batch, 1), 0, tokens.shape[0] - length)
        windows = tokens[begin + jnp.arange(length + 1)[None]]

        def loss_fn(params):
            return next_token_loss(model, params, windows)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = chain.update(grads, opt_state, params, grad_fn=jax.grad(loss_fn))
        return (optax.apply_updates(params, updates), opt_state), loss

    (params, opt_state), found = lax.scan(step, (params, opt_state), jnp.arange(steps))
    return params, opt_state, found


@functools.partial(jax.jit, static_argnames=('model',))
def continued(params: Any, tokens: jax.Array, key: jax.Array, *, model: Any) -> jax.Array:
    """Writes on: each token after the first is drawn from what the model says of those before.

    Args:
      params: of the model, a `Decoder`.
      tokens: (N, L), of which the first column is kept.
      key: of the draws.
      model: the model.

    Returns:
      (N, L) tokens.
    """

    def write(tokens, i):
        logits = model.apply({'params': params}, tokens)[:, i]
        drawn = jax.random.categorical(jax.random.fold_in(key, i), logits)
        return tokens.at[:, i + 1].set(drawn.astype(tokens.dtype)), None

    return lax.scan(write, tokens, jnp.arange(tokens.shape[1] - 1))[0]
