"""Losses, metrics, schedules, optimizers and random numbers, against the original's numbers."""

import functools
import itertools
import pathlib
import re

import helpers
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from configs import common
from sam_jax import losses, metrics, optimizers, rngs, schedules, settings
from sam_jax.errors import UserError

pytestmark = pytest.mark.accelerator

LOSSES, OPTIM, SCHEDULES = map(helpers.golden, ('losses', 'optim', 'schedules'))
LOGITS = {'logits': LOSSES['logits'], 'tied': LOSSES['tied_logits'], 'huge': 1e4 * LOSSES['logits']}
LABELS = {'onehot': LOSSES['labels'], 'soft': LOSSES['soft_labels']}
MASKS = {
    'none': np.ones(16, np.float32),
    'ones': LOSSES['mask_ones'],
    'third': LOSSES['mask_third'],
    'zero': LOSSES['mask_zero'],
}

on_golden_batches = pytest.mark.parametrize(
    'labels, logits, mask', list(itertools.product(LABELS, LOGITS, MASKS))
)


def masked_mean(values, mask):
    sums = metrics.masked_sums({'value': values}, mask)
    return sums['value'] / max(sums['count'], 1)


# Losses


@pytest.mark.parametrize('smoothing', [0, 0.1, 0.3])
@on_golden_batches
def test_cross_entropy_is_the_original_s(labels, logits, mask, smoothing):
    values = losses.cross_entropy(LOGITS[logits], LABELS[labels], smoothing)
    np.testing.assert_allclose(
        masked_mean(values, MASKS[mask]),
        LOSSES[f'cross_entropy_ls{smoothing}/{labels}/{logits}/{mask}'],
        rtol=2e-6,
    )


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_cross_entropy_by_definition(smoothing, x64):
    """-sum_c ((1 - a) y_c + a / C) log p_c, and integers mean the same as one-hot rows."""
    logits, onehot, soft = (x.astype(np.float64) for x in (LOGITS['logits'], *LABELS.values()))
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for y in (soft, onehot):
        expected = -(((1 - smoothing) * y + smoothing / 10) * log_p).sum(axis=1)
        values = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(y), smoothing)
        np.testing.assert_allclose(values, expected, rtol=1e-12)
        assert values.dtype == np.float64
    helpers.assert_trees_equal(
        values, losses.cross_entropy(jnp.asarray(logits), onehot.argmax(axis=1), smoothing)
    )


def test_sigmoid_cross_entropy_by_definition(x64):
    """A yes or no for each class, of which labels are the probabilities."""
    logits, onehot, soft = (x.astype(np.float64) for x in (LOGITS['logits'], *LABELS.values()))
    p = 1 / (1 + np.exp(-logits))
    for smoothing, y in itertools.product((0.0, 0.1), (soft, onehot)):
        target = (1 - smoothing) * y + smoothing / 10
        expected = -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(axis=1)
        values = losses.sigmoid_cross_entropy(jnp.asarray(logits), jnp.asarray(y), smoothing)
        np.testing.assert_allclose(values, expected, rtol=1e-10)
    wrong_by_far = losses.sigmoid_cross_entropy(jnp.full((1, 3), -500.0), jnp.array([1]))
    np.testing.assert_allclose(wrong_by_far, [500.0])


def test_the_loss_of_a_config():
    logits, labels = jnp.asarray(LOGITS['logits']), LABELS['soft']
    config = helpers.small_config(loss='sigmoid', label_smoothing=0.1)
    np.testing.assert_array_equal(
        losses.of_config(config)(logits, labels), losses.sigmoid_cross_entropy(logits, labels, 0.1)
    )
    config.loss = 'hinge'
    with pytest.raises(UserError, match=r"loss is 'hinge'; .* softmax, sigmoid"):
        settings.check(config)


def test_cross_entropy_of_bfloat16_logits_is_float32():
    half = jnp.asarray(LOGITS['logits'], jnp.bfloat16)
    values = losses.cross_entropy(half, LABELS['onehot'])
    assert values.dtype == np.float32
    helpers.assert_trees_equal(
        values, losses.cross_entropy(half.astype(jnp.float32), LABELS['onehot'])
    )


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_non_finite_logits_are_seen(value):
    """The original made them a loss of 0. Other examples, and masked sums, stay as they are."""
    logits = LOGITS['logits'].copy()
    logits[3, 7] = value
    values = losses.cross_entropy(logits, LABELS['soft'])
    assert np.isfinite(values).tolist() == [i != 3 for i in range(16)]
    mask = np.arange(16) != 3
    assert np.isfinite(masked_mean(values, mask))
    assert not np.isfinite(masked_mean(values, ~mask))


