"""Sharpness: how far the loss rises in a ball around the params.

    max over the ball of L(w + eps) - L(w)

by the ascents of `sam_jax.sharpness.ascent`: the SAM step (`lp_ball`), projected steps
(`projected_steps`, SAM paper appendix C.6), ASAM's ellipsoid (`metric_ball`). An ascent finds a
point of the ball and not always the highest: what is reported is a lower bound of the maximum.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam_jax import metrics, rngs
from sam_jax.analysis import objective as objectives
from sam_jax.replicas import AXIS, paced
from sam_jax.sharpness.ascent import Ascent, lp_ball
from sam_jax.sharpness.direction import random_like
from sam_jax.sharpness.trees import lp_norm, move

# Entries of params that may be copied at once for groups that ascend side by side: 1 GiB. On CPU
# XLA runs a convolution with kernels of several groups much slower than one after the other.
_COPIED = {'cpu': 0}
_COPIED_ELSEWHERE = 2**28


class Rise(NamedTuple):
    """Loss and error rate at w and above it.

    Attributes:
      loss, error_rate: at w.
      perturbed_loss, perturbed_error_rate: at w + eps; means over groups or draws.
      standard_error: of the rise, over groups or draws; NaN where there is one only.
      count: number of groups or draws.
    """

    loss: float
    error_rate: float
    perturbed_loss: float
    perturbed_error_rate: float
    standard_error: float
    count: int

    @property
    def sharpness(self) -> float:
        """The rise of the loss."""
        return self.perturbed_loss - self.loss

    @property
    def error_rise(self) -> float:
        """The rise of the error rate."""
        return self.perturbed_error_rate - self.error_rate


_NO_GROUPS = Rise(*[float('nan')] * 5, 0)


def of_ball(objective: objectives.Objective, params: Any, ascent: Ascent) -> Rise:
    """The rise at the point of the ball that an ascent finds, on the whole split (m = its size).

    Args:
      objective: objective.Objective.
      params: on the devices.
      ascent: optax transformation of `sharpness.ascent`, such as lp_ball(rho=0.05).
    """
    grads = objective.gradient(params)
    eps, _ = ascent.update(grads, ascent.init(params), params, grad_fn=objective.gradient)
    return _rises(objective.value(params), [objective.value(_moved(params, eps))])


def of_average_direction(
    objective: objectives.Objective, params: Any, rho: float, draws: int = 10, seed: int = 0
) -> Rise:
    """The mean rise at distance rho in directions drawn uniformly from the sphere."""
    ball = lp_ball(rho)

    def at(i):
        z = random_like(rngs.key(seed, 'average_direction', i), params)
        eps, _ = ball.update(z, ball.init(params), params)
        return objective.value(_moved(params, eps))

    return _rises(objective.value(params), [at(i) for i in range(draws)])


def order_cosine(objective: objectives.Objective, params: Any, rho: float) -> float:
    """The cosine of SAM's gradient and the one with the second-order terms (paper, C.4).

        v = grad L(w + rho n), n = g / |g|        and        v + rho / |g| H (v - n n'v)

    Both on the whole split; g and the Hessian H at w. NaN where g is 0.
    """
    gradient = objective.gradient(params)
    norm = float(lp_norm(gradient))
    if not norm:
        return math.nan
    n = jax.tree.map(lambda x: x / norm, gradient)
    first = objective.gradient(_moved(params, jax.tree.map(lambda x: rho * x, n)))
    along = _inner(n, first)
    across = jax.tree.map(lambda v, x: v - along * x, first, n)
    second = objective.hessian_product(params, across)
    whole = jax.tree.map(lambda v, h: v + rho / norm * h, first, second)
    return _inner(first, whole) / (float(lp_norm(first)) * float(lp_norm(whole)))


def _inner(x, y):
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y))
    return float(sum(jnp.vdot(a, b) for a, b in pairs))


def _moved(params, eps):
    return jax.tree.map(lambda x, w: x.astype(w.dtype), move(params, eps), params)


def _rises(clean, perturbed):
    found = {name: np.array([p[name] for p in perturbed]) for name in clean}
    return Rise(
        clean['loss'],
        clean['error_rate'],
        float(found['loss'].mean()),
        float(found['error_rate'].mean()),
        metrics.standard_error(found['loss']),
        len(perturbed),
    )


def make_m_sharpness(
    objective: objectives.Objective, m: int, ascent: Ascent
) -> Callable[[Any, Any], Rise]:
    """Returns (params, batch_stats) -> Rise of m-sharpness (SAM paper, section 4.1).

    The split is cut into consecutive groups of m examples, each of which ascends by its own
    gradient: the mean over groups of max L_group(w + eps) - L_group(w). Examples that fill no group
    are left out, also of the loss at w.

    Args:
      objective: objective.Objective.
      m: examples of a group, up to all of the split.
      ascent: optax transformation of `sharpness.ascent`.

    Returns NaN where no group is whole, since too many images are damaged.

    Raises:
      ValueError: no such groups.
    """
    if not 1 <= m <= len(objective):
        raise ValueError(
            f'm is {m}; it must be at least 1 and at most the {len(objective)} examples.'
        )
    if len(objective.layout.devices) * m > min(objective.batch_size, len(objective)):
        return functools.partial(_each_group, objective, m, ascent)
    return _make_groups_at_once(objective, m, ascent)


def _each_group(objective, m, ascent, params, batch_stats):
    """Groups too large or too few for a device each: one after the other, over all devices."""
    rises = []
    for start in range(0, len(objective) - m + 1, m):
        group = objective.of_split(
            objective.split.subset(np.arange(start, start + m))
        ).with_statistics(batch_stats)
        if group.count == m:  # else an image of it is damaged
            rises.append(of_ball(group, params, ascent))
    if not rises:
        return _NO_GROUPS
    loss, error_rate, perturbed, perturbed_error = (
        np.array([r[i] for r in rises]) for i in range(4)
    )
    return Rise(
        float(loss.mean()),
        float(error_rate.mean()),
        float(perturbed.mean()),
        float(perturbed_error.mean()),
        metrics.standard_error(perturbed - loss),
        len(rises),
    )


def _make_groups_at_once(objective, m, ascent):
    """Groups within devices, several at once: each has its own perturbed copy of the params."""
    layout, devices = objective.layout, len(objective.layout.devices)

    def of_group(params, batch_stats, batch):
        def loss(p):
            sums = objective.sums(p, batch_stats, batch)
            return sums['loss'] / m + objective.penalty(p), sums['error_rate'] / m

        def gradient(p):
            return jax.grad(lambda p: loss(p)[0])(p)

        eps, _ = ascent.update(gradient(params), ascent.init(params), params, grad_fn=gradient)
        (before, error), (after, perturbed_error) = loss(params), loss(_moved(params, eps))
        whole = jnp.all(batch['mask'] > 0)
        return jax.tree.map(
            lambda x: jnp.where(whole, x, 0.0),
            {
                'loss': before,
                'error_rate': error,
                'perturbed_loss': after,
                'perturbed_error_rate': perturbed_error,
                'squared_rise': (after - before) ** 2,
                'count': jnp.ones(()),
            },
        )

    def step(params, batch_stats, arrays, feed):
        batch = objective.dataset.eval_batch(arrays, feed)
        groups = jax.tree.map(lambda x: x.reshape(-1, m, *x.shape[1:]), batch)
        measure = functools.partial(of_group, params, batch_stats)
        if len(groups['mask']) == 1:
            sums = measure(batch)
        else:
            sums = jax.tree.map(jnp.sum, jax.vmap(measure)(groups))
        return lax.psum(sums, AXIS)

    step = layout.map(step, in_axes=(None, None, None, 0))

    @functools.cache
    def feeds(size):
        at_once = max(
            1,
            min(
                objective.batch_size // (devices * m),
                len(objective) // (devices * m),
                _COPIED.get(layout.devices[0].platform, _COPIED_ELSEWHERE) // size,
            ),
        )
        return objectives.place_feeds(
            objective.dataset, objective.split, devices * at_once * m, layout, layout.shard
        )

    def measure(params, batch_stats):
        size = sum(x.size for x in jax.tree.leaves(params))
        results = (step(params, batch_stats, objective.arrays, feed) for feed in feeds(size))
        parts = jax.device_get(list(paced(results)))
        sums = {name: sum(float(p[name]) for p in parts) for name in parts[0]}
        n = sums.pop('count')
        if not n:
            return _NO_GROUPS
        loss, error_rate, perturbed, perturbed_error, square = (
            sums[name] / n
            for name in (
                'loss',
                'error_rate',
                'perturbed_loss',
                'perturbed_error_rate',
                'squared_rise',
            )
        )
        variance = max(square - (perturbed - loss) ** 2, 0.0)
        error = (variance / (n - 1)) ** 0.5 if n > 1 else float('nan')
        return Rise(loss, error_rate, perturbed, perturbed_error, error, int(n))

    return measure


def edge_of_stability(gradient_norm: float, learning_rate: float, rho: float) -> float:
    """The curvature up to which plain SAM is stable (Long and Bartlett, arXiv 2309.12488).

    By the largest eigenvalue lambda of the Hessian SAM's step multiplies a small deviation along
    its vector by 1 - lr lambda (1 + rho lambda / |g|), which is -1 at
        lambda = |g| / (2 rho) (sqrt(1 + 8 rho / (lr |g|)) - 1),
    here written so that rho = 0 (2 / lr, gradient descent's edge) and |g| = 0 (0) are no exception.
    Of steps without momentum, on all examples at once.

    Args:
      gradient_norm: |g| >= 0, of the loss whose Hessian it is.
      learning_rate: lr >= 0; infinite for 0.
      rho: >= 0.
    """
    if not learning_rate:
        return math.inf
    if not gradient_norm and rho:
        return 0.0
    ratio = 8 * rho / (learning_rate * gradient_norm) if rho else 0.0
    return 4 / (learning_rate * (1 + math.sqrt(1 + ratio)))
