"""Methods that ask more of the loop than a second gradient, recomputed by hand on one device."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close, relative_distance
from methods_in_training_test import _session

from sam_jax import losses, optimizers, rngs, sharpness
from sam_jax.experiment import Experiment
from sam_jax.sharpness import trees

pytestmark = [pytest.mark.usefixtures('x64'), pytest.mark.accelerator]

# Plain descent, so that the gradient can be read off the params; dropout stays.
PLAIN = {
    'optimizer__momentum': 0.0,
    'optimizer__nesterov': False,
    'optimizer__clip_norm': 0.0,
    'optimizer__schedule': 'constant',
    'optimizer__learning_rate': 0.1,
}


def _replicas(session, step):
    batch = session.batch(step)
    return [
        {
            'image': batch['image'][i],
            'label': batch['label'][i],
            'rngs': {'dropout': rngs.key(0, 'dropout', step, i)},
        }
        for i in range(len(batch['label']))
    ]


def _logits(session, params, batch_stats, replica):
    return session.model.apply(
        {'params': params, 'batch_stats': batch_stats},
        replica['image'],
        train=True,
        mutable=['batch_stats'],
        rngs=replica['rngs'],
    )[0]


def _gradient(session, params, batch_stats, replicas, added=lambda logits, i: 0.0):
    """Mean over replicas of the gradient of cross entropy, penalty and what is added."""

    def objective(params):
        total = 0.0
        for i, replica in enumerate(replicas):
            logits = _logits(session, params, batch_stats, replica)
            total += jnp.mean(losses.cross_entropy(logits, replica['label'])) + added(logits, i)
        return total / len(replicas) + losses.l2_penalty(
            params, session.config.optimizer.weight_decay
        )

    return jax.jit(jax.grad(objective))(params)


def _move(params, grads, scale):
    return jax.tree.map(lambda w, g: w + scale * g, params, grads)


def _climb(params, grads, rho=0.1):
    return _move(params, grads, rho / optax.tree.norm(grads))


def _mean(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def _host(state):
    return jax.tree.map(jnp.asarray, jax.device_get(state))


def _step(session, state, step):
    """One step from a copy of the state."""
    return _host(
        session.step_fn(
            session.layout.replicate(jax.tree.map(jnp.copy, state)), *session.arguments(step)
        )[0]
    )


def _rate(session, step):
    """The cosine schedule of the learning rate, from 0.1."""
    total = session.config.total_epochs * (
        session.dataset.num_train_examples // session.config.batch_size
    )
    return 0.1 * 0.5 * (1 + np.cos(np.pi * step / total))


def test_esam_descends_on_the_examples_whose_loss_rises_most():
    """gamma = 0.3 of 8 examples: 3 of each replica, chosen by the rise from w to w + eps."""
    session = _session('esam', sam__beta=1.0, sam__gamma=0.3, **PLAIN)
    state = _host(session.start())
    replicas, parts = _replicas(session, 0), []
    for group in (replicas[:2], replicas[2:]):
        moved = _climb(state.params, _gradient(session, state.params, state.batch_stats, group))
        chosen = []
        for replica in group:
            before, after = (
                losses.cross_entropy(
                    _logits(session, params, state.batch_stats, replica), replica['label']
                )
                for params in (state.params, moved)
            )
            index = np.argsort(np.asarray(before - after))[:3]
            chosen.append(
                {**replica, 'image': replica['image'][index], 'label': replica['label'][index]}
            )
        parts.append(_gradient(session, moved, state.batch_stats, chosen))
    new = _step(session, state, 0)
    assert_trees_close(new.params, _move(state.params, _mean(parts), -0.1), rtol=1e-8, atol=1e-11)


def test_functional_sam_pulls_the_clean_derivative_back():
    """The derivative by the logits is that of w, dropout and all; the Jacobian that of w + eps."""
    session = _session('functional_sam', **{**PLAIN, 'optimizer__weight_decay': 0.01})
    state = _host(session.start())
    replicas, parts = _replicas(session, 0), []
    for group in (replicas[:2], replicas[2:]):
        clean = _gradient(session, state.params, state.batch_stats, group)
        derivatives = [
            jax.grad(lambda z, r=replica: jnp.mean(losses.cross_entropy(z, r['label'])))(
                _logits(session, state.params, state.batch_stats, replica)
            )
            for replica in group
        ]

        def objective(params, group=group, derivatives=derivatives):
            total = sum(
                jnp.sum(_logits(session, params, state.batch_stats, replica) * d)
                for replica, d in zip(group, derivatives)
            )
            return total / 2 + losses.l2_penalty(params, 0.01)

        parts.append(jax.grad(objective)(_climb(state.params, clean)))
    new = _step(session, state, 0)
    assert_trees_close(new.params, _move(state.params, _mean(parts), -0.1), rtol=1e-8, atol=1e-11)


def test_sampa_s_two_gradients_are_of_two_batches():
    """That at the perturbed point is of the batch, and the dropout, of the step before."""
    session = _session(
        'sampa', sam__lam=0.3, **{**PLAIN, 'optimizer__schedule': 'cosine'}, total_epochs=1
    )
    start = _host(session.start())
    state = _step(session, start, 0)
    memory = state.sharpness_state.memory
    # At the first step both gradients are at w, of the same batch.
    first = _gradient(session, start.params, start.batch_stats, _replicas(session, 0))
    assert_trees_close(memory, first, rtol=1e-8, atol=1e-11)
    assert_trees_close(state.params, _move(start.params, first, -0.1), rtol=1e-8, atol=1e-11)
    parts = []
    for group in (slice(0, 2), slice(2, 4)):
        ahead = _gradient(
            session,
            _move(state.params, memory, -_rate(session, 1)),
            state.batch_stats,
            _replicas(session, 1)[group],
        )
        behind = _gradient(
            session, _climb(state.params, memory), state.batch_stats, _replicas(session, 0)[group]
        )
        parts.append(jax.tree.map(lambda a, b: 0.3 * a + 0.7 * b, ahead, behind))
    new = _step(session, state, 1)
    assert_trees_close(
        new.params, _move(state.params, _mean(parts), -_rate(session, 1)), rtol=1e-6, atol=1e-9
    )


@pytest.mark.slow
def test_wsam_s_sharpness_goes_past_the_optimizer():
    """w - lr (momentum of g, clipped) - lr a (g_p - g), lr that of the step."""
    session = _session(
        'wsam',
        sam__gamma=0.6,
        total_epochs=1,
        **{**PLAIN, 'optimizer__momentum': 0.9, 'optimizer__schedule': 'cosine'},
    )
    state = _host(session.start())
    v = jax.tree.map(jnp.zeros_like, state.params)
    for step in range(2):
        replicas = _replicas(session, step)
        groups = [replicas[:2], replicas[2:]]
        clean = [_gradient(session, state.params, state.batch_stats, part) for part in groups]
        climbed = [
            _gradient(session, _climb(state.params, g), state.batch_stats, part)
            for g, part in zip(clean, groups)
        ]
        g, g_p = _mean(clean), _mean(climbed)
        v = jax.tree.map(lambda m, x: 0.9 * m + x, v, g)
        lr = _rate(session, step)
        expected = jax.tree.map(
            lambda w, m, x, y, lr=lr: w - lr * m - lr * 1.5 * (y - x), state.params, v, g, g_p
        )
        new = _step(session, state, step)
        assert_trees_close(new.params, expected, rtol=1e-6, atol=1e-9)
        state = new


@pytest.mark.slow
def test_bsam_knows_the_number_of_examples():
    """One step: the draw of each group, of variance 1 / (N s), and the prior's weight 40 / N."""
    session = _session('bsam', **{**PLAIN, 'optimizer__weight_decay': 0.0})
    state = _host(session.start())
    replicas, parts = _replicas(session, 0), []
    examples = session.dataset.num_train_examples // 32 * 32
    tx = sharpness.bsam(0.1, num_examples=examples)
    for i, group in enumerate((replicas[:2], replicas[2:])):
        start = tx.init(state.params)
        key = rngs.key(0, 'ascent', 0, i)

        def gradient(params, group=group):
            return _gradient(session, params, state.batch_stats, group)

        parts.append(
            tx.update(gradient(state.params), start, state.params, grad_fn=gradient, key=key)[0]
        )
    new = _step(session, state, 0)
    assert_trees_close(new.params, _move(state.params, _mean(parts), -0.1), rtol=1e-8, atol=1e-11)


