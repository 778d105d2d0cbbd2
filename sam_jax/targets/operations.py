"""How many operations a program has, counted before any compiler has seen it."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def flops(jaxpr: Any) -> float:
    """Returns the operations of the convolutions and matrix products of a program.

    A multiplication and an addition are two; of a convolution none is counted that would meet
    padding. A `scan` counts with all its turns, a `cond` with its costliest branch, a `while` once.
    Within a `shard_map` they are those of one device. What is computed anew (`model.remat`) counts
    again.

    Args:
      jaxpr: of `jax.make_jaxpr(function)(*arguments)`.
    """
    jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
    return float(sum(_of_equation(equation) for equation in jaxpr.eqns))


def _of_equation(equation):
    name, params = equation.primitive.name, equation.params
    if name == 'conv_general_dilated':
        return _convolution(equation)
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
    inner = [flops(jaxpr) for jaxpr in _inner(params)]
    if name == 'cond':
        return max(inner)
    return sum(inner) * (params['length'] if name == 'scan' else 1)


def _inner(params) -> Iterator[Any]:
    for value in params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(x, 'eqns') or hasattr(getattr(x, 'jaxpr', None), 'eqns'):
                yield x


def _convolution(equation):
    p, (left, right) = equation.params, (x.aval.shape for x in equation.invars)
    numbers: jax.lax.ConvDimensionNumbers = p['dimension_numbers']
    batch, features, *space = (left[i] for i in numbers.lhs_spec)
    out_features, _, *window = (right[i] for i in numbers.rhs_spec)
    outputs = [equation.outvars[0].aval.shape[i] for i in numbers.out_spec[2:]]
    pairs = [
        _pairs(*sizes)
        for sizes in zip(
            space,
            window,
            outputs,
            p['window_strides'],
            (low for low, _ in p['padding']),
            p['lhs_dilation'],
            p['rhs_dilation'],
        )
    ]
    return (
        2
        * (batch // p['batch_group_count'])
        * (features // p['feature_group_count'])
        * out_features
        * math.prod(pairs)
    )


def _pairs(size, window, outputs, stride, low, dilation, window_dilation):
    """How many pairs of output and weight meet a pixel, along one axis."""
    place = np.add.outer(stride * np.arange(outputs), window_dilation * np.arange(window)) - low
    inside = (place >= 0) & (place <= (size - 1) * dilation) & (place % dilation == 0)
    return int(inside.sum())
