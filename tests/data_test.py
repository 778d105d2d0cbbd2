"""Datasets, augmentation against the original, the order of examples, TFDS files."""

import dataclasses
import functools
import hashlib
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden, small_config
from scipy import stats

from sam_jax import data, replicas, rngs, train_state, train_step
from sam_jax.data import augment, resident
from sam_jax.data import dataset as dataset_lib
from sam_jax.errors import UserError

# Smallest p of a chi-square test that passes; seeds are fixed, so a test passes always or never.
P_VALUE = 1e-3

# sha256 over train and test, images and labels: the split never changes.
DIGITS_HASH = '8eda44600345aacab4f47b3de1f0efd0518cbaef25081c8869a1c30b74d33de4'


def _load(seed=0, **settings):
    config = small_config(
        **{f'data__{name}': value for name, value in settings.items()}, data__label_noise_seed=seed
    )
    return data.load_dataset(config.data)


def _layout(num_devices, batch_size=64, replica_batch_size=8, replicas_per_group=1):
    return replicas.make_layout(
        batch_size, replica_batch_size, replicas_per_group, devices=jax.devices()[:num_devices]
    )[0]


def _of_size(n, augmentation='none', images=None, **options):
    """A dataset of n examples whose label is their index."""
    if images is None:
        images = np.zeros((n, 8, 8, 1), np.uint8)
    split = resident.Split(images, np.arange(n, dtype=np.int32))
    recipe = augment.Augmentation(augmentation, padding=2, cutout_size=2, **options)
    return data.ResidentDataset('fake', n, (0.0,), (1.0,), images.shape[1:], split, {}, recipe)


def _assert_uniform(counts, cells=None):
    assert cells in (None, np.size(counts)), counts
    assert stats.chisquare(np.ravel(counts)).pvalue > P_VALUE, counts


# Random numbers.


def test_every_key_is_another():
    ids = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    named = list(itertools.product([0, 1, 2**32 - 1], ['init', 'augment'], ids))
    keys = [jax.random.key_data(rngs.key(seed, purpose, *i)) for seed, purpose, i in named]
    assert len({key.tobytes() for key in map(np.asarray, keys)}) == len(named)
    for length in (1, 2):  # of the ids: NumPy fills up with zeros, so (0,) draws what (0, 0) does
        alike = [name for name in named if len(name[2]) == length]
        drawn = [rngs.permutation(seed, purpose, 50, *i) for seed, purpose, i in alike]
        assert len({order.tobytes() for order in drawn}) == len(alike)


@pytest.mark.parametrize('seed', [0, 5, 2**31, 2**32 - 1])
def test_a_traced_seed_gives_the_same_key(seed):
    traced = jax.jit(lambda seed, step: jax.random.key_data(rngs.key(seed, 'augment', step)))
    np.testing.assert_array_equal(
        traced(jnp.uint32(seed), 3), jax.random.key_data(rngs.key(seed, 'augment', 3))
    )


# Digits.


@pytest.mark.parametrize('seed', [0, 7])
def test_digits_split(seed):
    dataset = _load(seed)
    train, test = dataset.train, dataset.evals['test']
    assert (len(train), len(test), dataset.num_classes) == (1297, 500, 10)
    assert train.images.shape == (1297, 8, 8, 1) == (len(train), *dataset.image_shape)
    assert {x.dtype for x in (train.images, test.images)} == {np.dtype(np.uint8)}
    assert {x.dtype for x in (train.labels, test.labels)} == {np.dtype(np.int32)}
    assert (train.images.min(), train.images.max()) == (0, 255)
    digest = hashlib.sha256()
    for split in (train, test):
        digest.update(split.images.tobytes())
        digest.update(split.labels.tobytes())
    assert digest.hexdigest() == DIGITS_HASH


