"""The real Fashion-MNIST, from Debian's package: ./scripts/test_datasets.sh."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

from configs import fashion_mnist
from sam_jax import data
from sam_jax.data import files, sources

pytestmark = pytest.mark.datasets

# sha256 of the pixels and of the labels, a byte each, in the order of the files.
SHA256 = {
    'train': (
        '2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012',
        '657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7',
    ),
    'test': (
        'c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a',
        '3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9',
    ),
}
PIXELS = (28, 28, 1)


@pytest.fixture
def debian(monkeypatch):
    """What a machine without a copy of TFDS's reads."""
    monkeypatch.setattr(sources, '_prepared', lambda name, data_dir: None)


def _load(**settings):
    config = fashion_mnist.get_config('small')
    for key, value in settings.items():
        config.data[key] = value
    return data.load_dataset(config.data)


def test_every_pixel(debian):
    dataset = _load()
    assert (dataset.num_classes, dataset.image_shape) == (10, PIXELS)
    for name, n in (('train', 60000), ('test', 10000)):
        split = dataset.evals[name]
        assert split.images.shape == (n, *PIXELS) and split.images.dtype == np.uint8
        assert np.bincount(split.labels).tolist() == [n // 10] * 10
        content = (split.images.tobytes(), split.labels.astype(np.uint8).tobytes())
        assert tuple(hashlib.sha256(x).hexdigest() for x in content) == SHA256[name]


def test_the_same_files_by_their_form(debian):
    """data.name=idx reads them too, and finds what is known of MNIST's relatives by itself."""
    named, own = _load(), _load(name='idx', dir=sources.DEBIAN_FASHION_MNIST)
    assert own.num_classes == 10
    np.testing.assert_allclose((own.mean[0], own.std[0]), (0.28604, 0.35302), atol=1e-5)
    assert files.moments(named.train.images) == (own.mean, own.std)

    def images(dataset):
        return sorted(x.tobytes() for x in dataset.train.images[:, ::3, ::3])

    assert images(named) == images(own)


def test_a_tenth_of_it(debian):
    part = _load(fraction=0.1, validation=True)
    assert (part.num_train_examples, len(part.evals['validation'])) == (5400, 6000)
    whole = _load(validation=True)
    share = np.bincount(whole.train.labels) / 10
    assert (np.abs(np.bincount(part.train.labels) - share) <= 1).all()


def test_the_small_config_trains(tmp_path):
    """One epoch on 1 % of it, as a person starts it; then the test set of 10,000."""
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'sam_jax.main',
            '--config=configs/fashion_mnist.py:small,fraction=0.01',
            f'--workdir={tmp_path}',
            '--config.total_epochs=3',
            '--config.eval.every_epochs=3',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['step'] == 3 * (600 // 128)
    # Far from nothing learned, 0.9, and from what 1 % cannot teach.
    assert 0.1 < result['test/error_rate'] < 0.85
