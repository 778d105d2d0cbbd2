"""Methods without SAM's ascent, or with less than its second gradient.

Random probes (`universal.py`), one gradient taken elsewhere (`shifted.py`), a loss with memory, and
a second gradient of some examples only.
"""

from typing import NamedTuple

import optax

from sam_jax.sharpness import ascent, checks, gate, mask, shifted, universal
from sam_jax.sharpness.transform import Method, sharpness_aware


def trace_sam(rho, lam=1.0, n=1):
    """Trace-SAM (2406.03682): descent of L + lam mean_i (L(w + rho z_i) - L(w)), z ~ N(0, I).

    result = g + lam mean_i(g_i - g). The mean is that of L + lam rho^2 tr(H) / 2. With n = 1 and
    lam = 1 it is the gradient at a randomly perturbed point. z is not normalised (nor in the
    authors' code): ||rho z|| is about rho sqrt(number of params). 1 + n gradient evaluations; no
    state but counters. `update` needs `value`, `value_and_grad_fn` and `key`, see
    `universal.probing`.

    Args:
      rho: standard deviation of the noise; 0.01 in the authors' CIFAR-10 run.
      lam: weight.
      n: number of probes.
    """
    checks.at_least(1, n=n)
    checks.finite(lam=lam)
    return universal.probing(rho, n, universal.gaussian, universal.trace_weights(lam))


def det_sam(rho, lam=1.0, h=0.01, n=1):
    """Det-SAM (2406.03682): psi(t) = exp(-t / 2), phi(t) = t^-2, z uniform in [-h, h]^d.

    With n = 1: g + lam exp(D) (g_1 - g), D = (L(w + rho z) - L(w)) / rho^2. 1 + n gradient
    evaluations; otherwise as `trace_sam`.

    Args:
      rho: 1.0 in the authors' CIFAR-10 run.
      lam: weight.
      h: half the side of the cube, > 0.
      n: number of probes.
    """
    checks.positive(h=h)
    checks.at_least(1, n=n)
    checks.finite(lam=lam)
    return universal.probing(rho, n, universal.cube(h), universal.det_weights(lam))


def frob_sam(rho, lam=0.005, n=2):
    """Frob-SAM (2406.03682): descent of L + lam / (2 rho^2) Var_{n-1}(L(w + rho z_i)).

    result = g + lam / rho^2 times the sample covariance of the losses L_i and gradients g_i. For a
    quadratic its mean is Aw + lam A^2 w, whatever rho is. 1 + n gradient evaluations; otherwise as
    `trace_sam`.

    Args:
      rho: 0.005 in the authors' CIFAR-10 run.
      lam: weight.
      n: number of probes, at least 2.
    """
    checks.at_least(2, n=n)
    checks.finite(lam=lam)
    return universal.probing(rho, n, universal.gaussian, universal.frob_weights(lam))


def momentum_sam(rho):
    """Momentum-SAM (MSAM, 2401.12033): one gradient, taken against the momentum.

    result = grad L(w - rho v / ||v||) with v the optimizer's momentum before the step (Adam's first
    moment). The sign is the paper's: along +v the last step has gone already. The params stay w,
    so evaluation and checkpoints are those of the centre. rho ||v||^-1 = lr mu would be Nesterov's
    momentum; with an optimizer that is Nesterov's already, which the paper does not have, the two
    look-aheads add up. One gradient evaluation; no state but counters. `point` and `update` need
    `momentum`.

    Args:
      rho: as of `sam`, but about ten times as large: 3 in the paper's CIFAR and ImageNet runs. ViTs
        want rho = 0 during the warm-up of the learning rate (`sam.warmup_epochs`).
    """
    return shifted.shifted(shifted.along_momentum(ascent.lp_ball(rho)), needs={'momentum'})


def extrapolated(rho, by='past'):
    """Extrapolated SGD (EXTRAP-SGD, 2006.05720): the gradient at w - rho zeta.

    zeta is
      'past'      the gradient of the step before, 0 at the first (one gradient evaluation; state:
                  one pytree, averaged over the groups);
      'noise'     N(0, I), by `key` (one gradient evaluation);
      'gradient'  the clean gradient of the same batch, of each group for itself (two): USAM with
                  rho of the other sign.
    In front of Adam it is the ExtraAdam form.

    Args:
      rho: gamma-hat, in units of a learning rate ('noise': a standard deviation).
      by: 'past', 'noise' or 'gradient'.

    Raises:
      ValueError: another `by`, or rho < 0.
    """
    checks.radius(rho)
    step = ascent.unnormalized(_times(rho, -1.0))
    if by == 'gradient':
        return sharpness_aware(step)
    if by == 'noise':
        return shifted.shifted(shifted.along_noise(step), needs={'key'})
    if by == 'past':
        return shifted.shifted(shifted.along_memory(step), remember=lambda grads: grads)
    raise ValueError(f"by is {by!r}; it must be 'past', 'noise' or 'gradient'.")


