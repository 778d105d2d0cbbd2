"""Methods that differ from SAM in what is made of the clean gradient g and the perturbed one g_p.

eps = rho g / ||g|| and g_p = grad L(w + eps) as of `sam`. Two gradient evaluations and no state but
counters, unless said otherwise.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sam_jax.sharpness import ascent, combine, ranges, registry
from sam_jax.sharpness.as_optax import Link, as_optax
from sam_jax.sharpness.builder import sharpness_aware
from sam_jax.sharpness.protocol import Method, Report, unless_still
from sam_jax.sharpness.trees import Rho, lp_norm, wide_zeros


@registry.enter('g_p less the part of g orthogonal to it', 2)
def gsam(rho: Rho, alpha: float = 0.4) -> Link:
    """GSAM (2203.08065): SAM that also shrinks the surrogate gap L(w + eps) - L(w).

    result = g_p - alpha (g - <g, g_p> / <g_p, g_p> g_p). alpha = 0 is `sam`. The paper lets rho
    follow the learning rate: `sam.schedule=learning_rate`, with `sam.rho_min`.

    Args:
      rho: as of `sam`.
      alpha: 0.4 (WRN on CIFAR-10), 0.6 (ViT on ImageNet).
    """
    ranges.finite(alpha=alpha)
    return sharpness_aware(ascent.lp_ball(rho), combine.surrogate_gap(alpha))


@registry.enter('sharpness weighted, past the optimizer or not', 2)
def wsam(
    rho: Rho, gamma: float = 0.9, decoupled: bool = True, max_norm: float | None = None
) -> Link:
    """WSAM (2305.15817): L + a (L(w + eps) - L), the sharpness as a weighted regulariser.

    a = gamma / (1 - gamma). Coupled: result = g + a (g_p - g). Decoupled: the optimizer gets g, and
    w <- w - lr a (g_p - g) besides, which neither momentum nor preconditioner sees. The same for
    SGD without momentum. gamma = 1/2, coupled, is `sam`; decoupled it is not where the optimizer
    has momentum. Decoupled both gradients are clipped before their difference is taken, as the
    authors do; the coupled result is for what follows to clip.

    A link of a chain cannot reach past what follows it: in a plain chain the result is the coupled
    one, the authors' update where the optimizer has no memory. If you apply `add_correction` to the
    optimizer's updates, say so by `corrected=True`: this is the decoupled form with any optimizer.
    The train step does so.

    Two gradient evaluations; state: decoupled one pytree, of that step alone.

    Args:
      rho: as of `sam`.
      gamma: in [0, 1); 0.9 in the authors' code.
      decoupled: the authors' default.
      max_norm: to which both gradients of the decoupled form are clipped; None for not at all. In
        runs `optimizer.clip_norm`.

    Raises:
      ValueError: gamma is not in [0, 1), or max_norm not greater than 0.
    """
    ranges.zero_to_below_one(gamma=gamma)
    a = gamma / (1.0 - gamma)
    if max_norm is not None:
        ranges.positive(max_norm=max_norm)
    ball = ascent.lp_ball(rho)
    clips = decoupled and max_norm is not None

    def init(params):
        zeros = wide_zeros(params) if decoupled else ()
        return ball.init(params), combine.Correction(zeros)

    def step(loss, params, state, now):
        clean = loss(params, climb=True)
        eps, ball_state = ball.update(clean.grads, state[0], params, count=now.count)
        there = loss.moved(params, eps, clean, linear=not clips)
        g, g_p = (clipped(x.grads, max_norm if clips else None) for x in (clean, there))
        sharp = jax.tree.map(lambda x, y: a * (y - x), g, g_p)
        if decoupled and now.given.get('corrected'):
            # What follows clips the gradient itself.
            grads, correction = clean.grads, sharp
        else:
            grads = unless_still(eps, jax.tree.map(jnp.add, g, sharp), clean._replace(grads=g))
            correction = jax.tree.map(jnp.zeros_like, sharp) if decoupled else ()
        return (
            grads,
            (ball_state, combine.Correction(correction)),
            Report(clean, there, lp_norm(eps)),
        )

    return as_optax(Method(init, step))


def clipped(grads: Any, max_norm: float | None) -> Any:
    """Returns the gradient, no longer than max_norm; as it is where that is None."""
    if max_norm is None:
        return grads
    length = lp_norm(grads)
    scale = jnp.where(length > max_norm, max_norm / jnp.where(length > 0, length, 1.0), 1.0)
    return jax.tree.map(lambda g: scale.astype(g.dtype) * g, grads)


@registry.enter('(1 - alpha) g + alpha g_p, a penalty on the norm of g', 2)
def gnp(rho: Rho, alpha: float = 0.8) -> Link:
    """Penalty on the norm of the gradient (2202.03599): the gradient of L + alpha rho ||grad L||.

    result = (1 - alpha) g + alpha g_p, to first order in rho. alpha = 1 is `sam`. (The authors'
    code has a switch, on by default, that mixes g / ||g|| in place of g; not here, nor in the
    paper.)

    Args:
      rho: the r of the paper; 0.1 there.
      alpha: lambda / r; 0.8 there. May be greater than 1.
    """
    ranges.finite(alpha=alpha)
    return sharpness_aware(ascent.lp_ball(rho), combine.lerp(alpha))


@registry.enter('g, g_p or a projection, by their angle', 2)
def gradient_constrained(
    rho: Rho, low: float = 0.5, up: float = 0.8, per_leaf: bool = True
) -> Link:
    """GCSCoOp's SAM (2309.07866): g, g_p or a projection, by the angle between the two.

    See `combine.gradient_constrained`. up <= -1 (and so low <= 0) is `sam`, low > 1 the base
    optimizer.

    Args:
      rho: as of `sam`; 0.1 in the paper, which tunes the prompts of CLIP.
      low, up: cosines.
      per_leaf: whether each leaf of the params has an angle of its own.
    """
    ranges.finite(low=low, up=up)
    if low > 0:
        ranges.ordered(low=low, up=up)
    return sharpness_aware(ascent.lp_ball(rho), combine.gradient_constrained(low, up, per_leaf))


@registry.enter("with the Hessian's trace, by differences", 3)
def cr_sam(rho: Rho, gamma: float = 0.1, beta: float = 0.01) -> Link:
    """CR-SAM (2312.13555): SAM with the trace of the Hessian, by differences, as a regulariser.

    result = g+ + gamma (g+ + g- - 2 g) + beta (g+ - g-), g+ and g- at w + eps and w - eps, as the
    authors' code has it. Their text divides the two differences by those of the losses
    (L+ + L- - 2 L, L+ - L-); the code leaves that to the constants. Three gradient evaluations, of
    which two wait for none but the first.

    Args:
      rho: as of `sam`; 0.1 in the authors' command.
      gamma, beta: weights; theirs.
    """
    ranges.finite(gamma=gamma, beta=beta)
    ball = ascent.lp_ball(rho)

    def step(loss, params, state, now):
        clean = loss(params, climb=True)
        eps, state = ball.update(clean.grads, state, params, count=now.count)
        up, down = (loss.moved(params, eps, clean, sign, linear=True) for sign in (1.0, -1.0))
        grads = jax.tree.map(
            lambda g, g_up, g_down: (
                g_up + gamma * (g_up + g_down - 2.0 * g) + beta * (g_up - g_down)
            ),
            clean.grads,
            up.grads,
            down.grads,
        )
        return unless_still(eps, grads, clean), state, Report(clean, up, lp_norm(eps))

    return as_optax(Method(ball.init, step))


@registry.enter('g_p as long as g', 2)
def stable_sam(rho: Rho) -> Link:
    """Stable SAM: (|g| / |g_p|) g_p, the direction of SAM with the length of the clean gradient.

    The rule is from a secondary source (the method zoo of the zij library).

    Args:
      rho: as of `sam`.
    """
    return sharpness_aware(ascent.lp_ball(rho), combine.renormalized())
