"""Base optimizers and schedules that are not of the paper: by hand, against optax, in runs."""

import json
import math
from unittest import mock

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from helpers import Net, assert_trees_equal, at_step, relative_distance, small_config
from optax import contrib

from configs import common
from sam_jax import losses, models, optimizers, schedules, settings, sharpness, train
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment
from sam_jax.settings import schema
from sam_jax.targets import programs

PARAMS = {
    'conv': {'kernel': (3, 3, 2, 4), 'bias': (4,)},
    'norm': {'scale': (4,), 'bias': (4,)},
    'dense': {'kernel': (4, 6), 'bias': (6,)},
    'positions': {'position': (5, 4)},
    'head': {'kernel': (6, 3), 'bias': (3,)},
}


def _tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape)),
        PARAMS,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _settings(**changed):
    return ml_collections.ConfigDict(
        {
            **common.get_config().optimizer,
            'clip_norm': 0.0,
            'nesterov': False,
            'decay': 0.99,
            'epsilon': 1e-8,
            **changed,
        }
    )


def _descend(tx, steps=3):
    """Params after some steps along gradients that depend on them."""
    params = _tree(0)
    state = tx.init(params)
    for t in range(steps):
        grads = jax.tree.map(lambda w, r: w**3 + r, params, _tree(t + 1))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


# Optimizers


@pytest.mark.parametrize('everything', [True, False])
@pytest.mark.parametrize('nesterov', [True, False])
@pytest.mark.parametrize('name', optimizers.DECOUPLED)
def test_decoupled_optimizers_are_optax_s(name, nesterov, everything, x64):
    """Those parts of optax in a chain of one's own; the decay spares norms, biases, positions."""
    decayed = {
        module: {leaf: everything or leaf == 'kernel' for leaf in leaves}
        for module, leaves in PARAMS.items()
    }
    decay = optax.add_decayed_weights(0.2, decayed)
    adam = optax.scale_by_adam(0.9, 0.99, 1e-8, nesterov=nesterov)
    expected = {
        'adamw': optax.chain(adam, decay, optax.scale(-0.1)),
        'lamb': optax.chain(
            optax.scale_by_adam(0.9, 0.99, 1e-8),
            decay,
            optax.scale_by_trust_ratio(),
            optax.scale(-0.1),
        ),
        'lion': optax.chain(optax.scale_by_lion(0.9, 0.99), decay, optax.scale(-0.1)),
        'muon': optax.chain(
            optax.partition(
                {
                    'matrix': contrib.scale_by_muon(
                        beta=0.9,
                        nesterov=nesterov,
                        weight_dimension_numbers=lambda params: jax.tree.map(
                            lambda x: contrib.MuonDimensionNumbers(
                                tuple(range(x.ndim - 1)), (x.ndim - 1,)
                            ),
                            params,
                        ),
                    ),
                    'other': adam,
                },
                {
                    module: {
                        leaf: 'matrix' if (leaf, module != 'head') == ('kernel', True) else 'other'
                        for leaf in leaves
                    }
                    for module, leaves in PARAMS.items()
                },
            ),
            optax.stateless(
                lambda updates, _: {
                    module: {
                        leaf: x * (_muon_scale(x) if leaf == 'kernel' and module != 'head' else 1.0)
                        for leaf, x in leaves.items()
                    }
                    for module, leaves in updates.items()
                }
            ),
            decay,
            optax.scale(-0.1),
        ),
    }[name]
    ours = _settings(name=name, nesterov=nesterov, decay_norm_and_bias=everything)
    tx = optimizers.create(ours, 0.1, 0.2)
    distance = relative_distance(_descend(tx), _descend(expected))
    assert distance < 1e-9


def _muon_scale(kernel):
    return 0.2 * math.sqrt(max(math.prod(kernel.shape[:-1]), kernel.shape[-1]))


def test_decoupled_decay_by_hand(x64):
    """w <- (1 - lr a) w besides the step that there is without it; of LAMB within the ratio."""
    for name in ('adamw', 'lion', 'muon'):
        with_decay, without = (
            _descend(optimizers.create(_settings(name=name), 0.1, a), steps=1) for a in (0.2, 0.0)
        )
        jax.tree.map(
            lambda a, b, w: np.testing.assert_allclose(a - b, -0.1 * 0.2 * w, atol=1e-9),
            with_decay,
            without,
            _tree(0),
        )
    w, g = np.array([[3.0, 4.0]]), np.array([[1.0, -1.0]])
    tx = optimizers.create(_settings(name='lamb'), 0.1, 0.5)
    updates, _ = tx.update(jnp.asarray(g), tx.init(jnp.asarray(w)), jnp.asarray(w))
    u = np.sign(g) + 0.5 * w  # of the first step of Adam the sign is all
    np.testing.assert_allclose(updates, -0.1 * 5 / np.linalg.norm(u) * u, rtol=1e-6)


