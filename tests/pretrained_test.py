"""Weights of other codebases: their files, their names, and what does not fit."""

import re

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    GOLDEN,
    assert_trees_equal,
    compilations,
    golden,
    relative_distance,
    small_config,
)
from reference import images, recipe_variables, shapes, to_reference
from safetensors import numpy as safetensors

from sam_jax import models, train
from sam_jax.errors import UserError
from sam_jax.models import formats, pretrained

TRAINED = GOLDEN / 'ckpt_train_wrnmini_recipe'
MODEL = models.create_model('efficientnet-b0', 1000)


def foreign(form, model, variables):
    """The variables as a file of another codebase names and lays them out."""
    flat = flax.traverse_util.flatten_dict(variables, sep='/')
    arrays = {}
    for path, x in flat.items():
        # Each layout is a permutation of axes; what undoes it is found on the axes' numbers.
        axes = np.arange(x.ndim) if x.ndim else ()
        probe = form.layout(path, np.empty(tuple(range(2, 2 + x.ndim))), x.ndim).shape
        inverse = np.argsort([size - 2 for size in probe]) if x.ndim else axes
        arrays[form.name(model, path)] = np.transpose(np.asarray(x), inverse)
    return arrays


def nested(arrays):
    return flax.traverse_util.unflatten_dict(arrays, sep='/')


def fine_tuning_checkpoint(arrays):
    """The bytes of flax 0.2 that the original's fine-tuning reads: (model, state) as a tuple."""
    stats = {n for n in arrays if n.endswith(('/mean', '/var'))}
    state = {}
    for n in stats:
        module, leaf = n.rsplit('/', 1)
        state.setdefault(f'/{module}', {})[leaf] = arrays[n]
    params = nested({n: x for n, x in arrays.items() if n not in stats})
    return flax.serialization.msgpack_serialize({'0': {'params': params}, '1': state})


@pytest.fixture(scope='module')
def b0():
    """EfficientNet-B0 with the golden logits' weights."""
    return jax.tree.map(np.asarray, recipe_variables(MODEL))


# The original's


def test_checkpoint_of_the_original_s_trainer():
    raw = flax.serialization.msgpack_restore((TRAINED / 'checkpoint_3').read_bytes())
    for source in (TRAINED, TRAINED / 'checkpoint_3', str(TRAINED)):
        variables = pretrained.load_reference_checkpoint(source, 'wrn16_1', 10)
        params = raw['optimizer']['target']['params']
        np.testing.assert_array_equal(
            variables['params']['group1_block0_conv1']['kernel'],
            params['WideResnetGroup_1']['WideResnetBlock_0']['conv1']['kernel'],
        )
        np.testing.assert_array_equal(
            variables['params']['head']['bias'], params['Dense_3']['bias']
        )
        np.testing.assert_array_equal(
            variables['batch_stats']['bn_final']['var'], raw['model_state']['/pre-pool-bn']['var']
        )
        assert jax.tree.structure(variables) == jax.tree.structure(
            shapes(models.create_model('wrn16_1', 10))
        )


def test_checkpoint_that_the_original_s_fine_tuning_reads(b0, tmp_path):
    """The newest of a folder; its logits are the original's."""
    expected = golden('model_efficientnet-b0')['logits_recipe']
    content = fine_tuning_checkpoint(to_reference(MODEL, b0))
    (tmp_path / 'checkpoint_9').write_bytes(b'old and broken')
    (tmp_path / 'checkpoint_10').write_bytes(content)
    (tmp_path / 'notes').write_text('not a checkpoint')
    variables = pretrained.load_reference_checkpoint(tmp_path, 'efficientnet-b0', 1000)
    assert_trees_equal(variables, b0)
    logits = jax.jit(MODEL.apply)(variables, images(1, (2, 224, 224, 3)))
    assert relative_distance(logits, expected) < 1e-5


@pytest.mark.parametrize(
    'name',
    [
        'wrn10_1',
        'shake_shake_8_2x4d',
        'pyramidnet11',
        'pyramidnet20_shakedrop',
        'resnet50',
        'efficientnet-tiny',
    ],
)
def test_names_are_different_and_lead_back(name):
    model = models.create_model(name, 10)
    variables = jax.tree.map(np.asarray, recipe_variables(model))
    arrays = to_reference(model, variables)
    assert len(arrays) == len(jax.tree.leaves(variables))
    assert_trees_equal(pretrained.load_reference_checkpoint(arrays, name, 10), variables)


# Keras and timm


@pytest.fixture(scope='module')
def keras_b0(b0):
    return keras_model('B0', MODEL, b0)


def keras_model(size, model, variables):
    keras = pytest.importorskip('keras')
    theirs = getattr(keras.applications, f'EfficientNet{size}')(weights=None)
    arrays = foreign(formats.KERAS, model, variables)
    for layer in theirs.layers:
        if layer.weights and not layer.name.startswith('normalization'):
            layer.set_weights([arrays[w.path] for w in layer.weights])
    return theirs


