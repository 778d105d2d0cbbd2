"""What a method promises as a link: to be the method, or to say what is missing; and its edges."""

import dataclasses
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import ROOT
from numpy.linalg import norm
from quadratics import RHO, ball_step, flat, layers, make, quadratic, update

from sam_jax import schedules, sharpness
from sam_jax.sharpness import ascent, mask

# WSAM in a plain chain.


def _clip(g, most):
    return g * min(1.0, most / norm(g)) if most else g


@pytest.mark.parametrize('max_norm', [None, 1.5])
def test_wsam_in_a_plain_chain_is_its_authors_step(max_norm, x64):
    """Both gradients clipped, the base optimizer's step with the first, then -lr a (g_p - g)."""
    params, grad_fn, a = quadratic(np.float64)
    gamma, lr = 0.9, 0.05
    tx = optax.chain(sharpness.wsam(RHO, gamma, max_norm=max_norm), optax.sgd(lr))
    state, w = tx.init(params), flat(params)
    for _ in range(5):
        g = a @ w
        g_p = _clip(a @ (w + RHO * g / norm(g)), max_norm)
        g = _clip(g, max_norm)
        w = w - lr * g - lr * gamma / (1 - gamma) * (g_p - g)
        updates, state = update(tx, grad_fn, params, state)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(flat(params), w, rtol=1e-10)


def test_wsam_past_a_clipped_optimizer_with_momentum(x64):
    """The correction is of clipped gradients: it cannot be longer than 2 a max_norm."""
    params, grad_fn, a = quadratic(np.float64)
    gamma, lr, most = 0.8, 0.05, 1.5
    method = sharpness.wsam(RHO, gamma, max_norm=most)
    descent = optax.chain(optax.clip_by_global_norm(most), optax.sgd(lr, momentum=0.9))
    state, opt_state, w, v = method.init(params), descent.init(params), flat(params), 0.0
    for _ in range(4):
        g = a @ w
        g_p = _clip(a @ (w + RHO * g / norm(g)), most)
        g = _clip(g, most)
        v = 0.9 * v + g
        w = w - lr * v - lr * gamma / (1 - gamma) * (g_p - g)
        grads, state = update(method, grad_fn, params, state, corrected=True)
        updates, opt_state = descent.update(grads, opt_state, params)
        params = optax.apply_updates(params, sharpness.add_correction(updates, state, lr))
        np.testing.assert_allclose(flat(params), w, rtol=1e-10)


def test_corrections_in_masked_and_several(x64):
    """Wherever a state holds one, and only for its own part of the params."""
    params, grad_fn, a = quadratic(np.float64)
    lr = 0.1

    def wsam(gamma):
        return sharpness.wsam(RHO, gamma)

    txs = {
        'masked': optax.masked(wsam(0.5), {'a': True, 'b': False}),
        'several': optax.multi_transform(
            {'one': wsam(0.5), 'two': wsam(0.75)}, {'a': 'one', 'b': 'two'}
        ),
    }
    w, g = flat(params), a @ flat(params)
    for name, tx in txs.items():
        grads, state = tx.update(
            grad_fn(params),
            tx.init(params),
            params,
            corrected=True,
            grad_fn=sharpness.fill_masked(grad_fn, params),
        )
        total = flat(sharpness.add_correction(jax.tree.map(lambda u: -lr * u, grads), state, lr))
        expected = -lr * g
        for part, weight in ((slice(0, 6), 1.0), (slice(6, 11), 3.0 if name == 'several' else 0)):
            eps = np.zeros_like(w)
            eps[part] = RHO * g[part] / norm(g[part])
            expected[part] -= lr * weight * (a @ (w + eps) - g)[part]
        np.testing.assert_allclose(total, expected, rtol=1e-10)


