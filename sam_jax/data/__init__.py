"""Input: datasets, the global order of the examples, augmentation on the device."""

from sam_jax.data.augment import RECIPES
from sam_jax.data.labels import LABEL_NOISE
from sam_jax.data.load import NAMES, OWN, load_dataset
from sam_jax.data.resident import ResidentDataset
from sam_jax.data.sources import SOURCES
from sam_jax.data.streaming import StreamingDataset

__all__ = [
    'LABEL_NOISE',
    'NAMES',
    'OWN',
    'RECIPES',
    'SOURCES',
    'ResidentDataset',
    'StreamingDataset',
    'load_dataset',
]
