"""Random settings of runs: strategies, and the check that needs no compilation."""

import functools
import json
import math
import pathlib
import string
import tempfile

import jax
import ml_collections
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from fuzzing import OUTCOMES, Fault, check_sentence
from sam_jax import memory, models, run_log, settings, sharpness, train_step
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment
from sam_jax.settings import schema
from sam_jax.targets import programs
from sam_jax.train_state import HParams

# Names that a family's pattern knows, tiny and not, and names that it nearly knows.
TINY = tuple(family.tiny for family in models.FAMILIES.values())
ODD_MODELS = (
    *('wrn16_4', 'wrn0_1', 'wrn10_0', 'wrn11_1', 'wrn22_3', 'shake_shake_8_2x0d', 'wrn٣_1'),
    *('wrn1000000000000_1', 'resnet' + 5000 * '8', 'vit-tiny' + 5000 * '4'),
    *('shake_shake_0_2x4d', 'shake_shake_26_2x96d', 'pyramidnet11_shakedrop', 'pyramidnet0'),
    *('pyramidnet12', 'resnet0', 'resnet2', 'resnet7', 'resnet14', 'resnet18', 'vgg11', 'vgg12'),
    *('vit-tiny0', 'vit-tiny3', 'vit-s16', 'vit-tiny1000', 'clip-tiny0', 'clip-tiny3', 'clip-b16'),
    *('efficientnet-b0', 'efficientnet-b9', 'preact_resnet10', 'cifar_resnet18', 'lenet', ''),
)

# Of any type, and far out.
ODD_VALUES = (
    *(None, '', 'abc', 'nan', True, False, -1, 0, 1, 2, 3, 5, 7, 2**31, 2**32, 2**63, 10**30),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-30, 1e30, 1e300, math.nan, math.inf, -math.inf),
    *((), (1,), (0,), (1, 2), (2, 1), (-1,), (1.5,), ('a',), (True,), (None,), 'a\nb', '\0', 'é'),
)


def values(key: schema.Key, usual: bool = False) -> st.SearchStrategy:
    """Values that a key may have by itself, mostly small ones; or only those that a run may use."""
    if usual and key.kind in (int, float) and (key.high is None or key.kind is int):
        near = [key.default, key.low or 0, *((1, 2, 3) if key.kind is int else (0.01, 0.05, 0.5))]
        return st.sampled_from([key.kind(x) for x in near if x >= (key.low or 0)])
    if key.choices:
        return st.sampled_from(sorted(key.choices))
    if key.kind is bool:
        return st.booleans()
    if key.kind is int:
        low = int(key.low or 0)
        high = int(key.high) if key.high is not None else 2**40
        small = st.integers(low, min(low + 8, high))
        return small | small | small | st.integers(low, high)
    if key.kind is float:
        low = key.low or 0.0
        high = key.high if key.high is not None else 1e3
        usual = st.floats(low, high, exclude_max=key.below)
        return usual | st.sampled_from([x for x in (low, 0.5, 0.9, 1.0) if low <= x <= high])
    if key.kind is tuple:
        return st.lists(st.integers(1, 3), max_size=2).map(tuple)
    return st.sampled_from(['', 'nowhere', 'a b', '~', '/', '.']) | st.text(
        string.printable, max_size=5
    )


@functools.cache
def all_keys(model: str, method: str) -> dict[str, schema.Key]:
    """{key: Key} of all settings of a run of a model and a method."""
    # The dataset is chosen first: that one of TFDS is not there takes TensorFlow's seconds.
    chosen = ('model.name', 'sam.method', 'data.name')
    keys = {k: v for k, v in settings.KEYS.items() if k not in chosen}
    keys |= {f'model.{k}': v for k, v in schema.model_options(model).items()}
    if method in sharpness.METHODS:
        keys |= {f'sam.{k}': schema.Key(v, '') for k, v in sharpness.options(method).items()}
    return keys


# What makes most configs fit one of our datasets, and small.
SIZES = st.fixed_dictionaries(
    {
        'replica_batch_size': st.sampled_from([1, 2, 4, 8]),
        'replicas': st.sampled_from([1, 1, 2, 3, 4]),
        'group': st.sampled_from([1, 1, 1, 2, 4]),
        'total_epochs': st.integers(1, 4),
    }
)


