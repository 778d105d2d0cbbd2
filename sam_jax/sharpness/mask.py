"""Masks: ascents of a part of the params."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Int32

from sam_jax.sharpness import ranges
from sam_jax.sharpness.trees import names_of, promote, wide_zeros


def normalization(params: optax.Params) -> Any:
    """SAM-ON's mask (2306.04226): True for the params of normalisation layers, else False.

    Such a layer has a parameter `scale` (BatchNorm, LayerNorm, GroupNorm of flax, linen and nnx,
    and of haiku), or a `weight` of one axis (of equinox); its bias belongs to it. For `lp_ball`,
    whose norm is over the True leaves alone.

    Raises:
      ValueError: there is no such layer.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [names_of(path) for path, _ in leaves]
    layers = {
        name[:-1]
        for name, (_, w) in zip(names, leaves)
        if name[-1:] == ('scale',) or (name[-1:] == ('weight',) and jnp.ndim(w) == 1)
    }
    mask = [name[:-1] in layers for name in names]
    if not any(mask):
        raise ValueError(
            'the params have no normalisation layer (one with a parameter "scale", or '
            'a "weight" of one axis) that could be perturbed.'
        )
    return jax.tree.unflatten(structure, mask)


class SparseState(NamedTuple):
    """State of `sparse`: number of ascents, mean squared gradient since the mask was made, mask."""

    count: Int32[ArrayLike, '']
    squares: Any
    mask: Any
    ball: Any


def sparse(
    ball: optax.GradientTransformation, sparsity: float, period: int
) -> optax.GradientTransformationExtraArgs:
    """Sparse SAM (2210.05177): the ball's step on the entries with the largest squared gradients.

    eps = m * ball(g): the mask comes after the normalisation, so ||eps|| <= rho. m keeps the
    (1 - sparsity) N entries, of N in all leaves together, with the largest mean of squared
    gradients over the last `period` ascents, and is made anew after each `period`; until then all
    are kept. (The authors estimate the same diagonal of the Fisher matrix from the gradients of
    some single examples; these are the gradients that are there anyway.) Equal squares at the
    threshold are all kept.

    State: a pytree of squares and one of bools.

    Raises:
      ValueError: sparsity is not in [0, 1), or period < 1.
    """
    ranges.zero_to_below_one(sparsity=sparsity)
    ranges.at_least(1, period=period)
    ball = optax.with_extra_args_support(ball)

    def init(params):
        return SparseState(
            jnp.zeros((), jnp.int32),
            wide_zeros(params),
            jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), params),
            ball.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        mask = jax.lax.cond(
            (state.count > 0) & (state.count % period == 0),
            _largest_entries,
            _same_entries,
            state.squares,
            state.mask,
            sparsity,
        )
        age = state.count % period
        squares = jax.tree.map(
            lambda s, g: (
                jnp.where(age == 0, 0.0, s) * (age / (age + 1))
                + (jnp.square(promote(g)) / (age + 1)).astype(s.dtype)
            ),
            state.squares,
            updates,
        )
        eps, ball_state = ball.update(updates, state.ball, params, **extra_args)
        eps = jax.tree.map(lambda m, e: jnp.where(m, e, 0.0), mask, eps)
        return eps, SparseState(optax.safe_increment(state.count), squares, mask, ball_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _largest_entries(squares, mask, sparsity):
    flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(squares)])
    index = jnp.floor(jnp.asarray(sparsity, float) * flat.size).astype(int)
    threshold = jnp.sort(flat)[jnp.minimum(index, flat.size - 1)]
    return jax.tree.map(lambda x: x >= threshold, squares)


def _same_entries(squares, mask, sparsity):
    return mask


def random_leaves(beta: float) -> optax.GradientTransformationExtraArgs:
    """ESAM's stochastic weight perturbation (2110.03141): each leaf climbs with probability beta.

    The gradient of the other leaves becomes 0. In front of a ball of radius rho / beta, so that
    over the draws a small eps has the mean that it has without. Drawn anew at each step, whereas
    the authors keep all leaves at their first. Where none was drawn one is, any with the same
    probability: a step that climbs nowhere would pay for nothing. No state. beta = 1 leaves
    everything.

    Raises:
      ValueError: beta is not in (0, 1].
      TypeError (from update): no `key`.
    """
    ranges.above_zero_to_one(beta=beta)

    def update(updates, state, params=None, *, key=None, **extra_args):
        del params, extra_args
        if beta == 1:
            return updates, state
        if key is None:
            raise TypeError(
                'A random choice of leaves needs a key: tx.update(..., key=jax.random.key(step)).'
            )
        leaves, structure = jax.tree.flatten(updates)
        keep = jax.random.bernoulli(key, beta, (len(leaves),))
        one = jax.random.randint(jax.random.fold_in(key, 1), (), 0, len(leaves))
        keep = keep | (~jnp.any(keep) & (jnp.arange(len(leaves)) == one))
        return jax.tree.unflatten(
            structure, [jnp.where(k, g, jnp.zeros_like(g)) for k, g in zip(keep, leaves)]
        ), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
