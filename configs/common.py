"""Every setting of a training run with its default: the paper's CIFAR settings."""

import ml_collections

from sam_jax import sharpness


def parse_arg(arg, **defaults):
    """Parses a config's string argument, 'name=value,name=value'.

    Values take the type of their default; of bool they are true or false, and the name alone is
    true. Every config has the argument `smoke`, see `finish`. Raises ValueError for an unknown name
    or a bad value.
    """
    values = dict(defaults, smoke=False)
    for item in filter(None, (arg or '').split(',')):
        name, equals, text = item.partition('=')
        if name not in values:
            raise ValueError(
                f'unknown config argument {name!r}; the arguments are {", ".join(values)}.')
        kind = type(values[name])
        if kind is bool and not equals:
            text = 'true'
        try:
            values[name] = {'true': True, 'false': False}[text] if kind is bool else kind(text)
        except (ValueError, KeyError) as e:
            raise ValueError(
                f'config argument {name} is {text!r}; it must be of type {kind.__name__}.') from e
    return ml_collections.ConfigDict(values)


# Options of the families of models, by the beginning of the name, with their defaults.
MODEL_OPTIONS = {
    'wrn': {
        'dropout_rate': 0.0,
        'batch_norm': True,
        'extra_skips': False,  # AutoAugment's additional shortcuts
    },
    'shake_shake': {},
    'pyramidnet': {'alpha': 200.0},
    'resnet': {},
    'efficientnet': {
        'dropout_rate': 0.2,  # in the original 0.3 for B2 and B3, 0.4 for B4 and B5, else 0.5
        'stochastic_depth_rate': 0.2,
    },
}
CIFAR_RESNET_OPTIONS = {'residual': True, 'batch_norm': True}
IMAGENET_RESNETS = (
    'resnet10', 'resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnet200')


def set_model(c, name):
    """Chooses a model and declares its options, `config.model.*`."""
    c.model.name = name
    family = next((f for f in MODEL_OPTIONS if name.startswith(f)), '')
    options = MODEL_OPTIONS.get(family, {})
    if family == 'resnet' and name not in IMAGENET_RESNETS:
        options = CIFAR_RESNET_OPTIONS
    for option, default in options.items():
        c.model[option] = default


def set_method(c, name):
    """Chooses a sharpness-aware method and declares its options, `config.sam.*`.

    What they mean stands in the docstring of the method, sam_jax.sharpness.NAME.

    Three methods also decide on other sections: bSAM is an optimizer with a prior of its own, MESA
    learns from the moving average, and Momentum-SAM has no second look-ahead.
    """
    c.sam.method = name
    if name in sharpness.METHODS:  # of another the checks say that there is none
        for option, default in sharpness.options(name).items():
            c.sam[option] = default
    if name == 'bsam':
        c.optimizer.momentum = c.optimizer.weight_decay = c.optimizer.clip_norm = 0.0
    if name in ('bsam', 'momentum_sam'):
        c.optimizer.nesterov = False
    if name == 'mesa':
        c.ema.decay = 0.9998


# The tiny model of each family, by the beginning of the name.
_TINY = {
    'wrn': 'wrn10_1', 'shake_shake': 'shake_shake_8_2x4d', 'pyramidnet': 'pyramidnet11',
    'efficientnet': 'efficientnet-tiny', 'resnet': 'resnet8'}


def finish(c, arg):
    """Returns the config locked; made tiny first if its argument `smoke` was given.

    Smoke changes sizes only: the model's, the batch's, the image's and the number of epochs. What
    is computed stays: method, augmentation, optimizer, groups of one or of all replicas.
    """
    if arg.smoke:
        _shrink(c)
    return c.lock()


def _shrink(c):
    tiny = next(tiny for family, tiny in _TINY.items() if c.model.name.startswith(family))
    if c.model.name in IMAGENET_RESNETS:
        tiny = 'resnet10'
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
    c.checkpoint.keep_epochs = tuple(e for e in c.checkpoint.keep_epochs if e == 1)


def one_of(name, value, known):
    """Raises ValueError if the config argument `name` is not among the known values."""
    if value not in known:
        raise ValueError(
            f'config argument {name} is {value!r}; it must be one of '
            f'{", ".join(map(str, known))}.')


