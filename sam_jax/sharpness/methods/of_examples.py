"""Methods that look into the batch or the network: ESAM and functional SAM."""

import optax

from sam_jax.sharpness import ascent, mask, ranges, registry, trees
from sam_jax.sharpness.as_optax import Link, as_optax
from sam_jax.sharpness.ascent import Mask
from sam_jax.sharpness.builder import climbed
from sam_jax.sharpness.protocol import Method, Report
from sam_jax.sharpness.trees import Rho, lp_norm


@registry.enter(
    'some leaves climb, some examples descend',
    2,
    cost='1, a forward pass, and `gamma` of one',
    norm='of its own',
    uphill=False,
)
def esam(rho: Rho, beta: float = 0.5, gamma: float = 0.5) -> Link:
    """Efficient SAM (2110.03141): some leaves climb, some examples descend.

    Each leaf climbs with probability beta: eps = (rho / beta) m g / ||m g||; see
    `mask.random_leaves`. The perturbed gradient is that of the share gamma of each replica's
    examples whose loss rises most from w to w + eps; of R examples max(1, ceil(gamma R)), a number
    known when compiling, so the gradient really is cheaper. (The authors' code keeps those strictly
    above the threshold, one fewer and perhaps none.) The dropout of the chosen is that of their
    places among the chosen, as everywhere that a batch is cut. beta = gamma = 1 is `sam`. One
    gradient, one forward pass and gamma of a gradient; no state but counters. `update` needs `key`
    and a `loss` that knows its examples.

    Args:
      rho: as of `sam`.
      beta, gamma: in (0, 1]; 0.6 and 0.5 for ResNet-18, 0.5 and 0.5 for WRN and PyramidNet.
    """
    ranges.above_zero_to_one(gamma=gamma)
    ball = optax.chain(mask.random_leaves(beta), ascent.lp_ball(trees.times(rho, 1.0 / beta)))

    def step(loss, params, state, now):
        clean = loss(params, climb=True)
        eps, state = climbed(ball, loss, clean, params, state, now)
        some = {} if gamma == 1 else {'most_risen': (gamma, clean)}
        there = loss.moved(params, eps, clean, linear=True, **some)
        return there.grads, state, Report(clean, there, lp_norm(eps))

    return as_optax(Method(ball.init, step))


@registry.enter("J(w + eps)' dL/dz, the outputs' derivative that of w", 2)
def functional_sam(rho: Rho, p: float = 2.0, mask: Mask = None) -> Link:
    """Functional SAM (2502.02407): the network is perturbed, and not what the loss says of it.

    The gradient of a loss of outputs z is J' dL/dz, J the Jacobian of the outputs by the params.
    SAM takes both factors at w + eps; here result = J(w + eps)' (dL/dz at w), eps of `sam`, which
    leaves out that the perturbed outputs are worse. For a loss linear in its outputs it is `sam`,
    for a network linear in its params the base gradient. What is no function of the outputs (weight
    decay as a part of the loss) is taken at w + eps. The authors precondition the ascent for
    language models; here it is SAM's own. Two gradient evaluations; no state but counters.
    `update` needs a `loss` that knows the outputs, such as `from_network` makes.

    Args:
      rho, p, mask: as of `sam`.

    Raises:
      ValueError: rho < 0 or p <= 1.
    """
    ball = ascent.lp_ball(rho, p, mask)

    def step(loss, params, state, now):
        clean = loss(params, climb=True)
        eps, state = climbed(ball, loss, clean, params, state, now)
        there = loss.moved(params, eps, clean, linear=True, cotangents_of=clean)
        return there.grads, state, Report(clean, there, lp_norm(eps, p))

    return as_optax(Method(ball.init, step))