def test_fill_masked_of_a_loss(x64):
    params, loss, _ = layers(np.float64)
    which = {'dense': True, 'norm': False}
    tx = optax.masked(sharpness.frob_sam(RHO), which)
    evaluate = sharpness.from_loss_fn(loss)
    given = dict(key=jax.random.key(0))
    with pytest.raises(TypeError, match='or the same of loss'):
        tx.update(jax.grad(loss)(params), tx.init(params), params, loss=evaluate, **given)
    updates, _ = tx.update(
        jax.grad(loss)(params),
        tx.init(params),
        params,
        loss=sharpness.fill_masked(evaluate, params),
        **given,
    )
    part = {'dense': params['dense']}
    alone, _ = sharpness.frob_sam(RHO).update(
        None,
        sharpness.frob_sam(RHO).init(part),
        part,
        key=given['key'],
        loss=sharpness.from_loss_fn(lambda p: loss({**params, **p})),
    )
    np.testing.assert_allclose(flat(updates['dense']), flat(alone['dense']), rtol=1e-10)
    np.testing.assert_array_equal(flat(updates['norm']), flat(jax.grad(loss)(params)['norm']))


# Two methods of few lines.


def test_le_sam(x64):
    """The radius is sigma / |g|, and at most rho."""
    params, grad_fn, a = quadratic(np.float64)
    w = flat(params)
    g = a @ w
    for sigma in (1e-3, 0.5 * RHO * norm(g), 2 * RHO * norm(g)):
        radius = min(sigma / norm(g), RHO)
        updates, state = update(sharpness.le_sam(RHO, sigma), grad_fn, params)
        np.testing.assert_allclose(flat(updates), a @ (w + radius * g / norm(g)), rtol=1e-10)
        np.testing.assert_allclose(state.perturbation_norm, radius, rtol=1e-10)


def _network(params):
    return jnp.tanh(X @ params['w']) @ params['v']


X = np.random.RandomState(0).randn(6, 3)
Y = np.random.RandomState(1).randn(6)
NET = {'w': np.random.RandomState(2).randn(3, 4), 'v': np.random.RandomState(3).randn(4)}


def _functional(outputs, loss, params):
    tx = sharpness.functional_sam(RHO)
    return tx.update(None, tx.init(params), params, loss=sharpness.from_network(outputs, loss))[0]


def test_functional_sam_is_the_jacobian_there_and_the_derivative_here(x64):
    params = jax.tree.map(jnp.asarray, NET)
    w, unravel = jax.flatten_util.ravel_pytree(params)

    def of_outputs(z):
        return jnp.sum((z - Y) ** 4)

    g = flat(jax.grad(lambda p: of_outputs(_network(p)))(params))
    jacobian = jax.jacobian(lambda w: _network(unravel(w)))(w + RHO * g / norm(g))
    expected = jacobian.T @ jax.grad(of_outputs)(_network(params))
    np.testing.assert_allclose(
        flat(_functional(_network, of_outputs, params)), expected, rtol=1e-10
    )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_functional_sam_in_a_chain(dtype):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), NET)

    def outputs(p):
        return jnp.tanh(X.astype(dtype) @ p['w']) @ p['v']

    def loss(z):
        return jnp.sum(z**4)

    tx = optax.chain(sharpness.functional_sam(RHO), optax.scale(-0.1))
    grads = jax.grad(lambda p: loss(outputs(p)))(params)
    updates, _ = tx.update(
        grads, tx.init(params), params, loss=sharpness.from_network(outputs, loss)
    )
    np.testing.assert_allclose(
        np.float32(flat(updates)),
        -0.1 * np.float32(flat(_functional(outputs, loss, params))),
        rtol=1e-2,
    )


def test_functional_sam_of_a_linear_loss_is_sam_and_of_a_linear_network_the_base(x64):
    params = jax.tree.map(jnp.asarray, NET)

    def linear_loss(z):
        return jnp.sum(z * Y)

    sam, _ = update(sharpness.sam(RHO), jax.grad(lambda p: linear_loss(_network(p))), params)
    np.testing.assert_allclose(
        flat(_functional(_network, linear_loss, params)), flat(sam), rtol=1e-10
    )

    def linear_network(p):
        return X @ p['w'] @ jnp.ones(4)

    def loss(z):
        return jnp.sum((z - Y) ** 4)

    grads = jax.grad(lambda p: loss(linear_network(p)))(params)
    np.testing.assert_allclose(
        flat(_functional(linear_network, loss, params)), flat(grads), rtol=1e-10
    )