def test_b0_is_keras_s(b0, keras_b0):
    """Keras scales its input by 1/255 and, without ImageNet's weights, does no more to it."""
    x = images(3, (2, 224, 224, 3))
    keras_b0.layers[-1].activation = None
    theirs = keras_b0(255 * x, training=False)
    assert relative_distance(jax.jit(MODEL.apply)(b0, x), np.asarray(theirs)) < 1e-4


@pytest.mark.slow
def test_b4_is_keras_s():
    model = models.create_model('efficientnet-b4', 1000)
    variables = jax.tree.map(np.asarray, recipe_variables(model))
    theirs = keras_model('B4', model, variables)
    theirs.layers[-1].activation = None
    x = images(3, (1, 380, 380, 3))
    assert (
        relative_distance(
            jax.jit(model.apply)(variables, x), np.asarray(theirs(255 * x, training=False))
        )
        < 1e-4
    )


def test_files_of_keras_3_and_2(b0, keras_b0, tmp_path):
    import h5py

    keras_b0.save_weights(tmp_path / 'three.weights.h5')
    with h5py.File(tmp_path / 'two.h5', 'w') as f:  # as keras.applications publishes them
        for layer in keras_b0.layers:
            for weight in layer.weights:
                name = weight.path
                if 'dwconv' in name:
                    name = name.replace('/kernel', '/depthwise_kernel')
                f[f'{layer.name}/{name}:0'] = np.asarray(weight)
    for name in ('three.weights.h5', 'two.h5'):
        assert_trees_equal(
            pretrained.load_reference_checkpoint(tmp_path / name, 'efficientnet-b0', 1000), b0
        )


TIMM_SHAPES = {  # of timm's tf_efficientnet_b0, one of each kind
    'conv_stem.weight': (32, 3, 3, 3),
    'bn1.weight': (32,),
    'bn1.running_mean': (32,),
    'blocks.0.0.conv_dw.weight': (32, 1, 3, 3),
    'blocks.0.0.bn1.bias': (32,),
    'blocks.0.0.se.conv_reduce.weight': (8, 32, 1, 1),
    'blocks.0.0.se.conv_reduce.bias': (8,),
    'blocks.0.0.se.conv_expand.weight': (32, 8, 1, 1),
    'blocks.0.0.conv_pw.weight': (16, 32, 1, 1),
    'blocks.0.0.bn2.running_var': (16,),
    'blocks.1.1.conv_pw.weight': (144, 24, 1, 1),
    'blocks.1.1.bn1.weight': (144,),
    'blocks.1.1.conv_dw.weight': (144, 1, 3, 3),
    'blocks.1.1.bn2.weight': (144,),
    'blocks.1.1.se.conv_expand.bias': (144,),
    'blocks.1.1.conv_pwl.weight': (24, 144, 1, 1),
    'blocks.1.1.bn3.running_mean': (24,),
    'blocks.6.0.conv_pwl.weight': (320, 1152, 1, 1),
    'conv_head.weight': (1280, 320, 1, 1),
    'bn2.running_var': (1280,),
    'classifier.weight': (1000, 1280),
    'classifier.bias': (1000,),
}


def test_files_of_timm(b0, tmp_path):
    from safetensors.numpy import save_file

    arrays = {n: np.ascontiguousarray(x) for n, x in foreign(formats.TIMM, MODEL, b0).items()}
    assert {n: arrays[n].shape for n in TIMM_SHAPES} == TIMM_SHAPES
    assert len(arrays) == 213 + 98
    # A convolution of theirs, by its definition: out channel o reads in channel i at (y, x).
    np.testing.assert_array_equal(
        arrays['conv_stem.weight'][5, 2, 1, 0], b0['params']['conv_stem']['kernel'][1, 0, 2, 5]
    )
    counters = {
        n.replace('running_mean', 'num_batches_tracked'): np.array(7)
        for n in arrays
        if n.endswith('running_mean')
    }
    save_file({**arrays, **counters}, tmp_path / 'model.safetensors')
    np.savez(tmp_path / 'model.npz', **arrays)
    for name in ('model.safetensors', 'model.npz'):
        assert_trees_equal(
            pretrained.load_reference_checkpoint(tmp_path / name, 'efficientnet-b0', 1000), b0
        )


# What differs


def test_head_is_kept_or_made_anew(b0):
    arrays = to_reference(MODEL, b0)
    same, other, again = (
        pretrained.load_reference_checkpoint(arrays, 'efficientnet-b0', *args)
        for args in [(1000,), (10, 0), (10, 1)]
    )
    assert_trees_equal(same['params']['head'], b0['params']['head'])
    assert other['params']['head']['kernel'].shape == (1280, 10)
    assert (other['params']['head']['kernel'] != again['params']['head']['kernel']).any()
    assert not other['params']['head']['bias'].any()
    for variables in (other, again):
        variables['params']['head'] = b0['params']['head']
        assert_trees_equal(variables, b0)


