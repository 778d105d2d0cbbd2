"""Vision Transformers: by hand, their options, their files; under SAM."""

import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from helpers import assert_sam_lowers_the_loss, assert_trees_equal, at_step, relative_distance
from reference import images, shapes

from configs import common, digits
from sam_jax import memory, models, train
from sam_jax.errors import UserError
from sam_jax.models import formats, pretrained, vit, vit_files
from sam_jax.sharpness import ascent, mask

COUNTS = {  # with 1,000 classes, of timm's vit_*_patch*_224
    'vit-ti16': 5_717_416,
    'vit-s32': 22_878_952,
    'vit-s16': 22_050_664,
    'vit-b32': 88_224_232,
    'vit-b16': 86_567_656,
    'vit-l16': 304_326_632,
    'vit-h14': 632_045_800,
}


def tiny(**options):
    return models.create_model('vit-tiny4', 10, **options)


def random_variables(model, image_shape=(32, 32, 3)):
    """Params that all matter, whatever the network starts with."""
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(shapes(model, image_shape))
    # As if each output had a variance of about one.
    draws = [rng.normal(size=x.shape) * math.prod(x.shape[:-1]) ** -0.5 for x in leaves]
    return jax.tree.unflatten(structure, [np.asarray(x, np.float32) for x in draws])


def train_pass(model, variables, x, seed=0):
    return model.apply(variables, x, train=True, rngs={'dropout': jax.random.key(seed)})