def test_lion_by_hand(x64):
    tx = optimizers.create(_settings(name='lion', momentum=0.8, decay=0.9), 0.1)
    w, m = np.array([1.0, -2.0, 0.5]), np.zeros(3)
    state = tx.init(jnp.asarray(w))
    for t in range(4):
        g = np.sin(3.0 * w + t)
        updates, state = tx.update(jnp.asarray(g), state, jnp.asarray(w))
        np.testing.assert_allclose(updates, -0.1 * np.sign(0.8 * m + 0.2 * g), rtol=1e-12)
        m = 0.9 * m + 0.1 * g
        np.testing.assert_allclose(
            optimizers.momentum(_settings(name='lion'), state), m, rtol=1e-12
        )
        w = w + np.asarray(updates)


def test_muon_makes_matrices_nearly_orthogonal(x64):
    """Of kernels but the head's; of a convolution the matrix of all its inputs."""
    tx = optimizers.create(_settings(name='muon'), 1.0)
    params, grads = _tree(0), _tree(1)
    updates, state = tx.update(grads, tx.init(params), params)
    for module in ('conv', 'dense'):
        u = np.asarray(updates[module]['kernel'])
        values = np.linalg.svd(u.reshape(-1, u.shape[-1]) / _muon_scale(u), compute_uv=False)
        assert (0.6 < values).all() and (values < 1.3).all()
    for module, leaf in [('head', 'kernel'), ('norm', 'scale'), ('positions', 'position')]:
        u, g = updates[module][leaf], grads[module][leaf]
        np.testing.assert_allclose(u, -np.sign(g), rtol=1e-5)
    v = optimizers.momentum(_settings(name='muon'), state)
    jax.tree.map(lambda v, g: np.testing.assert_allclose(v, 0.1 * g, rtol=1e-9), v, grads)


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_momentum_is_like_the_params_and_points_against_the_step(name, x64):
    tx = optimizers.create(_settings(name=name), 0.1)
    params = _tree(0)
    updates, state = tx.update(_tree(1), tx.init(params), params)
    v = optimizers.momentum(_settings(name=name), state)
    assert jax.tree.structure(v) == jax.tree.structure(params)
    inner = optax.tree.vdot(v, updates)
    assert inner < 0


def test_which_params_are_decayed():
    params = _tree(0)
    assert all(jax.tree.leaves(losses.decayed(params)))
    some = losses.decayed(params, False)
    assert {m for m, leaves in some.items() if any(leaves.values())} == {'conv', 'dense', 'head'}
    kernels = [params[m]['kernel'] for m in ('conv', 'dense', 'head')]
    np.testing.assert_allclose(
        losses.l2_penalty(params, 0.3, False),
        0.15 * sum(float(jnp.sum(w**2)) for w in kernels),
        rtol=1e-6,
    )


# Schedules


def test_linear():
    for end in (0.0, 0.01):
        schedule = schedules.create('linear', 0.3, 100, end=end)
        expected = [0.3 * (1 - (1 - end) * t / 100) for t in (0, 25, 50, 100)]
        values = [schedule(t) for t in (0, 25, 50, 100, 150)]
        np.testing.assert_allclose(values, [*expected, 0.3 * end], atol=1e-8)


def test_milestones():
    schedule = schedules.create('milestones', 0.3, 100, steps=[50, 80], factor=0.2)
    values = [float(schedule(t)) for t in (0, 49, 50, 79, 80, 100)]
    np.testing.assert_allclose(values, 0.3 * 0.2 ** np.array([0, 0, 1, 1, 2, 2]), rtol=1e-6)
    jitted = jax.jit(schedule)
    np.testing.assert_allclose([jitted(t) for t in (49, 50)], [0.3, 0.06], rtol=1e-6)
    direct = optax.piecewise_constant_schedule(0.3, {50: 0.2, 80: 0.2})
    for t in (0, 20, 49, 51, 79, 81, 99):
        np.testing.assert_allclose(schedule(t), direct(t), rtol=1e-6)


