"""What XLA has to be told for NVIDIA GPUs, lest a step copies arrays as large as the params."""

from typing import Any

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint


def in_order(tree: Any) -> Any:
    """Returns the tree of arrays; in a program for NVIDIA GPUs they lie in the order of their axes.

    cuDNN has the outputs of a kernel first, and so its gradient. Left to itself XLA computes the
    optimizer's step in that order, and turns and copies gradient, momentum and update for it.
    """

    def constrained(tree):
        return jax.tree.map(
            lambda x: with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))), tree
        )

    return lax.platform_dependent(tree, cuda=constrained, default=lambda tree: tree)


def settled(tree: Any) -> Any:
    """Returns the tree of arrays; in a program for NVIDIA GPUs what reads them comes after them.

    Otherwise XLA computes a step's new params and their norms in one kernel, which may not write
    where it reads. Then each array is copied to where it belongs. Or a kernel computes norms of the
    devices' mean gradient with those of one device, which then need an exchange of their own.
    """
    return lax.platform_dependent(tree, cuda=lax.optimization_barrier, default=lambda tree: tree)
