"""The lowering rule for convolutions on CPU: the numbers of JAX's own, in XLA's fast form."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_distance, small_config
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sam_jax import convolutions, data, models, replicas, train_state, train_step


def _both(function, *args):
    """Results under JAX's own rule and under ours."""
    with convolutions.as_jax_does():
        theirs = jax.device_get(jax.jit(function)(*args))
    return theirs, jax.device_get(jax.jit(function)(*args))


def _normal(seed, shape, dtype):
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), 'float32').astype(dtype)


# Single convolutions: (spatial sizes, window, strides, padding, dilations of image and window).
WINDOWS = {
    '1x1': ((6, 5), (1, 1), (1, 1), 'SAME', (1, 1), (1, 1)),
    '3x3': ((6, 5), (3, 3), (1, 1), 'SAME', (1, 1), (1, 1)),
    'strides': ((8, 7), (3, 3), (2, 2), 'SAME', (1, 1), (1, 1)),
    'unequal strides': ((7, 9), (3, 2), (3, 1), 'SAME', (1, 1), (1, 1)),
    '1x1, strides': ((8, 8), (1, 1), (2, 2), 'SAME', (1, 1), (1, 1)),
    'strides beyond the window': ((9, 9), (2, 2), (3, 3), 'VALID', (1, 1), (1, 1)),
    'strides beyond the image': ((2, 2), (1, 1), (3, 3), ((0, 0), (0, 0)), (1, 1), (1, 1)),
    'valid': ((7, 7), (4, 3), (1, 1), 'VALID', (1, 1), (1, 1)),
    'wide': ((5, 11), (2, 4), (1, 1), ((0, 1), (3, 2)), (1, 1), (1, 1)),
    'negative padding': ((8, 8), (3, 3), (1, 1), ((-1, 2), (0, -2)), (1, 1), (1, 1)),
    'wide padding': ((3, 3), (2, 2), (2, 2), ((4, 5), (3, 3)), (1, 1), (1, 1)),
    'dilated window': ((9, 9), (3, 2), (1, 1), 'SAME', (1, 1), (2, 3)),
    'dilated window, strides': ((9, 9), (3, 3), (2, 2), 'SAME', (1, 1), (2, 2)),
    'dilated image': ((4, 4), (3, 3), (1, 1), ((1, 2), (2, 1)), (2, 3), (1, 1)),
    'dilated image, strides': ((5, 5), (3, 3), (2, 2), ((1, 1), (1, 1)), (3, 3), (1, 1)),
    '2x2 pixels': ((2, 2), (3, 3), (1, 1), 'SAME', (1, 1), (1, 1)),
    'one pixel': ((1, 1), (3, 3), (1, 1), 'SAME', (1, 1), (1, 1)),
    'one pixel, all places': ((1, 1), (3, 3), (1, 1), ((2, 2), (2, 2)), (1, 1), (1, 1)),
    'whole image': ((4, 4), (4, 4), (1, 1), 'VALID', (1, 1), (1, 1)),
    'window beyond the image': ((2, 3), (5, 5), (2, 1), ((3, 3), (3, 3)), (1, 1), (1, 1)),
    'dilated window beyond the image': ((3, 3), (4, 4), (1, 1), ((3, 4), (4, 4)), (1, 1), (2, 2)),
    '1-D': ((9,), (3,), (2,), 'SAME', (1,), (1,)),
    '3-D': ((4, 5, 4), (3, 2, 3), (2, 1, 2), 'SAME', (1, 1, 1), (1, 1, 1)),
}


def _convolution(window, groups=1, layout=None, dtype='float32', images=3, channels=4, filters=6):
    """Returns (convolution of an image and a filter, image, filter)."""
    sizes, width, strides, padding, lhs_dilation, rhs_dilation = WINDOWS[window]
    spatial = 'DHW'[3 - len(sizes) :]
    layout = layout or (f'N{spatial}C', f'{spatial}IO', f'N{spatial}C')
    shape = dict(zip(spatial, sizes), N=images, C=channels * groups)
    kernel = dict(zip(spatial, width), I=channels, O=filters * groups)
    x = _normal(0, [shape[d] for d in layout[0]], dtype)
    w = _normal(1, [kernel[d] for d in layout[1]], dtype)
    return (
        functools.partial(
            lax.conv_general_dilated,
            window_strides=strides,
            padding=padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=layout,
            feature_group_count=groups,
        ),
        x,
        w,
    )


