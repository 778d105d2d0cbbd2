"""Methods that differ from SAM in where the perturbed gradient g_p is taken.

Two gradient evaluations and no state but counters, unless said otherwise.
"""

import jax
import optax

from sam_jax.sharpness import ascent, direction, ranges, registry
from sam_jax.sharpness import mask as masks
from sam_jax.sharpness.as_optax import Link, as_optax
from sam_jax.sharpness.ascent import Mask
from sam_jax.sharpness.builder import sharpness_aware
from sam_jax.sharpness.protocol import Method, Report, unless_still
from sam_jax.sharpness.trees import Rho, lp_norm


@registry.enter('g', 1, name='sgd', norm='')
def erm() -> Link:
    """The base gradient as it is: plain SGD, or whatever follows in the chain.

    One gradient evaluation; no state. Takes `grad_fn` and does not call it.
    """

    def step(loss, params, state, now):
        del now
        clean = loss(params)
        return clean.grads, state, Report(clean, clean, 0.0)

    return as_optax(Method(lambda params: (), step))


@registry.enter('g_p; any p-norm', 2)
def sam(rho: Rho, p: float = 2.0, mask: Mask = None) -> Link:
    """Sharpness-Aware Minimization (Foret et al., ICLR 2021, arXiv 2010.01412, equations 2 and 3).

    eps = argmax of <g, eps> under ||eps||_p <= rho;  result = grad L(w + eps), eps held constant.
    With p = 2, eps = rho g / ||g||_2 over all params together. For L = w'Aw / 2 the result is
    A (w + rho Aw / |Aw|). Two gradient evaluations; no state but counters.

    Put it in front of everything that must see the final gradient (clipping, momentum), and in
    front of `optax.MultiSteps`, so that each micro-batch ascends on its own.
    `optax.apply_if_finite` looks only at the gradient that it is given: behind `sam`, around the
    optimizer, it sees what is made of both gradients; around the whole chain it would let a NaN at
    w + eps through.

    Args:
      rho: radius >= 0; a number, a traced scalar, or an optax schedule of the number of updates.
      p: in (1, inf].
      mask: which params are perturbed: a pytree of bools, or a function params -> pytree of bools.
        The norm is over these alone. The gradient of all params is taken at the perturbed point.

    Raises:
      ValueError: rho < 0 or p <= 1.
    """
    ball = ascent.lp_ball(rho, p, mask)

    def step(loss, params, state, now):
        clean = loss(params, climb=True)
        eps, state = ball.update(clean.grads, state, params, count=now.count)
        there = loss.moved(params, eps, clean, linear=True)
        return there.grads, state, Report(clean, there, lp_norm(eps, p))

    return as_optax(Method(ball.init, step))


def _norm(p):
    return lambda eps, grads, params: lp_norm(eps, p)


@registry.enter('g_p, eps = rho g', 2, norm='of its own')
def unnormalized_sam(rho: Rho) -> Link:
    """USAM: eps = rho g, without the division by the norm; result = grad L(w + eps).

    For L = w'Aw / 2 the result is A (I + rho A) w. rho has the unit of a learning rate: with a
    gradient of norm 10 a rho of 0.005 goes as far as SAM's 0.05. Source: arXiv 2206.06232.

    Args:
      rho: as of `sam`.
    """
    ranges.radius(rho)  # a negative one would be an extrapolation
    return sharpness_aware(ascent.unnormalized(rho))


@registry.enter('g_p, eps no longer than `sigma` / |g|', 2, norm='at most rho')
def le_sam(rho: Rho, sigma: float = 1.0) -> Link:
    """LE-SAM (2605.10183): the radius shrinks where the gradient is long.

    eps = rho_t g / ||g|| with rho_t = min(sigma / ||g||, rho);  result = grad L(w + eps). To first
    order the loss then rises by no more than sigma. sigma = inf is `sam`. The rule is from a
    secondary source. Two gradient evaluations; no state but counters.

    Args:
      rho: the largest radius; as of `sam`.
      sigma: > 0, the largest rise of the loss, to first order.

    Raises:
      ValueError: rho < 0 or sigma <= 0.
    """
    return sharpness_aware(ascent.limited_ball(rho, sigma))


