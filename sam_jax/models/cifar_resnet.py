"""ResNet for 32x32 images (He et al., CVPR 2016, section 4.2): the SAM paper's label-noise runs."""

import functools

import flax.linen as nn

from sam_jax.errors import UserError
from sam_jax.models import layers


class CifarResNet(layers.Network, kw_only=True):
    """ResNet of depth 6n + 2: n blocks of two convolutions with 16, 32 and 64 channels.

    Shortcuts are He's option A: identity, subsampled and padded with zero channels where the shape
    changes.

    Attributes:
      depth: 6n + 2: 8, 14, 20, 32, 44, 56, 110, ...
      residual: False leaves out the shortcuts (SAM paper, Figure 1).
      batch_norm: False leaves out BatchNorm; convolutions get biases.
    """

    depth: int
    residual: bool = True
    batch_norm: bool = True

    def __post_init__(self):
        if self.depth < 8 or (self.depth - 2) % 6:
            raise UserError(
                f'A ResNet for CIFAR of depth {self.depth} does not exist: the depth '
                'is 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...).'
            )
        super().__post_init__()

    def _conv_norm(self, x, channels, stride, train, name, part):
        x = self.conv(x, channels, 3, stride, f'{name}conv{part}', use_bias=not self.batch_norm)
        return self.norm(x, train, f'{name}bn{part}') if self.batch_norm else x

    def _block(self, x, channels, stride, train, name):
        y = nn.relu(self._conv_norm(x, channels, stride, train, name, 1))
        y = self._conv_norm(y, channels, 1, train, name, 2)
        if self.residual:
            y = layers.add_shortcut(y, x[:, ::stride, ::stride])
        return nn.relu(y)

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(self._conv_norm(images.astype(self.dtype), 16, 1, train, '', '_init'))
        for group, stride in enumerate((1, 2, 2)):
            for block in range((self.depth - 2) // 6):
                x = self.run_block(
                    functools.partial(
                        CifarResNet._block,
                        channels=16 * 2**group,
                        stride=stride if block == 0 else 1,
                        train=train,
                        name=f'group{group}_block{block}_',
                    ),
                    x,
                )
        return self.head(self.pool(x))