def test_digits_split_is_stratified_and_covers_the_source():
    from sklearn import datasets

    digits = datasets.load_digits()
    dataset = _load()
    train, test = dataset.train, dataset.evals['test']
    share = np.bincount(digits.target) * 500 / 1797
    assert (np.abs(np.bincount(test.labels) - share) < 1).all()

    def multiset(images, labels):
        rows = np.column_stack([np.reshape(images, (len(labels), 64)), labels]).astype(int)
        return sorted(map(tuple, rows))

    # Every example of the source lies in one of the two, and in one only.
    both = [
        np.concatenate([getattr(s, name) for s in (train, test)]) for name in ('images', 'labels')
    ]
    assert multiset(np.rint(both[0] * (16 / 255)), both[1]) == multiset(
        digits.images, digits.target
    )


@pytest.mark.parametrize('name', ['digits', 'fake_cifar10'])
def test_constants_agree_with_the_data(name):
    dataset = _load(name=name)
    pixels = dataset.train.images / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=(0, 1, 2)), atol=2e-3)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=(0, 1, 2)), atol=2e-3)


def test_fake_cifar():
    dataset = _load(name='fake_cifar10')
    train, test = dataset.train, dataset.evals['test']
    assert (train.images.shape, len(test)) == ((5000, 32, 32, 3), 1000)
    assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int32)
    _assert_uniform(np.bincount(train.labels), dataset.num_classes)
    np.testing.assert_array_equal(train.images, _load(1, name='fake_cifar10').train.images)


@pytest.mark.parametrize(
    'change,message',
    [
        (
            {'images': np.zeros((9, 8, 8, 1), np.float32)},
            r'images of the train .* float32 \(9, 8, 8',
        ),
        (
            {'images': np.zeros((9, 8, 8), np.uint8)},
            r'uint8 \(9, 8, 8\); they must be uint8 \(N, hei',
        ),
        (
            {'labels': np.zeros((9, 10), np.int32)},
            r'labels of the train split of digits .* \(9, 10\)',
        ),
        (
            {'labels': np.zeros(9, np.float32)},
            r'labels of .* float32 \(9,\); they must be integers',
        ),
        ({'labels': np.zeros(8, np.int64)}, r'int64 \(8,\); .* one for each of the 9 images'),
        (
            {'images': np.zeros((9, 8, 8, 3), np.uint8)},
            '3 channels, and its Source 1 means and 1 dev',
        ),
        (
            {'images': np.zeros((0, 8, 8, 1), np.uint8), 'labels': np.zeros(0, int)},
            'train .* is empty',
        ),
        ({'labels': np.full(9, 10)}, 'Example 0 of the train split of digits has the label 10'),
        ({'labels': np.zeros(9, np.uint8)}, None),
    ],
)
def test_what_a_source_has_read(change, message, monkeypatch):
    right = {'images': np.zeros((9, 8, 8, 1), np.uint8), 'labels': np.zeros(9, np.int32)}
    splits = resident.Split(**{**right, **change}), resident.Split(**right)
    monkeypatch.setitem(
        data.SOURCES,
        'digits',
        dataclasses.replace(data.SOURCES['digits'], read=lambda data_dir: splits),
    )
    if message is None:
        assert _load().num_train_examples == 9
        return
    with pytest.raises(UserError, match=message) as e:
        _load()
    assert str(e.value).endswith('.')


# Validation split.


@pytest.mark.parametrize('noise', [0.0, 0.4])
def test_validation_is_the_last_tenth(noise):
    clean, split = _load(), _load(validation=True, label_noise=noise)
    assert (split.num_train_examples, len(split.evals['validation'])) == (1168, 129)
    np.testing.assert_array_equal(split.evals['validation'].images, clean.train.images[1168:])
    np.testing.assert_array_equal(split.evals['validation'].labels, clean.train.labels[1168:])
    np.testing.assert_array_equal(split.train.images, clean.train.images[:1168])
    changed = split.train.labels != clean.train.labels[:1168]
    assert changed.any() == (noise > 0)
    np.testing.assert_array_equal(split.evals['test'].labels, clean.evals['test'].labels)


# Augmentation and normalisation against the original code.


@pytest.mark.parametrize('name', [n for n in golden('augmentation_basic') if 'weak/' in n])
def test_flip_pad_crop_equal_the_original(name):
    file = golden('augmentation_basic')
    flipped, dy, dx = (int(part.lstrip('flipdyx')) for part in name.split('/')[1].split('_'))
    image = augment.shift(augment.flip(file['image'], bool(flipped)), 4, dy, dx)
    np.testing.assert_array_equal(image, file[name])