@st.composite
def cases(
    draw, wild: int = 4, usual: bool = False, of: tuple[str, ...] = (*6 * TINY, *ODD_MODELS)
) -> dict:
    """A case: {'model', 'method', 'devices', 'changes': {key: value}, 'without': keys}.

    Args:
      wild: how many keys at most have values of any kind; 0 for configs of which most are valid.
      usual: whether numbers are of a usual size.
      of: the models.
    """
    model = draw(st.sampled_from(of))
    method = draw(st.sampled_from(sorted(sharpness.METHODS)))
    sizes = draw(SIZES)
    replicas = sizes['replicas']
    changes = {
        'data.name': draw(st.sampled_from(['digits', 'fake_cifar10', *places()])),
        'data.augment': draw(st.sampled_from(['none', 'basic'])),
        'data.padding': 1,
        'replica_batch_size': sizes['replica_batch_size'],
        'batch_size': replicas * sizes['replica_batch_size'],
        'sam.replicas_per_group': sizes['group'] if replicas % sizes['group'] == 0 else 1,
        'total_epochs': sizes['total_epochs'],
        'eval.batch_size': draw(st.sampled_from([1, 8, 500])),
    }
    if changes['data.name'] in places():
        changes['data.dir'] = places()[changes['data.name']]
    if changes['data.name'] == 'folder' or draw(st.integers(0, 3)) == 0:
        changes['data.image_size'] = draw(st.sampled_from([8, 16, 32]))
    if method in ('saf', 'mesa'):  # which learn from epochs before
        changes |= {'total_epochs': sizes['total_epochs'] + 1, 'sam.start_epoch': 0}
        changes |= {'sam.epochs_ago': 1} if method == 'saf' else {}
    keys = all_keys(model, method)
    for key in draw(st.lists(st.sampled_from(sorted(keys)), max_size=6, unique=True)):
        changes[key] = draw(values(keys[key], usual))
    without = []
    for _ in range(draw(st.integers(0, wild))):
        what = draw(st.integers(0, 9))
        key = draw(st.sampled_from(sorted(keys)))
        if what == 0:
            without.append(key)
        elif what == 1:
            changes[key[:-1] or 'x'] = draw(st.sampled_from(ODD_VALUES))
        else:
            changes[key] = draw(st.sampled_from(ODD_VALUES))
    return {
        'model': model,
        'method': method,
        'devices': draw(st.integers(1, 2)),
        'changes': changes,
        'without': without,
    }


FAR = (
    *(10**4, 2**31 - 1, 2**32 - 1, 2**40, 2**53 + 1, 2**62, 10**18, 10**25, 10**400),
    *(1e-45, 1e-39, 1e-320, 3.4e38, 1e39),
)


def single_changes() -> list[dict]:
    """Returns the cases in which one key has another value: each key with each odd and far one."""
    base = {'data.name': 'npz', 'data.dir': places()['npz'], 'batch_size': 8, 'total_epochs': 6}
    base |= {'replica_batch_size': 4, 'eval.batch_size': 8, 'data.padding': 1}
    of = [('wrn10_1', 'sam', key) for key in all_keys('wrn10_1', 'sam')]
    for method in sharpness.METHODS:
        of += [('lenet5', method, f'sam.{option}') for option in sharpness.options(method)]
    for family in models.FAMILIES.values():
        of += [(family.tiny, 'sgd', f'model.{option}') for option in family.options]
    return [
        {
            'model': model,
            'method': method,
            'devices': 1,
            'changes': {**base, key: value},
            'without': [],
        }
        for model, method, key in of
        for value in (*ODD_VALUES, *FAR)
    ]


def build(case: dict) -> ml_collections.ConfigDict:
    """Returns the config of a case, as a file of somebody's own might make it."""
    config = settings.default_config()
    schema.set_model(config, case['model'])
    schema.set_method(config, case['method'])
    for key, value in case['changes'].items():
        *sections, name = key.split('.')
        section = config
        for part in sections:
            if not isinstance(section.get(part), ml_collections.ConfigDict):
                section[part] = ml_collections.ConfigDict()
            section = section[part]
        if name in section:
            del section[name]  # which forgets its type
        section[name] = value
    for key in case['without']:
        *sections, name = key.split('.')
        section = config
        for part in sections:
            section = section.get(part, {})
        if name in section:
            del section[name]
    return config.lock()