# Names of params in other frameworks.


class _Nnx(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.norm = nnx.LayerNorm(2, rngs=nnx.Rngs(0))


def _nnx():
    return nnx.state(_Nnx(), nnx.Param)


@functools.partial(jax.tree_util.register_dataclass, data_fields=['weight', 'bias'], meta_fields=[])
@dataclasses.dataclass
class _Layer:
    """As equinox has its layers."""

    weight: jax.Array
    bias: jax.Array


FRAMEWORKS = {
    'linen': lambda: {
        'dense': {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)},
        'norm': {'scale': jnp.ones(2), 'bias': jnp.ones(2)},
    },
    'nnx': _nnx,
    'equinox': lambda: {
        'dense': _Layer(jnp.ones((2, 3)), jnp.ones(2)),
        'norm': _Layer(jnp.ones(2), jnp.ones(2)),
    },
    'haiku': lambda: {
        'net/~/linear': {'w': jnp.ones((3, 2)), 'b': jnp.ones(2)},
        'net/~/norm': {'scale': jnp.ones(2), 'offset': jnp.ones(2)},
    },
}


def _marked(tree):
    """Paths of the leaves that are not 0."""
    return [
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
        if np.any(x)
    ]


@pytest.mark.parametrize('framework', FRAMEWORKS)
def test_masks_know_the_names_of_every_framework(framework):
    params = FRAMEWORKS[framework]()
    adapted = ascent.adaptive_metric(1.0, 'weights')(
        None, jax.tree.map(lambda x: 2.0 * jnp.ones_like(x), params)
    )
    biases = _marked(jax.tree.map(lambda x: x == 1, adapted))
    assert all('bias' in path or "['b']" in path for path in biases)
    assert len(biases) == (1 if framework == 'haiku' else 2)
    normalised = _marked(mask.normalization(params))
    assert len(normalised) == 2 and all('norm' in path for path in normalised)


# Numbers at the edge.


@pytest.mark.parametrize('wide', [False, True])
@pytest.mark.parametrize('size', [0.0, 1e-36, 1e-20, 1e19, 1e37])
def test_sam_of_tiny_and_huge_gradients_in_float32(size, wide):
    """Also where float64 is on; of a zero gradient zero."""
    with jax.enable_x64(wide):
        _assert_sam_at(size)


def _assert_sam_at(size):
    params, grad_fn, a = quadratic()

    def scaled(tree):
        return jax.tree.map(lambda g: np.float32(size) * g, grad_fn(tree))

    updates, state = update(sharpness.sam(RHO), scaled, params)
    if not size:
        assert not flat(updates).any() and state.perturbation_norm == 0
        return
    w = flat(params)
    expected = a @ (w + ball_step(a @ w, RHO))
    np.testing.assert_allclose(flat(updates) / np.float32(size), expected, rtol=1e-4)
    np.testing.assert_allclose(state.perturbation_norm, RHO, rtol=1e-5)


def test_schedules_divide_in_float64(x64):
    value = schedules.create('cosine', 0.1, 6)(jnp.int32(1))
    assert value == 0.1 * 0.5 * (1 + np.cos(np.pi / 6)) == 0.09330127018922195
    warm = schedules.create('constant', 0.1, 30, warmup_steps=3)(jnp.int32(1))
    np.testing.assert_allclose(warm, 0.1 / 3, rtol=1e-15)


