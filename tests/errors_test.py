"""Bad input gets one sentence: field, value, what would be right; before anything compiles."""

import json
import math
import os
import subprocess
import sys
import types

import helpers
import jax
import ml_collections
import numpy as np
import pytest
from helpers import ROOT, lean_environment, small_config

from sam_jax import data, models, replicas, run_log, settings, train
from sam_jax.errors import NO_MEMORY, UserError, told
from sam_jax.experiment import Experiment


@pytest.fixture
def compilations():
    with helpers.compilations() as events:
        yield events


def test_compilations_are_seen(compilations):
    jax.jit(lambda x: x * 3 + 1)(np.float32(2))
    assert compilations


def _config(overrides):
    """The small config with {'section.key': any value}, known or not, of the right type or not."""
    c = small_config()
    with c.unlocked():
        for key, value in overrides.items():
            *sections, name = key.split('.')
            section = c
            for s in sections:
                if s not in section:
                    section[s] = ml_collections.ConfigDict()
                section = section[s]
            if name in section:
                del section[name]  # which forgets its type
            section[name] = value
    return c


def _assert_sentence(message, words):
    for word in words:
        assert word in message, message
    assert '\n' not in message and 'Traceback' not in message
    assert message.endswith(('.', '"'))  # the quote: of the command that prepares a dataset
    assert (
        message[0].isupper()
        or message.startswith(tuple(settings.KEYS))
        or (message.startswith(('workdir', '--', 'config', 'model.', 'sam.')))
    )


def _key(key):
    return key.rsplit('.', 1)[-1]


# Whole runs.


def test_patches_of_nothing_are_refused():
    for name in ('clip-tiny0', 'vit-tiny0'):
        with pytest.raises(UserError, match='with patches of 0 does not exist'):
            models.create_model(name, 10)


def test_too_many_channels_are_refused():
    with pytest.raises(UserError, match='model.alpha is inf; it must be positive and at most'):
        models.create_model('pyramidnet11', 10, alpha=math.inf)


def test_what_is_infinite_can_be_read_again(tmp_path):
    config = _config({'sam.method': 'le_sam', 'sam.sigma': math.inf, 'sam.p': 2.0})
    settings.check(config)
    run_log.write_json(str(tmp_path / 'config.json'), {'config': settings.jsonable(config)})
    read = settings.of_run(str(tmp_path))
    settings.check(read)
    assert read.sam.sigma == math.inf


SAF = {
    'sam.method': 'saf',
    'sam.lam': 0.3,
    'sam.tau': 5.0,
    'sam.start_epoch': 0,
    'sam.epochs_ago': 1,
}
BSAM = {
    'sam.method': 'bsam',
    'sam.prior_precision': 40.0,
    'sam.beta1': 0.9,
    'sam.beta2': 0.999,
    'sam.damping': 0.1,
    'sam.init_precision': 1.0,
    'optimizer.momentum': 0.0,
    'optimizer.nesterov': False,
    'optimizer.weight_decay': 0.0,
    'optimizer.clip_norm': 0.0,
    'sam.data_factor': 4.0,
}

