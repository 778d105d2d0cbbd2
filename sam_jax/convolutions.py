"""On CPU: every convolution in the form that XLA runs fast, wherever in a program it stands.

XLA's CPU backend has a fast kernel for convolutions whose dimensions are (batch, spatial, features),
with filters (spatial, in, out). It brings others into that form in the entry computation of a
program only: those in a `cond`, a `scan` or a `while` run in nested loops, some 60 times slower.
The forward pass of `flax.linen.Conv` is in that form; both gradients that JAX makes of it are not.
The rule below, which JAX asks how to write down a convolution for CPUs, rewrites

  any layout              as transposes around a convolution in the fast one;
  a gradient of the       (a window larger than the result, summed over the images) as a sum over a
  filter                  few images at a time, whose patches stay in the cache;
  a dilated input         (the gradient of a convolution with strides) as one convolution for each
                          phase of the result, none of which multiplies the zeros in between.

Nothing changes but the rounding of sums. docs/convolutions.md has figures, and when this can go.
"""

import functools
import itertools
import logging
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import mlir

# What a part of a filter's gradient reads: about as much as a core has of its own cache.
_PART_BYTES = 2 ** 21


def install() -> bool:
    """Has JAX lower convolutions by this module's rule on CPU. `sam_jax.models` does so on import.

    Returns:
      Whether it could. What it needs of JAX's internals may not be there in another version; then
      nothing changes, and one line in the log says so.
    """
    try:
        from jax._src.lax.convolution import _conv_general_dilated_lower as original
        rule = functools.partial(_lower, functools.partial(
            original, expand_complex_convolutions=True))
        mlir.register_lowering(lax.conv_general_dilated_p, rule, platform='cpu')
    except (ImportError, AttributeError, TypeError) as e:
        logging.getLogger('sam_jax').warning(
            'Convolutions in a cond, scan or while are slow on CPU: this version of JAX has no '
            'place for the rule of sam_jax.convolutions (%s).', e)
        return False
    return True


def _lower(original, ctx, lhs, rhs, **settings):
    """The lowering rule: the first rewriting that applies, or JAX's own rule."""
    rewritten = _rewriting(*ctx.avals_in, *ctx.avals_out, _is_whole(ctx), settings)
    if rewritten is None:
        return original(ctx, lhs, rhs, **settings)
    settings['out_sharding'] = None
    return mlir.lower_fun(
        functools.partial(rewritten, **settings), multiple_results=False)(ctx, lhs, rhs)


def _rewriting(lhs, rhs, out, whole, settings):
    """Returns (lhs, rhs, **settings) -> an equal result by simpler convolutions, or None."""
    known = all(isinstance(n, int) for n in (*lhs.shape, *rhs.shape)) and all(
        isinstance(n, (int, np.integer)) for pair in settings['padding'] for n in pair)
    sharding = settings['out_sharding']
    sharded = sharding is not None and any(axis is not None for axis in sharding.spec)
    empty = 0 in (*lhs.shape, *rhs.shape, *out.shape)
    if not known or sharded or empty or not jnp.issubdtype(lhs.dtype, jnp.floating):
        return None
    numbers = settings['dimension_numbers']
    ungrouped = settings['feature_group_count'] == settings['batch_group_count'] == 1
    if ungrouped and _is_dilated_input(settings):
        return _by_phases
    if ungrouped and whole and _is_filter_gradient(lhs, rhs, out, settings['dimension_numbers']):
        return _in_parts
    if numbers != _fast_numbers(lhs.ndim):
        return _transposed
    return None


def _is_whole(ctx):
    """Whether the arrays of a lowering are those of one device, and not yet to be cut by XLA."""
    context = ctx.module_context.axis_context
    if hasattr(context, 'num_devices'):
        return context.num_devices == 1
    return frozenset(context.manual_axes) == frozenset(context.mesh.axis_names)


def _fast_numbers(ndim):
    spatial = tuple(range(1, ndim - 1))
    return lax.ConvDimensionNumbers(
        (0, ndim - 1, *spatial), (ndim - 1, ndim - 2, *range(ndim - 2)), (0, ndim - 1, *spatial))


def _transposed(lhs, rhs, *, dimension_numbers, **settings):
    fast = _fast_numbers(lhs.ndim)
    lhs = jnp.transpose(lhs, _moves(dimension_numbers.lhs_spec, fast.lhs_spec))
    rhs = jnp.transpose(rhs, _moves(dimension_numbers.rhs_spec, fast.rhs_spec))
    result = lax.conv_general_dilated_p.bind(lhs, rhs, dimension_numbers=fast, **settings)
    return jnp.transpose(result, _moves(fast.out_spec, dimension_numbers.out_spec))