@pytest.mark.slow
def test_probes_are_of_the_whole_objective():
    """Losses with the penalty, whose gradients they go with; a key a group."""
    session = _session(
        'frob_sam', sam__lam=0.5, sam__n=3, **{**PLAIN, 'optimizer__weight_decay': 0.1}
    )
    state = _host(session.start())
    replicas, parts = _replicas(session, 0), []
    for i, group in enumerate((replicas[:2], replicas[2:])):

        def objective(params, group=group):
            total = sum(
                jnp.mean(
                    losses.cross_entropy(
                        _logits(session, params, state.batch_stats, replica), replica['label']
                    )
                )
                for replica in group
            )
            return total / 2 + losses.l2_penalty(params, 0.1)

        value, grads = jax.value_and_grad(objective)(state.params)
        tx = sharpness.frob_sam(0.1, 0.5, 3)
        parts.append(
            tx.update(
                grads,
                tx.init(state.params),
                state.params,
                value=value,
                loss=sharpness.from_loss_fn(jax.jit(objective)),
                key=rngs.key(0, 'ascent', 0, i),
            )[0]
        )
    new = _step(session, state, 0)
    assert_trees_close(new.params, _move(state.params, _mean(parts), -0.1), rtol=1e-8, atol=1e-11)


def test_momentum_sam_keeps_the_centre():
    """The params are w, not where the gradient was taken; v is the optimizer's own."""
    session = _session('momentum_sam', **{**PLAIN, 'optimizer__momentum': 0.9})
    state = _host(session.start())
    v = jax.tree.map(jnp.zeros_like, state.params)
    for step in range(2):
        kept = optimizers.momentum(session.config.optimizer, state.opt_state)
        assert_trees_close(kept, v, rtol=1e-8, atol=1e-11)
        point = state.params if step == 0 else _climb(state.params, v, -0.1)
        grads = _gradient(session, point, state.batch_stats, _replicas(session, step))
        v = jax.tree.map(lambda m, g: 0.9 * m + g, v, grads)
        new = _step(session, state, step)
        assert_trees_close(new.params, _move(state.params, v, -0.1), rtol=1e-8, atol=1e-11)
        state = new


