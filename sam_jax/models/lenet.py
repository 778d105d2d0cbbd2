"""LeNet-5 (LeCun et al., Proceedings of the IEEE 1998, section II.B): small, and quick on a CPU."""

import flax.linen as nn
import jax.numpy as jnp

from sam_jax.errors import UserError
from sam_jax.models import layers


class LeNet(layers.Network, kw_only=True):
    """Two convolutions, each with a mean over 2x2 pixels, and three dense layers; no BatchNorm.

    On one channel of 28x28 pixels it has 61,706 params. As it is built today: ReLU in place of the
    scaled tanh, every map of the second convolution sees all of the first, and a linear head.
    """

    @nn.compact
    def __call__(self, images, train=False):
        if min(images.shape[1:3]) < 12:
            raise UserError(
                f'A LeNet takes images of at least 12x12 pixels, not of {images.shape[1]}x'
                f'{images.shape[2]}; take a model.name of another family.'
            )
        x = self._conv_pool(images.astype(self.dtype), 6, 'conv1', 'SAME')
        x = self._conv_pool(x, 16, 'conv2', 'VALID')
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((120, 84), 1):
            dense = nn.Dense(
                width,
                kernel_init=self.head_init,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f'dense{i}',
            )
            x = nn.relu(dense(x))
        return self.head(x.astype(jnp.promote_types(self.dtype, jnp.float32)))

    def _conv_pool(self, x, channels, name, padding):
        x = nn.relu(self.conv(x, channels, 5, 1, name, padding=padding, use_bias=True))
        return nn.avg_pool(x, (2, 2), strides=(2, 2))
