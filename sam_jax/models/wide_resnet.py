"""WideResNet (Zagoruyko and Komodakis, BMVC 2016) as in the SAM paper's code.

Identity shortcuts, average-pooled and padded with zero channels where the shape changes;
pre-activation blocks, the very first of which also sends its activated input down the shortcut.
"""

import functools

import flax.linen as nn

from sam_jax.errors import UserError
from sam_jax.models import layers


class WideResNet(layers.Network, kw_only=True):
    """WideResNet of depth 6n + 4 with n blocks a group and 16, 32, 64 times `width` channels.

    Attributes:
      depth: 6n + 4: 10, 16, 22, 28, 40, ...
      width: channel multiplier, >= 1.
      dropout_rate: after the first activation of each block's second convolution (Zagoruyko); 0 in
        the SAM paper.
      batch_norm: False leaves out BatchNorm (SAM paper, Figure 3); convolutions get biases.
      extra_skips: AutoAugment's additional shortcuts around each group and around all groups.
    """

    depth: int
    width: int
    dropout_rate: float = 0.0
    batch_norm: bool = True
    extra_skips: bool = False

    def __post_init__(self):
        if self.depth < 10 or (self.depth - 4) % 6 or self.width < 1:
            raise UserError(
                f'A WideResNet of depth {self.depth} and width {self.width} does not exist: '
                'the depth is 6n + 4 (10, 16, 22, 28, 34, 40, ...) and the width at least 1.'
            )
        layers.require_rate('dropout_rate', self.dropout_rate)
        super().__post_init__()

    def _conv(self, x, channels, stride, name):
        return self.conv(x, channels, 3, stride, name, use_bias=not self.batch_norm)

    def _activate(self, x, train, name):
        if self.batch_norm:
            x = self.norm(x, train, name)
        return nn.relu(x)

    def _block(self, x, channels, stride, activate_before_shortcut, train, name):
        activated = self._activate(x, train, f'{name}_bn1')
        shortcut = activated if activate_before_shortcut else x
        x = self._conv(activated, channels, stride, f'{name}_conv1')
        x = self._activate(x, train, f'{name}_bn2')
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = self._conv(x, channels, 1, f'{name}_conv2')
        return layers.add_shortcut(x, shortcut)

    @nn.compact
    def __call__(self, images, train=False):
        images = images.astype(self.dtype)
        x = self._conv(images, 16, 1, 'conv_init')
        for group, stride in enumerate((1, 2, 2)):
            group_input = x
            for block in range((self.depth - 4) // 6):
                first = block == 0
                x = self.run_block(
                    functools.partial(
                        WideResNet._block,
                        channels=16 * self.width * 2**group,
                        stride=stride if first else 1,
                        activate_before_shortcut=first and group == 0,
                        train=train,
                        name=f'group{group}_block{block}',
                    ),
                    x,
                )
            if self.extra_skips:
                x = layers.add_shortcut(x, group_input)
        if self.extra_skips:
            x = layers.add_shortcut(x, images)
        return self.head(self.pool(self._activate(x, train, 'bn_final')))
