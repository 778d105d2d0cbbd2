"""A trained network in use: `sam_jax.load`, files of published weights, exported programs."""

from sam_jax.trained.folders import load, of_experiment, write
from sam_jax.trained.model import Trained

__all__ = ['Trained', 'load', 'of_experiment', 'write']
