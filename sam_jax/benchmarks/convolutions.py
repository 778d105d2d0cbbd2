"""What the rule of `sam_jax.convolutions` does for each convolution of a WideResNet, on CPU.

    python -m sam_jax.benchmarks.convolutions [--images=128] [--width=4] [--rounds=5]

Prints GFLOP/s (a multiplication and an addition are two) of the forward pass, of the gradient of
the input and of that of the filter: first by JAX's own rule and then by ours, each as a program of
its own and within a `cond`, in one run. The best of some rounds each.
"""

import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags
from jax import lax

from sam_jax import convolutions, tables

_IMAGES = flags.DEFINE_integer('images', 128, 'Images in a batch.')
_WIDTH = flags.DEFINE_integer('width', 4, 'Of the WideResNet.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'How often each is timed.')


def _convolve(x, w, stride):
    return lax.conv_general_dilated(
        x, w, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def passes(stride: int) -> dict[str, Callable[..., jax.Array]]:
    """{name: (image, filter, cotangent) -> array}."""
    return {
        'forward': lambda x, w, g: _convolve(x, w, stride),
        'input': lambda x, w, g: jax.vjp(lambda x: _convolve(x, w, stride), x)[1](g)[0],
        'filter': lambda x, w, g: jax.vjp(lambda w: _convolve(x, w, stride), w)[1](g)[0],
    }


def _within_cond(function):
    return lambda x, w, g: lax.cond(
        x[0, 0, 0, 0] < 1e9, function, lambda x, w, g: 2 * function(x, w, g), x, w, g
    )


def _best_seconds(function, arguments):
    function = jax.jit(function)
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(_ROUNDS.value):
        then = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - then)
    return min(times)


def measure(size: int, channels: int, filters: int, stride: int) -> list[list[str]]:
    """Returns the rows of one convolution."""
    shapes = (
        (_IMAGES.value, size, size, channels),
        (3, 3, channels, filters),
        (_IMAGES.value, size // stride, size // stride, filters),
    )
    arguments = [jax.device_put(np.random.RandomState(0).randn(*s).astype('f')) for s in shapes]
    operations = 2 * np.prod(shapes[2]) * np.prod(shapes[1][:3])
    rows = []
    for name, function in passes(stride).items():
        cells = [f'{size}x{size}, {channels} to {filters}{", stride 2" * (stride == 2)}', name]
        for variant in (function, _within_cond(function)):
            with convolutions.as_jax_does():
                cells.append(f'{operations / 1e9 / _best_seconds(variant, arguments):.3g}')
            cells.append(f'{operations / 1e9 / _best_seconds(variant, arguments):.3g}')
        rows.append(cells)
        print(*cells, file=sys.stderr, flush=True)
    return rows


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    wide = 16 * _WIDTH.value
    layers = (
        (32, 3, 16, 1),
        (32, 16, wide, 1),
        (32, wide, wide, 1),
        (32, wide, 2 * wide, 2),
        (16, 2 * wide, 2 * wide, 1),
        (16, 2 * wide, 4 * wide, 2),
        (8, 4 * wide, 4 * wide, 1),
    )
    print(
        tables.markdown(
            ('convolution', 'pass', 'JAX', 'ours', 'JAX, in cond', 'ours, in cond'),
            [row for layer in layers for row in measure(*layer)],
        )
    )


if __name__ == '__main__':
    convolutions.install()
    app.run(main)
