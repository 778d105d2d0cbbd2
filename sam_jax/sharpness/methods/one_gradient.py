"""Methods of one gradient: taken at another place than the params, or of a loss with memory.

The params themselves stay the centre: they are what is evaluated and saved.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sam_jax.sharpness import ascent, ranges, registry, trees
from sam_jax.sharpness.as_optax import Link, as_optax
from sam_jax.sharpness.builder import sharpness_aware
from sam_jax.sharpness.direction import random_like
from sam_jax.sharpness.protocol import Method, Now, Report
from sam_jax.sharpness.trees import Rho, lp_norm, move, wide_zeros


def elsewhere(
    ball: ascent.Ascent,
    along: Callable[[Any, Any, Now], Any],
    init: Callable[[Any], Any] = lambda params: (),
    remember: Callable[[Any, Any], Any] = lambda state, grads: state,
) -> Link:
    """Builds a method of one gradient, that at w + ball(direction), handed on as it is.

    Args:
      ball: an ascent without state of its own but a counter, such as `ascent.lp_ball(rho)`.
      along: (state, params, Now) -> direction.
      init: params -> state.
      remember: (state, gradient) -> the state of the next step.
    """

    def step(loss, params, state, now):
        eps = taken(ball, along(state, params, now), params, now)
        there = loss(move(params, eps))
        return there.grads, remember(state, there.grads), Report(there, there, lp_norm(eps))

    return as_optax(Method(init, step))


def taken(ball: ascent.Ascent, direction: Any, params: Any, now: Now) -> Any:
    """Returns the step of an ascent that has no state but a counter."""
    return ball.update(direction, ball.init(params), params, count=now.count)[0]


def against_momentum(state: Any, params: Any, now: Now) -> Any:
    """The direction -v, v the optimizer's momentum; for `elsewhere`."""
    del state, params
    return jax.tree.map(jnp.negative, now.need('momentum'))


@registry.enter('the gradient at w - rho v / |v|, v the momentum', 1, uphill=False, late=True)
def momentum_sam(rho: Rho) -> Link:
    """Momentum-SAM (MSAM, 2401.12033): one gradient, taken against the momentum.

    result = grad L(w - rho v / ||v||) with v the optimizer's momentum before the step (Adam's first
    moment). The sign is the paper's: along +v the last step has gone already. The params stay w,
    so evaluation and checkpoints are those of the centre. rho ||v||^-1 = lr mu would be Nesterov's
    momentum; with an optimizer that is Nesterov's already, which the paper does not have, the two
    look-aheads add up. One gradient evaluation; no state but counters. `update` needs `momentum`.

    Args:
      rho: as of `sam`, but about ten times as large: 3 in the paper's CIFAR and ImageNet runs. ViTs
        want rho = 0 during the warm-up of the learning rate (`sam.warmup_epochs`).
    """
    return elsewhere(ascent.lp_ball(rho), against_momentum)


@registry.enter(
    'the gradient at w - rho zeta',
    lambda options, step: 1 + (options['by'] == 'gradient'),
    cost='1, or 2',
    norm='of its own',
    uphill=False,
    late=True,
)
def extrapolated(rho: Rho, by: str = 'past') -> Link:
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
    ranges.radius(rho)
    step = ascent.unnormalized(trees.times(rho, -1.0))
    if by == 'gradient':
        return sharpness_aware(step)
    if by == 'noise':
        return elsewhere(step, lambda state, params, now: random_like(now.need('key'), params))
    if by == 'past':
        return elsewhere(
            step, lambda state, params, now: state, wide_zeros, lambda state, grads: grads
        )
    raise ValueError(f"by is {by!r}; it must be 'past', 'noise' or 'gradient'.")


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

    def check(self) -> 'Trajectory':
        """Returns self. Raises ValueError if something is out of its range."""
        ranges.at_least(0, lam=self.lam, start_epoch=self.start_epoch)
        ranges.positive(tau=self.tau)
        return self


@registry.enter('g, of a loss that holds on to past predictions; no rho', 1, norm='')
def saf(lam: float = 0.3, tau: float = 5.0, start_epoch: int = 5, epochs_ago: int = 3) -> Link:
    """SAF (2205.14083): sharpness for free, a loss on the trajectory of each example's logits.

    The gradient is the base one, of a loss with `Trajectory`, which the training loop adds. In a
    chain of one's own the loss must have the term (`sam_jax.losses.trajectory`), and `update` is
    told so by `added_loss=True`. Between two epochs the examples are augmented differently.
    Examples that the epoch `epochs_ago` before left out (the last, smaller batch) have no such
    loss. One gradient evaluation; the training loop keeps number of examples x epochs_ago x classes
    floats on each device, or of streamed images as many of half the size on each host (ImageNet,
    two epochs: 4.8 GiB, in each checkpoint too).

    Args:
      lam, tau: weight and temperature; 0.3 and 5 in the authors' text.
      start_epoch: the last epoch without the loss.
      epochs_ago: 3 in the authors' code, 2 in their ImageNet run.
    """
    ranges.at_least(1, epochs_ago=epochs_ago)
    return _with_loss(Trajectory(lam, tau, start_epoch, epochs_ago), 'SAF')


@registry.enter(
    'g, of a loss that holds on to the average of the weights; no rho',
    1,
    cost='1 and a forward pass',
    norm='',
)
def mesa(lam: float = 0.8, tau: float = 5.0, start_epoch: int = 5) -> Link:
    """MESA (2205.14083): SAF with a moving average of the weights in place of the memory.

    The teacher is `config.ema`'s average of params and statistics, in evaluation mode; it follows
    the weights faster at the start than the authors' v <- decay v + (1 - decay) w (see
    `optimizers.ema_update`). One gradient evaluation and a forward pass; no state besides it.

    Args:
      lam, tau, start_epoch: as of `saf`; lam 0.8 in the authors' ImageNet run.
    """
    return _with_loss(Trajectory(lam, tau, start_epoch, 0), 'MESA')


def _with_loss(trajectory, name):
    def step(loss, params, state, now):
        now.need('added_loss', name)
        clean = loss(params)
        return clean.grads, state, Report(clean, clean, 0.0)

    return as_optax(Method(lambda params: (), step), trajectory=trajectory.check())
