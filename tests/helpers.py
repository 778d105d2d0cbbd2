"""What several test files share: small configs, golden files, comparison of pytrees."""

import pathlib

import jax
import numpy as np

from configs import digits

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = pathlib.Path(__file__).resolve().parent / 'golden'


def small_config(**overrides):
    """The real digits config, made small: 2 epochs of 20 steps, WRN-10-1.

    Keys of sections are given with a double underscore: sam__rho=0.1.
    """
    c = digits.get_config()
    c.total_epochs = 2
    c.eval.every_epochs = 1
    for key, value in overrides.items():
        *sections, name = key.split('__')
        section = c
        for s in sections:
            section = section[s]
        section[name] = value
    return c


def golden(name):
    """A file of numbers computed by the original code."""
    return np.load(GOLDEN / f'{name}.npz')


def assert_trees_equal(a, b):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def assert_trees_close(a, b, rtol=1e-5, atol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol),
                 jax.device_get(a), jax.device_get(b))


def relative_distance(a, b):
    """||a - b|| / ||b|| over all leaves together."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(t))])
            for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)
