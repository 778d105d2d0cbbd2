"""Calibration, errors by class and corrupted images: by definition, and of a published network."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, lean_environment
from PIL import Image
from scipy import ndimage, special

import sam_jax
from sam_jax.data import corruptions
from sam_jax.errors import UserError
from sam_jax.trained import quality, quality_report

# Calibration.


def test_bins_by_definition():
    draw = np.random.RandomState(0)
    logits = 3 * draw.randn(500, 4)
    probabilities = np.asarray(special.softmax(logits, 1))
    labels = draw.randint(4, size=500)
    found = quality.reliability(probabilities, labels)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    error = 0.0
    for m in range(1, 16):
        here = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        assert found.count[m - 1] == here.sum()
        if here.any():
            assert found.confidence[m - 1] == pytest.approx(confidence[here].mean())
            assert found.accuracy[m - 1] == pytest.approx(right[here].mean())
            error += here.mean() * abs(right[here].mean() - confidence[here].mean())
        else:
            assert np.isnan(found.accuracy[m - 1])
    assert found.error == pytest.approx(error)
    nll = np.mean([-np.log(p[label]) for p, label in zip(probabilities, labels)])
    assert quality.negative_log_likelihood(logits, labels) == pytest.approx(nll)
    huge = np.array([[1e5, 0.0]])
    assert quality.negative_log_likelihood(huge, np.array([1])) == pytest.approx(1e5)


def test_edges_of_bins_belong_to_the_lower_one():
    edges = np.array([k / 15 for k in range(8, 16)])  # of two classes no confidence is lower
    probabilities = np.stack([edges, 1 - edges], 1).astype(np.float32)
    found = quality.reliability(probabilities, np.zeros(8, int))
    assert found.count.tolist() == 7 * [0] + 8 * [1]


def test_confusion():
    cells = quality.confusion(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 0]), 3)
    assert cells.tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]


def test_mean_corruption_error():
    one = {'corruptions': {'a': [0.1] * 5, 'b': [0.4] * 5}}
    two = {'corruptions': {'a': [0.2] * 5, 'b': [0.2] * 5}}
    means = quality_report.corruption_errors([one, two])
    assert means[0] == (pytest.approx(25), 100)
    assert means[1] == (pytest.approx(20), pytest.approx(100 * (2 + 0.5) / 2))


# Corruptions.

SMALL = np.random.RandomState(0).randint(0, 256, (3, 10, 12, 3)).astype(np.uint8)


@pytest.mark.parametrize('name', corruptions.CORRUPTIONS)
def test_corruptions_depend_on_the_image_alone(name):
    """Not on its batch; on the seed where they are random; grey images are images, too."""
    whole = corruptions.corrupt(SMALL, name, 3)
    assert whole.dtype == np.uint8 and whole.shape == SMALL.shape
    part = corruptions.corrupt(SMALL[1:2], name, 3, numbers=np.array([1]))
    np.testing.assert_array_equal(part, whole[1:2])
    random = name in ('fog', 'elastic', 'motion_blur') or name.endswith('noise')
    assert random != np.array_equal(corruptions.corrupt(SMALL, name, 3, seed=1), whole)
    grey = SMALL[..., :1]
    assert corruptions.corrupt(grey, name, 5).shape == grey.shape
    # Worse from severity to severity, up to what chance does to so few pixels.
    smooth = ndimage.gaussian_filter(SMALL, (0, 1, 1, 0))
    changes = [
        np.abs(corruptions.corrupt(smooth, name, s).astype(int) - smooth).mean() for s in (1, 3, 5)
    ]
    assert changes[2] > 0 and (name in ('elastic', 'pixelate', 'fog') or changes == sorted(changes))
    parameters = corruptions.CORRUPTIONS[name]
    assert len(parameters.small) == len(parameters.large) == 5


def test_large_images_have_the_parameters_of_imagenet():
    grey = np.full((1, 100, 100, 1), 100, np.uint8)
    np.testing.assert_array_equal(corruptions.corrupt(grey, 'brightness', 1), grey + 25)
    np.testing.assert_array_equal(
        corruptions.corrupt(grey[:, :99], 'brightness', 1), grey[:, 1:] + 12
    )


def test_noise_has_its_law():
    grey = np.full((1, 99, 400, 1), 102, np.uint8)  # 0.4
    x = corruptions.corrupt(grey, 'gaussian_noise', 2) / 255
    assert x.mean() == pytest.approx(0.4, abs=0.005) and x.std() == pytest.approx(0.06, abs=0.002)
    x = corruptions.corrupt(grey, 'shot_noise', 3) / 255
    assert x.mean() == pytest.approx(0.4, abs=0.005)
    assert x.var() == pytest.approx(0.4 / 100, rel=0.03)
    x = corruptions.corrupt(grey, 'impulse_noise', 5)
    for value in (0, 255):
        assert np.mean(x == value) == pytest.approx(0.035, abs=0.004)
    assert np.mean(x == 102) == pytest.approx(0.93, abs=0.006)


def test_blur_keeps_what_is_even_and_spreads_a_point():
    even = np.full((2, 20, 20, 1), 77, np.uint8)
    point = np.zeros((1, 41, 41, 1))
    point[0, 20, 20] = 1
    for name in ('gaussian_blur', 'defocus_blur', 'motion_blur', 'zoom_blur'):
        blurred = corruptions.corrupt(even, name, 4)
        assert np.abs(blurred.astype(int) - 77).max() <= 1
    for name in ('gaussian_blur', 'defocus_blur', 'motion_blur'):
        entry = corruptions.CORRUPTIONS[name]
        spread = entry.apply(point, entry.small[4], lambda shape: np.full((1, *shape), 0.5))
        assert spread.sum() == pytest.approx(1) and spread.max() < 0.5
        if name == 'motion_blur':  # along the row, to one side; weights of half a bell
            assert set(np.flatnonzero(spread.any((0, 2, 3)))) == {20}
            weights = spread[0, 20, 20::-1, 0][:19]
            np.testing.assert_allclose(weights / weights[0], np.exp(-(np.arange(19) ** 2) / 12.5))


def test_colours_contrast_and_compression_by_definition():
    image = np.array([[[[200, 100, 50], [0, 0, 0]]]], np.uint8)
    # Value 200 / 255 + 0.3 is cut at 1: hue and saturation stay; black becomes grey.
    bright = corruptions.corrupt(image, 'brightness', 5)
    np.testing.assert_array_equal(bright, [[[[255, 127, 63], [76, 76, 76]]]])
    mean = SMALL.mean((1, 2), keepdims=True)
    found = corruptions.corrupt(SMALL, 'contrast', 2)
    assert np.abs(found - ((SMALL - mean) * 0.5 + mean)).max() <= 1
    file = io.BytesIO()
    Image.fromarray(SMALL[0]).save(file, 'JPEG', quality=58)
    np.testing.assert_array_equal(
        corruptions.corrupt(SMALL[:1], 'jpeg', 3)[0], np.asarray(Image.open(file))
    )


def test_fog_is_a_fractal_between_nothing_and_its_strength():
    heights = corruptions._plasma(np.random.RandomState(0).rand(3, 32 * 32), 32, 2.0)
    assert heights.shape == (3, 32, 32)
    np.testing.assert_allclose(heights.min((1, 2)), 0)
    np.testing.assert_allclose(heights.max((1, 2)), 1)
    steps = [np.abs(heights - np.roll(heights, k, 1)).mean() for k in (1, 4, 16)]
    assert steps == sorted(steps)  # neighbours are alike
    black = np.zeros((1, 8, 8, 1), np.uint8)
    assert not corruptions.corrupt(black, 'fog', 5).any()  # its light is that of the image


def test_elastic_by_its_parts():
    """Without affine map and displacement nothing changes; with the map corners move."""
    entry = corruptions.CORRUPTIONS['elastic']
    x = np.random.RandomState(0).rand(1, 12, 12, 1)
    same = entry.apply(x, (0, 0, 0), lambda shape: np.full((1, *shape), 0.9))
    np.testing.assert_allclose(same, x, atol=1e-9)
    # All three corners go half a twelfth of 12 pixels on, which is one in both directions.
    moved = entry.apply(x, (0, 0, 1 / 12), lambda shape: np.ones((1, *shape)))
    np.testing.assert_allclose(moved[:, 1:, 1:], x[:, :-1, :-1], atol=1e-9)


def test_what_there_is_not():
    with pytest.raises(UserError, match="corruption is 'frost'"):
        corruptions.corrupt(SMALL, 'frost', 1)
    with pytest.raises(UserError, match='severity is 6'):
        corruptions.corrupt(SMALL, 'fog', 6)


# Of a network.


def test_a_published_network_is_measured(monkeypatch):
    """In batches of any size; on a part of a split; and as its run has measured it."""
    model = sam_jax.load(ROOT / 'published' / 'digits_noise40_sgd')
    split = quality.open_split(model)
    told = []
    said = quality.measure(model, split, tell=lambda *progress: told.append(progress))
    assert said['error_rate'] == pytest.approx(model.test_error)
    assert said['nll'] == pytest.approx(model.result['test/loss'], rel=1e-4)
    assert said['examples'] == np.sum(said['confusion']) == 500 == told[-1][1]
    assert np.trace(said['confusion']) == pytest.approx(500 * (1 - said['error_rate']))
    assert 0 < said['ece'] < 0.5
    some = ('contrast', 'brightness', 'fog')
    monkeypatch.setattr(
        corruptions, 'CORRUPTIONS', {name: corruptions.CORRUPTIONS[name] for name in some}
    )
    part = quality.open_split(model, examples=30)
    both = [
        quality.measure(model, part, ['calibration', 'corruptions'], batch_size=n) for n in (16, 30)
    ]
    assert both[0]['corruptions'] == both[1]['corruptions']
    assert both[0]['examples'] == 30
    errors = {name: np.mean(rates) for name, rates in both[0]['corruptions'].items()}
    assert max(errors, key=errors.get) == 'contrast' and tuple(errors) == some
    with pytest.raises(UserError, match="split is 'valid'; it must be one of test"):
        quality.open_split(model, 'valid')


def test_new_classes_are_no_split_of_a_network():
    """Their labels count from 0 again, and the names of the network are of the others."""
    model = sam_jax.load(ROOT / 'published' / 'digits_sgd')
    model.config.data.base_to_new = True
    with pytest.raises(UserError, match="split is 'new'; .* other classes"):
        quality.open_split(model, 'new')
    with pytest.raises(UserError, match="split is 'old'; it must be one of test, train"):
        quality.open_split(model, 'old')


@pytest.mark.slow
def test_the_command(tmp_path):
    folders = [f'{ROOT}/published/digits_{name}' for name in ('sgd', 'sam')]
    done = subprocess.run(
        [sys.executable, '-m', 'sam_jax.cli.evaluate', *folders, '--out=found', '--examples=40']
        + ['--what=calibration,corruptions'],
        cwd=tmp_path,
        env={**lean_environment(tmp_path), 'PYTHONPATH': f'{tmp_path}/stubs:{ROOT}'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / 'found').iterdir()} == {
        'report.md', 'evaluation.json', 'reliability.png', 'confusion_1.png', 'confusion_2.png'
    }  # fmt: skip
    report = (tmp_path / 'found' / 'report.md').read_text()
    assert '| mCE, digits_sgd being 100 | 100.0 |' in report and report in done.stderr + '\n'
    said = json.loads((tmp_path / 'found' / 'evaluation.json').read_text())
    assert [n['name'] for n in said['networks']] == ['digits_sgd', 'digits_sam']


def test_the_report():
    """With what is not finite, and a class without images."""
    cells = [[3, 1, 0], [0, 0, 0], [0, 0, 2]]
    network = {'name': 'a', 'examples': 6, 'error_rate': 1 / 6, 'confidence': 0.9, 'ece': 0.05}
    network |= {'nll': 0.5, 'confusion': cells}
    said = {'networks': [network], 'dataset': 'digits', 'split': 'test', 'what': ['calibration']}
    text = quality_report.markdown({**said, 'classes': ['x', 'y', 'z']})
    assert '| x | 4 | 25.00 |' in text and '| y | 0 |  |' in text and '| x | y | 1 |' in text
    assert 'expected calibration error, 15 bins (%) | 5.00' in text and 'corrupted' not in text