@pytest.mark.parametrize('name', ['svhn', 'fashion_mnist'])
def test_normalisation_of_further_datasets(name):
    file, source = golden('augmentation_cutout'), data.SOURCES[name]
    theirs = file[f'preprocess/{name}/image']
    pixels = file['batch/image']
    if name == 'fashion_mnist':
        pixels = pixels[:, :28, :28, :1]
    ours = augment.normalize(pixels, source.mean, source.std)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_normalisation_equals_the_original(name):
    file, source = golden('augmentation_basic'), data.SOURCES[name]
    ours = augment.normalize(file['batch/image'], source.mean, source.std)
    np.testing.assert_allclose(ours, file[f'preprocess/{name}/image'], rtol=0, atol=5e-7)
    split = resident.Split(file['batch/image'], file['batch/label'].astype(np.int32))
    dataset = data.ResidentDataset(
        name,
        source.num_classes,
        source.mean,
        source.std,
        split.images.shape[1:],
        split,
        {},
        augment.Augmentation('none'),
    )
    arrays, index = dataset.device_arrays(split), np.array([[5, 1], [0, 3]])
    keys = jax.vmap(jax.random.key)(np.arange(4)).reshape(2, 2)
    feed = {'index': index, 'label': split.labels[index], 'mask': np.ones((2, 2))}
    for batch in (
        jax.jit(dataset.eval_batch)(arrays, feed),
        jax.jit(dataset.train_batch)(arrays, feed, keys, keys[0, 0]),
    ):
        np.testing.assert_allclose(
            batch['image'], file[f'preprocess/{name}/image'][index], rtol=0, atol=5e-7
        )
        np.testing.assert_array_equal(batch['label'], file['batch/label'][index])


@pytest.mark.parametrize('name', ['digits', 'cifar10'])
def test_to_pixels_undoes_the_normalisation(name):
    source = data.SOURCES[name]
    pixels = np.random.RandomState(0).randint(0, 256, (5, 4, 4, len(source.mean)), np.uint8)
    dataset = dataclasses.replace(_of_size(5), mean=source.mean, std=source.std)
    back = dataset.to_pixels(augment.normalize(pixels, source.mean, source.std))
    np.testing.assert_allclose(back, pixels / 255, rtol=0, atol=1e-6)


def test_none_changes_nothing():
    images = golden('augmentation_basic')['image'][None]
    result = augment.augment(images, jax.random.key(0)[None], augment.Augmentation('none'))
    np.testing.assert_array_equal(result, images)


def test_basic_draws_each_flip_and_offset_equally_often():
    size, padding, n = 6, 2, 5000
    image = jnp.arange(size * size, dtype=jnp.uint8).reshape(size, size, 1)
    keys = jax.vmap(functools.partial(jax.random.fold_in, rngs.key(0, 'augment', 0)))(jnp.arange(n))
    results = jax.jit(jax.vmap(lambda key: augment.basic(image, key, padding)))(keys)
    choices = list(itertools.product([0, 1], range(2 * padding + 1), range(2 * padding + 1)))
    outcome = {
        np.asarray(augment.shift(augment.flip(image, f == 1), padding, y, x)).tobytes(): i
        for i, (f, y, x) in enumerate(choices)
    }
    assert len(outcome) == len(choices) == 50
    counts = np.bincount([outcome[r.tobytes()] for r in np.asarray(results)], minlength=50)
    counts = counts.reshape(2, 2 * padding + 1, 2 * padding + 1)
    for axes in [(1, 2), (0, 2), (0, 1), ()]:  # flips, dy, dx, and all together
        _assert_uniform(counts.sum(axis=axes))


# The order of the training examples.


