"""Sharpness-aware gradients as optax transformations.

A method replaces the gradient at w by a sharpness-aware gradient, so it is a link in any chain:

    tx = optax.chain(sharpness.sam(rho=0.05), optax.sgd(0.1, momentum=0.9))
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)

`grad_fn(params)` returns the gradient of the same loss on the same examples with the same
randomness at other params. Three ideas compose every method: an **ascent** (gradient -> step away
from w), a **combination** (clean and perturbed gradients -> gradient) and a **gate** (when to pay
for the perturbed gradient).
"""

from sam_jax.sharpness import ascent, combine, direction, gate, mask
from sam_jax.sharpness.by_other_means import Trajectory
from sam_jax.sharpness.combine import add_correction
from sam_jax.sharpness.methods import (
    IN_THE_BALL,
    LATE,
    METHODS,
    NO_ASCENT,
    ON_THE_SPHERE,
    SIDEWAYS,
    ae_looksam,
    ae_sam,
    asam,
    bsam,
    cr_sam,
    create,
    det_sam,
    erm,
    esam,
    extrapolated,
    fisher_sam,
    friendly_sam,
    frob_sam,
    gnp,
    gradient_constrained,
    gsam,
    late_phase_sam,
    layerwise_sam,
    look_layersam,
    looksam,
    mesa,
    momentum_sam,
    multistep_sam,
    options,
    periodic_sam,
    random_sam,
    rst,
    saf,
    sam,
    sam_on,
    sampa,
    second_order_sam,
    sparse_sam,
    stable_sam,
    takes,
    trace_sam,
    unnormalized_sam,
    vasso,
    wsam,
)
from sam_jax.sharpness.transform import Method, SharpnessState, fill_masked, sharpness_aware

__all__ = [
    'IN_THE_BALL', 'LATE', 'METHODS', 'Method', 'NO_ASCENT', 'ON_THE_SPHERE', 'SIDEWAYS',
    'SharpnessState', 'Trajectory', 'add_correction', 'ae_looksam', 'ae_sam',
    'asam', 'ascent', 'bsam', 'combine', 'cr_sam', 'create', 'det_sam', 'direction', 'erm', 'esam',
    'extrapolated', 'fill_masked', 'fisher_sam', 'friendly_sam', 'frob_sam', 'gate', 'gnp',
    'gradient_constrained', 'gsam', 'late_phase_sam', 'layerwise_sam', 'look_layersam', 'looksam',
    'mask', 'mesa', 'momentum_sam', 'multistep_sam', 'options', 'periodic_sam', 'random_sam', 'rst',
    'saf', 'sam', 'sam_on', 'sampa', 'second_order_sam', 'sharpness_aware', 'sparse_sam',
    'stable_sam', 'takes', 'trace_sam', 'unnormalized_sam', 'vasso', 'wsam',
]