def get_config():
    """Returns the settings that all experiments start from."""
    c = ml_collections.ConfigDict()
    c.seed = 0  # decides init, order, augmentation, dropout and which labels are noisy
    c.total_epochs = 200
    c.batch_size = 256  # global
    c.replica_batch_size = 32  # examples that share BatchNorm statistics and, by default, an ascent
    c.replica_loop = 'auto'  # several replicas on a device: 'unroll', or 'scan' as does 'auto'
    c.label_smoothing = 0.0
    c.log_every_steps = 100

    c.model = ml_collections.ConfigDict()
    c.model.name = ''
    c.model.dtype = 'float32'  # of the computation: 'float32', 'bfloat16', 'float64'
    c.model.init_from = ''  # file or folder of weights to start from; '' for random ones
    c.model.frozen_batch_norm = False  # normalise by the running statistics and leave them alone
    c.model.sync_batch_norm = False  # statistics over all replicas, one a device
    c.model.remat = False  # compute activations anew in the backward pass: less memory, slower

    c.data = ml_collections.ConfigDict()
    c.data.name = 'cifar10'
    c.data.dir = ''  # where TFDS datasets lie; '' for TFDS's own default
    c.data.augment = 'basic'  # flip and shift crop; the other recipes: sam_jax/data/augment.py
    c.data.padding = 4  # pixels of the shift crop
    c.data.cutout_size = 16  # side of the square that 'cutout' empties
    c.data.cutout_per_image = False  # True: a place for each image; False: one for the batch
    c.data.corrected_ops = False  # AutoAugment and RandAugment without the original's quirks
    c.data.randaugment_layers = 2
    c.data.randaugment_magnitude = 9
    c.data.mixup_alpha = 0.0  # mix pairs of examples, weight from Beta(alpha, alpha); 0 for never
    c.data.cutmix_alpha = 0.0  # exchange boxes between pairs of examples; 0 for never
    c.data.mix_per_image = False  # a weight for each image in place of one for the batch
    c.data.image_size = 0  # side of the network's input; 0 for that of the dataset
    c.data.skip_corrupt = False  # pass over images that cannot be decoded
    c.data.threads = 0  # that read and decode images; 0 for one a core
    c.data.validation = False  # hold out the last tenth of the training set and evaluate on it too
    c.data.label_noise = 0.0  # fraction of training labels that get another one
    c.data.label_noise_kind = 'uniform'  # over all classes; 'other': over the others; 'pair': next
    c.data.label_noise_seed = 0  # decides which, whatever the run's seed
    c.data.labels_from = ''  # file of `python -m sam_jax.predict`: train on its predictions
    c.data.soft_labels = False  # on its probabilities and not on the likeliest class

    c.sam = ml_collections.ConfigDict()
    c.sam.method = 'sam'  # a name of sam_jax.sharpness.METHODS; 'sgd' for none
    c.sam.rho = 0.05
    c.sam.p = 2.0
    c.sam.replicas_per_group = 1  # m = replica_batch_size * replicas_per_group
    c.sam.schedule = 'constant'  # of rho; 'cosine', 'exponential', or 'learning_rate': its share
    c.sam.rho_min = 0.0  # rho at learning rate 0, with schedule 'learning_rate'
    c.sam.warmup_epochs = 0.0  # of rho, linear

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.name = 'sgd'  # or 'rmsprop', 'adam'
    c.optimizer.learning_rate = 0.1
    c.optimizer.schedule = 'cosine'  # 'constant', 'cosine', 'exponential'
    c.optimizer.warmup_epochs = 0.0  # linear
    c.optimizer.momentum = 0.9
    c.optimizer.nesterov = True
    c.optimizer.decay = 0.9  # of the average of squares of rmsprop and adam (there often 0.999)
    c.optimizer.epsilon = 1e-3  # rmsprop's inside of the root, adam's outside (there often 1e-8)
    c.optimizer.weight_decay = 5e-4  # 0.5 * weight_decay * sum w^2 is part of the loss
    c.optimizer.decay_norm_and_bias = True  # False: only parameters of two or more axes
    c.optimizer.clip_norm = 5.0  # global norm of the mean gradient; 0 for no clipping

    c.ema = ml_collections.ConfigDict()
    c.ema.decay = 0.0  # 0 for no moving average of params and statistics
    c.ema.warmup_steps = 0

    c.eval = ml_collections.ConfigDict()
    c.eval.every_epochs = 1
    c.eval.batch_size = 512
    c.eval.top5 = False
    c.eval.train_set = False  # evaluate on the training set too, without augmentation

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every_minutes = 10.0  # 0 for never
    c.checkpoint.every_epochs = 0  # 0 for never
    c.checkpoint.keep_epochs = ()  # checkpoints after these epochs are never deleted

    c.analysis = ml_collections.ConfigDict()
    c.analysis.every_epochs = 0  # how flat the minimum is, during training; 0 for never
    c.analysis.examples = 1000  # of the training set, on which it is measured
    c.analysis.steps = 20  # products of Lanczos
    c.analysis.rho = 0.05  # of the ball whose sharpness is measured, whatever sam.rho is
    return c


def table_7(arg, dataset, table, epochs):
    """Returns the config of a row of the paper's Table 7.

    Args:
      arg: the config's string argument.
      dataset: `data.name`.
      table: model -> (learning rate, weight decay, rho).
      epochs: how long to train.
    """
    arg = parse_arg(arg, model='wrn28_10', augment='basic', method='sam', rho=-1.0, doubled=False,
                    seed=0)
    one_of('model', arg.model, tuple(table))
    c = get_config()
    c.seed = arg.seed
    c.total_epochs = epochs * (2 if arg.doubled else 1)
    set_model(c, arg.model)
    c.data.name = dataset
    c.data.augment = arg.augment
    c.optimizer.learning_rate, c.optimizer.weight_decay, rho = table[arg.model]
    set_method(c, arg.method)
    c.sam.rho = arg.rho if arg.rho >= 0 else rho
    return finish(c, arg)
