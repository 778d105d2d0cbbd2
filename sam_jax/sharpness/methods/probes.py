"""The universal class of sharpness measures (2406.03682): Trace-, Det- and Frob-SAM.

S(w) = phi(mean_i psi(D_i)) with D_i = (L(w + rho z_i) - L(w)) / rho^2 at n random probes z_i; of
Trace and Det the exact gradient of L + lam rho^2 S descends, of Frob that of a variance.
Losses are differences of near-equal numbers: they are taken in at least float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sam_jax.sharpness import ranges, registry
from sam_jax.sharpness.as_optax import Link, as_optax
from sam_jax.sharpness.direction import random_like
from sam_jax.sharpness.protocol import Method, Report
from sam_jax.sharpness.trees import Rho, lp_norm, move, promote, radius_at

# What `probing` takes: (key, params) -> z, and (L, [L_1 ... L_n], rho) -> (a, b).
Draw = Callable[[PRNGKeyArray, Any], Any]
Weigh = Callable[
    [Float[Array, ''], Float[Array, ' n'], Float[Array, '']],
    tuple[Float[Array, ' n'], Float[Array, ' n']],
]

# Det's weight exp(D) is cut here: e^30 leaves room for a gradient's square in float32.
LARGEST_EXPONENT = 30.0

# What takes a gradient at each of n probes.
_PROBES: dict[str, Any] = {
    'gradients': lambda options, step: 1 + options['n'],
    'cost': '1 + `n`',
    'norm': 'of its own',
    'uphill': False,
}
# What divides differences of losses by rho^2.
_NEEDS_RHO: dict[str, Any] = {
    'refuses': {'sam.schedule': 'constant', 'sam.warmup_epochs': 0.0},
    'why': 'divides differences of losses by rho^2, of which a small rho leaves only rounding',
}


@registry.enter('g and n random probes: the trace of the Hessian', **_PROBES)
def trace_sam(rho: Rho, lam: float = 1.0, n: int = 1) -> Link:
    """Trace-SAM (2406.03682): descent of L + lam mean_i (L(w + rho z_i) - L(w)), z ~ N(0, I).

    result = g + lam mean_i(g_i - g). The mean is that of L + lam rho^2 tr(H) / 2. With n = 1 and
    lam = 1 it is the gradient at a randomly perturbed point. z is not normalised (nor in the
    authors' code): ||rho z|| is about rho sqrt(number of params). 1 + n gradient evaluations; no
    state but counters. `update` needs `key`, and losses, see `probing`.

    Args:
      rho: standard deviation of the noise; 0.01 in the authors' CIFAR-10 run.
      lam: weight.
      n: number of probes.
    """
    ranges.at_least(1, n=n)
    ranges.finite(lam=lam)
    return probing(rho, n, gaussian, trace_weights(lam))


@registry.enter('the same: the determinant', **_PROBES, **_NEEDS_RHO)
def det_sam(rho: Rho, lam: float = 1.0, h: float = 0.01, n: int = 1) -> Link:
    """Det-SAM (2406.03682): psi(t) = exp(-t / 2), phi(t) = t^-2, z uniform in [-h, h]^d.

    With n = 1: g + lam exp(D) (g_1 - g), D = (L(w + rho z) - L(w)) / rho^2. 1 + n gradient
    evaluations; otherwise as `trace_sam`.

    Args:
      rho: 1.0 in the authors' CIFAR-10 run.
      lam: weight.
      h: half the side of the cube, > 0.
      n: number of probes.
    """
    ranges.positive(h=h)
    ranges.at_least(1, n=n)
    ranges.finite(lam=lam)
    return probing(rho, n, cube(h), det_weights(lam))


@registry.enter('the same: the Frobenius norm', **_PROBES, **_NEEDS_RHO)
def frob_sam(rho: Rho, lam: float = 0.005, n: int = 2) -> Link:
    """Frob-SAM (2406.03682): descent of L + lam / (2 rho^2) Var_{n-1}(L(w + rho z_i)).

    result = g + lam / rho^2 times the sample covariance of the losses L_i and gradients g_i. For a
    quadratic its mean is Aw + lam A^2 w, whatever rho is. 1 + n gradient evaluations; otherwise as
    `trace_sam`.

    Args:
      rho: 0.005 in the authors' CIFAR-10 run.
      lam: weight.
      n: number of probes, at least 2.
    """
    ranges.at_least(2, n=n)
    ranges.finite(lam=lam)
    return probing(rho, n, gaussian, frob_weights(lam))


def probing(rho: Rho, n: int, draw: Draw, weigh: Weigh) -> Link:
    """Builds a method from the losses and gradients at n random probes.

    result = sum_i a_i (g_i - g) + g + sum_i b_i g_i, with g the gradient at w, g_i that at
    w + rho z_i, and weights (a, b) = weigh(L, [L_1 ... L_n], rho). Where rho = 0 it is g.

    In a chain it is given `loss=sharpness.from_loss_fn(loss_fn)` and `key`.

    Args:
      rho: a number, a traced scalar or a schedule of the number of updates.
      n: number of probes, a Python int.
      draw: (key, params) -> z.
      weigh: see above.
    """
    ranges.radius(rho)

    def step(loss, params, state, now):
        key, clean = now.need('key'), loss(params)
        radius = jnp.asarray(radius_at(rho, now.count), float)
        ways = [
            jax.tree.map(
                lambda x: radius.astype(x.dtype) * x, draw(jax.random.fold_in(key, i), params)
            )
            for i in range(n)
        ]
        probes = [loss(move(params, eps)) for eps in ways]
        a, b = weigh(
            _told(clean.value),
            jnp.stack([_told(x.value) for x in probes]),
            jnp.where(radius > 0, radius, 1.0),
        )

        def combined(g, *g_i):
            total = g + sum(
                a[i].astype(g.dtype) * (x - g) + b[i].astype(g.dtype) * x for i, x in enumerate(g_i)
            )
            return jnp.where(radius > 0, total, g)

        grads = jax.tree.map(combined, clean.grads, *(x.grads for x in probes))
        return grads, state, Report(clean, probes[0], lp_norm(ways[0]))

    return as_optax(Method(lambda params: (), step))


def _told(value):
    if value is None:
        raise TypeError(
            'This method compares losses: tx.update(grads, state, params, '
            'loss=sharpness.from_loss_fn(loss_fn), key=key).'
        )
    return promote(value)


def trace_weights(lam: float) -> Weigh:
    """psi(t) = t, phi(t) = t: a_i = lam / n."""

    def weigh(value, losses, rho):
        del value, rho
        return jnp.full_like(losses, lam / losses.size), jnp.zeros_like(losses)

    return weigh


def det_weights(lam: float) -> Weigh:
    """psi(t) = exp(-t / 2), phi(t) = t^-2: a_i = lam exp(-D_i / 2) / (n mean_j(exp(-D_j / 2))^3).

    For n = 1 lam exp(D). The exponent is at most 30, so that a probe far above w does not overflow.
    """

    def weigh(value, losses, rho):
        half = -(losses - value) / (2 * rho**2)
        log_mean = jax.nn.logsumexp(half) - jnp.log(float(losses.size))
        exponent = jnp.minimum(half - 3 * log_mean, LARGEST_EXPONENT)
        return lam / losses.size * jnp.exp(exponent), jnp.zeros_like(losses)

    return weigh


def frob_weights(lam: float) -> Weigh:
    """lam / rho^2 times the sample covariance of losses and gradients.

    b_i = lam / rho^2 (L_i - mean_j L_j) / (n - 1): the gradient of
    L + lam / (2 rho^2) Var_{n-1}(L(w + rho z_i)).
    """

    def weigh(value, losses, rho):
        del value
        centred = losses - jnp.mean(losses)
        return jnp.zeros_like(losses), lam / rho**2 * centred / (losses.size - 1)

    return weigh


def gaussian(key: PRNGKeyArray, params: Any) -> Any:
    """z ~ N(0, I)."""
    return random_like(key, params)


def cube(h: float) -> Draw:
    """z uniform in [-h, h]^d, as a function (key, params) -> z."""

    def draw(key, params):
        leaves, structure = jax.tree.flatten(jax.tree.map(promote, params))
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(
            structure,
            [jax.random.uniform(k, x.shape, x.dtype, -h, h) for k, x in zip(keys, leaves)],
        )

    return draw
