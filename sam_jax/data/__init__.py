"""Input: datasets, the global order of the examples, augmentation on the device."""

from sam_jax.data.augment import RECIPES
from sam_jax.data.resident import ResidentDataset, load_dataset
from sam_jax.data.sources import LABEL_NOISE, SOURCES

__all__ = ['LABEL_NOISE', 'RECIPES', 'SOURCES', 'ResidentDataset', 'load_dataset']
