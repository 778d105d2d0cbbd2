"""WideResNet (Zagoruyko and Komodakis, BMVC 2016) as in the SAM paper's code.

Identity shortcuts, average-pooled and padded with zero channels where the shape changes;
pre-activation blocks, the very first of which also sends its activated input down the shortcut.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam_jax.errors import UserError

BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5

# Kaiming normal, fan-out, gain 2: not truncated.
conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def dense_init(key, shape, dtype=jnp.float32):
    """U[-1, 1] / sqrt(number of outputs)."""
    return jax.random.uniform(key, shape, dtype, -1.0) * shape[1] ** -0.5


def add_shortcut(x, shortcut):
    """Returns x + shortcut, the latter average-pooled and padded with zero channels to fit."""
    if x.shape[-1] != shortcut.shape[-1]:
        stride = shortcut.shape[-2] // x.shape[-2]
        shortcut = nn.avg_pool(shortcut, (stride, stride), strides=(stride, stride))
        # Not jnp.pad and +: XLA of jax 0.12 fuses that into NaN on CPU in bfloat16.
        return jnp.asarray(x).at[..., :shortcut.shape[-1]].add(shortcut)
    return x + shortcut


class WideResNet(nn.Module):
    """WideResNet of depth 6n + 4 with n blocks a group and 16, 32, 64 times `width` channels.

    Attributes:
      num_classes: size of the head.
      depth: 6n + 4: 10, 16, 22, 28, 40, ...
      width: channel multiplier, >= 1.
      dropout_rate: after the first activation of each block's second convolution (Zagoruyko); 0 in
        the SAM paper.
      batch_norm: False leaves out BatchNorm (SAM paper, Figure 3); convolutions get biases.
      extra_skips: AutoAugment's additional shortcuts around each group and around all groups.
      dtype: dtype of the computation; params and logits stay in `param_dtype`.
      param_dtype: dtype of params.
    """

    num_classes: int
    depth: int
    width: int
    dropout_rate: float = 0.0
    batch_norm: bool = True
    extra_skips: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        if self.depth < 10 or (self.depth - 4) % 6 or self.width < 1:
            raise UserError(
                f'A WideResNet of depth {self.depth} and width {self.width} does not exist: '
                'the depth is 6n + 4 (10, 16, 22, 28, 34, 40, ...) and the width at least 1.')
        if not 0 <= self.dropout_rate < 1:
            raise UserError(
                f'model.dropout_rate is {self.dropout_rate}; it must be at least 0 and below 1.')
        super().__post_init__()

    def _conv(self, x, channels, stride, name):
        return nn.Conv(
            channels, (3, 3), (stride, stride), padding='SAME', use_bias=not self.batch_norm,
            kernel_init=conv_init, dtype=self.dtype, param_dtype=self.param_dtype, name=name)(x)

    def _activate(self, x, train, name):
        if self.batch_norm:
            x = nn.BatchNorm(
                use_running_average=not train, momentum=BATCH_NORM_MOMENTUM,
                epsilon=BATCH_NORM_EPSILON, dtype=self.dtype, param_dtype=self.param_dtype,
                name=name)(x)
        return nn.relu(x)

    def _block(self, x, channels, stride, activate_before_shortcut, train, name):
        activated = self._activate(x, train, f'{name}_bn1')
        shortcut = activated if activate_before_shortcut else x
        x = self._conv(activated, channels, stride, f'{name}_conv1')
        x = self._activate(x, train, f'{name}_bn2')
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = self._conv(x, channels, 1, f'{name}_conv2')
        return add_shortcut(x, shortcut)

    @nn.compact
    def __call__(self, images, train=False):
        images = images.astype(self.dtype)
        x = self._conv(images, 16, 1, 'conv_init')
        for group, stride in enumerate((1, 2, 2)):
            group_input = x
            for block in range((self.depth - 4) // 6):
                first = block == 0
                x = self._block(
                    x, 16 * self.width * 2 ** group, stride if first else 1,
                    activate_before_shortcut=first and group == 0, train=train,
                    name=f'group{group}_block{block}')
            if self.extra_skips:
                x = add_shortcut(x, group_input)
        if self.extra_skips:
            x = add_shortcut(x, images)
        x = self._activate(x, train, 'bn_final')
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return nn.Dense(
            self.num_classes, kernel_init=dense_init, dtype=x.dtype,
            param_dtype=self.param_dtype, name='head')(x)
