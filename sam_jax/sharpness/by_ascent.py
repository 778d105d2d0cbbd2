"""Methods that differ from SAM in the ascent: where the perturbed gradient is taken.

Each is one expression. Two gradient evaluations and no state but counters, unless said otherwise.
"""

import optax

from sam_jax.sharpness import ascent, checks, combine, direction, gate
from sam_jax.sharpness import mask as masks
from sam_jax.sharpness.transform import sharpness_aware


def _norm(p):
    return lambda eps, grads, params: ascent.lp_norm(eps, p)


def sam(rho, p=2.0, mask=None):
    """Sharpness-Aware Minimization (Foret et al., ICLR 2021, arXiv 2010.01412, equations 2 and 3).

    eps = argmax of <g, eps> under ||eps||_p <= rho;  result = grad L(w + eps), eps held constant.
    With p = 2, eps = rho g / ||g||_2 over all params together. For L = w'Aw / 2 the result is
    A (w + rho Aw / |Aw|). Two gradient evaluations; no state but counters.

    Put it in front of everything that must see the final gradient (clipping, momentum), and in
    front of `optax.MultiSteps`, so that each micro-batch ascends on its own.

    Args:
      rho: radius >= 0; a number, a traced scalar, or an optax schedule of the number of updates.
      p: in (1, inf].
      mask: which params are perturbed: a pytree of bools, or a function params -> pytree of bools.
        The norm is over these alone. The gradient of all params is taken at the perturbed point.

    Raises:
      ValueError: rho < 0 or p <= 1.
    """
    return sharpness_aware(
        ascent.lp_ball(rho, p, mask), combine.perturbed(), gate.always(),
        norm=_norm(p))


def unnormalized_sam(rho):
    """USAM: eps = rho g, without the division by the norm; result = grad L(w + eps).

    For L = w'Aw / 2 the result is A (I + rho A) w. rho has the unit of a learning rate: with a
    gradient of norm 10 a rho of 0.005 goes as far as SAM's 0.05. Source: arXiv 2206.06232.

    Args:
      rho: as of `sam`.
    """
    checks.radius(rho)  # a negative one would be an extrapolation
    return sharpness_aware(ascent.unnormalized(rho))


def asam(rho, eta=0.01, adapt='weights'):
    """Adaptive SAM (2102.11600): a ball in units of the weights themselves.

    With T = |w| + eta:  eps = rho T^2 g / ||T g||, so ||eps / T|| = rho;  result = grad L(w + eps).

    `adapt` changes what rho means, since T = 1 for what is not adapted: a BatchNorm scale of 1 or a
    bias near 0 then moves as under SAM with this much larger rho. The authors use 0.5 (CIFAR-10)
    and 1.0 (CIFAR-100) with biases left out ('weights'); with everything adapted ('all', davda54's
    port) they found 2.0 best.

    Args:
      rho: as of `sam`; about ten times SAM's.
      eta: added to |w|; 0.01 in the authors' class, 0 in their CIFAR command.
      adapt: 'weights' (all but biases, as the authors), 'kernels' (not BatchNorm's either), 'all'.

    Raises:
      ValueError: rho or eta < 0, or another `adapt`.
    """
    metric = ascent.adaptive_metric(eta, adapt)
    return sharpness_aware(ascent.metric_ball(rho, metric), norm=ascent.metric_norm(metric))


def fisher_sam(rho, eta=1.0):
    """Fisher SAM (2206.04920): a ball in the metric of the diagonal Fisher information.

    With F = 1 + eta g^2, g the batch's gradient:  eps = rho F^-1 g / sqrt(g' F^-1 g). eta = 0 is
    `sam`. There is no code of the authors; F^-1 = 1 / (1 + eta g^2), rho = 0.1 and eta = 1 are
    from secondary sources.

    Raises:
      ValueError: rho or eta < 0.
    """
    metric = ascent.fisher_metric(eta)
    return sharpness_aware(ascent.metric_ball(rho, metric), norm=ascent.metric_norm(metric))


def layerwise_sam(rho):
    """The ascent of Look-LayerSAM (2203.02714): eps_l = rho ||w_l|| g_l / ||g_l|| for each leaf l.

    Leaves of zeros (biases at the start) do not move. The norm reported is the largest of
    ||eps_l|| / ||w_l||.

    Args:
      rho: relative radius >= 0, a number, a traced scalar or a schedule.
    """
    return sharpness_aware(ascent.layer_ball(rho), norm=ascent.layer_norm)


