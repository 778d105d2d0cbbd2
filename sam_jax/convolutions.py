"""On CPU: every convolution in the form that XLA runs fast, wherever in a program it stands.

XLA's CPU backend has fast kernels for convolutions whose dimensions are (batch, spatial, features),
with filters (spatial, in, out). It brings others into that form in the entry computation of a
program only: those in a `cond`, a `scan` or a `while` run in nested loops, some 60 times slower.
The forward pass of `flax.linen.Conv` is in that form; both gradients that JAX makes of it are not.
The rule below, which JAX asks how to write down a convolution for CPUs, rewrites

  any layout              as transposes around a convolution in the fast form;
  a gradient of the       (a window larger than the result, summed over the images) as a sum over
  filter                  some images at a time, whose patches stay in the cache;
  a dilated input         (the gradient of a convolution with strides) as one convolution for each
                          phase of the result, none of which multiplies the zeros in between;
  negative padding        (where XLA's fast kernels of jax 0.10 read memory that is not theirs) as a
                          smaller image;
  few features            (a network's first layer, of images) with several neighbouring results
                          as features of one: XLA's kernels are slow on one to four features;
  a window larger than    (whose operands XLA would swap, out of the fast form) as one product of
  the image               matrices, of the image's patches and the filter.

Nothing changes but the rounding of sums. docs/convolutions.md has figures, and when this can go.
"""

import contextlib
import functools
import inspect
import itertools
import logging
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import mlir

# What a part of a filter's gradient reads: about what stays in a core's own cache beside the rest.
_PART_BYTES = 2**21

# The most features of an image that are few, and of the results that are taken together.
_FEW_FEATURES, _BLOCK_FEATURES = 4, 32

# Settings of a convolution that the rule knows what to do with.
_SETTINGS = {
    'window_strides',
    'padding',
    'lhs_dilation',
    'rhs_dilation',
    'dimension_numbers',
    'feature_group_count',
    'batch_group_count',
    'precision',
    'preferred_element_type',
    'out_sharding',
}


def install() -> bool:
    """Has JAX lower convolutions by this module's rule on CPU; `sam_jax.models` does so on import.

    Returns:
      Whether it could. What it needs of JAX's internals may not be there in another version; then
      nothing changes, and one line in the log says so.
    """
    try:
        original = _rule_of_jax()
        missing = _SETTINGS - set(inspect.signature(original.func).parameters)
        if missing:
            raise ImportError(f'no {", ".join(sorted(missing))} among the settings')
        mlir.register_lowering(
            lax.conv_general_dilated_p, functools.partial(_lower, original), platform='cpu'
        )
    except (ImportError, AttributeError, TypeError) as e:
        logging.getLogger('sam_jax').warning(
            'Convolutions inside of cond, scan and while are slow on CPU: this version of JAX has '
            'no place for the rule of sam_jax.convolutions (%s).',
            e,
        )
        return False
    return True


@contextlib.contextmanager
def as_jax_does() -> Iterator[None]:
    """Within it programs are lowered by JAX's own rule: what tests and benchmarks compare with."""
    mlir.register_lowering(lax.conv_general_dilated_p, _rule_of_jax(), platform='cpu')
    jax.clear_caches()
    try:
        yield
    finally:
        install()
        jax.clear_caches()


def _rule_of_jax():
    from jax._src.lax.convolution import _conv_general_dilated_lower as rule

    return functools.partial(rule, expand_complex_convolutions=True)  # as JAX has it on CPU


def _lower(original, ctx, lhs, rhs, **settings):
    """The lowering rule: by the first rewriting that applies, or as JAX does."""
    rewritten = _rewriting(*ctx.avals_in, *ctx.avals_out, whole=_is_whole(ctx), settings=settings)
    if rewritten is None:
        return original(ctx, lhs, rhs, **settings)
    settings['out_sharding'] = None  # of replicated or device-local arrays: says nothing
    return mlir.lower_fun(functools.partial(rewritten, **settings), multiple_results=False)(
        ctx, lhs, rhs
    )


