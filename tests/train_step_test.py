"""Laws of the train step: what the two passes share, what is kept from which, what is compiled."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    Net,
    assert_trees_close,
    assert_trees_equal,
    compilations,
    relative_distance,
    small_config,
)

from sam_jax import data, losses, replicas, rngs, train_state, train_step


@functools.cache
def _dataset(augment='none'):
    return data.load_dataset(small_config(data__augment=augment, data__padding=2).data)


class Session:
    """A step and all that it needs, for a config on the first `num_devices` devices."""

    def __init__(self, config, num_devices=1, model=None):
        self.config = config
        self.dataset = _dataset(config.data.augment)
        self.layout, _ = replicas.make_layout(
            config.batch_size,
            config.replica_batch_size,
            config.sam.replicas_per_group,
            config.replica_loop,
            jax.devices()[:num_devices],
        )
        self.model = model or Net(
            config.model.dtype, config.model.dropout_rate, config.model.batch_norm
        )
        self.step_fn = train_step.make_train_step(self.model, config, self.layout, self.dataset)
        self.arrays = self.layout.replicate(self.dataset.device_arrays(self.dataset.train))

    def start(self):
        return self.layout.replicate(
            train_state.create_train_state(
                self.config, self.model, self.dataset.image_shape, self.dataset.num_images
            )
        )

    def arguments(self, step, **hparams):
        values = train_state.HParams.from_config(self.config).replace(**hparams)
        feed, previous = (
            self.layout.shard(self.dataset.train_feed(self.config.seed, i, self.layout))
            for i in (step, max(step - 1, 0))
        )
        if train_step.asks_for_previous(self.config):
            feed = train_step.paired(feed, previous)
        return feed, self.arrays, self.layout.replicate(values)

    def run(self, steps, **hparams):
        state = self.start()
        for step in range(steps):
            state, metrics = self.step_fn(state, *self.arguments(step, **hparams))
        return state, metrics

    def batch(self, step=0):
        """The replicas of a step, as the step itself gathers them: (replicas, examples, ...)."""
        feed = self.dataset.train_feed(self.config.seed, step, self.layout)
        feed = {name: x.reshape(-1, self.config.replica_batch_size) for name, x in feed.items()}
        keys = jax.random.split(jax.random.key(0), feed['label'].shape)  # no augmentation
        arrays = jax.tree.map(jnp.asarray, self.dataset.device_arrays(self.dataset.train))
        return self.dataset.train_batch(arrays, feed, keys, keys[0, 0])


def step_config(**overrides):
    return small_config(
        **{'batch_size': 32, 'replica_batch_size': 16, 'log_every_steps': 1, **overrides}
    )


@pytest.mark.bitwise
@pytest.mark.parametrize('dropout_rate', [0.0, 0.3])
def test_rho_zero_is_the_base_optimizer_bit_for_bit(dropout_rate):
    common = dict(model__dropout_rate=dropout_rate, data__augment='basic', data__padding=2)
    sam, _ = Session(step_config(sam__rho=0.0, **common), 2).run(4)
    sgd, _ = Session(step_config(sam__method='sgd', **common), 2).run(4)
    for part in ('params', 'batch_stats', 'opt_state'):
        assert_trees_equal(getattr(sam, part), getattr(sgd, part))


def _hand_step(session, state, rho, method='sam'):
    """Algorithm 1 of the paper, each replica on its own, in plain jax.

    Returns (gradient, statistics, what is logged of the two gradients).
    """
    batch, config = session.batch(), session.config

    def one(image, label, replica):
        def objective(params):
            logits, new = session.model.apply(
                {'params': params, 'batch_stats': state.batch_stats},
                image,
                train=True,
                mutable=['batch_stats'],
                rngs={'dropout': rngs.key(0, 'dropout', 0, replica)},
            )
            penalty = losses.l2_penalty(params, config.optimizer.weight_decay)
            wrong = jnp.mean(jnp.argmax(logits, axis=-1) != label)
            loss = losses.of_config(config)(logits, label).mean()
            return loss + penalty, (new['batch_stats'], wrong)

        grads, (stats, wrong) = jax.grad(objective, has_aux=True)(state.params)
        norm = optax.tree.norm(grads)
        moved = jax.tree.map(lambda w, g: w + rho * g / norm, state.params, grads)
        perturbed, (_, wrong_there) = jax.grad(objective, has_aux=True)(moved)
        flat = [
            jnp.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (grads, perturbed)
        ]
        cosine = flat[0] @ flat[1] / jnp.sqrt((flat[0] @ flat[0]) * (flat[1] @ flat[1]))
        logged = {
            'error_rate': wrong,
            'perturbed_error_rate': wrong_there,
            'perturbed_cosine': cosine,
            'ascent_cosine': 1.0,
            'descent_cosine': 1.0,
        }
        return perturbed, stats, logged

    parts = [one(batch['image'][i], batch['label'][i], i) for i in range(len(batch['label']))]
    return jax.tree.map(lambda *x: sum(x) / len(x), *parts)


@pytest.mark.parametrize(
    'num_devices, loss',
    [
        pytest.param(1, 'softmax', marks=pytest.mark.slow),
        (2, 'softmax'),
        pytest.param(2, 'sigmoid', marks=pytest.mark.slow),
    ],
)
def test_step_is_algorithm_1_with_clean_statistics_and_one_dropout_mask(num_devices, loss, x64):
    """The second pass sees the first one's mask; its statistics are thrown away."""
    config = step_config(
        loss=loss,
        model__head_bias={'softmax': 0.0, 'sigmoid': -2.0}[loss],
        model__dropout_rate=0.5,
        model__dtype='float64',
        optimizer__momentum=0.0,
        optimizer__nesterov=False,
        optimizer__clip_norm=0.0,
        optimizer__schedule='constant',
    )
    session = Session(config, num_devices)
    state = session.start()
    grads, stats, logged = _hand_step(session, state, config.sam.rho)
    params = jax.tree.map(lambda w, g: w - 0.1 * g, state.params, grads)
    new, metrics = session.run(1)
    assert_trees_close(new.params, params, rtol=1e-9, atol=1e-12)
    assert_trees_close(new.batch_stats, stats, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(metrics['train/grad_norm'], optax.tree.norm(grads), rtol=1e-9)
    np.testing.assert_allclose(metrics['train/perturbation_norm'], config.sam.rho, rtol=1e-9)
    for name, value in logged.items():
        np.testing.assert_allclose(metrics[f'train/{name}'], value, rtol=1e-9, err_msg=name)
    assert logged['error_rate'] != logged['perturbed_error_rate']
    assert logged['perturbed_cosine'] < 0.99
    np.testing.assert_allclose(
        metrics['train/update_norm'], 0.1 * optax.tree.norm(grads), rtol=1e-9
    )
    assert metrics['train/perturbed_loss'] > metrics['train/loss']


def test_both_passes_share_the_dropout_mask():
    """With rho almost 0 the perturbed loss is the clean one; another mask would change it."""
    session = Session(step_config(model__dropout_rate=0.5, sam__rho=1e-6))
    _, metrics = session.run(1)
    np.testing.assert_allclose(metrics['train/perturbed_loss'], metrics['train/loss'], rtol=5e-6)
    _, other = session.run(1, seed=np.uint32(1))
    assert abs(other['train/loss'] / metrics['train/loss'] - 1) > 5e-5


def test_bfloat16_model_is_perturbed_in_float32():
    session = Session(step_config(model__dtype='bfloat16', sam__rho=0.05))
    state, metrics = session.run(3)
    assert {x.dtype for x in jax.tree.leaves((state.params, state.batch_stats))} == {
        jnp.dtype('float32')
    }
    np.testing.assert_allclose(metrics['train/perturbation_norm'], 0.05, rtol=1e-5)
    assert metrics['train/perturbed_loss'] > metrics['train/loss']
    reference, _ = Session(step_config(sam__rho=0.05)).run(3)
    assert relative_distance(state.params, reference.params) < 0.05


class _DtypeProbe(nn.Module):
    """Notes the dtypes of the params it is called with."""

    note: Callable

    @nn.compact
    def __call__(self, x, train=False):
        w = self.param('w', nn.initializers.normal(0.03), (64, 10), jnp.bfloat16)
        self.note(w.dtype)
        return (x.reshape(len(x), -1).astype(w.dtype) @ w).astype(jnp.float32)


def test_bfloat16_params_are_perturbed_in_float32():
    """Even params stored in bfloat16 (a custom model's) are moved in float32."""
    seen = []
    state, metrics = Session(step_config(sam__rho=0.05), model=_DtypeProbe(seen.append)).run(1)
    assert state.params['w'].dtype == jnp.bfloat16
    assert jnp.float32 in seen  # the second pass
    np.testing.assert_allclose(metrics['train/perturbation_norm'], 0.05, rtol=1e-5)


def test_one_compilation_for_all_steps_and_all_swept_values():
    session = Session(step_config())
    state, steps = session.start(), [session.arguments(i) for i in range(3)]
    swept = [
        session.arguments(i, **h)
        for i, h in enumerate(
            [
                {'rho': np.float32(0.3)},
                {'learning_rate': np.float32(0.01)},
                {'weight_decay': np.float32(0.0)},
                {'seed': np.uint32(7)},
            ]
        )
    ]
    with compilations() as compiled:
        for i, arguments in enumerate(steps + swept):
            state, _ = session.step_fn(state, *arguments)
            assert len(compiled) == 1, f'call {i}'


def test_swept_values_are_not_constants_of_the_program():
    """Two configs that differ in rho, learning rate, weight decay and seed: one program."""
    programs = []
    for overrides in (
        {},
        dict(sam__rho=0.1, optimizer__learning_rate=0.3, seed=5, optimizer__weight_decay=1e-3),
    ):
        session = Session(step_config(**overrides))
        lowered = session.step_fn.lower(session.start(), *session.arguments(0))
        programs.append(lowered.as_text())
    assert programs[0] == programs[1]


def test_swept_values_act():
    session = Session(step_config())
    base, _ = session.run(2)
    for hparams in (
        {'rho': np.float32(0.1)},
        {'learning_rate': np.float32(0.05)},
        {'weight_decay': np.float32(0.1)},
    ):
        other, _ = session.run(2, **hparams)
        assert relative_distance(other.params, base.params) > 1e-4, hparams


def test_seeds_differ_in_init_order_and_dropout():
    starts = [Session(step_config(seed=s)).start() for s in (0, 1)]
    assert relative_distance(starts[0].params, starts[1].params) > 0.1
    dataset, layout = _dataset(), Session(step_config()).layout
    assert (
        dataset.train_feed(0, 0, layout)['index'] != dataset.train_feed(1, 0, layout)['index']
    ).any()


def test_a_group_ascends_by_its_mean_gradient(x64):
    """All replicas in one group: the perturbation of the whole batch's mean gradient."""
    overrides = dict(
        model__dtype='float64',
        model__batch_norm=False,
        replica_batch_size=4,
        batch_size=16,
        sam__rho=0.3,
    )
    whole, _ = Session(step_config(**{**overrides, 'replica_batch_size': 16})).run(2)
    groups = [
        Session(step_config(**overrides, sam__replicas_per_group=g), 2).run(2)[0] for g in (1, 2, 4)
    ]
    distances = [relative_distance(g.params, whole.params) for g in groups]
    assert distances[2] < 1e-12 < 1e-5 < min(distances[:2])


def test_metrics_are_means_since_the_last_report():
    each, every_third = Session(step_config()), Session(step_config(log_every_steps=3))
    state, values = each.start(), []
    for step in range(3):
        state, metrics = each.step_fn(state, *each.arguments(step))
        values.append(float(metrics['train/loss']))
    _, metrics = every_third.run(3)
    np.testing.assert_allclose(metrics['train/loss'], np.mean(values), rtol=1e-6)


@pytest.mark.parametrize('method', ['sam', 'periodic_sam', 'looksam'])
def test_a_step_as_gpus_have_it_is_the_step(monkeypatch, method):
    """Two steps on two devices, of which the second is logged; a CPU takes what GPUs are given."""
    config = step_config(sam__method=method, log_every_steps=2)
    expected, logged = Session(config, 2).run(2)
    chosen = []

    def for_cuda(*args, cuda, default):
        chosen.append(cuda)
        return cuda(*args)

    monkeypatch.setattr(jax.lax, 'platform_dependent', for_cuda)
    state, metrics = Session(config, 2).run(2)
    assert len(chosen) > 5
    assert_trees_close((state.params, metrics), (expected.params, logged), rtol=1e-6, atol=1e-7)


def test_cosines_are_those_of_the_logged_step():
    """At the others they are not computed."""
    each, every_other = Session(step_config()), Session(step_config(log_every_steps=2))
    for steps in (1, 2):
        _, of_each = each.run(steps)
        _, metrics = every_other.run(steps)
        for name in ('ascent', 'perturbed', 'descent'):
            name = f'train/{name}_cosine'
            expected = float(of_each[name]) if steps == 2 else 0.0
            assert float(metrics[name]) == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize(
    ['method', 'replicas_per_group', 'num_devices', 'loop'],
    [
        pytest.param('sam', 1, 4, 'unroll', marks=pytest.mark.slow),
        ('sam', 1, 8, 'unroll'),
        *(('sam', group, 8, 'unroll') for group in (2, 8)),
        *(pytest.param('sam', group, 4, 'unroll', marks=pytest.mark.slow) for group in (2, 8)),
        ('sam', 2, 1, 'scan'),
        pytest.param('second_order_sam', 2, 8, 'unroll', marks=pytest.mark.slow),
        pytest.param('second_order_sam', 2, 4, 'scan', marks=pytest.mark.slow),
    ],
)
def test_what_is_logged_knows_no_devices(method, replicas_per_group, num_devices, loop, x64):
    reference = _logged(method, replicas_per_group, 1, 'unroll')
    logged = _logged(method, replicas_per_group, num_devices, loop)
    assert {'train/perturbed_error_rate', 'train/descent_cosine'} <= logged.keys()
    for name, value in reference.items():
        np.testing.assert_allclose(logged[name], value, rtol=1e-9, err_msg=name)


@functools.cache
def _logged(method, replicas_per_group, num_devices, loop):
    config = step_config(
        sam__method=method,
        sam__replicas_per_group=replicas_per_group,
        sam__rho=0.3,
        model__dtype='float64',
        replica_batch_size=4,
        replica_loop=loop,
    )
    return jax.device_get(Session(config, num_devices).run(2)[1])


def test_first_bad_step_is_noted():
    session = Session(step_config(optimizer__learning_rate=1e30, optimizer__clip_norm=0.0))
    state, metrics = session.run(1)
    assert int(metrics['bad_step']) == 0
    state, metrics = session.run(4)
    assert 2 <= int(metrics['bad_step']) <= 3 and int(state.bad_step) == int(metrics['bad_step'])


def test_ema_follows_the_updated_params_and_statistics(x64):
    session = Session(step_config(ema__decay=0.7, model__dtype='float64'))
    state = session.start()
    average = jax.device_get({'params': state.params, 'batch_stats': state.batch_stats})
    for step in range(3):
        state, _ = session.step_fn(state, *session.arguments(step))
        d = min(0.7, (2 + step) / (11 + step))
        average = jax.tree.map(
            lambda a, v, d=d: d * a + (1 - d) * np.asarray(v),
            average,
            {'params': state.params, 'batch_stats': state.batch_stats},
        )
    assert_trees_close(state.ema, average, rtol=1e-12)


def test_rho_and_learning_rate_follow_their_schedules():
    config = step_config(sam__warmup_epochs=0.1, optimizer__schedule='exponential', batch_size=32)
    session = Session(config)
    state, per_epoch = session.start(), 1297 // 32
    for step in range(5):
        state, metrics = session.step_fn(state, *session.arguments(step))
        rho = config.sam.rho * min(step / (0.1 * per_epoch), 1)
        np.testing.assert_allclose(metrics['train/rho'], rho, rtol=1e-6)
        np.testing.assert_allclose(metrics['train/perturbation_norm'], rho, rtol=1e-4)
        np.testing.assert_allclose(
            metrics['train/learning_rate'], 0.1 * 0.012 ** (step / (2 * per_epoch)), rtol=1e-5
        )