@pytest.mark.parametrize('name', COUNTS)
def test_number_of_params(name):
    """timm has a position of the class token besides, which here is part of the token."""
    patch = int(re.search(r'\d+', name)[0])
    variables = shapes(models.create_model(name, 1000), (224, 224, 3))
    width = variables['params']['class_token']['token'].size
    tokens = variables['params']['positions']['position'].shape[0]
    assert tokens == (224 // patch) ** 2
    count = sum(x.size for x in jax.tree.leaves(variables['params']))
    assert count == COUNTS[name] - width
    mean = shapes(models.create_model(name, 1000, class_token=False), (224, 224, 3))
    assert count - width == sum(x.size for x in jax.tree.leaves(mean['params']))


# By hand


def by_hand(params, x, patch, depth, heads, class_token, positions, exact_gelu):
    """The network as documented, in float64."""

    def dense(x, name):
        return x @ params[name]['kernel'] + params[name]['bias']

    def norm(x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
        return x * params[name]['scale'] + params[name]['bias']

    def gelu(x):
        if exact_gelu:
            return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    n, height, width, _ = x.shape
    kernel = params['embedding']['kernel'].reshape(patch * patch * x.shape[-1], -1)
    tokens = [
        x[:, i : i + patch, j : j + patch].reshape(n, -1) @ kernel + params['embedding']['bias']
        for i in range(0, height, patch)
        for j in range(0, width, patch)
    ]
    t = np.stack(tokens, axis=1) + positions
    if class_token:
        t = np.concatenate([np.tile(params['class_token']['token'], (n, 1, 1)), t], axis=1)
    size = t.shape[-1] // heads
    for i in range(depth):
        y = norm(t, f'block{i}_ln1')
        q, k, v = (dense(y, f'block{i}_{part}') for part in ('query', 'key', 'value'))
        mixed = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[..., part] @ np.swapaxes(k[..., part], 1, 2) / math.sqrt(size)
            weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
            mixed.append(weights @ v[..., part])
        t = t + dense(np.concatenate(mixed, axis=-1), f'block{i}_out')
        y = gelu(dense(norm(t, f'block{i}_ln2'), f'block{i}_mlp1'))
        t = t + dense(y, f'block{i}_mlp2')
    t = norm(t, 'ln_final')
    return dense(t[:, 0] if class_token else t.mean(axis=1), 'head')


def grid_by_hand(rows, columns, width):
    table = np.zeros((rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for k in range(width // 4):
                w = 10_000.0 ** (-k / (width // 4 - 1))
                for part, value in enumerate(
                    [math.sin(w * column), math.cos(w * column), math.sin(w * row)]
                    + [math.cos(w * row)]
                ):
                    table[row * columns + column, part * (width // 4) + k] = value
    return table


@pytest.mark.parametrize('class_token', [True, False])
@pytest.mark.parametrize('positions', vit.POSITIONS)
@pytest.mark.parametrize('exact_gelu', [True, False])
def test_logits_by_hand(class_token, positions, exact_gelu, x64):
    options = dict(class_token=class_token, positions=positions, exact_gelu=exact_gelu)
    model = tiny(**options, dtype='float64', param_dtype='float64')
    x = images(1, (2, 12, 8, 3)).astype(float)
    start = jax.jit(model.init)(jax.random.key(0), jnp.asarray(x))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda w: rng.normal(size=w.shape) * 0.3, start)
    params = variables['params']
    if positions == 'learned':
        table = params['positions']['position']
    else:
        table = grid_by_hand(3, 2, 32)
        assert 'positions' not in params
    expected = by_hand(params, x, 4, 2, 2, class_token, table, exact_gelu)
    logits = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-9)


def test_start():
    """The head gives nothing at first, so that all classes are alike; kernels are Xavier's."""
    model = models.create_model('vit-ti4', 10)
    start = jax.jit(model.init)(jax.random.key(0, impl='rbg'), jnp.zeros((1, 32, 32, 3)))
    params = jax.device_get(start['params'])
    assert not params['head']['kernel'].any() and not params['class_token']['token'].any()
    bound = math.sqrt(6 / (192 + 192))
    assert 0.99 * bound < np.abs(params['block3_query']['kernel']).max() <= bound
    np.testing.assert_allclose(params['positions']['position'].std(), 192**-0.5, rtol=0.02)
    assert not model.apply(start, images(1, (2, 32, 32, 3))).any()


# Options


def test_bfloat16_keeps_params_and_logits_in_float32():
    x, results = images(1, (8, 16, 16, 3)), []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = tiny(dtype=dtype)
        variables = random_variables(model, (16, 16, 3))
        logits = jax.jit(model.apply)(variables, x)
        trained = jax.jit(functools.partial(train_pass, model))(variables, x)
        assert {v.dtype for v in jax.tree.leaves((shapes(model), logits, trained))} == {
            np.dtype('float32')
        }
        results.append((logits, trained))
    for full, half in zip(*results):
        assert 1e-5 < relative_distance(half, full) < 0.05


def test_remat_keeps_less_and_changes_no_number():
    x, results, kept = images(1, (4, 32, 32, 3)), [], []
    for remat in (False, True):
        model = tiny(remat=remat, dropout_rate=0.1)
        variables = random_variables(model)

        def loss(params, model=model):
            return jnp.mean(train_pass(model, {'params': params}, x) * jnp.arange(10.0)[None])

        kept.append(memory.kept(model, {**variables, 'batch_stats': {}}, x.shape))
        results.append(jax.jit(jax.value_and_grad(loss))(variables['params']))
    assert kept[1] < 0.9 * kept[0], kept
    assert relative_distance(*results) < 1e-5


def test_dropout_is_for_training_and_keyed():
    model, plain = tiny(dropout_rate=0.5), tiny()
    variables, x = random_variables(model), images(1, (4, 32, 32, 3))
    helpers = [jax.jit(functools.partial(train_pass, m)) for m in (plain, model)]
    clean, dropped = (f(variables, x) for f in helpers)
    assert_trees_equal(model.apply(variables, x), plain.apply(variables, x))
    assert relative_distance(dropped, clean) > 0.01
    assert_trees_equal(helpers[1](variables, x), dropped)
    assert relative_distance(helpers[1](variables, x, 1), dropped) > 0.01


def test_deeper_blocks_are_left_out_more_often():
    """Linearly from never to the whole rate, two branches a block."""
    model, rates = models.create_model('vit-ti16', 10, stochastic_depth_rate=0.11), []
    variables = shapes(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            vit.shake, 'random_stochastic_depth', lambda x, key, keep: rates.append(keep) or x
        )
        jax.eval_shape(functools.partial(train_pass, model), variables, jnp.zeros((1, 32, 32, 3)))
    np.testing.assert_allclose(rates, np.repeat(1 - 0.01 * np.arange(1, 12), 2))


def test_a_dropped_block_leaves_the_tokens_as_they_are():
    model = tiny(stochastic_depth_rate=0.5)
    variables, x = random_variables(model, (16, 16, 3)), images(1, (64, 16, 16, 3))
    without = jax.tree.map(np.array, variables)
    for name in ('block1_out', 'block1_mlp2'):
        for leaf in ('kernel', 'bias'):
            without['params'][name][leaf] = np.zeros_like(without['params'][name][leaf])
    short = np.asarray(tiny().apply(without, x))
    logits = np.asarray(train_pass(model, variables, x))
    same = np.abs(logits - short).max(axis=1) < 1e-5
    assert 4 <= same.sum() <= 30  # a quarter of 64, both branches dropped


def test_what_does_not_fit_is_said_in_a_sentence():
    with pytest.raises(UserError, match=r"model.positions is 'rotary'; .* learned, sincos2d"):
        tiny(positions='rotary')
    with pytest.raises(UserError, match=r'model.dropout_rate is 1.0'):
        tiny(dropout_rate=1.0)
    with pytest.raises(UserError, match=r'patches of 0 does not exist'):
        models.create_model('vit-s0', 10)
    with pytest.raises(UserError, match=r'16x16; images of 28x28 .* a multiple of 16\.'):
        shapes(models.create_model('vit-s16', 10), (28, 28, 1))
    with pytest.raises(UserError, match=r'the models are .*vit-ti16.*vit-<size><patch>'):
        models.create_model('vit-xl16', 10)


# What methods and decay know of it


def test_masks_know_its_norms_and_biases():
    params = shapes(tiny())['params']
    norms = mask.normalization(params)
    assert {name for name, leaves in norms.items() if any(leaves.values())} == {
        f'block{i}_ln{j}' for i in range(2) for j in (1, 2)
    } | {'ln_final'}
    assert all(leaves['scale'] and leaves['bias'] for n, leaves in norms.items() if 'ln' in n)
    params = jax.tree.map(lambda x: jnp.full(x.shape, 3.0), params)
    metric = ascent.adaptive_metric(0.5, 'weights')(params, params)
    for module, leaves in metric.items():
        for leaf, x in leaves.items():
            assert (x == (1.0 if leaf == 'bias' else 3.5**2)).all(), (module, leaf)


def test_sam_lowers_the_loss_on_two_devices():
    """As `zoo_test` has it for networks with BatchNorm."""
    assert_sam_lowers_the_loss(tiny(), steps=20)


# Files


def big_vision_arrays(variables, heads=2):
    """The arrays as big_vision names and shapes them."""
    arrays = {}
    for module, leaves in jax.device_get(variables['params']).items():
        block = module.partition('_')[0].removeprefix('block')
        part = module.partition('_')[2]
        for leaf, x in leaves.items():
            if module == 'positions':
                arrays['pos_embedding'] = x[None]
            elif module == 'class_token':
                arrays['cls'] = x[None, None]
            elif part in ('query', 'key', 'value'):
                name = f'Transformer/encoderblock_{block}/MultiHeadDotProductAttention_0/{part}'
                arrays[f'{name}/{leaf}'] = x.reshape(*x.shape[:-1], heads, -1)
            elif part == 'out':
                name = f'Transformer/encoderblock_{block}/MultiHeadDotProductAttention_0/out'
                arrays[f'{name}/{leaf}'] = x.reshape(heads, -1, x.shape[-1]) if x.ndim > 1 else x
            elif module.startswith('block'):
                theirs = {
                    'ln1': 'LayerNorm_0',
                    'ln2': 'LayerNorm_1',
                    'mlp1': 'MlpBlock_0/Dense_0',
                    'mlp2': 'MlpBlock_0/Dense_1',
                }
                arrays[f'Transformer/encoderblock_{block}/{theirs[part]}/{leaf}'] = x
            else:
                theirs = {'ln_final': 'Transformer/encoder_norm'}
                arrays[f'{theirs.get(module, module)}/{leaf}'] = x
    return arrays


def scanned(arrays):
    """Blocks in one array with a leading axis, as `Encoder(scan=True)` has them."""
    blocks, rest = {}, {}
    for name, x in arrays.items():
        parts = name.split('/')
        if parts[0] == 'Transformer' and parts[1].startswith('encoderblock_'):
            blocks.setdefault('/'.join(parts[2:]), []).append(x)
        else:
            rest[name] = x
    return {**rest, **{f'Transformer/encoderblock/{n}': np.stack(x) for n, x in blocks.items()}}


def before_linen(arrays):
    """vision_transformer's: numbers of modules count all kinds, and the token has a position."""
    old = {
        'LayerNorm_1': 'LayerNorm_2',
        'MultiHeadDotProductAttention_0': 'MultiHeadDotProductAttention_1',
        'MlpBlock_0': 'MlpBlock_3',
    }
    renamed = {}
    for name, x in arrays.items():
        for new, theirs in old.items():
            name = name.replace(f'/{new}/', f'/{theirs}/')
        renamed[name] = x
    position = np.full((1, 1, 32), 0.25, np.float32)
    renamed['cls'] = renamed['cls'] - position
    table = np.concatenate([position, renamed.pop('pos_embedding')], axis=1)
    return {**renamed, 'Transformer/posembed_input/pos_embedding': table}


BIG_VISION_SHAPES = {
    'cls': (1, 1, 32),
    'pos_embedding': (1, 64, 32),
    'embedding/kernel': (4, 4, 3, 32),
    'Transformer/encoderblock_0/LayerNorm_0/scale': (32,),
    'Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel': (32, 2, 16),
    'Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/bias': (2, 16),
    'Transformer/encoderblock_1/MultiHeadDotProductAttention_0/out/kernel': (2, 16, 32),
    'Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel': (32, 128),
    'Transformer/encoder_norm/bias': (32,),
    'head/kernel': (32, 10),
}


@pytest.mark.parametrize('form', ['params', 'optimizer', 'bare', 'scanned', 'before_linen'])
def test_files_of_big_vision(form, tmp_path):
    variables = jax.device_get(random_variables(tiny()))
    arrays = big_vision_arrays(variables)
    assert {n: arrays[n].shape for n in BIG_VISION_SHAPES} == BIG_VISION_SHAPES
    if form == 'scanned':
        arrays = scanned(arrays)
        assert arrays['Transformer/encoderblock/LayerNorm_0/bias'].shape == (2, 32)
    if form == 'before_linen':
        arrays = before_linen(arrays)
    if form != 'bare':
        arrays = {f'params/{name}': x for name, x in arrays.items()}
    if form == 'optimizer':
        arrays |= {name.replace('params/', 'opt/mu/'): 0 * x for name, x in arrays.items()}
    np.savez(tmp_path / 'vit.npz', **arrays)
    loaded = pretrained.load_reference_checkpoint(tmp_path / 'vit.npz', 'vit-tiny4', 10)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), loaded, variables)
    x = images(1, (2, 32, 32, 3))
    assert relative_distance(tiny().apply(loaded, x), tiny().apply(variables, x)) < 1e-6


def test_bfloat16_of_big_vision_has_lost_its_type():
    """NumPy writes it as two bytes."""
    variables = jax.device_get(random_variables(tiny()))
    arrays = {
        n: np.asarray(x, jnp.bfloat16).view('V2') for n, x in big_vision_arrays(variables).items()
    }
    loaded = pretrained.load_reference_checkpoint(arrays, 'vit-tiny4', 10)
    assert relative_distance(loaded, variables) < 0.01
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype('float32')}


def torch_arrays(form, variables):
    """The arrays as timm or transformers has them, by their names for ours."""
    arrays, model = {}, tiny()
    for module, leaves in jax.device_get(variables['params']).items():
        for leaf, x in leaves.items():
            if leaf == 'kernel':
                x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
            arrays[form.name(model, f'params/{module}/{leaf}')] = x
    position = np.full((1, 32), 0.25, np.float32)
    token, table = (
        form.name(model, f'params/{n}') for n in ('class_token/token', 'positions/position')
    )
    arrays[token] = (arrays[token] - position[0])[None, None]
    arrays[table] = np.concatenate([position, arrays[table]])[None]
    return arrays


def test_files_of_timm(tmp_path):
    """Query, key and value in one matrix, in this order."""
    from safetensors.numpy import save_file

    variables = jax.device_get(random_variables(tiny()))
    arrays = torch_arrays(formats.TIMM_VIT, variables)
    for block in range(2):
        for leaf in ('weight', 'bias'):
            arrays[f'blocks.{block}.attn.qkv.{leaf}'] = np.concatenate(
                [
                    arrays.pop(f'blocks.{block}.attn.{part}.{leaf}')
                    for part in ('query', 'key', 'value')
                ]
            )
    assert arrays['blocks.1.attn.qkv.weight'].shape == (96, 32)
    assert arrays['pos_embed'].shape == (1, 65, 32) and arrays['cls_token'].shape == (1, 1, 32)
    save_file({n: np.ascontiguousarray(x) for n, x in arrays.items()}, tmp_path / 'm.safetensors')
    loaded = pretrained.load_reference_checkpoint(tmp_path / 'm.safetensors', 'vit-tiny4', 10)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), loaded, variables)


def test_files_of_transformers():
    variables = jax.device_get(random_variables(tiny()))
    arrays = torch_arrays(formats.TRANSFORMERS_VIT, variables)
    assert arrays['vit.encoder.layer.1.attention.attention.query.weight'].shape == (32, 32)
    loaded = pretrained.load_reference_checkpoint(arrays, 'vit-tiny4', 10)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), loaded, variables)


