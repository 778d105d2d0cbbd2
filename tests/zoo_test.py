"""Every family of models against the original's sizes, logits and formulas; options of all."""

import functools
import re
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_sam_lowers_the_loss,
    assert_trees_equal,
    golden,
    relative_distance,
    small_config,
)
from reference import golden_shapes, images, recipe_variables, shapes, to_reference

from sam_jax import data, gradients, models, replicas, rngs, train_state, train_step
from sam_jax.errors import UserError
from sam_jax.models import layers, resnet, shake

COUNTS = {  # of params, by number of classes
    ('wrn28_10', 100): 36_278_324,
    ('wrn28_10', 10): 36_220_634,
    ('wrn16_1', 10): 172_506,
    ('shake_shake_26_2x96d', 100): 26_227_572,
    ('shake_shake_26_2x96d', 10): 26_192_922,
    ('pyramidnet272_shakedrop', 100): 26_288_692,
    ('pyramidnet272', 10): 26_210_842,
    ('resnet20', 10): 269_722,
    ('resnet32', 10): 464_154,
    ('resnet56', 10): 853_018,
    ('resnet110', 10): 1_727_962,
    ('resnet18', 1000): 11_689_512,
    ('resnet34', 1000): 21_797_672,
    ('resnet50', 1000): 25_557_032,
    ('resnet101', 1000): 44_549_160,
    ('resnet152', 1000): 60_192_808,
    ('resnet200', 1000): 64_673_832,
    # Of kuangliu/pytorch-cifar, by PyTorch.
    ('cifar_resnet18', 10): 11_173_962,
    ('cifar_resnet34', 10): 21_282_122,
    ('cifar_resnet50', 10): 23_520_842,
    ('preact_resnet18', 10): 11_171_146,
    ('preact_resnet34', 10): 21_279_306,
    ('vgg16_bn', 10): 14_728_266,
    ('efficientnet-b0', 1000): 5_288_548,
    ('efficientnet-b1', 1000): 7_794_184,
    ('efficientnet-b2', 1000): 9_109_994,
    ('efficientnet-b3', 1000): 12_233_232,
    ('efficientnet-b4', 1000): 19_341_616,
    ('efficientnet-b5', 1000): 30_389_784,
    ('efficientnet-b6', 1000): 43_040_704,
    ('efficientnet-b7', 1000): 66_347_960,
    ('efficientnet-b8', 1000): 87_413_142,
    ('efficientnet-l2', 1000): 480_309_308,
    ('efficientnet-l2-475', 1000): 480_309_308,
}
GOLDEN = {  # our name: the golden file, the size of its images, its number of classes
    'shake_shake_14_2x16d': ('WideResnet_ShakeShake_mini', 32, 10),
    'pyramidnet11_shakedrop': ('Pyramid_ShakeDrop_mini', 32, 10),
    'resnet50': ('Resnet50', 224, 1000),
    'efficientnet-b0': ('efficientnet-b0', 224, 1000),
    'resnet101': ('Resnet101', 0, 1000),
    'efficientnet-b4': ('efficientnet-b4', 0, 1000),
}
# A small size of each family, with what makes it smaller still.
TINY = {
    'wrn10_1': {},
    'shake_shake_8_2x4d': {},
    'pyramidnet11': {'alpha': 12.0},
    'pyramidnet11_shakedrop': {'alpha': 12.0},
    'resnet8': {},
    'resnet10': {'width': 8},
    'efficientnet-tiny': {},
    'cifar_resnet10': {'width': 8},
    'preact_resnet10': {'width': 8},
    'vgg6_bn': {'channels': (8, 8, 16, 16, 32)},
}
# Of these a test by hand is enough where nothing but time is to be had.
LATER = ('cifar_resnet10', 'preact_resnet10', 'vgg6_bn')
ROWS = [pytest.param(n, marks=pytest.mark.slow) if n in LATER else n for n in TINY]
RANDOM = ['shake_shake_8_2x4d', 'pyramidnet11_shakedrop', 'efficientnet-tiny']


def tiny(name, **options):
    return models.create_model(name, 10, **TINY[name], **options)


def keys(seed):
    return {name: jax.random.key(seed + i) for i, name in enumerate(('dropout', 'shake'))}


def train(model, variables, x, seed=0, **options):
    """(logits, new statistics) of a training pass."""
    logits, new = model.apply(
        variables, x, train=True, mutable=['batch_stats'], rngs=keys(seed), **options
    )
    return logits, new['batch_stats']


