"""Text: where it comes from, how it becomes tokens, what a model's loss on it is, and training.

The train loop of `sam_jax.train` is of images; this is beside it (docs/design.md).
"""
