# ruff: noqa: I001
"""The methods: importing this enters them in the registry, in the order of the table of methods."""

from sam_jax.sharpness.methods import perturbed
from sam_jax.sharpness.methods import combined
from sam_jax.sharpness.methods import intermittent
from sam_jax.sharpness.methods import one_gradient
from sam_jax.sharpness.methods import two_at_once
from sam_jax.sharpness.methods import probes
from sam_jax.sharpness.methods import of_examples

__all__ = [
    'perturbed',
    'combined',
    'intermittent',
    'one_gradient',
    'two_at_once',
    'probes',
    'of_examples',
]