def loss_and_gradient(model, variables, x, seed=0, **options):
    def loss(params):
        logits, stats = train(model, {**variables, 'params': params}, x, seed, **options)
        return jnp.mean(logits.astype(float) * jnp.arange(10.0)[None]), stats

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])


# Sizes and numbers of the original


# Deep ones are traced for long; those of a rule whose ends are counted are left out by default.
DEEP = re.compile('pyramidnet272.*|resnet(110|101|152|200)|efficientnet-(b[1-68]|.*475)')


@pytest.mark.parametrize(
    'name, classes',
    [
        pytest.param(*row, marks=pytest.mark.slow) if DEEP.fullmatch(row[0]) else row
        for row in COUNTS
    ],
)
def test_number_of_params(name, classes):
    variables = shapes(models.create_model(name, classes))
    assert sum(x.size for x in jax.tree.leaves(variables['params'])) == COUNTS[name, classes]


@pytest.mark.parametrize('name', GOLDEN)
def test_every_shape_is_the_original_s(name):
    file, _, classes = GOLDEN[name]
    model = models.create_model(name, classes)
    ours = to_reference(
        model, jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes(model))
    )
    assert {n: x.shape for n, x in ours.items()} == golden_shapes(golden(f'model_{file}'))


@pytest.mark.parametrize('name', [name for name, (_, size, _) in GOLDEN.items() if size])
def test_logits_are_the_original_s(name):
    file, size, classes = GOLDEN[name]
    expected = golden(f'model_{file}')['logits_recipe']
    model = models.create_model(name, classes)
    logits = jax.jit(model.apply)(
        recipe_variables(model), images(1, (len(expected), size, size, 3))
    )
    assert relative_distance(logits, expected) < 1e-5
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    'name',
    [
        'shake_shake_14_2x16d',
        'pyramidnet11_shakedrop',
        pytest.param('efficientnet-b0', marks=pytest.mark.slow),
        pytest.param('resnet50', marks=pytest.mark.slow),
    ],
)
def test_initial_values_are_distributed_as_the_original_s(name):
    """Deviation and end of each tensor's distribution; 5 standard errors of two samples apart."""
    file, _, classes = GOLDEN[name]
    file, model = golden(f'model_{file}'), models.create_model(name, classes)
    start = jax.jit(model.init)(jax.random.key(0, impl='rbg'), jnp.zeros((1, 32, 32, 3)))
    ours = to_reference(model, jax.device_get({'params': start['params']}))
    for n, mean, std, absmax in zip(
        *(file[k].tolist() for k in ('param_names', 'init_mean', 'init_std', 'init_absmax'))
    ):
        x = ours[n]
        if std < 1e-5:
            np.testing.assert_allclose(x, round(mean), err_msg=n)  # scales, biases
        else:
            assert abs(x.std() - std) < 5 * std / np.sqrt(x.size), n
            # A uniform distribution ends at 1.7 deviations, a truncated normal at 2.3; a normal
            # one ends nowhere.
            kind, expected = np.searchsorted([2.0, 2.5], [np.abs(x).max() / x.std(), absmax / std])
            assert x.size < 1000 or kind == expected, n


@pytest.mark.parametrize('name', ['lenet5', 'vit-tiny4'])
def test_the_heads_bias_at_the_start(name):
    model = models.create_model(name, 3, head_bias=-10.0)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    np.testing.assert_array_equal(variables['params']['head']['bias'], [-10.0] * 3)


def test_stem_of_resnet_has_a_relu_when_asked_for():
    plain, with_relu = (models.create_model('resnet10', 10, width=8, stem_relu=r) for r in (0, 1))
    variables, x = recipe_variables(plain), images(1, (2, 32, 32, 3))
    # A stem that is never negative needs none.
    positive = jax.tree.map(jnp.copy, variables)
    positive['params']['bn_init']['bias'] += 100
    for start, same in [(variables, False), (positive, True)]:
        logits = [m.apply(start, x) for m in (plain, with_relu)]
        assert np.allclose(*logits, rtol=1e-5) == same


# By hand: what the original does not have


