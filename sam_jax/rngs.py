"""Every random number of a run, made here: a function of (seed, purpose, step, example or replica).

No key is carried through the loop, so a run restarted at any step, on any number of devices, draws
what the undisturbed run would have drawn.
"""

import zlib

import jax
import numpy as np


def key(seed: int | jax.Array, purpose: str, *ids) -> jax.Array:
    """Returns the JAX key for `purpose`, folded with each of `ids`.

    Args:
      seed: the run's seed, an int or a traced integer scalar (it then is a value of the compiled
        program and not a constant).
      purpose: a name such as 'init', 'augment' or 'dropout'; two purposes never share a key.
      *ids: integers (step, replica, example, ...), traced or not.
    """
    result = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    for i in ids:
        result = jax.random.fold_in(result, i)
    return result


def _bits(seed, purpose, n, *ids):
    # Philox is a counter-based generator with a published definition: what the host draws does not
    # depend on the version of NumPy.
    words = [int(seed), zlib.crc32(purpose.encode()), *map(int, ids)]
    return np.random.Philox(np.random.SeedSequence(words)).random_raw(n)


def permutation(seed: int, purpose: str, n: int, *ids) -> np.ndarray:
    """Returns a permutation of range(n), int32, made on the host for (seed, purpose, *ids)."""
    return np.argsort(_bits(seed, purpose, n, *ids), kind='stable').astype(np.int32)


def integers(seed: int, purpose: str, n: int, high: int, *ids) -> np.ndarray:
    """Returns n uniform int32 in [0, high), made on the host for (seed, purpose, *ids)."""
    return (_bits(seed, purpose, n, *ids) % np.uint64(high)).astype(np.int32)


def uniform(seed: int, purpose: str, n: int, *ids) -> np.ndarray:
    """Returns n uniform float64 in (0, 1), made on the host for (seed, purpose, *ids)."""
    return ((_bits(seed, purpose, n, *ids) >> np.uint64(11)) + 0.5) * 2.0**-53