def test_gated_methods_in_company():
    """A traced gate in `multi_transform`, behind `MultiSteps`, and under vmap."""
    params, grad_fn, _ = quadratic()
    gated = sharpness.looksam(RHO, k=2)
    txs = [
        optax.multi_transform({'x': gated, 'y': sharpness.rst(RHO)}, {'a': 'x', 'b': 'y'}),
        optax.MultiSteps(optax.chain(gated, optax.sgd(0.1)), 2),
    ]
    for tx in txs:
        state = tx.init(params)
        for t in range(4):
            updates, state = jax.jit(
                functools.partial(
                    tx.update,
                    grad_fn=sharpness.fill_masked(grad_fn, params),
                    gate_key=jax.random.key(t),
                )
            )(grad_fn(params), state, params)
            assert np.isfinite(flat(updates)).all()
    rows = jax.vmap(
        lambda count: gated.update(
            grad_fn(params), gated.init(params)._replace(count=count), params, grad_fn=grad_fn
        )[0]
    )(jnp.arange(2, dtype=jnp.int32))
    climbed, _ = update(sharpness.sam(RHO), grad_fn, params)
    for row, expected in enumerate((climbed, grad_fn(params))):
        np.testing.assert_allclose(
            flat(jax.tree.map(lambda x, row=row: x[row], rows)), flat(expected), rtol=1e-5
        )


def test_settings_that_are_traced():
    params, grad_fn, _ = quadratic()
    tx = optax.inject_hyperparams(sharpness.sparse_sam, static_args='period')(
        rho=RHO, sparsity=0.6, period=1
    )
    plain = sharpness.sparse_sam(RHO, 0.6, 1)
    state, other = tx.init(params), plain.init(params)
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            updates, state = jax.jit(functools.partial(update, tx, grad_fn))(params, state)
        expected, other = update(plain, grad_fn, params, other)
        np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-5)


@pytest.mark.parametrize(
    'name',
    [
        'ae_sam',
        'ae_looksam',
        'vasso',
        'friendly_sam',
        'looksam',
        'extrapolated',
        'sparse_sam',
        'bsam',
    ],
)
def test_a_bad_step_does_not_spoil_those_to_come(name):
    """A NaN is handed on, to be seen; the memory stays what it was, and so the next is finite."""
    params, loss, _ = layers()
    tx = make(name, rho=RHO)
    given = dict(grad_fn=jax.grad(loss), key=jax.random.key(0))
    _, before = tx.update(jax.grad(loss)(params), tx.init(params), params, **given)

    def bad(tree):
        return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tree)

    updates, state = tx.update(bad(params), before, params, **{**given, 'grad_fn': bad})
    assert np.isnan(flat(updates)).any()
    for kept, was in zip(jax.tree.leaves(state.memory), jax.tree.leaves(before.memory)):
        np.testing.assert_array_equal(kept, was)
    assert np.isfinite(flat(tx.update(jax.grad(loss)(params), state, params, **given)[0])).all()


def test_a_bad_correction_is_handed_on():
    """Of its own step alone: that of the step before must not be applied again."""
    params, loss, _ = layers()
    tx = sharpness.wsam(RHO)

    def bad(tree):
        return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tree)

    _, state = tx.update(
        jax.grad(loss)(params), tx.init(params), params, grad_fn=jax.grad(loss), corrected=True
    )
    grads, state = tx.update(jax.grad(loss)(params), state, params, grad_fn=bad, corrected=True)
    assert np.isfinite(flat(grads)).all()
    assert np.isnan(flat(sharpness.add_correction(grads, state, 0.1))).all()


def test_where_apply_if_finite_belongs():
    """Around a chain it sees the clean gradient alone; behind the method what the method made."""
    params, loss, _ = layers()

    def bad(tree):
        return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tree)

    chain = optax.chain(sharpness.sam(RHO), optax.apply_if_finite(optax.sgd(0.1), 5))
    updates, state = chain.update(jax.grad(loss)(params), chain.init(params), params, grad_fn=bad)
    assert not flat(updates).any() and optax.tree.get(state, 'total_notfinite') == 1
    assert 'apply_if_finite' in sharpness.sam.__doc__