def _results(convolution, x, w):
    """The result, both gradients of a nonlinear function of it, and a product with its Hessian."""

    def loss(x, w):
        y = convolution(x, w)
        return jnp.sum(jnp.sin(y.astype(jnp.promote_types(y.dtype, jnp.float32))))

    grads = jax.grad(loss, (0, 1))
    return convolution(x, w), grads(x, w), jax.jvp(grads, (x, w), (x, w))[1]


def _assert_same(theirs, ours, dtype='float32'):
    tolerance = {'float64': 1e-13, 'float32': 1e-5}.get(dtype, 0.02)
    for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours)):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = a.astype('float64'), b.astype('float64')
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (np.abs(a).max() + 1e-3))


@pytest.mark.parametrize('window', WINDOWS)
def test_numbers_of_every_window(window):
    _assert_same(
        *_both(functools.partial(_results, _convolution(window)[0]), *_convolution(window)[1:])
    )


def test_results_that_meet_nothing_but_padding():
    """Here XLA's kernel of jax 0.10 is wrong: with JAX's rule the gradient is what memory holds."""
    x, w = _normal(0, (3, 1, 1, 4), 'float32'), _normal(1, (3, 3, 4, 6), 'float32')

    def convolution(x, w):
        return lax.conv_general_dilated(
            x, w, (1, 1), ((4, 0), (4, 0)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    def in_words(x, w):  # the last result meets the pixel with the last place of the window
        return jnp.zeros((3, 3, 3, 6)).at[:, 2, 2].set(x[:, 0, 0] @ w[2, 2])

    _assert_same(
        jax.device_get(jax.jit(functools.partial(_results, in_words))(x, w)),
        jax.device_get(jax.jit(functools.partial(_results, convolution))(x, w)),
    )


@pytest.mark.parametrize('window', ['3x3', 'strides', '2x2 pixels', '1-D', '3-D'])
def test_numbers_of_groups(window):
    convolution, x, w = _convolution(window, groups=3)
    _assert_same(*_both(functools.partial(_results, convolution), x, w))


@pytest.mark.parametrize('dtype', ['float64', 'bfloat16', 'float16'])
@pytest.mark.parametrize('window', ['3x3', 'strides', '2x2 pixels'])
def test_numbers_of_every_dtype(window, dtype, x64):
    convolution, x, w = _convolution(window, dtype=dtype)
    _assert_same(*_both(functools.partial(_results, convolution), x, w), dtype)


def test_complex_numbers_are_left_to_jax():
    convolution, x, w = _convolution('strides')

    def parts(x, w):
        y = convolution(x + 2j * x, w - 1j * w)
        return y.real, y.imag

    _assert_same(*_both(parts, x, w))


@pytest.mark.parametrize('layout', [('NCHW', 'OIHW', 'NCHW'), ('HWCN', 'IHWO', 'CNHW')])
@pytest.mark.parametrize('window', ['3x3', 'strides', '2x2 pixels'])
def test_numbers_of_every_layout(window, layout):
    convolution, x, w = _convolution(window, layout=layout)
    _assert_same(*_both(functools.partial(_results, convolution), x, w))


def test_a_batched_convolution():
    convolution, x, w = _convolution('strides')
    filters = jnp.stack([w, 2 * w, -w])
    _assert_same(*_both(jax.vmap(functools.partial(_results, convolution), (None, 0)), x, filters))


@pytest.mark.parametrize('images', [8, 11, 12, 13])  # parts of four: with a rest and without
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_filters_gradient_is_summed_in_parts(images, dtype, monkeypatch):
    convolution, x, w = _convolution('3x3', images=images, dtype=dtype)
    pixels = 6 * 5 * (4 + 6)
    monkeypatch.setattr(convolutions, '_PART_BYTES', 4 * pixels * x.dtype.itemsize)

    def gradient(x, w):
        return jax.grad(lambda w: jnp.sum(jnp.sin(convolution(x, w).astype('float32'))))(w)

    _assert_same(*_both(gradient, x, w), dtype)
    assert f'[{images},' in str(jax.make_jaxpr(gradient)(x, w))
    text = jax.jit(gradient).lower(x, w).as_text()
    assert 'stablehlo.while' in text and '4x6x5x4' in text  # four images, of them four channels


def test_parts_are_summed_in_float32(monkeypatch):
    """1,024 parts of one image each: in bfloat16 the sum would stand still at 256 times a part."""
    convolution, x, w = _convolution('3x3', images=1, dtype='bfloat16')
    monkeypatch.setattr(convolutions, '_PART_BYTES', 1)

    def gradient(x):
        return jax.grad(lambda w: jnp.sum(convolution(x, w).astype('float32')))(w)

    one = jax.jit(gradient)(x).astype('float32')
    many = jax.jit(gradient)(jnp.concatenate([x] * 1024)).astype('float32')
    np.testing.assert_allclose(many, 1024 * one, rtol=0.02, atol=2)


# Programs: what XLA makes of them.


def _forms(compiled):
    """Dimension labels of all convolutions of a compiled program, window reversals with them."""
    lines = [line for line in compiled.as_text().splitlines() if ' convolution(' in line]
    return [
        re.search(r'dim_labels=([\w>-]+)', line)[1] + ' reversed' * ('rhs_reversal' in line)
        for line in lines
    ]


# (features, filters, results that are taken together; 1 where it would not help).
BLOCKS = [(1, 6, 4), (3, 16, 2), (4, 1, 8), (2, 5, 4), (1, 3, 8), (5, 6, 1), (3, 17, 1)]


@pytest.mark.parametrize('features,filters,block', BLOCKS)
@pytest.mark.parametrize('window', ['3x3', 'wide', 'valid'])
def test_few_features_are_taken_in_blocks(window, features, filters, block):
    convolution, x, w = _convolution(window, channels=features, filters=filters)
    _assert_same(*_both(functools.partial(_results, convolution), x, w))
    text = jax.jit(convolution).lower(x, w).as_text()
    kernel = re.search(r'stablehlo.convolution.*tensor<[^>]+>, tensor<([^>]+)>\)', text)[1]
    assert [int(n) for n in kernel.split('x')[-3:-1]] == [block * features, block * filters]


def test_blocks_of_other_layouts_and_types(x64):
    for layout in (('NCHW', 'OIHW', 'NCHW'), ('CHWN', 'IHWO', 'NHWC')):
        convolution, x, w = _convolution('wide', layout=layout, channels=3, dtype='float64')
        _assert_same(*_both(functools.partial(_results, convolution), x, w), 'float64')
    convolution, x, w = _convolution('wide', channels=3, dtype='bfloat16')
    _assert_same(*_both(functools.partial(_results, convolution), x, w), 'bfloat16')


@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('place', ['cond', 'scan'])
def test_form_of_every_window_and_place(window, place):
    convolution, x, w = _convolution(window)
    results = functools.partial(_results, convolution)

    def within(x, w):
        if place == 'cond':
            return lax.cond(jnp.sum(x) > 0, results, lambda x, w: results(-x, w), x, w)
        return lax.scan(lambda c, _: (c * 0.5, results(x, c)), w, length=2)[1]

    fast = {'1-D': 'b0f_0io->b0f', '3-D': 'b012f_012io->b012f'}.get(window, 'b01f_01io->b01f')
    assert set(_forms(jax.jit(within).lower(x, w).compile())) <= {fast}


STEPS = {
    'a gate': dict(sam__method='periodic_sam'),
    'scanned replicas': dict(replica_batch_size=16, replica_loop='scan'),
    'both': dict(sam__method='rst', replica_batch_size=16, replica_loop='scan'),
}


@pytest.mark.parametrize('case', STEPS)
def test_all_convolutions_of_a_step_are_in_the_fast_form(case):
    config = small_config(**STEPS[case])
    layout, _ = replicas.make_layout(
        config.batch_size, config.replica_batch_size, 1, config.replica_loop, jax.devices()[:1]
    )
    dataset = data.load_dataset(config.data)
    model = models.from_config(config.model, dataset.num_classes)
    state = train_state.create_train_state(config, model, dataset.image_shape)
    program = (
        train_step.make_train_step(model, config, layout, dataset)
        .lower(
            layout.replicate(state),
            layout.shard(dataset.train_feed(0, 0, layout)),
            layout.replicate(dataset.device_arrays(dataset.train)),
            layout.replicate(train_state.HParams.from_config(config)),
        )
        .compile()
    )
    assert 'conditional' in program.as_text() or 'while' in program.as_text()
    forms = _forms(program)
    assert len(forms) > 15 and set(forms) == {'b01f_01io->b01f'}


# One of each family, most of them slow, and images whose sizes make windows and paddings differ.
FAMILIES = [
    ('wrn10_1', 8),
    ('resnet8', 8),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ('shake_shake_8_2x2d', 8),
            ('pyramidnet11_shakedrop', 8),
            ('cifar_resnet10', 16),
            ('preact_resnet10', 17),
            ('vgg6_bn', 17),
            ('resnet18', 32),
            ('resnet18', 37),
            ('efficientnet-tiny', 37),
            ('efficientnet-tiny', 32),
            ('resnet50', 32),
        )
    ),
]