@pytest.mark.parametrize(
    'source, name, message',
    [
        (TRAINED, 'wrn16_2', r'Dense_3/kernel has shape \(64, 10\), the model \(128, 10\)'),
        (TRAINED, 'wrn22_1', r'lack WideResnetGroup_0/WideResnetBlock_2/.*\(16,\)'),
        (TRAINED, 'wrn10_1', r'the model has no WideResnetGroup_0/WideResnetBlock_1/'),
        (TRAINED, 'efficientnet-tiny', "not those of EfficientNet.*'Dense_3/bias'"),
        (TRAINED, 'resnet20', 'not those of CifarResNet'),
        (GOLDEN / 'losses.npz', 'wrn16_1', 'not those of WideResNet'),
        (GOLDEN / 'recipe.py', 'wrn16_1', 'recipe.py cannot be read as msgpack'),
        (GOLDEN / 'nothing', 'wrn16_1', 'nothing: no such file or folder'),
        (GOLDEN, 'wrn16_1', 'holds no checkpoint_N'),
        ({}, 'wrn16_1', r'the first is .\(nothing\)'),
    ],
)
def test_what_does_not_fit_is_named(source, name, message):
    with pytest.raises(UserError, match=message):
        pretrained.load_reference_checkpoint(source, name, 10)


@pytest.mark.parametrize('suffix', ['.npz', '.h5', '.safetensors', ''])
def test_damaged_files_are_named(suffix, tmp_path):
    path = tmp_path / f'broken{suffix}'
    path.write_bytes(b'broken')
    with pytest.raises(UserError, match=re.escape(f'{path} cannot be read')):
        pretrained.load_reference_checkpoint(path, 'wrn16_1', 10)


# Our own


@pytest.mark.parametrize('name', ['wrn10_1', 'vit-tiny4', 'efficientnet-tiny'])
def test_what_we_export_leads_back(name, tmp_path):
    """As a file and as its folder; with another head, all but the head."""
    model, draw = models.create_model(name, 10), np.random.RandomState(0)
    variables = jax.tree.map(lambda x: draw.randn(*x.shape).astype(np.float32), shapes(model))
    flat = flax.traverse_util.flatten_dict(variables, sep='/')
    safetensors.save_file(flat, tmp_path / 'weights.safetensors')
    zeros = jax.tree.map(np.zeros_like, variables)
    for source in (tmp_path, tmp_path / 'weights.safetensors'):
        assert_trees_equal(pretrained.load(source, model, zeros), variables)
    other = shapes(models.create_model(name, 3))
    other = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), other)
    found = pretrained.load(tmp_path, models.create_model(name, 3), other)
    assert_trees_equal(found['params'].pop('head'), other['params'].pop('head'))
    variables['params'].pop('head')
    assert_trees_equal(found['params'], variables['params'])
    flat.pop('params/head/bias')
    safetensors.save_file(flat, tmp_path / 'weights.safetensors')
    with pytest.raises(UserError, match='lack head/bias'):
        pretrained.load(tmp_path, model, zeros)


# In a run


def test_run_starts_from_a_file(tmp_path):
    """With learning rate 0 it ends with the file's params; on resume the file is not needed."""
    model = models.create_model('wrn10_1', 10)
    start = jax.tree.map(np.array, jax.jit(model.init)(jax.random.key(5), jnp.zeros((1, 8, 8, 1))))
    start['params']['head']['bias'] += 1
    path = tmp_path / 'start.npz'
    np.savez(path, **to_reference(model, start))
    config = small_config(
        total_epochs=1,
        model__init_from=str(path),
        optimizer__learning_rate=0.0,
        ema__decay=0.9,
        model__frozen_batch_norm=True,
        checkpoint__every_epochs=1,
    )
    state = train.train_and_evaluate(config, str(tmp_path / 'run'), jax.devices()[:1])
    assert_trees_equal({'params': state.params, 'batch_stats': state.batch_stats}, start)
    assert relative_distance(state.ema['params'], start['params']) < 1e-6
    path.unlink()
    (tmp_path / 'run' / 'result.json').unlink()
    again = train.train_and_evaluate(config, str(tmp_path / 'run'), jax.devices()[:1])
    assert_trees_equal(again.params, start['params'])
    with compilations() as compiled, pytest.raises(UserError, match='no such file'):
        train.train_and_evaluate(config, str(tmp_path / 'other'), jax.devices()[:1])
    assert not compiled


def test_run_names_the_parameter_that_does_not_fit(tmp_path):
    """The digits have one channel, CIFAR has three."""
    config = small_config(model__name='wrn16_1', model__init_from=str(TRAINED))
    message = r'init_conv/kernel has shape \(3, 3, 3, 16\), the model \(3, 3, 1, 16\)'
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, str(tmp_path / 'run'), jax.devices()[:1])