def test_erm_compiles_to_the_program_of_plain_sgd():
    params, loss, _ = layers()

    def program(*links):
        tx = optax.chain(*links, optax.sgd(0.1, momentum=0.9))

        def step(params, trace):
            state = optax.tree.set(tx.init(params), trace=trace)
            updates, state = tx.update(
                jax.grad(loss)(params), state, params, grad_fn=jax.grad(loss)
            )
            return optax.apply_updates(params, updates), optax.tree.get(state, 'trace')

        text = jax.jit(step).lower(params, params).compile().as_text()
        computations = text[re.search('^(%|ENTRY)', text, re.MULTILINE).start() :]
        return re.sub(r'metadata=\{[^}]*\}|\d+', '', computations)

    assert program(sharpness.erm()) == program()
    assert program(sharpness.sam(RHO)) != program()


# One place for a method.


def _run_python_of(page, capsys):
    """Runs a page's Python blocks one after the other; returns their names and what they print."""
    names = {}
    exec('\n'.join(re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(), re.DOTALL)), names)
    return names, capsys.readouterr().out.splitlines()


def test_readme_s_python_runs(capsys):
    """The drop-in trains, a published network predicts."""
    names, (printed,) = _run_python_of('README.md', capsys)
    assert float(printed) < 1e-3
    assert names['probabilities'].shape == (1, 10)


def test_the_guide_s_python_runs(capsys):
    """The drop-in of README, linen, nnx; a method written by hand is SAM; an experiment trains."""
    readme, guide = ((ROOT / page).read_text() for page in ('README.md', 'docs/howto/loop.md'))
    assert re.search(r'```python\n(.*?)```', readme, re.DOTALL)[1] in guide
    names, printed = _run_python_of('docs/howto/loop.md', capsys)
    assert float(printed[0]) < 1e-3 and 'test/error_rate' in printed[1]
    x, y = names['x'], names['y']
    out = names['net'].apply(
        {'params': names['params'], 'batch_stats': names['batch_stats']}, x, train=False
    )
    assert float(jnp.mean((out - y) ** 2)) < 0.1 * float(jnp.var(y))
    model = nnx.merge(names['graph'], names['nnx_params'], names['rest'])
    model.eval()
    assert float(jnp.mean((model(x) - y) ** 2)) < 0.1 * float(jnp.var(y))
    params, grad_fn, _ = quadratic()
    ours, by_hand = (
        tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]
        for tx in (optax.chain(sharpness.sam(0.05), optax.sgd(0.1)), names['by_hand'])
    )
    np.testing.assert_allclose(flat(ours), flat(by_hand), rtol=1e-6)


def test_the_site_shows_the_table_of_all_methods():
    """docs/generate.py puts it in the place of the comment."""
    assert '<!-- sharpness.table() -->' in (ROOT / 'docs' / 'methods' / 'index.md').read_text()
    assert all(f'| `{name}` |' in sharpness.table() for name in sharpness.METHODS)


@pytest.mark.parametrize('name', sharpness.METHODS)
def test_an_entry_says_what_the_constructor_takes(name):
    entry = sharpness.METHODS[name]
    doc = entry.make.__doc__
    own = sharpness.options(name)
    assert all(re.search(rf'\b{option}\b', doc) for option in own), name
    assert entry.norm in ('rho', 'at most rho', 'of its own', '') and entry.gives
    assert bool(entry.norm) == ('rho' in sharpness.takes(name))


def test_a_new_method_is_an_entry():
    """A function and its entry are all that config, checks and tests need."""
    from configs import digits
    from sam_jax import settings
    from sam_jax.sharpness import combine, registry

    try:

        @registry.enter('half of both', 2)
        def halfway(rho, weight=0.5):
            return sharpness.sharpness_aware(ascent.lp_ball(rho), combine.lerp(weight))

        config = digits.get_config('method=halfway')
        assert config.sam.weight == 0.5
        settings.check(config)
    finally:
        registry.METHODS.pop('halfway', None)