BAD = [
    # Found by scripts/fuzz.py.
    ({'total_epochs': 2**30}, ['total_epochs is 1073741824', 'steps of 64 examples', '2147483647']),
    ({'sam.rho': 1e39}, ['sam.rho is 1e+39', 'of a size from 1.2e-38 to 3.4e+38']),
    ({'sam.rho': 10**400}, ['sam.rho is 1000', 'as float32 holds']),
    ({'optimizer.warmup_epochs': 1e-40}, ['warmup_epochs is 1e-40', 'must be 0, or of a size']),
    ({'sam.rho': 10**30}, ['sam.rho is 1000', 'write 1e+30']),
    ({'log_every_steps': 2**31}, ['log_every_steps is 2147483648', 'as int32 holds']),
    ({'data.image_size': 2**20}, ['data.image_size is 1048576', 'at most 16384']),
    ({'data.image_size': 7}, ['model.name is', 'images of 7x7x1', 'set data.image_size']),
    ({'model.name': 'wrn1000000000000_1'}, ["model.name is 'wrn10000000", *models.NAMES]),
    ({'model.name': 'vit-s' + 5000 * '9'}, ["model.name is 'vit-s999", *models.NAMES]),
    ({'batch_size': 60}, ['batch_size is 60', 'multiple of replica_batch_size, 64']),
    ({'batch_size': 96, 'replica_batch_size': 8}, ['12 replicas', '8 devices', 'batch_size 96']),
    (
        {'replica_batch_size': 8, 'sam.replicas_per_group': 3},
        ['sam.replicas_per_group is 3', 'divide the 8 replicas'],
    ),
    (
        {'batch_size': 2560, 'replica_batch_size': 320},
        ['batch_size is 2560', 'digits has only 1297 examples'],
    ),
    ({'sam.rho': -0.05}, ['sam.rho is -0.05', 'at least 0']),
    ({'sam.rho': math.nan}, ['sam.rho is nan', 'at least 0']),
    ({'sam.p': 1.0}, ['sam.p is 1.0', 'greater than 1']),
    ({'sam.p': 0.5}, ['sam.p is 0.5', 'greater than 1']),
    ({'sam.p': -2}, ['sam.p is -2', 'greater than 1']),
    ({'sam.p': math.nan}, ['sam.p is nan', 'greater than 1']),
    ({'sam.roh': 0.1}, ['Unknown config key sam.roh', 'did you mean sam.rho?']),
    ({'sam.method': 'mas'}, ["sam.method is 'mas'", 'one of', 'sam', 'sgd']),
    ({'sam.steps': 3}, ["setting sam.steps is not one of sam.method 'sam'", 'none', 'method=']),
    ({'sam.method': 'multistep_sam'}, ['lacks sam.steps', 'method=multistep_sam']),
    ({'sam.method': 'multistep_sam', 'sam.steps': 0, 'sam.step_size': 1.0}, ['steps is 0']),
    (
        {'sam.method': 'multistep_sam', 'sam.steps': 2.0, 'sam.step_size': 1.0},
        ['sam.steps is 2.0', 'of type int'],
    ),
    (
        {'sam.method': 'multistep_sam', 'sam.steps': 2, 'sam.step_size': 1.0, 'sam.p': 3.0},
        ['p is 3.0', '2 or inf'],
    ),
    ({'sam.method': 'second_order_sam', 'sam.p': math.inf}, ['p is inf', 'use method sam']),
    ({'sam.method': 'gnp', 'sam.alpha': 0.8, 'sam.p': math.inf}, ['sam.p is inf', 'gnp', '2.0']),
    (
        {'sam.method': 'looksam', 'sam.alpha': 0.7, 'sam.k': 0, 'sam.per_leaf': False},
        ['looksam', 'k is 0', 'at least 1'],
    ),
    ({'sam.method': 'asam', 'sam.eta': 0.01, 'sam.adapt': 'bias'}, ['adapt is', 'kernels']),
    ({'sam.rho_min': 0.1}, ['sam.rho_min is 0.1', 'learning_rate', "'constant'", 'set it to 0']),
    ({'sam.rho_min': 0.9, 'sam.schedule': 'learning_rate'}, ['sam.rho_min is 0.9', 'not exceed']),
    (
        {'sam.method': 'momentum_sam', 'optimizer.momentum': 0.0},
        ['momentum_sam', 'optimizer.momentum is 0', 'such as 0.9'],
    ),
    ({'sam.method': 'sam_on', 'model.batch_norm': False}, ['sam_on', 'no normalisation layer']),
    (
        {'sam.method': 'mesa', 'sam.lam': 0.8, 'sam.tau': 5.0, 'sam.start_epoch': 0},
        ['mesa', 'ema.decay is 0', 'such as 0.9998'],
    ),
    ({**SAF, 'sam.start_epoch': 1}, ['never adds its loss', 'sam.start_epoch is 1', 'most 0']),
    ({**SAF, 'sam.epochs_ago': 2}, ['never adds its loss', 'sam.epochs_ago is 2', 'most 1']),
    (
        {'sam.method': 'frob_sam', 'sam.lam': 0.1, 'sam.n': 2, 'sam.warmup_epochs': 1.0},
        ['frob_sam', 'sam.warmup_epochs is 1.0', 'rounding'],
    ),
    ({**SAF, 'data.mixup_alpha': 0.2}, ['saf', 'data.mixup_alpha is 0.2', 'must be 0']),
    ({**BSAM, 'optimizer.weight_decay': 5e-4}, ['bsam', 'weight_decay is 0.0005', 'be 0.0']),
    ({**BSAM, 'optimizer.name': 'adam'}, ['bsam', "optimizer.name is 'adam'", "be 'sgd'"]),
    ({'model.name': 'vgg17'}, ["model.name is 'vgg17'", *models.NAMES]),
    ({'model.name': 'wrn16'}, ["model.name is 'wrn16'", *models.NAMES]),
    ({'model.name': 'wrn11_1'}, ['depth 11', '6n + 4']),
    ({'model.name': 'wrn10_0'}, ['width 0', 'at least 1']),
    (
        {'model.dropuot_rate': 0.1},
        ['config.model', 'wrn10_1', "'dropuot_rate'", 'dropout_rate', 'batch_norm', 'extra_skips'],
    ),
    ({'model.depth': 16}, ['config.model', "'depth'"]),
    ({'model.dtype': 'float16'}, ["model.dtype is 'float16'", 'float32', 'bfloat16']),
    ({'data.name': 'mnist'}, ["data.name is 'mnist'", *data.SOURCES]),
    ({'data.augment': 'bassic'}, ["data.augment is 'bassic'", *data.RECIPES]),
    ({'data.augment': 'basic', 'data.padding': 8}, ['data.padding is 8', 'digits, 8x8']),
    ({'data.augment': 'imagenet'}, ["data.augment is 'imagenet'", 'digits', 'basic']),
    ({'data.name': 'folder'}, ['data.image_size is 0', 'folder', '224']),
    (
        {'data.name': 'folder', 'data.image_size': 8, 'data.dir': 'nowhere'},
        ["data.dir is 'nowhere'", 'train/CLASS/IMAGE'],
    ),
    (
        {'data.fraction': 0.5, 'data.name': 'imagenet', 'data.image_size': 8},
        ['data.fraction is 0.5', 'imagenet is streamed', "'folder'"],
    ),
    ({'data.name': 'idx'}, ["data.dir is ''", "data.name='idx'", 'must be a folder']),
    ({'data.skip_corrupt': True}, ['data.skip_corrupt is True', 'digits']),
    (
        {'data.mixup_alpha': 1.0, 'data.cutmix_alpha': 1.0},
        ['data.mixup_alpha is 1.0', 'data.cutmix_alpha is 1.0', 'must be 0'],
    ),
    ({'data.mix_per_image': True}, ['data.mix_per_image is True', 'data.mixup_alpha']),
    ({'data.soft_labels': True}, ['data.soft_labels is True', 'data.labels_from']),
    ({'data.labels_from': 'x.npz'}, ["data.labels_from is 'x.npz'", 'no such file']),
    (
        {'data.labels_from': 'x.npz', 'data.label_noise': 0.4},
        ["data.labels_from is 'x.npz'", 'data.label_noise is 0.4'],
    ),
    ({'checkpoint.keep_epochs': (1, 0)}, ['checkpoint.keep_epochs is (1, 0)', 'from 1']),
    (
        {'checkpoint.keep_epochs': (1, 400), 'total_epochs': 300},
        ['checkpoint.keep_epochs has 400', 'total_epochs, 300'],
    ),
    ({'ema.warmup_steps': 5}, ['ema.warmup_steps is 5', 'needs ema.decay']),
    ({'checkpoint.keep_epochs': (1.5,)}, ['checkpoint.keep_epochs is (1.5,)', 'epochs']),
    ({'sam.warmup_epochs': 2.5}, ['sam.warmup_epochs is 2.5', 'total_epochs, 2']),
    ({'optimizer.warmup_epochs': 3.0}, ['optimizer.warmup_epochs is 3.0', 'total_epochs, 2']),
    (
        {'optimizer.name': 'rmsprop', 'optimizer.epsilon': 0.0},
        ['optimizer.epsilon is 0', 'positive'],
    ),
    ({'optimizer.name': 'adamax'}, ["optimizer.name is 'adamax'", 'sgd, rmsprop, adam']),
    ({'optimizer.schedule': 'step'}, ["optimizer.schedule is 'step'", 'cosine']),
    ({'replica_loop': 'for'}, ["replica_loop is 'for'", 'unroll', 'scan']),
]