@pytest.mark.parametrize('name,size', FAMILIES)
def test_gradients_and_hessian_products_of_the_zoo(name, size):
    model = models.create_model(name, 3)
    images = _normal(2, (2, size, size, 3), 'float32')
    rngs = {k: jax.random.key(i) for i, k in enumerate(('params', 'dropout', 'shake'))}
    variables = jax.jit(functools.partial(model.init, train=False))(rngs, images)

    def loss(params, train):
        logits = model.apply(
            {**variables, 'params': params},
            images,
            train=train,
            rngs=rngs,
            **({'mutable': ['batch_stats']} if train else {}),
        )
        return jnp.sum(jnp.sin(logits[0] if train else logits))

    def gradient_and_product(params):
        gradient = jax.grad(functools.partial(loss, train=True))(params)
        smooth = jax.grad(functools.partial(loss, train=False))
        return gradient, jax.jvp(smooth, (params,), (params,))[1]

    def behind_a_gate(params):
        return lax.cond(
            loss(params, False) < 1e9, gradient_and_product, lambda params: (params, params), params
        )

    program = jax.jit(behind_a_gate).lower(variables['params']).compile()
    assert set(_forms(program)) == {'b01f_01io->b01f'}
    with convolutions.as_jax_does():
        theirs = jax.device_get(jax.jit(gradient_and_product)(variables['params']))
    ours = program(variables['params'])
    assert relative_distance(ours[0], theirs[0]) < 2e-4  # of BatchNorm over two images
    assert relative_distance(ours[1], theirs[1]) < 1e-4