@functools.cache
def _folder():
    return tempfile.TemporaryDirectory(prefix='fuzz-')  # removed when the process ends


@functools.cache
def places() -> dict[str, str]:
    """{data.name: data.dir} of tiny datasets in files, made once a process."""
    root = pathlib.Path(_folder().name)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (24, 8, 8, 3), np.uint8)
    labels = np.arange(24) % 4
    np.savez(root / 'x.npz', images=images, labels=labels, test_images=images, test_labels=labels)
    for split in ('train', 'test'):
        for i, (image, label) in enumerate(zip(images, labels)):
            path = root / 'folder' / split / f'class{label}' / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return {'npz': str(root / 'x.npz'), 'folder': str(root / 'folder')}


def experiment_of(config, devices: int = 1, to_train: bool = True) -> Experiment:
    """Returns the Experiment of a config on so many devices."""
    return Experiment.from_config(config, jax.devices()[:devices], to_train)


def check(case: dict, trace: bool = False) -> None:
    """Refuses a case by a sentence, or accepts it: what its start computes is then as it must be.

    Args:
      case: of `cases`.
      trace: whether its train step is traced, too; seconds, where the rest takes hundredths.

    Raises:
      Fault: neither.
    """
    try:
        config = build(case)
        experiment = experiment_of(config, case['devices'])
    except UserError as e:
        check_sentence(str(e))
        OUTCOMES['refused'] += 1
        return
    for step in (0, experiment.total_steps - 1):
        learning_rate, rho = experiment.scheduled(step)
        if not (
            math.isfinite(learning_rate) and math.isfinite(rho) and min(learning_rate, rho) >= 0
        ):
            raise Fault(f'step {step}: learning rate {learning_rate}, rho {rho}')
    if not experiment.total_steps:
        raise Fault('a run of no steps')
    _check_round_trip(config)
    try:
        shapes = jax.eval_shape(experiment.create_state)
    except UserError as e:
        check_sentence(str(e))
        OUTCOMES['refused with the model'] += 1
        return
    if not jax.tree.leaves(shapes.params):
        raise Fault('a network without params')
    if trace:
        try:
            _trace(experiment, shapes)
        except UserError as e:
            check_sentence(str(e))
            OUTCOMES['refused with the step'] += 1
            return
    OUTCOMES['accepted'] += 1


def _check_round_trip(config):
    """config.json holds the settings: what is read from it resumes the run."""
    with tempfile.TemporaryDirectory() as folder:
        written = {'config': settings.jsonable(config)}
        run_log.write_json(f'{folder}/config.json', written)
        read = settings.of_run(folder)
    settings.check(read)
    settings.check_same_mathematics(config, json.loads(json.dumps(settings.jsonable(read))))


def _trace(experiment, state):
    """Traces the step and the evaluation, as they are compiled; and what memory they need."""
    dataset, config = experiment.dataset, experiment.config
    feed = dataset.train_feed(config.seed, 0, experiment.layout)
    feed = programs.shapes(experiment.with_past(feed, 0))
    if train_step.asks_for_previous(config):
        feed = train_step.paired(feed, None)
    arrays = programs.shapes(experiment.host_arrays(dataset.train))
    hparams = programs.shapes(HParams.from_config(config))
    after, metrics = jax.eval_shape(experiment.train_program, state, feed, arrays, hparams)
    if programs.shapes(after) != programs.shapes(state):
        raise Fault('a step changes shapes or types of its state')
    if not {'train/loss', 'bad_step'} <= metrics.keys():
        raise Fault(f'metrics are {sorted(metrics)}')
    if not memory.needs(experiment).all > 0:
        raise Fault('no memory is needed')
    feeds = dataset.eval_feeds(dataset.evals['test'], config.eval.batch_size, experiment.layout)
    jax.eval_shape(
        experiment.eval_step,
        state.params,
        state.batch_stats,
        programs.shapes(experiment.host_arrays(dataset.evals['test'])),
        programs.shapes(next(feeds)),
    )