def test_l2_penalty():
    rng = np.random.RandomState(0)
    params = {
        'conv': {'kernel': rng.randn(3, 3, 2, 2), 'bias': rng.randn(2)},
        'bn': {'scale': rng.randn(2)},
        'head': rng.randn(2, 5),
        'temperature': rng.randn(),
    }
    kernels = sum(np.sum(w**2) for w in (params['conv']['kernel'], params['head']))
    everything = sum(np.sum(w**2) for w in jax.tree.leaves(params))
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    for wanted, options in [
        (everything, {}),
        (everything, {'decay_norm_and_bias': True}),
        (kernels, {'decay_norm_and_bias': False}),
    ]:
        penalty = functools.partial(losses.l2_penalty, weight_decay=0.3, **options)
        np.testing.assert_allclose(penalty(params), 0.15 * wanted, rtol=1e-6)
        for w, g in zip(*map(jax.tree.leaves, (params, jax.grad(penalty)(params))), strict=True):
            kept = wanted is everything or w.ndim > 1
            np.testing.assert_allclose(g, 0.3 * w * kept, rtol=1e-6)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    assert losses.l2_penalty(half, 0.3).dtype == np.float32


# Metrics


@on_golden_batches
def test_top1_error_is_the_original_s(labels, logits, mask):
    values = metrics.top1_error(LOGITS[logits], LABELS[labels])
    np.testing.assert_allclose(
        masked_mean(values, MASKS[mask]), LOSSES[f'error_rate/{labels}/{logits}/{mask}'], rtol=1e-6
    )


@pytest.mark.parametrize('k', [1, 2, 3, 5, 10])
@pytest.mark.parametrize('logits', ['logits', 'tied'])
def test_topk_error_by_definition(logits, k):
    """An example is right if fewer than k other classes score at least as high as its own."""
    logits, truth = LOGITS[logits], LABELS['soft'].argmax(axis=1)
    expected = [
        float(sum(row[c] >= row[t] for c in range(10) if c != t) >= k)
        for row, t in zip(logits, truth, strict=True)
    ]
    for labels in (truth, LABELS['soft'], np.eye(10, dtype=np.float32)[truth]):
        assert metrics.topk_error(logits, labels, k).tolist() == expected
    mask = MASKS['third']
    np.testing.assert_allclose(
        masked_mean(metrics.topk_error(logits, truth, k), mask),
        np.mean(np.array(expected)[mask == 1]),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    'row, label, top1, top2',
    [
        ([3, 2, 1, 0], 0, 0, 0),
        ([3, 2, 1, 0], 1, 1, 0),
        ([3, 2, 1, 0], 2, 1, 1),
        ([3, 3, 1, 0], 0, 0, 0),  # top-1: the first of equals is the guess
        ([3, 3, 1, 0], 1, 1, 0),
        ([3, 3, 3, 0], 0, 0, 1),  # top-k: equals count against the model
        ([0, 0, 0, 0], 3, 1, 1),
        ([3, 2, 1, np.nan], 0, 1, 0),  # one NaN takes one of the two guesses
        ([np.nan, 2, 1, 0], 0, 1, 1),
        ([np.nan] * 4, 0, 1, 1),
    ],
)
def test_ties_and_nan(row, label, top1, top2):
    logits, label = jnp.asarray([row], jnp.float32), jnp.asarray([label])
    assert metrics.top1_error(logits, label).tolist() == [top1]
    assert metrics.topk_error(logits, label, k=2).tolist() == [top2]


def test_integer_labels_equal_one_hot_labels():
    for labels in LABELS.values():
        for error in (metrics.top1_error, metrics.topk_error):
            helpers.assert_trees_equal(
                error(LOGITS['logits'], labels), error(LOGITS['logits'], labels.argmax(axis=1))
            )


def test_masked_sums_ignore_what_is_masked():
    values = {'a': np.array([1.0, np.nan, 3.0, np.inf]), 'b': np.arange(4.0)}
    sums = metrics.masked_sums(values, np.array([1, 0, 1, 0]))
    assert jax.device_get(sums) == {'a': 4.0, 'b': 2.0, 'count': 2}


# Schedules


