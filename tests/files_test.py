"""Datasets of one's own in IDX, npz and Hugging Face files; parts of a dataset; resuming on it."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import tracemalloc

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal, small_config
from PIL import Image

from sam_jax import data, train
from sam_jax.data import files, huggingface, load, records, sources
from sam_jax.errors import UserError
from sam_jax.experiments import results

NAMES = {
    ('train', 'images'): 'train-images-idx3-ubyte',
    ('train', 'labels'): 'train-labels-idx1-ubyte',
    ('test', 'images'): 't10k-images-idx3-ubyte',
    ('test', 'labels'): 't10k-labels-idx1-ubyte',
}


def _arrays(shape=(6, 5), num_classes=3, counts=(30, 9)):
    """{(split, kind): array} of random images, each with its number in its first pixel."""
    random, result = np.random.default_rng(0), {}
    for split, n in zip(('train', 'test'), counts):
        images = random.integers(0, 256, (n, *shape), np.uint8)
        images.reshape(n, -1)[:, 0] = np.arange(n)
        result[split, 'images'] = images
        result[split, 'labels'] = (np.arange(n) % num_classes).astype(np.uint8)
    return result


def _idx(array, shape=None, kind=8):
    shape = array.shape if shape is None else shape
    return (
        bytes([0, 0, kind, len(shape)]) + struct.pack(f'>{len(shape)}I', *shape) + array.tobytes()
    )


def _write_idx(folder, arrays, packed=True, prefix=''):
    for key, array in arrays.items():
        name = prefix + NAMES[key].replace('idx3', f'idx{array.ndim}')
        content = _idx(array)
        path = folder / (name + '.gz' * packed)
        path.write_bytes(gzip.compress(content) if packed else content)


def _write_npz(path, arrays, **change):
    named = {
        ('test_' if split == 'test' else '') + kind: array
        for (split, kind), array in arrays.items()
    }
    named.update(change)
    np.savez(path, **{name: x for name, x in named.items() if x is not None})


def _load(name, place, **settings):
    config = small_config(
        data__name=name,
        data__dir=str(place),
        **{f'data__{key}': value for key, value in settings.items()},
    )
    return data.load_dataset(config.data)


def _refused(name, place, *words, **settings):
    with pytest.raises(UserError) as e:
        _load(name, place, **settings)
    message = str(e.value)
    assert all(word in message for word in words), message
    assert '\n' not in message and message.endswith(('.', '"')), message


def _assert_holds(dataset, arrays, num_classes=3):
    """The dataset has these examples, each image with its label."""
    assert dataset.num_classes == num_classes
    for name in ('train', 'test'):
        split, images = dataset.evals[name], arrays[name, 'images']
        order = np.argsort(split.images.reshape(len(split), -1)[:, 0])
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
        np.testing.assert_array_equal(
            split.images[order], images.reshape(*images.shape[:3], -1), strict=True
        )
        np.testing.assert_array_equal(split.labels[order], arrays[name, 'labels'])


def _assert_moments(dataset, arrays):
    images = arrays['train', 'images'] / 255
    pixels = images.reshape(-1, 1 if images.ndim == 3 else 3)
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, pixels.std(0), rtol=1e-12)


# IDX.


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('shape,prefix', [((6, 5), ''), ((6, 5, 3), ''), ((4, 4), 'emnist-mnist-')])
def test_idx(shape, packed, prefix, tmp_path):
    arrays = _arrays(shape)
    _write_idx(tmp_path, arrays, packed, prefix)
    dataset = _load('idx', tmp_path)
    _assert_holds(dataset, arrays)
    _assert_moments(dataset, arrays)


def test_the_order_mixes_the_classes_and_is_always_the_same(tmp_path):
    arrays = _arrays(counts=(200, 9))
    arrays['train', 'labels'].sort()
    _write_idx(tmp_path, arrays)
    one, other = (_load('idx', tmp_path, validation=True) for _ in range(2))
    assert one.num_train_examples == 180
    assert len(np.unique(one.evals['validation'].labels)) == 3
    np.testing.assert_array_equal(one.train.images, other.train.images)


def test_both_forms_of_a_file_are_one(tmp_path):
    arrays = _arrays()
    for packed in (True, False):
        _write_idx(tmp_path, arrays, packed)
    _assert_holds(_load('idx', tmp_path), arrays)


def _gz(change):
    """A damage to the gzip file of the training images."""
    return lambda content: change(gzip.compress(content))


IMAGES = 30 * 6 * 5
DAMAGES = {
    'cut': (lambda c: c[:-7], ['is cut off', '30 x 6 x 5', f'{IMAGES - 7} are there']),
    'longer': (lambda c: c + b'x', ['goes on after the 30 x 6 x 5 bytes']),
    'cut, packed': (_gz(lambda c: c[:-40]), ['damaged']),
    'longer, packed': (lambda c: gzip.compress(c + b'x'), ['goes on after']),
    'shorter, packed': (lambda c: gzip.compress(c[:-1]), ['is cut off']),
    'checksum': (_gz(lambda c: c[:-8] + b'abcd' + c[-4:]), ['damaged']),
    'bits': (_gz(lambda c: c[:60] + bytes(x ^ 255 for x in c[60:90]) + c[90:]), ['damaged']),
    'rubbish after': (_gz(lambda c: c + b'rubbish'), ['damaged']),
    'empty': (lambda c: b'', ['no IDX file', 'none']),
    'text': (lambda c: b'<html>', ['no IDX file', '3c68746d']),
    'header': (lambda c: c[:9], ['ends within its header']),
    'floats': (lambda c: c[:2] + b'\x0d' + c[3:], ['0x0d', '0x08']),
    'labels': (lambda c: _idx(np.zeros(30, np.uint8)), ['uint8 (30,)', 'height']),
    'channels': (lambda c: _idx(np.zeros((30, 2, 2, 2), np.uint8)), ['1 or 3 channels']),
    'no images': (lambda c: _idx(np.zeros((0, 6, 5), np.uint8)), ['there are none']),
    'no pixels': (lambda c: _idx(np.zeros((30, 0, 5), np.uint8)), ['there are none']),
    'count': (lambda c: _idx(np.zeros((29, 6, 5), np.uint8)), ['29 images', '30 labels']),
    'size': (lambda c: _idx(np.zeros((30, 5, 6), np.uint8)), ['(5, 6, 1)', '(6, 5, 1)']),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_idx(damage, tmp_path):
    change, words = DAMAGES[damage]
    _write_idx(tmp_path, _arrays(), packed=False)
    path = tmp_path / NAMES['train', 'images']
    path.write_bytes(change(path.read_bytes()))
    _refused('idx', tmp_path, *words)


@pytest.mark.parametrize('packed', [True, False])
def test_memory_is_taken_for_what_is_there(packed, tmp_path):
    """A header may promise 2^96 bytes; and 64 MiB of zeros behind a small header stay packed."""
    promised = _idx(np.zeros(100, np.uint8), (2**32 - 1,) * 3)
    followed = _idx(np.zeros((2, 2, 2), np.uint8)) + bytes(2**26)
    first = 'GiB in memory, of which .* are free' if packed else 'cut off'
    for content, word in ((promised, first), (followed, 'goes on')):
        path = tmp_path / 'file'
        path.write_bytes(gzip.compress(content) if packed else content)
        tracemalloc.start()
        with pytest.raises(UserError, match=word):
            files.idx_array(str(path))
        assert tracemalloc.get_traced_memory()[1] < 2**23
        tracemalloc.stop()


def test_missing_idx_files(tmp_path):
    _refused('idx', '', "data.dir is ''", 'must be a folder')
    _refused('idx', tmp_path / 'none', 'must be a folder')
    _refused('idx', tmp_path, 'no images of the train split', 'train-images-idx3-ubyte')
    _write_idx(tmp_path, _arrays())
    (tmp_path / 't10k-labels-idx1-ubyte.gz').unlink()
    _refused('idx', tmp_path, 'no labels of the test split', 't10k-labels-idx1-ubyte')
    _write_idx(tmp_path, _arrays())
    _write_idx(tmp_path, _arrays(), prefix='emnist-letters-')
    _refused('idx', tmp_path, 'several files', 'emnist-letters-train-images-idx3-ubyte')


# npz.


@pytest.mark.parametrize('shape', [(6, 5), (6, 5, 1), (6, 5, 3)])
@pytest.mark.parametrize('dtype', [np.uint8, np.int64, np.uint64])
def test_npz(shape, dtype, tmp_path):
    arrays = _arrays(shape)
    for split in ('train', 'test'):
        arrays[split, 'labels'] = arrays[split, 'labels'].astype(dtype)
    _write_npz(tmp_path / 'mine.npz', arrays)
    for place in (tmp_path, tmp_path / 'mine.npz'):
        dataset = _load('npz', place)
        _assert_holds(dataset, arrays)
    np.savez(tmp_path / 'other.npz', x=1)
    _refused('npz', tmp_path, 'mine.npz, other.npz', 'one .npz file')


LABELS = np.arange(30) % 3
BAD_ARRAYS = [
    ({'test_images': None}, ["no array 'test_images'", 'images, labels, test_labels']),
    ({'images': np.zeros((30, 6, 5))}, ['float64 (30, 6, 5)', 'must be uint8']),
    ({'images': np.zeros((30, 6, 5, 4), np.uint8)}, ['(30, 6, 5, 4)', '1 or 3 channels']),
    ({'images': np.zeros((30, 30), np.uint8)}, ['(30, 30)']),
    ({'labels': np.zeros((30, 1), int)}, ['int64 (30, 1)', 'integers (N,)']),
    ({'labels': np.zeros(30)}, ['float64 (30,)']),
    ({'labels': LABELS[:29]}, ['30 images', '29 labels']),
    ({'labels': LABELS - 1}, ['label -1', 'below 2']),
    ({'labels': LABELS + 2**40}, ['make 1099511627779 classes of 30']),
    ({'labels': 0 * LABELS}, ['make 1 classes']),
    ({'test_labels': np.full(9, 3)}, ['Example 0 of the test split', 'label 3', 'below 3']),
    ({'test_labels': np.full(9, 2**32)}, ['label 4294967296']),
    ({'test_images': np.zeros((9, 5, 6), np.uint8)}, ['(6, 5, 1)', '(5, 6, 1)', 'one size']),
    ({'test_images': np.zeros((9, 6, 5, 3), np.uint8)}, ['3 channels']),
    ({'labels': np.array([None] * 30)}, ['Object arrays cannot be loaded']),
]


@pytest.mark.parametrize('change,words', BAD_ARRAYS, ids=lambda x: ','.join(map(str, x))[:40])
def test_bad_arrays(change, words, tmp_path):
    _write_npz(tmp_path / 'x.npz', _arrays(), **change)
    _refused('npz', tmp_path, *words)


def test_damaged_npz(tmp_path):
    path = tmp_path / 'x.npz'
    _refused('npz', '', "data.dir is ''", 'must be a folder')
    _refused('npz', path, 'no file')
    _refused('npz', tmp_path, 'no .npz file')
    _write_npz(path, _arrays())
    whole = path.read_bytes()
    at = whole.index(_arrays()['train', 'images'].tobytes()) + 100
    for content in (b'', b'text', whole[:-100], whole[:at] + b'????' + whole[at + 4 :]):
        path.write_bytes(content)
        _refused('npz', path, 'cannot be read as an npz file')


def test_a_channel_that_is_the_same_everywhere():
    images = np.full((4, 3, 3, 2), 51, np.uint8)
    images[:2, ..., 1] = 0
    assert files.moments(images) == ((0.2, 0.1), (1.0, 0.1))


# Hugging Face.


def _png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'png')
    return file.getvalue()


def _table(images, labels, names=('a', 'b', 'c', 'd'), columns=('image', 'label')):
    """A table of Arrow as `datasets` makes it."""
    pa = pytest.importorskip('pyarrow')
    encoded = [{'bytes': _png(x) if isinstance(x, np.ndarray) else x, 'path': None} for x in images]
    kind = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    table = pa.table(
        {columns[0]: pa.array(encoded, kind), columns[1]: pa.array(list(labels), pa.int64())}
    )
    features = {columns[0]: {'_type': 'Image'}, columns[1]: {'_type': 'ClassLabel', 'names': names}}
    said = json.dumps({'info': {'features': features}})
    return table.replace_schema_metadata({'huggingface': said} if names else {})


def _write_tables(folder, arrays, form='parquet', shards=2, **options):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq

    for split in ('train', 'test'):
        table = _table(arrays[split, 'images'], arrays[split, 'labels'], **options)
        cuts = np.linspace(0, len(table), shards + 1).astype(int)
        for i, (begin, end) in enumerate(zip(cuts, cuts[1:])):
            part = table.slice(begin, end - begin)
            if form == 'parquet':
                path = folder / 'data' / f'{split}-{i:05d}-of-{shards:05d}.parquet'
                path.parent.mkdir(exist_ok=True)
                pq.write_table(part, path)
                continue
            path = folder / split / f'data-{i:05d}-of-{shards:05d}.arrow'
            path.parent.mkdir(exist_ok=True)
            with pa.OSFile(str(path), 'wb') as file, pa.ipc.new_stream(file, part.schema) as writer:
                writer.write_table(part)
    return folder


@pytest.mark.parametrize('form', ['parquet', 'arrow'])
@pytest.mark.parametrize('shape', [(6, 5), (6, 5, 3)])
def test_huggingface(form, shape, tmp_path):
    arrays = _arrays(shape)
    _write_tables(tmp_path, arrays, form)
    dataset = _load('huggingface', tmp_path)
    _assert_holds(dataset, arrays, num_classes=4)  # the names say of one more
    assert len(dataset.classes) == 4 and all(isinstance(name, str) for name in dataset.classes)
    _assert_moments(dataset, arrays)


def test_columns_by_what_they_hold(tmp_path):
    arrays = _arrays()
    _write_tables(tmp_path, arrays, names=(), columns=('img', 'y'))
    _assert_holds(_load('huggingface', tmp_path), arrays)


def test_what_datasets_keeps_for_itself_is_not_read(tmp_path):
    arrays = _arrays()
    _write_tables(tmp_path, arrays, 'arrow')
    (tmp_path / 'train' / 'cache-0123456789abcdef.arrow').write_bytes(b'')
    _assert_holds(_load('huggingface', tmp_path), arrays, num_classes=4)


@pytest.mark.parametrize('form', ['parquet', 'arrow'])
def test_damaged_tables(form, tmp_path):
    _write_tables(tmp_path, _arrays(), form)
    path = next(tmp_path.rglob(f'*00001-of-00002.{form}'))
    whole = path.read_bytes()
    for content in (b'', b'text', whole[: len(whole) // 2]):
        path.write_bytes(content)
        _refused('huggingface', tmp_path, path.name, 'damaged')
    path.unlink()
    _refused('huggingface', tmp_path, 'There is no file', path.name)


def _of(tmp_path, images, labels, **options):
    pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq

    arrays = _arrays()
    _write_tables(tmp_path, arrays, shards=1)
    pq.write_table(
        _table(images, labels, **options), tmp_path / 'data' / 'train-00000-of-00001.parquet'
    )
    return tmp_path


def test_bad_tables(tmp_path):
    small, large = np.zeros((6, 5), np.uint8), np.zeros((6, 6), np.uint8)
    color = np.zeros((6, 5, 3), np.uint8)
    for images, labels, words in (
        ([small, large], [0, 1], ['Example 1', '6x6x1', '6x5x1', "'folder'"]),
        ([small, color], [0, 1], ['Example 1', '6x5x3']),
        ([small, None], [0, 1], ['Example 1', 'no bytes']),
        ([small, b'text'], [0, 1], ['Example 1', 'cannot be decoded']),
        ([small, small], [0, None], ["without a 'label'"]),
        ([small, small], [0, 4], ['Example 1 of the train split', 'label 4', 'below 4']),
        ([small, small], [0, -1], ['label -1']),
        ([large, large], [0, 1], ['one size']),
        ([], [], ['no examples']),
    ):
        _refused('huggingface', _of(tmp_path, images, labels), *words)
    names = ('b', 'a', 'c', 'd')
    _refused('huggingface', _of(tmp_path, [small] * 2, [0, 1], names=names), 'b, a, c', 'the same')


def test_missing_tables(tmp_path):
    _refused('huggingface', '', "data.dir is ''", 'must be a folder')
    _refused('huggingface', tmp_path, 'holds the files none', 'train')
    _write_tables(tmp_path, _arrays())
    for path in tmp_path.rglob('test*'):
        path.unlink()
    _refused('huggingface', tmp_path, 'one of test, validation')
    (tmp_path / 'other').mkdir()
    _write_tables(tmp_path / 'other', _arrays())
    _refused('huggingface', tmp_path, 'in several folders')


def test_the_name_of_the_folder_is_of_no_split(tmp_path):
    arrays = _arrays()
    _write_tables(tmp_path, arrays, shards=1)
    for name in ('train-v2', 'test'):
        (tmp_path / 'data').rename(tmp_path / name)
        _assert_holds(_load('huggingface', f'{tmp_path}/{name}/'), arrays, num_classes=4)
        (tmp_path / name).rename(tmp_path / 'data')


@pytest.mark.parametrize('name', ['test.parquet', 'validation-00000-of-00001.parquet'])
def test_a_table_of_two_splits(name, tmp_path):
    _write_tables(tmp_path, _arrays(), shards=1)
    (tmp_path / 'train').mkdir()
    (tmp_path / 'data' / 'test-00000-of-00001.parquet').rename(tmp_path / 'train' / name)
    _refused('huggingface', tmp_path, name, 'belongs to train by its folder', 'one of them')


def test_columns_that_are_not_clear(tmp_path):
    pa = pytest.importorskip('pyarrow')
    encoded = pa.array([b'x'], pa.binary())
    number = pa.array([1])
    for columns, words in (
        ({'label': number}, ['hold images', 'none could']),
        ({'a': encoded, 'b': encoded, 'label': number}, ['hold images', 'a, b could']),
        ({'image': encoded, 'text': pa.array(['x'])}, ['hold labels', 'none could']),
        ({'image': encoded, 'x': number, 'y': number}, ['hold labels', 'x, y could']),
    ):
        with pytest.raises(UserError) as e:
            huggingface._columns(pa.table(columns).schema, 'x.parquet')
        assert all(word in str(e.value) for word in words), e.value
    table = pa.table({'image': encoded, 'coarse_label': number, 'fine_label': number})
    assert huggingface._columns(table.schema, 'x.parquet') == ('image', 'fine_label', ())


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface.importlib.util, 'find_spec', lambda name: None)
    _refused('huggingface', tmp_path, 'needs pyarrow', "pip install 'sam_jax[huggingface]'")


@pytest.mark.datasets
@pytest.mark.parametrize('shape', [(6, 5), (6, 5, 3)])
def test_what_the_library_writes(shape, tmp_path):
    """save_to_disk in shards, and to_parquet, of the library `datasets` itself."""
    library = pytest.importorskip('datasets')
    library.disable_progress_bars()
    arrays = _arrays(shape)
    features = library.Features(
        {'image': library.Image(), 'label': library.ClassLabel(names=['a', 'b', 'c'])}
    )
    both = library.DatasetDict(
        {
            split: library.Dataset.from_dict(
                {
                    'image': [Image.fromarray(x) for x in arrays[split, 'images']],
                    'label': arrays[split, 'labels'].tolist(),
                },
                features=features,
            )
            for split in ('train', 'test')
        }
    )
    # A shuffled dataset is a table and indices into it.
    both['train'] = both['train'].shuffle(seed=0)
    both.save_to_disk(str(tmp_path / 'disk'), num_shards={'train': 3, 'test': 1})
    (tmp_path / 'parquet').mkdir()
    for split, dataset in both.items():
        dataset.to_parquet(str(tmp_path / 'parquet' / f'{split}.parquet'))
    for form in ('disk', 'parquet'):
        _assert_holds(_load('huggingface', tmp_path / form), arrays)


# Fashion-MNIST.


@pytest.fixture
def no_tfds(monkeypatch):
    monkeypatch.setattr(sources, '_prepared', lambda name, data_dir: None)


def test_fashion_mnist_in_idx_files(no_tfds, tmp_path, monkeypatch):
    arrays = _arrays((28, 28), 10, (60, 20))
    _write_idx(tmp_path, arrays)
    dataset = _load('fashion_mnist', tmp_path)
    _assert_holds(dataset, arrays, num_classes=10)
    assert (dataset.mean, dataset.std) == ((0.1307,), (0.3081,))
    np.testing.assert_array_equal(dataset.train.images[..., 0], arrays['train', 'images'])
    monkeypatch.setattr(sources, 'DEBIAN_FASHION_MNIST', str(tmp_path))
    again = _load('fashion_mnist', '')
    assert again.fingerprint == dataset.fingerprint


def test_fashion_mnist_that_is_nowhere(no_tfds, tmp_path, monkeypatch):
    arrays = _arrays((28, 28), 10, (60, 20))
    _write_idx(tmp_path, arrays)
    monkeypatch.setattr(sources, 'DEBIAN_FASHION_MNIST', str(tmp_path))
    words = ['apt-get install dataset-fashion-mnist', 'IDX files', 'download_and_prepare']
    # Another folder is not silently replaced by Debian's.
    _refused('fashion_mnist', tmp_path / 'none', str(tmp_path / 'none'), *words)
    monkeypatch.setattr(sources, 'DEBIAN_FASHION_MNIST', str(tmp_path / 'none'))
    _refused('fashion_mnist', '', "data.dir is ''", *words)


# A part of a dataset.


def test_all_of_it_is_no_part():
    labels = np.random.default_rng(0).integers(0, 7, 1000)
    np.testing.assert_array_equal(load.balanced_part(labels, 1.0, 3), np.arange(1000))
    assert _load('digits', '').fingerprint == _load('digits', '', fraction_seed=5).fingerprint


@pytest.mark.parametrize('seed', [0, 3])
@pytest.mark.parametrize('sizes', [[100] * 10, [1, 7, 50, 942], [333, 333, 334], [999, 1]])
def test_parts_are_balanced_and_nested(sizes, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = labels[np.random.default_rng(1).permutation(len(labels))]
    smaller = set()
    for fraction in (0.001, 0.01, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0):
        part = load.balanced_part(labels, fraction, seed)
        assert len(part) == round(fraction * len(labels)) == len(set(part.tolist()))
        assert (np.diff(part) > 0).all()
        share = np.array(sizes) * len(part) / len(labels)
        counts = np.bincount(labels[part], minlength=len(sizes))
        assert (np.abs(counts - share) <= 1).all(), (fraction, counts, share)
        assert smaller <= set(part.tolist())
        smaller = set(part.tolist())


def test_the_seed_decides_which(tmp_path):
    labels = np.repeat(np.arange(10), 100)
    one, other = (load.balanced_part(labels, 0.5, seed) for seed in (0, 1))
    assert 0.4 < np.isin(one, other).mean() < 0.6
    # Each example comes as often as any other.
    often = np.bincount(
        np.concatenate([load.balanced_part(labels, 0.1, seed) for seed in range(200)]),
        minlength=1000,
    )
    assert 0 < often.min() and often.max() < 45 and often.sum() == 200 * 100


def test_a_part_of_the_digits():
    whole = _load('digits', '', validation=True)
    part = _load('digits', '', validation=True, fraction=0.1, label_noise=0.4)
    chosen = load.balanced_part(whole.train.labels, 0.1, 0)
    assert part.num_train_examples == len(chosen) == 117
    np.testing.assert_array_equal(part.train.images, whole.train.images[chosen])
    # Noise hits the part: as many of it as of any training set, and the others are as they were.
    true = part.evals['train_true_labels'].labels
    np.testing.assert_array_equal(true, whole.train.labels[chosen])
    assert 0 < (part.train.labels != true).sum() <= round(0.4 * 117)
    for name in ('validation', 'test'):
        np.testing.assert_array_equal(part.evals[name].images, whole.evals[name].images)
    assert part.device_arrays(part.train)['images'].shape == (117, 64)


def test_a_part_must_fill_a_batch(tmp_path):
    with pytest.raises(UserError, match='batch_size is 64; the training set of digits has only 13'):
        train.train_and_evaluate(small_config(data__fraction=0.01), str(tmp_path))


def test_a_part_of_a_stream(tmp_path):
    with pytest.raises(UserError, match='data.fraction is 0.5; imagenet is streamed'):
        train.train_and_evaluate(
            small_config(data__fraction=0.5, data__name='imagenet', data__image_size=32),
            str(tmp_path),
        )


# A folder of images, and resuming.


def _folder(root, n=40, size=8):
    for split, count in (('train', n), ('test', 4)):
        for i in range(count):
            path = root / split / f'class{i % 4}' / f'{i:03d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_png(np.full((size, size, 3), 5 * i, np.uint8)))
    return root


def test_a_part_of_a_folder(tmp_path):
    _folder(tmp_path)
    whole, part = (_load('folder', tmp_path, image_size=8, fraction=f) for f in (1.0, 0.5))
    assert part.num_train_examples == 20
    assert np.bincount(part.train.labels).tolist() == [5] * 4
    assert set(part.train.index.tolist()) < set(whole.train.index.tolist())
    classes = [part.train[i][1] for i in range(20)]
    np.testing.assert_array_equal(part.train.labels, classes)


def _resized(root):
    path = next(root.rglob('000.png'))
    path.write_bytes(path.read_bytes() + b'more')


def _renamed(root):
    path = root / 'train' / 'class0' / '000.png'
    path.rename(path.with_name('1000.png'))


def _moved(root):
    path = root / 'train' / 'class0' / '000.png'
    path.rename(root / 'train' / 'class1' / '000.png')


def _fewer(root):
    (root / 'test' / 'class0' / '000.png').unlink()


@pytest.mark.parametrize('change', [_resized, _renamed, _moved, _fewer])
def test_the_fingerprint_of_a_folder(change, tmp_path):
    one, other = (_folder(tmp_path / name) for name in ('one', 'other'))
    for path in other.rglob('*.png'):
        os.utime(path, (0, 0))  # times do not count
    first = _load('folder', one, image_size=8).fingerprint
    assert _load('folder', other, image_size=8).fingerprint == first and len(first) == 33
    change(other)
    assert _load('folder', other, image_size=8).fingerprint != first


def test_labels_from_a_file_are_those_of_a_folder(tmp_path):
    """They are refused for other images, wherever those lie; and the fingerprint is theirs, too."""
    one, other = (_folder(tmp_path / name) for name in ('one', 'other'))
    path, first = tmp_path / 'p.npz', _load('folder', one, image_size=8)
    settings = {'image_size': 8, 'labels_from': str(path)}

    def write(probabilities):
        np.savez(path, probabilities=probabilities, dataset='folder', examples=first.train.checksum)

    write(np.full((40, 4), 0.25, np.float32))
    prints = [_load('folder', place, **settings).fingerprint for place in (one, other)]
    assert prints[0] == prints[1] != first.fingerprint
    assert prints[0].startswith(first.fingerprint)
    write(np.eye(4, dtype=np.float32)[np.arange(40) % 4])
    assert _load('folder', one, **settings).fingerprint != prints[0]
    _renamed(other)
    _refused('folder', other, 'other examples of folder', 'data.dir', **settings)


def test_the_fingerprint_of_arrays(tmp_path):
    arrays = _arrays()
    for i, key in enumerate([None, *arrays]):
        if key:
            arrays[key] = arrays[key].copy()
            arrays[key].flat[-1] ^= 1
        _write_npz(tmp_path / f'{i}.npz', arrays)
    prints = [_load('npz', tmp_path / f'{i}.npz').fingerprint for i in range(5)]
    assert len(set(prints)) == 5
    hashed = hashlib.sha256()
    dataset = _load('npz', tmp_path / '0.npz')
    for split in (dataset.train, dataset.evals['test']):
        hashed.update(split.images.tobytes() + split.labels.tobytes())
    assert hashed.hexdigest().startswith(prints[0])
    # The labels are those that are trained on.
    assert _load('npz', tmp_path / '0.npz', label_noise=0.5).fingerprint != prints[0]


def _missing_gone(tmp_path):
    root = _folder(tmp_path)
    source, *_ = records.FolderStream().open(str(root))
    next((root / 'train').rglob('*.png')).unlink()
    return source


def test_a_file_that_is_gone(tmp_path):
    with pytest.raises(UserError, match='cannot be read: No such file'):
        _missing_gone(tmp_path).fingerprint()


def _config(name, place, **settings):
    return small_config(
        data__name=name,
        data__dir=str(place),
        total_epochs=2,
        batch_size=10,
        replica_batch_size=10,
        checkpoint__keep_epochs=(1,),
        **settings,
    )


def _end_at(workdir, step):
    """Leaves of a finished run what it had after a step."""
    for path in (workdir / 'checkpoints').iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    (workdir / 'result.json').unlink()


@pytest.mark.parametrize('name', ['folder', pytest.param('idx', marks=pytest.mark.slow)])
def test_resuming_on_the_same_data_elsewhere_and_on_other_data(name, tmp_path):
    places = [tmp_path / f'place{i}' for i in range(3)]
    for place in places:
        place.mkdir()
        _folder(place)
        _write_idx(place, _arrays((8, 8)))
    _resized(places[2])
    arrays = _arrays((8, 8))
    arrays['train', 'images'][3, 4, 5] ^= 1
    _write_idx(places[2], arrays)
    settings = {'data__image_size': 8} if name == 'folder' else {}

    run, devices = tmp_path / 'run', jax.devices()[:1]
    whole = train.train_and_evaluate(_config(name, places[0], **settings), str(run), devices)
    steps = {'folder': 4, 'idx': 3}[name]
    _end_at(run, steps)
    with pytest.raises(UserError, match=f'fingerprint of {name} was .* and is .*new workdir'):
        train.train_and_evaluate(_config(name, places[2], **settings), str(run), devices)
    again = train.train_and_evaluate(_config(name, places[1], **settings), str(run), devices)
    assert_trees_equal(again.params, whole.params)


# Reports.


@pytest.mark.parametrize('name', ['folder', *(n for n in data.OWN if n != 'folder')])
def test_the_folder_is_the_dataset(name):
    one, other, elsewhere = (
        {'data.name': name, 'data.dir': place, 'sam.method': 'sam', 'data.fraction_seed': i}
        for i, place in enumerate(['/a/flowers', '/a/birds', '/b/flowers/'])
    )
    assert results.settings_of(one) == results.settings_of(elsewhere)
    assert results.settings_of(one) != results.settings_of(other)
    assert results.settings_of(one) == results.settings_of({**one, 'data.fraction': 1.0})
    assert results.settings_of(one) != results.settings_of({**one, 'data.fraction': 0.1})


def test_own_datasets_are_known_by_their_class():
    assert data.OWN == ('folder', 'idx', 'npz', 'huggingface')
    assert all(dataclasses.is_dataclass(source) for source in data.SOURCES.values())
