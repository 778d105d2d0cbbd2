"""Methods that take the one gradient of a step at another place than the params.

The loop asks `method.point(state, params, ...)` where, computes the gradient there, and hands it to
`method.update`. The params themselves stay the centre: they are what is evaluated and saved.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_jax.sharpness import checks
from sam_jax.sharpness.ascent import lp_norm, move, promote, radius_at, wide_zeros
from sam_jax.sharpness.direction import random_like
from sam_jax.sharpness.transform import Method


class ShiftedState(NamedTuple):
    """State of a method that takes its gradient elsewhere, or gradients at random probes.

    Attributes:
      count: number of updates so far, int32.
      memory: what the method remembers from step to step.
      perturbation_norm: 2-norm of the way from the params to that place, or to the first probe.
      evaluations: gradients taken so far besides those given, int32.
    """

    count: jax.Array
    memory: Any
    perturbation_norm: jax.Array
    evaluations: jax.Array


def start(memory):
    """The state before the first step."""
    return ShiftedState(jnp.zeros((), jnp.int32), memory, jnp.zeros((), float),
                        jnp.zeros((), jnp.int32))


def advance(state, memory, size, evaluations=0):
    """The state after a step, with what is remembered and how far the gradient was taken."""
    return ShiftedState(
        optax.safe_increment(state.count), memory, size.astype(state.perturbation_norm.dtype),
        state.evaluations + jnp.int32(evaluations))


def _taken(ball, direction, params, count):
    """The step of an ascent that has no state but a counter."""
    return ball.update(direction, ball.init(params), params, count=count)[0]


def shifted(shift, remember=None, needs=()):
    """Builds a method of one gradient: that at w + shift, handed on as it is.

    The `update` of the result takes, besides grads (at `point`), state and params, whatever
    `shift` takes, and `aux`, optional, in which case it returns ((updates, aux), state).

    Args:
      shift: (memory, params, count, **extra_args) -> eps.
      remember: None, or grads -> what `shift` receives as memory at the next step; before the first
        step it receives zeros.
      needs: as of `Method`.
    """
    def init(params):
        return start(wide_zeros(params) if remember else ())

    def eps(state, params, extra_args):
        return shift(state.memory, params, state.count, **extra_args)

    def point(state, params, **extra_args):
        return move(params, eps(state, params, extra_args))

    def update(grads, state, params=None, *, aux=None, **extra_args):
        if params is None:
            raise TypeError('A shifted update needs the params: tx.update(grads, state, params).')
        size = lp_norm(eps(state, params, extra_args))
        updates = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, params)
        memory = remember(jax.tree.map(promote, grads)) if remember else ()
        return (updates if aux is None else (updates, aux)), advance(state, memory, size)

    return Method(init, update, point, needs=needs)


def along_momentum(ball):
    """A shift against the optimizer's momentum: -ball(v), for `shifted`.

    Args:
      ball: an ascent without state of its own but a counter, such as `ascent.lp_ball(rho)`.

    Raises (from update):
      TypeError: no `momentum`.
    """
    def shift(memory, params, count, *, momentum=None, **extra):
        del memory, extra
        if momentum is None:
            raise TypeError("This method needs the optimizer's momentum, before the step: "
                            'tx.update(..., momentum=optax.tree.get(opt_state, "trace")).')
        return jax.tree.map(jnp.negative, _taken(ball, momentum, params, count))

    return shift


def along_memory(step):
    """A shift by step(what is remembered), for `shifted`; as `along_momentum` otherwise."""
    def shift(memory, params, count, **extra):
        del extra
        return _taken(step, memory, params, count)

    return shift


def along_noise(step):
    """A shift by step(z), z ~ N(0, I) by `key`, for `shifted`; as `along_momentum` otherwise.

    Raises (from update):
      TypeError: no `key`.
    """
    def shift(memory, params, count, *, key=None, **extra):
        del memory, extra
        if key is None:
            raise TypeError('A random shift needs a key: tx.update(..., key=jax.random.key(step)).')
        return _taken(step, random_like(key, params), params, count)

    return shift


def parallel(ball, lam):
    """SAMPa (2410.10683): two gradients that do not wait for each other.

    With gy the gradient that the last step took on its own batch, and the learning rate lr:
      grads (given)          at `point` = w - lr gy, on this batch;
      perturbed gradient     at w + ball(gy), on the batch that gy is of (`previous_grad_fn`);
      result                 (1 - lam) perturbed + lam grads;   gy <- grads.
    At the first step gy = 0, so both are at w. The loop gives the first batch twice there. State:
    one pytree. The authors' step w - lr gy includes their optimizer's momentum and weight decay;
    here it is that of plain SGD, whatever the optimizer. In a training loop that averages states
    over groups gy is that of all of them, so they climb together.

    `update` takes `previous_grad_fn` (params -> gradient, or (gradient, aux) where `aux` is given)
    and `learning_rate`.

    Args:
      ball: an ascent without state of its own but a counter.
      lam: in [0, 1].

    Raises:
      ValueError: lam is not in [0, 1].
    """
    checks.fraction(lam=lam)

    def init(params):
        return start(wide_zeros(params))

    def point(state, params, *, learning_rate=None, **extra_args):
        del extra_args
        if learning_rate is None:
            raise TypeError('SAMPa needs the learning rate of the step: learning_rate=...')
        return move(params, jax.tree.map(
            lambda g: -jnp.asarray(learning_rate, g.dtype) * g, state.memory))

    def update(grads, state, params=None, *, previous_grad_fn=None, aux=None, **extra_args):
        del extra_args
        if previous_grad_fn is None or params is None:
            raise TypeError('SAMPa needs the params and a gradient function of the previous batch: '
                            'tx.update(grads, state, params, previous_grad_fn=...).')
        eps = _taken(ball, state.memory, params, state.count)
        perturbed = previous_grad_fn(move(params, eps))
        if aux is not None:
            perturbed, aux = perturbed
        updates = jax.tree.map(
            lambda w, g, g_p: ((1.0 - lam) * promote(g_p) + lam * promote(g)).astype(w.dtype),
            params, grads, perturbed)
        memory = jax.tree.map(promote, grads)
        return (updates if aux is None else (updates, aux)), advance(
            state, memory, lp_norm(eps), evaluations=1)

    return Method(init, update, point, needs={'previous_grad_fn', 'learning_rate'})


class BayesState(NamedTuple):
    """What `bayesian` remembers: the average of gradients and the posterior's precision / N."""

    average: Any
    precision: Any


