"""SAF's memory of logits and the loss on them, and MESA's (arXiv 2205.14083)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sam_jax import losses, sharpness
from sam_jax.replicas import AXIS

# No epoch is this one, and none lies so far back.
_NEVER = -(2**30)


def create_memory(
    trajectory: sharpness.Trajectory | None, num_images: int, num_classes: int, dtype: Any
) -> dict[str, jax.Array] | None:
    """Returns an empty memory, or None for a method that has none.

    {'logits': (epochs_ago, images, classes), 'epoch': (epochs_ago, images)}: the logits of each
    training image in the last epochs, and the epochs (0-based) that they are of.
    """
    if not trajectory or not trajectory.epochs_ago:
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
    index, logits = lax.all_gather((index, logits.reshape(*index.shape, -1)), AXIS)
    slot = epoch % memory['epoch'].shape[0]
    return {
        'logits': memory['logits'].at[slot, index].set(logits.astype(memory['logits'].dtype)),
        'epoch': memory['epoch'].at[slot, index].set(epoch),
    }


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