@pytest.mark.parametrize('overrides,words', BAD, ids=lambda x: ','.join(map(str, x)))
def test_a_run_is_refused(overrides, words, tmp_path, compilations):
    with pytest.raises(UserError) as e:
        train.train_and_evaluate(_config(overrides), str(tmp_path))
    _assert_sentence(str(e.value), words)
    assert not compilations


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_a_run_without_its_dataset_is_refused(name, tmp_path, compilations):
    config = _config({'data.name': name, 'data.dir': str(tmp_path)})
    with pytest.raises(UserError) as e:
        train.train_and_evaluate(config, str(tmp_path / 'run'))
    _assert_sentence(str(e.value), [name, str(tmp_path), 'config.data.dir', 'python -c'])
    assert not compilations


@pytest.mark.parametrize('place', ['file', 'file/below', ''])
def test_a_run_without_a_workdir_is_refused(place, tmp_path, compilations):
    (tmp_path / 'file').write_text('kept')
    workdir = place and str(tmp_path / place)
    with pytest.raises(UserError) as e:
        train.train_and_evaluate(small_config(), workdir)
    _assert_sentence(str(e.value), [f'{workdir!r}', 'workdir', 'writable' if place else 'folder'])
    assert (tmp_path / 'file').read_text() == 'kept'
    assert not compilations