def test_other_image_sizes_and_heads():
    """Positions are resized, a head of other classes is made anew; the rest stays."""
    variables = jax.device_get(random_variables(tiny()))
    arrays = big_vision_arrays(variables)
    loaded = pretrained.load_reference_checkpoint(arrays, 'vit-tiny4', 7, image_size=48)
    expected = scipy.ndimage.zoom(
        variables['params']['positions']['position'].reshape(8, 8, 32), (1.5, 1.5, 1), order=1
    )
    np.testing.assert_allclose(
        loaded['params']['positions']['position'], expected.reshape(144, 32), rtol=1e-4, atol=1e-6
    )
    assert loaded['params']['head']['kernel'].shape == (32, 7)
    assert_trees_equal(loaded['params']['block1_out'], variables['params']['block1_out'])
    assert_trees_equal(loaded['params']['class_token'], variables['params']['class_token'])


def test_resized_positions_keep_what_is_even():
    """Of a constant both kinds give the constant, of a slope the bilinear one the slope."""
    slope = np.tile(np.arange(4.0)[:, None, None], (1, 4, 1))
    np.testing.assert_allclose(vit_files.bilinear(slope, 7)[:, 2, 0], np.linspace(0, 3, 7))
    for resize in (vit_files.bilinear, vit_files.bicubic):
        for side in (2, 9):
            np.testing.assert_allclose(resize(0 * slope + 2, side), 2, rtol=1e-6)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'pre_logits/kernel': np.zeros((32, 32))}, r'the model has no pre_logits/kernel'),
        ({'head/bias': None}, r'lack head/bias, \(10,\)'),
        (
            {'pos_embedding': np.zeros((1, 63, 32), np.float32)},
            r'pos_embedding has shape \(63, 32\), the model \(64, 32\)',
        ),
    ],
)
def test_what_does_not_fit_in_a_file_is_named(change, message):
    arrays = {**big_vision_arrays(random_variables(tiny())), **change}
    arrays = {n: x for n, x in arrays.items() if x is not None}
    with pytest.raises(UserError, match=message):
        pretrained.load_reference_checkpoint(arrays, 'vit-tiny4', 10)


