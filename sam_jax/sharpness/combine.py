"""Combinations: the clean and the perturbed gradient -> the gradient handed on.

Inner products and norms are over all params together, in at least float32, unless a combination is
asked to work leaf by leaf (`per_leaf`). g is the clean gradient and g_p the perturbed one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sam_jax.sharpness.trees import cosine, lp_norm, part_along, promote, wide_zeros


class Combine(NamedTuple):
    """A combination of the gradients.

    Attributes:
      init: params -> state.
      combine: (grads, perturbed_grads, state, params) -> (updates, state), when the gate is open.
      skip: (grads, state, params) -> (updates, state), when it is shut.
      linear: whether `combine` is linear in perturbed_grads, with factors that do not depend on it,
        and its state does not depend on it either; see `Loss`.
    """

    init: Callable[[Any], Any]
    combine: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    skip: Callable[[Any, Any, Any], tuple[Any, Any]]
    linear: bool = False


def _stateless(function, linear=False):
    """A combination (g, g_p) -> updates without state; where the gate is shut, g."""
    return Combine(
        init=lambda params: (),
        combine=lambda grads, perturbed_grads, state, params: (
            function(grads, perturbed_grads),
            state,
        ),
        skip=lambda grads, state, params: (grads, state),
        linear=linear,
    )


def perturbed() -> Combine:
    """SAM's own: g_p. No state."""
    return _stateless(lambda grads, perturbed_grads: perturbed_grads, linear=True)


def lerp(alpha: float) -> Combine:
    """(1 - alpha) g + alpha g_p: SAM at alpha = 1; may be greater than 1. No state."""
    return _stateless(
        lambda grads, perturbed_grads: jax.tree.map(
            lambda g, g_p: ((1.0 - alpha) * promote(g) + alpha * promote(g_p)).astype(g.dtype),
            grads,
            perturbed_grads,
        ),
        linear=True,
    )


def surrogate_gap(alpha: float) -> Combine:
    """GSAM's: g_p - alpha (g - <g, g_p> / <g_p, g_p> g_p), descent of the gap L(w + eps) - L(w).

    The part of g orthogonal to g_p is taken away from it. No state.
    """

    def function(grads, perturbed_grads):
        return jax.tree.map(
            lambda g, g_p, part: (promote(g_p) - alpha * (promote(g) - part)).astype(g.dtype),
            grads,
            perturbed_grads,
            part_along(grads, perturbed_grads),
        )

    return _stateless(function)


def renormalized() -> Combine:
    """Stable-SAM's: (|g| / |g_p|) g_p, the perturbed direction as long as the clean one. No state.

    0 where g_p is 0.
    """

    def function(grads, perturbed_grads):
        scale = _ratio(lp_norm(grads), lp_norm(perturbed_grads))
        return jax.tree.map(lambda g_p: (scale * promote(g_p)).astype(g_p.dtype), perturbed_grads)

    return _stateless(function)


def gradient_constrained(low: float, up: float, per_leaf: bool = True) -> Combine:
    """GCSCoOp's (2309.07866): which gradient goes on depends on the angle between the two.

    With c = cos(g_p, g) and z = (g_p + g) / |g_p + g|:
      c <= low         g; only if low > 0
      c >= up          g_p
      otherwise        <g_p, z> z, g_p projected on the bisector
    A gradient of zero makes c = 0. No state.

    Args:
      low, up: cosines.
      per_leaf: whether each leaf has an angle of its own (the authors' code, which trains one
        tensor) or all have one together.
    """

    def of(g, g_p):
        c = cosine(g, g_p)
        far = (c <= low) & (low > 0)
        bisector = jax.tree.map(lambda x, y: promote(x) + promote(y), g, g_p)
        return jax.tree.map(
            lambda x, y, part: jnp.where(far, x, jnp.where(c >= up, y, part.astype(x.dtype))),
            g,
            g_p,
            part_along(g_p, bisector),
        )

    return _stateless(lambda g, g_p: jax.tree.map(of, g, g_p) if per_leaf else of(g, g_p))


class Correction(NamedTuple):
    """What `wsam` adds past the optimizer at this step, in units of -learning rate."""

    correction: Any


def add_correction(
    updates: optax.Updates, state: Any, learning_rate: float | Float[Array, '']
) -> optax.Updates:
    """Returns the optimizer's updates with the corrections added that a state holds.

    Args:
      updates: of the optimizer.
      state: of the sharpness-aware method, or of whatever holds it: a chain, `optax.masked`,
        `optax.multi_transform`, several of them.
      learning_rate: of this step.
    """

    def is_one(x):
        return isinstance(x, Correction)

    for found in filter(is_one, jax.tree.leaves(state, is_leaf=is_one)):
        if jax.tree.leaves(found):  # the coupled form has none
            updates = jax.tree.map(
                lambda c, u: (
                    u
                    if isinstance(c, optax.MaskedNode)
                    else (u - (learning_rate * c).astype(u.dtype))
                ),
                found.correction,
                updates,
                is_leaf=lambda x: isinstance(x, optax.MaskedNode),
            )
    return updates


class OrthogonalState(NamedTuple):
    """State of `reused`: the part of the last perturbed gradient orthogonal to the clean one."""

    orthogonal: Any


def reused(alpha: float, per_leaf: bool = False) -> Combine:
    """LookSAM's (2203.02714): what the ascent adds is kept and used until the next one.

    Gate open: g_p; g_v = g_p - <g, g_p> / <g, g> g is kept.
    Shut: g + alpha (|g| / |g_v|) g_v; g itself where g_v = 0.
    State: one pytree.

    Args:
      alpha: weight of the part kept.
      per_leaf: whether norms and products are those of each leaf (some ports) or of all leaves.
    """

    def orthogonal(g, g_p):
        rest = jax.tree.map(lambda y, part: promote(y) - part, g_p, part_along(g_p, g))
        # Of parallel gradients (a leaf of one entry) only rounding is left, and no direction.
        dtype = jnp.result_type(*jax.tree.leaves(rest))
        real = lp_norm(rest) > 16 * jnp.finfo(dtype).eps * lp_norm(g_p)
        return jax.tree.map(lambda x: jnp.where(real, x, jnp.zeros_like(x)), rest)

    def add(g, v):
        scale = alpha * _ratio(lp_norm(g), lp_norm(v))
        return jax.tree.map(lambda x, y: (promote(x) + scale * promote(y)).astype(x.dtype), g, v)

    def each(function, *trees):
        return jax.tree.map(function, *trees) if per_leaf else function(*trees)

    return Combine(
        init=lambda params: OrthogonalState(wide_zeros(params)),
        combine=lambda grads, perturbed_grads, state, params: (
            perturbed_grads,
            OrthogonalState(each(orthogonal, grads, perturbed_grads)),
        ),
        skip=lambda grads, state, params: (each(add, grads, state.orthogonal), state),
    )


def _ratio(a, b):
    """a / b, and 0 where b = 0."""
    return jnp.where(b != 0, a / jnp.where(b != 0, b, 1.0), 0.0)