def test_a_dataset_smaller_than_a_batch_can_be_evaluated():
    config = _config({'batch_size': 2560, 'replica_batch_size': 320})
    assert Experiment.from_config(config, to_train=False).evaluated
    with pytest.raises(UserError, match='only 1297 examples'):
        Experiment.from_config(config)


def test_top5_needs_six_classes():
    for num_classes, refused in [(5, True), (6, False)]:
        dataset = types.SimpleNamespace(
            name='tiny', num_train_examples=64, pixel_shape=(8, 8, 1), num_classes=num_classes
        )
        try:
            settings.check_with_data(_config({'eval.top5': True}), dataset)
            assert not refused
        except UserError as e:
            assert refused
            _assert_sentence(str(e), ['eval.top5 is True', 'tiny', '5 classes'])


@pytest.mark.parametrize('devices_sharing', [1, 8])
def test_images_that_the_devices_cannot_hold(devices_sharing, tmp_path, monkeypatch, compilations):
    # 1297 training and 500 test images of 64 bytes, the former once for training and evaluation.
    size = 1797 * 64
    config = _config({'eval.train_set': True, 'data.label_noise': 0.4})
    free = [devices_sharing * size - 1, devices_sharing * size]
    monkeypatch.setattr(replicas, 'free_memory', lambda devices: (free[0], devices_sharing))
    with pytest.raises(UserError) as e:
        train.train_and_evaluate(config, str(tmp_path))
    _assert_sentence(str(e.value), ['digits', f'the {devices_sharing} on this memory', 'GiB'])
    assert not compilations
    monkeypatch.setattr(replicas, 'free_memory', lambda devices: (free[1], devices_sharing))
    Experiment.from_config(config)


def test_free_memory_of_this_machine():
    free, sharing = replicas.free_memory(jax.devices())
    assert 2**20 < free and sharing == len(jax.devices())
    accelerators = [
        types.SimpleNamespace(
            process_index=process,
            memory_stats=lambda used=used: {'bytes_limit': 100, 'bytes_in_use': used},
        )
        for process, used in ((0, 10), (0, 30), (1, 99))
    ]
    assert replicas.free_memory(accelerators) == (70, 1)


def test_an_unknown_dataset_is_refused_by_the_library_too():
    settings = _config({'data.name': 'mnist'}).data
    with pytest.raises(UserError, match="data.name is 'mnist'.*" + ', '.join(data.SOURCES)):
        data.load_dataset(settings)


# Every key.


def _check(overrides, words):
    with pytest.raises(UserError) as e:
        settings.check(_config(overrides))
    _assert_sentence(str(e.value), words)


NUMBERS = [key for key, described in settings.KEYS.items() if described.kind in (int, float)]


RANGES = {
    key: (
        described.low,
        math.inf if described.high is None else described.high,
        not described.below,
    )
    for key, described in settings.KEYS.items()
    if described.low is not None
}