def sampa(rho, lam=0.2):
    """SAMPa (2410.10683): SAM whose two gradients are taken at the same time; `shifted.parallel`.

    Two gradient evaluations, neither of which waits for the other; state: one pytree.

    Args:
      rho: as of `sam`; 0.1 in the authors' CIFAR runs.
      lam: weight of the gradient at the extrapolated point; SAMPa-0.2. With lam = 0 and the clean
        gradient at w in the state it is `sam`.
    """
    return shifted.parallel(ascent.lp_ball(rho), lam)


def bsam(rho, prior_precision=40.0, beta1=0.9, beta2=0.999, damping=0.1, init_precision=1.0,
         data_factor=4.0, num_examples=1):
    """bSAM (2210.01620): SAM as variational Bayes; an optimizer of its own, `shifted.bayesian`.

    Two gradient evaluations; state: two pytrees.

    Args:
      rho: factor of the ascent g / s; 0.01 in the authors' CIFAR runs (learning rate 0.5).
      num_examples: of the training set; N of the paper is data_factor times as many.
      The others: the authors' CIFAR settings are the defaults; data_factor is for augmentation.
    """
    checks.positive(data_factor=data_factor)
    return shifted.bayesian(
        rho, data_factor * num_examples, prior_precision, beta1, beta2, damping, init_precision)


class Trajectory(NamedTuple):
    """A loss with memory: the network's distance from its own past.

    lam tau^2 mean_i KL(softmax(y_i / tau) || softmax(f(x_i) / tau)), in epochs (0-based) after
    `start_epoch`, with y_i the past logits of example i.

    Attributes:
      lam: weight.
      tau: temperature.
      start_epoch: the last epoch without it.
      epochs_ago: y are the logits that so many epochs ago were computed for the same example; 0: y
        are those of the moving average of the weights, now.
    """

    lam: float
    tau: float
    start_epoch: int
    epochs_ago: int

    def check(self):
        """Returns self. Raises ValueError if something is out of its range."""
        checks.at_least(0, lam=self.lam, start_epoch=self.start_epoch)
        checks.positive(tau=self.tau)
        return self


def saf(lam=0.3, tau=5.0, start_epoch=5, epochs_ago=3):
    """SAF (2205.14083): sharpness for free, a loss on the trajectory of each example's logits.

    The gradient is the base one, of the loss with `Trajectory`. Between two epochs the examples are
    augmented differently. Examples that the epoch `epochs_ago` before left out (the last, smaller
    batch) have no such loss. One gradient evaluation; the training loop keeps number of examples x
    epochs_ago x classes floats.

    Args:
      lam, tau: weight and temperature; 0.3 and 5 in the authors' text.
      start_epoch: the last epoch without the loss.
      epochs_ago: 3 in the authors' code, 2 in their ImageNet run.
    """
    checks.at_least(1, epochs_ago=epochs_ago)
    return _with_loss(Trajectory(lam, tau, start_epoch, epochs_ago))


def mesa(lam=0.8, tau=5.0, start_epoch=5):
    """MESA (2205.14083): SAF with a moving average of the weights in place of the memory.

    The teacher is `config.ema`'s average of params and statistics, in evaluation mode; it follows
    the weights faster at the start than the authors' v <- decay v + (1 - decay) w (see
    `optimizers.ema_update`). One gradient evaluation and a forward pass; no state besides it.

    Args:
      lam, tau, start_epoch: as of `saf`; lam 0.8 in the authors' ImageNet run.
    """
    return _with_loss(Trajectory(lam, tau, start_epoch, 0))


def _with_loss(trajectory):
    base = sharpness_aware(optax.set_to_zero(), gate=gate.never())
    return Method(base.init, base.update, trajectory=trajectory.check())


def esam(rho, beta=0.5, gamma=0.5):
    """Efficient SAM (2110.03141): some leaves climb, some examples descend.

    Each leaf climbs with probability beta: eps = (rho / beta) m g / ||m g||. The perturbed gradient
    is that of the share gamma of each replica's examples whose loss rises most from w to w + eps;
    of R examples max(1, ceil(gamma R)), a number known when compiling, so the gradient really is
    cheaper. (The authors' code keeps those strictly above the threshold, one fewer and perhaps
    none.) The dropout of the chosen is that of their places among the chosen, as everywhere that a
    batch is cut. beta = gamma = 1 is `sam`. One gradient, one forward pass and gamma of a gradient;
    no state but counters. `update` needs `key` and `selected_grad_fn`.

    Args:
      rho: as of `sam`.
      beta, gamma: in (0, 1]; 0.6 and 0.5 for ResNet-18, 0.5 and 0.5 for WRN and PyramidNet.
    """
    checks.share(gamma=gamma)
    chosen = mask.random_leaves(beta)
    return sharpness_aware(
        optax.chain(chosen, ascent.lp_ball(_times(rho, 1.0 / beta))), fraction=gamma,
        needs={'key'})


def _times(rho, factor):
    return (lambda count: factor * rho(count)) if callable(rho) else factor * rho