def test_saf_remembers_each_example():
    """Two steps an epoch; the loss is on the logits of two epochs ago, where there are some."""
    session = _session(
        'saf',
        size=160,
        total_epochs=3,
        sam__start_epoch=0,
        sam__epochs_ago=2,
        sam__lam=0.8,
        sam__tau=2.0,
        **PLAIN,
    )
    num_images = session.dataset.num_images
    logits = np.full((6, num_images, 10), np.nan)
    state = _host(session.start())
    for step in range(6):
        epoch = step // 2
        feed = session.dataset.train_feed(0, step, session.layout)['index'][0]
        replicas = _replicas(session, step)
        past = logits[epoch - 2] if epoch >= 2 else np.full_like(logits[0], np.nan)
        for i, replica in enumerate(replicas):
            logits[epoch, feed[i]] = _logits(session, state.params, state.batch_stats, replica)

        def added(z, i, past=past, feed=feed):
            known = np.isfinite(past[feed[i]]).all(axis=-1)
            y = jnp.asarray(np.nan_to_num(past[feed[i]]))
            return 0.8 * jnp.mean(jnp.where(known, losses.trajectory(z, y, 2.0), 0.0))

        grads = _gradient(session, state.params, state.batch_stats, replicas, added)
        plain = _gradient(session, state.params, state.batch_stats, replicas)
        assert (relative_distance(grads, plain) > 1e-4) == (epoch >= 2)
        new = _step(session, state, step)
        assert_trees_close(new.params, _move(state.params, grads, -0.1), rtol=1e-7, atol=1e-10)
        state = new
    # Of each epoch the examples of the last, smaller batch are left out: they are not known.
    known = np.isfinite(logits[:, :, 0])
    assert known[1].sum() == 1280 < num_images and (known[1] != known[2]).any()
    for slot, epoch in ((0, 2), (1, 1)):
        written = np.asarray(state.memory['epoch'][slot])
        np.testing.assert_array_equal(written == epoch, known[epoch])
        np.testing.assert_allclose(
            state.memory['logits'][slot][known[epoch]], logits[epoch][known[epoch]], rtol=1e-8
        )


def test_mesa_learns_from_the_moving_average():
    session = _session(
        'mesa', size=160, sam__start_epoch=0, sam__lam=0.8, sam__tau=2.0, ema__decay=0.9, **PLAIN
    )
    state = _host(session.start())
    for step in range(4):
        replicas = _replicas(session, step)
        teacher = [
            session.model.apply(state.ema, replica['image'], train=False) for replica in replicas
        ]

        def added(z, i, teacher=teacher, active=step >= 2):
            return 0.8 * jnp.mean(losses.trajectory(z, teacher[i], 2.0)) * active

        grads = _gradient(session, state.params, state.batch_stats, replicas, added)
        new = _step(session, state, step)
        assert_trees_close(new.params, _move(state.params, grads, -0.1), rtol=1e-7, atol=1e-10)
        state = new


