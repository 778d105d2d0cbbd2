"""A trained network: from uint8 images to classes, with all that its run did in between."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sam_jax import models
from sam_jax.data.preprocessing import Preprocessing
from sam_jax.models.layers import Network
from sam_jax.replicas import Device

BATCH_SIZE = 512


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained network and what its use takes. `sam_jax.load` returns one.

    Attributes:
      config: the settings of its run.
      variables: {'params', 'batch_stats'}, NumPy arrays; 'frozen', where the network has those.
      preprocessing: what becomes of the images.
      classes: the names of the classes; their numbers, as text, where they have none.
      result: what the run says of itself after these weights' step, as in `result.json`.
      step: after how many steps these weights are.
      ema: whether they are the run's moving average.
      origin: what else is known of the run: versions, git revision, devices.
      devices: those that compute; each has its share of a batch.
    """

    config: Any
    variables: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    result: dict[str, Any]
    step: int
    ema: bool
    origin: dict[str, Any]
    devices: tuple[Device, ...]

    @functools.cached_property
    def model(self) -> Network:
        """The network, a flax module."""
        return models.from_config(self.config.model, len(self.classes))

    @property
    def test_error(self) -> float | None:
        """Share of the test set that these weights take for another class; None if not known."""
        return self.result.get('test/ema_error_rate' if self.ema else 'test/error_rate')

    @property
    def num_params(self) -> int:
        """Number of parameters, without the statistics of BatchNorm."""
        return sum(x.size for x in jax.tree.leaves(self.variables['params']))

    @property
    def facts(self) -> dict[str, str]:
        """What a reader is told of it, by the name of each: data, model, method, result."""
        config, error = self.config, self.test_error
        data, method = config.data, config.sam.method
        noise = f', {100 * data.label_noise:g} % label noise' if data.label_noise else ''
        part = f', {100 * data.fraction:g} % of it' if data.fraction < 1 else ''
        part += f', {data.shots} images of each class' if data.shots else ''
        return {
            'dataset': f'{data.name}{part}{noise}',
            'model': f'{config.model.name}, {self.num_params:,} parameters',
            'method': method if method == 'sgd' else f'{method}, rho {config.sam.rho:g}',
            'training': f'{self.step:,} steps of {config.batch_size} images, seed {config.seed}',
            'weights': 'moving average' if self.ema else 'of the last step',
            'test error': 'not known' if error is None else f'{100 * error:.2f} %',
        }

    def apply(self, variables: dict[str, Any], images: jax.Array) -> jax.Array:
        """Returns logits (N, classes): a pure function of variables and uint8 (N, H, W, C)."""
        logits: Any = self.model.apply(variables, self.preprocessing(images), train=False)
        return logits

    def logits(self, images: Any, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Returns the logits (N, classes) of images.

        Args:
          images: uint8 (N, H, W, C), or (N, H, W) of grey ones.
          batch_size: how many at once, over all devices.

        Raises:
          UserError: they are of another type or shape than the run's.
        """
        images = self.preprocessing.checked(images)
        program, variables, rows = self._program
        parts = []
        # With no images one batch of padding, so that there is something to take nothing of.
        for start in range(0, max(len(images), 1), batch_size):
            part = images[start : start + batch_size]
            padding = self._padded(len(part), batch_size) - len(part)
            padded = np.pad(part, [(0, padding), *[(0, 0)] * 3])
            parts.append((program(variables, jax.device_put(padded, rows)), len(part)))
        return np.concatenate([np.asarray(logits)[:n] for logits, n in parts])

    def predict(self, images: Any, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Returns the probabilities (N, classes) of images, float32; else as `logits`."""
        logits = self.logits(images, batch_size)
        return np.asarray(jax.nn.softmax(logits)).astype(np.float32)

    @functools.cached_property
    def _program(self):
        """(The compiled `apply`, the variables on all devices, where a batch of images goes)."""
        mesh = Mesh(np.array(self.devices), ('images',))
        everywhere, rows = NamedSharding(mesh, PartitionSpec()), PartitionSpec('images')
        return (
            jax.jit(self.apply),
            jax.device_put(self.variables, everywhere),
            NamedSharding(mesh, rows),
        )

    def _padded(self, count, batch_size):
        """A size that `count` images fit in; there are few of them, each compiled once."""
        size = len(self.devices)
        while size < min(count, batch_size):
            size *= 2
        return size
