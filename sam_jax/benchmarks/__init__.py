"""Benchmarks: `python -m sam_jax.benchmarks.NAME`, each measures side by side in one run.

`step`: the train step, beside optax and PyTorch. `convolutions`: their rule on CPU. `input`:
augmentation and decoding, beside TensorFlow. `hessian`: products and Lanczos, beside others'.
`compile`: how long every model takes to compile, and its memory.
"""