@registry.enter('g_p, each leaf climbing in units of its own norm', 2)
def layerwise_sam(rho: Rho) -> Link:
    """The ascent of Look-LayerSAM (2203.02714): eps_l = rho ||w_l|| g_l / ||g_l|| for each leaf l.

    Leaves of zeros (biases at the start) do not move. The norm reported is the largest of
    ||eps_l|| / ||w_l||.

    Args:
      rho: relative radius >= 0, a number, a traced scalar or a schedule.
    """
    return sharpness_aware(ascent.layer_ball(rho), norm=ascent.layer_norm)


@registry.enter('g_p, only normalisation layers climbing', 2)
def sam_on(rho: Rho, p: float = 2.0) -> Link:
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


@registry.enter('g_p, only the most sensitive entries climbing', 2, norm='at most rho')
def sparse_sam(rho: Rho, sparsity: float = 0.5, period: int = 100) -> Link:
    """Sparse SAM (SSAM-F, 2210.05177): SAM's eps on the most sensitive entries, 0 elsewhere.

    eps = m * rho g / ||g||: the mask comes after the norm, so ||eps|| <= rho. m: see `mask.sparse`.
    Two gradient evaluations; state: a pytree of squares and one of bools.

    Args:
      rho: as of `sam`.
      sparsity: share of the entries that stay where they are; 0 is `sam`.
      period: ascents after which the mask is made anew.
    """
    return sharpness_aware(masks.sparse(ascent.lp_ball(rho), sparsity, period))


@registry.enter('g_p, eps random (C.5)', 2, uphill=False)
def random_sam(rho: Rho, p: float = 2.0) -> Link:
    """SAM along a random direction: what the ascent itself is worth (SAM paper, appendix C.5).

    eps = rho z / ||z||_2 with z ~ N(0, I), for p = 2;  result = grad L(w + eps). The first gradient
    is not used, so two gradient evaluations are counted where one would do. No state but counters.
    `update` needs `key`.

    Args:
      rho, p: as of `sam`.
    """
    return sharpness_aware(optax.chain(direction.gaussian(), ascent.lp_ball(rho, p)), norm=_norm(p))


@registry.enter(
    'g_p after several projected steps (SAM paper, C.6)',
    lambda options, step: options['steps'] + 1,
    cost='`steps` + 1',
    norm='at most rho',
)
def multistep_sam(rho: Rho, steps: int = 2, step_size: float = 1.0, p: float = 2.0) -> Link:
    """SAM with several steps of projected gradient ascent (SAM paper, appendix C.6).

    result = grad L(w + eps), eps of `ascent.projected_steps`. steps = 1, step_size = 1 is `sam`.
    steps + 1 gradient evaluations; no state but counters.

    Args:
      rho: as of `sam`.
      steps: ascent steps; the paper has 1, 2, 3 and 5.
      step_size: length of each in units of rho.
      p: 2 or inf.
    """
    return sharpness_aware(ascent.projected_steps(rho, steps, step_size, p), norm=_norm(p))