def bayesian(rho, num_examples, prior_precision, beta1, beta2, damping, init_precision):
    """bSAM (2210.01620): SAM as variational Bayes, with an adaptive variance for each parameter.

    With N = num_examples and delta = prior_precision / N, and g the gradient given, at `point`
    theta ~ N(w, 1 / (N s)):
      eps = rho g / s;   g_e = grad_fn(w + eps), from the mean w and not from theta;
      m <- beta1 m + (1 - beta1) (g_e + delta w);   result = m / s;
      s <- beta2 s + (1 - beta2) (sqrt(s) |g| + damping + delta).
    The result is divided by the s before this step. It is the whole optimizer but for the learning
    rate: what follows must be plain SGD without momentum, and the prior takes the place of weight
    decay. State: two pytrees. `update` takes `key` and `grad_fn`; point takes `key`.

    Args:
      rho: >= 0; a number, a traced scalar or a schedule of the number of updates.
      num_examples: N > 0, of the training set (times a factor for augmentation).
      prior_precision, beta1, beta2, damping, init_precision: the paper's delta N, beta_1, beta_2,
        gamma, and s at the start.

    Raises:
      ValueError: something is out of its range.
    """
    checks.radius(rho)
    checks.positive(num_examples=num_examples, init_precision=init_precision)
    checks.at_least(0, prior_precision=prior_precision, damping=damping)
    checks.below_one(beta1=beta1, beta2=beta2)
    delta = prior_precision / num_examples

    def init(params):
        wide = jax.tree.map(promote, params)
        return start(BayesState(
            jax.tree.map(jnp.zeros_like, wide),
            jax.tree.map(lambda w: jnp.full_like(w, init_precision), wide)))

    def point(state, params, *, key=None, **extra_args):
        del extra_args
        if key is None:
            raise TypeError('bSAM draws a point and needs a key: key=jax.random.key(step).')
        return move(params, jax.tree.map(
            lambda z, s: z / jnp.sqrt(num_examples * s),
            random_like(key, params), state.memory.precision))

    def update(grads, state, params=None, *, grad_fn=None, aux=None, **extra_args):
        del extra_args
        if grad_fn is None or params is None:
            raise TypeError('bSAM needs the params and a gradient function: '
                            'tx.update(grads, state, params, grad_fn=grad_fn).')
        average, precision = state.memory
        radius = radius_at(rho, state.count)
        grads = jax.tree.map(promote, grads)
        eps = jax.tree.map(
            lambda g, s: jnp.asarray(radius, g.dtype) * g / s, grads, precision)
        perturbed = grad_fn(move(params, eps))
        if aux is not None:
            perturbed, aux = perturbed
        average = jax.tree.map(
            lambda m, g, w: beta1 * m + (1 - beta1) * (promote(g) + delta * promote(w)),
            average, perturbed, params)
        updates = jax.tree.map(
            lambda w, m, s: (m / s).astype(w.dtype), params, average, precision)
        precision = jax.tree.map(
            lambda s, g: beta2 * s + (1 - beta2) * (jnp.sqrt(s) * jnp.abs(g) + damping + delta),
            precision, grads)
        return (updates if aux is None else (updates, aux)), advance(
            state, BayesState(average, precision), lp_norm(eps), evaluations=1)

    return Method(init, update, point, climbs=lambda state, **extra_args: True, needs={'key'})