@pytest.mark.parametrize('name', ['cosine', 'linear', 'exponential'])
def test_a_schedule_that_begins_after_the_warm_up(name):
    """The warm-up ends at the top, and the rest of the run has all of the schedule."""
    late = schedules.create(name, 0.3, 100, warmup_steps=20, after_warmup=True)
    whole = schedules.create(name, 0.3, 80)
    np.testing.assert_allclose([late(t) for t in (0, 5, 10, 20)], [0, 0.075, 0.15, 0.3], rtol=1e-6)
    for t in (20, 37, 60, 100):
        np.testing.assert_allclose(late(t), whole(t - 20), atol=1e-7)


def _rates(steps=range(0, 60, 7), **overrides):
    config = small_config(total_epochs=3, optimizer__learning_rate=0.4, **overrides)
    settings.check(config)
    hparams = mock.Mock(learning_rate=0.4, rho=0.05)
    return [float(schedules.of_run(config, hparams, step, 20)[0]) for step in steps]


def test_schedules_of_a_run():
    """Warm-up in steps and in epochs; milestones in epochs; the end of a linear schedule."""
    assert _rates(optimizer__warmup_steps=40) == _rates(optimizer__warmup_epochs=2.0)
    assert _rates(optimizer__warmup_steps=40) != _rates()
    values = _rates(
        [0, 19, 20, 40, 59],
        optimizer__schedule='milestones',
        optimizer__milestones=(1, 2),
        optimizer__milestone_factor=0.5,
    )
    np.testing.assert_allclose(values, [0.4, 0.4, 0.2, 0.1, 0.1], rtol=1e-6)
    values = _rates(
        [0, 10, 35, 60],
        optimizer__schedule='linear',
        optimizer__end=0.1,
        optimizer__warmup_steps=10,
        optimizer__schedule_after_warmup=True,
    )
    np.testing.assert_allclose(values, [0, 0.4, 0.22, 0.04], rtol=1e-6)


def test_rho_follows_a_linear_schedule_as_big_vision_s_gsam():
    """There rho is rho_min at the schedule's end; here `sam.rho_min` is that of rate 0."""
    config = small_config(
        sam__method='gsam',
        total_epochs=3,
        sam__schedule='learning_rate',
        sam__rho=0.6,
        sam__rho_min=(0.1 - 0.01 * 0.6) / 0.99,
        optimizer__schedule='linear',
        optimizer__end=0.01,
    )
    hparams = mock.Mock(learning_rate=0.003, rho=0.6)
    for step in (0, 30, 60):
        rate, rho = schedules.of_run(config, hparams, step, 20)
        expected = 0.1 + 0.5 * (rate - 0.00003) / (0.003 - 0.00003)
        np.testing.assert_allclose(rho, expected, rtol=1e-5)


# Settings


@pytest.mark.parametrize(
    'overrides, message',
    [
        (
            {'optimizer__warmup_steps': 5, 'optimizer__warmup_epochs': 1.0},
            r'warmup_steps is 5 and optimizer.warmup_epochs is 1.0; one of them must be 0',
        ),
        ({'optimizer__milestones': (1,)}, r"schedule is 'cosine'; .*needs .*'milestones'\.$"),
        ({'optimizer__schedule': 'milestones'}, r'milestones is \(\) .* needs at least one epoch'),
        (
            {'optimizer__schedule': 'milestones', 'optimizer__milestones': (1, 3)},
            r'milestones is \(1, 3\); it must hold epochs of the run, from 1 to 2\.',
        ),
        ({'optimizer__end': 0.1}, r"optimizer.end is 0.1; .*the schedule is 'cosine': set it to 0"),
        ({'sam__schedule': 'milestones'}, r"sam.schedule is 'milestones'; it must be one of"),
        ({'optimizer__name': 'adamax'}, r"optimizer.name is 'adamax'; it must be one of .*muon"),
        (
            {'optimizer__name': 'lamb', 'optimizer__epsilon': 0.0},
            r'optimizer.epsilon is 0; lamb needs a positive one',
        ),
        ({'optimizer__warmup_steps': -1}, r'optimizer.warmup_steps is -1'),
    ],
)
def test_bad_settings(overrides, message):
    with pytest.raises(UserError, match=message):
        settings.check(small_config(**overrides))


def test_a_warm_up_longer_than_the_run():
    config = small_config(optimizer__warmup_steps=41)
    with pytest.raises(UserError, match=r'optimizer.warmup_steps is 41; .* the run, 40\.'):
        Experiment.from_config(config, jax.devices()[:1])
    config.optimizer.warmup_steps = 40
    Experiment.from_config(config, jax.devices()[:1])