# In a run


def _config(**overrides):
    """The recipe of imagenet.py:model=vit-s16,method=gsam, on the digits."""
    c = digits.get_config('model=vit-tiny4,method=gsam')
    c.total_epochs, c.batch_size, c.replica_batch_size = 2, 64, 16
    c.model.dropout_rate = c.model.stochastic_depth_rate = 0.1
    c.checkpoint.every_epochs = 1
    common.set_adamw(c, 0.003, 0.3)
    c.optimizer.warmup_steps, c.optimizer.schedule_after_warmup = 8, True
    c.optimizer.schedule, c.optimizer.end = 'linear', 0.01
    c.loss, c.model.head_bias = 'sigmoid', -10.0
    c.sam.alpha, c.sam.rho, c.sam.rho_min, c.sam.schedule = 0.6, 0.3, 0.05, 'learning_rate'
    for key, value in overrides.items():
        section, _, name = key.rpartition('__')
        (c[section] if section else c)[name] = value
    return c


@pytest.mark.slow
def test_run_on_one_and_four_devices(x64, tmp_path):
    states = []
    for n in (1, 4):
        config = _config(model__dtype='float64', total_epochs=1)
        states.append(train.train_and_evaluate(config, str(tmp_path / str(n)), jax.devices()[:n]))
    assert relative_distance(states[1].params, states[0].params) < 1e-9


