"""Ascents: optax transformations from a gradient to the perturbation eps that is added to w.

Their `update` may take more than gradient, state and params: `grad_fn`, params -> gradient of the
loss that is climbed; `key`, a JAX key of the step; and `count`, the number of updates so far, at
which a schedule of rho is read (without it the number of ascents is). What is put in front of a
ball by `optax.chain` chooses another direction (`direction.py`).

A ball has a norm that rho bounds; `norm(eps, grads, params)` of `sharpness_aware` measures it.

Norms and perturbations are computed in at least float32: in bfloat16 a step of rho = 0.05 would
leave more than nine coordinates of ten where they were.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from sam_jax.sharpness import ranges
from sam_jax.sharpness.mask import normalization
from sam_jax.sharpness.trees import (
    Rho,
    in_units,
    lp_norm,
    move,
    names_of,
    norm_in_range,
    promote,
    radius_at,
)

# Which params climb: all (None), a pytree of bools, or a function from params to one.
Mask = Any
# Functions that a method is made of.
Metric = Callable[[optax.Updates, optax.Params], Any]
Ascent = optax.GradientTransformationExtraArgs

# Which parameters ASAM adapts to, see `adaptive_metric`.
ADAPT = ('weights', 'kernels', 'all', 'norm_only')


def lp_ball(rho: Rho, p: float = 2.0, mask: Mask = None) -> Ascent:
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
    ranges.radius(rho)

    def kept(params):
        return mask(params) if callable(mask) else mask

    def step(radius, grads, params, grad_fn):
        del grad_fn
        if mask is not None:
            grads = jax.tree.map(
                lambda m, g: g if m else jax.tree.map(jnp.zeros_like, g), kept(params), grads
            )
        return _ball_step(grads, radius, p)

    # What the mask has to say of these params, it says before anything is compiled.
    return _ascent(rho, step, check=kept)


def limited_ball(rho: Rho, sigma: float) -> Ascent:
    """The step of `lp_ball` with p = 2 and the radius min(sigma / ||g||, rho).

    Raises:
      ValueError: rho < 0 or sigma <= 0.
    """
    ranges.radius(rho)
    ranges.above_zero(sigma=sigma)

    def step(radius, grads, params, grad_fn):
        del params, grad_fn
        length = lp_norm(grads)
        return _ball_step(
            grads, jnp.minimum(sigma / jnp.where(length > 0, length, 1.0), radius), 2.0
        )

    return _ascent(rho, step)


def metric_ball(rho: Rho, metric: Metric) -> Ascent:
    """The step of the linearised worst case in an ellipsoid.

    eps = rho P g / sqrt(<g, P g>), the maximiser of <g, eps> under <eps, P^-1 eps> <= rho^2, with a
    diagonal P > 0. P = 1 is `lp_ball` with p = 2. A zero gradient gives eps = 0.

    Args:
      rho: as of `lp_ball`.
      metric: (grads, params) -> pytree of the diagonal of P, in at least float32. See
        `adaptive_metric`, `fisher_metric`.

    Raises:
      ValueError: rho < 0.
    """
    ranges.radius(rho)

    def step(radius, grads, params, grad_fn):
        del grad_fn
        root = jax.tree.map(jnp.sqrt, metric(grads, params))
        inner = _ball_step(jax.tree.map(jnp.multiply, root, grads), radius, 2.0)
        return jax.tree.map(jnp.multiply, root, inner)

    # As above: what the metric has to say of these params.
    return _ascent(rho, step, check=lambda params: jax.eval_shape(metric, params, params))


def metric_norm(metric: Metric) -> Callable[..., Float[Array, '']]:
    """Returns the norm that `metric_ball` bounds: (eps, grads, params) -> sqrt(<eps, P^-1 eps>).

    Where P is 0, so is eps, and the entry does not count.
    """

    def norm(eps, grads, params):
        diagonal = metric(jax.tree.map(promote, grads), params)
        return lp_norm(
            jax.tree.map(
                lambda e, d: jnp.where(d > 0, e / jnp.sqrt(jnp.where(d > 0, d, 1.0)), 0.0),
                eps,
                diagonal,
            )
        )

    return norm


def adaptive_metric(eta: float, adapt: str) -> Metric:
    """ASAM's metric P = T^2 with T = |w| + eta, and T = 1 where nothing is adapted.

    Args:
      eta: >= 0, added to |w|.
      adapt: which parameters have T = |w| + eta: 'weights', all but biases (as the
        authors' code, where the scales of BatchNorm are weights); 'kernels', only those of two or
        more axes; 'all'; 'norm_only', scales and biases of normalisation layers, and T = 0
        elsewhere: nothing else climbs.

    Raises:
      ValueError: eta < 0, or another `adapt`; from the metric with 'norm_only', params without a
        normalisation layer.
    """
    ranges.at_least(0, eta=eta)
    if adapt not in ADAPT:
        raise ValueError(f'adapt is {adapt!r}; it must be one of {", ".join(ADAPT)}.')

    def adapted(path, w):
        is_bias = names_of(path)[-1:] in (('bias',), ('b',))  # the latter haiku's
        return adapt == 'all' or (w.ndim > 1 if adapt == 'kernels' else not is_bias)

    def squared(w):
        return jnp.square(jnp.abs(promote(w)) + eta)

    def metric(grads, params):
        del grads
        if adapt == 'norm_only':
            return jax.tree.map(
                lambda m, w: squared(w) if m else jnp.zeros_like(promote(w)),
                normalization(params),
                params,
            )
        return jax.tree_util.tree_map_with_path(
            lambda path, w: squared(w) if adapted(path, w) else jnp.ones_like(promote(w)), params
        )

    return metric


def fisher_metric(eta: float) -> Metric:
    """Fisher SAM's metric: P = 1 / (1 + eta g^2), entry by entry; eta >= 0.

    Raises:
      ValueError: eta < 0.
    """
    ranges.at_least(0, eta=eta)
    return lambda grads, params: jax.tree.map(lambda g: 1.0 / (1.0 + eta * jnp.square(g)), grads)


def layer_ball(rho: Rho) -> Ascent:
    """A ball for each leaf, its radius in units of the leaf's own norm.

    eps_l = rho ||w_l|| g_l / ||g_l||. A leaf of zeros stays where it is.

    Raises:
      ValueError: rho < 0.
    """
    ranges.radius(rho)

    def step(radius, grads, params, grad_fn):
        del grad_fn
        return jax.tree.map(lambda g, w: _ball_step(g, radius * lp_norm(w), 2.0), grads, params)

    return _ascent(rho, step)


def layer_norm(eps: Any, grads: Any, params: optax.Params) -> Float[Array, '']:
    """The norm that `layer_ball` bounds: the largest of ||eps_l|| / ||w_l||."""
    del grads
    ratios = jax.tree.map(
        lambda e, w: lp_norm(e) / jnp.where(lp_norm(w) > 0, lp_norm(w), 1.0), eps, params
    )
    return jnp.max(jnp.stack(jax.tree.leaves(ratios)))


def unnormalized(rho: Rho) -> Ascent:
    """eps = rho g. `rho` may be negative: a step down, as an extrapolation takes."""

    def step(radius, grads, params, grad_fn):
        del params, grad_fn
        return jax.tree.map(lambda g: jnp.asarray(radius, g.dtype) * g, grads)

    return _ascent(rho, step)


def _ascent(rho, step, check=lambda params: None):
    """The transformation of step(radius, grads in at least float32, params, grad_fn) -> eps.

    Its state is the number of its updates, at which a schedule of rho is read where nobody gives
    another `count`; `check` looks at the params beforehand.
    """

    def init(params):
        check(params)
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, grad_fn=None, count=None, **extra_args):
        del extra_args
        radius = radius_at(rho, state.count if count is None else count)
        eps = step(radius, jax.tree.map(promote, updates), params, grad_fn)
        return eps, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def projected_steps(rho: Rho, steps: int, step_size: float = 1.0, p: float = 2.0) -> Ascent:
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
    ranges.radius(rho)
    if p not in (2, np.inf):
        raise ValueError(f'p is {p}; projected steps need 2 or inf.')
    ranges.at_least(1, steps=steps)
    ranges.positive(step_size=step_size)

    def project(eps, radius):
        if p == np.inf:
            return jax.tree.map(lambda e: jnp.clip(e, -radius, radius).astype(e.dtype), eps)
        norm = lp_norm(eps)
        scale = jnp.where(norm > radius, radius / jnp.where(norm > 0, norm, 1.0), 1.0)
        return jax.tree.map(lambda e: scale.astype(e.dtype) * e, eps)

    def step(radius, grads, params, grad_fn):
        eps = _ball_step(grads, step_size * radius, p)
        if step_size > 1:
            eps = project(eps, radius)
        for _ in range(steps - 1):
            grads = jax.tree.map(promote, grad_fn(move(params, eps)))
            further = _ball_step(grads, step_size * radius, p)
            eps = project(jax.tree.map(jnp.add, eps, further), radius)
        return eps

    return _ascent(rho, step)


def _ball_step(grads, rho, p):
    if p == np.inf:
        return jax.tree.map(lambda g: jnp.asarray(rho, g.dtype) * jnp.sign(g), grads)
    if p == 2:
        factor, norm = norm_in_range(grads)
        scale = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1.0), 0.0)
        return jax.tree.map(lambda g: scale.astype(g.dtype) * (factor.astype(g.dtype) * g), grads)
    # The formula does not change when g is scaled; |g|^(q-1) leaves the float range for p near 1.
    _, scaled = in_units(grads)
    q = p / (p - 1.0)
    total = sum(jnp.sum(jnp.abs(u) ** q) for u in jax.tree.leaves(scaled))
    scale = jnp.where(total > 0, rho / jnp.where(total > 0, total, 1.0) ** (1.0 / p), 0.0)
    # Where an entry is 0, so is its power; p > 2 has no derivative there, and 0 is taken.
    power = jax.tree.map(
        lambda u: jnp.where(u == 0, 0.0, jnp.abs(jnp.where(u == 0, 1.0, u)) ** (q - 1.0)), scaled
    )
    return jax.tree.map(
        lambda u, x: scale.astype(u.dtype) * jnp.sign(u) * x.astype(u.dtype), scaled, power
    )
