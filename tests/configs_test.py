"""The configs: that they load, say what the paper says, and hold settings only."""

import ast
import dataclasses
import importlib
import re
import sys
import types

import jax
import pytest
from helpers import ROOT

from configs import common, relatives
from sam_jax import models, replicas, settings
from sam_jax.errors import UserError
from sam_jax.models import layers
from sam_jax.settings import schema, shipped

CONFIGS = {p.stem: p for p in (ROOT / 'configs').glob('*.py')}
ARGUMENTS = {
    'digits': {
        'method=sgd,noise=0.4,rho=0.1,seed=3': {
            'sam.method': 'sgd',
            'data.label_noise': 0.4,
            'sam.rho': 0.1,
            'seed': 3,
            'data.name': 'digits',
        }
    },
    'svhn': {
        'model=shake_shake_26_2x96d,augment=autoaugment_only_cutout,rho=0': {
            'model.name': 'shake_shake_26_2x96d',
            'sam.rho': 0.0,
            'data.name': 'svhn',
        }
    },
    'fashion_mnist': {
        'method=sgd,noise=0.4,fraction=0.1,seed=3': {
            'model.name': 'wrn28_10',
            'sam.method': 'sgd',
            'data.label_noise': 0.4,
            'data.label_noise_seed': 3,
            'data.fraction': 0.1,
            'data.fraction_seed': 3,
        },
        'small,epochs=3,doubled,mixup=8': {'total_epochs': 6, 'data.mixup_alpha': 8.0},
        'tiny,noise=0.4': {
            'model.name': 'lenet5',
            'data.augment': 'none',
            'data.fraction': 0.1,
            'total_epochs': 30,
        },
        'tiny,augment=basic,fraction=0.2': {'data.augment': 'basic', 'data.fraction': 0.2},
        'small,rho=0.1': {'model.name': 'wrn10_1', 'sam.rho': 0.1, 'replica_batch_size': 32},
    },
    'imagenet': {
        'model=resnet152,epochs=400,augment=imagenet_randaugment': {
            'model.name': 'resnet152',
            'total_epochs': 400,
            'optimizer.name': 'sgd',
        },
        'model=vit-s32,recipe=augmented,epochs=300,rho=0.1': {
            'model.positions': 'sincos2d',
            'total_epochs': 300,
            'sam.rho': 0.1,
        },
    },
    'relatives': {
        'model=vit-b32': {'sam.method': 'gsam', 'sam.rho': 0.6, 'data.name': 'imagenet'},
        'paper=asam,dataset=cifar100': {'model.name': 'wrn28_10', 'sam.rho': 1.0, 'sam.eta': 0.0},
        'paper=sam_on,rho=5': {'sam.method': 'asam', 'sam.adapt': 'norm_only', 'sam.rho': 5.0},
        'paper=universal,method=det_sam,noise=0.2,fraction=0.1,seed=3': {
            'sam.h': 0.01,
            'data.label_noise': 0.2,
            'data.label_noise_kind': 'other',
            'data.fraction': 0.1,
            'data.label_noise_seed': 3,
        },
        'paper=sassha,model=wrn28_10,method=sgd': {
            'optimizer.milestones': (60, 120, 160),
            'optimizer.weight_decay': 5e-4,
        },
    },
    'label_noise': {
        'noise=0.6,mixup=8,method=sgd,validation=true': {
            'data.label_noise': 0.6,
            'data.mixup_alpha': 8.0,
            'data.validation': True,
        },
        'noise=0.8,labels_from=x.npz': {
            'data.label_noise': 0.0,
            'data.labels_from': 'x.npz',
            'sam.rho': 0.05,
        },
    },
    'prompts': {
        'method=sgd,context=4,words=a photo of a,seed=3': {
            'model.name': 'clip-b16',
            'model.words': 'a photo of a',
            'data.fraction_seed': 3,
            'data.normalization': 'clip',
            'sam.method': 'sgd',
        },
        'small,shots=4,rho=0.2,epochs=3': {
            'model.name': 'clip-tiny14',
            'data.shots': 4,
            'sam.low': 0.5,
            'sam.up': 0.8,
            'sam.rho': 0.2,
            'total_epochs': 3,
        },
    },
    'ablations': {
        'figure=landscape,method=sgd': {'model.name': 'resnet56', 'model.residual': False},
        'figure=spectrum': {
            'model.name': 'wrn40_10',
            'model.batch_norm': False,
            'checkpoint.keep_epochs': (1, 50, 300),
            'total_epochs': 300,
        },
        'figure=m,m=1': {'replica_batch_size': 1, 'model.batch_norm': False},
        'figure=p_norm': {'sam.p': 2.0, 'model.name': 'wrn16_4'},
        'figure=random': {'sam.method': 'random_sam', 'sam.p': 2.0, 'model.name': 'wrn16_4'},
        'figure=order': {'sam.method': 'second_order_sam', 'model.name': 'wrn40_2'},
        'figure=order,method=sam': {'sam.method': 'sam', 'model.name': 'wrn40_2'},
        'figure=steps,steps=5,dataset=cifar100': {
            'sam.method': 'multistep_sam',
            'sam.steps': 5,
            'sam.rho': 0.1,
        },
        'figure=sync': {'sam.replicas_per_group': 8},
    },
    'cifar': {
        'model=wrn16_4,dataset=cifar100,augment=none,method=sgd,seed=1': {
            'model.name': 'wrn16_4',
            'data.name': 'cifar100',
            'data.augment': 'none',
            'sam.method': 'sgd',
            'sam.rho': 0.1,
            'seed': 1,
        },
        'model=wrn28_10,method=sgd,doubled=true': {'total_epochs': 400, 'sam.method': 'sgd'},
        'rho=0.05,dataset=cifar100': {'sam.rho': 0.05},
        'model=vit-ti4': {'optimizer.name': 'adamw', 'model.name': 'vit-ti4', 'sam.rho': 0.05},
        'model=wrn40_2': {'model.name': 'wrn40_2', 'data.name': 'cifar10', 'sam.rho': 0.05},
    },
}
LOADED = [
    (stem, argument, expected)
    for stem in CONFIGS
    if stem not in ('__init__', 'common')
    for argument, expected in [(None, {}), ('', {}), *ARGUMENTS.get(stem, {}).items()]
]


