"""What the architectures share: initialisers, BatchNorm, convolutions, blocks, the head."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from sam_jax.errors import UserError

# Numbers that a TPU computes side by side: the last dimension of an array there is padded to them.
LANES = 128

# Kaiming normal, fan-out, gain 2: not truncated.
conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def dense_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """U[-1, 1] / sqrt(number of outputs)."""
    return jax.random.uniform(key, shape, dtype, -1.0) * shape[1] ** -0.5


def channels_in_lanes(x: jax.Array) -> jax.Array:
    """Returns x, images (N, H, W, C); on a TPU with the channels along the lanes.

    Left to itself the TPU's compiler puts the images there around an average pool, and with it in
    a whole network; a replica of 32 fills a quarter of the lanes, and the step is estimated to take
    about three times as long (docs/targets.md). Where there are images enough, or too few channels,
    or where a program is exported for any number of images, the choice stays the compiler's.
    """
    few = isinstance(x.shape[0], int) and x.shape[0] < LANES
    if not few or x.shape[-1] < LANES:
        return x

    def constrained(x):
        return with_layout_constraint(x, Layout(major_to_minor=(1, 2, 0, 3)))

    return lax.platform_dependent(x, tpu=constrained, default=lambda x: x)


def add_shortcut(x: jax.Array, shortcut: jax.Array) -> jax.Array:
    """Returns x + shortcut, the latter average-pooled and padded with zero channels to fit."""
    stride = shortcut.shape[-2] // x.shape[-2]
    if stride > 1:
        shortcut = nn.avg_pool(shortcut, (stride, stride), strides=(stride, stride))
    if x.shape[-1] != shortcut.shape[-1]:
        if _no_scatter.get():
            channels = (0, x.shape[-1] - shortcut.shape[-1], 0)
            zero = jnp.zeros((), shortcut.dtype)
            return x + lax.pad(shortcut, zero, [(0, 0, 0)] * 3 + [channels])
        # Not jnp.pad and +: XLA of jax 0.12 fuses that into NaN on CPU in bfloat16.
        return channels_in_lanes(jnp.asarray(x).at[..., : shortcut.shape[-1]].add(shortcut))
    return channels_in_lanes(x + shortcut)


# Whether networks are traced for a runtime that cannot add to a part of an array.
_no_scatter = contextvars.ContextVar('no_scatter', default=False)


@contextlib.contextmanager
def no_scatter() -> Iterator[None]:
    """Has networks that are traced here add to parts of arrays without `scatter`: TFLite has none.

    Nothing else changes, and no number does.
    """
    token = _no_scatter.set(True)
    try:
        yield
    finally:
        _no_scatter.reset(token)


class Network(nn.Module):
    """Base of all architectures.

    Attributes:
      num_classes: size of the head.
      dtype: dtype of the computation; params, statistics and logits stay in `param_dtype`.
      param_dtype: dtype of params.
      batch_norm_axis: name of the axis over whose devices BatchNorm averages its statistics;
        None for those of a replica alone.
      frozen_batch_norm: normalise by the running statistics in training too, and leave them as they
        are (SAM paper, appendix C.2: fine-tuning).
      remat: compute the activations within a block anew in the backward pass: less memory, one more
        forward pass, the same numbers.
    """

    num_classes: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    batch_norm_axis: str | None = None
    frozen_batch_norm: bool = False
    remat: bool = False

    # No annotations: constants of the architecture and no options.
    batch_norm_momentum = 0.9
    batch_norm_epsilon = 1e-5
    kernel_init = staticmethod(conv_init)
    head_init = staticmethod(dense_init)

    def conv(
        self, x: jax.Array, channels: int, kernel: int, stride: int, name: str, **options
    ) -> jax.Array:
        """Convolution, `kernel` x `kernel`, padded as 'SAME' and without bias unless asked for."""
        options = {'padding': 'SAME', 'use_bias': False, 'kernel_init': self.kernel_init, **options}
        return nn.Conv(
            channels,
            (kernel, kernel),
            (stride, stride),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
            **options,
        )(x)

    def norm(self, x: jax.Array, train: bool, name: str, **options) -> jax.Array:
        """BatchNorm with the biased variance E[x^2] - E[x]^2, in float32 at least."""
        return nn.BatchNorm(
            use_running_average=not train or self.frozen_batch_norm,
            momentum=self.batch_norm_momentum,
            epsilon=self.batch_norm_epsilon,
            axis_name=self.batch_norm_axis,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
            **options,
        )(x)

    def pool(self, x: jax.Array) -> jax.Array:
        """Mean over the image, in float32 at least."""
        return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))

    def head(self, x: jax.Array) -> jax.Array:
        """The last layer: features (N, C) -> logits, in float32 at least."""
        return nn.Dense(
            self.num_classes,
            kernel_init=self.head_init,
            dtype=x.dtype,
            param_dtype=self.param_dtype,
            name='head',
        )(x)

    def run_block(self, block: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        """block(self, x), the activations within it kept or computed anew as `remat` says."""
        return (nn.remat(block) if self.remat else block)(self, x)


def require_rate(name: str, rate: float) -> None:
    """Raises UserError unless 0 <= rate < 1."""
    if not 0 <= rate < 1:
        raise UserError(f'model.{name} is {rate}; it must be at least 0 and below 1.')