def golden_schedule(name, i):
    epochs, base, examples, batch = SCHEDULES[f'{name}/{i}/args_epochs_lr_obs_batch']
    total = int(epochs) * int(examples // batch)
    return base, total, SCHEDULES[f'{name}/{i}/steps'], SCHEDULES[f'{name}/{i}/lr']


@pytest.mark.parametrize('i', range(5))
@pytest.mark.parametrize('name', ['cosine', 'exponential'])
def test_schedule_is_the_original_s(name, i):
    """Wherever that is finite and within the run."""
    base, total, steps, expected = golden_schedule(name, i)
    steps, expected = (x[(steps <= total) & np.isfinite(expected)] for x in (steps, expected))
    schedule = schedules.create(name, base, total)
    assert total in steps and len(steps) >= 6
    np.testing.assert_allclose(schedule(steps), expected, rtol=2e-5, atol=1e-7 * base)
    np.testing.assert_allclose([schedule(int(s)) for s in steps], expected, rtol=2e-5, atol=1e-7)
    jitted = jax.jit(lambda step, base: schedules.create(name, base, total)(step))
    np.testing.assert_allclose(
        [jitted(s, base) for s in steps], expected, rtol=2e-5, atol=1e-7 * base
    )


@pytest.mark.parametrize(
    'name, middle, end',
    [('constant', 1.0, 1.0), ('cosine', 0.5, 0.0), ('exponential', 0.012**0.5, 0.012)],
)
def test_schedule_values(name, middle, end):
    schedule = schedules.create(name, 0.3, 100)
    np.testing.assert_allclose(
        [schedule(s) for s in (0, 50, 100)], np.multiply(0.3, [1, middle, end]), atol=1e-7
    )
    if name == 'cosine':  # the original goes up again
        np.testing.assert_allclose(schedule(150), 0, atol=1e-7)


@pytest.mark.parametrize('name', schedules.SCHEDULES)
def test_warm_up_is_linear_and_multiplies(name):
    steps = np.arange(0, 101)
    plain, warm = (
        np.array([schedules.create(name, 0.3, 100, warmup_steps=w)(s) for s in steps])
        for w in (0, 8)
    )
    np.testing.assert_allclose(warm, plain * np.minimum(steps / 8, 1), rtol=1e-6)
    np.testing.assert_allclose([warm[0], plain[0]], [0, 0.3], rtol=1e-6)


# Optimizers


def descend(grads, learning_rate, w=None, **settings):
    """Params after each of the gradients, with the settings of config.optimizer changed."""
    settings = ml_collections.ConfigDict({**common.get_config().optimizer, **settings})
    w = jnp.asarray(OPTIM['w0'] if w is None else w)

    def step(carry, g):
        w, state = carry
        updates, state = optimizers.create(settings, learning_rate).update(g, state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    init = optimizers.create(settings, learning_rate).init(w)
    return jax.lax.scan(step, (w, init), jnp.asarray(grads))[1]


@pytest.mark.parametrize('run', ['train_defaults_lr0.01', 'plain', 'test'])
def test_rmsprop_is_the_original_s(run):
    lr, momentum, decay, epsilon = OPTIM[f'rmsprop/{run}/args_lr_beta_beta2_eps'].tolist()
    trajectory = descend(
        OPTIM['grads'],
        lr,
        name='rmsprop',
        momentum=momentum,
        decay=decay,
        epsilon=epsilon,
        nesterov=False,
        clip_norm=0.0,
    )
    np.testing.assert_allclose(trajectory, OPTIM[f'rmsprop/{run}/w'], rtol=2e-5, atol=1e-6)


def test_nesterov_sgd_is_the_original_s():
    trajectory = descend(OPTIM['grads'], 0.1, momentum=0.9, nesterov=True, clip_norm=0.0)
    np.testing.assert_allclose(trajectory, OPTIM['sgd_nesterov0.9_lr0.1/w'], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_by_hand(nesterov):
    w, m, expected = OPTIM['w0'], 0.0, []
    for g in OPTIM['grads']:
        m = g + 0.7 * m
        w = w - 0.2 * (g + 0.7 * m if nesterov else m)
        expected.append(w)
    trajectory = descend(OPTIM['grads'], 0.2, momentum=0.7, nesterov=nesterov, clip_norm=0.0)
    np.testing.assert_allclose(trajectory, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('clip', [0, 1, 5, 100])
def test_clipping_is_the_original_s(clip):
    g = OPTIM['grads'][2]
    steps = -descend(g[None], 1.0, w=0 * g, momentum=0.0, nesterov=False, clip_norm=float(clip))
    np.testing.assert_allclose(steps[0], OPTIM[f'clip_by_global_norm/{clip}'], rtol=1e-6)
    zeros = descend(0 * g[None], 1.0, w=0 * g, momentum=0.0, clip_norm=float(clip))
    helpers.assert_trees_equal(zeros[0], 0 * g)


def test_clipping_comes_before_momentum():
    g = OPTIM['grads'][[2, 2]]
    unit = g[0] / np.linalg.norm(g[0])
    steps = descend(g, 1.0, w=0 * g[0], momentum=0.9, nesterov=False, clip_norm=1.0)
    np.testing.assert_allclose(steps, [-unit, -(1 + 1.9) * unit], rtol=1e-5)


def moving_average(start, values, steps, decay, warmup):
    """Averages after each of the values. A tree, jitted, with everything but the tree traced."""
    update = jax.jit(optimizers.ema_update)
    average, averages = {'w': start}, []
    for value, step in zip(values, steps, strict=True):
        average = update(average, {'w': value}, step, decay, warmup)
        averages.append(average['w'])
    return averages


@pytest.mark.parametrize('run', ['d0.9_w0', 'd0.9999_w3', 'd0.2_w3', 'd1_w0'])
def test_moving_average_is_the_original_s(run):
    decay, warmup = OPTIM[f'ema/{run}/args_decay_warmup']
    averages = moving_average(OPTIM['w0'], OPTIM['grads'], np.arange(1, 11), decay, int(warmup))
    np.testing.assert_allclose(averages, OPTIM[f'ema/{run}/values'], rtol=1e-5, atol=1e-6)


def test_moving_average_at_the_edge_of_its_warm_up():
    """The original is NaN ten steps before (delta -10), where ours is finite; equal elsewhere."""
    for delta in (-11, -10, -9, -1, 0, 1):
        (average,) = moving_average(OPTIM['w0'], OPTIM['grads'][:1], [1560 + delta], 0.9999, 1560)
        expected = OPTIM['grads'][0] if delta == -10 else OPTIM[f'ema_edge/delta{delta}']
        np.testing.assert_allclose(average, expected, rtol=1e-6)
    steps = OPTIM['ema_seq/steps']
    averages = moving_average(
        OPTIM['w0'], [OPTIM['grads'][s % 10] for s in steps], steps, 0.9999, 1560
    )
    np.testing.assert_allclose(averages, OPTIM['ema_seq/values'], rtol=1e-5)


# Random numbers


def purposes():
    """Every purpose that the package draws for, as written in its source."""
    found = set()
    for file in (helpers.ROOT / 'sam_jax').rglob('*.py'):
        found |= set(re.findall(r"rngs\.\w+\(\s*[\w.]+,\s*'(\w+)'", pathlib.Path(file).read_text()))
    return sorted(found)


def test_no_two_purposes_seeds_or_ids_share_a_key():
    names = purposes()
    assert {'init', 'augment', 'dropout', 'shake', 'order'} <= set(names)
    ids = [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]
    keys = {
        tuple(jax.random.key_data(rngs.key(seed, name, *i)).tolist())
        for seed in (0, 1, 2)
        for name in names
        for i in ids
    }
    assert len(keys) == 3 * len(names) * len(ids)


def test_key_of_traced_ids():
    """Inside a compiled step as outside of it."""
    helpers.assert_trees_equal(
        jax.jit(lambda seed, i: jax.random.key_data(rngs.key(seed, 'augment', i)))(5, 7),
        jax.random.key_data(rngs.key(5, 'augment', 7)),
    )


def test_permutation_is_one_and_depends_on_everything():
    calls = [
        (0, 'order', 1),
        (1, 'order', 1),
        (0, 'noisy_examples', 1),
        (0, 'order', 2),
        (0, 'order', 1, 1),
    ]
    drawn = [rngs.permutation(seed, name, 997, *ids) for seed, name, *ids in calls]
    for permutation in drawn:
        assert sorted(permutation) == list(range(997))
        assert permutation.dtype == np.int32
    assert len({tuple(p) for p in drawn}) == len(calls)
    helpers.assert_trees_equal(drawn[0], rngs.permutation(0, 'order', 997, 1))


def test_integers_are_uniform_and_depend_on_everything():
    calls = [(0, 'noisy_labels'), (1, 'noisy_labels'), (0, 'order'), (0, 'noisy_labels', 1)]
    drawn = [rngs.integers(seed, name, 10000, 7, *ids) for seed, name, *ids in calls]
    for values in drawn:
        counts = np.bincount(values, minlength=7)
        assert len(counts) == 7 and values.dtype == np.int32
        assert np.abs(counts - 10000 / 7).max() < 5 * np.sqrt(10000 / 7)
    assert len({tuple(v) for v in drawn}) == len(calls)


def test_pinned_values():
    """A change here changes every run: its data order, its noisy labels, its initial weights."""
    assert [
        x.tolist()
        for x in (
            rngs.permutation(0, 'order', 10, 0),
            rngs.permutation(3, 'order', 10, 2),
            rngs.integers(0, 'noisy_labels', 10, 10),
            jax.random.key_data(rngs.key(0, 'init')),
            jax.random.key_data(rngs.key(3, 'augment', 4, 5)),
            jax.random.randint(rngs.key(0, 'dropout', 1), (5,), 0, 100),
        )
    ] == [
        [0, 8, 1, 2, 3, 5, 6, 7, 4, 9],
        [0, 2, 3, 5, 9, 1, 7, 6, 8, 4],
        [4, 2, 1, 4, 1, 4, 2, 8, 7, 0],
        [3020537540, 2946840664],
        [3947130088, 3489781022],
        [7, 69, 86, 73, 71],
    ]