def _rewriting(lhs, rhs, out, whole, settings):
    """Returns (lhs, rhs, **settings) -> the result by simpler operations, or None."""
    sharding = settings['out_sharding']
    sharded = sharding is not None and any(axis is not None for axis in sharding.spec)
    sizes = (*lhs.shape, *rhs.shape, *out.shape, *itertools.chain(*settings['padding']))
    fixed = all(isinstance(n, (int, np.integer)) for n in sizes)  # not so while exporting
    if (
        sharded
        or not fixed
        or not jnp.issubdtype(lhs.dtype, jnp.floating)
        or (0 in (lhs.size, rhs.size, out.size))
    ):
        return None
    numbers = settings['dimension_numbers']
    if settings['feature_group_count'] == settings['batch_group_count'] == 1:
        if _is_dilated_input(settings):
            return _by_phases
        if _is_cropped(lhs, settings):
            return _crop
        if _is_small_image(lhs, rhs, settings):
            return _by_patches
        if whole and _is_filter_gradient(lhs, rhs, out, numbers):
            return _in_parts
        if _has_few_features(lhs, rhs, out, settings):
            return _in_blocks
    return None if numbers == _fast_numbers(lhs.ndim) else _transposed


def _is_whole(ctx):
    """Whether arrays are one device's own: XLA may cut others along what would be summed."""
    context = ctx.module_context.axis_context
    if hasattr(context, 'num_devices'):
        return context.num_devices == 1
    return frozenset(context.manual_axes) == frozenset(context.mesh.axis_names)


def _fast_numbers(ndim):
    spatial = tuple(range(1, ndim - 1))
    return lax.ConvDimensionNumbers(
        (0, ndim - 1, *spatial), (ndim - 1, ndim - 2, *range(ndim - 2)), (0, ndim - 1, *spatial)
    )


def _moved(x, source, target):
    """x with its dimensions at places `source` (of a spec) brought to places `target`."""
    permutation = [0] * x.ndim
    for old, new in zip(source, target):
        permutation[new] = old
    return jnp.transpose(x, permutation)


def _transposed(lhs, rhs, *, dimension_numbers, **settings):
    fast = _fast_numbers(lhs.ndim)
    result = lax.conv_general_dilated_p.bind(
        _moved(lhs, dimension_numbers.lhs_spec, fast.lhs_spec),
        _moved(rhs, dimension_numbers.rhs_spec, fast.rhs_spec),
        dimension_numbers=fast,
        **settings,
    )
    return _moved(result, fast.out_spec, dimension_numbers.out_spec)


def _is_filter_gradient(lhs, rhs, out, numbers):
    window = math.prod(rhs.shape[d] for d in numbers.rhs_spec[2:])
    places = math.prod(out.shape[d] for d in numbers.out_spec[2:])
    return window > places and lhs.shape[numbers.lhs_spec[1]] > _part_size(lhs, rhs, numbers)


