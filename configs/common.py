"""What the configs share: arguments, the choice of model and method, sizes to see that it runs."""

import ml_collections

from sam_jax.settings import schema
from sam_jax.settings.schema import set_method, set_model

__all__ = [
    'TABLE_7',
    'finish',
    'get_config',
    'given',
    'one_of',
    'only_with',
    'parse_arg',
    'rho',
    'set_adamw',
    'set_method',
    'set_model',
    'table_7',
]


def parse_arg(arg, **defaults):
    """Parses a config's string argument, 'name=value,name=value'.

    Values take the type of their default; of bool they are true or false, and the name alone is
    true. Every config has the argument `smoke`, see `finish`. Raises ValueError for an unknown name
    or a bad value.
    """
    values = dict(defaults, smoke=False)
    for name, equals, text in _items(arg):
        if name not in values:
            raise ValueError(
                f'unknown config argument {name!r}; the arguments are {", ".join(values)}.'
            )
        kind = type(values[name])
        if kind is bool and not equals:
            text = 'true'
        try:
            values[name] = {'true': True, 'false': False}[text] if kind is bool else kind(text)
        except (ValueError, KeyError) as e:
            raise ValueError(
                f'config argument {name} is {text!r}; it must be of type {kind.__name__}.'
            ) from e
    return ml_collections.ConfigDict(values)


def _items(arg):
    return [item.partition('=') for item in (arg or '').split(',') if item]


def given(arg):
    """Returns the names in a config's string argument."""
    return {name for name, _, _ in _items(arg)}


def finish(c, arg):
    """Returns the config locked; made tiny first if its argument `smoke` was given.

    Smoke changes sizes only: the model's, the batch's, the image's and the number of epochs, with
    what lies in them: milestones, warm-ups, the epochs in which a method remembers. What is
    computed stays: method, augmentation, optimizer, groups of one or of all replicas.
    """
    if arg.smoke:
        _shrink(c)
    return c.lock()


def _shrink(c):
    tiny = schema.tiny_model(c.model.name)
    if c.model.name.endswith('_shakedrop'):
        tiny += '_shakedrop'
    c.model.name = tiny
    if 'alpha' in c.model:
        c.model.alpha = 4.0
    replicas = min(2, c.batch_size // c.replica_batch_size)
    c.replica_batch_size = min(2, c.replica_batch_size)
    c.batch_size = c.eval.batch_size = replicas * c.replica_batch_size
    c.sam.replicas_per_group = min(replicas, c.sam.replicas_per_group)
    if c.data.image_size:
        c.data.image_size = 64
    c.total_epochs = 1
    if 'start_epoch' in c.sam:  # SAF and MESA learn from epochs before
        c.total_epochs, c.sam.start_epoch = 2, 0
    if 'epochs_ago' in c.sam:
        c.sam.epochs_ago = 1
    c.optimizer.warmup_steps = min(1, c.optimizer.warmup_steps)
    for section in (c.optimizer, c.sam):
        section.warmup_epochs = min(1.0, section.warmup_epochs)
    if c.optimizer.milestones:
        c.optimizer.milestones = (1,)
    c.checkpoint.keep_epochs = tuple(e for e in c.checkpoint.keep_epochs if e == 1)


def one_of(name, value, known):
    """Raises ValueError if the config argument `name` is not among the known values."""
    if value not in known:
        raise ValueError(
            f'config argument {name} is {value!r}; it must be one of {", ".join(map(str, known))}.'
        )


def only_with(name, names, holds, wanted):
    """Raises ValueError if the argument is among the given names, but not what it is read with."""
    if name in names and not holds:
        raise ValueError(f'config argument {name} is given; it is only read with {wanted}.')


def rho(arg, default):
    """Returns the argument rho, or the default where it is -1: not given."""
    if arg.rho == -1:
        return default
    if not arg.rho >= 0:  # nor NaN
        raise ValueError(f'config argument rho is {arg.rho}; it must be at least 0.')
    return arg.rho


def set_adamw(c, learning_rate, weight_decay):
    """Chooses Adam with decoupled decay of kernels alone, as Vision Transformers are trained."""
    c.optimizer.name = 'adamw'
    c.optimizer.learning_rate = learning_rate
    c.optimizer.weight_decay = weight_decay
    c.optimizer.decay_norm_and_bias = False
    c.optimizer.momentum, c.optimizer.decay = 0.9, 0.999
    c.optimizer.epsilon = 1e-8
    c.optimizer.nesterov = False
    c.optimizer.clip_norm = 1.0


def get_config():
    """Returns the settings that all experiments start from; what they mean: settings/schema.py."""
    return schema.default_config()


# The arguments of `table_7`; the empty ones are the first model, its rho, and basic augmentation.
TABLE_7 = {'model': '', 'augment': '', 'method': 'sam', 'rho': -1.0, 'doubled': False, 'seed': 0}


def table_7(arg, dataset, table, epochs):
    """Returns the config of a row of the paper's Table 7, not finished.

    Args:
      arg: what `parse_arg` returns for TABLE_7.
      dataset: `data.name`.
      table: model -> (learning rate, weight decay, rho).
      epochs: how long to train.
    """
    model = arg.model or next(iter(table))
    one_of('model', model, tuple(table))
    c = get_config()
    c.seed = arg.seed
    c.total_epochs = epochs * (2 if arg.doubled else 1)
    set_model(c, model)
    c.data.name = dataset
    c.data.augment = arg.augment or 'basic'
    c.optimizer.learning_rate, c.optimizer.weight_decay, own_rho = table[model]
    set_method(c, arg.method)
    c.sam.rho = rho(arg, own_rho)
    return c
