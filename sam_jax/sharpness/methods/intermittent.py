"""Methods that ascend at some steps only: the base optimizer's gradient at the others.

The gradient of a step without ascent is the only one that it takes. Momentum and all other state of
the optimizer go on through both kinds of step. Of shake models, which know a gradient to climb and
another to descend, `ae_sam` and `ae_looksam` take the first at all steps: their gate looks at it.
"""

from typing import Any

from sam_jax.sharpness import ascent, combine, gate, ranges, registry
from sam_jax.sharpness.as_optax import Link
from sam_jax.sharpness.builder import sharpness_aware
from sam_jax.sharpness.trees import Rho, progress

# Gradients of what climbs at every k-th step.
_EVERY_K: dict[str, Any] = {
    'gradients': lambda options, step: 1 + (step % options['k'] == 0),
    'cost': '1 + 1/`k`',
}


@registry.enter('g_p at every k-th step; what it added reused in between', **_EVERY_K)
def looksam(rho: Rho, k: int = 5, alpha: float = 0.7, per_leaf: bool = False) -> Link:
    """LookSAM (2203.02714): the ascent at every k-th step, and what it added reused in between.

    At the steps 0, k, 2k, ... g_p, of which g_v = g_p - <g, g_p> / <g, g> g is kept; at the others
    g + alpha (|g| / |g_v|) g_v. k = 1 is `sam`. 1 + 1/k gradient evaluations; state: one pytree.

    Args:
      rho: as of `sam`.
      k: period.
      alpha: 0.7 in the community's code; MSAM's authors found 0.1 better on CIFAR ResNets.
      per_leaf: norms and products leaf by leaf, as some ports have them.
    """
    ranges.finite(alpha=alpha)
    return sharpness_aware(ascent.lp_ball(rho), combine.reused(alpha, per_leaf), gate.every(k))


@registry.enter('the same with the ascent of `layerwise_sam`', **_EVERY_K)
def look_layersam(rho: Rho, k: int = 5, alpha: float = 0.7) -> Link:
    """Look-LayerSAM (2203.02714): LookSAM with the ascent of `layerwise_sam`.

    Args:
      rho: as of `layerwise_sam`.
      k, alpha: as of `looksam`.
    """
    ranges.finite(alpha=alpha)
    return sharpness_aware(
        ascent.layer_ball(rho), combine.reused(alpha), gate.every(k), norm=ascent.layer_norm
    )


@registry.enter('g_p at every k-th step, g at the others', **_EVERY_K)
def periodic_sam(rho: Rho, k: int = 5) -> Link:
    """SAM at the steps 0, k, 2k, ...; 1 + 1/k gradient evaluations.

    Args:
      rho: as of `sam`.
      k: period.
    """
    return sharpness_aware(ascent.lp_ball(rho), gate=gate.every(k))


@registry.enter('g_p in a window of the training', None, cost='1 + its share', late=True)
def late_phase_sam(
    rho: Rho, start: float = 0.9, end: float = 1.0, total_steps: int | None = None
) -> Link:
    """SAM in a window of the training only (2410.10373: the last epochs are nearly as good as all).

    1 + (end - start) gradient evaluations on average. The authors have a second optimizer for the
    window, whose momentum starts anew; here it goes on.

    Args:
      rho: as of `sam`.
      start, end: of the window, as fractions of the training, 0 <= start < end <= 1.
      total_steps: number of updates in the training.

    Raises:
      ValueError: the fractions are not in order, or total_steps is not given.
    """
    ranges.given(total_steps=total_steps)
    assert total_steps is not None  # so `given` has said
    ranges.zero_to_one(start=start, end=end)
    ranges.ordered(start=start, end=end)
    return sharpness_aware(
        ascent.lp_ball(rho), gate=gate.window(start * total_steps, end * total_steps)
    )


@registry.enter('g_p by a coin', None, cost='1 + its probability', late=True)
def rst(
    rho: Rho,
    probability: float = 0.5,
    final_probability: float = 0.5,
    alpha: float = 1.0,
    total_steps: int | None = None,
) -> Link:
    """Randomised sharpness-aware training (RST, SS-SAM, 2203.09962): a coin decides at each step.

    With the probability, g + alpha (g_p - g); else g. The probability goes linearly from
    `probability` to `final_probability`. For L = w'Aw / 2 and alpha = 1 the mean of the result is
    Aw + probability rho A^2 w / |Aw|. 1 + probability gradient evaluations on average. `update`
    needs `gate_key`, the same on all devices.

    Args:
      rho: as of `sam`.
      probability, final_probability: in [0, 1].
      alpha: weight of the perturbed gradient (G-RST); 1 is SAM's.
      total_steps: number of updates in the training; needed where the probabilities differ.

    Raises:
      ValueError: a probability is not in [0, 1], or alpha not finite.
    """
    ranges.zero_to_one(probability=probability, final_probability=final_probability)
    if probability != final_probability:
        ranges.given(total_steps=total_steps)
    ranges.finite(alpha=alpha)

    def scheduled(count):
        return probability + (final_probability - probability) * progress(count, total_steps or 1)

    mix = combine.perturbed() if alpha == 1 else combine.lerp(alpha)
    return sharpness_aware(ascent.lp_ball(rho), mix, gate.bernoulli(scheduled))


@registry.enter('g_p where g is long for its history', None, cost='about 1.5')
def ae_sam(
    rho: Rho,
    delta: float = 0.9,
    lambda1: float = -1.0,
    lambda2: float = 1.0,
    total_steps: int | None = None,
) -> Link:
    """AE-SAM (2304.14647): SAM where the gradient is long, measured by its history.

    See `gate.adaptive`. About 1.5 gradient evaluations on average; state: two scalars. The rule and
    its constants are from secondary sources.

    Args:
      rho: as of `sam`.
      delta: memory of the moving mean and variance.
      lambda1, lambda2: threshold at the end and at the start, in standard deviations.
      total_steps: number of updates in the training.

    Raises:
      ValueError: total_steps is not given, or another setting out of its range.
    """
    ranges.given(total_steps=total_steps)
    assert total_steps is not None  # so `given` has said
    return sharpness_aware(
        ascent.lp_ball(rho), gate=gate.adaptive(delta, lambda1, lambda2, total_steps)
    )


@registry.enter('the same, what an ascent added reused in between', None, cost='about 1.5')
def ae_looksam(
    rho: Rho,
    alpha: float = 0.7,
    delta: float = 0.9,
    lambda1: float = -1.0,
    lambda2: float = 1.0,
    total_steps: int | None = None,
) -> Link:
    """AE-LookSAM (2304.14647): `ae_sam` that reuses the last ascent's part at the other steps.

    Args:
      rho, delta, lambda1, lambda2, total_steps: as of `ae_sam`.
      alpha: as of `looksam`. State: one pytree and two scalars.
    """
    ranges.given(total_steps=total_steps)
    assert total_steps is not None  # so `given` has said
    ranges.finite(alpha=alpha)
    return sharpness_aware(
        ascent.lp_ball(rho),
        combine.reused(alpha),
        gate.adaptive(delta, lambda1, lambda2, total_steps),
    )