def _part_size(lhs, rhs, numbers):
    """How many of what is summed over, images in a filter's gradient, come at a time."""
    count = lhs.shape[numbers.lhs_spec[1]]
    size = lhs.size * lhs.dtype.itemsize + rhs.size * rhs.dtype.itemsize
    return max(1, _PART_BYTES * count // size)


def _in_parts(lhs, rhs, *, dimension_numbers, preferred_element_type, **settings):
    dtype = preferred_element_type or lhs.dtype
    sum_dtype = jnp.promote_types(dtype, jnp.float32)
    axes = dimension_numbers.lhs_spec[1], dimension_numbers.rhs_spec[1]
    size = _part_size(lhs, rhs, dimension_numbers)
    count, rest = divmod(lhs.shape[axes[0]], size)

    def part(start, size):
        return lax.conv_general_dilated_p.bind(
            *(lax.dynamic_slice_in_dim(x, start, size, axis) for x, axis in zip((lhs, rhs), axes)),
            dimension_numbers=dimension_numbers,
            preferred_element_type=sum_dtype,
            **settings,
        )

    first = rest or size
    total = lax.fori_loop(
        0,
        count if rest else count - 1,
        lambda i, total: total + part(first + i * size, size),
        part(0, first),
    )
    return total.astype(dtype)


def _has_few_features(lhs, rhs, out, settings):
    numbers = settings['dimension_numbers']
    features, filters = lhs.shape[numbers.lhs_spec[1]], rhs.shape[numbers.rhs_spec[0]]
    width, results = rhs.shape[numbers.rhs_spec[-1]], out.shape[numbers.out_spec[-1]]
    return (
        features <= _FEW_FEATURES
        and 2 * filters <= _BLOCK_FEATURES
        and 1 < width < results
        and max(*settings['window_strides'], *settings['rhs_dilation']) == 1
    )


def _in_blocks(lhs, rhs, *, dimension_numbers, padding, **settings):
    """`block` neighbours along the last dimension become features, of the image and of the results.

    Result q of a block meets places q, ..., q + width - 1 of the image from the block's start on:
    its filter is the given one, moved by q, with zeros around it.
    """
    fast = _fast_numbers(lhs.ndim)
    lhs = _moved(lhs, dimension_numbers.lhs_spec, fast.lhs_spec)
    rhs = _moved(rhs, dimension_numbers.rhs_spec, fast.rhs_spec)
    *_, width, _, filters = rhs.shape
    low, high = padding[-1]
    results = lhs.shape[-2] + low + high - width + 1
    block = 1 << min(3, (_BLOCK_FEATURES // filters).bit_length() - 1)  # 2, 4 or 8
    blocks, window = -(-results // block), -(-(block + width - 1) // block)
    whole = (blocks + window - 1) * block

    def padded(x, axis, before, size):
        spread = [(0, 0, 0)] * x.ndim
        spread[axis] = (before, size - before - x.shape[axis], 0)
        return lax.pad(x, jnp.zeros((), x.dtype), spread)

    lhs = padded(lhs, lhs.ndim - 2, low, whole)
    moved = [padded(rhs, rhs.ndim - 3, q, window * block) for q in range(block)]
    rhs = jnp.stack(moved, -2)
    result = lax.conv_general_dilated_p.bind(
        lhs.reshape(*lhs.shape[:-2], blocks + window - 1, -1),
        rhs.reshape(*rhs.shape[: lhs.ndim - 3], window, -1, block * filters),
        dimension_numbers=fast,
        padding=(*padding[:-1], (0, 0)),
        **settings,
    )
    result = result.reshape(*result.shape[:-2], blocks * block, filters)
    result = lax.slice_in_dim(result, 0, results, axis=result.ndim - 2)
    return _moved(result, fast.out_spec, dimension_numbers.out_spec)


def _is_dilated_input(settings):
    return any(d > 1 for d in settings['lhs_dilation']) and all(
        d == 1 for d in (*settings['window_strides'], *settings['rhs_dilation'])
    )


def _by_phases(
    lhs, rhs, *, dimension_numbers, lhs_dilation, padding, preferred_element_type, **settings
):
    """Of an input dilated by d the results at places r, r + d, r + 2d, ... share their taps.

    Tap k of result o meets the dilated input at o + k - low, which is no zero if d divides it. So
    results o = r + d q need the taps k = first + d j alone, first = (low - r) mod d, and meet the
    inputs q + j - before, before = (low - r - first) / d.
    """
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    dtype = preferred_element_type or lhs.dtype
    sizes = [
        low + high + (lhs.shape[a] - 1) * d + 2 - rhs.shape[b]
        for (low, high), d, a, b in zip(padding, lhs_dilation, lhs_spec[2:], rhs_spec[2:])
    ]
    total = jnp.zeros((), dtype)
    for phase in itertools.product(*(range(min(d, n)) for d, n in zip(lhs_dilation, sizes))):
        taps, pads, spread = [slice(None)] * lhs.ndim, [], [(0, 0, 0)] * lhs.ndim
        for r, d, (low, _), size, a, b, c in zip(
            phase, lhs_dilation, padding, sizes, lhs_spec[2:], rhs_spec[2:], out_spec[2:]
        ):
            first = (low - r) % d
            before = (low - r - first) // d
            results, width = -(-(size - r) // d), len(range(first, rhs.shape[b], d))
            taps[b] = slice(first, None, d)
            pads.append((before, results + width - 1 - before - lhs.shape[a]))
            spread[c] = (r, size - 1 - r - (results - 1) * d, d - 1)
        filters = rhs[tuple(taps)]
        if filters.size:  # else no tap meets an input: a phase of zeros
            results = lax.conv_general_dilated_p.bind(
                lhs,
                filters,
                dimension_numbers=dimension_numbers,
                padding=tuple(pads),
                lhs_dilation=(1,) * len(pads),
                preferred_element_type=preferred_element_type,
                **settings,
            )
            total += lax.pad(results, jnp.zeros((), dtype), spread)
    return total


def _is_cropped(lhs, settings):
    left = [
        n + min(low, 0) + min(high, 0)
        for n, (low, high) in zip(
            (lhs.shape[a] for a in settings['dimension_numbers'].lhs_spec[2:]), settings['padding']
        )
    ]
    return min(itertools.chain(*settings['padding'])) < 0 < min(left) and (
        max(settings['lhs_dilation']) == 1
    )


def _crop(lhs, rhs, *, dimension_numbers, padding, **settings):
    kept = [slice(None)] * lhs.ndim
    for a, (low, high) in zip(dimension_numbers.lhs_spec[2:], padding):
        kept[a] = slice(max(-low, 0), lhs.shape[a] - max(-high, 0))
    return lax.conv_general_dilated_p.bind(
        lhs[tuple(kept)],
        rhs,
        dimension_numbers=dimension_numbers,
        padding=tuple((max(low, 0), max(high, 0)) for low, high in padding),
        **settings,
    )


def _is_small_image(lhs, rhs, settings):
    """XLA's own condition: whether the window has more places than the image has pixels."""
    numbers = settings['dimension_numbers']
    window, pixels = 1, 1
    for a, b, pads in zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], settings['padding']):
        places = rhs.shape[b]
        window *= places
        # A single pixel that meets each place once it leaves as it is.
        pixels *= places if lhs.shape[a] == 1 and set(pads) == {places - 1} else lhs.shape[a]
    return window > pixels


def _by_patches(
    lhs,
    rhs,
    *,
    dimension_numbers,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    precision,
    preferred_element_type,
    **_,
):
    fast = _fast_numbers(lhs.ndim)
    lhs = _moved(lhs, dimension_numbers.lhs_spec, fast.lhs_spec)
    rhs = _moved(rhs, dimension_numbers.rhs_spec, fast.rhs_spec)
    padded = lax.pad(
        lhs,
        jnp.zeros((), lhs.dtype),
        [
            (0, 0, 0),
            *((low, high, d - 1) for (low, high), d in zip(padding, lhs_dilation)),
            (0, 0, 0),
        ],
    )
    # By dimension and tap: the places in the padded image that the results meet.
    places = [
        [np.arange(0, size - (n - 1) * d, stride) + k * d for k in range(n)]
        for size, n, d, stride in zip(
            padded.shape[1:-1], rhs.shape[:-2], rhs_dilation, window_strides
        )
    ]
    pixels = [
        low + d * np.arange(n) for n, (low, _), d in zip(lhs.shape[1:-1], padding, lhs_dilation)
    ]
    taps = list(itertools.product(*map(range, rhs.shape[:-2])))
    # A tap that meets nothing but padding adds nothing.
    taps = [
        tap
        for tap in taps
        if all(np.isin(p[k], pixel).any() for k, p, pixel in zip(tap, places, pixels))
    ] or taps[:1]
    patches = [
        padded[
            (
                slice(None),
                *(
                    slice(int(p[k][0]), int(p[k][-1]) + 1, stride)
                    for k, p, stride in zip(tap, places, window_strides)
                ),
            )
        ]
        for tap in taps
    ]
    result = lax.dot_general(
        jnp.concatenate(patches, -1),
        jnp.concatenate([rhs[tap] for tap in taps]),
        (((lhs.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return _moved(result, fast.out_spec, dimension_numbers.out_spec)
