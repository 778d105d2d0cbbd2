"""The labels to train on: noise, and the predictions of another run."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT, small_config
from scipy import stats

from sam_jax import data, replicas, train
from sam_jax.data import labels
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment
from sam_jax.targets import absent

# Smallest p of a chi-square test that passes; seeds are fixed, so a test passes always or never.
P_VALUE = 1e-3


def _load(seed=0, **settings):
    config = small_config(
        **{f'data__{name}': value for name, value in settings.items()}, data__label_noise_seed=seed
    )
    return data.load_dataset(config.data)


def _assert_uniform(counts, cells=None):
    assert cells in (None, np.size(counts)), counts
    assert stats.chisquare(np.ravel(counts)).pvalue > P_VALUE, counts


# Label noise.


@pytest.mark.parametrize('n,rate', [(1297, 0.4), (1297, 0.8), (1000, 1.0), (10, 0.25), (9, 0.01)])
def test_noise_draws_an_exact_number(n, rate):
    # -1 is no class, so that each draw shows.
    clean = np.full(n, -1, np.int32)
    noisy = labels.noise(n, rate, 10, seed=3)(np.arange(n), clean)
    assert np.sum(noisy != -1) == round(rate * n)
    assert (clean == -1).all() and noisy.dtype == np.int32


@pytest.mark.parametrize('num_classes', [10, 100])
def test_noise_is_uniform_over_classes_and_examples(num_classes):
    n = 20_000
    noisy = labels.noise(n, 0.5, num_classes, seed=0)(np.arange(n), np.full(n, -1))
    _assert_uniform(np.bincount(noisy[noisy >= 0], minlength=num_classes), num_classes)
    drawn = noisy.reshape(20, -1) >= 0
    # A fixed number is drawn, which makes the places a little more even than chance.
    assert stats.chisquare(drawn.sum(axis=1)).pvalue > P_VALUE


@pytest.mark.parametrize('true_class', [0, 4, 9])
def test_noise_draws_the_true_class_too(true_class):
    n = 20_000
    noisy = labels.noise(n, 1.0, 10, seed=1)(np.arange(n), np.full(n, true_class))
    _assert_uniform(np.bincount(noisy, minlength=10), 10)


@pytest.mark.parametrize('num_classes', [2, 10])
def test_noise_of_other_kinds(num_classes):
    """'other' is uniform over the others; 'pair' is the next class; the examples are the same."""
    n = 20_000
    true = np.arange(n, dtype=np.int32) % num_classes
    other, pair = (
        labels.noise(n, 0.3, num_classes, 5, kind)(np.arange(n), true) for kind in ('other', 'pair')
    )
    hit = other != true
    assert hit.sum() == round(0.3 * n)
    np.testing.assert_array_equal(hit, pair != true)
    np.testing.assert_array_equal(pair[hit], (true[hit] + 1) % num_classes)
    cells = np.zeros((num_classes, num_classes))
    np.add.at(cells, (true[hit], other[hit]), 1)
    for c in range(num_classes):
        _assert_uniform(np.delete(cells[c], c), num_classes - 1) if num_classes > 2 else None


def test_noise_depends_on_the_seed_alone():
    noisy = {seed: _load(seed, label_noise=0.4).train.labels for seed in (0, 1)}
    again = _load(0, label_noise=0.4, augment='basic', validation=False).train.labels
    np.testing.assert_array_equal(noisy[0], again)
    assert np.mean(noisy[0] != noisy[1]) > 0.3
    # Not on the labels there are: the same places get the same draws.
    draws, others = (
        labels.noise(1297, 0.4, 10, seed)(np.arange(1297), np.full(1297, -1)) for seed in (0, 1)
    )
    np.testing.assert_array_equal(noisy[0], np.where(draws < 0, _load().train.labels, draws))
    # Nor on which are asked for together, as streams ask for one at a time.
    some = np.flatnonzero(draws >= 0)[[300, 4, 100]]
    np.testing.assert_array_equal(labels.noise(1297, 0.4, 10, 0)(some, np.full(3, -1)), draws[some])
    # Both which examples are drawn and what they get change with the seed.
    assert np.mean((draws < 0) != (others < 0)) > 0.3
    both = (draws >= 0) & (others >= 0)
    assert np.mean(draws[both] != others[both]) > 0.8


@pytest.mark.parametrize('rate', [0.4, 0.8])
def test_noise_leaves_the_rest_alone(rate):
    clean, noisy = _load(), _load(label_noise=rate)
    assert set(clean.evals) == {'test', 'train'}
    assert set(noisy.evals) == {'test', 'train', 'train_true_labels', 'train_clean', 'train_noisy'}
    for name, true in [('test', clean.evals['test']), ('train_true_labels', clean.train)]:
        np.testing.assert_array_equal(noisy.evals[name].labels, true.labels)
        np.testing.assert_array_equal(noisy.evals[name].images, true.images)
    assert noisy.evals['train'] is noisy.train
    assert noisy.evals['train_true_labels'].images is noisy.train.images  # on the devices once
    np.testing.assert_array_equal(noisy.train.images, clean.train.images)
    wrong = np.mean(noisy.train.labels != clean.train.labels)
    assert abs(wrong - 0.9 * rate) < 0.03


def test_clean_and_noisy_examples_are_told_apart():
    dataset, true = _load(label_noise=0.4), _load().train.labels
    clean, noisy = dataset.evals['train_clean'], dataset.evals['train_noisy']
    assert clean.images is noisy.images is dataset.train.images
    assert sorted([*clean.index, *noisy.index]) == list(range(1297))
    assert (clean.labels == true[clean.index]).all() and (noisy.labels != true[noisy.index]).all()
    for part in (clean, noisy):
        np.testing.assert_array_equal(part.labels, dataset.train.labels[part.index])
    layout = replicas.make_layout(64, 64, 1, devices=jax.devices()[:1])[0]
    feed = next(dataset.eval_feeds(noisy, 100, layout))
    np.testing.assert_array_equal(feed['index'][0], noisy.index[:100])
    np.testing.assert_array_equal(feed['label'][0], noisy.labels[:100])


# Labels predicted by a run.


def _write(path, probabilities, dataset='digits', **more):
    np.savez(path, probabilities=probabilities, dataset=dataset, **more)
    return str(path)


def test_labels_from_a_file(tmp_path):
    probabilities = np.random.RandomState(0).dirichlet(np.ones(10), 1297).astype(np.float32)
    path = _write(tmp_path / 'p.npz', probabilities)
    hard, soft = (_load(labels_from=path, soft_labels=s) for s in (False, True))
    np.testing.assert_array_equal(hard.train.labels, probabilities.argmax(1))
    np.testing.assert_array_equal(soft.train.labels, probabilities)
    true = _load().train.labels
    for dataset in (hard, soft):
        np.testing.assert_array_equal(dataset.evals['train_true_labels'].labels, true)
        assert len(dataset.evals['train_clean']) == (probabilities.argmax(1) == true).sum()
        layout = replicas.make_layout(64, 32, 1, devices=jax.devices()[:2])[0]
        feed = dataset.train_feed(0, 3, layout)
        np.testing.assert_array_equal(feed['label'], dataset.train.labels[feed['index']])
        keys = jax.random.split(jax.random.key(0), (1, 32))
        batch = dataset.train_batch(
            dataset.device_arrays(dataset.train),
            jax.tree.map(lambda x: x[0], feed),
            keys,
            keys[0, 0],
        )
        np.testing.assert_array_equal(batch['label'], feed['label'][0])


def test_files_that_do_not_fit(tmp_path):
    uniform = np.full((1297, 10), 0.1, np.float32)
    wrong = {
        'there is no such file': str(tmp_path / 'absent.npz'),
        'predictions for 1296 examples of digits in 10 classes': _write(
            tmp_path / 'a.npz', uniform[1:]
        ),
        '1297 examples of digits in 9 classes': _write(tmp_path / 'b.npz', uniform[:, 1:]),
        'examples of cifar10': _write(tmp_path / 'c.npz', uniform, 'cifar10'),
        'not finite': _write(tmp_path / 'd.npz', uniform * np.nan),
        'cannot be read': str(tmp_path / 'e.npz'),
        "KeyError('": str(tmp_path / 'f.npz'),
    }
    (tmp_path / 'e.npz').write_bytes(b'no file of numbers')
    np.savez(tmp_path / 'f.npz', other=1)
    for words, path in wrong.items():
        with pytest.raises(UserError) as e:
            _load(labels_from=path)
        assert words in str(e.value) and 'data.labels_from' in str(e.value), str(e.value)


@pytest.mark.parametrize('part', [{'fraction': 0.1}, {'shots': 5}], ids=['fraction', 'shots'])
def test_predictions_for_other_examples_are_refused(part, tmp_path):
    first = _load(label_noise=0.4, **part).train
    of = {'dataset': 'digits', 'examples': first.checksum}
    path = _write(tmp_path / 'p.npz', np.full((len(first), 10), 0.1, np.float32), **of)
    _load(labels_from=path, **part)
    with pytest.raises(UserError, match='other examples of digits .* data.fraction_seed'):
        _load(labels_from=path, fraction_seed=1, **part)
    settings = small_config(data__labels_from=path, data__fraction_seed=1, data__soft_labels=True)
    settings.data.update(part)
    absent.load_dataset(settings.data)  # of zeros, which are no examples


# Its parts are other tests' as well.
@pytest.mark.slow
def test_bootstrap(tmp_path):
    """A run's predictions are those of its model, in the order of the training set; from the
    command line, and used by a run that trains on them."""
    config = small_config(
        data__label_noise=0.4, data__validation=True, ema__decay=0.5, total_epochs=1
    )
    state = train.train_and_evaluate(config, str(tmp_path / 'run'), jax.devices()[:2])
    out = tmp_path / 'labels.npz'
    result = subprocess.run(
        [sys.executable, '-m', 'sam_jax.cli.predict', f'--workdir={tmp_path}/run', f'--out={out}'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0 and '1168 predictions of step' in result.stderr, result.stderr
    dataset = data.load_dataset(config.data)
    images = (dataset.train.images / 255.0 - dataset.mean) / dataset.std
    logits = Experiment.from_config(config, jax.devices()[:1]).model.apply(
        jax.device_get(state.ema), images.astype(np.float32), train=False
    )
    with np.load(out) as file:
        np.testing.assert_allclose(
            file['probabilities'], jax.nn.softmax(logits), rtol=1e-3, atol=1e-5
        )
        np.testing.assert_array_equal(file['labels'], dataset.train.labels)
        assert file['step'] == int(state.step)
        assert file['examples'] == dataset.train.checksum
        predicted = file['probabilities'].argmax(1)
    config = small_config(
        data__labels_from=str(out),
        data__validation=True,
        total_epochs=1,
        data__soft_labels=True,
        eval__train_set=True,
    )
    train.train_and_evaluate(config, str(tmp_path / 'second'), jax.devices()[:1])
    wrong = np.mean(predicted != _load(validation=True).train.labels)
    metrics = (tmp_path / 'second' / 'metrics.jsonl').read_text()
    assert 0 < wrong < 1 and 'train_noisy_set/error_rate' in metrics
    refused = subprocess.run(
        [sys.executable, '-m', 'sam_jax.cli.predict', f'--workdir={tmp_path}'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert refused.returncode == 2 and 'must be the folder of a run' in refused.stderr