@pytest.mark.parametrize('n,batch_size', [(640, 64), (1297, 64), (64, 64), (129, 128)])
def test_an_epoch_tiles_a_permutation(n, batch_size):
    dataset, layout = _of_size(n), _layout(8, batch_size)
    steps = n // batch_size
    epochs = [
        np.concatenate(
            [dataset.train_feed(0, e * steps + i, layout)['index'].ravel() for i in range(steps)]
        )
        for e in range(3)
    ]
    for order in epochs:
        assert order.dtype == np.int32
        assert len(order) == steps * batch_size == len(set(order.tolist()))
        assert set(order.tolist()) <= set(range(n))
    for a, b in itertools.combinations(epochs, 2):
        assert np.mean(a == b) < 0.1
    _assert_uniform(np.histogram(epochs[0][:batch_size], 4, (0, n))[0])


def test_the_order_depends_on_seed_and_epoch_alone():
    dataset, layout = _of_size(256), _layout(8)
    steps = [(seed, step) for seed in (0, 1) for step in range(12)]
    forwards = {s: dataset.train_feed(*s, layout)['index'] for s in steps}
    dataset_lib._epoch_order.cache_clear()
    for s in reversed(steps):  # a restart at any step, in any order
        np.testing.assert_array_equal(dataset.train_feed(*s, layout)['index'], forwards[s])
    for step in range(12):
        assert (forwards[0, step] != forwards[1, step]).any()
    other = dataclasses.replace(dataset, augmentation=augment.Augmentation('basic'), mean=(0.5,))
    np.testing.assert_array_equal(other.train_feed(1, 5, layout)['index'], forwards[1, 5])


