"""Methods whose two gradients do not wait for each other's: SAMPa, and bSAM's draw."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from sam_jax.sharpness import ascent, ranges, registry
from sam_jax.sharpness.as_optax import Link, as_optax
from sam_jax.sharpness.direction import random_like
from sam_jax.sharpness.methods.one_gradient import taken
from sam_jax.sharpness.protocol import Method, Report
from sam_jax.sharpness.trees import Rho, lp_norm, move, promote, radius_at, wide_zeros


@registry.enter('two gradients, neither of which waits for the other', 2, uphill=False, late=True)
def sampa(rho: Rho, lam: float = 0.2) -> Link:
    """SAMPa (2410.10683): SAM whose two gradients are taken at the same time.

    With gy the gradient that the last step took on its own batch, and the learning rate lr:
      g   at w - lr gy, on this batch;
      g_p at w + eps, eps = rho gy / ||gy||, on the batch that gy is of (the one before);
      result = (1 - lam) g_p + lam g;   gy <- g.
    At the first step gy = 0, so both are at w. The loop gives the first batch twice there. The
    authors' step w - lr gy includes their optimizer's momentum and weight decay; here it is that of
    plain SGD, whatever the optimizer. In a training loop that averages states over groups gy is
    that of all of them, so they climb together.

    Two gradient evaluations; state: one pytree. `update` needs `learning_rate` and a `loss` that
    knows the batch before.

    Args:
      rho: as of `sam`; 0.1 in the authors' CIFAR runs.
      lam: in [0, 1], weight of the gradient at the extrapolated point; SAMPa-0.2. With lam = 0 and
        the clean gradient at w in the state it is `sam`.

    Raises:
      ValueError: lam is not in [0, 1].
    """
    ranges.zero_to_one(lam=lam)
    ball = ascent.lp_ball(rho)

    def step(loss, params, state, now):
        rate = now.need('learning_rate', 'SAMPa')
        ahead = loss(move(params, jax.tree.map(lambda g: -jnp.asarray(rate, g.dtype) * g, state)))
        eps = taken(ball, state, params, now)
        there = loss(move(params, eps), linear=True, previous=True)
        grads = jax.tree.map(lambda g, g_p: (1.0 - lam) * g_p + lam * g, ahead.grads, there.grads)
        return grads, ahead.grads, Report(ahead, there, lp_norm(eps))

    return as_optax(Method(wide_zeros, step), previous=True)


class BayesState(NamedTuple):
    """What `bsam` remembers: the average of gradients and the posterior's precision / N."""

    average: Any
    precision: Any


@registry.enter(
    'SAM as variational Bayes, an optimizer of its own',
    2,
    norm='of its own',
    uphill=False,
    refuses={
        'optimizer.name': 'sgd',
        'optimizer.momentum': 0.0,
        'optimizer.nesterov': False,
        'optimizer.weight_decay': 0.0,
        'optimizer.clip_norm': 0.0,
    },
    why='is an optimizer with a momentum and a prior of its own',
)
def bsam(
    rho: Rho,
    prior_precision: float = 40.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    damping: float = 0.1,
    init_precision: float = 1.0,
    data_factor: float = 4.0,
    num_examples: float | None = None,
) -> Link:
    """bSAM (2210.01620): SAM as variational Bayes, with an adaptive variance for each parameter.

    With N = data_factor num_examples and delta = prior_precision / N:
      theta ~ N(w, 1 / (N s));   g at theta;   eps = rho g / s;   g_e at w + eps, not theta + eps;
      m <- beta1 m + (1 - beta1) (g_e + delta w);   result = m / s;
      s <- beta2 s + (1 - beta2) (sqrt(s) |g| + damping + delta).
    The result is divided by the s before this step. It is the whole optimizer but for the learning
    rate: what follows must be plain SGD without momentum, and the prior takes the place of weight
    decay. Two gradient evaluations; state: two pytrees. `update` needs `key`.

    Args:
      rho: factor of the ascent g / s; 0.01 in the authors' CIFAR runs (learning rate 0.5).
      num_examples: of the training set.
      data_factor: for augmentation, as if there were so many times as many examples.
      prior_precision, beta1, beta2, damping, init_precision: the paper's delta N, beta_1, beta_2,
        gamma, and s at the start; the authors' CIFAR settings are the defaults.

    Raises:
      ValueError: something is out of its range.
    """
    ranges.given(num_examples=num_examples)
    assert num_examples is not None  # so `given` has said
    ranges.radius(rho)
    ranges.positive(
        data_factor=data_factor, num_examples=num_examples, init_precision=init_precision
    )
    ranges.at_least(0, prior_precision=prior_precision, damping=damping)
    ranges.zero_to_below_one(beta1=beta1, beta2=beta2)
    number = data_factor * num_examples
    delta = prior_precision / number

    def init(params):
        zeros = wide_zeros(params)
        return BayesState(zeros, jax.tree.map(lambda x: jnp.full_like(x, init_precision), zeros))

    def step(loss, params, state, now):
        draw = drawn(now.need('key', 'bSAM'), params, state.precision, number)
        there = loss(draw, climb=True)
        radius = radius_at(rho, now.count)
        eps = jax.tree.map(
            lambda g, s: jnp.asarray(radius, g.dtype) * g / s, there.grads, state.precision
        )
        above = loss(move(params, eps))
        average = jax.tree.map(
            lambda m, g, w: beta1 * m + (1 - beta1) * (g + delta * promote(w)),
            state.average,
            above.grads,
            params,
        )
        precision = jax.tree.map(
            lambda s, g: beta2 * s + (1 - beta2) * (jnp.sqrt(s) * jnp.abs(g) + damping + delta),
            state.precision,
            there.grads,
        )
        return (
            jax.tree.map(jnp.divide, average, state.precision),
            BayesState(average, precision),
            Report(there, above, lp_norm(eps)),
        )

    return as_optax(Method(init, step))


def drawn(key: PRNGKeyArray, params: Any, precision: Any, number: float) -> Any:
    """Returns theta ~ N(w, 1 / (number precision)), in at least float32."""
    return move(
        params,
        jax.tree.map(lambda z, s: z / jnp.sqrt(number * s), random_like(key, params), precision),
    )
