"""How flat a minimum is: spectra of the Hessian, sharpness over balls, landscapes of the loss."""

from sam_jax.analysis import during, hessian, landscape, objective, sharpness

__all__ = ['during', 'hessian', 'landscape', 'objective', 'sharpness']
