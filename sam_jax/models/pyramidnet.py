"""PyramidNet (Han et al., CVPR 2017) with bottlenecks, plain and with ShakeDrop (Yamada et al.)."""

import functools

import flax.linen as nn

from sam_jax.errors import UserError
from sam_jax.models import layers, shake

MOST_CHANNELS = 10_000


class PyramidNet(layers.Network, kw_only=True):
    """PyramidNet of depth 9n + 2: n bottlenecks a group, their width growing by alpha in all.

    Block k of K (from 1) has round(16 + alpha k / K) channels, four times as many at its end:
    rounded and not truncated, as in the SAM paper's code. With ShakeDrop block k keeps its branch
    with probability 1 - k / (2K) in training (rng 'shake') and scales it by that in evaluation.

    Attributes:
      depth: 9n + 2: 11, 20, ..., 110, 272, ...
      alpha: channels added from the first block to the last, > 0 and at most MOST_CHANNELS.
      shakedrop: whether branches are dropped at random.
    """

    depth: int
    alpha: float = 200.0
    shakedrop: bool = False

    def __post_init__(self):
        if self.depth < 11 or (self.depth - 2) % 9:
            raise UserError(
                f'A PyramidNet of depth {self.depth} does not exist: the depth is '
                '9n + 2 (11, 20, ..., 110, ..., 272, ...).'
            )
        if not 0 < self.alpha <= MOST_CHANNELS:
            raise UserError(
                f'model.alpha is {self.alpha}; it must be positive and at most {MOST_CHANNELS}.'
            )
        super().__post_init__()

    def _block(self, x, channels, stride, keep_rate, train, true_gradient, name):
        y = self.norm(x, train, f'{name}_bn1')
        y = self.conv(y, channels, 1, 1, f'{name}_conv1')
        y = nn.relu(self.norm(y, train, f'{name}_bn2'))
        y = self.conv(y, channels, 3, stride, f'{name}_conv2')
        y = nn.relu(self.norm(y, train, f'{name}_bn3'))
        y = self.conv(y, 4 * channels, 1, 1, f'{name}_conv3')
        y = self.norm(y, train, f'{name}_bn4')
        if self.shakedrop and train:
            y = shake.random_shake_drop(y, self.make_rng('shake'), keep_rate, true_gradient)
        elif self.shakedrop:
            y = y * keep_rate  # the mean of a dropped branch's coefficient, U[-1, 1], is 0
        return layers.add_shortcut(y, x)

    @nn.compact
    def __call__(self, images, train=False, true_gradient=False):
        """With `true_gradient` one coefficient serves for value and gradient, see `shake`."""
        x = self.conv(images.astype(self.dtype), 16, 3, 1, 'conv_init')
        x = self.norm(x, train, 'bn_init')
        per_group = (self.depth - 2) // 9
        channels = 16.0
        for block in range(3 * per_group):
            channels += self.alpha / (3 * per_group)
            x = self.run_block(
                functools.partial(
                    PyramidNet._block,
                    channels=round(channels),
                    stride=2 if block in (per_group, 2 * per_group) else 1,
                    keep_rate=1 - 0.5 * (block + 1) / (3 * per_group),
                    train=train,
                    true_gradient=true_gradient,
                    name=f'block{block}',
                ),
                x,
            )
        return self.head(self.pool(nn.relu(self.norm(x, train, 'bn_final'))))