def test_every_number_has_its_range():
    assert {*RANGES, 'sam.p', 'model.head_bias'} == set(NUMBERS)
    from_one = {
        'total_epochs',
        'batch_size',
        'replica_batch_size',
        'log_every_steps',
        'sam.replicas_per_group',
        'eval.batch_size',
        'data.cutout_size',
        'data.randaugment_layers',
        'analysis.examples',
    }
    lowest = {**dict.fromkeys(from_one, 1), 'analysis.steps': 5, 'data.fraction': 1e-6}
    below_one = {'label_smoothing', 'ema.decay'} | {
        f'optimizer.{name}' for name in ('momentum', 'decay', 'end', 'milestone_factor')
    }
    for key, (low, high, closed) in RANGES.items():
        assert low == lowest.get(key, 0), key
        if key in below_one:
            assert (high, closed) == (1, False), key
        elif key in ('data.label_noise', 'data.fraction', 'data.cutout_probability'):
            assert (high, closed) == (1, True), key
        elif key == 'data.image_size':
            assert (high, closed) == (2**14, True), key
        elif key in ('data.label_noise_seed', 'data.fraction_seed', 'seed'):
            assert (high, closed) == (2**32 - 1, True), key
        else:
            assert high == math.inf, key


@pytest.mark.parametrize('key', sorted(RANGES))
def test_numbers_out_of_range(key):
    low, high, closed = RANGES[key]
    is_float = settings.KEYS[key].kind is float
    bad = [low - 1, -1000]
    bad += [low - 1e-6, -math.inf, math.nan, math.inf] if is_float else []
    if high < math.inf:
        bad += [high + 1, *([] if closed else [high])]
    for value in bad:
        _check(
            {key: value},
            [f'{key} is {value}', f'at least {low}', f'{high}' if high < math.inf else ''],
        )
    good = [low, *([high] if closed and high < math.inf else [])]
    for value in good:
        settings.check(_config({key: value}))


WRONG = {
    int: ['abc', 1.5, True, None],
    float: ['abc', True, None],
    bool: [1, 'True', None],
    str: [3, None],
    tuple: [5, '1', None],
}


@pytest.mark.parametrize('key', settings.KEYS)
def test_wrong_types(key):
    kind = settings.KEYS[key].kind
    for value in WRONG[kind]:
        _check({key: value}, [f'{key} is {value!r}', f'type {kind.__name__}'])


@pytest.mark.parametrize('key', ['sam.rho', 'optimizer.learning_rate', 'sam.p'])
def test_a_whole_number_is_a_float(key):
    settings.check(_config({key: 2}))


@pytest.mark.parametrize('key', settings.KEYS)
def test_missing_keys(key):
    config = small_config()
    *section, name = key.split('.')
    with config.unlocked():
        del (config[section[0]] if section else config)[name]
    with pytest.raises(UserError) as e:
        settings.check(config)
    _assert_sentence(str(e.value), [f'lacks the key {key} ', settings.KEYS[key].kind.__name__])


MISTYPED = [
    ('batchsize', 'batch_size'),
    ('roh', 'analysis.rho or sam.rho'),
    ('sma.rho', 'sam.rho'),
    ('optimzer.learning_rate', 'optimizer.learning_rate'),
    ('ema.decai', 'ema.decay'),
    ('learning_rate', 'optimizer.learning_rate'),
    ('eval.batchsize', 'eval.batch_size'),
] + [(key[:-1], key) for key in settings.KEYS if len(_key(key)) > 3 and 'model.' not in key]


@pytest.mark.parametrize('mistyped,meant', MISTYPED)
def test_mistyped_keys(mistyped, meant):
    _check({mistyped: 1}, [f'Unknown config key {mistyped} (did you mean {meant}?)'])


def test_unlike_any_key():
    _check({'xyzzy': 1}, ['Unknown config key xyzzy.'])


# The command line: many in one process, which forks, since importing takes longest.


DRIVER = """
import json, os, signal, sys, traceback
import jax
from sam_jax import main

def note(event, *args, **kwargs):
    if event == {compiled!r}:
        print('COMPILED', file=sys.stderr)

jax.monitoring.register_event_duration_secs_listener(note)
results = []
for i, argv in enumerate(json.loads(sys.argv[1])):
    name = f'{{sys.argv[2]}}/stderr{{i}}'
    child = os.fork()
    if not child:
        signal.alarm(60)  # if it is not refused, it trains
        file = os.open(name, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv[1:] = argv
        code = 0
        try:
            main.run()
        except SystemExit as e:
            code = e.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)  # at once: taking down what was imported takes longest
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append((status, open(name).read()))
json.dump(results, open(sys.argv[2] + '/results', 'w'))
"""