def test_common_has_the_known_keys():
    flat = settings.flatten(common.get_config())
    assert set(flat) == set(settings.KEYS)
    for key, described in settings.KEYS.items():
        assert flat[key] == described.default and type(flat[key]) is described.kind, key
    assert set(schema.ADDED) <= set(flat)


@pytest.mark.parametrize(
    'name',
    ['pyramidnet11_shakedrop', 'resnet50', *(family.tiny for family in models.FAMILIES.values())],
)
def test_configs_declare_the_options_of_a_family_with_their_defaults(name):
    config = common.get_config()
    common.set_model(config, name)
    model = models.from_config(config.model, 10)
    family = models.family_of(name)
    base = {f.name for f in dataclasses.fields(layers.Network)}
    sizes = set(family.sizes(*re.fullmatch(family.pattern, name).groups()))
    # Others are for tests and people who build models by hand.
    by_hand = {
        'imagenet_resnet': {'width', 'stem_relu'},
        'small_resnet': {'width'},
        'vgg': {'channels'},
    }.get(next(n for n, row in models.FAMILIES.items() if row is family), set())
    own = {
        f.name: getattr(model, f.name)
        for f in dataclasses.fields(model)
        if f.name not in base | sizes | by_hand
    }
    declared = {
        key: value for key, value in config.model.items() if f'model.{key}' not in settings.KEYS
    }
    assert declared == own, 'FAMILIES of sam_jax/models/__init__.py says the options of a model.'


