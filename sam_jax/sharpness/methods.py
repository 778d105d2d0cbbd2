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


# The names that config.sam.method may take. 'sgd' is the paper's word for the baseline.
METHODS = {'sam': sam, 'sgd': erm}


def create(method, **options):
    """Returns METHODS[method](**options), with the options that the method takes.

    Args:
      method: a name in METHODS.
      **options: every setting of `config.sam` besides the method; the method picks its own.
    """
    constructor = METHODS[method]
    wanted = inspect.signature(constructor).parameters
    return constructor(**{name: value for name, value in options.items() if name in wanted})