def test_rho_follows_the_learning_rate():
    """rho_min + (rho - rho_min) lr / its peak: GSAM's rule."""
    session = _session(
        'gsam',
        sam__schedule='learning_rate',
        sam__rho_min=0.04,
        optimizer__schedule='cosine',
        optimizer__warmup_epochs=0.1,
    )
    state = session.start()
    for step in range(6):
        state, metrics = session.step_fn(state, *session.arguments(step))
        share = metrics['train/learning_rate'] / 0.05
        np.testing.assert_allclose(metrics['train/rho'], 0.04 + 0.06 * share, rtol=1e-9)
        np.testing.assert_allclose(
            metrics['train/perturbation_norm'], metrics['train/rho'], rtol=1e-9
        )
    assert 0.9 < share < 1


def test_the_adaptive_gate_is_one_for_all_groups():
    """It decides by the mean of the groups' squared norms, and so open or shut for all."""
    session = _session('ae_sam', sam__lambda1=0.3, sam__lambda2=0.3, **PLAIN)
    state = _host(session.start())
    opened = []
    for step in range(6):
        replicas = _replicas(session, step)
        groups = [
            _gradient(session, state.params, state.batch_stats, part)
            for part in (replicas[:2], replicas[2:])
        ]
        square = np.mean([trees.lp_norm(g) ** 2 for g in groups])
        new = _step(session, state, step)
        gate = new.sharpness_state.memory.gate
        opened.append(int(new.sharpness_state.evaluations - state.sharpness_state.evaluations))
        previous = state.sharpness_state.memory.gate
        mean = square if step == 0 else 0.9 * previous.mean + 0.1 * square
        np.testing.assert_allclose(gate.mean, mean, rtol=1e-8)
        # At first both are the same, but for the rounding of this test's own sum.
        threshold = gate.mean + 0.3 * jnp.sqrt(gate.variance)
        assert opened[-1] == (square >= threshold * (1 - 1e-10))
        results = (
            groups
            if not opened[-1]
            else [
                _gradient(session, _climb(state.params, g), state.batch_stats, part)
                for g, part in zip(groups, (replicas[:2], replicas[2:]))
            ]
        )
        assert_trees_close(
            new.params, _move(state.params, _mean(results), -0.1), rtol=1e-7, atol=1e-10
        )
        state = new
    assert 0 < sum(opened) < 6


def test_adam():
    """m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2; w <- w - lr m' / (sqrt(v') + epsilon)."""
    settings = _session(
        'sgd',
        optimizer__name='adam',
        optimizer__nesterov=False,
        optimizer__decay=0.99,
        optimizer__clip_norm=0.0,
    ).config.optimizer
    tx = optimizers.create(settings, 0.1)
    w, m, v = np.array([1.0, -2.0]), 0.0, 0.0
    state = tx.init(jnp.asarray(w))
    for t in range(1, 4):
        g = w**3 + t
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        updates, state = tx.update(jnp.asarray(g), state, jnp.asarray(w))
        expected = -0.1 * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + settings.epsilon)
        np.testing.assert_allclose(updates, expected, rtol=1e-9)
        np.testing.assert_allclose(optimizers.momentum(settings, state), m, rtol=1e-9)
        w = w + np.asarray(updates)


@pytest.mark.parametrize('name', ['sgd', 'rmsprop', 'adam'])
def test_momentum_points_against_the_next_step(name):
    """Of every optimizer -v is where it goes, so that one sign serves all."""
    settings = _session('sgd', optimizer__name=name).config.optimizer
    tx = optimizers.create(settings, 0.1)
    w = jnp.array([1.0, -2.0])
    updates, state = tx.update(w, tx.init(w), w)
    v = optimizers.momentum(settings, state)
    assert (v * w > 0).all() and (updates * v < 0).all()


def test_feeds_come_with_the_one_before():
    """And do after a restart, so that SAMPa goes on exactly."""
    session = _session('sampa')
    experiment = types.SimpleNamespace(
        config=session.config,
        dataset=session.dataset,
        layout=session.layout,
        total_steps=6,
        host_memory=None,
    )
    whole, resumed = (
        list(jax.device_get(list(Experiment.feeds(experiment, first)))) for first in (0, 3)
    )
    assert len(whole) == 6 and len(resumed) == 3
    for feed, again in zip(whole[3:], resumed):
        jax.tree.map(np.testing.assert_array_equal, feed, again)
    previous = [{k: x for k, x in feed.items() if k != 'previous'} for feed in whole]
    for i, feed in enumerate(whole):
        jax.tree.map(np.testing.assert_array_equal, feed['previous'], previous[max(i - 1, 0)])