@pytest.mark.parametrize('family', models.FAMILIES.values(), ids=models.FAMILIES)
def test_a_family_is_one_row(family):
    """Its names are its own, whatever another family's begin with, and smoke knows a small one."""
    for name in (family.tiny, *(name for name in family.names if '<' not in name)):
        assert models.family_of(name) is family
        assert schema.tiny_model(name) == family.tiny
        assert list(schema.model_options(name)) == list(family.options)


def test_smoke_of_an_unknown_model_leaves_the_name_to_the_checks():
    config = common.get_config()
    common.set_model(config, 'resnet_of_mine')
    config = common.finish(config, common.parse_arg('smoke'))
    with pytest.raises(UserError, match="model.name is 'resnet_of_mine'; the models are"):
        settings.check(config)


def test_a_checkout_has_its_own_configs(monkeypatch):
    """Whatever other checkout is installed editable, which finds `sam_jax.configs`."""
    monkeypatch.setitem(sys.modules, 'sam_jax.configs', types.ModuleType('sam_jax.configs'))
    shipped._package.cache_clear()
    try:
        assert shipped.folder() == str(ROOT / 'configs')
    finally:
        shipped._package.cache_clear()


@pytest.mark.parametrize('stem,argument,expected', LOADED)
def test_every_config_loads(stem, argument, expected):
    module = importlib.import_module(f'configs.{stem}')
    config = module.get_config() if argument is None else module.get_config(argument)
    assert config.is_locked
    settings.check(config)
    models.from_config(config.model, 10)
    assert importlib.import_module(f'configs.{stem}').__doc__.count('./scripts/train.sh')
    for n in (1, 8):
        replicas.make_layout(
            config.batch_size,
            config.replica_batch_size,
            config.sam.replicas_per_group,
            devices=jax.devices()[:n],
        )
    flat = settings.flatten(config)
    assert {key: flat[key] for key in expected} == expected


ROWS_OF_RELATIVES = [
    (f'paper={paper},model={model},dataset={dataset},method={method}', model, dataset, method)
    for paper, rows in relatives.PAPERS.items()
    for (model, dataset), (_, methods) in rows.items()
    for method in methods
]


def test_every_row_of_the_relatives_is_a_run():
    """Full and tiny: of a known model and dataset, with the plain SGD of PyTorch's users."""
    assert len({row[1:] for row in ROWS_OF_RELATIVES}) > 50
    for argument, model, dataset, method in ROWS_OF_RELATIVES:
        config = relatives.get_config(argument)
        settings.check(config)
        settings.check(relatives.get_config(f'{argument},smoke'))
        chosen = (config.model.name, config.data.name, config.sam.method)
        assert chosen == (model, dataset, method)
        nesterov = argument.startswith('paper=saf')
        assert config.optimizer.nesterov == nesterov, argument
        assert config.optimizer.clip_norm == ('vit' in model), argument
        paper = argument.partition(',')[0].removeprefix('paper=')
        # rho is the row's own, and never the default of all configs.
        own = relatives.PAPERS[paper][model, dataset][1][method]
        assert 'sam.rho' in own or method in ('sgd', 'saf', 'mesa'), argument


