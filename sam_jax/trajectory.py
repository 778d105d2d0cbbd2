"""SAF's memory of logits and the loss on them, and MESA's (arXiv 2205.14083).

Of images that lie on the devices, the memory lies there as well, a part of the TrainState. Of
images that are streamed it lies on the host: a step is fed what is remembered of its images, and
gives back what the network says of them now.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam_jax import losses, sharpness
from sam_jax.errors import UserError
from sam_jax.limits import free_host_memory
from sam_jax.replicas import AXIS

# No epoch is this one, and none lies so far back.
_NEVER = -(2**30)


def create_memory(
    trajectory: sharpness.Trajectory | None, num_images: int, num_classes: int, dtype: Any
) -> dict[str, jax.Array] | None:
    """Returns an empty memory, or None for a method that has none, or of images that are streamed.

    {'logits': (epochs_ago, images, classes), 'epoch': (epochs_ago, images)}: the logits of each
    training image in the last epochs, and the epochs (0-based) that they are of.
    """
    if not trajectory or not trajectory.epochs_ago or not num_images:
        return None
    shape = (trajectory.epochs_ago, num_images)
    return {
        'logits': jnp.zeros((*shape, num_classes), dtype),
        'epoch': jnp.full(shape, _NEVER, jnp.int32),
    }


def recall(
    memory: dict[str, jax.Array], index: jax.Array, epoch: jax.Array
) -> dict[str, jax.Array]:
    """The logits of `index` from as many epochs ago as the memory is long, where it has them."""
    slots = memory['epoch'].shape[0]
    slot = epoch % slots
    return {
        'logits': memory['logits'][slot, index],
        'known': memory['epoch'][slot, index] == epoch - slots,
    }


def memorise(
    memory: dict[str, jax.Array], index: jax.Array, logits: jax.Array, epoch: jax.Array
) -> dict[str, jax.Array]:
    """The memory with the logits of this step's global batch, in place of the oldest."""
    index, logits = _of_global_batch(index, logits)
    slot = epoch % memory['epoch'].shape[0]
    return {
        'logits': memory['logits'].at[slot, index].set(logits.astype(memory['logits'].dtype)),
        'epoch': memory['epoch'].at[slot, index].set(epoch),
    }


def _of_global_batch(index, logits):
    return lax.all_gather((index, logits.reshape(*index.shape, -1)), AXIS)


def to_keep(
    index: jax.Array, logits: jax.Array, epoch: jax.Array, dtype: Any
) -> dict[str, jax.Array]:
    """What a HostMemory keeps of a step: {'index', 'logits', 'epoch'} of its global batch."""
    index, logits = _of_global_batch(index, logits)
    return {'index': index, 'logits': logits.astype(dtype), 'epoch': epoch}


def stored(dtype: Any) -> Any:
    """Returns the type of logits on the host, of those of a network: half of float32's."""
    return np.dtype(np.float16 if dtype == jnp.float32 else dtype)


class HostMemory:
    """The memory of images that are streamed, as `create_memory` has it, on the host.

    An image is known by its position in the training set. Every process keeps the logits of all
    images, since the next epoch may bring any of them to it: epochs_ago * images * classes numbers.
    What a step says is written before anything is read again, so that what a step is fed is a
    function of the steps before it alone, whatever devices and processes there are.
    """

    def __init__(self, epochs_ago: int, num_images: int, num_classes: int, dtype: Any) -> None:
        self._shape = (epochs_ago, num_images, num_classes)
        self._dtype = stored(dtype)
        # Pages of zeros take no memory before they are written.
        self._logits = np.zeros(self._shape, self._dtype)
        self._epoch = np.full(self._shape[:2], _NEVER, np.int32)
        self._waiting = None

    def check(self) -> None:
        """Refuses what this machine cannot hold.

        Raises:
          UserError: with the sizes.
        """
        free = free_host_memory()
        if self._logits.nbytes > free:
            epochs, images, classes = self._shape
            raise UserError(
                f"sam.method 'saf' remembers {classes} logits of {images} images from {epochs} "
                f'epochs, {self._logits.nbytes / 2**30:.3g} GiB in the memory of each host, of '
                f"which {free / 2**30:.3g} are free; use a smaller sam.epochs_ago, or 'mesa'."
            )

    def past(self, index: np.ndarray, epoch: int) -> dict[str, np.ndarray]:
        """Returns {'logits', 'known'} of the images `index`, as `recall` does."""
        self._write()
        epochs_ago = len(self._logits)
        slot = epoch % epochs_ago
        return {
            'logits': self._logits[slot, index],
            'known': self._epoch[slot, index] == epoch - epochs_ago,
        }

    def forget(self) -> None:
        """Begins anew."""
        self._waiting = None
        self._epoch[...] = _NEVER

    def keep(self, said: dict[str, jax.Array]) -> None:
        """Takes what `to_keep` returned, without waiting for it."""
        self._write()
        self._waiting = said

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns all of it, as checkpoints hold it."""
        self._write()
        return {'logits': self._logits, 'epoch': self._epoch}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes what `arrays` returned before."""
        self._waiting = None
        for mine, other in ((self._logits, 'logits'), (self._epoch, 'epoch')):
            mine[...] = arrays[other]

    def _write(self):
        if self._waiting is None:
            return
        said, self._waiting = jax.device_get(self._waiting), None
        index, epoch = said['index'].ravel(), int(said['epoch'])
        slot = epoch % len(self._logits)
        self._logits[slot, index] = said['logits'].reshape(len(index), -1)
        self._epoch[slot, index] = epoch


def trajectory_loss(
    trajectory: sharpness.Trajectory | None,
    state: Any,
    model: Any,
    epoch: jax.Array,
    frozen: Any = None,
) -> Callable[[jax.Array, dict[str, Any]], jax.Array] | None:
    """Returns SAF's or MESA's loss as a function (logits, replica) -> scalar, or None."""
    if trajectory is None:
        return None

    def added_loss(logits, replica):
        if trajectory.epochs_ago:
            past, known = replica['past']['logits'], replica['past']['known']
        else:
            average = {**state.ema, 'frozen': frozen or {}}
            past, known = model.apply(average, replica['image'], train=False), True
        each = losses.trajectory(logits, lax.stop_gradient(past), trajectory.tau)
        active = jnp.logical_and(known, epoch > trajectory.start_epoch)
        return trajectory.lam * jnp.mean(jnp.where(active, each, 0.0))

    return added_loss
