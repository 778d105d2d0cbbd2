"""ResNet v1 for ImageNet (He et al., CVPR 2016) as in the SAM paper's code.

The stride of a bottleneck is on its 3x3 convolution, the last BatchNorm of each block starts at
scale 0, shortcuts are projected where the shape changes. Like there, and unlike He's, the stem has
no ReLU between its BatchNorm and the max pool unless asked for.
"""

import functools

import flax.linen as nn

from sam_jax.models import layers

# Name -> blocks of each group, and whether they are bottlenecks.
SIZES = {
    'resnet10': ((1, 1, 1, 1), False),
    'resnet18': ((2, 2, 2, 2), False),
    'resnet34': ((3, 4, 6, 3), False),
    'resnet50': ((3, 4, 6, 3), True),
    'resnet101': ((3, 4, 23, 3), True),
    'resnet152': ((3, 8, 36, 3), True),
    'resnet200': ((3, 24, 36, 3), True),
}


class ResNet(layers.Network, kw_only=True):
    """ResNet v1 with a 7x7 stem of stride 2 and a max pool.

    Attributes:
      blocks: number of blocks of each group.
      bottleneck: blocks of 1x1, 3x3, 1x1 convolutions, the last four times as wide; else of two
        3x3 convolutions.
      width: channels of the stem and of the first group.
      stem_relu: whether there is a ReLU in the stem.
    """

    blocks: tuple
    bottleneck: bool
    width: int = 64
    stem_relu: bool = False

    kernel_init = staticmethod(nn.initializers.lecun_normal())
    head_init = staticmethod(nn.initializers.lecun_normal())

    def _block(self, x, channels, stride, train, name):
        # Of each convolution: channels, kernel, stride.
        convs = (
            [(channels, 1, 1), (channels, 3, stride), (4 * channels, 1, 1)]
            if self.bottleneck
            else [(channels, 3, stride), (channels, 3, 1)]
        )
        y = x
        for i, (width, kernel, step) in enumerate(convs, 1):
            y = self.conv(y, width, kernel, step, f'{name}_conv{i}')
            last = i == len(convs)
            y = self.norm(
                y,
                train,
                f'{name}_bn{i}',
                scale_init=(nn.initializers.zeros if last else nn.initializers.ones),
            )
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            x = self.conv(x, y.shape[-1], 1, stride, f'{name}_conv_shortcut')
            x = self.norm(x, train, f'{name}_bn_shortcut')
        return nn.relu(x + y)

    @nn.compact
    def __call__(self, images, train=False):
        x = self.conv(
            images.astype(self.dtype), self.width, 7, 2, 'conv_init', padding=[(3, 3), (3, 3)]
        )
        x = self.norm(x, train, 'bn_init')
        if self.stem_relu:
            x = nn.relu(x)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
        for group, blocks in enumerate(self.blocks):
            for block in range(blocks):
                x = self.run_block(
                    functools.partial(
                        ResNet._block,
                        channels=self.width * 2**group,
                        stride=2 if block == 0 and group > 0 else 1,
                        train=train,
                        name=f'group{group}_block{block}',
                    ),
                    x,
                )
        return self.head(self.pool(x))
