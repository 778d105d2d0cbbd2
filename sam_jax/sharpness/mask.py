"""Masks: ascents of a part of the params."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_jax.sharpness import checks
from sam_jax.sharpness.ascent import promote, wide_zeros


def normalization(params):
    """SAM-ON's mask (2306.04226): True for the params of normalisation layers, else False.

    Such a layer is a dict with an entry 'scale', as those of flax (BatchNorm, LayerNorm, GroupNorm)
    are; its bias belongs to it. For `lp_ball`, whose norm is over the True leaves alone.

    Raises:
      ValueError: there is no such layer.
    """
    def marked(tree):
        return {name: marked(x) if isinstance(x, dict) else 'scale' in tree
                for name, x in tree.items()}

    mask = marked(params) if isinstance(params, dict) else False
    if not any(jax.tree.leaves(mask)):
        raise ValueError('the params have no normalisation layer (a dict with an entry "scale") '
                         'that could be perturbed.')
    return mask


class SparseState(NamedTuple):
    """State of `sparse`: number of ascents, mean squared gradient since the mask was made, mask."""

    count: jax.Array
    squares: Any
    mask: Any
    ball: Any


def sparse(ball, sparsity, period):
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
    checks.below_one(sparsity=sparsity)
    checks.at_least(1, period=period)
    ball = optax.with_extra_args_support(ball)

    def init(params):
        return SparseState(
            jnp.zeros((), jnp.int32), wide_zeros(params),
            jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), params), ball.init(params))

    def top(squares):
        flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(squares)])
        threshold = jnp.sort(flat)[min(int(sparsity * flat.size), flat.size - 1)]
        return jax.tree.map(lambda x: x >= threshold, squares)

    def update(grads, state, params=None, **extra_args):
        mask = jax.lax.cond(
            (state.count > 0) & (state.count % period == 0),
            lambda: top(state.squares), lambda: state.mask)
        age = state.count % period
        squares = jax.tree.map(
            lambda s, g: jnp.where(age == 0, 0.0, s) * (age / (age + 1)) + (
                jnp.square(promote(g)) / (age + 1)).astype(s.dtype), state.squares, grads)
        eps, ball_state = ball.update(grads, state.ball, params, **extra_args)
        eps = jax.tree.map(lambda m, e: jnp.where(m, e, 0.0), mask, eps)
        return eps, SparseState(optax.safe_increment(state.count), squares, mask, ball_state)

    return optax.GradientTransformationExtraArgs(init, update)


def random_leaves(beta):
    """ESAM's stochastic weight perturbation (2110.03141): each leaf climbs with probability beta.

    The gradient of the other leaves becomes 0. In front of a ball of radius rho / beta, so that
    over the draws a small eps has the mean that it has without. Drawn anew at each step, whereas
    the authors keep all leaves at their first. No state. beta = 1 leaves everything.

    Raises:
      ValueError: beta is not in (0, 1].
      TypeError (from update): no `key`.
    """
    checks.share(beta=beta)

    def update(grads, state, params=None, *, key=None, **extra_args):
        del params, extra_args
        if beta == 1:
            return grads, state
        if key is None:
            raise TypeError('A random choice of leaves needs a key: tx.update(..., '
                            'key=jax.random.key(step)).')
        leaves, structure = jax.tree.flatten(grads)
        keep = jax.random.bernoulli(key, beta, (len(leaves),))
        return jax.tree.unflatten(structure, [
            jnp.where(k, g, jnp.zeros_like(g)) for k, g in zip(keep, leaves)]), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
