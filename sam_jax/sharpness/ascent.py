"""Ascents: optax transformations from a gradient to the perturbation eps that is added to w.

Their `update` may take more than gradient, state and params: `grad_fn`, params -> gradient of the
loss that is climbed, and `key`, a JAX key of the step. What is put in front of `lp_ball` by
`optax.chain` chooses another direction.

Norms and perturbations are computed in at least float32: in bfloat16 a step of rho = 0.05 would
leave more than nine coordinates of ten where they were.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def promote(x):
    """Returns x in float32, or in its own dtype if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def lp_norm(tree, p=2.0):
    """Returns the p-norm of all entries of a pytree together, p in (1, inf], a scalar."""
    leaves = [jnp.abs(promote(x)) for x in jax.tree.leaves(tree)]
    if p == 2:
        return jnp.sqrt(sum((jnp.sum(jnp.square(x)) for x in leaves), jnp.zeros(())))
    largest = jnp.max(jnp.stack([jnp.max(x, initial=0.0) for x in leaves]))
    if p == np.inf:
        return largest
    # In units of the largest entry, so that neither tiny nor huge entries leave the float range.
    unit = jnp.where(largest > 0, largest, 1.0)
    return unit * sum(jnp.sum((x / unit) ** p) for x in leaves) ** (1.0 / p)


def lp_ball(rho, p=2.0, mask=None):
    """The step of the linearised worst case in a p-ball (SAM paper, equation 2).

    eps = rho sign(g) |g|^(q-1) / (||g||_q^q)^(1/p) with 1/p + 1/q = 1, the maximiser of <g, eps>
    under ||eps||_p <= rho. p = 2: rho g / ||g||_2; p = inf: rho sign(g). The norm is over all
    leaves together. A zero gradient gives eps = 0.

    Args:
      rho: radius; a number, a traced scalar, or an optax schedule of the number of updates so far.
      p: a Python float in (1, inf].
      mask: None, or a pytree of bools shaped like a prefix of the params, or a function from params
        to one. Where False eps is 0; the norm is over the True leaves only, so ||eps||_p stays rho.

    Returns:
      An `optax.GradientTransformation` whose updates are eps, in at least float32.

    Raises:
      ValueError: rho < 0 or p <= 1.
    """
    if not p > 1:
        raise ValueError(f'p is {p}; it must be in (1, inf].')
    _check_radius(rho)

    def update(grads, state, params=None):
        radius = rho(state.count) if callable(rho) else rho
        if mask is not None:
            keep = mask(params) if callable(mask) else mask
            grads = jax.tree.map(
                lambda m, g: g if m else jax.tree.map(jnp.zeros_like, g), keep, grads)
        eps = _ball_step(jax.tree.map(promote, grads), radius, p)
        return eps, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(_count_from_zero, update)


def _check_radius(rho):
    if isinstance(rho, (int, float)) and not 0 <= rho < np.inf:
        raise ValueError(f'rho is {rho}; it must be a finite number >= 0.')


def _count_from_zero(params):
    del params
    return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))


def gaussian():
    """A direction that knows nothing of the loss: z ~ N(0, I) in place of the gradient.

    In front of `lp_ball` with p = 2 it gives eps = rho z / ||z||_2 (SAM paper, appendix C.5, which
    by a slip of the pen prints the square of the norm). No state.

    Raises (from update):
      TypeError: no `key`.
    """
    def update(grads, state, params=None, *, key=None, **extra_args):
        del params, extra_args
        if key is None:
            raise TypeError(
                'A random ascent needs a key: tx.update(..., key=jax.random.key(step)).')
        leaves, structure = jax.tree.flatten(jax.tree.map(promote, grads))
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(structure, [
            jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def projected_steps(rho, steps, step_size=1.0, p=2.0):
    """Projected gradient ascent within the p-ball (SAM paper, appendix C.6).

    eps_0 = 0;  eps_k+1 = project(eps_k + step(grad L(w + eps_k))), where step is that of `lp_ball`
    with radius step_size * rho, and project takes the nearest point of ||eps||_p <= rho: for p = 2
    eps / max(1, ||eps||_2 / rho), for p = inf each entry clipped to [-rho, rho]. steps = 1 with
    step_size = 1 is `lp_ball`. Takes `grad_fn` steps - 1 times.

    Args:
      rho: as of `lp_ball`.
      steps: number of steps >= 1, a Python int.
      step_size: length of a step in units of rho, > 0. The paper does not tell its own.
      p: 2 or inf.

    Raises:
      ValueError: rho < 0, steps < 1, step_size <= 0, or another p.
    """
    _check_radius(rho)
    if p not in (2, np.inf):
        raise ValueError(f'p is {p}; projected steps need 2 or inf.')
    if steps < 1 or not step_size > 0:
        raise ValueError(f'steps is {steps} and step_size is {step_size}; steps must be at least 1 '
                         'and step_size greater than 0.')

    def project(eps, radius):
        if p == np.inf:
            return jax.tree.map(lambda e: jnp.clip(e, -radius, radius).astype(e.dtype), eps)
        norm = lp_norm(eps)
        scale = jnp.where(norm > radius, radius / jnp.where(norm > 0, norm, 1.0), 1.0)
        return jax.tree.map(lambda e: scale.astype(e.dtype) * e, eps)

    def update(grads, state, params=None, *, grad_fn=None, **extra_args):
        del extra_args
        radius = rho(state.count) if callable(rho) else rho
        eps = _ball_step(jax.tree.map(promote, grads), step_size * radius, p)
        if step_size > 1:
            eps = project(eps, radius)
        for _ in range(steps - 1):
            grads = grad_fn(jax.tree.map(lambda w, e: promote(w) + e, params, eps))
            step = _ball_step(jax.tree.map(promote, grads), step_size * radius, p)
            eps = project(jax.tree.map(jnp.add, eps, step), radius)
        return eps, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(_count_from_zero, update)


def _ball_step(grads, rho, p):
    if p == np.inf:
        return jax.tree.map(lambda g: jnp.asarray(rho, g.dtype) * jnp.sign(g), grads)
    if p == 2:
        norm = lp_norm(grads)
        scale = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1.0), 0.0)
        return jax.tree.map(lambda g: scale.astype(g.dtype) * g, grads)
    # The formula does not change when g is scaled: divide by the largest entry, since |g|^(q-1)
    # leaves the float range for p near 1.
    q = p / (p - 1.0)
    largest = lp_norm(grads, np.inf)
    unit = jax.tree.map(lambda g: g / jnp.where(largest > 0, largest, 1.0).astype(g.dtype), grads)
    total = sum(jnp.sum(jnp.abs(u) ** q) for u in jax.tree.leaves(unit))
    scale = jnp.where(total > 0, rho / jnp.where(total > 0, total, 1.0) ** (1.0 / p), 0.0)
    # Where an entry is 0, so is its power; p > 2 has no derivative there, and 0 is taken.
    power = jax.tree.map(
        lambda u: jnp.where(u == 0, 0.0, jnp.abs(jnp.where(u == 0, 1.0, u)) ** (q - 1.0)), unit)
    return jax.tree.map(
        lambda u, x: scale.astype(u.dtype) * jnp.sign(u) * x.astype(u.dtype), unit, power)