CONFIG, WORKDIR = '--config=configs/digits.py', '--workdir=WORKDIR'
COMMANDS = [
    ([CONFIG, WORKDIR, '--config.sam.roh=0.1'], ['key sam.roh (did you mean sam.rho?)']),
    ([CONFIG, WORKDIR, '--config.roh=0.1'], ['key roh (did you mean analysis.rho or sam.rho?)']),
    (
        [CONFIG, WORKDIR, '--config.model.dropout_rate=0.1', '--config.sam.roh=0.1'],
        ['key sam.roh (did you mean sam.rho?)'],
    ),
    ([CONFIG, WORKDIR, '--config.xyzzy=0.1'], ['Unknown config key xyzzy.']),
    ([CONFIG, WORKDIR, '--config.model.foo=1'], ['key model.foo']),
    ([CONFIG, WORKDIR, '--config.batch_size=abc'], ['config.batch_size=abc', 'int']),
    ([CONFIG, WORKDIR, '--config.batch_size=1.5'], ['config.batch_size=1.5', 'int']),
    ([CONFIG, WORKDIR, '--config.sam.rho=abc'], ['config.sam.rho=abc', 'float']),
    ([CONFIG, WORKDIR, '--config.sam.rho='], ['config.sam.rho', 'float']),
    ([CONFIG, WORKDIR, '--config.data.validation=maybe'], ['data.validation=maybe', 'oolean']),
    ([CONFIG, WORKDIR, '--config.sam=3'], ['config.sam=3']),
    ([CONFIG, WORKDIR, '--config.sam.rho=-1'], ['sam.rho is -1.0', 'at least 0']),
    ([CONFIG, WORKDIR, '--config.sam.p=1'], ['sam.p is 1.0', 'greater than 1']),
    ([CONFIG, WORKDIR, '--config.replica_batch_size=48'], ['batch_size is 64', '48']),
    (
        [CONFIG, WORKDIR, '--config.batch_size=96', '--config.replica_batch_size=8'],
        ['12 replicas', '8 devices'],
    ),
    ([CONFIG, WORKDIR, '--config.checkpoint.keep_epochs=(0,)'], ['keep_epochs is (0,)']),
    ([CONFIG, WORKDIR, '--config.model.name=vgg17'], [*models.NAMES]),
    (['--config=configs/cifar.py:model=vgg17', WORKDIR], [*models.NAMES]),  # before the dataset
    (
        [CONFIG, WORKDIR, '--config.model.name=resnet20'],
        ["no option 'dropout_rate'", "config's argument, model=NAME"],
    ),
    (
        [
            CONFIG,
            WORKDIR,
            '--config.batch_size=80',
            '--config.replica_batch_size=5',
            '--config.model.sync_batch_norm=True',
        ],
        ['model.sync_batch_norm is True', '16 replicas', 'set replica_batch_size to 10'],
    ),
    ([CONFIG, WORKDIR, '--config.data.augment=foo'], ["data.augment is 'foo'", 'none, basic']),
    ([CONFIG], ["--workdir is ''"]),
    ([CONFIG, '--workdir=pyproject.toml'], ["workdir 'pyproject.toml' is not writable"]),
    ([], ["--workdir is ''"]),  # and configs/digits.py is the default
    ([CONFIG, WORKDIR, 'stray'], ["'stray'", '--']),
    ([CONFIG, '--wrkdir=x'], ['wrkdir', 'workdir']),
    ([CONFIG, WORKDIR, '--num_processes=a'], ['num_processes=a', 'int']),
    (
        [CONFIG, WORKDIR, '--coordinator_address=localhost:1'],
        ['--coordinator_address', '--num_processes', '--process_id', 'localhost:1'],
    ),
    (['--config=configs/digits.py:noise=2', WORKDIR], ['data.label_noise is 2.0', 'at most 1']),
    (['--config=configs/digits.py:method=sma', WORKDIR], ["sam.method is 'sma'", 'sgd, sam']),
    (
        [CONFIG, WORKDIR, '--config.optimizer.learnig_rate=3'],
        ['key optimizer.learnig_rate (did you mean optimizer.learning_rate?).'],
    ),
    ([CONFIG, WORKDIR, '--config.batchsize=3'], ['key batchsize (did you mean batch_size?).']),
    (
        [CONFIG, WORKDIR, '--config.optimzer.learning_rate=1'],
        ['key optimzer.learning_rate (did you mean optimizer.learning_rate?).'],
    ),
    ([CONFIG, WORKDIR, '--config.sam.rho.x=1'], ['key sam.rho.x (did you mean sam.rho?).']),
    (
        ['--config=configs/digits.py:foo=1', WORKDIR],
        ["'foo'; the arguments are model, method, noise, rho, seed, smoke."],
    ),
    (['--config=configs/digits.py:noise=abc', WORKDIR], ["noise is 'abc'", 'of type float.']),
    (
        ['--config=configs/cifar.py:dataset=mnist', WORKDIR],
        ["dataset is 'mnist'", 'cifar10, cifar100.'],
    ),
    (['--config=pyproject.toml', WORKDIR], ["'pyproject.toml'", 'a file of Python, NAME.py.']),
    (['--config=configs/none.py', WORKDIR], ['configs/none.py', 'No such file']),
    (['--config=tests/golden/recipe.py', WORKDIR], ['tests/golden/recipe.py', 'get_config']),
    (['--config', 'configs/digits.py:foo=1', WORKDIR], ["'foo'; the arguments are"]),
    ([CONFIG, WORKDIR, '--config.sam.roh', '1'], ['key sam.roh (did you mean sam.rho?).']),
    (['-config=configs/cifar.py:foo=1', '-config.sam.roh=1'], ["'foo'; the arguments are model"]),
    ([CONFIG, WORKDIR, '--noconfig.eval.top5', '--config.sam.rho=-1'], ['sam.rho is -1.0']),
    ([CONFIG, WORKDIR, '--noconfig.eval.tpo5'], ['key eval.tpo5 (did you mean eval.top5?).']),
    (['-config', 'configs/digits.py:foo=1', WORKDIR], ["'foo'; the arguments are"]),
]


