"""What the architectures share: initialisers, BatchNorm, convolutions, blocks, the head."""

import contextlib
import contextvars
import math
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

# U[-1, 1] / sqrt(fan-in): what PyTorch draws where nothing is said.
pytorch_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


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


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Any = 'VALID') -> jax.Array:
    """Convolution of images (N, H, W, inputs) by a kernel (h, w, inputs, outputs), in x's dtype."""
    layouts = ('NHWC', 'HWIO', 'NHWC')
    kernel = kernel.astype(x.dtype)
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layouts)


@jax.custom_jvp
def second_moment(x: jax.Array) -> jax.Array:
    """Returns E[x x^T] over all but the last axis of (..., C): (C, C), in float32 at least."""
    return _mean_product(x, x)


@second_moment.defjvp
def _second_moment_jvp(primals, tangents):
    # JAX would have two products here, and so in the gradient, one the other's transpose.
    (x,), (dx,) = primals, tangents
    half = _mean_product(dx, x)
    return second_moment(x), half + half.T


def _mean_product(x, y):
    axes = tuple(range(x.ndim - 1))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    product = lax.dot_general(x, y, ((axes, axes), ((), ())), preferred_element_type=wide)
    return product / math.prod(x.shape[:-1])


class Learned(nn.Module, kw_only=True):
    """A param by itself, such as a class token, positions, or a kernel that its caller uses.

    Attributes:
      leaf: its name.
      shape, initializer, param_dtype: of the param.
    """

    leaf: str
    shape: tuple[int, ...]
    initializer: Callable[..., jax.Array]
    param_dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns it."""
        return self.param(self.leaf, self.initializer, self.shape, self.param_dtype)


class FoldedBatchNorm(nn.Module):
    """BatchNorm as three vectors, where the product with its input is folded into what is around:

        x -> (x - mean) factor + bias,   factor = scale / sqrt(var + epsilon).

    Params and statistics are those of flax's BatchNorm.

    Attributes:
      channels: how many there are.
      momentum: share of the old running statistics in the new ones.
      epsilon: added to the variance.
      param_dtype: of params.
      scale_init: initialiser of the scale.
    """

    channels: int
    momentum: float
    epsilon: float
    param_dtype: Any
    scale_init: Callable[..., jax.Array] = nn.initializers.ones

    def setup(self) -> None:
        shape = (self.channels,)
        self.mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, jnp.float32)
        self.var = self.variable('batch_stats', 'var', jnp.ones, shape, jnp.float32)
        self.scale = self.param('scale', self.scale_init, shape, self.param_dtype)
        self.bias = self.param('bias', nn.initializers.zeros, shape, self.param_dtype)

    def __call__(
        self, moments: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (mean, factor, bias), each (channels,).

        Args:
          moments: E[x] and E[x^2] - E[x]^2, which go into the running statistics; None to normalise
            by the running statistics, and leave them as they are.
        """
        if moments is None:
            mean, var = self.mean.value, self.var.value
        else:
            # Rounding may leave less than nothing of the variance.
            mean, var = moments[0], jnp.maximum(0.0, moments[1])
            if not self.is_initializing():
                for running, new in ((self.mean, mean), (self.var, var)):
                    running.value = self.momentum * running.value + (1 - self.momentum) * new
        return mean, lax.rsqrt(var + self.epsilon) * self.scale, self.bias


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
      head_bias: what the head's bias starts with.
    """

    num_classes: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    batch_norm_axis: str | None = None
    frozen_batch_norm: bool = False
    remat: bool = False
    head_bias: float = 0.0

    # No annotations: constants of the architecture and no options.
    frozen = False  # whether it has variables that no step changes, the collection 'frozen'
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

    def conv_norm(
        self,
        x: jax.Array,
        channels: int,
        kernel: int,
        stride: int,
        train: bool,
        names: tuple[str, str],
        **options,
    ) -> jax.Array:
        """BatchNorm of a convolution, named so; in training without the array between if that pays.

        With a kernel W (inputs, channels) of 1x1 and C = E[(x - E[x]) (x - E[x])^T] BatchNorm of
        y = x W is

            (x - E[x]) W factor + bias,   E[y] = E[x] W,   var = diag(W^T C W),

        so the factor goes into the kernel before the product, what follows can be done with its
        result at once, and y is neither written nor read, in the backward pass either. It pays
        where there are fewer inputs than outputs, and far fewer than pixels.
        """
        conv, norm = names
        inputs = x.shape[-1]
        if (
            not self._measures(train)
            or not kernel == stride == 1
            or not inputs < min(channels, math.prod(x.shape[:-1]) // 8)
        ):
            x = self.conv(x, channels, kernel, stride, conv)
            return self.norm(x, train, norm, **options)
        w = self.kernel((1, 1, inputs, channels), conv)[0, 0]
        mean = self._average(jnp.mean(self._wide(x), tuple(range(x.ndim - 1))))
        # What is subtracted is rounded as x is; `rest` is what remains of the mean. The result does
        # not depend on where it is cut, and so has no derivative by it.
        centre = lax.stop_gradient(mean).astype(x.dtype)
        x, rest = x - centre[None, None, None], mean - centre
        with jax.default_matmul_precision('highest'):
            square = self._average(jnp.sum(w * (second_moment(x) @ w), 0))
            moments = mean @ w, square - jnp.square(rest @ w)
            _, factor, bias = self.folded_norm(channels, norm, **options)(moments)
            w = (w * factor[None]).astype(self.dtype)
            bias -= rest @ w.astype(rest.dtype)
        # A convolution: the TPU's compiler lays out the result of a matrix product differently.
        y = convolve(x, w[None, None])
        return (self._wide(y) + bias[None, None, None]).astype(self.dtype)

    def kernel(self, shape: tuple[int, ...], name: str) -> jax.Array:
        """The kernel of the convolution `name`, of this shape."""
        return Learned(
            leaf='kernel',
            shape=shape,
            initializer=self.kernel_init,
            param_dtype=self.param_dtype,
            name=name,
        )()

    def folded_norm(self, channels: int, name: str, **options) -> FoldedBatchNorm:
        """The FoldedBatchNorm of this network for `channels` channels."""
        return FoldedBatchNorm(
            channels,
            self.batch_norm_momentum,
            self.batch_norm_epsilon,
            self.param_dtype,
            name=name,
            **options,
        )

    def moments(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array] | None:
        """E[x] and E[x^2] - E[x]^2 of each channel; None if the running ones normalise."""
        if not self._measures(train):
            return None
        wide, axes = self._wide(x), tuple(range(x.ndim - 1))
        mean, square = self._average((jnp.mean(wide, axes), jnp.mean(jnp.square(wide), axes)))
        return mean, square - jnp.square(mean)

    def _wide(self, x):
        """x in float32 at least."""
        return x.astype(jnp.promote_types(self.dtype, jnp.float32))

    def _measures(self, train):
        """Whether BatchNorm normalises by the batch."""
        return train and not self.frozen_batch_norm

    def _average(self, moments):
        """moments, averaged over the devices of `batch_norm_axis`."""
        if self.batch_norm_axis is None or self.is_initializing():
            return moments
        return lax.pmean(moments, self.batch_norm_axis)

    def pool(self, x: jax.Array) -> jax.Array:
        """Mean over the image, in float32 at least."""
        return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))

    def head(self, x: jax.Array) -> jax.Array:
        """The last layer: features (N, C) -> logits, in float32 at least."""
        return nn.Dense(
            self.num_classes,
            kernel_init=self.head_init,
            bias_init=nn.initializers.constant(self.head_bias),
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
