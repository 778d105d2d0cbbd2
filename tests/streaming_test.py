"""The streaming path on real files: crops, order, masks, processes, damaged images."""

import dataclasses
import itertools
import json
import logging
import os
import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import assert_trees_equal, golden, relative_distance, run_processes, small_config
from PIL import Image

from sam_jax import data, models, replicas, settings, train, train_step, trajectory
from sam_jax.data import decode, records
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment

SIZE, NUM_TRAIN, NUM_TEST = 16, 30, 11


def _color(i, split):
    """A color that tells the examples apart after JPEG."""
    return 8 * i + 4, 40 if split == 'train' else 200, 128


def _write_image(path, color, shape=(24, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*shape, 3), color, np.uint8)).save(path, quality=95)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Thirty training and eleven test images of three classes; one of them a PNG."""
    root = tmp_path_factory.mktemp('folder')
    for split, n in (('train', NUM_TRAIN), ('test', NUM_TEST)):
        for i in range(n):
            ending = 'png' if i == 4 else 'jpg'
            _write_image(
                root / split / f'class{i % 3}' / f'{i:03d}.{ending}', _color(i, split), (24, 36 + i)
            )
    return root


def _load(folder, **settings):
    settings = {
        'name': 'folder',
        'image_size': SIZE,
        'augment': 'imagenet',
        'threads': 2,
        **settings,
    }
    config = small_config(**{f'data__{k}': v for k, v in settings.items()}, data__dir=str(folder))
    return data.load_dataset(config.data)


def _layout(num_devices=2, batch_size=8, replica_batch_size=2):
    return replicas.make_layout(
        batch_size, replica_batch_size, 1, devices=jax.devices()[:num_devices]
    )[0]


def _numbers(pixels, split='train'):
    """The examples that the images of a feed show."""
    colors = np.median(pixels.reshape(-1, SIZE * SIZE, 3), axis=1)
    assert (np.abs(colors[:, 1] - _color(0, split)[1]) <= 3).all()
    return np.rint((colors[:, 0] - 4) / 8).astype(int)


# Crops.


# The golden file holds every fourth row of the images of side 224.
@pytest.mark.parametrize('name,size,rows', [('eval224', 224, 4), ('eval127', 127, 1)])
def test_center_crop_is_the_original_s(name, size, rows):
    file = golden('imagenet_preprocessing')
    pixels = decode.center_crop(file['h300w400/jpeg'].tobytes(), size)
    expected = np.clip(file[f'h300w400/{name}/center_crop_resized'], 0, 255)
    assert pixels.dtype == np.uint8 and pixels.shape == (size, size, 3)
    assert np.abs(pixels[::rows] - expected).max() <= 0.5


@pytest.mark.parametrize('window', [(10, 20, 100, 120), (50, 7, 64, 48)])
def test_window_is_the_original_s(window):
    import tensorflow as tf

    file = golden('imagenet_preprocessing')
    y, x, height, width = window
    key = f'h300w400/train_y{y}_x{x}_h{height}_w{width}/crop_resized'
    function = decode._function(lambda *_: tf.constant(window), 224)
    pixels = decode._run(function, file['h300w400/jpeg'].tobytes(), [0, 0])
    assert np.abs(pixels[::4] - np.clip(file[key], 0, 255)).max() <= 0.5


def _windows(shape, seeds):
    import tensorflow as tf

    return np.array(
        [
            decode.random_window(tf.constant([*shape, 3]), 224, tf.constant([seed, 7]))
            for seed in seeds
        ]
    )


def test_random_windows():
    """Areas and aspect ratios fill their ranges; a seed decides; the window is inside."""
    y, x, height, width = _windows((300, 400), range(400)).T
    area, aspect = height * width / (300 * 400), width / height
    assert 0.08 * 0.97 < area.min() < 0.12 and 0.9 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.78 and 1.28 < aspect.max() < 1.35
    assert (y >= 0).all() and (x >= 0).all()
    assert (y + height <= 300).all() and (x + width <= 400).all()
    assert (y > 0).any() and (x > 0).any()
    again = _windows((300, 400), [3, 3, 4])
    assert (again[0] == again[1]).all() and (again[1] != again[2]).any()


def test_an_image_without_a_window_gets_the_central_one():
    """No window of aspect 3/4 to 4/3 has 8 % of an image that is 100 times as wide as high."""
    image = np.zeros((4, 400, 3), np.uint8)
    image[:, 150:250] = 255
    encoded = _png(image)
    assert (decode.random_crop(encoded, 8, np.array([0, 0], np.int32)) == 255).all()


def _png(image):
    import io

    file = io.BytesIO()
    Image.fromarray(image).save(file, 'png')
    return file.getvalue()


def test_kinds_of_images():
    """Gray and PNG images get three channels; a palette with transparency does not matter."""
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    pixels = decode.center_crop(_png(gray), 64)
    assert pixels.shape == (64, 64, 3) and (pixels[..., 0] == pixels[..., 2]).all()


# Batches.


@pytest.mark.parametrize('augment', ['none', 'imagenet'])
def test_the_global_batch_does_not_depend_on_devices(folder, augment):
    dataset = _load(folder, augment=augment)
    feeds = [dataset.train_feed(5, 4, _layout(n)) for n in (1, 2, 4)]
    for feed in feeds:
        assert feed['pixels'].dtype == np.uint8
        for name, shape in (('pixels', (8, SIZE, SIZE, 3)), ('label', (8,))):
            np.testing.assert_array_equal(feed[name].reshape(shape), feeds[0][name].reshape(shape))
    numbers = _numbers(feeds[0]['pixels'])
    np.testing.assert_array_equal(numbers % 3, feeds[0]['label'].ravel())
    assert feeds[2]['pixels'].shape == (4, 1, 2, SIZE, SIZE, 3)


def test_an_epoch_is_a_permutation_and_any_step_can_be_the_first(folder):
    dataset, layout = _load(folder), _layout()
    steps = NUM_TRAIN // 8
    feeds = list(dataset.train_feeds(3, 0, 2 * steps, layout))
    epochs = [
        np.concatenate([_numbers(f['pixels']) for f in feeds[e * steps : (e + 1) * steps]])
        for e in (0, 1)
    ]
    assert all(len(set(e)) == 8 * steps for e in epochs) and list(epochs[0]) != list(epochs[1])
    for feed, late in zip(feeds[4:], dataset.train_feeds(3, 4, 2 * steps, layout), strict=True):
        jax.tree.map(np.testing.assert_array_equal, feed, late)
    other = dataset.train_feed(4, 0, layout)
    assert (other['pixels'] != feeds[0]['pixels']).any()


def _with_visible_windows(dataset):
    """The dataset with one and the same image everywhere, which shows what window is cut."""
    y, x = np.mgrid[:256, :256].astype(np.uint8)
    image = _png(np.stack([y, x, y], axis=-1))
    source = [(image, i % 3, f'image {i}') for i in range(NUM_TRAIN)]
    return dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, source=source))


def test_windows_differ_between_steps_and_places(folder):
    """The same example gets another window in another epoch."""
    same, layout = _with_visible_windows(_load(folder)), _layout(1)
    rows = [f['pixels'].reshape(8, -1) for f in same.train_feeds(0, 0, 6, layout)]
    assert len(np.unique(np.concatenate(rows), axis=0)) == 48


def _of_process(layout, positions):
    """The layout as a process sees it that has the devices at these positions."""
    mine = dataclasses.replace(layout)
    mine.__dict__['local_positions'] = positions
    return mine


class _Counting:
    """A source that remembers what was read."""

    def __init__(self, source):
        self._source, self.read = source, []

    def __len__(self):
        return len(self._source)

    def __getitem__(self, i):
        self.read.append(i)
        return self._source[i]


@pytest.mark.parametrize('num_processes', [1, 2, 4])
def test_each_process_reads_its_share_alone(folder, num_processes):
    dataset, layout = _with_visible_windows(_load(folder)), _layout(4)
    whole = dataset.train_feed(1, 5, layout)
    read = []
    for process in range(num_processes):
        n = 4 // num_processes
        mine = _of_process(layout, list(range(process * n, (process + 1) * n)))
        source = _Counting(dataset.train.source)
        counted = dataclasses.replace(
            dataset, train=dataclasses.replace(dataset.train, source=source)
        )
        part = counted.train_feed(1, 5, mine)
        jax.tree.map(
            lambda x, y, i=mine.local_positions: np.testing.assert_array_equal(x, y[i]), part, whole
        )
        # In the middle of the second epoch: nothing before it is read.
        assert len(source.read) == 8 // num_processes
        read += source.read
    assert len(set(read)) == 8


@pytest.mark.parametrize('batch_size,num_devices', [(4, 1), (4, 2), (8, 4), (100, 3)])
def test_evaluation_sees_every_example_once(folder, batch_size, num_devices):
    dataset = _load(folder)
    layout = _layout(num_devices, 2 * num_devices)
    seen = []
    for feed in dataset.eval_feeds(dataset.evals['test'], batch_size, layout):
        assert feed['mask'].shape == feed['label'].shape == feed['pixels'].shape[:2]
        real = feed['mask'].ravel() > 0
        numbers = _numbers(feed['pixels'].reshape(-1, SIZE, SIZE, 3)[real], 'test')
        np.testing.assert_array_equal(numbers % 3, feed['label'].ravel()[real])
        seen += list(numbers)
    assert sorted(seen) == list(range(NUM_TEST))


def test_validation_and_noise(folder):
    dataset = _load(folder, validation=True, label_noise=0.5, label_noise_kind='other')
    assert (len(dataset.train), len(dataset.evals['validation'])) == (27, 3)
    parts = [dataset.train, dataset.evals['validation']]
    assert len({part[i][2] for part in parts for i in range(len(part))}) == NUM_TRAIN
    given, true = (
        np.array([split[i][1] for i in range(27)])
        for split in (dataset.train, dataset.evals['train_true_labels'])
    )
    assert (given != true).sum() == round(0.5 * 27)
    for i in range(27):
        assert f'class{true[i]}' in dataset.train[i][2]
    # Some of some keep the labels, the noisy ones too, that they have in the whole.
    some = dataset.train.subset(np.array([20, 3, 11, 7])).subset(np.array([2, 0]))
    assert [some[i][1:] for i in range(2)] == [dataset.train[i][1:] for i in (11, 20)]


# A whole run.


def _config(folder, **overrides):
    return small_config(
        **{
            'data__name': 'folder',
            'data__dir': str(folder),
            'data__image_size': SIZE,
            'data__augment': 'imagenet',
            'batch_size': 8,
            'replica_batch_size': 4,
            'eval__batch_size': 8,
            **overrides,
        }
    )


def test_a_run_resumes_within_an_epoch(folder, tmp_path, monkeypatch):
    """Bit for bit, without reading what came before."""
    config = _config(folder, checkpoint__every_minutes=0.0)
    whole = train.train_and_evaluate(config, str(tmp_path / 'whole'), jax.devices()[:2])
    real = replicas.Layout.shard
    calls = itertools.count()

    def stop(layout, tree):
        if 'label' in tree and 'mask' not in tree and next(calls) == 4:
            os.kill(os.getpid(), 15)
        return real(layout, tree)

    with monkeypatch.context() as m:
        m.setattr(replicas.Layout, 'shard', stop)
        with pytest.raises(train.Preempted):
            train.train_and_evaluate(config, str(tmp_path / 'run'), jax.devices()[:2])
    resumed = train.train_and_evaluate(config, str(tmp_path / 'run'), jax.devices()[:2])
    assert int(resumed.step) == 6
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(whole.params), jax.device_get(resumed.params)
    )
    lines = (tmp_path / 'whole' / 'metrics.jsonl').read_text()
    assert 'test/error_rate' in lines


# SAF's memory, on the host.


SAF = dict(sam__method='saf', sam__start_epoch=0, sam__epochs_ago=1, total_epochs=3)


def test_a_memory_on_the_host(monkeypatch):
    """Of an image it knows what was said exactly so many epochs ago, as soon as it was said."""
    memory = trajectory.HostMemory(2, 5, 3, np.dtype('float32'))
    said = np.arange(12).reshape(2, 2, 3) / 8
    index = np.array([[4, 1], [0, 2]])
    memory.keep({'index': index, 'logits': said.astype(np.float16), 'epoch': np.int32(1)})
    for epoch, known in ((1, False), (2, False), (3, True), (5, False)):
        assert (memory.past(index, epoch)['known'] == known).all()
    past = memory.past(np.array([3, 2, 4]), 3)
    np.testing.assert_array_equal(past['known'], [False, True, True])
    np.testing.assert_array_equal(past['logits'][1:], [said[1, 1], said[0, 0]])
    assert past['logits'].dtype == np.float16
    other = trajectory.HostMemory(2, 5, 3, np.dtype('float32'))
    memory.keep({'index': index[:1], 'logits': 0 * said[:1], 'epoch': np.int32(2)})
    other.load({name: x.copy() for name, x in memory.arrays().items()})
    for epoch in (3, 4):
        for name, x in memory.past(index, epoch).items():
            np.testing.assert_array_equal(other.past(index, epoch)[name], x)
    assert other.past(index, 4)['known'].tolist() == [[True, True], [False, False]]
    other.forget()
    assert not any(other.past(index, epoch)['known'].any() for epoch in range(9))
    memory.check()
    monkeypatch.setattr(trajectory, 'free_host_memory', lambda: 50)
    with pytest.raises(UserError, match=r'3 logits of 5 images from 2 epochs.*sam.epochs_ago'):
        memory.check()


class _Linear(nn.Module):
    """Of the mean colour; quick to compile."""

    num_classes: int
    batch_norm_axis: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.num_classes, param_dtype=x.dtype)(x.mean(axis=(1, 2)))


def test_saf_remembers_streamed_images(folder, monkeypatch):
    """A step is fed what the network said of its images an epoch before, and learns from it."""
    monkeypatch.setattr(models, 'from_config', lambda settings, num_classes: _Linear(num_classes))
    experiment = Experiment.from_config(_config(folder, **SAF), jax.devices()[:2])
    memory, train_set, said, effects = experiment.host_memory, experiment.dataset.train, {}, []
    real = memory.keep

    def keep(kept):
        kept = jax.device_get(kept)
        logits = kept['logits'].reshape(-1, 3)
        said.update({(int(kept['epoch']), i): z for i, z in zip(kept['index'].ravel(), logits)})
        real(kept)

    monkeypatch.setattr(memory, 'keep', keep)
    state = experiment.initial_state()
    for step, feed in enumerate(experiment.feeds()):
        epoch, (index, past) = step // 3, jax.device_get((feed['index'], feed['past']))
        names = [pathlib.Path(train_set[i][2]).stem for i in index.ravel()]
        assert [*map(int, names)] == _numbers(np.asarray(feed['pixels'])).tolist()
        for i, known, z in zip(index.ravel(), past['known'].ravel(), past['logits'].reshape(-1, 3)):
            assert known == ((epoch - 1, i) in said)
            assert not known or (z == said[epoch - 1, i]).all()
        if step % 3 == 2:  # the same step, but that nothing is known
            unknown = {**past, 'known': np.zeros_like(past['known'])}
            other, _ = experiment.train_program(
                experiment.on_devices(state),
                {**feed, 'past': experiment.layout.shard(unknown)},
                *experiment.constants,
            )
            other = jax.device_get(other.params)
        state, metrics = experiment.train_step(state, feed, *experiment.constants)
        assert train_step.KEPT not in metrics and state.memory is None
        if step % 3 == 2:
            same = jax.tree.map(lambda a, b: (a == b).all(), other, jax.device_get(state.params))
            effects.append(not all(jax.tree.leaves(same)))
    assert len(said) == 9 * 8 and effects == [False, True, True]


# By default the tests above look at the parts.
@pytest.mark.slow
def test_saf_on_a_stream_resumes_bit_for_bit_on_any_devices(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(models, 'from_config', lambda settings, num_classes: _Linear(num_classes))
    config = _config(
        folder, **SAF, replica_batch_size=2, checkpoint__every_minutes=0.0, model__dtype='float64'
    )
    with jax.enable_x64(True):
        states = {
            n: train.train_and_evaluate(config, str(tmp_path / f'{n}'), jax.devices()[:n])
            for n in (1, 2, 4)
        }
        calls, real = itertools.count(), Experiment.with_past

        def stop(experiment, feed, step):
            if next(calls) == 5:
                os.kill(os.getpid(), 15)
            return real(experiment, feed, step)

        with monkeypatch.context() as m:
            m.setattr(Experiment, 'with_past', stop)
            with pytest.raises(train.Preempted):
                train.train_and_evaluate(config, str(tmp_path / 'run'), jax.devices()[:2])
        resumed = train.train_and_evaluate(config, str(tmp_path / 'run'), jax.devices()[:2])
        plain = train.train_and_evaluate(
            _config(
                folder, **{**SAF, 'sam__lam': 0.0}, replica_batch_size=2, model__dtype='float64'
            ),
            str(tmp_path / 'plain'),
            jax.devices()[:2],
        )
    assert int(resumed.step) == 9
    assert_trees_equal(*(jax.device_get(s.params) for s in (states[2], resumed)))
    for n in (1, 4):
        assert relative_distance(states[n].params, states[2].params) < 1e-9
    assert relative_distance(plain.params, states[2].params) > 1e-4


# By default test_each_process_reads_its_share_alone looks at the parts.
@pytest.mark.slow
@pytest.mark.parametrize('method', ['sam', 'saf'])
def test_two_processes_stream_the_same(method, folder, tmp_path):
    """2 processes x 2 devices against one with 4; pairs to be mixed lie on both processes."""
    own = dict(
        replica_batch_size=2,
        data__threads=2,
        eval__train_set=True,
        log_every_steps=1,
        model__dtype='float64',
        analysis__every_epochs=1,
        analysis__examples=20,
        **(SAF if method == 'saf' else {'data__mixup_alpha': 1.0}),
    )
    config = _config(folder, **own)
    flags = [
        f'--config.{key}={value}'
        for key, value in settings.flatten(config).items()
        if key.startswith(('data.', 'eval.', 'analysis.', 'sam.'))
        and key != 'sam.method'
        and value != ''
        or key
        in ('batch_size', 'replica_batch_size', 'log_every_steps', 'model.dtype', 'total_epochs')
    ]
    for num_processes, name in ((1, 'one'), (2, 'two')):
        run_processes(
            flags,
            tmp_path / name,
            num_processes,
            4 // num_processes,
            f'configs/digits.py:method={method}',
        )
    one, two = (
        [json.loads(line) for line in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()]
        for name in ('one', 'two')
    )
    assert len(one) == len(two) > 6 and 'analysis/gap' in one[-1]
    for a, b in zip(one, two):
        for key in a:
            if key not in ('time', 'analysis/seconds') and 'perf' not in key:
                # A number, or the text 'nan'.
                np.testing.assert_allclose(float(a[key]), float(b[key]), rtol=1e-8, err_msg=key)
            assert key != 'perf/input_wait' or 0 <= a[key] <= 1


# What can be wrong with the files.


def _refused(folder, *words, **settings):
    with pytest.raises(UserError) as e:
        dataset = _load(folder, **settings)
        list(dataset.train_feeds(0, 0, 3, _layout(1)))
    for word in words:
        assert word in str(e.value), str(e.value)


def test_folders_that_are_none(tmp_path):
    _refused(tmp_path / 'absent', 'data.dir', 'absent', 'train/CLASS/IMAGE')
    _refused(tmp_path, 'holds the folders none', 'train')
    (tmp_path / 'train').mkdir()
    _refused(tmp_path, 'holds the folders train', 'validation')
    (tmp_path / 'test').mkdir()
    _refused(tmp_path, '0 class folders')
    _write_image(tmp_path / 'train' / 'cat' / '1.jpg', (0, 0, 0))
    _refused(tmp_path, '1 class folder (cat)')
    (tmp_path / 'test' / 'dog').mkdir()
    _refused(tmp_path, 'test holds no images')
    _write_image(tmp_path / 'test' / 'dog' / '1.jpg', (0, 0, 0))
    assert (_load(tmp_path).num_classes, _load(tmp_path).classes) == (2, ('cat', 'dog'))


def test_hidden_files_are_no_images(tmp_path):
    for name in ('cat/1.jpg', 'dog/1.jpg', 'cat/._1.jpg', '.ipynb_checkpoints/1.jpg'):
        for split in ('train', 'test'):
            _write_image(tmp_path / split / name, (0, 0, 0))
    dataset = _load(tmp_path)
    assert dataset.classes == ('cat', 'dog')
    assert (len(dataset.train), len(dataset.evals['test'])) == (2, 2)


@pytest.fixture
def damaged(folder, tmp_path):
    """The same folder with a training and a test image cut short and one that is no image."""
    import shutil

    root = tmp_path / 'damaged'
    shutil.copytree(folder, root)
    for name in ('train/class0/003.jpg', 'test/class1/001.jpg'):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])
    (root / 'train/class2/005.jpg').write_bytes(b'no image at all')
    return root


def test_a_file_that_has_gone(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / 'copy')
    dataset = _load(tmp_path / 'copy')
    (tmp_path / 'copy/train/class0/000.jpg').unlink()
    with pytest.raises(UserError, match='class0/000.jpg cannot be read: No such file'):
        list(dataset.train_feeds(0, 0, 4, _layout(1)))


def test_a_damaged_image_ends_the_run_by_name(damaged):
    dataset, layout = _load(damaged), _layout(1)
    with pytest.raises(UserError, match=r'class0/003.jpg|class2/005.jpg') as e:
        list(dataset.train_feeds(0, 0, 4, layout))
    assert 'cannot be decoded' in str(e.value) and 'data.skip_corrupt=True' in str(e.value)
    with pytest.raises(UserError, match='test/class1/001.jpg'):
        list(dataset.eval_feeds(dataset.evals['test'], 4, layout))


def test_damaged_images_are_passed_over_and_counted(damaged, folder, caplog):
    caplog.set_level(logging.WARNING, 'sam_jax')
    dataset, layout = _load(damaged, skip_corrupt=True), _layout(1)
    feeds = list(dataset.train_feeds(0, 0, 6, layout))
    sound = list(_load(folder).train_feeds(0, 0, 6, layout))
    order = [dataset.train.source[i][2] for i in range(NUM_TRAIN)]
    bad = {i for i, name in enumerate(order) if name.endswith(('0/003.jpg', '2/005.jpg'))}
    replaced = 0
    for step, (feed, other) in enumerate(zip(feeds, sound)):
        index = dataset.train_index(0, step, layout).ravel()
        for k, i in enumerate(index):
            mine, same = (f['pixels'].reshape(8, SIZE, SIZE, 3)[k] for f in (feed, other))
            while i in bad:  # the next one takes its place
                i, same = (i + 1) % NUM_TRAIN, None
            replaced += same is None
            if same is not None:
                np.testing.assert_array_equal(mine, same)
            number = int(pathlib.Path(order[i]).stem)
            assert _numbers(mine)[0] == number
            assert feed['label'].ravel()[k] == number % 3
    assert replaced
    assert len(dataset.corrupt) == 2 and len(caplog.records) == 2  # each is named once
    assert 'number 2 so far' in caplog.text and 'class0/003.jpg' in caplog.text
    masks = [f['mask'].sum() for f in dataset.eval_feeds(dataset.evals['test'], 4, layout)]
    assert sum(masks) == NUM_TEST - 1 and len(dataset.corrupt) == 3


def test_a_dataset_that_is_damaged_as_a_whole(folder, tmp_path):
    dataset = _load(folder, skip_corrupt=True)
    broken = dataclasses.replace(
        dataset,
        train=dataclasses.replace(
            dataset.train, source=[(b'broken', 0, f'image {i}') for i in range(NUM_TRAIN)]
        ),
    )
    with pytest.raises(UserError, match='100 training images in a row'):
        broken.train_feed(0, 0, _layout(1))


# TensorFlow datasets.


def test_damaged_array_record(tmp_path):
    _prepare('food101', str(tmp_path), {'train': 30, 'validation': 2})
    [path] = tmp_path.rglob('food101-train.array_record*')
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    _refused(
        tmp_path, 'of food101 (train) cannot be read', 'prepare the dataset again', name='food101'
    )


def _prepare(name, data_dir, counts, file_format='array_record', label=None):
    """Writes a small dataset of JPEGs where TFDS's registered builder finds it."""
    import tensorflow_datasets as tfds

    registered = tfds.builder(name, data_dir=data_dir)
    features = registered.info.features
    blank = {
        'file_name': '',
        'image/filename': '',
        'label_name': '',
        'id': '',
        'species': 0,
        'segmentation_mask': np.zeros((20, 30, 1), np.uint8),
    }

    with tfds.core.registered.skip_registration():

        class Small(tfds.core.GeneratorBasedBuilder):
            VERSION = registered.version

            def _info(self):
                kept = {k: features[k] for k in features if k in ('image', 'label', *blank)}
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(kept)
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split, n) for split, n in counts.items()}

            def _generate_examples(self, split, n):
                for i in range(n):
                    color = _color(i, 'test' if split == counts_test else 'train')
                    example = {
                        **blank,
                        'image': np.full((20, 30, 3), color, np.uint8),
                        'label': i % 3,
                    }
                    yield i, {k: example[k] for k in self.info.features}

    counts_test = list(counts)[-1]
    Small.name = name
    Small(data_dir=data_dir, file_format=file_format).download_and_prepare()


