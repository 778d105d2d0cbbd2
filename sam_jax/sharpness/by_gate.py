"""Methods that ascend at some steps only: the base optimizer's gradient at the others.

The gradient of a step without ascent is the only one that it takes. Momentum and all other state of
the optimizer go on through both kinds of step. Of shake models, which know a gradient to climb and
another to descend, `ae_sam` and `ae_looksam` take the first at all steps: their gate looks at it.
"""

from sam_jax.sharpness import ascent, checks, combine, gate
from sam_jax.sharpness.transform import sharpness_aware


def periodic_sam(rho, k=5):
    """SAM at the steps 0, k, 2k, ...; 1 + 1/k gradient evaluations.

    Args:
      rho: as of `sam`.
      k: period.
    """
    return sharpness_aware(ascent.lp_ball(rho), gate=gate.every(k))


def late_phase_sam(rho, start=0.9, end=1.0, total_steps=1):
    """SAM in a window of the training only (2410.10373: the last epochs are nearly as good as all).

    1 + (end - start) gradient evaluations on average. The authors have a second optimizer for the
    window, whose momentum starts anew; here it goes on.

    Args:
      rho: as of `sam`.
      start, end: of the window, as fractions of the training, 0 <= start < end <= 1.
      total_steps: number of updates in the training.

    Raises:
      ValueError: the fractions are not in order.
    """
    checks.fraction(start=start, end=end)
    checks.ordered(start=start, end=end)
    return sharpness_aware(
        ascent.lp_ball(rho), gate=gate.window(start * total_steps, end * total_steps))


def rst(rho, probability=0.5, final_probability=0.5, alpha=1.0, total_steps=1):
    """Randomised sharpness-aware training (RST, SS-SAM, 2203.09962): a coin decides at each step.

    With the probability, g + alpha (g_p - g); else g. The probability goes linearly from
    `probability` to `final_probability`. For L = w'Aw / 2 and alpha = 1 the mean of the result is
    Aw + probability rho A^2 w / |Aw|. 1 + probability gradient evaluations on average. `update`
    needs `gate_key`, the same on all devices.

    Args:
      rho: as of `sam`.
      probability, final_probability: in [0, 1].
      alpha: weight of the perturbed gradient (G-RST); 1 is SAM's.
      total_steps: number of updates in the training.

    Raises:
      ValueError: a probability is not in [0, 1], or alpha not finite.
    """
    checks.fraction(probability=probability, final_probability=final_probability)
    checks.finite(alpha=alpha)

    def scheduled(count):
        return probability + (final_probability - probability) * (count / total_steps)

    mix = combine.perturbed() if alpha == 1 else combine.lerp(alpha)
    return sharpness_aware(
        ascent.lp_ball(rho), mix, gate.bernoulli(scheduled), needs={'gate_key'})


def ae_sam(rho, delta=0.9, lambda1=-1.0, lambda2=1.0, total_steps=1):
    """AE-SAM (2304.14647): SAM where the gradient is long, measured by its history.

    See `gate.adaptive`. About 1.5 gradient evaluations on average; state: two scalars. The rule and
    its constants are from secondary sources.

    Args:
      rho: as of `sam`.
      delta: memory of the moving mean and variance.
      lambda1, lambda2: threshold at the end and at the start, in standard deviations.
      total_steps: number of updates in the training.
    """
    return sharpness_aware(
        ascent.lp_ball(rho), gate=gate.adaptive(delta, lambda1, lambda2, total_steps),
        needs={'gate_norm'})


def ae_looksam(rho, alpha=0.7, delta=0.9, lambda1=-1.0, lambda2=1.0, total_steps=1):
    """AE-LookSAM (2304.14647): `ae_sam` that reuses the last ascent's part at the other steps.

    Args:
      alpha: as of `looksam`; the rest as of `ae_sam`. State: one pytree and two scalars.
    """
    checks.finite(alpha=alpha)
    return sharpness_aware(
        ascent.lp_ball(rho), combine.reused(alpha),
        gate.adaptive(delta, lambda1, lambda2, total_steps), needs={'gate_norm'})
