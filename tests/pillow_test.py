"""Images without TensorFlow: the same windows and pixels as with it."""

import io
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from sam_jax import replicas, settings
from sam_jax.data import decode, load_dataset, pillow

tf = pytest.importorskip('tensorflow')


def _encoded(pixels, kind, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def _photo(height, width, seed=0):
    """Smooth colours, as a photograph has them."""
    coarse = np.random.RandomState(seed).randint(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    return np.asarray(Image.fromarray(coarse.astype(np.uint8)).resize((width, height)))


def test_windows_are_tensorflow_s():
    """Also of images so narrow or so small that there is none, and of negative seeds."""
    random = np.random.RandomState(0)
    vain = 0
    for i in range(600):
        height, width = (int(n) for n in random.randint(1, 600, 2))
        width = width // 20 + 1 if i % 5 == 0 else width
        seed = random.randint(-(2**31), 2**31, 2, dtype=np.int64).astype(np.int32)
        theirs = decode.random_window(
            tf.constant([height, width, 3]), 64, tf.constant(seed)
        ).numpy()
        ours = pillow.random_window(height, width, seed, decode.AREA, decode.ASPECT, decode.COVERED)
        vain += ours is None
        assert tuple(theirs) == (ours or decode._center(height, width, 64)), (height, width, seed)
    assert 10 < vain < 200


@pytest.mark.parametrize(
    'height,width,size', [(375, 500, 224), (1, 1, 8), (3, 200, 64), (224, 224, 224), (37, 53, 128)]
)
def test_resizing_is_tensorflow_s(height, width, size):
    pixels = np.random.RandomState(1).randint(0, 256, (height, width, 3)).astype(np.uint8)
    theirs = tf.raw_ops.ResizeBicubic(
        images=pixels[None], size=(size, size), align_corners=False, half_pixel_centers=False
    )[0]
    theirs = tf.cast(tf.clip_by_value(theirs + 0.5, 0.0, 255.0), tf.uint8).numpy()
    np.testing.assert_array_equal(pillow.resize(pixels, size), theirs)


def _both(monkeypatch, crop):
    results = []
    for has in (True, False):
        monkeypatch.setattr(decode, 'has_tensorflow', lambda has=has: has)
        results.append(crop())
    return results


# Of a BMP file with a palette TensorFlow takes the numbers of the colours for shades of gray.
@pytest.mark.parametrize(
    'kind,mode',
    [
        (kind, mode)
        for kind in ('PNG', 'BMP', 'GIF')
        for mode in ('RGB', 'L', 'P')
        if (kind, mode) != ('BMP', 'P')
    ],
)
def test_files_without_loss_give_the_same_pixels(kind, mode, monkeypatch):
    image = Image.fromarray(_photo(150, 201)).convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    for crop in (
        lambda: decode.center_crop(file.getvalue(), 64),
        lambda: decode.random_crop(file.getvalue(), 64, np.array([3, 4], np.int32)),
    ):
        np.testing.assert_array_equal(*_both(monkeypatch, crop))


@pytest.mark.parametrize('subsampling', [0, 2])
def test_jpeg_files_differ_by_a_few_levels(subsampling, monkeypatch):
    encoded = _encoded(_photo(375, 500), 'JPEG', quality=90, subsampling=subsampling)
    with_it, without = _both(
        monkeypatch, lambda: decode.random_crop(encoded, 224, np.array([3, 4], np.int32))
    )
    difference = np.abs(with_it.astype(int) - without)
    assert difference.max() <= 16 and difference.mean() < 2
    # The whole difference is that of the transforms.
    accurate = tf.io.decode_jpeg(encoded, channels=3, dct_method='INTEGER_ACCURATE')
    np.testing.assert_array_equal(pillow.decode(encoded), accurate)


@pytest.mark.parametrize('damaged', [b'', b'no image', b'\xff\xd8\xff\xe0 cut'])
def test_what_is_no_image_is_a_value_error(damaged, monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(decode, 'has_tensorflow', lambda has=has: has)
        with pytest.raises(ValueError):
            decode.center_crop(damaged, 8)


def test_a_cut_file_is_a_value_error():
    for kind in ('JPEG', 'PNG'):
        with pytest.raises(ValueError):
            pillow.decode(_encoded(_photo(64, 64), kind)[:-200])


@pytest.fixture
def folder(tmp_path):
    """data.dir of 24 images of two classes."""
    for i in range(24):
        place = tmp_path / 'data' / ('test' if i < 8 else 'train') / f'class{i % 2}'
        place.mkdir(parents=True, exist_ok=True)
        (place / f'{i}.png').write_bytes(_encoded(_photo(40 + i, 50, i), 'PNG'))
    return tmp_path / 'data'


def test_a_batch_is_the_same_with_and_without_tensorflow(folder, monkeypatch):
    config = settings.default_config()
    config.data.update(name='folder', dir=str(folder), augment='imagenet', image_size=32)
    layout, _ = replicas.make_layout(8, 8, 1, devices=jax.devices()[:1])
    dataset = load_dataset(config.data)
    with_it, without = _both(monkeypatch, lambda: dataset.train_feed(0, 1, layout))
    for name in ('pixels', 'label'):
        np.testing.assert_array_equal(with_it[name], without[name])
    assert with_it['pixels'].std() > 10


RUN = """
import sys
for name in ('tensorflow', 'tensorflow_datasets', 'clu', 'tensorboard', 'keras'):
    sys.modules[name] = None  # importing it is an ImportError
from sam_jax import main
main.run()
"""


@pytest.mark.slow
def test_a_run_on_a_folder_without_tensorflow(folder, tmp_path):
    flags = [
        '--config=imagenet:model=resnet10',
        f'--workdir={tmp_path}/run',
        '--config.data.name=folder',
        f'--config.data.dir={folder}',
        '--config.data.image_size=32',
        '--config.batch_size=8',
        '--config.replica_batch_size=8',
        '--config.eval.batch_size=8',
        '--config.total_epochs=1',
        '--config.eval.top5=False',
        '--config.optimizer.warmup_epochs=0',
    ]
    ended = subprocess.run(
        [sys.executable, '-c', RUN, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': '',
            'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        },
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count('Pillow decodes the images') == 1
    assert (tmp_path / 'run' / 'result.json').is_file()
