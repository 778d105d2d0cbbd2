"""sam_jax: Sharpness-Aware Minimization (Foret et al., ICLR 2021) in JAX."""

__version__ = '0.1.0'


def __getattr__(name):
    # `load` is imported when it is asked for, so that no import of a part loads the whole.
    if name == 'load':
        from sam_jax.trained import load

        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
