"""EfficientNet (Tan and Le, ICML 2019) B0 to B8, L2 and L2-475, as in the SAM paper's code."""

import functools
import math
from typing import NamedTuple

import flax.linen as nn

from sam_jax.models import layers, shake


class Size(NamedTuple):
    """Multipliers of B0's width and depth, the resolution it is made for, the head's dropout."""

    width: float
    depth: float
    resolution: int
    dropout_rate: float


class Stage(NamedTuple):
    """Blocks of one shape, before scaling; the first of them has the stride."""

    channels: int
    kernel: int
    repeats: int
    expansion: int
    stride: int


SIZES = {
    'tiny': Size(1.0, 1.0, 32, 0.2),  # with TINY_STAGES
    'b0': Size(1.0, 1.0, 224, 0.2),
    'b1': Size(1.0, 1.1, 240, 0.2),
    'b2': Size(1.1, 1.2, 260, 0.3),
    'b3': Size(1.2, 1.4, 300, 0.3),
    'b4': Size(1.4, 1.8, 380, 0.4),
    'b5': Size(1.6, 2.2, 456, 0.4),
    'b6': Size(1.8, 2.6, 528, 0.5),
    'b7': Size(2.0, 3.1, 600, 0.5),
    'b8': Size(2.2, 3.6, 672, 0.5),
    'l2': Size(4.3, 5.3, 800, 0.5),
    'l2-475': Size(4.3, 5.3, 475, 0.5),
}

STAGES = (
    Stage(16, 3, 1, 1, 1),
    Stage(24, 3, 2, 6, 2),
    Stage(40, 5, 2, 6, 2),
    Stage(80, 3, 3, 6, 2),
    Stage(112, 5, 3, 6, 1),
    Stage(192, 5, 4, 6, 2),
    Stage(320, 3, 1, 6, 1),
)
TINY_STAGES = (Stage(16, 3, 1, 1, 1), Stage(24, 3, 2, 6, 2), Stage(40, 5, 1, 6, 2))

_SQUEEZE = 0.25
_conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'truncated_normal')
# The kernel is (k, k, 1, channels), and each channel has one output.
_depthwise_init = nn.initializers.variance_scaling(
    2.0, 'fan_out', 'truncated_normal', in_axis=-1, out_axis=-2
)


def scale_channels(channels: int, width: float) -> int:
    """channels x width to the nearest multiple of 8, but never below nine tenths of it."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class EfficientNet(layers.Network, kw_only=True):
    """EfficientNet: MBConv blocks with squeeze-and-excitation and swish.

    Attributes:
      width: multiplier of all channels.
      depth: multiplier of the repeats of all stages.
      stages: of the unscaled network.
      dropout_rate: before the head (rng 'dropout').
      stochastic_depth_rate: rate at which the branch of a block would be dropped after the last
        one; block k of K (from 0) has k / K of it (rng 'dropout').
    """

    width: float
    depth: float
    stages: tuple = STAGES
    dropout_rate: float = 0.2
    stochastic_depth_rate: float = 0.2

    batch_norm_momentum = 0.99
    batch_norm_epsilon = 1e-3
    kernel_init = staticmethod(_conv_init)

    def __post_init__(self):
        layers.require_rate('dropout_rate', self.dropout_rate)
        layers.require_rate('stochastic_depth_rate', self.stochastic_depth_rate)
        super().__post_init__()

    @property
    def repeats(self) -> list[int]:
        """Blocks of each stage."""
        return [math.ceil(stage.repeats * self.depth) for stage in self.stages]

    def _squeeze_excite(self, x, channels, name):
        gate = self.pool(x)[:, None, None].astype(self.dtype)
        gate = nn.silu(self.conv(gate, channels, 1, 1, f'{name}_se_reduce', use_bias=True))
        gate = self.conv(gate, x.shape[-1], 1, 1, f'{name}_se_expand', use_bias=True)
        return x * nn.sigmoid(gate)

    def _block(self, x, stage, stride, drop_rate, train, name):
        inputs = x
        if stage.expansion > 1:
            x = self.conv(x, inputs.shape[-1] * stage.expansion, 1, 1, f'{name}_conv_expand')
            x = nn.silu(self.norm(x, train, f'{name}_bn_expand'))
        x = self.conv(
            x,
            x.shape[-1],
            stage.kernel,
            stride,
            f'{name}_conv_depthwise',
            feature_group_count=x.shape[-1],
            kernel_init=_depthwise_init,
        )
        x = nn.silu(self.norm(x, train, f'{name}_bn_depthwise'))
        x = self._squeeze_excite(x, max(1, int(inputs.shape[-1] * _SQUEEZE)), name)
        x = self.conv(x, scale_channels(stage.channels, self.width), 1, 1, f'{name}_conv_project')
        x = self.norm(x, train, f'{name}_bn_project')
        if x.shape != inputs.shape:
            return x
        if train and drop_rate:
            x = shake.random_stochastic_depth(x, self.make_rng('dropout'), 1 - drop_rate)
        return x + inputs

    @nn.compact
    def __call__(self, images, train=False):
        x = self.conv(images.astype(self.dtype), scale_channels(32, self.width), 3, 2, 'conv_stem')
        x = nn.silu(self.norm(x, train, 'bn_stem'))
        block = 0
        for stage, n in zip(self.stages, self.repeats):
            for i in range(n):
                x = self.run_block(
                    functools.partial(
                        EfficientNet._block,
                        stage=stage,
                        stride=stage.stride if i == 0 else 1,
                        drop_rate=self.stochastic_depth_rate * block / sum(self.repeats),
                        train=train,
                        name=f'block{block}',
                    ),
                    x,
                )
                block += 1
        x = self.conv(x, scale_channels(1280, self.width), 1, 1, 'conv_head')
        x = self.pool(nn.silu(self.norm(x, train, 'bn_head')))
        return self.head(nn.Dropout(self.dropout_rate, deterministic=not train)(x))
