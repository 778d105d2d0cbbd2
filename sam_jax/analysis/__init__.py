"""How flat a minimum is: spectra of the Hessian, sharpness over balls, landscapes of the loss."""

from sam_jax.analysis import hessian, landscape, monitor, objective, sharpness

__all__ = ['hessian', 'landscape', 'monitor', 'objective', 'sharpness']
