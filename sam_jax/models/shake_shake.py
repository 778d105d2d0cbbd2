"""Shake-Shake (Gastaldi 2017) as in the SAM paper's code: two branches, mixed at random."""

import functools

import flax.linen as nn
import jax.numpy as jnp

from sam_jax.errors import UserError
from sam_jax.models import layers, shake


class ShakeShake(layers.Network, kw_only=True):
    """Shake-Shake of depth 6n + 2 with n blocks a group and 1, 2, 4 times `width` channels.

    "26 2x96d" is depth 26 and width 96. In training each image's branches are mixed with a random
    coefficient (rng 'shake'), in evaluation half and half.

    Attributes:
      depth: 6n + 2: 8, 14, 20, 26, ...
      width: channels of the first group, even.
    """

    depth: int
    width: int

    def __post_init__(self):
        if self.depth < 8 or (self.depth - 2) % 6 or self.width < 2 or self.width % 2:
            raise UserError(
                f'A Shake-Shake network of depth {self.depth} and width {self.width} does not '
                'exist: the depth is 6n + 2 (8, 14, 20, 26, ...) and the width even.'
            )
        super().__post_init__()

    def _branch(self, x, channels, stride, train, name, branch):
        x = self.conv(nn.relu(x), channels, 3, stride, f'{name}_conv_{branch}1')
        x = nn.relu(self.norm(x, train, f'{name}_bn_{branch}1'))
        x = self.conv(x, channels, 3, 1, f'{name}_conv_{branch}2')
        return self.norm(x, train, f'{name}_bn_{branch}2')

    def _shortcut(self, x, channels, stride, train, name):
        """Two paths, one of them moved by a pixel, where the shape changes; else the identity."""
        if x.shape[-1] == channels:
            return x
        moved = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 1:, 1:]
        paths = [
            self.conv(path[:, ::stride, ::stride], channels // 2, 1, 1, f'{name}_conv_shortcut{i}')
            for i, path in ((1, x), (2, moved))
        ]
        return self.norm(jnp.concatenate(paths, axis=-1), train, f'{name}_bn_shortcut')

    def _block(self, x, channels, stride, train, true_gradient, name):
        a, b = (self._branch(x, channels, stride, train, name, branch) for branch in 'ab')
        if train:
            mixed = shake.random_shake_shake(a, b, self.make_rng('shake'), true_gradient)
        else:
            mixed = (a + b) / 2
        return self._shortcut(x, channels, stride, train, name) + mixed

    @nn.compact
    def __call__(self, images, train=False, true_gradient=False):
        """With `true_gradient` one coefficient serves for value and gradient, see `shake`."""
        x = self.conv(images.astype(self.dtype), 16, 3, 1, 'conv_init')
        x = self.norm(x, train, 'bn_init')
        for group, stride in enumerate((1, 2, 2)):
            for block in range((self.depth - 2) // 6):
                x = self.run_block(
                    functools.partial(
                        ShakeShake._block,
                        channels=self.width * 2**group,
                        stride=stride if block == 0 else 1,
                        train=train,
                        true_gradient=true_gradient,
                        name=f'group{group}_block{block}',
                    ),
                    x,
                )
        return self.head(self.pool(nn.relu(x)))