def convolve(x, params, stride):
    """As much padding on both sides as a kernel has beside its middle."""
    size = len(params['kernel'])
    x = np.pad(x, [(0, 0), *[(size // 2, size // 2)] * 2, (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    y = np.tensordot(windows[:, ::stride, ::stride], params['kernel'], [(4, 5, 3), (0, 1, 2)])
    return y + params.get('bias', 0.0)


def normalise(x, params, stats):
    x = (x - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
    return x * params['scale'] + params['bias']


def by_hand(name, variables, x):
    """The network's inference as its papers draw it, with a block or a convolution a group."""
    params, stats = variables['params'], variables['batch_stats']

    def conv(x, name, stride=1):
        return convolve(x, params[name], stride)

    def norm(x, name):
        return normalise(x, params[name], stats[name])

    def relu(x):
        return np.maximum(x, 0)

    if name.startswith('vgg'):
        for group in range(5):
            x = relu(norm(conv(x, f'group{group}_conv0'), f'group{group}_bn0'))
            n, height, width, channels = x.shape
            x = x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
    elif name.startswith('cifar'):
        x = relu(norm(conv(x, 'conv_init'), 'bn_init'))
        for group in range(4):
            block, stride = f'group{group}_block0', 1 + (group > 0)
            y = relu(norm(conv(x, f'{block}_conv1', stride), f'{block}_bn1'))
            y = norm(conv(y, f'{block}_conv2'), f'{block}_bn2')
            if group:
                x = conv(x, f'{block}_conv_shortcut', stride)
                x = norm(x, f'{block}_bn_shortcut')
            x = relu(x + y)
    else:
        x = conv(x, 'conv_init')
        for group in range(4):
            block, stride = f'group{group}_block0', 1 + (group > 0)
            y = relu(norm(x, f'{block}_bn1'))
            if group:
                x = conv(y, f'{block}_conv_shortcut', stride)
            y = conv(y, f'{block}_conv1', stride)
            x = x + conv(relu(norm(y, f'{block}_bn2')), f'{block}_conv2')
    return x.mean(axis=(1, 2)) @ params['head']['kernel'] + params['head']['bias']


@pytest.mark.parametrize('name', LATER)
def test_what_the_relatives_train_by_hand(name):
    model = tiny(name)
    variables, x = recipe_variables(model), images(1, (2, 32, 32, 3))
    logits = jax.jit(model.apply)(variables, x)
    assert relative_distance(logits, by_hand(name, variables, x)) < 1e-5


@pytest.mark.parametrize('name', ['cifar_resnet10', 'vgg6_bn'])
def test_they_start_as_pytorch_does(name):
    """Uniform in +-1 / sqrt(fan-in)."""
    key = jax.random.key(0, impl='rbg')
    params = jax.jit(tiny(name).init)(key, jnp.zeros((1, 8, 8, 3)))['params']
    for module, layer in params.items():
        if 'kernel' in layer:
            end = np.prod(layer['kernel'].shape[:-1]) ** -0.5
            assert 0.95 * end < np.abs(layer['kernel']).max() <= end, module


@pytest.mark.parametrize('size', [8, 28])
def test_vgg_takes_small_images(size):
    model = models.create_model('vgg16_bn', 10)
    logits = jax.eval_shape(model.apply, shapes(model), jnp.zeros((2, size, size, 3)))
    assert logits.shape == (2, 10)


# The random parts


def keep_rates(name, function, **options):
    """The chances with which a network keeps its branches, in order."""
    model, seen = models.create_model(name, 10, **options), []

    def record(x, key, keep_rate, *_):
        seen.append(keep_rate)
        return x

    with mock.patch.object(shake, function, record):
        jax.eval_shape(functools.partial(train, model), shapes(model), jnp.zeros((1, 32, 32, 3)))
    return seen


def test_branches_of_deeper_blocks_are_dropped_more_often():
    """Linearly: PyramidNet's last one half of the time, EfficientNet's first never."""
    np.testing.assert_allclose(
        keep_rates('pyramidnet29_shakedrop', 'random_shake_drop'), 1 - np.arange(1, 10) / 18
    )
    # Of B0's 16 blocks these keep the shape; the first stage's only block drops nothing anyway.
    blocks = np.array([2, 4, 6, 7, 9, 10, 12, 13, 14])
    for rate in (0.2, 0.4):
        np.testing.assert_allclose(
            keep_rates('efficientnet-b0', 'random_stochastic_depth', stochastic_depth_rate=rate),
            1 - rate * blocks / 16,
        )
    assert not keep_rates('efficientnet-b0', 'random_stochastic_depth', stochastic_depth_rate=0.0)
    assert not keep_rates('pyramidnet29', 'random_shake_drop')


def test_dropout_of_efficientnets():
    rates = [
        models.create_model(f'efficientnet-{size}', 10).dropout_rate
        for size in ('b0', 'b1', 'b2', 'b3', 'b4', 'b5', 'b6', 'b7', 'b8', 'l2', 'l2-475')
    ]
    assert rates == [0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5]
    plain, model = (
        tiny('efficientnet-tiny', stochastic_depth_rate=0.0, dropout_rate=r) for r in (0.0, 0.5)
    )
    variables, x = recipe_variables(plain), images(1, (64, 8, 8, 3))
    inputs = []

    def spy(call, args, kwargs, context):
        inputs.extend([np.asarray(args[0])] * (context.module.name == 'head'))
        return call(*args, **kwargs)

    for m in (plain, model):
        with nn.intercept_methods(spy):
            train(m, variables, x)
    clean, dropped = inputs
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 2 * clean[kept], rtol=1e-5)
    assert abs(kept.mean() - 0.5) < 0.02


@pytest.mark.parametrize('true_gradient', [False, True])
def test_shake_shake_is_the_original_s(true_gradient):
    file, tg = golden('noise_functions'), int(true_gradient)
    forward, backward = file['ss_gate_forward'], file['ss_gate_backward']
    out, pull = jax.vjp(
        lambda a, b: shake.shake_shake(a, b, forward, forward if true_gradient else backward),
        file['xa'],
        file['xb'],
    )
    np.testing.assert_allclose(out, file[f'ss_tg{tg}_out'], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(pull(file['cotangent']), ('dxa', 'dxb')):
        np.testing.assert_allclose(ours, file[f'ss_tg{tg}_{theirs}'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('true_gradient', [False, True])
@pytest.mark.parametrize('p', ['1', '0.75', '0.5'])
def test_shake_drop_is_the_original_s(p, true_gradient):
    file, tg = golden('noise_functions'), int(true_gradient)
    mask, alpha, beta = (file[f'sd_p{p}_{n}'].astype(np.float32) for n in ('mask', 'alpha', 'beta'))
    out, pull = jax.vjp(
        lambda x: shake.shake_drop(x, mask, alpha, alpha if true_gradient else beta), file['xa']
    )
    np.testing.assert_allclose(out, file[f'sd_p{p}_tg{tg}_out'], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        pull(file['cotangent'])[0], file[f'sd_p{p}_tg{tg}_dx'], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(file['xa'] * float(p), file[f'sd_p{p}_eval'], rtol=1e-5)


def test_stochastic_depth_is_the_original_s():
    file = golden('noise_functions')
    mask, out = file['sdepth_mask'].astype(np.float32), file['sdepth_out']
    rate = np.median((file['xa'] / out)[np.broadcast_to(mask == 1, out.shape)])
    np.testing.assert_allclose(
        shake.stochastic_depth(file['xa'], mask, rate), out, rtol=1e-5, atol=1e-6
    )


def test_distributions_of_the_coefficients():
    """One an image; uniform where they should be; forward and backward independent or equal."""
    ones = jnp.ones((4000, 1, 1, 2))

    def coefficients(function, **options):
        out, pull = jax.vjp(lambda x: function(x, **options), ones)
        both = out, pull(jnp.ones_like(out))[0]
        assert all((c[..., 0] == c[..., 1]).all() for c in both)
        return [np.asarray(c[:, 0, 0, 0]) for c in both]

    def mix(x, **options):
        return shake.random_shake_shake(x, 0 * x, jax.random.key(1), **options)

    def drop(x, **options):
        return shake.random_shake_drop(x, jax.random.key(1), 0.75, **options)

    for function, lows in [(mix, (0, 0)), (drop, (-1, 0))]:
        both = coefficients(function, true_gradient=False)
        if function is drop:
            dropped = both[0] != 1
            assert abs(dropped.mean() - 0.25) < 0.03
            both = [c[dropped] for c in both]
        for c, low in zip(both, lows):
            quantiles = np.quantile(c, [0, 0.25, 0.5, 0.75, 1])
            np.testing.assert_allclose(quantiles, np.linspace(low, 1, 5), atol=0.09)
        assert abs(np.corrcoef(both)[0, 1]) < 0.1
        np.testing.assert_allclose(*coefficients(function, true_gradient=jnp.array(True)))
    kept, _ = coefficients(lambda x: shake.random_stochastic_depth(x, jax.random.key(1), 0.8))
    assert set(np.unique(kept)) == {0.0, np.float32(1.25)}
    assert abs((kept > 0).mean() - 0.8) < 0.03


@pytest.mark.parametrize(
    'name', [pytest.param('shake_shake_8_2x4d', marks=pytest.mark.slow), 'pyramidnet11_shakedrop']
)
def test_true_gradient_is_that_of_the_loss(name, x64):
    """Along a direction it is the difference quotient; the shaken one is not."""
    model = tiny(name, dtype='float64', param_dtype='float64')
    variables = jax.tree.map(lambda x: jnp.asarray(x, float), recipe_variables(model))
    x = images(1, (4, 8, 8, 3)).astype(float)
    params, h = variables['params'], 1e-8  # so small that no ReLU changes its mind
    direction = jax.tree.map(lambda w: jnp.asarray(images(w.size, w.shape), float), params)

    def loss_at(t):
        moved = jax.tree.map(lambda w, d: w + t * d, params, direction)
        return loss_and_gradient(model, {**variables, 'params': moved}, x)[0][0]

    (loss, _), true = loss_and_gradient(model, variables, x, true_gradient=True)
    (shaken_loss, _), shaken = loss_and_gradient(model, variables, x, true_gradient=False)
    np.testing.assert_allclose(shaken_loss, loss, rtol=1e-12)
    slope = jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, true, direction))
    np.testing.assert_allclose(slope, (loss_at(h) - loss_at(-h)) / (2 * h), rtol=1e-4)
    assert relative_distance(shaken, true) > 0.05


@pytest.mark.parametrize('name', RANDOM)
def test_randomness_is_for_training_and_keyed(name):
    model = tiny(name)
    variables, x = recipe_variables(model), images(1, (4, 8, 8, 3))
    run = jax.jit(functools.partial(train, model), static_argnames='seed')
    (first, _), (again, _), (other, _) = (run(variables, x, seed=s) for s in (0, 0, 5))
    assert_trees_equal(first, again)
    assert relative_distance(other, first) > 1e-3
    plain = model.apply(variables, x)
    assert_trees_equal(plain, model.apply(variables, x, rngs=keys(7)))


def test_evaluation_is_the_mean_of_the_branches():
    """What shake-shake's branches and ShakeDrop's branch end with, moved by one, moves the sum."""

    def first_block(name, moved):
        model = tiny(name)
        variables = jax.tree.map(np.array, recipe_variables(model))
        for norm in moved:
            variables['params'][norm]['bias'] += 1
        run = functools.partial(model.apply, variables, images(1, (2, 8, 8, 3)))
        outputs = []

        def spy(call, args, kwargs, context):
            outputs.append((context.module.name, np.asarray(args[0])) if args else None)
            return call(*args, **kwargs)

        with nn.intercept_methods(spy):
            run()
        reader = 'block1_bn1' if 'pyramid' in name else 'group1_block0_conv_shortcut1'
        return next(x for n, x in filter(None, outputs) if n == reader)

    for name, moved, expected in [
        ('shake_shake_8_2x4d', ['group0_block0_bn_a2'], 0.5),
        ('shake_shake_8_2x4d', ['group0_block0_bn_b2'], 0.5),
        ('pyramidnet11_shakedrop', ['block0_bn4'], 1 - 0.5 / 3),
        ('pyramidnet11', ['block0_bn4'], 1),
    ]:
        shift = first_block(name, moved) - first_block(name, [])
        np.testing.assert_allclose(shift, expected, rtol=1e-4)


# Options of all families


@pytest.mark.parametrize('name', ROWS)
def test_bfloat16_keeps_params_statistics_and_logits_in_float32(name):
    x, results = images(1, (8, 16, 16, 3)), []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = tiny(name, dtype=dtype)
        variables = recipe_variables(model)
        evaluated = jax.jit(model.apply)(variables, x)
        trained = jax.jit(functools.partial(train, model))(variables, x)
        assert {v.dtype for v in jax.tree.leaves((shapes(model), evaluated, trained))} == {
            np.dtype('float32')
        }
        results.append((evaluated, *trained))
    for full, half in zip(*results):
        assert 1e-5 < relative_distance(half, full) < 0.05


def _activations(model, variables, x):
    """How many numbers a gradient keeps from its forward for its backward pass."""

    def backward(variables):
        return jax.vjp(
            lambda p: train(model, {**variables, 'params': p}, x)[0], variables['params']
        )[1]

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    return size(jax.eval_shape(backward, variables)) - size(variables['params'])


@pytest.mark.parametrize(
    'name',
    [name if name == 'resnet8' else pytest.param(name, marks=pytest.mark.slow) for name in TINY],
)
def test_remat_keeps_less_and_changes_no_number(name):
    # Of 8x8 pixels the last groups of these see one, and BatchNorm four numbers.
    size = 16 if name in LATER else 8
    x, results, kept = images(1, (4, size, size, 3)), [], []
    for remat in (False, True):
        model = tiny(name, remat=remat)
        variables = recipe_variables(model)
        kept.append(_activations(model, variables, x))
        results.append(loss_and_gradient(model, variables, x))
    assert kept[1] < 0.6 * kept[0], kept
    assert relative_distance(*results) < 1e-5


@pytest.mark.parametrize('name', ROWS)
def test_frozen_statistics_are_used_and_kept(name):
    model = tiny(name, frozen_batch_norm=True)
    variables, x = recipe_variables(model), images(1, (4, 8, 8, 3))
    logits, stats = train(model, variables, x)
    assert_trees_equal(stats, variables['batch_stats'])
    if name not in RANDOM:
        np.testing.assert_allclose(logits, model.apply(variables, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ROWS)
def test_synchronised_statistics_are_those_of_the_whole_batch(name):
    model, alone = tiny(name, batch_norm_axis='batch'), tiny(name)
    variables, x = recipe_variables(alone), images(1, (8, 8, 8, 3))
    whole = jax.jit(functools.partial(train, alone))(variables, x)[1]
    parts = jax.pmap(
        functools.partial(train, model),
        axis_name='batch',
        in_axes=(None, 0),
        devices=jax.devices()[:2],
    )(variables, x.reshape(2, 4, 8, 8, 3))[1]
    # Of the first layers, which no randomness reaches.
    first = {
        'wrn10_1': 'group0_block0_bn1',
        'preact_resnet10': 'group0_block0_bn1',
        'efficientnet-tiny': 'bn_stem',
        'vgg6_bn': 'group0_bn0',
    }.get(name, 'bn_init')
    for leaf in ('mean', 'var'):
        np.testing.assert_allclose(parts[first][leaf][0], whole[first][leaf], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(parts[first][leaf][0], parts[first][leaf][1])


def test_options_are_checked():
    with pytest.raises(TypeError, match=r"resnet32 has no option 'shortcut'; .*residual"):
        models.create_model('resnet32', 10, shortcut=False)
    for name, options, message in [
        ('shake_shake_27_2x96d', {}, 'depth 27 and width 96'),
        ('shake_shake_26_2x95d', {}, 'width 95'),
        ('pyramidnet270', {}, 'depth 270'),
        ('pyramidnet272', {'alpha': 0.0}, 'model.alpha is 0.0'),
        ('resnet33', {}, 'depth 33'),
        ('efficientnet-b0', {'dropout_rate': 1.0}, 'model.dropout_rate is 1.0'),
        ('efficientnet-b0', {'stochastic_depth_rate': -0.1}, 'model.stochastic_depth_rate is'),
        ('efficientnet-b9', {}, 'the models are'),
    ]:
        with pytest.raises(UserError, match=message):
            models.create_model(name, 10, **options)


def test_resnet_without_shortcuts_is_a_plain_chain():
    """Where the second BatchNorm of a block gives nothing, nothing is left of the image."""
    for residual in (True, False):
        model = models.create_model('resnet8', 10, residual=residual)
        variables = recipe_variables(model)
        for leaf in ('scale', 'bias'):
            value = variables['params']['group1_block0_bn2'][leaf]
            variables['params']['group1_block0_bn2'][leaf] = jnp.zeros_like(value)
        logits = model.apply(variables, images(1, (2, 16, 16, 3)))
        assert np.allclose(logits[0], logits[1]) == (not residual)


def test_lenet_is_two_convolutions_and_three_dense_layers(x64):
    x = jax.random.normal(jax.random.key(0), (2, 28, 28, 1), jnp.float64)
    model = models.create_model('lenet5', 10, dtype=jnp.float64, param_dtype=jnp.float64)
    params = model.init(jax.random.key(1), x)['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 61_706
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.01, params)  # no bias is zero

    def convolved(x, name):
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), (1, 2))
        kernel, bias = params[name]['kernel'], params[name]['bias']
        y = np.maximum(np.einsum('nhwcij,ijco->nhwo', windows, kernel) + bias, 0)
        n, height, width, channels = y.shape
        return y.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))

    y = convolved(np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))), 'conv1')
    y = convolved(y, 'conv2').reshape(2, 400)
    for name in 'dense1', 'dense2':
        y = np.maximum(y @ params[name]['kernel'] + params[name]['bias'], 0)
    y = y @ params['head']['kernel'] + params['head']['bias']
    np.testing.assert_allclose(model.apply({'params': params}, x), y, rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match='at least 12x12 pixels, not of 8x8'):
        model.init(jax.random.key(0), x[:, :8, :8])


# Folded BatchNorm


class Plain(resnet.ResNet, kw_only=True):
    """A ResNet in the order of its formula."""

    def conv_norm(self, x, channels, kernel, stride, train, names, **options):
        x = self.conv(x, channels, kernel, stride, names[0])
        return self.norm(x, train, names[1], **options)

    def _stem(self, images, train):
        x = self.conv(images, self.width, 7, 2, 'conv_init', padding=[(3, 3), (3, 3)])
        x = self.norm(x, train, 'bn_init')
        x = nn.relu(x) if self.stem_relu else x
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')


def bottleneck(cls, dtype=jnp.float64, **options):
    """A stem and one block, both of whose 1x1 convolutions to more channels are folded."""
    options |= dict(num_classes=4, blocks=(1,), bottleneck=True, width=4)
    return cls(dtype=dtype, param_dtype=jnp.promote_types(dtype, jnp.float32), **options)


def gradient(model, variables, x):
    """The function of (params, x) that returns its gradient, and (logits, new statistics)."""

    def loss(params, x):
        logits, stats = train(model, {**variables, 'params': params}, x)
        return jnp.sum(jnp.sin(logits)), (logits, stats)

    return jax.grad(loss, (0, 1), has_aux=True)


@pytest.fixture(scope='module')
def plain():
    """Variables in which no scale is one and some are negative; images; what comes of them."""
    with jax.enable_x64():
        model, x = bottleneck(Plain), jax.random.normal(jax.random.key(2), (6, 16, 16, 3), float)
        variables = model.init(jax.random.key(0), x, train=False)
        leaves, tree = jax.tree.flatten(variables['params'])
        several = jax.random.split(jax.random.key(1), len(leaves))
        leaves = [p + jax.random.normal(k, p.shape, float) for p, k in zip(leaves, several)]
        variables['params'] = jax.tree.unflatten(tree, leaves)
        scale = variables['params']['bn_init']['scale']
        variables['params']['bn_init']['scale'] = scale * jnp.array([1, -1, 1, -1])
        return variables, x, product(model, variables, x)


def product(model, variables, x):
    """(gradient, logits, statistics) and their derivatives along a vector."""
    at = variables['params'], x
    ways = jax.tree.map(jnp.cos, at)
    return jax.jit(lambda *at: jax.jvp(gradient(model, variables, x), at, ways))(*at)


def test_folded_batch_norm_is_batch_norm(x64, plain):
    """With remat, and in Hessian products; params and statistics keep their names."""
    variables, x, expected = plain
    folded = bottleneck(resnet.ResNet, remat=True)
    initial = folded.init(jax.random.key(0), x, train=False)
    assert_trees_equal(initial, bottleneck(Plain).init(jax.random.key(0), x, train=False))
    for mine, theirs in zip(product(folded, variables, x), expected):
        for found, other in zip(mine, theirs):
            assert relative_distance(found, other) < 1e-11
    # The arrays between are not kept.
    sizes = [_activations(bottleneck(cls), variables, x) for cls in (resnet.ResNet, Plain)]
    assert sizes[0] < 0.8 * sizes[1]


def test_folded_batch_norm_over_devices_is_that_of_the_whole_batch(x64, plain):
    variables, x, (((params_gradient, x_gradient), (logits, stats)), _) = plain
    model = bottleneck(resnet.ResNet, batch_norm_axis='batch')
    (of_params, of_x), (found, found_stats) = jax.jit(
        jax.vmap(gradient(model, variables, x), (None, 0), axis_name='batch')
    )(variables['params'], x.reshape(2, 3, *x.shape[1:]))
    of_params = jax.tree.map(lambda p: p.sum(0), of_params)
    found_stats = jax.tree.map(lambda s: s[1], found_stats)
    together = of_params, of_x.reshape(x.shape), found.reshape(logits.shape), found_stats
    for a, b in zip(together, (params_gradient, x_gradient, logits, stats)):
        assert relative_distance(a, b) < 1e-11


def test_folded_batch_norm_by_running_statistics(x64, plain):
    variables, x, (((_, _), (_, stats)), _) = plain
    variables = {**variables, 'batch_stats': stats}
    logits = bottleneck(Plain).apply(variables, x)
    frozen = bottleneck(resnet.ResNet, frozen_batch_norm=True)
    assert relative_distance(frozen.apply(variables, x), logits) < 1e-12
    found, kept = train(frozen, variables, x)
    assert relative_distance(found, logits) < 1e-12
    assert_trees_equal(kept, stats)


def test_folded_batch_norm_clips_a_variance_below_zero():
    norm = layers.FoldedBatchNorm(2, 0.5, 1e-3, jnp.float32)
    moments = jnp.zeros(2), jnp.array([-1.0, 3.0])
    variables = norm.init(jax.random.key(0), None)
    (_, factor, _), new = norm.apply(variables, moments, mutable=['batch_stats'])
    np.testing.assert_allclose(factor, [1e-3**-0.5, 3.001**-0.5], rtol=1e-5)
    np.testing.assert_allclose(new['batch_stats']['var'], [0.5, 2.0])


class OneNorm(layers.Network):
    """A 1x1 convolution and its BatchNorm, folded or not."""

    fold: bool = True

    @nn.compact
    def __call__(self, x, train=True):
        if self.fold:
            return self.conv_norm(x, 12, 1, 1, train, ('conv', 'bn'))
        return self.norm(self.conv(x, 12, 1, 1, 'conv'), train, 'bn')


def test_folded_batch_norm_in_bfloat16_is_as_near_as_batch_norm():
    """Where the mean is large beside the deviation; its statistics are nearer."""
    x = jax.random.normal(jax.random.key(2), (4, 6, 6, 5)) + 20
    x = x.astype(jnp.bfloat16).astype(jnp.float32)
    exact, folded = OneNorm(10, fold=False), OneNorm(10, dtype=jnp.bfloat16)
    variables = exact.init(jax.random.key(0), x)
    results = [
        jax.jit(gradient(model, variables, x))(variables['params'], x.astype(model.dtype))
        for model in (exact, folded, OneNorm(10, fold=False, dtype=jnp.bfloat16))
    ]
    for expected, found, other in zip(*map(jax.tree.leaves, results)):
        assert relative_distance(found, expected) < 2 * relative_distance(other, expected)
    stats = [r[1][1] for r in results]
    assert relative_distance(stats[1], stats[0]) < 0.5 * relative_distance(stats[2], stats[0])


# Under SAM


# Those that another one has all the parts of, or that other tests train.
@pytest.mark.parametrize(
    'name',
    [name if name == 'resnet8' else pytest.param(name, marks=pytest.mark.slow) for name in TINY],
)
def test_sam_lowers_the_loss_on_two_devices(name):
    assert_sam_lowers_the_loss(tiny(name), steps=10)


# By default methods_in_training_test.py looks at which gradient a model is asked for.
@pytest.mark.slow
def test_ascent_alone_is_along_the_true_gradient():
    """The step perturbs by the true gradient and descends by the shaken one, with one set of rngs.

    With rho = 0, and for plain SGD, the shaken one is all there is.
    """
    config = small_config(
        batch_size=16,
        replica_batch_size=16,
        log_every_steps=1,
        sam__rho=0.1,
        optimizer__clip_norm=0.0,
        optimizer__momentum=0.0,
        optimizer__schedule='constant',
        optimizer__weight_decay=0.0,
    )
    dataset = data.load_dataset(config.data)
    layout, _ = replicas.make_layout(16, 16, 1, devices=jax.devices()[:1])
    model = tiny('shake_shake_8_2x4d')
    start = train_state.create_train_state(config, model, dataset.image_shape)
    feed = dataset.train_feed(0, 0, layout)
    arrays = jax.tree.map(jnp.asarray, dataset.device_arrays(dataset.train))
    batch = dataset.train_batch(
        arrays,
        jax.tree.map(lambda x: jnp.asarray(x[0, 0]), feed),
        jax.random.split(jax.random.key(0), 16),
        jax.random.key(0),
    )
    replica = {
        **batch,
        'rngs': {purpose: rngs.key(0, purpose, 0, 0) for purpose in ('dropout', 'shake')},
    }

    @jax.jit
    def gradient(params, true_gradient):
        return gradients.replica_gradient(
            params,
            start.batch_stats,
            replica,
            gradients.Training.from_config(config, model, 0.0),
            true_gradient,
        )[0][0]

    true, shaken = (gradient(start.params, t) for t in (True, False))
    assert relative_distance(true, shaken) > 0.05
    scale = 0.1 / optax.tree.norm(true)
    perturbed = gradient(jax.tree.map(lambda w, g: w + scale * g, start.params, true), False)
    for method, runs in [('sam', [(0.1, perturbed), (0.0, shaken)]), ('sgd', [(0.1, shaken)])]:
        config.sam.method = method
        step = train_step.make_train_step(model, config, layout, dataset)
        for config.sam.rho, expected in runs:
            state, _ = step(
                layout.replicate(jax.tree.map(jnp.copy, start)),
                layout.shard(feed),
                layout.replicate(arrays),
                layout.replicate(train_state.HParams.from_config(config)),
            )
            descended = jax.tree.map(lambda new, old: (old - new) / 0.1, state.params, start.params)
            assert relative_distance(descended, expected) < 1e-4
