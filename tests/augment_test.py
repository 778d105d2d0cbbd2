"""The sixteen operations, policies and cutout against the original's, and their distributions."""

import ast
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden, small_config
from scipy import stats

from sam_jax import data
from sam_jax.data import augment, ops
from sam_jax.data.policies import POLICIES

pytestmark = pytest.mark.accelerator

OPS, RAND, PICKED = map(golden, ('autoaugment_ops', 'randaugment', 'autoaugment_policies'))
SHAPE = (32, 32, 3)
apply = jax.jit(ops.apply, static_argnames='indexed')
P_VALUE = 1e-3


def run(name, level, sign, image, constants, center=(0.0, 0.0), indexed=True):
    op = ops.resolve(name, level, sign == '-', image.shape, constants)
    return np.asarray(apply(op, image, jnp.array(center, jnp.float32), indexed=indexed))


@pytest.mark.parametrize('indexed', [True, False])
@pytest.mark.parametrize('name', ops.NAMES)
def test_op_is_the_original_s_to_the_last_pixel(name, indexed):
    compared = 0
    for key in OPS.files:
        if not key.startswith(f'{name}/') or not key.endswith('/out'):
            continue
        _, kind, level, sign, image, *rest = key.split('/')
        constants = ops.FAITHFUL if kind == 'aa' else ops.FAITHFUL_RANDAUGMENT
        center = tuple(map(float, rest[0][1:].split('_'))) if name == 'Cutout' else (0.0, 0.0)
        np.testing.assert_array_equal(
            run(name, int(level[1:]), sign, OPS[f'images/{image}'], constants, center, indexed),
            OPS[key],
            err_msg=key,
        )
        compared += 1
    assert compared >= 12


def test_randaugment_s_levels_are_the_original_s():
    compared = 0
    for key in RAND.files:
        kind, *rest = key.split('/')
        if kind != 'one' or rest[-1] != 'out' or rest[1] == 'Cutout':
            continue
        magnitude, name, sign, _ = rest
        np.testing.assert_array_equal(
            run(name, int(magnitude[1:]), sign, RAND['images/smooth32'], ops.FAITHFUL_RANDAUGMENT),
            RAND[key],
            err_msg=key,
        )
        compared += 1
    assert compared == 100 and set(RAND['ops']) == set(ops.NAMES)


@pytest.mark.parametrize('name', POLICIES)
def test_policy_is_the_original_s(name):
    theirs = [tuple(ast.literal_eval(str(line))) for line in PICKED[f'policies/{name}']]
    assert [tuple(map(tuple, line)) for line in POLICIES[name]] == theirs


def test_every_line_of_the_policy_for_cifar():
    """With all operations on but those of chance 0, and Cutout, whose place is random."""
    compared = 0
    for i, line in enumerate(POLICIES['cifar']):
        if any(name == 'Cutout' or chance == 0 for name, chance, _ in line):
            continue
        for sign in '+-':
            for kind in ('rand32', 'smooth32'):
                image = PICKED[f'images/{kind}']
                for name, _, level in line:
                    image = run(name, level, sign, image, ops.FAITHFUL)
                np.testing.assert_array_equal(image, PICKED[f'cifar/{i}/{sign}/{kind}/out'])
                compared += 1
    assert compared > 300


# The corrected variant against PIL


def pil(name, level, image):
    from PIL import Image, ImageEnhance, ImageOps

    picture, factor = Image.fromarray(image), level * 0.18 + 0.1
    return np.asarray(
        {
            'AutoContrast': lambda: ImageOps.autocontrast(picture),
            'Equalize': lambda: ImageOps.equalize(picture),
            'Invert': lambda: ImageOps.invert(picture),
            'Solarize': lambda: ImageOps.solarize(picture, int(level * 25.6)),
            'Posterize': lambda: ImageOps.posterize(picture, int(level * 0.4)),
            'Color': lambda: ImageEnhance.Color(picture).enhance(factor),
            'Contrast': lambda: ImageEnhance.Contrast(picture).enhance(factor),
            'Brightness': lambda: ImageEnhance.Brightness(picture).enhance(factor),
            'Sharpness': lambda: ImageEnhance.Sharpness(picture).enhance(factor),
            'TranslateX': lambda: picture.transform(
                picture.size,
                Image.Transform.AFFINE,
                (1, 0, level * 15 / 331 * 32, 0, 1, 0),
                fillcolor=(128,) * 3,
            ),
            'ShearY': lambda: picture.transform(
                picture.size,
                Image.Transform.AFFINE,
                (1, 0, 0, level * 0.03, 1, 0),
                fillcolor=(128,) * 3,
            ),
        }[name]()
    )


