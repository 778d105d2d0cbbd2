"""A trained network in use: of a run, of published weights, as a program, on the Hub."""

import dataclasses
import json
import os
import pickle
import random
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import ROOT, assert_trees_close, assert_trees_equal, lean_environment, small_config
from jax import export
from PIL import Image
from safetensors import numpy as safetensors

import sam_jax
from configs import digits
from sam_jax import data, models, run_log, settings, trained
from sam_jax.data import decode, sources
from sam_jax.data.preprocessing import Preprocessing
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment
from sam_jax.trained import card, elsewhere, folders, programs, quality

PUBLISHED = sorted(path.parent for path in (ROOT / 'published').glob('*/config.json'))
PER_EPOCH = 20  # steps


def _random(tree, seed):
    """The same with other values: positive ones, as those of a variance must be."""
    draw = np.random.RandomState(seed)
    return jax.tree.map(
        lambda x: np.abs(np.asarray(x) + 0.1 * draw.randn(*x.shape)).astype(x.dtype), tree
    )


def _write_run(folder, epochs=(1, 2), result=True, **overrides):
    """A run as training leaves it, of random weights; returns (its experiment, its last state)."""
    experiment = Experiment.from_config(small_config(**overrides), jax.devices()[:2])
    state = experiment.create_state()
    checkpoints = experiment.checkpoints(str(folder))
    errors = {}
    for epoch in epochs:
        state = state.replace(
            params=_random(state.params, epoch),
            batch_stats=_random(state.batch_stats, epoch),
            ema=state.ema and _random(state.ema, epoch + 100),
        )
        meta = {'config': settings.jsonable(experiment.config), 'data': '', 'wall_time': 1.0}
        checkpoints.save(epoch * PER_EPOCH, state, meta)
        errors[epoch] = experiment.evaluate(experiment.on_devices(state))
    checkpoints.close()
    run_log.write_json(
        str(folder / 'config.json'),
        {'config': settings.jsonable(experiment.config), 'git_revision': 'abc'},
    )
    lines = [
        {'step': epoch * PER_EPOCH, **part}
        for epoch, said in errors.items()
        for part in ({'train/loss': 1.0}, said)
    ]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    if result:
        last = {'step': epochs[-1] * PER_EPOCH, 'epochs': epochs[-1], 'seed': 0}
        run_log.write_json(str(folder / 'result.json'), {**last, **errors[epochs[-1]]})
    return experiment, state


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(Folder, experiment, state) of a run that keeps a moving average."""
    folder = tmp_path_factory.mktemp('run')
    return folder, *_write_run(folder, ema__decay=0.5)


@pytest.fixture(scope='module')
def model(run):
    return sam_jax.load(run[0])


@pytest.fixture
def published(model, tmp_path):
    folder = tmp_path / 'published'
    trained.write(model, str(folder))
    return folder


@pytest.fixture(scope='module')
def images():
    return data.load_dataset(small_config().data).evals['test'].images


def _wrong(model):
    """The share of the test set that a network takes for another class."""
    split = data.load_dataset(model.config.data).evals['test']
    return np.mean(model.predict(split.images).argmax(1) != split.labels)


# A run.


def test_a_run_predicts_as_it_evaluates(run, model, images):
    """By the network itself, on images that are normalised here; by the evaluation of the run."""
    _, experiment, state = run
    assert model.ema and model.step == 2 * PER_EPOCH
    assert model.classes == tuple('0123456789') and model.origin == {'git_revision': 'abc'}
    assert_trees_equal(model.variables, state.ema)
    normal = (images / 255.0 - experiment.dataset.mean) / experiment.dataset.std
    wanted = experiment.model.apply(state.ema, normal.astype(np.float32), train=False)
    np.testing.assert_allclose(model.logits(images), wanted, rtol=1e-4, atol=1e-4)
    found = model.predict(images)
    np.testing.assert_allclose(found, jax.nn.softmax(wanted), rtol=1e-3, atol=1e-5)
    assert found.shape == (500, 10) and found.dtype == np.float32
    assert _wrong(model) == pytest.approx(model.test_error, abs=1e-9)
    assert (
        model.test_error == model.result['test/ema_error_rate'] != model.result['test/error_rate']
    )


def test_neither_devices_nor_batches_matter(run, model, images):
    wanted = model.predict(images)
    for devices, batch_size in ((1, 512), (3, 60), (8, 500)):
        other = sam_jax.load(run[0], devices=jax.devices()[:devices])
        found = other.predict(images, batch_size)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    for n in (0, 1, 3):
        found = model.predict(images[:n])
        assert found.shape == (n, 10)
        np.testing.assert_allclose(found, wanted[:n], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(model.predict(images[:8, ..., 0]), model.predict(images[:8]))
    np.testing.assert_array_equal(model.predict(jnp.asarray(images[:8])), model.predict(images[:8]))


@pytest.mark.parametrize(
    'wrong,words',
    [
        (np.zeros((2, 8, 8, 1), np.float32), 'float32 (2, 8, 8, 1)'),
        (np.zeros((2, 28, 28, 1), np.uint8), 'uint8 (2, 28, 28, 1)'),
        (np.zeros((2, 8, 8, 3), np.uint8), '(2, 8, 8, 3)'),
        (np.zeros((8, 8, 1), np.uint8), 'uint8 (8, 8, 1)'),
        (np.zeros((8, 8), np.uint8), 'uint8 (8, 8)'),
        (np.zeros((2, 64), np.uint8), '(2, 64)'),
        ([[1, 2], [3]], 'are no array'),
        (None, 'object ()'),
        ('images', '<U6 ()'),
    ],
)
def test_other_images_are_refused(model, wrong, words):
    with pytest.raises(UserError) as e:
        model.predict(wrong)
    assert words in str(e.value) and 'must be uint8 (N, 8, 8, 1)' in str(e.value)


def test_a_run_whose_file_of_labels_is_gone(tmp_path):
    """It is loaded, published and measured; its training set alone is not."""
    path, run, out = (tmp_path / name for name in ('labels.npz', 'run', 'published'))
    labels = np.eye(10, dtype=np.float32)[np.arange(1297) % 10]
    np.savez(path, probabilities=labels, dataset='digits')
    _write_run(run, epochs=(1,), data__labels_from=str(path), data__soft_labels=True)
    there = quality.open_split(sam_jax.load(run), 'train')
    np.testing.assert_array_equal(next(there.batches(50)).labels, np.arange(50) % 10)
    path.unlink()
    model = sam_jax.load(run)
    trained.write(model, str(out))
    for network, name in ((model, str(path)), (sam_jax.load(out), 'labels.npz')):
        assert network.config.data.labels_from == name
        found = quality.measure(network, quality.open_split(network))
        assert found['error_rate'] == pytest.approx(model.test_error)
        with pytest.raises(UserError, match='no such file'):
            quality.open_split(network, 'train')


def test_which_weights(run, tmp_path):
    """With the moving average and without; after another epoch, with the result of that one."""
    folder, _, state = run
    plain = sam_jax.load(folder, ema=False)
    assert_trees_equal(plain.variables['params'], state.params)
    assert plain.test_error == plain.result['test/error_rate'] and not plain.ema
    first = sam_jax.load(folder, epoch=1)
    assert first.step == PER_EPOCH and first.result['step'] == PER_EPOCH
    assert first.test_error != sam_jax.load(folder).test_error
    assert _wrong(first) == pytest.approx(first.test_error, abs=1e-9)
    _write_run(tmp_path, epochs=(1,), result=False)
    unfinished = sam_jax.load(tmp_path)
    assert not unfinished.ema and _wrong(unfinished) == pytest.approx(unfinished.test_error)
    for path, options, words in (
        (tmp_path, {'ema': True}, 'ema is True'),
        (folder, {'epoch': 7}, 'no checkpoint of step 140'),
        (tmp_path / 'absent', {}, 'must be the folder of a run or of published weights'),
    ):
        with pytest.raises(UserError, match=words):
            sam_jax.load(path, **options)


@pytest.mark.slow
def test_predictions_of_a_folder_of_images(tmp_path):
    """By sam-jax-predict, in the order of the training set; of a damaged image nothing is known."""
    draw = np.random.RandomState(0)
    for split in ('train', 'test'):
        for i in range(8):
            path = tmp_path / 'images' / split / ('cat', 'dog')[i % 2] / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.randint(0, 256, (20, 16, 3)).astype(np.uint8)).save(path)
    damaged = tmp_path / 'images' / 'train' / 'dog' / '3.png'
    damaged.write_bytes(damaged.read_bytes()[:100])
    (tmp_path / 'run').mkdir()
    experiment, _ = _write_run(
        tmp_path / 'run',
        epochs=(1,),
        data__name='folder',
        data__dir=str(tmp_path / 'images'),
        data__image_size=16,
        data__skip_corrupt=True,
        batch_size=4,
        replica_batch_size=2,
        eval__batch_size=3,
    )
    model = sam_jax.load(tmp_path / 'run')
    assert model.classes == ('cat', 'dog') and model.preprocessing.shape == (16, 16, 3)
    done = subprocess.run(
        [sys.executable, '-m', 'sam_jax.cli.predict', f'--workdir={tmp_path}/run'],
        cwd=ROOT,
        env=lean_environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and '8 predictions of step' in done.stderr, done.stderr
    with np.load(tmp_path / 'run' / 'predictions.npz') as found:
        probabilities, labels = found['probabilities'], found['labels']
    split = experiment.dataset.train
    names = [split[i][2] for i in range(8)]
    known = [not name.endswith('/3.png') for name in names]
    assert sum(known) == 7
    dogs = np.array(['/dog/' in name for name in names])
    np.testing.assert_array_equal(labels[known], dogs[known])
    np.testing.assert_array_equal(probabilities[np.invert(known)], [[0.5, 0.5]])
    crops = [decode.center_crop(split[i][0], size=16) for i in range(8) if known[i]]
    np.testing.assert_allclose(
        probabilities[known], model.predict(np.stack(crops)), rtol=1e-4, atol=1e-6
    )


def test_numbers_that_are_not_finite_are_read(tmp_path):
    """JSON has them as text; a sweep that resumes sees the same settings."""
    config = small_config(sam__p=float('inf'))
    path = str(tmp_path / 'config.json')
    run_log.write_json(path, {'config': settings.jsonable(config)})
    assert settings.of_run(str(tmp_path)).sam.p == float('inf')
    before = run_log.read_json(path)['config']
    settings.check_same_mathematics(config, before)
    config.sam.p = 2.0
    with pytest.raises(UserError, match=r'sam.p \(was inf, now 2.0\)'):
        settings.check_same_mathematics(config, before)


def test_names_of_classes():
    for name, source in data.SOURCES.items():
        if isinstance(source, sources.Source) and source.classes:
            assert len({*source.classes}) == source.num_classes, name
    assert data.SOURCES['fashion_mnist'].classes[9] == 'Ankle boot'


# Published weights.


def test_published_weights_are_the_run(model, published, images, monkeypatch):
    """Bit for bit, with no dataset at hand; nothing but what predictions take is in the file."""

    def absent(*_):
        raise UserError('There is no dataset.')

    monkeypatch.setattr(data, 'load_dataset', absent)
    again = sam_jax.load(published)
    assert_trees_equal(again.variables, model.variables)
    np.testing.assert_array_equal(again.predict(images), model.predict(images))
    assert {p.name for p in published.iterdir()} == {folders.WEIGHTS, 'config.json', 'result.json'}
    names = {*safetensors.load_file(published / folders.WEIGHTS)}
    assert 'params/conv_init/kernel' in names and 'batch_stats/bn_final/var' in names
    assert {name.partition('/')[0] for name in names} == {'params', 'batch_stats'}
    size = (published / folders.WEIGHTS).stat().st_size
    assert 4 * model.num_params < size < 4 * model.num_params + 10_000
    for field in ('result', 'classes', 'step', 'ema', 'origin', 'preprocessing', 'facts'):
        assert getattr(again, field) == getattr(model, field), field
    trained.write(again, str(published))
    assert_trees_equal(sam_jax.load(str(published)).variables, model.variables)


def test_half_the_size(model, images, tmp_path):
    path = trained.write(model, str(tmp_path), dtype='float16')
    assert os.path.getsize(path) < 2.2 * model.num_params
    half = sam_jax.load(tmp_path)
    assert half.variables['params']['head']['kernel'].dtype == np.float32
    assert_trees_close(half.variables, model.variables, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(half.predict(images), model.predict(images), atol=0.02)
    huge = dataclasses.replace(model, variables=jax.tree.map(lambda x: 1e6 + x, model.variables))
    with pytest.raises(UserError, match='not finite in float16'):
        trained.write(huge, str(tmp_path), dtype='float16')


def test_paths_of_the_machine_are_not_published(model, tmp_path):
    config = model.config.copy_and_resolve_references()
    with config.unlocked():
        config.data.dir, config.model.init_from = '/home/someone/data/', '/home/someone/w.npz'
    trained.write(dataclasses.replace(model, config=config), str(tmp_path))
    written = (tmp_path / 'config.json').read_text()
    assert 'someone' not in written and '"data"' in written and '"w.npz"' in written


def test_a_run_is_not_written_over(run, model):
    before = (run[0] / 'config.json').read_bytes()
    with pytest.raises(UserError, match='is the folder of a run'):
        trained.write(model, str(run[0]))
    assert (run[0] / 'config.json').read_bytes() == before


def _edit(**changes):
    """Changes config.json: {section: value, or a dict that is put into it}."""

    def edit(folder):
        content = json.loads((folder / 'config.json').read_text())
        for key, value in changes.items():
            content[key] = {**content[key], **value} if isinstance(value, dict) else value
        (folder / 'config.json').write_text(json.dumps(content))

    return edit


def _weights(change, checksum=True):
    """Changes the bytes of the weights; with a checksum that fits."""

    def edit(folder):
        path = folder / folders.WEIGHTS
        path.write_bytes(change(path.read_bytes()))
        if checksum:
            _edit(weights={'sha256': folders.checksum(path.read_bytes())})(folder)

    return edit


def _arrays(change):
    """Changes the arrays: a function of {name: array} in place."""

    def edit(content):
        arrays = safetensors.load(content)
        change(arrays)
        return safetensors.save(arrays)

    return _weights(edit)


def _flipped(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


HEAD = 'params/head/kernel'
DAMAGE = {
    'a flipped bit': (_weights(_flipped, checksum=False), 'SHA-256 differs'),
    'a file cut off': (_weights(lambda x: x[:-100], checksum=False), 'SHA-256 differs'),
    'an archive cut off': (_weights(lambda x: x[:-100]), 'cannot be read as safetensors'),
    'nothing': (_weights(lambda x: b''), 'cannot be read as safetensors'),
    'no weights': (lambda f: (f / folders.WEIGHTS).unlink(), 'No such file'),
    'no result': (lambda f: (f / 'result.json').unlink(), 'result.json'),
    'a text for a result': (lambda f: (f / 'result.json').write_text('"x"'), 'holds a str'),
    'a result cut off': (lambda f: (f / 'result.json').write_text('{"step": '), 'cannot be read'),
    'no JSON': (lambda f: (f / 'config.json').write_bytes(b'\xff\0'), 'cannot be read'),
    'deep JSON': (lambda f: (f / 'config.json').write_text('[' * 100_000), 'cannot be read'),
    'a list': (lambda f: (f / 'config.json').write_text('[]'), 'holds a list'),
    'no settings': (_edit(config=None), 'must be the folder of a run'),
    'settings twice': (_edit(config={'data': 1}), 'must be the folder of a run'),
    'an unknown setting': (_edit(config={'sam.roh': 1}), 'sam.roh (did you mean'),
    'a setting of another type': (_edit(config={'sam.rho': 'much'}), "sam.rho is 'much'; it must"),
    'another network': (_edit(config={'model.name': 'wrn16_1'}), 'group0_block1'),
    'a wider network': (_edit(config={'model.name': 'wrn10_2'}), 'must be float32 (128,)'),
    'no such network': (_edit(config={'model.name': 'vgg17'}), "model.name is 'vgg17'"),
    'a class too many': (_edit(classes=list('0123456789a')), 'params/head/bias is float32 (10,)'),
    'classes of numbers': (_edit(classes=[0, 1]), 'its classes [0, 1]'),
    'a path': (_edit(weights={'file': '../x.safetensors'}), 'not as sam-jax-export writes it'),
    'no preprocessing': (_edit(preprocessing=None), 'the preprocessing is None'),
    'deviation 0': (_edit(preprocessing={'std': [0]}), "'std': [0]"),
    'a side of -1': (_edit(preprocessing={'size': -1}), "'size': -1"),
    'three channels': (_edit(preprocessing={'shape': [8, 8, 3]}), "'shape': [8, 8, 3]"),
    'NaN': (_arrays(lambda a: a.update({HEAD: a[HEAD] * np.nan})), f'not finite: see {HEAD}'),
    'integers': (_arrays(lambda a: a.update({HEAD: a[HEAD].astype('int32')})), 'is int32'),
    'one less': (_arrays(lambda a: a.pop(HEAD)), f'{HEAD} is not among them'),
    'one more': (_arrays(lambda a: a.update(x=a[HEAD])), 'x is not of the network'),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_damage_is_told_in_one_sentence(name, published):
    damage, words = DAMAGE[name]
    damage(published)
    with pytest.raises(UserError) as e:
        sam_jax.load(published)
    assert words in str(e.value), str(e.value)
    assert '\n' not in str(e.value) and str(published) in str(e.value)


def test_other_weights_than_there_are(published):
    with pytest.raises(UserError, match='ema is False.*moving average alone'):
        sam_jax.load(published, ema=False)
    with pytest.raises(UserError, match='epoch is 3'):
        sam_jax.load(published, epoch=3)


class Planted:
    """What pickle would run."""

    def __reduce__(self):
        return os.mkdir, (os.environ['PLANTED'],)


def test_nothing_in_it_is_code(published, tmp_path, monkeypatch):
    monkeypatch.setenv('PLANTED', str(tmp_path / 'planted'))
    content = pickle.dumps(Planted())
    _weights(lambda _: content)(published)
    with pytest.raises(UserError, match='cannot be read as safetensors'):
        sam_jax.load(published)
    for name in ('config.json', 'result.json'):
        (published / name).write_bytes(content)
    with pytest.raises(UserError, match='cannot be read'):
        sam_jax.load(published)
    assert not (tmp_path / 'planted').exists()
    pickle.loads(content)
    assert (tmp_path / 'planted').exists()


def test_random_damage_of_the_json_files(published):
    """Bytes flipped, removed and repeated: loaded, or one sentence."""
    draw, refused = random.Random(0), 0
    for trial in range(150):
        path = published / ('config.json', 'result.json')[trial % 5 == 0]
        whole = path.read_bytes()
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(content))
            new = bytes([draw.randrange(256)]) * draw.randint(0, 2)
            content[place : place + draw.choice((1, 1, 1, 40))] = new
        path.write_bytes(content)
        try:
            sam_jax.load(published)
        except UserError as e:
            assert '\n' not in str(e)
            refused += 1
        path.write_bytes(whole)
    assert refused > 30


# Programs.

CALL = """
import sys
sys.modules['sam_jax'] = sys.modules['flax'] = None  # importing them is an ImportError
import jax, numpy as np
images = np.load(sys.argv[2])
program = jax.export.deserialize(open(sys.argv[1], 'rb').read())
found = [program.call(images[:n]) for n in (1, 7, len(images))]
np.savez(sys.argv[3], *found)
"""


def test_a_program_runs_without_this_package(model, images, tmp_path):
    path = programs.write(model, str(tmp_path / 'out'))
    described = json.loads((tmp_path / 'out' / 'program.json').read_text())
    assert described['input'] == 'uint8 (N, 8, 8, 1)' and described['classes'] == [*model.classes]
    np.save(tmp_path / 'images.npy', images)
    done = subprocess.run(
        [sys.executable, '-c', 'import jax.export' + CALL, path, 'images.npy', 'found.npz'],
        cwd=tmp_path,
        env=lean_environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / 'found.npz') as found:
        for array, n in zip(found.values(), (1, 7, 500)):
            assert array.dtype == np.float32 and array.shape == (n, 10)
            np.testing.assert_allclose(array, model.predict(images[:n]), rtol=1e-4, atol=1e-6)


def _of_family(name, size=0):
    """A network of the zoo with random weights, on colour images."""
    network = models.create_model(name, 5)
    preprocessing = Preprocessing((32, 32, 3), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), size)
    pixels = np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    variables = network.init(jax.random.key(0), preprocessing(pixels), train=False)
    model = trained.Trained(
        config=digits.get_config(f'model={name}'),
        variables=_random({'batch_stats': {}, **variables}, 0),
        preprocessing=preprocessing,
        classes=tuple('abcde'),
        result={},
        step=1,
        ema=False,
        origin={},
        devices=tuple(jax.devices()[:1]),
    )
    return model, pixels


# Some are made of the same parts as others.
@pytest.mark.parametrize(
    'family',
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ('small_resnet', 'vgg', 'clip', 'imagenet_resnet')
        else name
        for name in models.FAMILIES
    ],
)
def test_every_family_is_exported_and_published(family, tmp_path):
    model, pixels = _of_family(models.FAMILIES[family].tiny, size=40 * (family == 'efficientnet'))
    content = bytearray(programs.exported(model).serialize())
    assert str(ROOT).encode() not in content
    program = export.deserialize(content)
    assert {*program.platforms} == {'cpu', 'cuda', 'rocm', 'tpu'}
    wanted = model.predict(pixels)
    np.testing.assert_allclose(program.call(pixels), wanted, rtol=1e-4, atol=1e-6)
    trained.write(model, str(tmp_path))
    again = sam_jax.load(tmp_path, devices=model.devices)
    np.testing.assert_array_equal(again.predict(pixels), wanted)
    assert again.test_error is None and again.facts['test error'] == 'not known'


# Other libraries.


def test_an_orbax_checkpoint_is_the_weights(model, tmp_path):
    import orbax.checkpoint as ocp

    for _ in range(2):  # a second one takes the place of the first
        path = elsewhere.write_orbax(model, str(tmp_path))
    with ocp.StandardCheckpointer() as checkpointer:
        assert_trees_equal(checkpointer.restore(path), model.variables)
    described = json.loads((tmp_path / 'network.json').read_text())
    assert described['classes'] == list(model.classes) and described['ema'] is True
    assert described['preprocessing'] == model.preprocessing.described()


@pytest.mark.slow
@pytest.mark.parametrize('family', models.FAMILIES)
def test_a_saved_model_predicts_the_same_and_tflite_does(family, tmp_path):
    """Every family, for one image and for several; no file of this machine is named."""
    tf = pytest.importorskip('tensorflow')
    model, pixels = _of_family(models.FAMILIES[family].tiny, size=40 * (family == 'efficientnet'))
    wanted = model.predict(pixels)
    path = elsewhere.write_saved_model(model, str(tmp_path))
    signatures = tf.saved_model.load(str(tmp_path)).signatures
    for name, n in (('serving_default', 1), ('serving_default', len(pixels)), ('one', 1)):
        found = signatures[name](images=tf.constant(pixels[:n]))['probabilities']
        np.testing.assert_allclose(found, wanted[:n], rtol=1e-4, atol=1e-6)
    with open(path, 'rb') as file:
        assert str(ROOT).encode() not in file.read()
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path), signature_keys=['one'])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the interpreter's own end
        light = tf.lite.Interpreter(model_content=converter.convert())
    light.allocate_tensors()
    for image, probabilities in zip(pixels, wanted):
        found = light.get_signature_runner('one')(images=image[None])['probabilities']
        np.testing.assert_allclose(found[0], probabilities, rtol=1e-3, atol=1e-5)


# The Hub.


def test_a_folder_for_the_hub(model, images, tmp_path):
    path = card.write(model, str(tmp_path / 'digits'), license='apache-2.0')
    assert os.path.basename(path) == 'model.safetensors'
    np.testing.assert_array_equal(
        sam_jax.load(tmp_path / 'digits').predict(images), model.predict(images)
    )
    text = (tmp_path / 'digits' / 'README.md').read_text()
    _, front, body = text.split('---\n', 2)
    front = yaml.safe_load(front)
    assert front['library_name'] == 'sam_jax' and front['license'] == 'apache-2.0'
    (measured,) = front['model-index'][0]['results']
    assert measured['metrics'][0]['value'] == pytest.approx(1 - model.test_error)
    assert f'| test error | {100 * model.test_error:.2f} % |' in body
    assert "sam_jax.load('digits')" in body and '# digits' in body and '(N, 8, 8, 1)' in body


def test_a_card_without_result_or_license(model):
    text = card.card(dataclasses.replace(model, result={}), 'x')
    front = yaml.safe_load(text.split('---\n')[1])
    assert 'model-index' not in front and 'license' not in front and 'not known' in text


def test_the_hub_understands_the_card(model):
    hub = pytest.importorskip('huggingface_hub')
    read = hub.ModelCard(card.card(model, 'digits', 'apache-2.0'))
    (result,) = read.data.eval_results
    assert (result.dataset_name, result.metric_type) == ('digits', 'accuracy')


# The command.

EXPORT = """
import json, sys
from absl import flags
from sam_jax.cli import export
for argv in json.load(sys.stdin):
    flags.FLAGS.unparse_flags()
    for flag in flags.FLAGS.get_flags_for_module('sam_jax.cli.export'):
        flag.value = flag.default
    try:
        export.main(flags.FLAGS(['export', *argv])[1:])
    except export.UserError as e:
        print(f'error: {e}')
    print('---')
