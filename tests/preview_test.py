"""The pictures of what the network sees, and the command that draws them."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT, small_config
from PIL import Image

from sam_jax import data, replicas, train_state, train_step
from sam_jax.data import pictures
from sam_jax.replicas import AXIS


@pytest.mark.parametrize(
    'options', [{}, {'mixup_alpha': 1.0}, {'cutmix_alpha': 1.0, 'mix_per_image': True}]
)
def test_training_images_are_those_of_the_step(options):
    config = small_config(
        seed=4,
        data__augment='cutout',
        data__padding=2,
        data__cutout_size=4,
        **{f'data__{k}': v for k, v in options.items()},
    )
    dataset = data.load_dataset(config.data)
    layout, _ = replicas.make_layout(64, 16, 1, devices=jax.devices()[:2])
    shown = pictures.training_images(dataset, 4, 7, layout, 10)
    batch = jax.pmap(
        lambda *args: train_step.keyed_replicas(*args, layout=layout, batch_fn=dataset.train_batch)[
            'image'
        ],
        axis_name=AXIS,
        in_axes=(None, 0, None, None),
        devices=layout.devices,
    )(
        np.int32(7),
        dataset.train_feed(4, 7, layout),
        dataset.device_arrays(dataset.train),
        train_state.HParams.from_config(config),
    )
    images = np.asarray(batch).reshape(64, 8, 8, 1)[:10]
    np.testing.assert_allclose(shown, dataset.to_pixels(images), atol=1e-6)


def test_grid():
    images = np.arange(6 * 2 * 3, dtype=float).reshape(6, 2, 3, 1)
    grid = pictures.grid(images, columns=3)
    assert grid.shape == (1, 4, 9, 1)
    np.testing.assert_array_equal(grid[0, 2:4, 3:6], images[4])
    assert pictures.grid(images).shape == (1, 6, 6, 1)


def _preview(*flags):
    return subprocess.run(
        [sys.executable, '-m', 'sam_jax.cli.preview', *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command(tmp_path):
    config = '--config=configs/digits.py'
    out = tmp_path / 'batch.png'
    result = _preview(config, f'--out={out}', '--images=16', '--side=8')
    assert result.returncode == 0 and f'{out}: step 0 of digits, 16 images.' in result.stderr
    with Image.open(out) as picture:
        shown = np.asarray(picture) / 255
    dataset = data.load_dataset(small_config().data)
    layout, _ = replicas.make_layout(64, 64, 1, devices=jax.devices()[:1])
    expected = pictures.grid(pictures.training_images(dataset, 0, 0, layout, 16))[0, ..., 0]
    np.testing.assert_allclose(shown, expected, atol=0.6 / 255)
    result = _preview(config, f'--out={tmp_path}/ops.png', '--what=ops', '--side=16')
    assert result.returncode == 0, result.stderr
    names, images = pictures.operations(dataset.original_images(2), dataset.augmentation)
    assert (len(names), len(images)) == (49, 98) and names[0] == 'original'
    with Image.open(tmp_path / 'ops.png') as picture:
        assert picture.size[1] == 49 * 16 and picture.size[0] > 8 * 16
    inverted = images[2 * names.index('Invert 5')]
    np.testing.assert_allclose(inverted, 1 - images[0], atol=1e-6)


def test_command_refuses(tmp_path):
    for flags, words in [
        (['--out=grid.txt'], "--out is 'grid.txt'"),
        (['--out=grid.psd'], "--out is 'grid.psd'; it must end in .png"),  # which is read alone
        ([f'--out={tmp_path}/no/where.png'], 'cannot be written'),
        (['--config.data.augment=none', '--config.data.mix_per_image=true'], 'data.mix_per_image'),
    ]:
        result = _preview('--config=configs/digits.py', *flags)
        assert (
            result.returncode == 2 and words in result.stderr and ('Traceback' not in result.stderr)
        ), result.stderr
