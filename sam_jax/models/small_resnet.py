"""ResNet-18 and its like for 32x32 images, as PyTorch users train them on CIFAR.

The ResNet of He et al. for ImageNet (CVPR 2016, ECCV 2016 for pre-activation) with a 3x3 stem of
stride 1 and no max pool. Most papers on SAM's relatives use the form of kuangliu/pytorch-cifar:
shortcuts are projected where the shape changes, and the pre-activation form has no BatchNorm after
its last block.
"""

import functools

import flax.linen as nn
import jax

from sam_jax.models import layers


class SmallResNet(layers.Network, kw_only=True):
    """ResNet of four groups with 64, 128, 256 and 512 channels, for small images.

    Attributes:
      blocks: number of blocks of each group.
      bottleneck: blocks of 1x1, 3x3, 1x1 convolutions, the last four times as wide; else of two
        3x3 convolutions.
      preactivation: BatchNorm and ReLU in front of each convolution of a block, not behind it.
      width: channels of the stem and of the first group.
    """

    blocks: tuple[int, ...]
    bottleneck: bool
    preactivation: bool
    width: int = 64

    kernel_init = staticmethod(layers.pytorch_init)
    head_init = staticmethod(layers.pytorch_init)

    def _conv(self, x, channels, kernel, stride, name):
        # As much on both sides, which SAME is not where the stride is 2.
        return self.conv(x, channels, kernel, stride, name, padding=kernel // 2)

    def _activate(self, x, train, name):
        return nn.relu(self.norm(x, train, name))

    def _convs(self, channels, stride):
        """Of each convolution of a block: channels, kernel, stride."""
        if self.bottleneck:
            return [(channels, 1, 1), (channels, 3, stride), (4 * channels, 1, 1)]
        return [(channels, 3, stride), (channels, 3, 1)]

    def _block(self, x, channels, stride, train, name):
        y, convs = x, self._convs(channels, stride)
        for i, (width, kernel, step) in enumerate(convs, 1):
            y = self._conv(y, width, kernel, step, f'{name}_conv{i}')
            y = self.norm(y, train, f'{name}_bn{i}')
            y = y if i == len(convs) else nn.relu(y)
        if x.shape != y.shape:
            x = self._conv(x, y.shape[-1], 1, stride, f'{name}_conv_shortcut')
            x = self.norm(x, train, f'{name}_bn_shortcut')
        return nn.relu(layers.channels_in_lanes(x + y))

    def _preactivation_block(self, x, channels, stride, train, name):
        y = first = self._activate(x, train, f'{name}_bn1')
        for i, (width, kernel, step) in enumerate(self._convs(channels, stride), 1):
            y = y if i == 1 else self._activate(y, train, f'{name}_bn{i}')
            y = self._conv(y, width, kernel, step, f'{name}_conv{i}')
        if x.shape != y.shape:
            x = self._conv(first, y.shape[-1], 1, stride, f'{name}_conv_shortcut')
        return layers.channels_in_lanes(x + y)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = self._conv(images.astype(self.dtype), self.width, 3, 1, 'conv_init')
        if not self.preactivation:
            x = self._activate(x, train, 'bn_init')
        form = SmallResNet._preactivation_block if self.preactivation else SmallResNet._block
        for group, blocks in enumerate(self.blocks):
            for block in range(blocks):
                x = self.run_block(
                    functools.partial(
                        form,
                        channels=self.width * 2**group,
                        stride=2 if block == 0 and group > 0 else 1,
                        train=train,
                        name=f'group{group}_block{block}',
                    ),
                    x,
                )
        return self.head(self.pool(x))
