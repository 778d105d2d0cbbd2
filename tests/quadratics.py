"""Quadratic losses, whose sharpness-aware gradients are known, and what tests do with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

PS = [2.0, 3.0, 1.5, np.inf]
RHO = 0.3
SIZES = [6, 4, 1]  # of the leaves of quadratic()'s params


def ball_step(g, rho, p=2.0):
    """Equation 2 of the SAM paper, literally, on a vector in float64."""
    g = np.asarray(g, np.float64)
    q = 1 / (1 - 1 / p)
    return rho * np.sign(g) * np.abs(g) ** (q - 1) / np.sum(np.abs(g) ** q) ** (1 / p)


def ravel(tree):
    return ravel_pytree(tree)[0]


def flat(tree):
    return np.asarray(ravel(tree))


def quadratic(dtype=np.float32, seed=0):
    """L(w) = w'Aw / 2 on a pytree: returns params, the gradient function and A."""
    rng = np.random.RandomState(seed)
    params = {'a': rng.randn(2, 3), 'b': [rng.randn(4), {'c': rng.randn()}]}
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    w, unravel = ravel_pytree(params)
    a = rng.randn(w.size, w.size)
    a = (a @ a.T / w.size + np.eye(w.size)).astype(dtype)
    return params, lambda tree: unravel(a @ ravel(tree)), a


def update(tx, grad_fn, params, state=None, **extra_args):
    state = tx.init(params) if state is None else state
    return tx.update(grad_fn(params), state, params, grad_fn=grad_fn, **extra_args)


def take_steps(tx, grad_fn, params, steps):
    """Params after every step, flat."""
    @jax.jit
    def step(params, state):
        updates, state = update(tx, grad_fn, params, state)
        return optax.apply_updates(params, updates), state

    state, trajectory = tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        trajectory.append(flat(params))
    return np.stack(trajectory)


def nans(tree):
    return jax.tree.map(lambda x: jnp.full_like(x, np.nan), tree)