@registry.enter('g_p with the term that SAM drops (C.4)', 4, cost='2 and a Hessian-vector product')
def second_order_sam(rho: Rho, p: float = 2.0) -> Link:
    """The exact gradient of w -> L(w + eps(w)), eps of `sam` (SAM paper, appendix C.4).

    With p = 2 and n = g / ||g||:  g_p + rho / ||g|| H (I - n n') g_p, where H is the Hessian at w.
    Two gradient evaluations and a Hessian-vector product, four in all; no state but counters.

    Args:
      rho, p: as of `sam`; p < inf, where eps changes with w.

    Raises:
      ValueError: p = inf; rho < 0 or p <= 1.
    """
    if p == float('inf'):
        raise ValueError(
            'p is inf, for which eps is constant and there is no second-order term; use method sam.'
        )
    ball = ascent.lp_ball(rho, p)

    def step(loss, params, state, now):
        clean = loss(params, climb=True)

        def climb(grads, params):
            return ball.update(grads, state, params, count=now.count)

        eps, pull_back, new_state = jax.vjp(climb, clean.grads, params, has_aux=True)
        there = loss.moved(params, eps, clean)
        by_grads, by_params = pull_back(there.grads)
        by_hessian = loss.hessian_product(params, by_grads)
        grads = jax.tree.map(lambda *terms: sum(terms), there.grads, by_hessian, by_params)
        return unless_still(eps, grads, clean), new_state, Report(clean, there, lp_norm(eps, p))

    return as_optax(Method(ball.init, step))


@registry.enter('g_p, of a ball in units of the weights', 2)
def asam(rho: Rho, eta: float = 0.01, adapt: str = 'weights') -> Link:
    """Adaptive SAM (2102.11600): a ball in units of the weights themselves.

    With T = |w| + eta:  eps = rho T^2 g / ||T g||, so ||eps / T|| = rho;  result = grad L(w + eps).

    `adapt` changes what rho means, since T = 1 for what is not adapted: a BatchNorm scale of 1 or a
    bias near 0 then moves as under SAM with this much larger rho. The authors use 0.5 (CIFAR-10)
    and 1.0 (CIFAR-100) with biases left out ('weights'); with everything adapted ('all', davda54's
    port) they found 2.0 best.

    Args:
      rho: as of `sam`; about ten times SAM's.
      eta: added to |w|; 0.01 in the authors' class, 0 in their CIFAR command.
      adapt: 'weights' (all but biases, as the authors), 'kernels' (not BatchNorm's either), 'all',
        or 'norm_only', the ASAM-ON of SAM-ON's authors: scales and biases of normalisation layers,
        and nothing else climbs; their command has a rho of 10.

    Raises:
      ValueError: rho or eta < 0, or another `adapt`.
    """
    metric = ascent.adaptive_metric(eta, adapt)
    return sharpness_aware(ascent.metric_ball(rho, metric), norm=ascent.metric_norm(metric))


@registry.enter('g_p, of a ball in the Fisher metric', 2)
def fisher_sam(rho: Rho, eta: float = 1.0) -> Link:
    """Fisher SAM (2206.04920): a ball in the metric of the diagonal Fisher information.

    With F = 1 + eta g^2, g the batch's gradient:  eps = rho F^-1 g / sqrt(g' F^-1 g). eta = 0 is
    `sam`. There is no code of the authors; F^-1 = 1 / (1 + eta g^2), rho = 0.1 and eta = 1 are
    from secondary sources.

    Args:
      rho: as of `sam`.
      eta: >= 0, weight of the squared gradient in the metric.

    Raises:
      ValueError: rho or eta < 0.
    """
    metric = ascent.fisher_metric(eta)
    return sharpness_aware(ascent.metric_ball(rho, metric), norm=ascent.metric_norm(metric))


@registry.enter('g_p, climbing along an average of gradients', 2, uphill=False)
def vasso(rho: Rho, theta: float = 0.9) -> Link:
    """VaSSO (2309.15639): the ascent goes along a moving average of the gradients.

    d = g at the first step, then (1 - theta) d + theta g;  eps = rho d / ||d||. theta = 1 is `sam`.
    State: one pytree.

    Args:
      rho: as of `sam`.
      theta: weight of the new gradient, in (0, 1].
    """
    return sharpness_aware(optax.chain(direction.averaged(theta), ascent.lp_ball(rho)))


@registry.enter('g_p, climbing along what is new in g', 2, uphill=False)
def friendly_sam(rho: Rho, sigma: float = 1.0, lam: float = 0.9) -> Link:
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
