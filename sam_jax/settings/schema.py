"""Every setting of a run: its default, type, range and meaning, each in one place.

`default_config()` is made of KEYS, and so are the checks and the reference page of the settings.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple, TypeAlias

import ml_collections
import numpy as np

from sam_jax import data, losses, models, optimizers, replicas, schedules, sharpness
from sam_jax.errors import UserError

# A locked ConfigDict. No checker of types knows its keys; `check` does.
Config: TypeAlias = Any

DTYPES = ('float32', 'bfloat16', 'float64')

# What a program holds of numbers, the least of fractions first: of others it makes 0 or infinity.
WHOLE = 2**31 - 1
FRACTIONS = 2.0**-126, float(np.finfo(np.float32).max)


class Key(NamedTuple):
    """A setting.

    Attributes:
      default: its value where nothing is said; its type is that of the setting.
      meaning: a few words, as the reference page has them.
      low, high: the least and the greatest value, or None.
      below: whether the greatest value itself is not allowed.
      choices: the values that it may have; () for any.
    """

    default: Any
    meaning: str
    low: float | None = None
    high: float | None = None
    below: bool = False
    choices: Collection[str] = ()

    @property
    def kind(self) -> type:
        """The type of its values."""
        return type(self.default)

    def why_not(self, value: Any) -> str | None:
        """Returns what is wrong with a value, 'it must be ...', or None.

        A float may be given as an int32; a bool is no number. A program holds every number.
        """
        accepted = (int, float) if self.kind is float else self.kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.kind is not bool):
            return f'it must be of type {self.kind.__name__}.'
        if self.choices and value not in self.choices:
            return f'it must be one of {", ".join(self.choices)}.'
        if self.kind is float and 0 < abs(value) < math.inf:
            if not FRACTIONS[0] <= abs(value) <= FRACTIONS[1]:
                return (
                    f'it must be 0, or of a size from {FRACTIONS[0]:.2g} to {FRACTIONS[1]:.2g}, '
                    'as float32 holds.'
                )
            if isinstance(value, int) and abs(value) > WHOLE:
                return f'a whole number must be at most {WHOLE}; write {float(value):g}.'
        if self.kind is int and self.high is None and abs(value) > WHOLE:
            return f'it must be at most {WHOLE}, as int32 holds.'
        if self.low is not None:
            high = math.inf if self.high is None else self.high
            # Neither NaN nor infinity is a setting.
            if not (self.low <= value < high or (value == high < math.inf and not self.below)):
                return f'it must be at least {self.low:g}{self._upper()}.'
        return None

    def check(self, key: str, value: Any) -> None:
        """Checks a value of the key of that name.

        Raises:
          UserError: it is of another type, or not allowed.
        """
        why_not = self.why_not(value)
        if why_not:
            raise UserError(f'{key} is {value!r}; {why_not}')

    def _upper(self):
        if self.high is None:
            return ''
        return f' and {"below" if self.below else "at most"} {self.high:.10g}'

    @property
    def allowed(self) -> str:
        """What its values may be, as the reference page says it."""
        if self.choices:
            return ', '.join(f'`{choice}`' for choice in self.choices)
        return '' if self.low is None else f'at least {self.low:g}{self._upper()}'


def _positive(default, meaning):
    return Key(default, meaning, 1)


def _amount(default, meaning):
    return Key(default, meaning, 0)


def _share(default, meaning, below=True):
    return Key(default, meaning, 0, 1, below)


def _seed(meaning):
    return Key(0, meaning, 0, 2**32 - 1)


# The keys that every config has. Further ones under `model` are options of the model's family, and
# under `sam` of the method.
KEYS = {
    'seed': _seed('decides init, order, augmentation and dropout'),
    'total_epochs': _positive(200, 'how long to train'),
    'batch_size': _positive(256, 'examples of a step, over all devices'),
    'replica_batch_size': _positive(
        32, 'examples that share BatchNorm statistics and, by default, an ascent'
    ),
    'replica_loop': Key(
        'auto',
        'several replicas on a device: `unroll`, or `scan` as does `auto`',
        choices=('auto', 'unroll', 'scan'),
    ),
    'replica_backend': Key(
        'pmap',
        'what runs a step on all devices: `pmap`, or `shard_map` under `jit`; same numbers',
        choices=replicas.BACKENDS,
    ),
    'loss': Key(
        'softmax',
        'cross entropy of `softmax`, or of a `sigmoid` for each class',
        choices=tuple(losses.LOSSES),
    ),
    'label_smoothing': _share(0.0, 'share of the label that all classes have alike'),
    'log_every_steps': _positive(100, 'steps between two lines of the log'),
    'model.name': Key('', 'a name of `sam_jax.models.NAMES`'),
    'model.dtype': Key(
        'float32', 'of the computation; params stay float32 (float64: all of it)', choices=DTYPES
    ),
    'model.init_from': Key('', 'file or folder of weights to start from; empty for random ones'),
    'model.frozen_batch_norm': Key(
        False, 'normalise by the running statistics and leave them alone'
    ),
    'model.sync_batch_norm': Key(False, 'statistics over all replicas, one a device'),
    'model.head_bias': Key(0.0, "the head's bias at the start"),
    'model.remat': Key(False, 'compute activations anew in the backward pass: less memory, slower'),
    'data.name': Key('cifar10', 'the dataset', choices=data.NAMES),
    'data.dir': Key('', 'where the dataset lies; empty for the default of TensorFlow Datasets'),
    'data.augment': Key('basic', 'the recipe of augmentation', choices=tuple(data.RECIPES)),
    'data.padding': _amount(4, 'pixels of the shift crop'),
    'data.cutout_size': _positive(16, 'side of the square that `cutout` empties'),
    'data.cutout_per_image': Key(False, 'a place for each image, not one for the batch'),
    'data.cutout_probability': _share(
        1.0, 'chance of a square: of each image, or of the batch', below=False
    ),
    'data.corrected_ops': Key(False, "AutoAugment and RandAugment without the original's quirks"),
    'data.randaugment_layers': _positive(2, 'operations on an image'),
    'data.randaugment_magnitude': _amount(9, 'their level'),
    'data.mixup_alpha': _amount(
        0.0, 'mix pairs of examples, weight from Beta(alpha, alpha); 0 for never'
    ),
    'data.cutmix_alpha': _amount(0.0, 'exchange boxes between pairs of examples; 0 for never'),
    'data.mix_per_image': Key(False, 'a weight for each image in place of one for the batch'),
    'data.image_size': Key(0, "side of the network's input; 0 for that of the dataset", 0, 2**14),
    'data.skip_corrupt': Key(False, 'pass over images that cannot be decoded'),
    'data.threads': _amount(0, 'that read and decode images; 0 for one a core'),
    'data.validation': Key(
        False, 'hold out the last tenth of the training set and evaluate on it too'
    ),
    'data.fraction': Key(
        1.0,
        'share of the training set (without the held-out part) to train on, of each class alike',
        1e-6,
        1,
    ),
    'data.shots': _amount(0, 'training examples of each class; 0 for all'),
    'data.base_to_new': Key(
        False,
        'train on the first half of the classes, and evaluate the others by their names: `new/`',
    ),
    'data.normalization': Key(
        'dataset',
        "mean and deviation: the `dataset`'s, or those of `clip`",
        choices=('dataset', 'clip'),
    ),
    'data.fraction_seed': _seed(
        "decides which examples these and the shots are, whatever the run's seed"
    ),
    'data.label_noise': _share(
        0.0, 'fraction of training labels that get another one', below=False
    ),
    'data.label_noise_kind': Key(
        'uniform',
        '`uniform` over all classes, `other` ones, or the next (`pair`)',
        choices=tuple(data.LABEL_NOISE),
    ),
    'data.label_noise_seed': _seed("decides which labels are noisy, whatever the run's seed"),
    'data.labels_from': Key('', 'file of `sam-jax-predict`: train on its predictions'),
    'data.soft_labels': Key(False, 'on its probabilities and not on the likeliest class'),
    'sam.method': Key(
        'sam', 'the method; `sgd` for the optimizer alone', choices=sharpness.METHODS
    ),
    'sam.rho': _amount(0.05, 'radius of the perturbation'),
    'sam.p': Key(2.0, 'the norm that it is measured in: greater than 1, `inf` is allowed'),
    'sam.replicas_per_group': _positive(
        1, 'replicas that ascend together: m = `replica_batch_size` times this'
    ),
    'sam.schedule': Key(
        'constant',
        'of rho; `learning_rate`: in proportion to it',
        choices=(*schedules.OF_RHO, 'learning_rate'),
    ),
    'sam.rho_min': _amount(0.0, 'rho at learning rate 0, with schedule `learning_rate`'),
    'sam.warmup_epochs': _amount(0.0, 'of rho, linear'),
    'optimizer.name': Key('sgd', 'the base optimizer', choices=tuple(optimizers.OPTIMIZERS)),
    'optimizer.learning_rate': _amount(0.1, 'at its highest'),
    'optimizer.schedule': Key('cosine', 'of the learning rate', choices=tuple(schedules.SCHEDULES)),
    'optimizer.end': _share(
        0.0, 'where the schedule `linear` ends, as a share of the learning rate'
    ),
    'optimizer.milestones': Key(
        (), 'epochs after which the schedule `milestones` multiplies the learning rate'
    ),
    'optimizer.milestone_factor': _share(0.1, 'by which it does'),
    'optimizer.warmup_epochs': _amount(0.0, 'of the learning rate, linear'),
    'optimizer.warmup_steps': _amount(0, 'the same in steps; one of the two is 0'),
    'optimizer.schedule_after_warmup': Key(
        False, 'the schedule begins where the warm-up ends; otherwise both begin together'
    ),
    'optimizer.momentum': _share(
        0.9, 'of SGD, RMSProp and Muon, and of the mean of Adam, AdamW, LAMB and Lion'
    ),
    'optimizer.nesterov': Key(True, "Nesterov's momentum"),
    'optimizer.decay': _share(
        0.9,
        'of the average of squares of RMSProp and Adam (there often 0.999); of the mean of Lion',
    ),
    'optimizer.epsilon': _amount(
        1e-3, "RMSProp's inside of the root, Adam's outside (there often 1e-8)"
    ),
    'optimizer.weight_decay': _amount(
        5e-4,
        '0.5 `weight_decay` times the sum of squares is part of the loss; with `adamw`, `lamb`, '
        '`lion` and `muon` it is none, and `weight_decay` times the params is part of the step',
    ),
    'optimizer.decay_norm_and_bias': Key(
        True, 'otherwise only parameters of two or more axes, and no positions of patches'
    ),
    'optimizer.clip_norm': _amount(5.0, 'global norm of the mean gradient; 0 for no clipping'),
    'ema.decay': _share(0.0, 'of the moving average of params and statistics; 0 for none'),
    'ema.warmup_steps': _amount(0, 'steps before it begins'),
    'eval.every_epochs': _amount(1, 'epochs between evaluations; 0 for the last one alone'),
    'eval.batch_size': _positive(512, 'examples evaluated at once, over all devices'),
    'eval.top5': Key(False, 'top-5 errors too'),
    'eval.train_set': Key(False, 'evaluate on the training set too, without augmentation'),
    'checkpoint.every_minutes': _amount(10.0, 'minutes between checkpoints; 0 for never'),
    'checkpoint.every_epochs': _amount(0, 'epochs between checkpoints; 0 for never'),
    'checkpoint.keep_epochs': Key((), 'checkpoints after these epochs are never deleted'),
    'analysis.every_epochs': _amount(
        0, 'epochs between measurements of how flat the minimum is; 0 for never'
    ),
    'analysis.examples': _positive(1000, 'of the training set, on which it is measured'),
    'analysis.steps': Key(20, 'products of Lanczos', 5),
    'analysis.rho': _amount(0.05, 'of the ball whose sharpness is measured, whatever `sam.rho` is'),
}


# Keys that came later; without them the defaults were computed.
ADDED = (
    'replica_backend',
    'loss',
    'model.head_bias',
    'analysis.every_epochs',
    'analysis.examples',
    'analysis.steps',
    'analysis.rho',
    'data.fraction',
    'data.fraction_seed',
    'data.shots',
    'data.base_to_new',
    'data.normalization',
    'data.cutout_probability',
    'optimizer.end',
    'optimizer.milestones',
    'optimizer.milestone_factor',
    'optimizer.warmup_steps',
    'optimizer.schedule_after_warmup',
)


def completed(flat: dict[str, Any]) -> dict[str, Any]:
    """Returns the flat settings of a run, as JSON has them, with keys that came after it.

    A number that is not finite, such as p = inf, stands there as text and is a number here.
    """
    added = {key: KEYS[key].default for key in ADDED}
    keys = keys_of(flat.get('model.name'), flat.get('sam.method'))
    texts = [k for k, v in flat.items() if v in ('inf', '-inf', 'nan') and k in keys]
    return {
        **{k: list(v) if isinstance(v, tuple) else v for k, v in added.items()},
        **flat,
        **{k: float(flat[k]) for k in texts if keys[k].kind is float},
    }


def _options(family):
    """{option: Key} of a family; their defaults are those of its class."""
    return {
        option: Key(family.cls.__dataclass_fields__[option].default, meaning)
        for option, meaning in family.options.items()
    }


# Options of the models, by family.
MODEL_OPTIONS = {name: _options(family) for name, family in models.FAMILIES.items()}


def model_options(name: str) -> dict[str, Key]:
    """Returns {option: Key} of a model, of which `config.model` has one each."""
    family = models.family_of(name)
    return _options(family) if family else {}


def keys_of(model: Any, method: Any) -> dict[str, Key]:
    """Returns {'section.key': Key} of a run of a model and a method; of unknown ones, `KEYS`."""
    found = dict(KEYS)
    if isinstance(model, str):
        found |= {f'model.{name}': key for name, key in model_options(model).items()}
    if method in sharpness.METHODS:
        found |= {f'sam.{k}': Key(v, '') for k, v in sharpness.options(method).items()}
    return found


def tiny_model(name: str) -> str:
    """Returns the smallest model of a model's family; an unknown name as it is."""
    family = models.family_of(name)
    return family.tiny if family else name


