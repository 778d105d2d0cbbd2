"""The model zoo. `create_model('wrn28_10', num_classes=10)` returns a flax module."""

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sam_jax import convolutions
from sam_jax.errors import UserError
from sam_jax.models import clip, efficientnet, layers, resnet, vgg, vit
from sam_jax.models.cifar_resnet import CifarResNet
from sam_jax.models.efficientnet import EfficientNet
from sam_jax.models.lenet import LeNet
from sam_jax.models.prompts import Prompts
from sam_jax.models.pyramidnet import PyramidNet
from sam_jax.models.resnet import ResNet
from sam_jax.models.shake_shake import ShakeShake
from sam_jax.models.small_resnet import SmallResNet
from sam_jax.models.vgg import VGG
from sam_jax.models.vit import ViT
from sam_jax.models.wide_resnet import WideResNet
from sam_jax.replicas import AXIS

convolutions.install()


class Family(NamedTuple):
    """A family of models: all that is to be known of it, in one place.

    Attributes:
      cls: its class.
      pattern: regular expression of its names.
      sizes: the groups of the pattern -> {argument of the class: value} that a name fixes.
      names: some of its names, for messages and documents.
      tiny: its smallest name, that of `smoke` configs.
      options: {argument of the class: what it means}, a key `model.OPTION` each, whose default and
        type are those of the class.
      defaults: the groups of the pattern -> defaults that are not the class's.
    """

    cls: type[layers.Network]
    pattern: str
    sizes: Callable[..., dict[str, Any]]
    names: tuple[str, ...]
    tiny: str
    options: dict[str, str] = {}
    defaults: Callable[..., dict[str, Any]] = lambda *groups: {}


def _depth_and_width(depth, width):
    return {'depth': int(depth), 'width': int(width)}


def _pyramidnet(depth, shakedrop):
    return {'depth': int(depth), 'shakedrop': bool(shakedrop)}


def _resnet(name):
    blocks, bottleneck = resnet.SIZES[name]
    return {'blocks': blocks, 'bottleneck': bottleneck}


def _small_resnet(kind, name):
    return {**_resnet(name), 'preactivation': kind == 'preact'}


def _vgg(depth, batch_norm):
    return {'convolutions': vgg.SIZES[int(depth)], 'batch_norm': bool(batch_norm)}


def _vit(size, patch):
    return {**vit.SIZES[size]._asdict(), 'patch': int(patch)}


def _clip(size, patch):
    return {'size': clip.SIZES[size], 'patch': int(patch)}


def _efficientnet(size):
    s = efficientnet.SIZES[size]
    stages = efficientnet.TINY_STAGES if size == 'tiny' else efficientnet.STAGES
    return {'width': s.width, 'depth': s.depth, 'stages': stages}


_BATCH_NORM = 'without it convolutions have biases'

