"""Fake-quantised weights and activations, and the min-max step that trains them without data.

The kernel of ZSAQ (SAM-SGA, EMNLP 2023, arXiv 2310.13315), zero-shot sharpness-aware quantisation:
a full-precision teacher, a quantised student x that comes close to it on what a generator y makes,
and the generator, which looks for where they differ:

    min over x, max over y of f(x, y) = D(teacher(G_y(z)), student_Q(x)(G_y(z)))

The student descends sharpness-awarely. D, rho and the rates are the caller's. Worked examples are
`sam_jax/benchmarks/quantize_language.py`, a language model as in the paper, and
`quantize_digits.py`; what they gain stands in `docs/quantization.md`.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax


def fake_quantize(w: jax.Array, bits: int, per_channel: bool = False) -> jax.Array:
    """Rounds weights to a uniform grid that is symmetric about 0, and keeps them as floats.

    Q(w) = s round(w / s) with s = max|w| / n, n = 2^(bits - 1) - 1: one of 2^bits - 1 levels
    -n s, ..., 0, ..., n s. Nothing is clipped; halves go to the even level; w = 0 stays 0.
    Straight through: the derivative, in both modes, is that of the identity, so neither the
    rounding nor s has one of its own.

    Args:
      w: a kernel, float, any shape; the output channels are the last axis.
      bits: a Python int >= 2.
      per_channel: whether each output channel has a scale s of its own.

    Raises:
      ValueError: bits < 2, where 0 would be the only level.
    """
    return _on_grid(w, bits, tuple(range(w.ndim - 1)) if per_channel else None)


def fake_quantize_activations(x: jax.Array, bits: int, per_token: bool = True) -> jax.Array:
    """Rounds activations as `fake_quantize` rounds weights, at scales of the numbers at hand.

    Args:
      x: (..., C), such as tokens (N, L, C).
      bits: a Python int >= 2.
      per_token: one scale for each vector of C numbers. Otherwise there is one for the whole array;
        what comes of a text then depends on the others of its batch and, in a decoder, on the
        tokens to come.

    Raises:
      ValueError: bits < 2.
    """
    return _on_grid(x, bits, -1 if per_token else None)


def _on_grid(x, bits, axes):
    """x on the grid of the largest |x| over `axes`, with the identity's derivative."""
    if bits < 2:
        raise ValueError(f'bits is {bits}; it must be at least 2, for the levels -1, 0 and 1.')
    levels = 2 ** (bits - 1) - 1
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / levels
    rounded = scale * jnp.round(x / jnp.where(scale > 0, scale, 1.0))
    # x - x is 0 and not nearly so: the values stay on the grid.
    return lax.stop_gradient(rounded) + (x - lax.stop_gradient(x))


def quantized_inputs(bits: int | None, per_token: bool = True) -> contextlib.AbstractContextManager:
    """Returns a context within which each Dense layer of flax rounds what it is given.

    With `quantize_kernels` this is WxAy: `with quantized_inputs(y): model.apply(...)`. Products of
    attention, norms, embeddings and an output that is tied to them are computed as they are.

    Args:
      bits, per_token: as of `fake_quantize_activations`; None leaves them as they are.
    """
    if bits is None:
        return contextlib.nullcontext()

    def intercept(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.method_name == '__call__':
            args = (fake_quantize_activations(args[0], bits, per_token), *args[1:])
        return call(*args, **kwargs)

    return nn.intercept_methods(intercept)


def quantize_kernels(params: optax.Params, bits: int, per_channel: bool = False) -> optax.Params:
    """Fake-quantises the kernels of a model, each with a scale (or scales) of its own.

    Kernels are the leaves of that name: of dense layers and of convolutions. Embeddings, positions,
    biases and what norms learn stay.

    Args:
      params: pytree of parameters.
      bits, per_channel: as of `fake_quantize`.
    """

    def quantize(path, w):
        is_kernel = getattr(path[-1], 'key', None) == 'kernel'
        return fake_quantize(w, bits, per_channel) if is_kernel else w

    return jax.tree_util.tree_map_with_path(quantize, params)


def min_max_step(
    f: Callable[[Any, Any], jax.Array],
    x: Any,
    y: Any,
    states: tuple[Any, Any],
    descent: optax.GradientTransformation,
    ascent: optax.GradientTransformation,
    **extra_args,
) -> tuple[Any, Any, tuple[Any, Any]]:
    """One step of min over x, max over y of f(x, y): x descends, then y ascends at the new x.

    With descent = chain(sam(rho), sgd(a)), ascent = sgd(b) and n(v) = v / ||v||_2:
        x <- x - a grad_x f(x + rho n(grad_x f(x, y)), y)
        y <- y + b grad_y f(x, y)
    Whether the paper's generator, which alternates with the student, sees the old one or the new
    the sources do not tell. `sharpness.erm` in place of sam makes it the plain step, of two
    gradients in place of three. Pure.

    Args:
      f: (x, y) -> scalar. All gradients are of this one function, so what is random in it (latents,
        a batch) is to be bound beforehand.
      x, y: pytrees of parameters.
      states: (descent.init(x), ascent.init(y)), or those of the step before.
      descent: optax transformation for x. It is given `grad_fn`, so any method of
        `sam_jax.sharpness` that asks for no more may stand in its chain.
      ascent: the same for y. It is given the gradients of -f, so it climbs f where it would descend
        a loss; a method of `sam_jax.sharpness` in it perturbs y towards lower f.
      **extra_args: handed to both, `key` for instance.

    Returns:
      (x, y, states), the new ones.
    """
    x, x_state = _descend(descent, lambda x: jax.grad(f)(x, y), x, states[0], extra_args)
    y, y_state = _descend(
        ascent, lambda y: jax.grad(lambda y: -f(x, y))(y), y, states[1], extra_args
    )
    return x, y, (x_state, y_state)


def _descend(tx, grad_fn, params, state, extra_args):
    tx = optax.with_extra_args_support(tx)
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn, **extra_args)
    return optax.apply_updates(params, updates), state
