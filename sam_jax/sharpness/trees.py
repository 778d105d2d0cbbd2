"""Arithmetic of pytrees of params and gradients, in at least float32."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

# A radius: a number, a traced scalar, or an optax schedule of the number of updates.
Rho = float | Float[Array, ''] | optax.Schedule

# JAX's or NumPy's.
Numbers = TypeVar('Numbers', Array, np.ndarray)


def names_of(path: Sequence[Any]) -> tuple:
    """Returns the names on the way to a parameter, a tuple, in whatever pytree a framework has.

    Of dictionaries, dataclasses (equinox) and flax nnx, whose variables keep their array one step
    further, in `value`; of a sequence the position.
    """
    names = [
        getattr(entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', entry)))
        for entry in path
    ]
    is_variable = isinstance(path[-1], jax.tree_util.GetAttrKey) if path else False
    return tuple(names[:-1] if is_variable and names[-1] == 'value' else names)


def promote(x: Float[Numbers, '*shape']) -> Float[Numbers, '*shape']:
    """Returns x in float32, or in its own dtype if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def wide_zeros(tree: Any) -> Any:
    """Returns zeros of the shapes of a pytree, in at least float32."""
    return jax.tree.map(lambda x: jnp.zeros_like(promote(x)), tree)


def move(params: optax.Params, eps: Any, sign: float = 1.0) -> optax.Params:
    """Returns w + sign eps, in at least float32."""
    return jax.tree.map(lambda w, e: promote(w) + sign * e, params, eps)


def radius_at(rho: Rho, count: Int[ArrayLike, '']) -> Any:
    """Returns rho, or its value at `count` where it is a schedule."""
    return rho(count) if callable(rho) else rho


def progress(count: Int[ArrayLike, ''], total: float) -> Float[Array, '']:
    """Returns count / total, at most 1; in float64 where JAX has it, whatever integer count is."""
    return jnp.minimum(jnp.asarray(count, float) / total, 1.0)


def times(rho: Rho, factor: float) -> Rho:
    """Returns factor rho, of a number or of a schedule."""
    return (lambda count: factor * rho(count)) if callable(rho) else factor * rho


def lp_norm(tree: Any, p: float = 2.0) -> Float[Array, '']:
    """Returns the p-norm of all entries of a pytree together, p in (1, inf], a scalar.

    Of tiny and huge entries too, whose powers leave the float range.
    """
    if p == np.inf:
        return _largest(tree)
    if p == 2:
        factor, norm = norm_in_range(tree)
        return norm / factor
    unit, scaled = in_units(tree)
    return unit * sum(
        (jnp.sum(jnp.abs(x) ** p) for x in jax.tree.leaves(scaled)), jnp.zeros(())
    ) ** (1.0 / p)


def unit(tree: Any) -> Any:
    """Returns tree / |tree|, in at least float32; zeros of zeros."""
    norm = lp_norm(tree)
    scale = jnp.where(norm > 0, 1.0 / jnp.where(norm > 0, norm, 1.0), 0.0)
    return jax.tree.map(lambda x: promote(x) * scale.astype(promote(x).dtype), tree)


def dot(a: Any, b: Any) -> Float[Array, '']:
    """Returns <a, b> of two pytrees with the same leaves, a scalar; one of them of unit length.

    Products of two that are both tiny or both huge leave the float range.
    """
    return sum(
        (jnp.sum(promote(x) * promote(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))),
        jnp.zeros(()),
    )


def cosine(a: Any, b: Any) -> Float[Array, '']:
    """Returns <a, b> / (|a| |b|) of two pytrees of one structure, a scalar; 0 where one is 0."""
    return dot(unit(a), unit(b))


def part_along(tree: Any, other: Any) -> Any:
    """Returns <tree, u> u with u = other / |other|, in at least float32; zeros where it is 0."""
    direction = unit(other)
    share = dot(tree, direction)
    return jax.tree.map(lambda x: share.astype(x.dtype) * x, direction)


def norm_in_range(tree: Any) -> tuple[Float[Array, ''], Float[Array, '']]:
    """Returns (factor, 2-norm of the factor times the tree).

    The factor is 1 but where the squares leave the float range: then a power of two, so that
    nothing is rounded, and the sum is taken once more.
    """
    total = _sum_of_squares(tree, np.ones(()))
    # Of the narrowest leaf: where float64 is on, the sum of float32 leaves is of that.
    limits = min(
        (jnp.finfo(promote(x).dtype) for x in jax.tree.leaves(tree)),
        key=lambda info: info.bits,
        default=jnp.finfo(total.dtype),
    )
    far = 2.0 ** (limits.maxexp * 3 // 4)
    small, huge = total < limits.tiny / limits.eps, jnp.isinf(total)
    factor = jnp.where(huge, 1 / far, jnp.where(small, far, 1.0)).astype(total.dtype)
    # None of these is a closure: outside of jit, each call of such would be compiled anew.
    known = tree, jnp.asarray(far, total.dtype), factor, total
    total = jax.lax.platform_dependent(*known, cuda=_at_once, default=_in_need)
    return factor, jnp.sqrt(total)


def _sum_of_squares(tree, factor):
    return sum(
        (
            jnp.sum(jnp.square(jnp.abs(factor.astype(promote(x).dtype) * promote(x))))
            for x in jax.tree.leaves(tree)
        ),
        jnp.zeros(()),
    )


def _at_once(tree, far, factor, total):
    """The sums for all three factors, in one reading. A GPU's host would wait for a condition."""
    small, huge = _sum_of_squares(tree, far), _sum_of_squares(tree, 1 / far)
    return jnp.where(factor > 1, small, jnp.where(factor < 1, huge, total))


def _in_need(tree, far, factor, total):
    """The sum for the factor, in a second reading if it is not that which is known."""
    return jax.lax.cond(factor != 1, _squares_again, _squares_are_known, tree, factor, total)


def _squares_again(tree, factor, total):
    return _sum_of_squares(tree, factor)


def _squares_are_known(tree, factor, total):
    return total


def _largest(tree):
    leaves = [jnp.max(jnp.abs(promote(x)), initial=0.0) for x in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(leaves)) if leaves else jnp.zeros(())


def in_units(tree: Any) -> tuple[Float[Array, ''], Any]:
    """Returns (largest entry, entries / it, a pytree), whose powers stay in the float range.

    The unit of a tree of zeros, or with NaN or infinity, is 1.
    """
    largest = jax.lax.stop_gradient(_largest(tree))
    unit = jnp.where((largest > 0) & (largest < np.inf), largest, 1.0)
    return unit, jax.tree.map(lambda x: promote(x) / unit.astype(promote(x).dtype), tree)
