"""Three train steps agree with the original code, from its initial weights, on its batches.

The original ran N replicas on N devices; here they run on N devices and looped over on one.
"""

import ast
import functools
import json
import re
import types
import zlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from helpers import GOLDEN, golden
from reference import from_reference, golden_shapes, images, one_hot, recipe, to_reference

from configs import common
from sam_jax import models, replicas, train_state, train_step

pytestmark = pytest.mark.accelerator

FLOAT64 = sorted(p.stem for p in GOLDEN.glob('train_*_f64.npz'))
FLOAT32 = sorted(p.stem for p in GOLDEN.glob('train_wrnsmallrecipe_*dev?.npz'))


def probe(name, shape):
    """The golden files' fixed random direction for a tensor."""
    return np.random.RandomState(zlib.crc32(f'probe:{name}'.encode())).standard_normal(shape)


def _config(file):
    """The settings that the original's run noted, in our words."""
    flags = dict(ast.literal_eval(str(file['flags'])))
    num_replicas = int(file['n_devices'])
    c = common.get_config()
    c.batch_size = 32 if _tiny_efficientnet(file) else 8
    c.replica_batch_size = c.batch_size // num_replicas
    if _tiny_efficientnet(file):
        common.set_model(c, 'efficientnet-tiny')
        c.model.dropout_rate = c.model.stochastic_depth_rate = 0.0
        c.model.sync_batch_norm = True
    else:
        common.set_model(c, 'wrn16_1')
    c.log_every_steps = 1
    c.label_smoothing = flags['label_smoothing']
    # rho = 0 gives the base gradient bit for bit, so that plain SGD shares SAM's program here.
    c.sam.method = 'sam'
    c.sam.rho = flags['sam_rho']
    c.sam.replicas_per_group = num_replicas if flags['sync_perturbations'] else 1
    c.optimizer.name = 'rmsprop' if flags['use_rmsprop'] else 'sgd'
    c.optimizer.nesterov = not flags['use_rmsprop']
    c.optimizer.learning_rate = flags['learning_rate']
    c.optimizer.schedule = 'constant'
    c.optimizer.weight_decay = flags['weight_decay']
    c.optimizer.decay_norm_and_bias = not flags['no_weight_decay_on_bn']
    c.optimizer.clip_norm = flags['gradient_clipping']
    return c


def _devices(name):
    """As many as the original had, or all that are here."""
    return min(int(golden(name)['n_devices']), jax.device_count())


def _tiny_efficientnet(file):
    return any('MBConv' in n for n in file['param_names'])


def _start(name, file):
    """The initial values, by the original's names."""
    if 'recipe' in name:
        return {
            n: recipe(n, shape)
            for n, shape in golden_shapes(golden('model_WideResnet_mini')).items()
        }
    init = dict(golden('init_tinyeffnet' if 'tiny' in name else 'init_WideResnet_mini'))
    for n in file['state_names']:
        size = init[n.rsplit('/', 1)[0] + '/scale'].shape
        init[n] = np.ones(size) if n.endswith('var') else np.zeros(size)
    return init


@functools.cache
def _session(json_config, num_devices, dtype):
    """(layout, model, step, fresh state): shared by runs that differ in swept values alone."""
    config = ml_collections.ConfigDict(json.loads(json_config))
    layout, _ = replicas.make_layout(
        config.batch_size,
        config.replica_batch_size,
        config.sam.replicas_per_group,
        config.replica_loop,
        jax.devices()[:num_devices],
    )
    config.model.dtype = jnp.dtype(dtype).name
    model = models.from_config(config.model, 10)
    dataset = types.SimpleNamespace(
        num_train_examples=config.batch_size * 1000, train_batch=lambda arrays, feed, *_: feed
    )
    step_fn = train_step.make_train_step(model, config, layout, dataset)
    return layout, model, step_fn, train_state.create_train_state(config, model, (8, 8, 3))


def _run(name, num_devices, loop, dtype, steps=3):
    """Yields (params and statistics by the original's names, metrics) after each step."""
    file = golden(name)
    config = _config(file)
    config.replica_loop = loop
    hparams = train_state.HParams.from_config(config)
    config.sam.rho = config.optimizer.learning_rate = config.optimizer.weight_decay = 0.0
    layout, model, step_fn, state = _session(config.to_json(sort_keys=True), num_devices, dtype)
    start = jax.tree.map(lambda x: jnp.asarray(x, dtype), from_reference(model, _start(name, file)))
    size = 32 if _tiny_efficientnet(file) else 8
    state = layout.replicate(jax.tree.map(jnp.copy, state.replace(**start)))
    hparams = layout.replicate(hparams)
    for step in range(steps):
        batch = {
            'image': images(100 + step, (config.batch_size, size, size, 3)).astype(dtype),
            'label': one_hot(200 + step, config.batch_size, 10),
        }
        feed = {
            k: v.reshape(num_devices, layout.replicas_per_device, -1, *v.shape[1:])
            for k, v in batch.items()
        }
        state, metrics = step_fn(state, layout.shard(feed), {}, hparams)
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        yield to_reference(model, jax.device_get(variables)), jax.device_get(metrics)