def sam_on(rho, p=2.0):
    """SAM-ON (2306.04226): only normalisation layers are perturbed, everything descends.

    eps = rho m g / ||m g|| with m = 1 on the scales and biases of normalisation layers and 0
    elsewhere; the norm is over these alone. Radii are larger than SAM's (the authors: 0.5 and more
    for plain l2 on CIFAR; their example, ASAM in place of l2, has 10).

    Args:
      rho, p: as of `sam`.

    Raises (from init and update):
      ValueError: the params have no normalisation layer.
    """
    return sharpness_aware(ascent.lp_ball(rho, p, masks.normalization), norm=_norm(p))


def sparse_sam(rho, sparsity=0.5, period=100):
    """Sparse SAM (SSAM-F, 2210.05177): SAM's eps on the most sensitive entries, 0 elsewhere.

    eps = m * rho g / ||g||: the mask comes after the norm, so ||eps|| <= rho. m: see `mask.sparse`.
    Two gradient evaluations; state: a pytree of squares and one of bools.

    Args:
      rho: as of `sam`.
      sparsity: share of the entries that stay where they are; 0 is `sam`.
      period: ascents after which the mask is made anew.
    """
    return sharpness_aware(masks.sparse(ascent.lp_ball(rho), sparsity, period))


def random_sam(rho, p=2.0):
    """SAM along a random direction: what the ascent itself is worth (SAM paper, appendix C.5).

    eps = rho z / ||z||_2 with z ~ N(0, I), for p = 2;  result = grad L(w + eps). The first gradient
    is not used, so two gradient evaluations are counted where one would do. No state but counters.
    `update` needs `key`.

    Args:
      rho, p: as of `sam`.
    """
    return sharpness_aware(
        optax.chain(direction.gaussian(), ascent.lp_ball(rho, p)), norm=_norm(p),
        needs={'key'})


def multistep_sam(rho, steps=2, step_size=1.0, p=2.0):
    """SAM with several steps of projected gradient ascent (SAM paper, appendix C.6).

    result = grad L(w + eps), eps of `ascent.projected_steps`. steps = 1, step_size = 1 is `sam`.
    steps + 1 gradient evaluations; no state but counters.

    Args:
      rho: as of `sam`.
      steps: ascent steps; the paper has 1, 2, 3 and 5.
      step_size: length of each in units of rho.
      p: 2 or inf.
    """
    return sharpness_aware(
        ascent.projected_steps(rho, steps, step_size, p), norm=_norm(p))


def second_order_sam(rho, p=2.0):
    """The exact gradient of w -> L(w + eps(w)), eps of `sam` (SAM paper, appendix C.4).

    With p = 2 and n = g / ||g||:  g_p + rho / ||g|| H (I - n n') g_p, where H is the Hessian at w.
    Two gradient evaluations and a Hessian-vector product, four in all; no state but counters.

    Args:
      rho, p: as of `sam`; p < inf, where eps changes with w.

    Raises:
      ValueError: p = inf; rho < 0 or p <= 1.
    """
    if p == float('inf'):
        raise ValueError('p is inf, for which eps is constant and there is no second-order term; '
                         'use method sam.')
    return sharpness_aware(
        ascent.lp_ball(rho, p), norm=_norm(p), second_order=True)


def vasso(rho, theta=0.9):
    """VaSSO (2309.15639): the ascent goes along a moving average of the gradients.

    d = g at the first step, then (1 - theta) d + theta g;  eps = rho d / ||d||. theta = 1 is `sam`.
    State: one pytree.

    Args:
      rho: as of `sam`.
      theta: weight of the new gradient, in (0, 1].
    """
    return sharpness_aware(optax.chain(direction.averaged(theta), ascent.lp_ball(rho)))


def friendly_sam(rho, sigma=1.0, lam=0.9):
    """Friendly SAM (2403.12350): the ascent goes along what is new in the gradient.

    d = g - sigma m, then m <- lam m + (1 - lam) g (d = m = g at the first step);
    eps = rho d / ||d||. sigma = 0 is `sam`. With sigma = 1 and a gradient that does not change
    d = 0, and the step is the base optimizer's. State: one pytree.

    Args:
      rho: as of `sam`.
      sigma: share of the average that is taken away.
      lam: memory of the average, in [0, 1): 0.9 in the authors' class, 0.6 in their CIFAR-100 run.
    """
    return sharpness_aware(optax.chain(direction.without_average(sigma, lam), ascent.lp_ball(rho)))
