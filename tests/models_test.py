"""WideResNet against the original's sizes, numbers and initial values, and by hand."""

import functools
import itertools

import flax.errors
import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    from_reference,
    golden_shapes,
    images,
    recipe,
    recipe_variables,
    shapes,
    to_reference,
)

from sam_jax import models
from sam_jax.errors import UserError
from sam_jax.models import layers

pytestmark = pytest.mark.accelerator

MINI = helpers.golden('model_WideResnet_mini')
FULL = helpers.golden('model_WideResnet28x10_c100')
KEYS = [jax.random.key(i, impl='rbg') for i in range(2)]  # compiles faster than the default


def init(model):
    return jax.jit(model.init)(KEYS[0], jnp.zeros((1, 8, 8, 3)))


@functools.partial(jax.jit, static_argnames=('model', 'train'))
def apply(model, variables, x, train=False, dropout_key=None):
    """Returns logits and, in training, the new statistics."""
    logits, changed = model.apply(
        variables,
        x,
        train=train,
        mutable=['batch_stats'],
        rngs=None if dropout_key is None else {'dropout': dropout_key},
    )
    return logits, changed.get('batch_stats')


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


# Against the original


@pytest.mark.parametrize('name, file', [('wrn16_1', MINI), ('wrn28_10', FULL)])
def test_every_shape_is_the_original_s(name, file):
    model = models.create_model(name, int(file['num_classes']))
    variables = shapes(model)
    assert {n: x.shape for n, x in to_reference(model, variables).items()} == golden_shapes(file)
    assert (count(variables['params']), count(variables['batch_stats'])) == (
        file['param_count'],
        file['state_count'],
    )


def test_reference_names_go_there_and_back():
    arrays = {n: recipe(n, shape) for n, shape in golden_shapes(MINI).items()}
    model = models.create_model('wrn16_1', 10)
    helpers.assert_trees_equal(to_reference(model, from_reference(model, arrays)), arrays)


def test_logits_are_the_original_s():
    model = models.create_model('wrn16_1', 10)
    logits, _ = apply(model, recipe_variables(model), images(int(MINI['x_seed']), (4, 32, 32, 3)))
    assert helpers.relative_distance(logits, MINI['logits_recipe']) < 1e-5
    np.testing.assert_allclose(logits, MINI['logits_recipe'], rtol=1e-4, atol=1e-5)


def test_initial_values_are_distributed_as_the_original_s():
    """Mean, deviation and largest entry of each tensor agree, to what two samples may differ."""
    model = models.create_model('wrn16_1', 10)
    ours = to_reference(model, jax.device_get({'params': init(model)['params']}))
    for name, mean, std, absmax in zip(
        *(MINI[k] for k in ('param_names', 'init_mean', 'init_std', 'init_absmax')), strict=True
    ):
        x = np.asarray(ours[name])
        if std == 0:
            assert (x == mean).all(), name  # scales 1, biases 0
            continue
        error = std / np.sqrt(x.size)
        assert abs(x.mean() - mean) < 5 * error * np.sqrt(2), name
        assert abs(x.std() - std) < 5 * error, name
        # A normal distribution cut at two deviations would end 35 to 50 % earlier.
        np.testing.assert_allclose(np.abs(x).max(), absmax, rtol=0.25, err_msg=name)


def test_initial_head_scales_with_the_number_of_classes():
    """Uniform in +-1 / sqrt(C)."""
    kernel = layers.dense_init(KEYS[0], (640, 100))
    row = FULL['param_names'].tolist().index('Dense_3/kernel')
    np.testing.assert_allclose(kernel.std(), FULL['init_std'][row], rtol=0.01)
    assert 0.0999 < FULL['init_absmax'][row] <= 0.1
    assert 0.0999 < np.abs(kernel).max() <= 0.1


# By hand


