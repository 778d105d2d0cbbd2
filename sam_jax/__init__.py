"""sam_jax: Sharpness-Aware Minimization (Foret et al., ICLR 2021) in JAX."""

__version__ = '0.1.0'