"""


def test_the_command(run, tmp_path):
    folder = str(run[0])
    cases = {
        (folder, '--out=a'): f'a/{folders.WEIGHTS}: ',
        ('a', '--out=b', '--to=stablehlo'): 'b/program.stablehlo: ',
        (folder, '--out=c', '--to=huggingface', '--dtype=float16', '--noema', '--epoch=1'): (
            'c/model.safetensors: '
        ),
        (folder,): 'error: Give one run',
        ('--out=d',): 'error: Give one run',
        (folder, f'--out={folder}'): 'error: ',
        (folder, '--out=a/config.json/d'): 'cannot be written',
        (folder, '--out=d', '--to=stablehlo', '--dtype=float16'): 'error: --dtype',
        (folder, '--out=e', '--to=orbax'): 'e/weights: ',
        (folder, '--out=d', '--license=mit'): 'error: --license',
        ('absent', '--out=d'): 'error: ',
    }
    done = subprocess.run(
        [sys.executable, '-c', EXPORT],
        input=json.dumps([*cases]),
        cwd=tmp_path,
        env={**lean_environment(tmp_path), 'PYTHONPATH': f'{tmp_path}/stubs:{ROOT}'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout.split('---\n')
    for answer, words in zip(answers, cases.values()):
        assert words in answer and len(answer.splitlines()) in (1, 7), answer
    assert not (tmp_path / 'd').exists()
    assert sam_jax.load(tmp_path / 'a').ema
    third = sam_jax.load(tmp_path / 'c')
    assert not third.ema and third.step == PER_EPOCH


# What is published.


@pytest.mark.parametrize('folder', PUBLISHED, ids=lambda folder: folder.name)
def test_what_is_published_has_the_stated_error(folder):
    """Small, and right: where the dataset is there, the error is the stated one.

    Other hardware may round an image of ten thousand to the other side.
    """
    model = sam_jax.load(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6
    try:
        split = data.load_dataset(model.config.data).evals['test']
    except UserError as e:
        pytest.skip(str(e))
    wrong = np.mean(model.predict(split.images).argmax(1) != split.labels)
    assert wrong == pytest.approx(model.test_error, abs=max(0.5 / len(split), 2e-4))
    assert model.result['test/error_rate'] < 0.5


def test_something_is_published():
    assert {'digits_sgd', 'digits_sam'} <= {folder.name for folder in PUBLISHED}