@pytest.mark.parametrize('step', [0, 3, 29])
def test_the_global_batch_does_not_depend_on_devices(step):
    dataset = _of_size(1297)
    batches = [dataset.train_feed(5, step, _layout(n))['index'] for n in (1, 2, 4, 8)]
    for n, batch in zip([1, 2, 4, 8], batches):
        assert batch.shape == (n, 8 // n, 8)
        np.testing.assert_array_equal(batch.ravel(), batches[0].ravel())


def test_a_process_receives_the_rows_of_its_devices():
    dataset, whole = _of_size(256), _layout(4)
    mine = types.SimpleNamespace(
        devices=whole.devices,
        num_replicas=8,
        replica_batch_size=8,
        replicas_per_device=2,
        local_positions=[1, 2],
    )
    np.testing.assert_array_equal(
        dataset.train_feed(0, 6, mine)['index'], dataset.train_feed(0, 6, whole)['index'][1:3]
    )
    for ours, all_of_it in zip(
        dataset.eval_feeds(dataset.train, 100, mine),
        dataset.eval_feeds(dataset.train, 100, whole),
        strict=True,
    ):
        for name in ('index', 'mask'):
            np.testing.assert_array_equal(ours[name], all_of_it[name][1:3])


def _batches(dataset, layout):
    """(seed, step) -> the batch and the dropout keys of that training step, by place."""
    make = functools.partial(train_step.keyed_replicas, layout=layout, batch_fn=dataset.train_batch)
    compiled = jax.pmap(
        lambda *args: {
            **(batch := make(*args)),
            'rngs': None,
            'group_key': None,
            'key': jax.random.key_data(batch['rngs']['dropout']),
        },
        axis_name=replicas.AXIS,
        in_axes=(None, 0, None, None),
        devices=layout.devices,
    )

    def batch(seed, step):
        result = compiled(
            jnp.int32(step),
            dataset.train_feed(seed, step, layout),
            dataset.device_arrays(dataset.train),
            train_state.HParams.from_config(small_config(seed=seed)),
        )
        return {
            name: np.asarray(x).reshape(-1, *x.shape[2 if name == 'key' else 3 :])
            for name, x in result.items()
            if x is not None
        }

    return batch


@pytest.mark.parametrize(
    'recipe,options',
    [
        ('basic', {}),
        ('autoaugment_cutout', {}),
        ('randaugment', {}),
        ('basic', {'mixup_alpha': 1.0}),
        ('basic', {'cutmix_alpha': 1.0, 'mix_per_image': True}),
    ],
)
def test_augmentation_depends_on_seed_step_and_place_alone(recipe, options):
    image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    dataset = _of_size(640, recipe, np.broadcast_to(image, (640, 8, 8, 1)), **options)
    one, two, eight = (_batches(dataset, _layout(n)) for n in (1, 2, 8))
    reference = eight(0, 3)
    for batch in (one(0, 3), two(0, 3)):
        for name in ('image', 'label', 'key'):
            np.testing.assert_array_equal(batch[name], reference[name])
    # 50 outcomes for 64 examples: about 36 different ones, if each example has its own key.
    assert len(np.unique(reference['image'].reshape(64, -1), axis=0)) > 25
    assert len(np.unique(reference['key'], axis=0)) == 8
    for seed, step in [(0, 4), (1, 3)]:
        other = eight(seed, step)
        assert np.mean((other['image'] != reference['image']).any(axis=(1, 2, 3))) > 0.7
        assert (other['key'] != reference['key']).any()


# Evaluation.


@pytest.mark.parametrize('num_devices', [1, 3, 8])
@pytest.mark.parametrize('n,batch_size', [(500, 512), (500, 64), (7, 512), (1, 1), (24, 24)])
def test_evaluation_sees_every_example_once(n, batch_size, num_devices):
    dataset, layout = _of_size(n), _layout(num_devices, 24, 1)
    feeds = list(dataset.eval_feeds(dataset.train, batch_size, layout))
    (shape,) = {feed[name].shape for feed in feeds for name in feed}
    held = min(batch_size, n)
    assert shape == (num_devices, -(-held // num_devices))
    assert len(feeds) == -(-n // (shape[0] * shape[1]))
    index = np.concatenate([feed['index'].ravel() for feed in feeds])
    mask = np.concatenate([feed['mask'].ravel() for feed in feeds])
    assert (index.dtype, mask.dtype) == (np.int32, np.float32)
    assert (0 <= index).all() and (index < n).all()
    assert set(mask) <= {0.0, 1.0}
    assert sorted(index[mask == 1]) == list(range(n))


# TensorFlow datasets on disk.


def _prepare(name, data_dir, counts, file_format='tfrecord'):
    """Writes a small dataset in TFDS's own format where the registered builder finds it."""
    import tensorflow_datasets as tfds

    registered = tfds.builder(name, data_dir=data_dir)
    with tfds.core.registered.skip_registration():

        class Small(tfds.core.GeneratorBasedBuilder):
            VERSION = registered.version

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=registered.info.features)

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split, n) for split, n in counts.items()}

            def _generate_examples(self, split, n):
                for i in range(n):
                    example = {
                        'id': f'{split}{i}',
                        'label': i % 10,
                        'coarse_label': 0,
                        'image': np.random.RandomState(i).randint(
                            0, 256, self.info.features['image'].shape, np.uint8
                        ),
                    }
                    example['image'][0, :3, 0] = i, list(counts).index(split), i % 10
                    yield i, {key: example[key] for key in self.info.features}

    Small.name = name
    Small(data_dir=data_dir, file_format=file_format).download_and_prepare()


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
    place = tmp_path_factory.mktemp('tfds')
    for name in ('cifar10', 'cifar100', 'fashion_mnist'):
        _prepare(name, str(place), {'train': 60, 'test': 20})
    _prepare('svhn_cropped', str(place), {'train': 60, 'test': 20, 'extra': 90})
    return place


def test_svhn_trains_on_extra_and_validates_on_train(tfds_dir, monkeypatch):
    """All 150 without a validation split; with it the last of `train` alone are held out."""
    source = dataclasses.replace(data.SOURCES['svhn'], validation_size=10)
    assert data.SOURCES['svhn'].validation_size == 73257 - 65929
    monkeypatch.setitem(data.SOURCES, 'svhn', source)
    dataset = _load(name='svhn', dir=str(tfds_dir))
    assert dataset.num_train_examples == 150
    assert set(dataset.evals) == {'test', 'train'} and len(dataset.evals['test']) == 20
    dataset = _load(name='svhn', dir=str(tfds_dir), validation=True)
    assert dataset.num_train_examples == 140
    held_out = dataset.evals['validation'].images[:, 0, :3, 0]
    assert (held_out[:, 1] == 0).all() and len(held_out) == 10  # of the first split, `train`
    rest = dataset.train.images[:, 0, :3, 0]
    assert np.bincount(rest[:, 1], minlength=3).tolist() == [50, 0, 90]
    assert dataset.augmentation.policy == 'svhn'


@pytest.mark.parametrize(
    'name,num_classes,shape',
    [
        ('cifar10', 10, (32, 32, 3)),
        ('cifar100', 100, (32, 32, 3)),
        ('fashion_mnist', 10, (28, 28, 1)),
    ],
)
def test_tfds_dataset_on_disk(tfds_dir, name, num_classes, shape):
    dataset = _load(name=name, dir=str(tfds_dir), validation=True)
    assert (dataset.num_classes, dataset.image_shape) == (num_classes, shape)
    train, validation, test = (dataset.train, *map(dataset.evals.get, ('validation', 'test')))
    assert [len(s) for s in (train, validation, test)] == [54, 6, 20]
    for split, part in [(train, 0), (validation, 0), (test, 1)]:
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        number, is_test, label = np.moveaxis(split.images[:, 0, :3, 0], -1, 0)
        assert (is_test == part).all()
        np.testing.assert_array_equal(split.labels, label)
        for i, image in zip(number, split.images):
            expected = np.random.RandomState(i).randint(0, 256, shape, np.uint8)
            np.testing.assert_array_equal(image[1:], expected[1:])
    numbers = np.concatenate([train.images[:, 0, 0, 0], validation.images[:, 0, 0, 0]])
    assert sorted(numbers) == list(range(60))
    again = _load(name=name, dir=str(tfds_dir), validation=True)
    np.testing.assert_array_equal(again.train.images, train.images)


def test_any_file_format(tfds_dir, tmp_path):
    _prepare('cifar10', str(tmp_path), {'train': 60, 'test': 20}, 'array_record')
    files = [p.name for p in tmp_path.rglob('*cifar10-train*')]
    assert files and all('array_record' in name for name in files)
    one, other = (_load(name='cifar10', dir=str(place)) for place in (tmp_path, tfds_dir))
    for name in ('train', 'test'):
        a, b = (np.argsort(d.evals[name].images[:, 0, 0, 0]) for d in (one, other))
        np.testing.assert_array_equal(one.evals[name].images[a], other.evals[name].images[b])
        np.testing.assert_array_equal(one.evals[name].labels[a], other.evals[name].labels[b])


def test_a_missing_split(tmp_path):
    _prepare('cifar10', str(tmp_path), {'train': 20})
    with pytest.raises(UserError, match='cifar10 in .* has no split test; it has train'):
        _load(name='cifar10', dir=str(tmp_path))


@pytest.mark.parametrize('file_format', ['tfrecord', 'array_record'])
def test_damaged_files(file_format, tmp_path):
    _prepare('cifar10', str(tmp_path), {'train': 60, 'test': 20}, file_format)
    [path] = tmp_path.rglob(f'cifar10-train.{file_format}*')
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match='The train split of cifar10 .* cannot be read .*again'):
        _load(name='cifar10', dir=str(tmp_path))


