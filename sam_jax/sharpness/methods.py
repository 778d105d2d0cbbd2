"""Named methods: each one expression over ascent, combine and gate."""

import functools
import inspect

import optax

from sam_jax.sharpness import ascent, combine, gate
from sam_jax.sharpness.transform import sharpness_aware


def erm():
    """The base gradient as it is: plain SGD, or whatever follows in the chain.

    One gradient evaluation; no state. Takes `grad_fn` and does not call it.
    """
    return sharpness_aware(optax.set_to_zero(), gate=gate.never())


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
        norm=functools.partial(ascent.lp_norm, p=p))


def random_sam(rho, p=2.0):
    """SAM along a random direction: what the ascent itself is worth (SAM paper, appendix C.5).

    eps = rho z / ||z||_2 with z ~ N(0, I), for p = 2;  result = grad L(w + eps). The first gradient
    is not used, so two gradient evaluations are counted where one would do. No state but counters.
    `update` needs `key`.

    Args:
      rho, p: as of `sam`.
    """
    return sharpness_aware(
        optax.chain(ascent.gaussian(), ascent.lp_ball(rho, p)),
        norm=functools.partial(ascent.lp_norm, p=p))


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
        ascent.projected_steps(rho, steps, step_size, p),
        norm=functools.partial(ascent.lp_norm, p=p))


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
        ascent.lp_ball(rho, p), norm=functools.partial(ascent.lp_norm, p=p), second_order=True)


# The names that config.sam.method may take. 'sgd' is the paper's word for the baseline.
METHODS = {
    'sam': sam, 'random_sam': random_sam, 'multistep_sam': multistep_sam,
    'second_order_sam': second_order_sam, 'sgd': erm}


def options(method):
    """Returns {name: default} of what a method takes besides rho, p and mask."""
    return {name: parameter.default
            for name, parameter in inspect.signature(METHODS[method]).parameters.items()
            if name not in ('rho', 'p', 'mask')}


def create(method, **settings):
    """Returns METHODS[method](**settings), with the settings that the method takes.

    Args:
      method: a name in METHODS.
      **settings: every setting of `config.sam` besides the method; the method picks its own.
    """
    constructor = METHODS[method]
    wanted = inspect.signature(constructor).parameters
    return constructor(**{name: value for name, value in settings.items() if name in wanted})
