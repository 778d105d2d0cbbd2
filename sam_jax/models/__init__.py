"""The model zoo. `create_model('wrn28_10', num_classes=10)` returns a flax module."""

import inspect
import re

from sam_jax.errors import UserError
from sam_jax.models.wide_resnet import WideResNet

# Pattern of the name -> function from the match's groups to (class, sizes). Sizes are data.
_FAMILIES = {
    r'wrn(\d+)_(\d+)': lambda depth, width: (
        WideResNet, {'depth': int(depth), 'width': int(width)}),
}

# Names that stand for their family in messages and documents.
NAMES = ('wrn28_10', 'wrn40_10', 'wrn40_2', 'wrn16_8', 'wrn16_4', 'wrn10_2', 'wrn<depth>_<width>')


def create_model(name, num_classes, **options):
    """Returns the flax module `name` with a head of `num_classes` outputs.

    Called as `module.init(rngs, images, train=False)` and
    `module.apply(variables, images, train=..., mutable=..., rngs=...)` with images (N, H, W, C),
    rng names 'params' and 'dropout', collections 'params' and 'batch_stats'. Returns logits
    (N, num_classes) in at least float32.

    Args:
      name: see NAMES; WideResNets of any depth 6n + 4 and any width, e.g. 'wrn16_4'.
      num_classes: size of the head.
      **options: keyword arguments of the family's class, e.g. `dropout_rate=0.3`.

    Raises:
      UserError: no such model, or impossible sizes.
      TypeError: an option that the family does not have; the message lists those it has.
    """
    for pattern, family in _FAMILIES.items():
        match = re.fullmatch(pattern, name)
        if match:
            cls, sizes = family(*match.groups())
            _check_options(name, cls, sizes, options)
            return cls(num_classes=num_classes, **sizes, **options)
    raise UserError(f'model.name is {name!r}; the models are {", ".join(NAMES)}.')


def _check_options(name, cls, sizes, options):
    known = [p for p in inspect.signature(cls).parameters
             if p not in ('num_classes', 'parent', 'name', *sizes)]
    for option in options:
        if option not in known:
            raise TypeError(f'{name} has no option {option!r}; its options are {", ".join(known)}.')