def test_labels_outside_of_the_classes(tfds_dir, monkeypatch):
    monkeypatch.setitem(
        data.SOURCES, 'cifar10', dataclasses.replace(data.SOURCES['cifar10'], num_classes=7)
    )
    with pytest.raises(UserError, match='train split of cifar10 has the label [789]; .* below 7'):
        _load(name='cifar10', dir=str(tfds_dir))


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_a_missing_dataset_says_what_to_run(name, tmp_path):
    with pytest.raises(UserError) as e:
        _load(name=name, dir=str(tmp_path))
    for part in (
        f'Dataset {name} is not in {tmp_path}',
        'config.data.dir',
        'python -c "',
        f"tfds.builder('{name}', data_dir='{tmp_path}').download_and_prepare()\"",
    ):
        assert part in str(e.value)


def test_a_missing_dataset_names_the_default_folder(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
    with pytest.raises(UserError, match=f"cifar10 is not in {tmp_path} .*data.dir is ''"):
        _load(name='cifar10', dir='')


def test_the_command_for_a_missing_dataset_can_start(tmp_path):
    # tensorflow_datasets imports importlib_resources there, which neither it nor, any more, etils
    # asks for: requirements.txt must.
    import tensorflow_datasets as tfds

    assert tfds.builder('cifar10', data_dir=str(tmp_path)).url_infos