@pytest.mark.parametrize('name', [n for n in records.STREAMS if n != 'folder'])
def test_tfds_dataset_on_disk(name, tmp_path):
    stream = records.STREAMS[name]
    counts = dict.fromkeys(stream.train.split('+'), 15)
    _prepare(stream.tfds_name, str(tmp_path), {**counts, stream.test: 7})
    dataset = _load(tmp_path, name=name)
    assert dataset.num_classes == stream.num_classes
    assert dataset.num_train_examples == 15 * len(counts)
    feed = dataset.train_feed(0, 0, _layout(1))
    np.testing.assert_array_equal(_numbers(feed['pixels']) % 3, feed['label'].ravel())
    labels = [dataset.train[i][1] for i in range(dataset.num_train_examples)]
    assert np.bincount(labels).tolist() == [5 * len(counts)] * 3
    test = next(dataset.eval_feeds(dataset.evals['test'], 100, _layout(1)))
    assert sorted(_numbers(test['pixels'], 'test')) == list(range(7))


def test_tfrecord_files_are_refused_with_the_way_out(tmp_path):
    _prepare('food101', str(tmp_path), {'train': 4, 'validation': 2}, 'tfrecord')
    _refused(
        tmp_path, 'tfrecord files', 'convert_format', "file_format='array_record'", name='food101'
    )


def test_a_missing_dataset_or_split(tmp_path):
    _refused(
        tmp_path, 'Dataset imagenet2012 is not in', "file_format='array_record'", name='imagenet'
    )
    _prepare('oxford_flowers102', str(tmp_path), {'train': 4, 'test': 2})
    _refused(tmp_path, 'has no split validation; it has test, train', name='flowers')


def test_a_label_outside_of_the_classes(tmp_path, monkeypatch):
    _prepare('food101', str(tmp_path), {'train': 30, 'validation': 2})
    monkeypatch.setitem(
        records.STREAMS, 'food101', dataclasses.replace(records.STREAMS['food101'], num_classes=2)
    )
    _refused(tmp_path, 'has the label 2', 'below 2', name='food101')
