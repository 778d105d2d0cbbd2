"""VGG (Simonyan and Zisserman, ICLR 2015) for small images: one linear layer as a head.

As most papers on SAM's relatives train it on CIFAR, in the form of kuangliu/pytorch-cifar: 3x3
convolutions with biases, BatchNorm behind each, and none of the paper's three dense layers.
"""

import functools

import flax.linen as nn
import jax

from sam_jax.models import layers

CHANNELS = (64, 128, 256, 512, 512)
# Depth -> convolutions of each group.
SIZES = {
    6: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(layers.Network, kw_only=True):
    """VGG of five groups of 3x3 convolutions, each group ending in a max pool.

    Of 32x32 pixels one is left; of more the head reads the mean over what is left, and of fewer the
    pools stop at one.

    Attributes:
      convolutions: number of each group.
      batch_norm: False leaves out BatchNorm.
      channels: of each group.
    """

    convolutions: tuple[int, ...]
    batch_norm: bool
    channels: tuple[int, ...] = CHANNELS

    kernel_init = staticmethod(layers.pytorch_init)
    head_init = staticmethod(layers.pytorch_init)

    def _group(self, x, group, train):
        for i in range(self.convolutions[group]):
            name = f'group{group}_'
            x = self.conv(x, self.channels[group], 3, 1, f'{name}conv{i}', use_bias=True)
            x = nn.relu(self.norm(x, train, f'{name}bn{i}') if self.batch_norm else x)
        return nn.max_pool(x, (2, 2), strides=(2, 2), padding='SAME')

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images.astype(self.dtype)
        for group in range(len(self.convolutions)):
            x = self.run_block(functools.partial(VGG._group, group=group, train=train), x)
        return self.head(self.pool(x))