@pytest.mark.slow
def test_run_goes_on_bit_for_bit(tmp_path):
    """As if it had not been interrupted in its second epoch; with a moving average."""
    config, devices = _config(ema__decay=0.9), jax.devices()[:2]
    whole = train.train_and_evaluate(config, str(tmp_path / 'whole'), devices)
    with at_step(30, mock.Mock(side_effect=KeyboardInterrupt)), pytest.raises(KeyboardInterrupt):
        train.train_and_evaluate(config, str(tmp_path / 'halves'), devices)
    again = train.train_and_evaluate(config, str(tmp_path / 'halves'), devices)
    assert_trees_equal(again, whole)


@pytest.mark.slow
def test_run_starts_from_a_file(tmp_path):
    """With learning rate 0 it ends with the file's params, resized to the digits of 8x8."""
    model = tiny()
    start = jax.device_get(random_variables(model, (16, 16, 1)))
    np.savez(tmp_path / 'vit.npz', **big_vision_arrays(start))
    config = _config(
        total_epochs=1,
        optimizer__learning_rate=0.0,
        ema__decay=0.9,
        model__init_from=str(tmp_path / 'vit.npz'),
    )
    state = train.train_and_evaluate(config, str(tmp_path / 'run'), jax.devices()[:1])
    expected = {**start['params']}
    table = expected['positions']['position'].reshape(4, 4, 32)
    expected['positions'] = {'position': vit_files.bilinear(table, 2).reshape(4, 32)}
    assert relative_distance(state.params, expected) < 1e-6
    assert relative_distance(state.ema['params'], expected) < 1e-6