def _assert_agrees(name, num_devices, loop, dtype, rtol, steps=3):
    file = golden(name)
    start = _start(name, file)
    for step, (values, metrics) in enumerate(_run(name, num_devices, loop, dtype, steps), 1):
        for kind in ('param', 'state'):
            names = file[f'{kind}_names'].tolist()
            rows = file[f'step{step}/{kind}']
            for row, n in zip(rows, names):
                x = np.asarray(values[n], np.float64)
                moved = np.linalg.norm(x - start[n]) + 1e-3 * np.linalg.norm(x)
                ours = [
                    np.linalg.norm(x),
                    np.vdot(x, probe(n, x.shape)),
                    x.sum(),
                    x.ravel()[0],
                    x.ravel()[-1],
                ]
                # An error of rtol * moved in x shows up to this much in a sum over x. What is zero
                # but for rounding (a bias in front of a BatchNorm) moves by some 1e-17.
                slack = (rtol * moved + 1e-15) * np.array(
                    [1, np.linalg.norm(probe(n, x.shape)), x.size**0.5, 1, 1]
                )
                assert (np.abs(ours - row) <= slack).all(), (n, step, ours, row)
        metric = f'step{step}/metrics'
        close = dict(rtol=20 * rtol)
        np.testing.assert_allclose(
            metrics['train/perturbed_loss'], np.mean(file[f'{metric}/train_loss']), **close
        )
        np.testing.assert_allclose(
            metrics['train/param_norm'], file[f'{metric}/param_norm'][0], **close
        )
        clip = dict(ast.literal_eval(str(file['flags'])))['gradient_clipping'] or np.inf
        np.testing.assert_allclose(
            min(metrics['train/grad_norm'], clip), file[f'{metric}/gradient_norm'][0], **close
        )
        if 'rho0_' in name:  # under SAM the original's is the error at the perturbed weights
            assert metrics['train/error_rate'] == np.mean(file[f'{metric}/train_error_rate'])


# EfficientNet takes minutes in float64, and the zoo's tests hold its arithmetic. One replica has
# nobody to synchronise with, what clips or decays on four does so on one, smoothing is a term of
# the loss wherever it stands, and without a perturbation there is less to compute.
SLOW = re.compile(
    'tinyeffnet|(sync.*|wrnsmall_.*)_dev1|(sync_|rho0_)ls0.1|rho0_ls0_|ls0.1_dev1|clip0_'
)


@pytest.mark.parametrize(
    'name',
    # Those that are left out by default have all their parts in others, or in topology_test.
    [
        pytest.param(n, marks=pytest.mark.slow)
        if re.search('dev1|_sync_|nowdbn|recipe_rho0.05_ls0_', n) or SLOW.search(n)
        else n
        for n in FLOAT64
    ],
)
def test_original_float64(name, x64):
    """One device a replica, as the original ran."""
    _assert_agrees(name, _devices(name), 'auto', jnp.float64, rtol=1e-9)


@pytest.mark.parametrize(
    'name,loop',
    [
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [
                ('train_wrnsmallrecipe_rho0.05_ls0_dev4_f64', 'scan'),
                ('train_wrnsmallrecipe_rho0.05_ls0_dev4_f64', 'unroll'),
                ('train_wrnsmallrecipe_rho0.05_sync_ls0_dev4_f64', 'unroll'),
                ('train_wrnsmallrecipe_rho0.05_sync_ls0_dev4_f64', 'scan'),
                ('train_wrnsmall_rho0_rmsprop_dev4_f64', 'unroll'),
                ('train_wrnsmall_rho0_rmsprop_dev4_f64', 'scan'),
            ]
        )
    ],
)
def test_original_float64_replicas_on_one_device(name, loop, x64):
    _assert_agrees(name, 1, loop, jnp.float64, rtol=1e-9)


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(n, marks=pytest.mark.slow)
        if re.search('ls0.1|sync|dev1', n) or SLOW.search(n)
        else n
        for n in FLOAT32
    ],
)
def test_original_float32(name):
    _assert_agrees(name, _devices(name), 'auto', jnp.float32, rtol=5e-5)


def test_every_value_after_three_steps(x64):
    name = 'train_wrnsmallrecipe_rho0.05_ls0_dev4_f64'
    file = golden(name)
    values = [values for values, _ in _run(name, _devices(name), 'auto', jnp.float64)][-1]
    for kind in ('param', 'state'):
        for n in file[f'{kind}_names'].tolist():
            np.testing.assert_allclose(
                values[n], file[f'step3/{kind}_values/{n}'], rtol=1e-9, atol=1e-11
            )