def test_other_platforms_and_arrays_that_xla_cuts_keep_their_convolutions():
    convolution, x, w = _convolution('strides', images=8)
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(convolution(x, w) ** 2)))
    for platform in ('cuda', 'tpu'):
        text = gradient.trace(w, x).lower(lowering_platforms=(platform,)).as_text()
        with convolutions.as_jax_does():
            assert text == gradient.trace(w, x).lower(lowering_platforms=(platform,)).as_text()
    mesh = jax.make_mesh(
        (4,), ('i',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec('i')))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolutions, '_PART_BYTES', 1)
        assert 'while' not in gradient.lower(w, sharded).as_text()
        np.testing.assert_allclose(gradient(w, sharded), gradient(w, x), rtol=1e-4)


@pytest.mark.parametrize('what', ['function', 'setting'])
def test_another_jax_is_left_alone(what, caplog):
    from jax._src.lax import convolution as internals

    name = '_conv_general_dilated_lower'
    with convolutions.as_jax_does():
        with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, 'sam_jax'):
            if what == 'function':
                patch.delattr(internals, name)
            else:
                patch.setattr(internals, name, lambda ctx, lhs, rhs: None)
            assert not convolutions.install()
        convolution, x, w = _convolution('3x3')
        gradient = jax.jit(jax.grad(lambda w: jnp.sum(convolution(x, w) ** 2)))
        assert 'transpose' not in gradient.lower(w).as_text()
    assert len(caplog.records) == 1
    assert 'slow on CPU' in caplog.text and 'sam_jax.convolutions' in caplog.text