@pytest.mark.parametrize('level', [3, 7, 10])
@pytest.mark.parametrize(
    'name, grey_levels, share',
    [
        # PIL's histogram stretch and smoothing round where the original cuts off; its warps read at
        # the middle of a pixel.
        ('AutoContrast', 1, 1.0),
        ('Equalize', 0, 0.0),
        ('Invert', 0, 0.0),
        ('Solarize', 0, 0.0),
        ('Posterize', 0, 0.0),
        ('Color', 2, 1.0),
        ('Contrast', 2, 1.0),
        ('Brightness', 1, 1.0),
        ('Sharpness', 2, 1.0),
        ('TranslateX', 255, 0.15),
        ('ShearY', 255, 0.15),
    ],
)
def test_corrected_op_is_pil_s(name, grey_levels, share, level):
    image = OPS['images/smooth32']
    ours = run(name, level, '+', image, ops.corrected(32)).astype(int)
    apart = np.abs(ours - pil(name, level, image))
    assert apart.max() <= grey_levels
    assert (apart > 0).mean() <= share


def test_corrected_variant_mends_what_the_original_breaks():
    image = OPS['images/rand32']
    for name, level in [('TranslateX', 3), ('Solarize', 10)]:
        theirs, ours = (run(name, level, '+', image, c) for c in (ops.FAITHFUL, ops.corrected(32)))
        kept = [(result == image).all(axis=-1).mean() for result in (theirs, ours)]
        if name == 'TranslateX':
            assert (theirs == ops.GREY).all() and (ours == ops.GREY).mean() < 0.2
        else:
            np.testing.assert_array_equal(theirs, 255 - image)
            assert kept[1] == 1
    bright, dark = image // 2 + 128, image // 2
    grey_at_factor_0 = ops.corrected(32)._replace(translate=0.0)
    for part in (bright, dark):
        result = run('Contrast', 0, '+', part, grey_at_factor_0).astype(float)
        assert abs(result.mean() - part.mean()) < 3


def test_one_channel():
    """Every operation but Color, which has nothing to do, works on grey images as on colour."""
    colour = np.repeat(OPS['images/smooth32'][..., :1], 3, axis=-1)
    for name in ops.NAMES:
        for constants in (ops.FAITHFUL, ops.corrected(32)):
            grey = run(name, 4, '-', colour[..., :1], constants, (0.4, 0.6))
            expected = (
                colour if name == 'Color' else run(name, 4, '-', colour, constants, (0.4, 0.6))
            )
            # The weights of the luminance do not add up to one in float32.
            assert np.abs(grey.astype(int) - expected[..., :1]).max() <= 1, name


# Chances


@pytest.mark.parametrize('name', POLICIES)
def test_lines_operations_and_signs_are_chosen_with_their_chances(name):
    policy, n = POLICIES[name], 40_000
    table, draw = augment.autoaugment(policy, SHAPE, ops.FAITHFUL)
    rows, places = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), n))
    rows = np.asarray(rows)
    assert len(table.kind) == 4 * len(policy) + 1
    counts = np.bincount(rows.ravel(), minlength=len(table.kind))
    chances = np.array([[c for _, c, _ in line] for line in policy]).ravel()
    expected = np.repeat(chances, 2) * n / len(policy) / 2
    assert (counts[1:][expected == 0] == 0).all()
    observed, expected = counts[1:][expected > 0], expected[expected > 0]
    assert (
        stats.chisquare([*observed, counts[0]], [*expected, 2 * n - expected.sum()]).pvalue
        > P_VALUE
    )
    both = (rows > 0).all(axis=1)
    line_of = (rows - 1) // 4
    assert (line_of[both, 0] == line_of[both, 1]).all()
    assert stats.kstest(np.ravel(places), 'uniform').pvalue > P_VALUE


def test_randaugment_chooses_uniformly():
    table, draw = augment.randaugment(2, 9, SHAPE, ops.FAITHFUL_RANDAUGMENT)
    rows, _ = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 20_000))
    assert len(table.kind) == 32
    assert stats.chisquare(np.bincount(np.ravel(rows), minlength=32)).pvalue > P_VALUE


# Recipes


