"""Methods that differ from SAM in what is made of the clean gradient g and the perturbed one g_p.

eps = rho g / ||g|| and g_p = grad L(w + eps) as of `sam`. Two gradient evaluations and no state but
counters, unless said otherwise.
"""

from sam_jax.sharpness import ascent, checks, combine, gate
from sam_jax.sharpness.transform import sharpness_aware


def gsam(rho, alpha=0.4):
    """GSAM (2203.08065): SAM that also shrinks the surrogate gap L(w + eps) - L(w).

    result = g_p - alpha (g - <g, g_p> / <g_p, g_p> g_p). alpha = 0 is `sam`. The paper lets rho
    follow the learning rate: `sam.schedule=learning_rate`, with `sam.rho_min`.

    Args:
      rho: as of `sam`.
      alpha: 0.4 (WRN on CIFAR-10), 0.6 (ViT on ImageNet).
    """
    checks.finite(alpha=alpha)
    return sharpness_aware(ascent.lp_ball(rho), combine.surrogate_gap(alpha))


def wsam(rho, gamma=0.9, decoupled=True):
    """WSAM (2305.15817): L + a (L(w + eps) - L), the sharpness as a weighted regulariser.

    a = gamma / (1 - gamma). Coupled: result = (1 - a) g + a g_p. Decoupled: the optimizer gets g,
    and w <- w - lr a (g_p - g) besides (see `combine.decoupled` and `add_correction`). The same for
    SGD without momentum. gamma = 1/2, coupled, is `sam`; decoupled it is not where the optimizer
    has momentum. State: none; decoupled one pytree.

    Args:
      rho: as of `sam`.
      gamma: in [0, 1); 0.9 in the authors' code.
      decoupled: the authors' default.

    Raises:
      ValueError: gamma is not in [0, 1).
    """
    checks.below_one(gamma=gamma)
    a = gamma / (1.0 - gamma)
    if not decoupled:
        return sharpness_aware(ascent.lp_ball(rho), combine.lerp(a))
    return sharpness_aware(ascent.lp_ball(rho), combine.decoupled(a))


def gnp(rho, alpha=0.8):
    """Penalty on the norm of the gradient (2202.03599): the gradient of L + alpha rho ||grad L||.

    result = (1 - alpha) g + alpha g_p, to first order in rho. alpha = 1 is `sam`. (The authors'
    code has a switch, on by default, that mixes g / ||g|| in place of g; not here, nor in the
    paper.)

    Args:
      rho: the r of the paper; 0.1 there.
      alpha: lambda / r; 0.8 there. May be greater than 1.
    """
    checks.finite(alpha=alpha)
    return sharpness_aware(ascent.lp_ball(rho), combine.lerp(alpha))


def gradient_constrained(rho, low=0.5, up=0.8, per_leaf=True):
    """GCSCoOp's SAM (2309.07866): g, g_p or a projection, by the angle between the two.

    See `combine.gradient_constrained`. up <= -1 (and so low <= 0) is `sam`, low > 1 the base
    optimizer.

    Args:
      rho: as of `sam`; 0.1 in the paper, which tunes the prompts of CLIP.
      low, up: cosines.
      per_leaf: whether each leaf of the params has an angle of its own.
    """
    checks.finite(low=low, up=up)
    if low > 0:
        checks.ordered(low=low, up=up)
    return sharpness_aware(
        ascent.lp_ball(rho), combine.gradient_constrained(low, up, per_leaf))


def cr_sam(rho, gamma=0.1, beta=0.01):
    """CR-SAM (2312.13555): SAM with the trace of the Hessian, by differences, as a regulariser.

    result = g+ + gamma (g+ + g- - 2 g) + beta (g+ - g-), g+ and g- at w + eps and w - eps; see
    `combine.curvature`. Three gradient evaluations, of which two wait for none but the first.

    Args:
      rho: as of `sam`; 0.1 in the authors' command.
      gamma, beta: weights; theirs.
    """
    checks.finite(gamma=gamma, beta=beta)
    return sharpness_aware(ascent.lp_ball(rho), combine.curvature(gamma, beta))


def stable_sam(rho):
    """Stable SAM: (|g| / |g_p|) g_p, the direction of SAM with the length of the clean gradient.

    The rule is from a secondary source (the method zoo of the zij library).

    Args:
      rho: as of `sam`.
    """
    return sharpness_aware(ascent.lp_ball(rho), combine.renormalized())


def looksam(rho, k=5, alpha=0.7, per_leaf=False):
    """LookSAM (2203.02714): the ascent at every k-th step, and what it added reused in between.

    At the steps 0, k, 2k, ... g_p, of which g_v = g_p - <g, g_p> / <g, g> g is kept; at the others
    g + alpha (|g| / |g_v|) g_v. k = 1 is `sam`. 1 + 1/k gradient evaluations; state: one pytree.

    Args:
      rho: as of `sam`.
      k: period.
      alpha: 0.7 in the community's code; MSAM's authors found 0.1 better on CIFAR ResNets.
      per_leaf: norms and products leaf by leaf, as some ports have them.
    """
    checks.finite(alpha=alpha)
    return sharpness_aware(
        ascent.lp_ball(rho), combine.reused(alpha, per_leaf), gate.every(k))


def look_layersam(rho, k=5, alpha=0.7):
    """Look-LayerSAM (2203.02714): LookSAM with the ascent of `layerwise_sam`."""
    checks.finite(alpha=alpha)
    return sharpness_aware(
        ascent.layer_ball(rho), combine.reused(alpha), gate.every(k), norm=ascent.layer_norm)