@pytest.mark.parametrize(
    'stem,argument,words',
    [
        ('digits', 'foo=1', ["'foo'", 'model, method, noise, rho, seed']),
        ('ablations', 'figure=9', ["figure is '9'", 'landscape, spectrum']),
        ('ablations', 'm=3', ['m is 3', '1, 4, 16, 64, 256']),
        ('svhn', 'model=resnet32', ["model is 'resnet32'", 'wrn28_10']),
        ('svhn', 'doubled=2', ["doubled is '2'", 'bool']),
        ('finetune', 'dataset=dogs', ["dataset is 'dogs'", 'aircraft']),
        ('finetune', 'model=resnet50', ["model is 'resnet50'", 'efficientnet-b7']),
        ('digits', 'noise=abc', ["noise is 'abc'", 'float']),
        ('digits', 'noise', ["noise is ''", 'float']),
        ('digits', 'seed=1.5', ["seed is '1.5'", 'int']),
        ('cifar', 'dataset=mnist', ["dataset is 'mnist'", 'cifar10, cifar100']),
        ('relatives', 'paper=sala', ["paper is 'sala'", 'gsam, asam', 'sassha']),
        (
            'relatives',
            'paper=esam,model=resnet56',
            ["model is 'resnet56'", 'cifar_resnet18, wrn28_10'],
        ),
        ('relatives', 'paper=fsam,dataset=cifar10', ["dataset is 'cifar10'", 'cifar100']),
        ('relatives', 'paper=fsam,method=sgd', ["method is 'sgd'", 'friendly_sam, sam']),
        ('ablations', 'figure=p_norm,m=1', ['m is given', 'figure=m']),
        ('ablations', 'figure=steps,method=sam,steps=1', ['steps is given', 'figure=steps']),
        ('ablations', 'figure=order,method=multistep_sam,steps=1', ['steps is given']),
        ('imagenet', 'recipe=plain', ['recipe is given', 'a Vision Transformer']),
        ('fashion_mnist', 'small,tiny', ['small and tiny', 'one of them']),
        *(
            (stem, f'rho={value}', [f'rho is {value}', 'at least 0'])
            for stem in (
                'ablations',
                'cifar',
                'fashion_mnist',
                'imagenet',
                'label_noise',
                'relatives',
            )
            for value in ('nan', '-0.5')
        ),
        ('imagenet', 'model=vit-s16,rho=-inf', ['rho is -inf']),
        ('cifar', 'modle=wrn16_4', ["'modle'", 'model, dataset, epochs, augment, method, rho']),
    ],
)
def test_bad_config_arguments(stem, argument, words):
    with pytest.raises(ValueError) as e:
        importlib.import_module(f'configs.{stem}').get_config(argument)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert str(e.value).endswith('.')


@pytest.mark.parametrize('stem', CONFIGS)
def test_configs_hold_settings_only(stem):
    imported = set()
    for node in ast.walk(ast.parse(CONFIGS[stem].read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f'{node.module}.{alias.name}' for alias in node.names}
    # The options of a method and their defaults stand beside its formula.
    assert imported <= {'ml_collections', 'configs.common'} | (
        {
            'sam_jax.settings.schema',
            'sam_jax.settings.schema.set_method',
            'sam_jax.settings.schema.set_model',
        }
        if stem == 'common'
        else set()
    )


# The paper's numbers, copied from it once more, and not from the configs.

# Tables 6 and 1: model, epochs: learning rate, weight decay, rho on CIFAR-10 and CIFAR-100.
CIFAR = [
    ('wrn28_10', 200, (0.1, 0.1), 0.0005, (0.05, 0.1)),
    ('wrn28_10', 1800, (0.05, 0.05), 0.001, (0.05, 0.1)),
    ('shake_shake_26_2x96d', 1800, (0.02, 0.02), 0.001, (0.02, 0.05)),
    ('pyramidnet272', 1800, (0.05, 0.05), 0.0005, (0.05, 0.2)),
    ('pyramidnet272_shakedrop', 1800, (0.02, 0.05), 0.0005, (0.05, 0.05)),
]

# Table 7: config, model: learning rate, weight decay, rho.
OTHERS = [
    ('svhn', 'wrn28_10', 0.01, 0.0005, 0.01),
    ('svhn', 'shake_shake_26_2x96d', 0.01, 0.0005, 0.01),
    ('fashion_mnist', 'wrn28_10', 0.1, 0.0005, 0.05),
    ('fashion_mnist', 'shake_shake_26_2x96d', 0.1, 0.0005, 0.02),
]


def _get(stem, argument=''):
    return importlib.import_module(f'configs.{stem}').get_config(argument)


def _assert_shared(config):
    """What appendix C.1 and the paper's code say of CIFAR, SVHN and Fashion-MNIST."""
    assert (config.batch_size, config.replica_batch_size) == (256, 256 // 8)
    assert config.sam.replicas_per_group == 1 and config.sam.p == 2
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.nesterov) == ('sgd', 0.9, True)
    assert (optimizer.schedule, optimizer.warmup_epochs, optimizer.clip_norm) == ('cosine', 0, 5)
    assert optimizer.decay_norm_and_bias and config.label_smoothing == 0


@pytest.mark.parametrize('model,epochs,learning_rates,weight_decay,rhos', CIFAR)
def test_table_6(model, epochs, learning_rates, weight_decay, rhos):
    for dataset, learning_rate, rho in zip(('cifar10', 'cifar100'), learning_rates, rhos):
        argument = f'model={model},dataset={dataset}'
        config = _get('cifar', argument + (f',epochs={epochs}' if model == 'wrn28_10' else ''))
        _assert_shared(config)
        assert (config.total_epochs, config.optimizer.learning_rate, config.sam.rho) == (
            epochs,
            learning_rate,
            rho,
        )
        assert config.optimizer.weight_decay == weight_decay
        assert (config.model.name, config.data.name) == (model, dataset)
        sgd = _get('cifar', f'{argument},epochs={epochs},method=sgd,doubled=true')
        assert (sgd.total_epochs, sgd.sam.method) == (2 * epochs, 'sgd')
        assert sgd.optimizer.learning_rate == learning_rate


@pytest.mark.parametrize('stem,model,learning_rate,weight_decay,rho', OTHERS)
def test_table_7(stem, model, learning_rate, weight_decay, rho):
    config = _get(stem, f'model={model}')
    _assert_shared(config)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay, config.sam.rho) == (
        learning_rate,
        weight_decay,
        rho,
    )
    assert (config.model.name, config.data.name) == (model, stem)