@pytest.mark.parametrize('shape', [(32, 32, 3), (28, 28, 1), (13, 18, 3)])
def test_all_ways_to_map_agree(shape):
    """One by one as on CPU, all at once by index as on GPUs, by comparison as on TPUs.

    On every operation, at levels of the policies and beyond.
    """
    random = np.random.RandomState(0)
    table = augment._stack(
        [
            ops.resolve(name, level, negative, shape, constants)
            for constants in (ops.FAITHFUL, ops.corrected(shape[0]))
            for name in ops.NAMES
            for level in (0, 1, 4, 6, 9, 10, 17, 30)
            for negative in (False, True)
        ]
    )
    n = len(table.kind)
    spread = random.randint(1, 257, (n, 1, 1, 1))
    images = (random.randint(0, 257 - spread) + random.randint(0, spread, (n, *shape))).astype(
        np.uint8
    )
    rows, places = np.arange(n, dtype=np.int32)[:, None], random.rand(n, 1, 2).astype(np.float32)
    mapped = jax.jit(functools.partial(augment.one_by_one, table))(images, rows, places)
    for indexed in (True, False):
        together = jax.jit(functools.partial(augment.all_at_once, table, indexed))
        np.testing.assert_array_equal(mapped, together(images, rows, places))
    assert (mapped != images).any(axis=(1, 2, 3)).mean() > 0.7


@pytest.mark.parametrize('shape', [(32, 32, 3), (28, 28, 1), (5, 9, 3), (4, 4, 1)])
@pytest.mark.parametrize('padding', [1, 4])
def test_flip_and_shift_as_products(shape, padding):
    image = jnp.asarray(np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8))
    number = 2 * padding + 1
    draws = [x.reshape(-1) for x in np.indices((2, number, number))]

    def by_index(flipped, dy, dx):
        return augment.shift(augment.flip(image, flipped == 1), padding, dy, dx)

    def by_products(flipped, dy, dx):
        return augment.flip_and_shift(image, flipped == 1, dy, dx, padding)

    moved = [np.asarray(jax.jit(jax.vmap(f))(*draws)) for f in (by_index, by_products)]
    np.testing.assert_array_equal(*moved)


def test_products_are_rounded_before_they_are_added():
    """Of all pairs of pixels and all factors, where NumPy cannot do otherwise."""
    degenerate, image = (x.astype(np.uint8) for x in np.indices((256, 256)))
    blend = jax.jit(functools.partial(ops._blend, jnp))
    difference = image.astype(np.float32) - degenerate.astype(np.float32)
    for level in range(31):
        factor = np.float32(level / 10 * 1.8 + 0.1)
        expected = np.clip(degenerate.astype(np.float32) + factor * difference, 0, 255)
        ours = blend(degenerate, image, ops._halves(factor))
        np.testing.assert_array_equal(ours, expected.astype(np.uint8))