# The first whose pattern matches counts: resnet50 is of ImageNet although 50 is 6n + 2.
FAMILIES = {
    'wrn': Family(
        WideResNet,
        r'wrn([0-9]{1,4})_([0-9]{1,4})',
        _depth_and_width,
        ('wrn28_10', 'wrn40_10', 'wrn16_4', 'wrn<depth>_<width>'),
        'wrn10_1',
        {
            'dropout_rate': "within the blocks, as Zagoruyko's",
            'batch_norm': _BATCH_NORM,
            'extra_skips': "AutoAugment's additional shortcuts",
        },
    ),
    'shake_shake': Family(
        ShakeShake,
        r'shake_shake_([0-9]{1,4})_2x([0-9]{1,4})d',
        _depth_and_width,
        ('shake_shake_26_2x96d', 'shake_shake_<depth>_2x<width>d'),
        'shake_shake_8_2x4d',
    ),
    'pyramidnet': Family(
        PyramidNet,
        r'pyramidnet([0-9]{1,4})(_shakedrop)?',
        _pyramidnet,
        ('pyramidnet272', 'pyramidnet272_shakedrop', 'pyramidnet<depth>[_shakedrop]'),
        'pyramidnet11',
        {'alpha': 'channels that are added from first to last block'},
    ),
    'imagenet_resnet': Family(
        ResNet, f'({"|".join(resnet.SIZES)})', _resnet, tuple(resnet.SIZES), 'resnet10'
    ),
    'resnet': Family(
        CifarResNet,
        r'resnet([0-9]{1,4})',
        lambda depth: {'depth': int(depth)},
        ('resnet32', 'resnet56', 'resnet110', 'resnet<6n+2> (for CIFAR)'),
        'resnet8',
        {'residual': 'its shortcuts', 'batch_norm': _BATCH_NORM},
    ),
    'lenet': Family(LeNet, 'lenet5', dict, ('lenet5',), 'lenet5'),
    'small_resnet': Family(
        SmallResNet,
        f'(cifar|preact)_({"|".join(resnet.SIZES)})',
        _small_resnet,
        ('cifar_resnet18', 'preact_resnet18', '<cifar or preact>_resnet<18, 34, 50, 101 or 152>'),
        'cifar_resnet10',
    ),
    'vgg': Family(
        VGG,
        f'vgg({"|".join(map(str, vgg.SIZES))})(_bn)?',
        _vgg,
        ('vgg16_bn', 'vgg<11, 13, 16 or 19>[_bn]'),
        'vgg6_bn',
    ),
    'efficientnet': Family(
        EfficientNet,
        f'efficientnet-({"|".join(efficientnet.SIZES)})',
        _efficientnet,
        tuple(f'efficientnet-{size}' for size in efficientnet.SIZES),
        'efficientnet-tiny',
        {
            'dropout_rate': 'share of activations that is dropped, before the head; in the '
            'original 0.3 for B2 and B3, 0.4 for B4 and B5, else 0.5',
            'stochastic_depth_rate': 'share of images for which the last block is left out',
        },
        lambda size: {'dropout_rate': efficientnet.SIZES[size].dropout_rate},
    ),
    'vit': Family(
        ViT,
        rf'vit-({"|".join(vit.SIZES)})([0-9]{{1,4}})',
        _vit,
        ('vit-ti16', 'vit-s16', 'vit-b16', 'vit-l16', 'vit-<size><patch>'),
        'vit-tiny4',
        {
            'class_token': 'the head reads a class token, not the mean over the patches',
            'positions': '`learned`, or `sincos2d`',
            'exact_gelu': "as timm and transformers; otherwise big_vision's approximation by tanh",
            'dropout_rate': 'of positions, perceptrons, and of what each branch adds',
            'stochastic_depth_rate': 'share of images for which the last block is left out',
        },
    ),
    'clip': Family(
        Prompts,
        rf'clip-({"|".join(clip.SIZES)})([0-9]{{1,4}})',
        _clip,
        ('clip-b16', 'clip-b32', 'clip-l14', 'clip-<size><patch> (prompt learning)'),
        'clip-tiny4',
        {
            'context': 'learned vectors in front of the name of a class',
            'words': 'what they say at the start, as many tokens; empty for random vectors',
            'exact_gelu': "as LAION's; otherwise x sigmoid(1.702 x), as OpenAI's",
        },
    ),
}

# Names that stand for their family in messages and documents.
NAMES = tuple(name for family in FAMILIES.values() for name in family.names)


def family_of(name: str) -> Family | None:
    """Returns the family of a model's name, or None: there is no such model."""
    return next(
        (family for family in FAMILIES.values() if re.fullmatch(family.pattern, name)), None
    )


def create_model(name: str, num_classes: int, **options) -> layers.Network:
    """Returns the flax module `name` with a head of `num_classes` outputs.

    Called as `module.init(rngs, images, train=False)` and
    `module.apply(variables, images, train=..., mutable=..., rngs=...)` with images (N, H, W, C),
    rng names 'params', 'dropout' and 'shake', collections 'params', 'batch_stats' and, of those
    with `frozen`, 'frozen'. Returns logits (N, num_classes) in at least float32. The calls of
    Shake-Shake and PyramidNet also take `true_gradient`, see `models.shake`.

    Args:
      name: see NAMES.
      num_classes: size of the head.
      **options: keyword arguments of the family's class, e.g. `dropout_rate=0.3`; those of
        `layers.Network` are for all families.

    Raises:
      UserError: no such model, or impossible sizes.
      TypeError: an option that the family does not have; the message lists those it has.
    """
    for family in FAMILIES.values():
        match = re.fullmatch(family.pattern, name)
        if match:
            sizes = family.sizes(*match.groups())
            _check_options(name, family.cls, sizes, options)
            return family.cls(
                num_classes=num_classes, **sizes, **{**family.defaults(*match.groups()), **options}
            )
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
            f"config.model: {e} To change the family use the config's argument, model=NAME."
        ) from e


def _check_options(name, cls, sizes, options):
    known = [
        p
        for p in inspect.signature(cls).parameters
        if p not in ('num_classes', 'parent', 'name', *sizes)
    ]
    for option in options:
        if option not in known:
            raise TypeError(f'{name} has no option {option!r}; its options are {", ".join(known)}.')