@pytest.mark.parametrize('depth', [50, 101, 152])
@pytest.mark.parametrize('epochs', [100, 200, 400])
def test_imagenet(depth, epochs):
    """Appendix C.1."""
    config = _get('imagenet', f'model=resnet{depth},epochs={epochs}')
    assert (config.batch_size, config.replica_batch_size) == (4096, 4096 // 32)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (1.0, 0.0001)
    assert (config.optimizer.momentum, config.optimizer.schedule) == (0.9, 'cosine')
    assert (config.label_smoothing, config.sam.rho, config.data.image_size) == (0.1, 0.05, 224)
    assert (config.total_epochs, config.data.augment) == (epochs, 'imagenet') and config.eval.top5


# Copied from big_vision's files, and not from the config.


def test_vision_transformers_by_gsam():
    """big_vision's vit_i1k_gsam_no_aug.py; its decay is a share of the weight, not of the rate."""
    c = _get('imagenet', 'model=vit-b32,method=gsam')
    assert (c.batch_size, c.total_epochs, c.model.class_token) == (4096, 300, False)
    assert (c.data.augment, c.data.mixup_alpha, c.data.image_size) == ('imagenet', 0, 224)
    o = c.optimizer
    assert (o.name, o.momentum, o.decay, o.epsilon) == ('adamw', 0.9, 0.999, 1e-8)
    assert (o.learning_rate, o.warmup_steps, o.schedule, o.end) == (0.003, 10_000, 'linear', 0.01)
    assert o.schedule_after_warmup and not o.nesterov and not o.decay_norm_and_bias
    assert o.clip_norm == 1 and o.learning_rate * o.weight_decay == pytest.approx(0.001)
    assert (c.loss, c.model.head_bias, c.label_smoothing) == ('sigmoid', -10.0, 0.0)
    assert (c.sam.alpha, c.sam.rho, c.sam.schedule) == (0.6, 0.6, 'learning_rate')
    for share, rho in [(1.0, 0.6), (0.01, 0.1)]:
        assert c.sam.rho_min + (0.6 - c.sam.rho_min) * share == pytest.approx(rho)


def test_vision_transformers_with_augmentation():
    """big_vision's vit_s16_i1k.py."""
    c = _get('imagenet', 'model=vit-s16,recipe=augmented,method=sgd')
    assert (c.batch_size, c.total_epochs, c.model.positions) == (1024, 90, 'sincos2d')
    assert (c.data.augment, c.data.mixup_alpha) == ('imagenet_randaugment', 0.2)
    assert (c.data.randaugment_layers, c.data.randaugment_magnitude) == (2, 10)
    o = c.optimizer
    assert (o.learning_rate, o.warmup_steps, o.schedule) == (0.001, 10_000, 'cosine')
    assert o.learning_rate * o.weight_decay == pytest.approx(0.0001)


def test_prompts():
    """The authors' vit_b16_ctxv1.yaml and base2new_train.sh of GCSCoOp."""
    c = _get('prompts', 'context=4,words=a photo of a')
    assert (c.batch_size, c.replica_batch_size, c.total_epochs) == (128, 128, 200)
    assert (c.data.shots, c.data.base_to_new, c.data.image_size) == (16, True, 224)
    o = c.optimizer
    assert (o.name, o.learning_rate, o.schedule, o.warmup_epochs) == ('sgd', 0.002, 'cosine', 1)
    assert (o.momentum, o.weight_decay, o.nesterov, o.clip_norm) == (0.9, 5e-4, False, 0)
    assert (c.sam.method, c.sam.rho) == ('gradient_constrained', 0.1)
    assert (c.sam.low, c.sam.up) == (0.5, 0.8)


# Appendix C.2: model: batch, cores, learning rate, steps, pixels.
FINETUNE = [
    ('efficientnet-b7', 1024, 64, 0.016, 5000, 600),
    ('efficientnet-l2-475', 512, 128, 0.008, 10000, 475),
]
SIZES = {
    'flowers': 1020 + 1020,
    'pets': 3680,
    'cars': 8144,
    'food101': 75750,
    'cifar10': 50000,
    'cifar100': 50000,
    'aircraft': 3334 + 3333,
    'birdsnap': 47386,
}


@pytest.mark.parametrize('model,batch_size,cores,learning_rate,steps,pixels', FINETUNE)
@pytest.mark.parametrize('dataset', SIZES)
def test_finetuning(dataset, model, batch_size, cores, learning_rate, steps, pixels):
    config = _get('finetune', f'dataset={dataset},model={model}')
    assert (config.batch_size, config.replica_batch_size) == (batch_size, batch_size // cores)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (learning_rate, 1e-5)
    assert (config.optimizer.momentum, config.optimizer.schedule) == (0.9, 'cosine')
    assert config.model.frozen_batch_norm and not config.model.sync_batch_norm
    assert config.data.image_size == pixels
    steps_per_epoch = SIZES[dataset] // batch_size
    assert steps <= config.total_epochs * steps_per_epoch < steps + steps_per_epoch
    assert 20 <= config.total_epochs // config.eval.every_epochs < 40
    assert config.data.augment == ('autoaugment' if 'cifar' in dataset else 'none')


@pytest.mark.parametrize('model', [row[0] for row in FINETUNE])
def test_finetuning_on_imagenet(model):
    config = _get('finetune', f'dataset=imagenet,model={model}')
    assert (config.total_epochs, config.optimizer.learning_rate, config.sam.rho) == (10, 0.1, 0.05)


@pytest.mark.parametrize('noise,rho', [(0.2, 0.1), (0.4, 0.1), (0.6, 0.1), (0.8, 0.05)])
def test_label_noise(noise, rho):
    """Section 3.3 and appendix C.1."""
    config = _get('label_noise', f'noise={noise}')
    _assert_shared(config)
    assert (config.model.name, config.total_epochs, config.sam.rho) == ('resnet32', 200, rho)
    assert (config.data.name, config.data.label_noise) == ('cifar10', noise)
