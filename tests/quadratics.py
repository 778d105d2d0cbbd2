"""Quadratic losses, whose sharpness-aware gradients are known, and what tests do with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from sam_jax import sharpness

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


def make(method, **settings):
    """A method as `sharpness.create`, in a training of one step of one example."""
    return sharpness.create(method, **{'total_steps': 1, 'num_examples': 1, **settings})


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


def layers(dtype=np.float32, seed=0, minimum=0.0):
    """quadratic() on the params of a small network with a normalisation layer, and its loss.

    L(w) = (w - minimum)' A (w - minimum) / 2. Returns params, the loss function and A.
    """
    rng = np.random.RandomState(seed)
    params = {
        'dense': {'kernel': rng.randn(3, 2), 'bias': rng.randn(2)},
        'norm': {'bias': rng.randn(1), 'scale': rng.randn(2) + 1},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    n = ravel(params).size
    a = rng.randn(n, n)
    a = a @ a.T / n + np.eye(n)

    def loss(tree):
        w = ravel(tree) - minimum
        return w @ jnp.asarray(a, w.dtype) @ w / 2

    return params, loss, a


def under(tree, name):
    """Which entries of flat(tree) lie under a path that contains the name."""
    marks = jax.tree_util.tree_map_with_path(
        lambda path, x: np.full(np.shape(x), name in jax.tree_util.keystr(path)), tree
    )
    return flat(marks).astype(bool)


def drive(
    tx,
    loss,
    params,
    state=None,
    t=0,
    momentum=None,
    learning_rate=0.1,
    note=None,
    evaluate=None,
    **extra_args,
):
    """One update of any method, given all that a training loop gives; jax.grad of `loss`.

    Args:
      t: the step, of which the keys are.
      momentum: default the params.
      note: called at each gradient.
      evaluate: (params, **which) -> Evaluation, in place of that of `loss`.
    """
    state = tx.init(params) if state is None else state

    def of_loss(tree, **which):
        del which
        if note:
            jax.debug.callback(note)
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), jax.grad(loss)(tree), params)
        return sharpness.Evaluation(grads, loss(tree))

    key = jax.random.fold_in(jax.random.key(7), t)
    return tx.update(
        None,
        state,
        params,
        **{
            **dict(
                loss=sharpness.Loss(evaluate or of_loss),
                key=key,
                learning_rate=learning_rate,
                momentum=params if momentum is None else momentum,
                added_loss=True,
                corrected=True,
                gate_key=jax.random.fold_in(jax.random.key(8), t),
            ),
            **extra_args,
        },
    )


def nans(tree):
    return jax.tree.map(lambda x: jnp.full_like(x, np.nan), tree)