def _moves(source, target):
    """The permutation for `transpose` from dimensions at places `source` to `target`."""
    permutation = [0] * len(source)
    for old, new in zip(source, target):
        permutation[new] = old
    return permutation


def _is_filter_gradient(lhs, rhs, out, numbers):
    window = math.prod(rhs.shape[d] for d in numbers.rhs_spec[2:])
    positions = math.prod(out.shape[d] for d in numbers.out_spec[2:])
    return window > positions and lhs.shape[numbers.lhs_spec[1]] > _part_size(lhs, rhs, numbers)


def _part_size(lhs, rhs, numbers):
    """How many of what is contracted, in a filter's gradient the images, are summed at a time."""
    count = lhs.shape[numbers.lhs_spec[1]]
    return max(1, _PART_BYTES * count // (lhs.size * lhs.dtype.itemsize + rhs.size * rhs.dtype.itemsize))


def _in_parts(lhs, rhs, *, dimension_numbers, preferred_element_type, **settings):
    """A sum over parts of what is contracted: in a filter's gradient these are the images."""
    dtype = preferred_element_type or lhs.dtype
    sum_dtype = jnp.promote_types(dtype, jnp.float32)
    axes = dimension_numbers.lhs_spec[1], dimension_numbers.rhs_spec[1]
    size = _part_size(lhs, rhs, dimension_numbers)
    count, rest = divmod(lhs.shape[axes[0]], size)

    def of_part(start, size):
        return lax.conv_general_dilated_p.bind(
            *(lax.dynamic_slice_in_dim(x, start, size, axis) for x, axis in zip((lhs, rhs), axes)),
            dimension_numbers=dimension_numbers, preferred_element_type=sum_dtype, **settings)

    total = of_part(0, rest or size)
    total = lax.fori_loop(
        0, count if rest else count - 1,
        lambda i, total: total + of_part((rest or size) + i * size, size), total)
    return total.astype(dtype)


def _is_dilated_input(settings):
    return any(d > 1 for d in settings['lhs_dilation']) and all(
        d == 1 for d in (*settings['window_strides'], *settings['rhs_dilation']))


def _by_phases(lhs, rhs, *, dimension_numbers, lhs_dilation, padding, **settings):
    """Of an input dilated by d the results at places r, r + d, r + 2d, ... share their taps.

    Tap k of result o meets the input at o + k - low, which is no zero if d divides it. So results
    o = r + d q need the taps k = k0 + d j alone, k0 = (low - r) mod d, at the inputs
    q + j + (r + k0 - low) / d.
    """
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    ndim = lhs.ndim
    phases = []
    sizes = [low + high + (lhs.shape[a] - 1) * d + 1 - rhs.shape[b] + 1
             for (low, high), d, a, b in zip(padding, lhs_dilation, lhs_spec[2:], rhs_spec[2:])]
    for offsets in itertools.product(*(range(d) for d in lhs_dilation)):
        taps, pads = [slice(None)] * ndim, []
        for r, d, (low, _), size, a, b in zip(
                offsets, lhs_dilation, padding, sizes, lhs_spec[2:], rhs_spec[2:]):
            first = (low - r) % d
            taps[b] = slice(first, None, d)
            results, width = -(-(size - r) // d), len(range(first, rhs.shape[b], d))
            before = -(r + first - low) // d
            pads.append((before, results + width - 1 - before - lhs.shape[a]))
        phases.append((offsets, rhs[tuple(taps)], tuple(pads)))
    result = jnp.zeros((), settings['preferred_element_type'] or lhs.dtype)
    for offsets, part, pads in phases:
        if 0 in part.shape:  # no tap meets an input: a phase of zeros
            continue
        value = lax.conv_general_dilated_p.bind(
            lhs, part, dimension_numbers=dimension_numbers, padding=pads,
            lhs_dilation=(1,) * len(pads), **settings)
        spread = [(0, 0, 0)] * ndim
        for place, r, d, size in zip(out_spec[2:], offsets, lhs_dilation, sizes):
            spread[place] = (r, size - 1 - r - (value.shape[place] - 1) * d, d - 1)
        result += lax.pad(value, jnp.zeros((), value.dtype), spread)
    return result