@pytest.fixture(scope='module')
def answers(tmp_path_factory):
    """The exit status and the standard error of each of COMMANDS."""
    place = tmp_path_factory.mktemp('commands')
    commands = [
        [a.replace('WORKDIR', str(place / f'run{i}')) for a in argv]
        for i, (argv, _) in enumerate(COMMANDS)
    ]
    subprocess.run(
        [
            sys.executable,
            '-c',
            DRIVER.format(compiled=helpers.COMPILED),
            json.dumps(commands),
            str(place),
        ],
        cwd=ROOT,
        check=True,
        timeout=300,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )
    return json.loads((place / 'results').read_text())


def _assert_one_line(status, stderr, words):
    assert status == 2, stderr
    (line,) = stderr.splitlines()
    assert line.startswith('error: ') and 'Traceback' not in line, line
    assert all(word in line for word in words), line


@pytest.mark.parametrize('i', range(len(COMMANDS)), ids=lambda i: ' '.join(COMMANDS[i][0]))
def test_commands(i, answers):
    _assert_one_line(*answers[i], COMMANDS[i][1])


@pytest.mark.parametrize(
    'content,argument,words',
    [
        ('def get_config(:\n', '', ['it is not Python', 'line 1']),
        ('import no_such_module\n', '', ['imports cannot be found', "'no_such_module'"]),
        ('from configs import no_such\n', '', ['imports cannot be found', "'no_such'"]),
        ('get_config = 1\n', '', ['must define get_config()']),
        ('def get_config():\n  pass\n', ':x', ["with the argument 'x' (too many"]),
        ('def get_config(arg):\n  pass\n', '', ['without an argument, FILE:ARGUMENT', "'arg'"]),
        ('def get_config():\n  pass\n', '', ['returns a NoneType', 'a ConfigDict']),
    ],
)
def test_config_files_that_are_none(content, argument, words, tmp_path):
    path = tmp_path / 'my.py'
    path.write_text(content)
    with pytest.raises(UserError) as e:
        settings.load(f'{path}{argument}')
    _assert_sentence(str(e.value), [f"--config is '{path}'", *words])


