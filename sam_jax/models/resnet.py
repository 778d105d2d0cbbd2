"""ResNet v1 for ImageNet (He et al., CVPR 2016) as in the SAM paper's code.

The stride of a bottleneck is on its 3x3 convolution, the last BatchNorm of each block starts at
scale 0, shortcuts are projected where the shape changes. Like there, and unlike He's, the stem has
no ReLU between its BatchNorm and the max pool unless asked for.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

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
            last = i == len(convs)
            y = self.conv_norm(
                y,
                width,
                kernel,
                step,
                train,
                (f'{name}_conv{i}', f'{name}_bn{i}'),
                scale_init=(nn.initializers.zeros if last else nn.initializers.ones),
            )
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            names = f'{name}_conv_shortcut', f'{name}_bn_shortcut'
            x = self.conv_norm(x, y.shape[-1], 1, stride, train, names)
        return nn.relu(x + y)

    def _stem(self, images, train):
        """max_pool(norm(conv(images))), pooled before it is normalised: a fourth of the pixels.

        A growing function and a maximum can change places. So that BatchNorm grows, a channel whose
        scale is negative changes its sign in the kernel.
        """
        norm = self.folded_norm(self.width, 'bn_init')
        sign = jnp.where(norm.scale < 0, -1, 1)
        kernel = self.kernel((7, 7, images.shape[-1], self.width), 'conv_init')
        x = layers.convolve(images, kernel * sign[None, None, None], 2, [(3, 3), (3, 3)])
        moments = self.moments(x, train)
        vectors = sign, *norm(moments and (sign * moments[0], moments[1]))
        sign, mean, factor, bias = (v[None, None, None] for v in vectors)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
        x = ((sign * x - mean) * factor + bias).astype(self.dtype)
        return nn.relu(x) if self.stem_relu else x

    @nn.compact
    def __call__(self, images, train=False):
        x = self._stem(images.astype(self.dtype), train)
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