def convolve(x, params, stride):
    """3x3 with TensorFlow's SAME padding: one more at the end where it is odd."""
    before = 1 if stride == 1 else 0
    x = np.pad(x, [(0, 0), (before, 1), (before, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    y = np.tensordot(windows[:, ::stride, ::stride], params['kernel'], [(4, 5, 3), (0, 1, 2)])
    return y + params.get('bias', 0.0)


def fit(x, like):
    """x, pooled by plain means and padded with zero channels to the shape of `like`."""
    n, height, width, channels = like.shape
    x = x.reshape(n, height, x.shape[1] // height, width, -1, x.shape[-1]).mean(axis=(2, 4))
    return np.concatenate([x, np.zeros((n, height, width, channels - x.shape[-1]))], axis=-1)


def forward(variables, x, blocks, extra_skips):
    """The network's inference as documented, from its parts."""
    params, stats = variables['params'], variables.get('batch_stats', {})

    def activate(x, name):
        if name in stats:
            x = (x - stats[name]['mean']) / np.sqrt(stats[name]['var'] + 1e-5)
            x = x * params[name]['scale'] + params[name]['bias']
        return np.maximum(x, 0)

    inputs = [x]
    x = convolve(x, params['conv_init'], 1)
    for group, block in itertools.product(range(3), range(blocks)):
        name = f'group{group}_block{block}'
        if block == 0:
            inputs.append(x)
        y = activate(x, f'{name}_bn1')
        shortcut = y if (group, block) == (0, 0) else x
        y = convolve(y, params[f'{name}_conv1'], 2 if group and block == 0 else 1)
        y = convolve(activate(y, f'{name}_bn2'), params[f'{name}_conv2'], 1)
        x = y + fit(shortcut, y)
        if extra_skips and block == blocks - 1:
            x = x + fit(inputs[-1], x)
    if extra_skips:
        x = x + fit(inputs[0], x)
    x = activate(x, 'bn_final').mean(axis=(1, 2))
    return x @ params['head']['kernel'] + params['head']['bias']


@pytest.mark.parametrize('batch_norm', [True, False])
@pytest.mark.parametrize('extra_skips', [True, False])
@pytest.mark.parametrize('name, blocks', [('wrn10_2', 1), ('wrn16_1', 2)])
def test_variants_by_hand(name, blocks, batch_norm, extra_skips):
    model = models.create_model(name, 10, batch_norm=batch_norm, extra_skips=extra_skips)
    variables = recipe_variables(model)
    assert ('batch_stats' in variables) == batch_norm
    assert ('bias' in variables['params']['conv_init']) == (not batch_norm)
    x = images(1, (2, 16, 16, 3))
    expected = forward(variables, x, blocks, extra_skips)
    assert helpers.relative_distance(apply(model, variables, x)[0], expected) < 1e-5


def test_shortcut_is_pooled_and_padded():
    shortcut = np.arange(16.0).reshape(1, 4, 4, 1)
    x = np.ones((1, 2, 2, 3))
    means = [[2.5, 4.5], [10.5, 12.5]]
    expected = 1 + np.stack([means, np.zeros((2, 2)), np.zeros((2, 2))], axis=-1)[None]
    np.testing.assert_allclose(layers.add_shortcut(x, shortcut), expected)
    np.testing.assert_allclose(layers.add_shortcut(shortcut, shortcut), 2 * shortcut)


def test_batch_norm_statistics_move_by_a_tenth():
    """mean <- 0.9 mean + 0.1 batch mean, and the batch's variance likewise; not at inference."""
    model = models.create_model('wrn10_1', 10)
    variables, x = recipe_variables(model), images(1, (4, 8, 8, 3))
    old = variables['batch_stats']
    inner = convolve(x, variables['params']['conv_init'], 1).reshape(-1, 16)
    _, new = apply(model, variables, x, train=True)
    for name, value in [('mean', inner.mean(axis=0)), ('var', inner.var(axis=0))]:
        np.testing.assert_allclose(
            new['group0_block0_bn1'][name],
            0.9 * old['group0_block0_bn1'][name] + 0.1 * value,
            rtol=1e-4,
            atol=1e-6,
        )
    helpers.assert_trees_equal(apply(model, variables, x)[1], old)


# Types, dropout, errors


@pytest.mark.parametrize('size, train', [(32, True), (8, False), (32, False)])
def test_bfloat16_computes_in_half_and_keeps_params_and_statistics(size, train):
    x = images(1, (4, size, size, 3))
    results = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = models.create_model('wrn16_1', 10, dtype=dtype)
        assert {v.dtype for v in jax.tree.leaves(shapes(model))} == {np.dtype('float32')}
        results.append(apply(model, recipe_variables(model), x, train))
        assert {v.dtype for v in jax.tree.leaves(results[-1])} == {np.dtype('float32')}
    logits, statistics = map(helpers.relative_distance, *results)
    assert 1e-4 < logits < 0.03
    assert 1e-4 < statistics < 0.03 if train else statistics == 0


def test_dropout_is_for_training_and_keyed():
    plain, model = (
        models.create_model('wrn10_1', 10, dropout_rate=r, batch_norm=False) for r in (0.0, 0.5)
    )
    variables, x = recipe_variables(model), images(1, (4, 8, 8, 3))
    helpers.assert_trees_equal(apply(model, variables, x), apply(plain, variables, x))
    train = functools.partial(apply, x=x, variables=variables, train=True)
    clean, dropped, other = (
        train(m, dropout_key=k)[0] for m, k in [(plain, None), (model, KEYS[0]), (model, KEYS[1])]
    )
    helpers.assert_trees_equal(train(plain, dropout_key=KEYS[0])[0], clean)
    helpers.assert_trees_equal(train(model, dropout_key=KEYS[0])[0], dropped)
    assert helpers.relative_distance(dropped, clean) > 0.01
    assert helpers.relative_distance(dropped, other) > 0.01
    with pytest.raises(flax.errors.InvalidRngError, match='dropout'):
        train(model)


def test_dropout_sits_in_front_of_the_second_convolution():
    """There each activation is 0 or 1 / (1 - rate) of itself; conv1 sees no dropout."""
    seen = {}

    def spy(call, args, kwargs, context):
        if isinstance(context.module, nn.Conv) and context.method_name == '__call__':
            seen[context.module.name] = np.asarray(args[0])
        return call(*args, **kwargs)

    inputs = []
    for rate in (0.0, 0.75):
        model = models.create_model('wrn10_1', 10, dropout_rate=rate, batch_norm=False)
        variables = recipe_variables(model)
        with nn.intercept_methods(spy):
            model.apply(variables, images(1, (4, 8, 8, 3)), train=True, rngs={'dropout': KEYS[0]})
        inputs.append([seen[f'group0_block0_{conv}'] for conv in ('conv1', 'conv2')])
    (clean1, clean2), (dropped1, dropped2) = inputs
    helpers.assert_trees_equal(dropped1, clean1)
    kept = dropped2 != 0
    np.testing.assert_allclose(dropped2[kept], 4 * clean2[kept], rtol=1e-5)
    assert abs(kept.sum() / (clean2 != 0).sum() - 0.25) < 0.05


@pytest.mark.parametrize('name', ['resnet', 'wrn', 'wrn28', 'wrn28_10_x', 'WRN28_10', ''])
def test_unknown_model_lists_the_models(name):
    with pytest.raises(UserError, match=r'the models are wrn28_10, .*wrn<depth>_<width>') as error:
        models.create_model(name, 10)
    assert repr(name) in str(error.value)


def test_unknown_option_lists_the_options():
    with pytest.raises(TypeError, match=r"wrn16_4 has no option 'dropout'.*dropout_rate") as error:
        models.create_model('wrn16_4', 10, dropout=0.3)
    for option in ('batch_norm', 'extra_skips', 'dtype', 'param_dtype'):
        assert option in str(error.value)
    for own in ('depth', 'width', 'parent'):
        with pytest.raises(TypeError, match=f'has no option {own!r}'):
            models.create_model('wrn16_4', 10, **{own: 10})


@pytest.mark.parametrize('depth, width', [(27, 10), (4, 1), (0, 1), (12, 2), (16, 0)])
def test_impossible_sizes(depth, width):
    message = f'depth {depth} and width {width} does not exist'
    with pytest.raises(UserError, match=message):
        models.create_model(f'wrn{depth}_{width}', 10)


def test_channels_in_lanes_is_the_identity_here_and_so_is_its_derivative():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, layers.LANES))
    y, pullback = jax.vjp(layers.channels_in_lanes, x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(pullback(x)[0], x)
    stacked = jnp.stack([x, 2 * x])
    np.testing.assert_array_equal(jax.vmap(layers.channels_in_lanes)(stacked), stacked)
    assert 'LayoutConstraint' not in jax.jit(layers.channels_in_lanes).lower(x).as_text()
