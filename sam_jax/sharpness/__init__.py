"""Sharpness-aware gradients as optax transformations.

A method replaces the gradient at w by a sharpness-aware gradient, so it is a link in any chain:

    tx = optax.chain(sharpness.sam(rho=0.05), optax.sgd(0.1, momentum=0.9))
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)

`grad_fn(params)` returns the gradient of the same loss on the same examples with the same
randomness at other params. Three ideas compose every method: an **ascent** (gradient -> step away
from w), a **combination** (clean and perturbed gradients -> gradient) and a **gate** (when to pay
for the perturbed gradient).
"""

from sam_jax.sharpness import ascent, combine, gate
from sam_jax.sharpness.methods import (
    METHODS,
    create,
    erm,
    multistep_sam,
    options,
    random_sam,
    sam,
    second_order_sam,
)
from sam_jax.sharpness.transform import SharpnessState, fill_masked, sharpness_aware

__all__ = [
    'METHODS', 'SharpnessState', 'ascent', 'combine', 'create', 'erm', 'fill_masked', 'gate',
    'multistep_sam', 'options', 'random_sam', 'sam', 'second_order_sam', 'sharpness_aware',
]
