"""Sharpness-aware gradients as optax transformations.

A method replaces the gradient at w by a sharpness-aware gradient, so it is a link in any chain:

    tx = optax.chain(sharpness.sam(rho=0.05), optax.sgd(0.1, momentum=0.9))
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)

`grad_fn(params)` returns the gradient of the same loss on the same examples with the same
randomness at other params. What a link cannot do without more than that, it refuses in one
sentence.

`protocol.py` says what a method is, `as_optax.py` makes it a link, `methods/` has them all, each
with its entry in `registry.py`. Most are built (`builder.py`) of three parts: an **ascent**
(gradient -> step away from w), a **combination** (clean and perturbed gradients -> gradient) and a
**gate** (when to pay for the perturbed gradient).
"""

from sam_jax.sharpness import ascent, combine, direction, gate, mask, trees
from sam_jax.sharpness.as_optax import (
    Link,
    SharpnessState,
    as_optax,
    fill_masked,
    from_loss_fn,
    from_network,
)
from sam_jax.sharpness.builder import sharpness_aware
from sam_jax.sharpness.combine import add_correction
from sam_jax.sharpness.methods.combined import (
    cr_sam,
    gnp,
    gradient_constrained,
    gsam,
    stable_sam,
    wsam,
)
from sam_jax.sharpness.methods.intermittent import (
    ae_looksam,
    ae_sam,
    late_phase_sam,
    look_layersam,
    looksam,
    periodic_sam,
    rst,
)
from sam_jax.sharpness.methods.of_examples import esam, functional_sam
from sam_jax.sharpness.methods.one_gradient import Trajectory, extrapolated, mesa, momentum_sam, saf
from sam_jax.sharpness.methods.perturbed import (
    asam,
    erm,
    fisher_sam,
    friendly_sam,
    layerwise_sam,
    le_sam,
    multistep_sam,
    random_sam,
    sam,
    sam_on,
    second_order_sam,
    sparse_sam,
    unnormalized_sam,
    vasso,
)
from sam_jax.sharpness.methods.probes import det_sam, frob_sam, trace_sam
from sam_jax.sharpness.methods.two_at_once import bsam, sampa
from sam_jax.sharpness.protocol import Evaluation, Loss, Method, Now, Report
from sam_jax.sharpness.registry import METHODS, create, gradients, options, table, takes

__all__ = [
    'Evaluation',
    'Link',
    'Loss',
    'METHODS',
    'Method',
    'Now',
    'Report',
    'SharpnessState',
    'Trajectory',
    'add_correction',
    'ae_looksam',
    'ae_sam',
    'as_optax',
    'asam',
    'ascent',
    'bsam',
    'combine',
    'cr_sam',
    'create',
    'det_sam',
    'direction',
    'erm',
    'esam',
    'extrapolated',
    'fill_masked',
    'fisher_sam',
    'friendly_sam',
    'frob_sam',
    'from_loss_fn',
    'from_network',
    'functional_sam',
    'gate',
    'gnp',
    'gradient_constrained',
    'gradients',
    'gsam',
    'late_phase_sam',
    'layerwise_sam',
    'le_sam',
    'look_layersam',
    'looksam',
    'mask',
    'mesa',
    'momentum_sam',
    'multistep_sam',
    'options',
    'periodic_sam',
    'random_sam',
    'rst',
    'saf',
    'sam',
    'sam_on',
    'sampa',
    'second_order_sam',
    'sharpness_aware',
    'sparse_sam',
    'stable_sam',
    'table',
    'takes',
    'trace_sam',
    'trees',
    'unnormalized_sam',
    'vasso',
    'wsam',
]