def default_config() -> Config:
    """Returns the settings that all experiments start from, unlocked: the paper's on CIFAR."""
    config: Config = ml_collections.ConfigDict()
    for key, described in KEYS.items():
        section, _, name = key.rpartition('.')
        if section and section not in config:
            config[section] = ml_collections.ConfigDict()
        (config[section] if section else config)[name] = described.default
    return config


def set_model(config: Config, name: str) -> None:
    """Chooses a model and declares its options, `config.model.*`."""
    config.model.name = name
    for option, described in model_options(name).items():
        config.model[option] = described.default


def set_method(config: Config, name: str) -> None:
    """Chooses a sharpness-aware method and declares its options, `config.sam.*`.

    What they mean stands in the docstring of the method, sam_jax.sharpness.NAME.

    Three methods also decide on other sections: bSAM is an optimizer with a prior of its own, MESA
    learns from the moving average, and Momentum-SAM has no second look-ahead.
    """
    config.sam.method = name
    if name in sharpness.METHODS:  # of another the checks say that there is none
        for option, default in sharpness.options(name).items():
            config.sam[option] = default
    if name == 'bsam':
        config.optimizer.momentum = config.optimizer.weight_decay = config.optimizer.clip_norm = 0.0
    if name in ('bsam', 'momentum_sam'):
        config.optimizer.nesterov = False
    if name == 'mesa':
        config.ema.decay = 0.9998
