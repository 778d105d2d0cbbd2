"""The model zoo. `create_model('wrn28_10', num_classes=10)` returns a flax module."""

import inspect
import re
from typing import Any

import jax

from sam_jax import convolutions
from sam_jax.errors import UserError
from sam_jax.models import efficientnet, layers, resnet
from sam_jax.models.cifar_resnet import CifarResNet
from sam_jax.models.efficientnet import EfficientNet
from sam_jax.models.pyramidnet import PyramidNet
from sam_jax.models.resnet import ResNet
from sam_jax.models.shake_shake import ShakeShake
from sam_jax.models.wide_resnet import WideResNet
from sam_jax.replicas import AXIS

convolutions.install()


def _wide_resnet(depth, width):
    return WideResNet, {'depth': int(depth), 'width': int(width)}, {}


def _shake_shake(depth, width):
    return ShakeShake, {'depth': int(depth), 'width': int(width)}, {}


def _pyramidnet(depth, shakedrop):
    return PyramidNet, {'depth': int(depth), 'shakedrop': bool(shakedrop)}, {}


def _resnet(name):
    blocks, bottleneck = resnet.SIZES[name]
    return ResNet, {'blocks': blocks, 'bottleneck': bottleneck}, {}


def _cifar_resnet(depth):
    return CifarResNet, {'depth': int(depth)}, {}


def _efficientnet(size):
    s = efficientnet.SIZES[size]
    stages = efficientnet.TINY_STAGES if size == 'tiny' else efficientnet.STAGES
    return (EfficientNet, {'width': s.width, 'depth': s.depth, 'stages': stages},
            {'dropout_rate': s.dropout_rate})


# Pattern of the name -> function from the match's groups to (class, sizes, defaults of options).
# The first that matches counts: resnet50 is of ImageNet although 50 is 6n + 2.
_FAMILIES = {
    r'wrn(\d+)_(\d+)': _wide_resnet,
    r'shake_shake_(\d+)_2x(\d+)d': _shake_shake,
    r'pyramidnet(\d+)(_shakedrop)?': _pyramidnet,
    f'({"|".join(resnet.SIZES)})': _resnet,
    r'resnet(\d+)': _cifar_resnet,
    f'efficientnet-({"|".join(efficientnet.SIZES)})': _efficientnet,
}

# Names that stand for their family in messages and documents.
NAMES = (
    'wrn28_10', 'wrn40_10', 'wrn16_4', 'wrn<depth>_<width>',
    'shake_shake_26_2x96d', 'shake_shake_<depth>_2x<width>d',
    'pyramidnet272', 'pyramidnet272_shakedrop', 'pyramidnet<depth>[_shakedrop]',
    'resnet32', 'resnet56', 'resnet110', 'resnet<6n+2> (for CIFAR)',
    *resnet.SIZES, *(f'efficientnet-{size}' for size in efficientnet.SIZES))


def create_model(name: str, num_classes: int, **options) -> layers.Network:
    """Returns the flax module `name` with a head of `num_classes` outputs.

    Called as `module.init(rngs, images, train=False)` and
    `module.apply(variables, images, train=..., mutable=..., rngs=...)` with images (N, H, W, C),
    rng names 'params', 'dropout' and 'shake', collections 'params' and 'batch_stats'. Returns
    logits (N, num_classes) in at least float32. The calls of Shake-Shake and PyramidNet also take
    `true_gradient`, see `models.shake`.

    Args:
      name: see NAMES.
      num_classes: size of the head.
      **options: keyword arguments of the family's class, e.g. `dropout_rate=0.3`; those of
        `layers.Network` are for all families.

    Raises:
      UserError: no such model, or impossible sizes.
      TypeError: an option that the family does not have; the message lists those it has.
    """
    for pattern, family in _FAMILIES.items():
        match = re.fullmatch(pattern, name)
        if match:
            cls, sizes, defaults = family(*match.groups())
            _check_options(name, cls, sizes, options)
            return cls(num_classes=num_classes, **sizes, **{**defaults, **options})
    raise UserError(f'model.name is {name!r}; the models are {", ".join(NAMES)}.')


def from_config(settings: Any, num_classes: int) -> layers.Network:
    """Returns the model of `config.model`: its other keys are the family's options.

    Raises:
      UserError: unknown model, impossible sizes, or an option that the family does not have.
    """
    own = ('name', 'init_from', 'sync_batch_norm')
    options = {k: v for k, v in settings.items() if k not in own}
    if settings.sync_batch_norm:
        options['batch_norm_axis'] = AXIS
    if settings.dtype == 'float64':
        # To tell a bug from rounding; then params and statistics are float64 as well.
        if jax.dtypes.canonicalize_dtype(float).itemsize < 8:
            raise UserError('model.dtype is float64; that needs JAX_ENABLE_X64=1.')
        options['param_dtype'] = 'float64'
    try:
        return create_model(settings.name, num_classes, **options)
    except TypeError as e:
        raise UserError(
            f"config.model: {e} To change the family use the config's argument, model=NAME.") from e


def _check_options(name, cls, sizes, options):
    known = [p for p in inspect.signature(cls).parameters
             if p not in ('num_classes', 'parent', 'name', *sizes)]
    for option in options:
        if option not in known:
            raise TypeError(f'{name} has no option {option!r}; its options are {", ".join(known)}.')
