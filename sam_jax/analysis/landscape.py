"""Landscapes of the loss: its values along lines and on planes through the params.

A place is w + a d1 [+ b d2]. Each device computes places of its own on all examples, so that a
surface is the same on any number of devices, bit for bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import rngs
from sam_jax.analysis import objective as objectives

# Examples that a device computes at once, whatever the number of devices.
_AT_ONCE = 512


def random_direction(params: Any, seed: int, number: int = 0) -> Any:
    """A filter-normalised random direction (Li et al., NeurIPS 2018, arXiv 1712.09913).

    d is normal; each filter of it, all entries that make one output channel (the last axis), is
    scaled to the norm of the same filter of w. Biases and BatchNorm's parameters, of fewer than two
    axes, are left out: d is 0 there.

    Args:
      params: pytree.
      seed: of the direction.
      number: which one: two directions of a plane differ in it.

    Returns:
      pytree of NumPy arrays.
    """
    leaves, structure = jax.tree.flatten(jax.device_get(params))
    keys = jax.random.split(rngs.key(seed, 'landscape', number), len(leaves))

    def filters(key, w):
        if w.ndim < 2:
            return np.zeros_like(w)
        d = np.asarray(jax.random.normal(key, w.shape, w.dtype))
        axes = tuple(range(w.ndim - 1))
        norms = np.linalg.norm(d.reshape(-1, w.shape[-1]), axis=0)
        wanted = np.sqrt(np.sum(np.square(w), axis=axes))
        return d * (wanted / np.where(norms > 0, norms, 1.0)).astype(w.dtype)

    return jax.tree.unflatten(structure, [filters(k, w) for k, w in zip(keys, leaves)])


def difference(variables: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """The direction from one run to another: at 1 along it lies the other run.

    Args:
      variables, others: {'params', 'batch_stats'} of the same shapes.

    Raises:
      ValueError: they are of different models.
    """
    shapes = [jax.tree.map(np.shape, v) for v in (variables, others)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            'The two runs have params of different shapes; a line between them needs '
            'the same model.'
        )
    return jax.tree.map(
        lambda a, b: np.asarray(b) - np.asarray(a), *map(jax.device_get, (variables, others))
    )


def make_surface(
    objective: objectives.Objective, params: Any, directions: list[Any]
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Returns a function of places: float (n, number of directions) -> loss and error rate there.

    Args:
      objective: objective.Objective.
      params: the origin, on the devices.
      directions: pytrees of the shapes of params; or of {'params', 'batch_stats'}, along which
        BatchNorm's statistics move too (the way from one run to another).

    Returns:
      places -> {'loss', 'error_rate'}: float64 (n,). A loss that is not finite stays so.
    """
    layout = objective.layout
    alone = _on_one_device(layout)
    feeds = objectives.place_feeds(
        objective.dataset,
        objective.split,
        min(objective.batch_size, _AT_ONCE),
        alone,
        lambda feed: layout.replicate(jax.tree.map(lambda x: x[0], feed)),
    )
    whole = [
        d
        if 'batch_stats' in d
        else {
            'params': d,
            'batch_stats': jax.tree.map(np.zeros_like, jax.device_get(objective.batch_stats)),
        }
        for d in directions
    ]
    directions = layout.replicate(jax.device_get(whole))
    origin = {'params': params, 'batch_stats': objective.batch_stats}

    def at(place, origin, directions):
        for i, d in enumerate(directions):
            origin = jax.tree.map(lambda w, x, i=i: w + place[i].astype(w.dtype) * x, origin, d)
        return origin

    def step(total, place, origin, directions, arrays, feed):
        moved = at(place, origin, directions)
        batch = objective.dataset.eval_batch(arrays, feed)
        sums = objective.sums(moved['params'], moved['batch_stats'], batch)
        return jax.tree.map(jnp.add, total, sums)

    step = layout.map(step, in_axes=(0, 0, None, None, None, None), out_axes=0)
    penalty = layout.map(
        lambda place, origin, directions: objective.penalty(
            at(place, origin, directions)['params']
        ),
        in_axes=(0, None, None),
        out_axes=0,
    )

    def surface(places):
        places = np.asarray(places, float).reshape(len(places), len(whole))
        n = len(layout.devices)
        results = []
        for start in range(0, len(places), n):
            # The last round's idle devices repeat its last place.
            rows = places[np.minimum(np.arange(start, start + n), len(places) - 1)]
            place = layout.shard(rows)
            total = layout.shard({name: np.zeros(n) for name in ('loss', 'error_rate')})
            for feed in feeds:
                total = step(total, place, origin, directions, objective.arrays, feed)
            sums = {
                name: np.asarray(x, np.float64) / objective.count
                for name, x in jax.device_get(total).items()
            }
            sums['loss'] = sums['loss'] + np.asarray(penalty(place, origin, directions))
            results.append(sums)
        return {
            name: np.concatenate([r[name] for r in results])[: len(places)]
            for name in ('loss', 'error_rate')
        }

    return surface


def _on_one_device(layout):
    return dataclasses.replace(layout, devices=layout.devices[:1])


def grid(extent: float, points: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ticks, places): `points` ticks from -extent to extent, and all their combinations.

    With an odd number of points 0 is one of them. Places are (points ^ dimensions, dimensions).
    """
    ticks = np.linspace(-extent, extent, points)
    ticks[np.abs(ticks) < 1e-9 * extent] = 0.0
    axes = np.meshgrid(*[ticks] * dimensions, indexing='ij')
    return ticks, np.stack([a.ravel() for a in axes], axis=1)
