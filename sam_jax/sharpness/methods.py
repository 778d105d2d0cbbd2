"""The methods by name."""

import inspect

import optax

from sam_jax.sharpness import gate
from sam_jax.sharpness.by_ascent import (
    asam,
    fisher_sam,
    friendly_sam,
    layerwise_sam,
    multistep_sam,
    random_sam,
    sam,
    sam_on,
    second_order_sam,
    sparse_sam,
    unnormalized_sam,
    vasso,
)
from sam_jax.sharpness.by_combination import (
    cr_sam,
    gnp,
    gradient_constrained,
    gsam,
    look_layersam,
    looksam,
    stable_sam,
    wsam,
)
from sam_jax.sharpness.by_gate import ae_looksam, ae_sam, late_phase_sam, periodic_sam, rst
from sam_jax.sharpness.by_other_means import (
    bsam,
    det_sam,
    esam,
    extrapolated,
    frob_sam,
    mesa,
    momentum_sam,
    saf,
    sampa,
    trace_sam,
)
from sam_jax.sharpness.transform import sharpness_aware


def erm():
    """The base gradient as it is: plain SGD, or whatever follows in the chain.

    One gradient evaluation; no state. Takes `grad_fn` and does not call it.
    """
    return sharpness_aware(optax.set_to_zero(), gate=gate.never())


# The names that config.sam.method may take. 'sgd' is the paper's word for the baseline.
METHODS = {
    'sam': sam, 'sgd': erm,
    # Other ascents.
    'unnormalized_sam': unnormalized_sam, 'asam': asam, 'fisher_sam': fisher_sam,
    'layerwise_sam': layerwise_sam, 'sam_on': sam_on, 'sparse_sam': sparse_sam,
    'random_sam': random_sam, 'multistep_sam': multistep_sam, 'second_order_sam': second_order_sam,
    'vasso': vasso, 'friendly_sam': friendly_sam,
    # Other combinations of the two gradients.
    'gsam': gsam, 'wsam': wsam, 'gnp': gnp, 'gradient_constrained': gradient_constrained,
    'cr_sam': cr_sam, 'stable_sam': stable_sam, 'looksam': looksam, 'look_layersam': look_layersam,
    # At some steps only.
    'periodic_sam': periodic_sam, 'late_phase_sam': late_phase_sam, 'rst': rst, 'ae_sam': ae_sam,
    'ae_looksam': ae_looksam,
    # Random probes, one gradient taken elsewhere, losses with memory, some of the examples.
    'trace_sam': trace_sam, 'det_sam': det_sam, 'frob_sam': frob_sam,
    'momentum_sam': momentum_sam, 'extrapolated': extrapolated, 'sampa': sampa, 'bsam': bsam,
    'saf': saf, 'mesa': mesa, 'esam': esam}

# What to expect of `perturbation_norm` and of the perturbed loss, for those who check a run.
NO_ASCENT = frozenset({'sgd', 'saf', 'mesa'})
# The norm is rho at every ascent, or at most rho; of the others rho is another unit.
ON_THE_SPHERE = frozenset(METHODS) - NO_ASCENT - {
    'unnormalized_sam', 'multistep_sam', 'sparse_sam', 'trace_sam', 'det_sam', 'frob_sam',
    'extrapolated', 'bsam', 'esam'}
IN_THE_BALL = ON_THE_SPHERE | {'multistep_sam', 'sparse_sam'}
# No ascent at the first step, or none for certain.
LATE = frozenset({'late_phase_sam', 'rst', 'momentum_sam', 'extrapolated', 'sampa'})
# Not uphill for certain, or not to where a second loss is taken.
SIDEWAYS = frozenset({
    'random_sam', 'vasso', 'friendly_sam', 'trace_sam', 'det_sam', 'frob_sam', 'momentum_sam',
    'extrapolated', 'sampa', 'bsam', 'esam'})

# What a method is given by its surroundings and is not an option of its own.
_GIVEN = ('rho', 'p', 'mask', 'total_steps', 'num_examples')


def takes(method):
    """Returns the names of all that a method's constructor takes."""
    return tuple(inspect.signature(METHODS[method]).parameters)


def options(method):
    """Returns {name: default} of what a method takes besides what its surroundings give."""
    return {name: parameter.default
            for name, parameter in inspect.signature(METHODS[method]).parameters.items()
            if name not in _GIVEN}


def create(method, **settings):
    """Returns METHODS[method](**settings), with the settings that the method takes.

    Args:
      method: a name in METHODS.
      **settings: every setting of `config.sam` besides the method, and perhaps total_steps and
        num_examples; the method picks its own.
    """
    wanted = takes(method)
    return METHODS[method](**{name: value for name, value in settings.items() if name in wanted})
