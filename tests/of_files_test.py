"""Predictions of a trained network for image files of any kind, and the table of them."""

import csv
import io
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, lean_environment
from PIL import Image

import sam_jax
from configs import digits
from sam_jax import data
from sam_jax.data import decode, image_files
from sam_jax.errors import UserError
from sam_jax.trained import of_files


@pytest.fixture(scope='module')
def model():
    return sam_jax.load(ROOT / 'published' / 'digits_sam')


@pytest.fixture(scope='module')
def images():
    return data.load_dataset(digits.get_config().data).evals['test'].images[:6]


@pytest.fixture
def folder(tmp_path, images):
    """The same kind of image in files of every kind; two that are broken, and what is none."""
    root = tmp_path / 'images'
    (root / 'sub' / 'deep').mkdir(parents=True)
    grey = images[..., 0]
    Image.fromarray(grey[0]).save(root / 'a.png')
    rgba = np.dstack([grey[1]] * 3 + [np.full((8, 8), 7, np.uint8)])
    Image.fromarray(rgba).save(root / 'sub' / 'b.PNG')
    palette = Image.fromarray(np.dstack([grey[2]] * 3)).convert('P', palette=Image.Palette.ADAPTIVE)
    palette.save(root / 'sub' / 'c.png')
    Image.fromarray(grey[3].astype(np.uint16) * 257).save(root / 'sub' / 'd.png')
    Image.fromarray(np.kron(grey[4], np.ones((6, 6), np.uint8))).save(root / 'sub' / 'e.bmp')
    webp = Image.fromarray(np.dstack([grey[5]] * 3))
    webp.save(root / 'sub' / 'deep' / 'f.webp', lossless=True)
    (root / 'sub' / 'g.png').write_bytes((root / 'a.png').read_bytes()[:60])
    (root / 'sub' / 'h.jpg').write_bytes(b'')
    (root / 'notes.txt').write_text('no image')
    (root / '.hidden.png').write_text('no image')
    return root


NAMES = ['a.png', 'sub/b.PNG', 'sub/c.png', 'sub/d.png', 'sub/deep/f.webp', 'sub/e.bmp']
ORDER = [0, 1, 2, 3, 5, 4]


def test_the_command(folder, model, images, tmp_path):
    """A row a file, in order; what is broken is named, and the status tells of it."""
    done = subprocess.run(
        [sys.executable, '-m', 'sam_jax.cli.predict', f'--workdir={ROOT}/published/digits_sam']
        + [f'--images={folder}', f'--out={tmp_path}/p.csv'],
        cwd=tmp_path,
        env={**lean_environment(tmp_path), 'PYTHONPATH': f'{tmp_path}/stubs:{ROOT}'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith('error: 2 of 8 files cannot be decoded') and 'sub/g.png' in last
    assert 'sub/h.jpg (it is no image of a known format)' in last
    with open(tmp_path / 'p.csv') as file:
        head, *rows = csv.reader(file)
    assert head == ['file', 'class', *map(str, range(10))]
    assert [row[0] for row in rows] == NAMES
    wanted = model.predict(images[ORDER])
    np.testing.assert_allclose(np.array([row[2:] for row in rows], float)[:5], wanted[:5], 1e-4)
    assert [row[1] for row in rows] == [str(i) for i in wanted.argmax(1)]


def test_json_has_the_same(folder, model, tmp_path):
    paths = image_files.find(str(folder))
    path = str(tmp_path / 'p.json')
    count, broken = of_files.write(path, model.classes, of_files.predictions(model, paths, 3))
    assert count == 6 and len(broken) == 2 and not (tmp_path / 'p.json.part').exists()
    rows = json.loads((tmp_path / 'p.json').read_text())
    assert [row['file'] for row in rows] == [str(folder / name) for name in NAMES]
    for row in rows:
        assert row['class'] == max(row['probabilities'], key=row['probabilities'].get)
        assert sum(row['probabilities'].values()) == pytest.approx(1, abs=1e-4)
    nothing = iter([('x', ValueError('broken'))])
    assert of_files.write(str(tmp_path / 'q.csv'), ['a'], nothing) == (0, {'x': 'broken'})
    assert not list(tmp_path.glob('q.csv*'))


def test_what_becomes_of_other_sizes():
    """The central part of the proportions, then a filter as wide as a pixel of the result."""
    same = np.random.RandomState(0).randint(0, 256, (5, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(image_files.fitted(same, (5, 7, 3)), same)
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = (90, 120, 200)  # the square in the middle is all of this colour
    np.testing.assert_array_equal(
        image_files.fitted(wide, (4, 4, 3)), np.broadcast_to((90, 120, 200), (4, 4, 3))
    )
    luma = round(0.299 * 90 + 0.587 * 120 + 0.114 * 200)
    np.testing.assert_array_equal(image_files.fitted(wide, (4, 4, 1)), np.full((4, 4, 1), luma))
    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    small = image_files.fitted(np.dstack([checkers] * 3).astype(np.uint8), (8, 8, 1))
    assert np.abs(small.astype(int) - 127).max() <= 2  # no moire: each pixel is a mean


def test_networks_of_image_files_see_what_their_evaluation_sees(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, 'has_tensorflow', lambda: False)
    pixels = np.random.RandomState(0).randint(0, 256, (40, 60, 3)).astype(np.uint8)
    for name in ('x.png', 'x.webp'):
        Image.fromarray(pixels).save(tmp_path / name, lossless=True)
        found = image_files.read(str(tmp_path / name), (16, 16, 3), image_files.is_of_files('cars'))
        encoded = (tmp_path / name).read_bytes()
        np.testing.assert_array_equal(found, decode.center_crop(encoded, 16))
    assert not image_files.is_of_files('cifar10')


# Pillow warns of what is odd, and goes on.
@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::RuntimeWarning')
def test_damaged_files_give_a_reason(tmp_path):
    """Whatever bytes are changed or cut off: an image, or a ValueError with a reason."""
    draw, pixels = random.Random(0), np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    path, refused = tmp_path / 'x', 0
    for kind in ('png', 'jpeg', 'bmp', 'gif', 'webp', 'tiff'):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        for _ in range(40):
            content = bytearray(buffer.getvalue())
            for _ in range(draw.randrange(1, 6)):
                content[draw.randrange(len(content))] = draw.randrange(256)
            path.write_bytes(content[: draw.randrange(1, len(content) + 1)])
            try:
                assert image_files.read(str(path), (8, 8, 3), False).shape == (8, 8, 3)
            except ValueError as e:
                assert str(e)
                refused += 1
    assert refused > 40
    with pytest.raises(ValueError, match='No such file'):
        image_files.read(str(tmp_path / 'absent'), (8, 8, 3), False)


def test_no_images(tmp_path):
    for place, words in ((tmp_path, 'holds no image'), (tmp_path / 'absent', 'must be a folder')):
        with pytest.raises(UserError, match=words):
            image_files.find(str(place))