@pytest.mark.parametrize('indexed', [True, False])
def test_autocontrast_of_all_ranges(indexed):
    """The products are rounded first, of every lowest and highest value."""
    low, high = (x[:, None] for x in np.triu_indices(256, 1))
    images = np.stack([low, high], axis=1).astype(np.uint8)[..., None]
    tables = jax.jit(jax.vmap(lambda image: ops._autocontrast(image, indexed)))(images)
    scale = np.float32(255) / (high - low).astype(np.float32)
    values = np.arange(256, dtype=np.float32)[None]
    expected = np.clip(scale * values - scale * low.astype(np.float32), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(tables[:, 0], expected)


def _finish(augmentation, batch_key=0):
    images = golden('augmentation_cutout')['batch/image']
    source = data.SOURCES['cifar10']
    keys = jax.random.split(jax.random.key(3), len(images))
    return np.asarray(
        augment.finish(
            images, keys, jax.random.key(batch_key), augmentation, source.mean, source.std
        )
    )


@pytest.mark.parametrize(
    'name', [n for n in golden('augmentation_cutout') if n.startswith('cutout/')]
)
def test_cutout_is_the_original_s(name):
    file = golden('augmentation_cutout')
    size, cy, cx = (int(word.lstrip('lencyx')) for word in name.split('/')[1].split('_'))
    whole = _finish(augment.Augmentation('basic'))
    for ours, theirs in zip(whole, file[name]):
        np.testing.assert_allclose(
            augment.cutout(jnp.asarray(ours), (cy, cx), size), theirs, rtol=0, atol=5e-7
        )


def test_cutout_has_one_place_a_batch_or_one_an_image():
    def squares(**options):
        whole = _finish(augment.Augmentation('basic'))
        cut = _finish(augment.Augmentation('cutout', **options))
        np.testing.assert_array_equal(cut[cut != 0], whole[cut != 0])
        return [tuple(np.flatnonzero((c != w).any(axis=-1))) for c, w in zip(cut, whole)]

    assert len(set(squares())) == 1
    assert len(set(squares(cutout_per_image=True))) == 6
    assert len(squares(cutout_size=2)[0]) in (2, 4)
    always, never = (squares(cutout_per_image=True, cutout_probability=p) for p in (1.0, 0.0))
    assert never == 6 * [()] and all(always)
    some = squares(cutout_per_image=True, cutout_probability=0.5)
    # Where there is one, it is where it always is.
    assert 0 < some.count(()) < 6
    assert all(s in ((), a) for s, a in zip(some, always))
    assert squares(cutout_probability=0.0) == never
    other = _finish(augment.Augmentation('cutout'), batch_key=1)
    assert (other != _finish(augment.Augmentation('cutout'))).any()


@pytest.mark.parametrize('recipe', augment.RECIPES)
def test_recipe_is_made_of_its_parts(recipe):
    """Each is a function of an example's key alone; parts leave traces of their own."""
    images = np.random.RandomState(0).randint(0, 256, (40, *SHAPE)).astype(np.uint8)
    images[:, 0, 0] = images[:, 5, 5]
    keys = jax.random.split(jax.random.key(0), 40)
    run_recipe = jax.jit(
        functools.partial(augment.augment, augmentation=augment.Augmentation(recipe))
    )
    result = np.asarray(run_recipe(images, keys))
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(run_recipe(images[::-1], keys[::-1])[::-1], result)
    same = (result == images).all(axis=(1, 2, 3)).mean()
    parts = augment.RECIPES[recipe]
    if 'shift' in parts or 'randaugment' in parts:
        assert same < 0.15
    elif 'autoaugment' in parts:
        assert 0.0 < same < 0.5  # both operations left out
    elif 'flip' in parts:
        flipped = (result == images[:, :, ::-1]).all(axis=(1, 2, 3))
        assert 0.3 < same < 0.7 and flipped.mean() == 1 - same
    else:
        assert same == 1


# Pairs.


def _mixed(file, batch_key=0, axis_name=None, **options):
    images, labels = file['preprocess/cifar10/image'], jnp.asarray(file['batch/label'], jnp.int32)
    keys = jax.random.split(jax.random.key(3), len(images))
    return augment.mix(
        jnp.asarray(images),
        labels,
        keys,
        jax.random.key(batch_key),
        augment.Augmentation('none', **options),
        10,
        axis_name,
    )


@pytest.mark.parametrize('weight,drawn', [(0.3, 0.3), (0.8, 0.8), (0.8, 0.2)])
def test_mixup_is_the_original_s(weight, drawn, monkeypatch):
    """Its weight is the larger of the draw and its complement, its partner the mirrored place."""
    file = golden('augmentation_mix')
    monkeypatch.setattr(jax.random, 'beta', lambda *args, **kwargs: jnp.float32(drawn))
    images, labels = _mixed(file, mixup_alpha=1.0)
    np.testing.assert_allclose(images, file[f'mixup_cifar/w{weight}/image'], rtol=0, atol=1e-6)
    np.testing.assert_allclose(labels, file[f'mixup_cifar/w{weight}/label'], rtol=0, atol=1e-6)


def test_without_alpha_nothing_is_mixed():
    file = golden('augmentation_mix')
    images, labels = _mixed(file)
    np.testing.assert_array_equal(images, file['preprocess/cifar10/image'])
    assert labels.ndim == 1 and labels.dtype == jnp.int32


@pytest.mark.parametrize('per_image', [False, True])
@pytest.mark.parametrize('alpha', [0.2, 1.0, 8.0])
def test_weights_are_drawn_from_a_beta_distribution(alpha, per_image):
    """Mixup's labels show max(w, 1 - w): one for the batch, or one an image."""
    mixed = jax.jit(
        lambda key: augment.mix(
            jnp.zeros((6, 2, 2, 1)),
            jnp.arange(6),
            jax.random.split(key, 6),
            key,
            augment.Augmentation('none', mixup_alpha=alpha, mix_per_image=per_image),
            6,
        )[1]
    )
    labels = np.stack([mixed(jax.random.key(seed)) for seed in range(300)])
    weights = np.einsum('sii->si', labels)
    np.testing.assert_allclose(labels.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.einsum('sii->si', labels[:, :, ::-1]), 1 - weights, atol=1e-6)
    assert len(np.unique(weights[0])) == (6 if per_image else 1)
    draws = weights.ravel() if per_image else weights[:, 0]
    folded = stats.beta(alpha, alpha)
    assert stats.kstest(draws, lambda x: 2 * folded.cdf(x) - 1).pvalue > 1e-3


@pytest.mark.parametrize('per_image', [False, True])
def test_cutmix_exchanges_a_box(per_image):
    """The label's weight is the share of pixels outside of the box; the box is the partner's."""
    shape = (6, 16, 24, 1)
    images = jnp.broadcast_to(jnp.arange(1.0, 7).reshape(6, 1, 1, 1), shape)
    shares, boxes = [], []
    for seed in range(40):
        key = jax.random.key(seed)
        mixed, labels = augment.mix(
            images,
            jnp.arange(6),
            jax.random.split(key, 6),
            key,
            augment.Augmentation('none', cutmix_alpha=1.0, mix_per_image=per_image),
            6,
        )
        for i in range(6):
            own, other = (np.asarray(mixed[i, ..., 0]) == k for k in (i + 1, 6 - i))
            assert (own | other).all()
            rows, columns = other.any(axis=1), other.any(axis=0)
            np.testing.assert_array_equal(other, np.outer(rows, columns))  # a box
            assert (np.diff(np.flatnonzero(rows)) == 1).all()
            np.testing.assert_allclose(labels[i, i], own.mean(), atol=1e-6)
            np.testing.assert_allclose(labels[i, 5 - i], other.mean(), atol=1e-6)
        boxes.append(len({np.asarray(mixed[i, ..., 0] == 6 - i).tobytes() for i in range(6)}))
        shares.append(float(labels[0, 0]))
    assert set(boxes) == {1} if not per_image else np.mean(boxes) > 4
    # E[1 - w] = 1/2 of the area, less what lies beyond the border.
    assert 0.5 < np.mean(shares) < 0.8 and np.std(shares) > 0.1


def test_cutmix_box_by_hand():
    image, other = jnp.zeros((8, 12, 1)), jnp.ones((8, 12, 1))
    mixed, share = augment.cutmix(image, other, jnp.float32(0.75), jnp.array([1, 6]))
    expected = np.zeros((8, 12))
    expected[0:3, 3:9] = 1  # sides 4 and 6 around (1, 6), cut at the upper border
    np.testing.assert_array_equal(mixed[..., 0], expected)
    np.testing.assert_allclose(share, 1 - 18 / 96, rtol=1e-6)


# Size.


@pytest.mark.parametrize('size,rows', [(33, 1), (64, 2), (224, 8)])
def test_enlarging_is_tensorflow_s_v1_bicubic(size, rows):
    file = golden('augmentation_mix')
    expected = file[f'resize_bicubic_v1/{size}']
    images = augment.enlarge(jnp.asarray(file['preprocess/cifar10/image'][: len(expected)]), size)
    assert images.shape[1:] == (size, size, 3)
    np.testing.assert_allclose(images[:, ::rows], expected, rtol=0, atol=2e-5)


def test_enlarged_batches():
    """Fine-tuning on small images: the network gets larger ones, augmentation sees the small."""
    config = small_config(data__name='fake_cifar10', data__image_size=48, data__augment='basic')
    dataset = data.load_dataset(config.data)
    assert (dataset.image_shape, dataset.pixel_shape) == ((48, 48, 3), (32, 32, 3))
    feed = {'index': jnp.arange(4), 'label': jnp.arange(4), 'mask': jnp.ones(4)}
    arrays = dataset.device_arrays(dataset.train)
    keys = jax.random.split(jax.random.key(0), 4)
    for batch in (
        dataset.train_batch(arrays, feed, keys, keys[0]),
        dataset.eval_batch(arrays, feed),
    ):
        assert batch['image'].shape == (4, 48, 48, 3)
    small = augment.normalize(dataset.train.images[:4], dataset.mean, dataset.std)
    np.testing.assert_allclose(batch['image'], augment.enlarge(small, 48), atol=1e-5)