def test_runs_of_before_go_on():
    """Their config.json lacks what came later, and holds lists in place of tuples."""
    config = small_config()
    before = json.loads(json.dumps(settings.jsonable(config)))
    for key in schema.ADDED:
        del before[key]
    settings.check_same_mathematics(config, before)
    config.optimizer.milestones, config.optimizer.schedule = (1,), 'milestones'
    with pytest.raises(UserError, match=r'optimizer.milestones \(was \[\], now \[1\]\)'):
        settings.check_same_mathematics(config, before)


# In runs


def _net(settings, num_classes):
    return Net(settings.dtype, settings.dropout_rate)


@pytest.fixture
def tiny_model():
    """A network that compiles quickly."""
    with mock.patch.object(models, 'from_config', _net):
        yield


RUN = dict(
    batch_size=64,
    replica_batch_size=16,
    optimizer__nesterov=False,
    optimizer__decay=0.99,
    optimizer__epsilon=1e-8,
    optimizer__learning_rate=1e-3,
    optimizer__weight_decay=0.1,
)


def _run(config, workdir, devices=1):
    return train.train_and_evaluate(config, str(workdir), jax.devices()[:devices])


@pytest.mark.parametrize('name', ['adam', 'adamw'])
def test_sam_climbs_no_decoupled_decay(name, x64, tiny_model, tmp_path):
    """The loss of the first step, and all that SAM makes of it, is that without a decay."""
    reports, params = [], []
    for decay in (0.0, 0.5):
        config = small_config(
            **{**RUN, 'optimizer__weight_decay': decay, 'optimizer__name': name},
            model__dtype='float64',
            total_epochs=1,
            sam__rho=0.5,
        )
        experiment = Experiment.from_config(config, jax.devices()[:1])
        start = jax.device_get(experiment.initial_state())
        state, metrics = experiment.train_step(
            experiment.on_devices(start), next(experiment.feeds()), *experiment.constants
        )
        params.append(jax.device_get(state.params))
        names = ('clean_grad_norm', 'grad_norm', 'perturbed_loss')
        reports.append([float(metrics[f'train/{n}']) for n in names])
        rate = float(metrics['train/learning_rate'])
    if name == 'adam':
        assert not np.allclose(*reports, rtol=1e-3)
        return
    np.testing.assert_allclose(*reports, rtol=1e-12)
    jax.tree.map(
        lambda a, b, w: np.testing.assert_allclose(b - a, -rate * 0.5 * w, atol=1e-12),
        *params,
        start.params,
    )


@pytest.mark.parametrize('name', optimizers.DECOUPLED)
def test_devices_do_not_matter(name, x64, tiny_model, tmp_path):
    config = small_config(**RUN, optimizer__name=name, model__dtype='float64', total_epochs=1)
    one, four = (_run(config, tmp_path / str(n), n) for n in (1, 4))
    # The sign of a number that is 0 but for rounding is Lion's step.
    assert relative_distance(four.params, one.params) < (1e-2 if name == 'lion' else 1e-8)


@pytest.mark.parametrize('name', optimizers.DECOUPLED)
def test_resume_is_exact(name, tiny_model, tmp_path):
    config = small_config(
        **RUN,
        optimizer__name=name,
        optimizer__schedule='milestones',
        optimizer__milestones=(1,),
        optimizer__warmup_steps=30,
        checkpoint__every_epochs=1,
    )
    whole = _run(config, tmp_path / 'whole')
    with at_step(30, mock.Mock(side_effect=KeyboardInterrupt)), pytest.raises(KeyboardInterrupt):
        _run(config, tmp_path / 'halves')
    assert_trees_equal(_run(config, tmp_path / 'halves'), whole)


# Those that ask the optimizer for something, or go past it.
@pytest.mark.parametrize(
    'method',
    [
        method
        if method in ('momentum_sam', 'wsam', 'gsam')
        else pytest.param(method, marks=pytest.mark.slow)
        for method in sharpness.METHODS
    ],
)
@pytest.mark.parametrize('name', ['muon', 'lion'])
def test_every_method_has_every_optimizer(name, method, tiny_model):
    """But for those that refuse all others than SGD."""
    config = small_config(sam__method=method, total_epochs=20, **{**RUN, 'replica_batch_size': 64})
    refused = sharpness.METHODS[method].refuses
    if 'optimizer.name' in refused:
        pytest.skip('it replaces the optimizer')
    for key, value in refused.items():
        *sections, last = key.split('.')
        section = config
        for part in sections:
            section = section[part]
        section[last] = value
    config.optimizer.name = name
    if method == 'momentum_sam':
        config.optimizer.momentum = 0.9
    experiment = Experiment.from_config(config, jax.devices()[:1])
    programs.train_step_of(experiment)