def test_a_bug_in_a_config_file_is_told_as_one(tmp_path):
    path = tmp_path / 'my.py'
    path.write_text('def get_config(arg):\n  return len(5)\n')
    with pytest.raises(TypeError, match='has no len'):
        settings.load(f'{path}:x')


@pytest.mark.parametrize(
    'argument,words',
    [
        ('--config.sam.roh=1', ['Unknown config key sam.roh (did you mean sam.rho?).']),
        ('--config.sam.rho=-0.5', ['sam.rho is -0.5; it must be at least 0.']),
    ],
)
def test_a_real_command(argument, words, tmp_path):
    result = subprocess.run(
        [sys.executable, '-m', 'sam_jax.main', CONFIG, f'--workdir={tmp_path}/run', argument],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )
    _assert_one_line(result.returncode, result.stderr, words)
    assert not result.stdout


@pytest.mark.parametrize('module', ['main', 'cli.sweep', 'cli.preview'])
def test_help_from_anywhere(module, tmp_path):
    """As a script of pip's calls it, too: what the command is, and its flags."""
    script = f'import sys; from sam_jax.{module} import run; sys.argv[0] = "sam-jax"; run()'
    for start in (['-m', f'sam_jax.{module}'], ['-c', script]):
        result = subprocess.run(
            [sys.executable, *start, '--help'],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
        )
        assert not result.stderr, result.stderr
        assert '--config' in result.stdout and 'sam-jax-' in result.stdout


# Configs.


@pytest.mark.parametrize('rate', [-0.1, 1.5])
def test_dropout_rate_out_of_range(rate, tmp_path, compilations):
    with pytest.raises(UserError) as e:
        config = _config({'model.dropout_rate': rate})
        settings.check(config)
        models.from_config(config.model, 10)
    _assert_sentence(str(e.value), ['dropout_rate', str(rate)])
    assert not compilations


def test_a_run_with_other_settings_is_refused_before_compilation(tmp_path, compilations):
    from sam_jax.checkpoint import Checkpoints

    old = settings.flatten(_config({'model.name': 'wrn16_2', 'checkpoint.keep_epochs': []}))
    checkpoints = Checkpoints(str(tmp_path / 'checkpoints'))
    checkpoints.save(1, {'x': np.zeros(3)}, {'config': old, 'wall_time': 0.0})
    checkpoints.close()
    with pytest.raises(UserError) as e:
        train.train_and_evaluate(small_config(), str(tmp_path))
    _assert_sentence(str(e.value), ["model.name (was 'wrn16_2', now 'wrn10_1')", 'workdir'])
    assert not compilations


WITHOUT_MEMORY = """
import asyncio, sys, threading, time
from unittest import mock
from absl import flags
from sam_jax.cli import commands

def main():
    if sys.argv[1] == 'thread':
        threading.Thread(target=lambda: bytearray(2**44)).start()
        time.sleep(60)  # as one that waits for it
    if sys.argv[1] == 'finalizer':
        class Thing:
            def __del__(self):
                bytearray(2**44)
        Thing()
        time.sleep(60)
    if sys.argv[1] == 'tasks':
        async def fail():
            raise MemoryError
        async def both():
            asyncio.create_task(fail())
            await asyncio.sleep(0)
            raise MemoryError
        asyncio.run(both())
    raise SystemError('error return without exception set')

with mock.patch.object(commands, '_parse', lambda argv: flags.FLAGS(argv[:1])):
    commands.run(main)
"""


@pytest.mark.parametrize(
    'where,said',
    [
        ('thread', NO_MEMORY),
        ('finalizer', NO_MEMORY),
        ('tasks', NO_MEMORY),
        ('C', 'Code in C failed without a word, as where memory is used up.'),
    ],
)
def test_no_memory_in_places_that_tell_nobody(where, said, tmp_path):
    ended = subprocess.run(
        [sys.executable, '-c', WITHOUT_MEMORY, where],
        env=lean_environment(tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (ended.returncode, ended.stderr) == (2, f'error: {said}\n')


def test_another_system_error_is_one_of_the_code():
    assert told(SystemError('bad argument to internal function')) is None
