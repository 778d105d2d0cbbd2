"""The universal class of sharpness measures (2406.03682): Trace-, Det- and Frob-SAM.

S(w) = phi(mean_i psi(D_i)) with D_i = (L(w + rho z_i) - L(w)) / rho^2 at n random probes z_i; of
Trace and Det the exact gradient of L + lam rho^2 S descends, of Frob that of a variance.
Losses are differences of near-equal numbers: they are taken in at least float32.
"""

import jax
import jax.numpy as jnp

from sam_jax.sharpness import checks
from sam_jax.sharpness.ascent import lp_norm, move, promote, radius_at
from sam_jax.sharpness.direction import random_like
from sam_jax.sharpness.shifted import advance, start
from sam_jax.sharpness.transform import Method

# Det's weight exp(D) is cut here: e^30 leaves room for a gradient's square in float32.
LARGEST_EXPONENT = 30.0


def probing(rho, n, draw, weigh):
    """Builds a method from the losses and gradients at n random probes.

    result = sum_i a_i (g_i - g) + g + sum_i b_i g_i, with g the gradient given, g_i that at
    w + rho z_i, and weights (a, b) = weigh(L, [L_1 ... L_n], rho). Where rho = 0 it is g.

    The `update` of the result takes, besides grads, state and params,
      value: the loss at the params, of which grads is the gradient;
      value_and_grad_fn: params -> (loss, gradient) on the same examples with the same randomness,
        as of `jax.value_and_grad`; where `aux` is given, ((loss, aux), gradient);
      key: a JAX key of the step;
      aux: optional; then update returns ((updates, aux at the first probe), state).

    Args:
      rho: a number, a traced scalar or a schedule of the number of updates.
      n: number of probes, a Python int.
      draw: (key, params) -> z.
      weigh: see above.
    """
    checks.radius(rho)

    def init(params):
        del params
        return start(())

    def update(grads, state, params=None, *, value=None, value_and_grad_fn=None, key=None,
               aux=None, **extra_args):
        del extra_args
        if params is None or value is None or value_and_grad_fn is None or key is None:
            raise TypeError(
                'This method needs the params, losses and a key: tx.update(grads, state, params, '
                'value=loss, value_and_grad_fn=jax.value_and_grad(loss_fn), key=key).')
        radius = jnp.asarray(radius_at(rho, state.count), float)
        losses, probes, first_aux, size = [], [], None, None
        for i in range(n):
            z = draw(jax.random.fold_in(key, i), params)
            eps = jax.tree.map(lambda x: radius.astype(x.dtype) * x, z)
            loss, probe = value_and_grad_fn(move(params, eps))
            if aux is not None:
                loss, probe_aux = loss
                first_aux = probe_aux if first_aux is None else first_aux
            size = lp_norm(eps) if size is None else size
            losses.append(promote(loss))
            probes.append(probe)
        unit = jnp.where(radius > 0, radius, 1.0)
        a, b = weigh(promote(value), jnp.stack(losses), unit)

        def combined(g, *g_i):
            wide = promote(g)
            total = wide + sum(
                a[i].astype(wide.dtype) * (promote(x) - wide) + b[i].astype(wide.dtype) * promote(x)
                for i, x in enumerate(g_i))
            return jnp.where(radius > 0, total.astype(g.dtype), g)

        updates = jax.tree.map(combined, grads, *probes)
        return (updates if aux is None else (updates, first_aux)), advance(
            state, (), size, evaluations=n)

    return Method(init, update, needs={'value', 'value_and_grad_fn', 'key'})


def trace_weights(lam):
    """psi(t) = t, phi(t) = t: a_i = lam / n."""
    def weigh(value, losses, rho):
        del value, rho
        return jnp.full_like(losses, lam / losses.size), jnp.zeros_like(losses)

    return weigh


def det_weights(lam):
    """psi(t) = exp(-t / 2), phi(t) = t^-2: a_i = lam exp(-D_i / 2) / (n mean_j(exp(-D_j / 2))^3).

    For n = 1 lam exp(D). The exponent is at most 30, so that a probe far above w does not overflow.
    """
    def weigh(value, losses, rho):
        half = -(losses - value) / (2 * rho ** 2)
        log_mean = jax.nn.logsumexp(half) - jnp.log(float(losses.size))
        exponent = jnp.minimum(half - 3 * log_mean, LARGEST_EXPONENT)
        return lam / losses.size * jnp.exp(exponent), jnp.zeros_like(losses)

    return weigh


def frob_weights(lam):
    """lam / rho^2 times the sample covariance of losses and gradients.

    b_i = lam / rho^2 (L_i - mean_j L_j) / (n - 1): the gradient of
    L + lam / (2 rho^2) Var_{n-1}(L(w + rho z_i)).
    """
    def weigh(value, losses, rho):
        del value
        centred = losses - jnp.mean(losses)
        return jnp.zeros_like(losses), lam / rho ** 2 * centred / (losses.size - 1)

    return weigh


def gaussian(key, params):
    """z ~ N(0, I)."""
    return random_like(key, params)


def cube(h):
    """z uniform in [-h, h]^d, as a function (key, params) -> z."""
    def draw(key, params):
        leaves, structure = jax.tree.flatten(jax.tree.map(promote, params))
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(structure, [
            jax.random.uniform(k, x.shape, x.dtype, -h, h) for k, x in zip(keys, leaves)])

    return draw
