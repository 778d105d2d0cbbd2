"""Checkpoints: what is saved is what is read, damage is seen, nothing else is lost."""

import functools
import json
import logging
import os
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_equal

from sam_jax import checkpoint
from sam_jax.checkpoint import Checkpoints
from sam_jax.errors import UserError


def _open(tmp_path, keep_steps=()):
    return Checkpoints(str(tmp_path / 'checkpoints'), keep_steps)


def _params(scale=1.0):
    rng = np.random.RandomState(0)
    return {
        'conv': {'kernel': scale * rng.standard_normal((3, 3, 2, 4)).astype(np.float32)},
        'head': {'bias': np.full(4, scale, np.float32)},
    }


def _state(scale=1.0):
    """NamedTuples, dataclass-like dicts, None, empty dicts, scalars, counters, odd values."""
    params = _params(scale)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1), optax.sgd(0.1, 0.9, True))
    return {
        'params': params,
        'opt_state': tx.init(params),
        'ema': None,
        'batch_stats': {},
        'step': np.int32(7),
        'seed': np.uint32(2**32 - 1),
        'flags': np.array([True, False]),
        'odd': np.array([np.nan, -0.0, np.inf, 1e-45, scale], np.float32),
        'tuple': (jnp.arange(3), [jnp.float32(scale)]),
    }


def _zeros(state):
    return jax.tree.map(lambda x: jnp.zeros_like(x), state)


def _assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def _weights(step):
    # Random, so that it does not compress and the file with the data is the largest.
    return np.random.RandomState(step).standard_normal((128, 128)).astype(np.float32)


def _save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, {'w': _weights(step)}, {'wall_time': step})
        checkpoints.wait()


TARGET = {'w': np.zeros((128, 128), np.float32)}


def test_round_trip(tmp_path):
    state, meta = _state(), {'config': {'sam.rho': 0.05, 'keep': [1, 2]}, 'wall_time': 1.5}
    checkpoints = _open(tmp_path)
    assert checkpoints.restore_newest(state) is None
    checkpoints.save(7, state, meta)
    checkpoints.close()
    again = _open(tmp_path)
    assert again.steps() == [7]
    step, restored, restored_meta = again.restore_newest(_zeros(state))
    assert step == 7
    _assert_same_bits(restored, state)
    assert type(restored['opt_state'][1][0]) is optax.ScaleByAdamState
    assert {k: restored_meta[k] for k in meta} == meta
    assert {k: again.read_meta(7)[k] for k in meta} == meta
    assert again.read_meta(8) is None
    again.close()


def test_round_trip_of_replicated_arrays(tmp_path):
    state = jax.device_put(
        {'w': jnp.arange(6.0).reshape(2, 3)},
        jax.NamedSharding(jax.make_mesh((8,), ('batch',)), jax.P()),
    )
    checkpoints = _open(tmp_path)
    checkpoints.save(1, state, {})
    _, restored, _ = checkpoints.restore_newest(state)
    checkpoints.close()
    assert_trees_equal(restored, state)


@pytest.mark.parametrize(
    'keep,left', [((), [5, 6]), ((2, 4), [2, 4, 5, 6]), ((1, 6), [1, 5, 6]), ((9,), [5, 6])]
)
def test_which_are_kept(tmp_path, keep, left):
    checkpoints = _open(tmp_path, keep)
    _save(checkpoints, *range(1, 7))
    assert checkpoints.steps() == left
    checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == left
    again = _open(tmp_path, keep)
    _save(again, 7)
    assert again.steps() == sorted({*left, 7} & {*keep, 6, 7})
    again.close()


def _files(step_dir):
    return sorted((p for p in step_dir.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def _truncate(step_dir):
    largest = _files(step_dir)[-1]
    assert largest.is_relative_to(step_dir / 'state')
    os.truncate(largest, largest.stat().st_size // 2)


def _flip_bytes(step_dir):
    largest = _files(step_dir)[-1]
    content = bytearray(largest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(255 - x for x in content[middle : middle + 8])
    largest.write_bytes(content)


def _lose_meta(step_dir):
    shutil.rmtree(step_dir / 'meta')


def _lose_state(step_dir):
    shutil.rmtree(step_dir / 'state')


def _empty(step_dir):
    shutil.rmtree(step_dir)
    step_dir.mkdir()


def _other_state(step_dir):
    """Whole files, but of another step: only the checksums can tell."""
    shutil.rmtree(step_dir / 'state')
    shutil.copytree(step_dir.parent / '1' / 'state', step_dir / 'state')


def _other_checksum(step_dir):
    (meta,) = (p for p in _files(step_dir / 'meta') if b'checksums' in p.read_bytes())
    content = json.loads(meta.read_text())
    content['checksums']['w'] ^= 1
    meta.write_text(json.dumps(content))


def _half_meta(step_dir):
    (meta,) = (p for p in _files(step_dir / 'meta') if b'checksums' in p.read_bytes())
    os.truncate(meta, meta.stat().st_size // 2)


DAMAGES = [
    _truncate,
    _flip_bytes,
    _lose_meta,
    _lose_state,
    _empty,
    _other_state,
    _other_checksum,
    _half_meta,
]


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(tmp_path, damage, caplog):
    checkpoints = _open(tmp_path)
    _save(checkpoints, 1, 2)
    checkpoints.close()
    damage(tmp_path / 'checkpoints' / '2')
    again = _open(tmp_path)
    with caplog.at_level(logging.ERROR, 'sam_jax'):
        step, restored, meta = again.restore_newest(TARGET)
    assert (step, meta['wall_time']) == (1, 1)
    np.testing.assert_array_equal(restored['w'], _weights(1))
    (record,) = (r for r in caplog.records if r.name.startswith('sam_jax'))
    assert record.getMessage().startswith('Checkpoint 2 is damaged')
    assert '\n' not in record.getMessage()
    assert again.steps() == [1]
    assert len(list((tmp_path / 'damaged').iterdir())) == 1
    assert not (tmp_path / 'checkpoints' / '2').exists()
    # The run goes on, and writes the step that was damaged again.
    _save(again, 2)
    assert again.steps() == [1, 2]
    step, restored, _ = again.restore_newest(TARGET)
    assert step == 2
    np.testing.assert_array_equal(restored['w'], _weights(2))
    again.close()


def test_who_only_reads_changes_nothing(tmp_path):
    """A run that still trains is neither cleaned up nor rid of what cannot be read."""
    checkpoints = _open(tmp_path)
    _save(checkpoints, 1, 2)
    checkpoints.close()
    _truncate(tmp_path / 'checkpoints' / '2')
    unfinished = tmp_path / 'checkpoints' / '3.orbax-checkpoint-tmp'
    unfinished.mkdir()
    before = sorted(tmp_path.rglob('*'))
    reader = Checkpoints(str(tmp_path / 'checkpoints'), read_only=True)
    assert reader.restore_newest(TARGET)[0] == 1
    np.testing.assert_array_equal(reader.restore(1, TARGET)[1]['w'], _weights(1))
    with pytest.raises(UserError, match='Checkpoint 2 .* is damaged'):
        reader.restore(2, TARGET)
    with pytest.raises(UserError, match='no checkpoint of step 5 .* those of 1, 2'):
        reader.restore(5, TARGET)
    reader.close()
    assert sorted(tmp_path.rglob('*')) == before


def test_several_damaged_checkpoints_are_set_aside(tmp_path):
    checkpoints = _open(tmp_path, keep_steps=[1])
    _save(checkpoints, 1, 2, 3)
    checkpoints.close()
    for step in (2, 3):
        _truncate(tmp_path / 'checkpoints' / str(step))
    again = _open(tmp_path, keep_steps=[1])
    assert again.restore_newest(TARGET)[0] == 1
    assert len(list((tmp_path / 'damaged').iterdir())) == 2
    _save(again, 2)  # damaged a second time: both are kept for whoever wants to look
    again.close()
    _truncate(tmp_path / 'checkpoints' / '2')
    last = _open(tmp_path, keep_steps=[1])
    assert last.restore_newest(TARGET)[0] == 1
    assert len(list((tmp_path / 'damaged').iterdir())) == 3
    last.close()


def test_all_damaged(tmp_path):
    checkpoints = _open(tmp_path)
    _save(checkpoints, 1, 2)
    checkpoints.close()
    for step in ('1', '2'):
        _flip_bytes(tmp_path / 'checkpoints' / step)
    again = _open(tmp_path)
    with pytest.raises(UserError) as e:
        again.restore_newest(TARGET)
    again.close()
    message = str(e.value)
    assert str(tmp_path / 'checkpoints') in message and 'steps 2, 1' in message
    assert 'damaged' in message and 'workdir' in message
    # Nothing is moved: whoever mends one of them finds it where it was.
    assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['1', '2']


@pytest.mark.parametrize(
    'error,reason',
    [
        (ValueError('First line.\nSecond line.'), 'First line.'),
        (KeyError(), 'KeyError'),
        (OSError('x' * 1000), 'x' * 200),
    ],
)
def test_the_reason_is_one_line(tmp_path, monkeypatch, caplog, error, reason):
    def read(step):
        raise error

    checkpoints = _open(tmp_path)
    _save(checkpoints, 1)
    monkeypatch.setattr(checkpoints, 'read', read)
    with pytest.raises(UserError), caplog.at_level(logging.ERROR, 'sam_jax'):
        checkpoints.restore_newest(TARGET)
    checkpoints.close()
    assert caplog.messages == [f'Checkpoint 1 is damaged and not used: {reason}']


@pytest.mark.parametrize(
    'change,words',
    [
        (
            lambda t: {
                **t,
                'conv': {'kernel': np.zeros((3, 3, 2, 8))},
                'head': {'bias': np.zeros(8)},
            },
            ['conv.kernel', '(3, 3, 2, 4)', '(3, 3, 2, 8)'],
        ),
        (lambda t: {**t, 'extra': np.zeros(2)}, ['it has no extra']),
        (lambda t: {'conv': t['conv']}, ['head.bias is not in this one']),
        (lambda t: {'conv': t['conv'], 'head': {'kernel': np.zeros(2)}}, ['it has no head.kernel']),
    ],
)
def test_a_checkpoint_of_another_model(tmp_path, change, words):
    checkpoints = _open(tmp_path)
    checkpoints.save(3, _params(), {})
    checkpoints.wait()
    with pytest.raises(UserError) as e:
        checkpoints.restore_newest(change(_params()))
    assert all(word in str(e.value) for word in ['Checkpoint 3', 'of another model', *words])
    # It is whole, and stays.
    assert checkpoints.restore_newest(_params())[0] == 3
    checkpoints.close()
    assert not (tmp_path / 'damaged').exists()


def test_a_checkpoint_of_before_a_metric_was_logged(tmp_path):
    """Its sum is unknown, and the rest as it was."""
    checkpoints, old = _open(tmp_path), {'w': np.ones(2), 'sums': {'loss': np.float32(3.0)}}
    checkpoints.save(3, old, {})
    checkpoints.wait()
    sums = {'loss': np.float32(0.0), 'error_rate': np.float32(0.0)}
    _, state, _ = checkpoints.restore_newest({'w': np.zeros(2), 'sums': sums})
    checkpoints.close()
    assert state['sums']['loss'] == 3 and state['sums']['error_rate'].dtype == np.float32
    assert np.isnan(state['sums']['error_rate']) and state['w'].sum() == 2


def test_a_step_that_overwrites_the_buffers_does_not_change_what_is_saved(tmp_path):
    n = 1 << 20
    step = jax.jit(lambda x: -x - 1, donate_argnums=0)
    x = jax.block_until_ready(jnp.arange(n, dtype=jnp.float32))
    checkpoints = _open(tmp_path)
    for i in range(1, 5):
        expected = np.array(x, copy=True)
        checkpoints.save(i, {'x': x}, {})
        for _ in range(3):
            x = step(x)
        jax.block_until_ready(x)
        _, restored, _ = checkpoints.restore_newest({'x': np.zeros(n)})
        np.testing.assert_array_equal(restored['x'], expected)
    checkpoints.close()


def test_save_copies_and_gives_the_buffers_back(tmp_path):
    """The arrays handed to orbax share no memory with the device's, nor hold it."""
    checkpoints = _open(tmp_path)
    handed = {}
    checkpoints._manager.save = lambda step, args: handed.update(args.state.item)
    x = jnp.arange(1000, dtype=jnp.float32)
    place = x.unsafe_buffer_pointer()
    checkpoints.save(1, {'x': x, 'host': np.ones(3)}, {})
    assert handed['x'].ctypes.data != place
    y = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert x.is_deleted()
    np.testing.assert_array_equal(handed['x'], np.arange(1000))
    np.testing.assert_array_equal(y, np.arange(1000) + 1)
    checkpoints.close()


def test_an_unfinished_save_is_no_checkpoint(tmp_path):
    checkpoints = _open(tmp_path)
    _save(checkpoints, 1)
    checkpoints.close()
    # What a process killed during a save leaves.
    place = tmp_path / 'checkpoints'
    shutil.copytree(place / '1', place / '2.orbax-checkpoint-tmp-123')
    again = _open(tmp_path)
    assert again.steps() == [1]
    assert again.restore_newest(TARGET)[0] == 1
    again.close()


def test_names_are_paths_of_the_tree():
    names = list(checkpoint._flatten({'a': {'b': 1}, 'c': (2, [3]), 'd': None})[0])
    assert names == ['a.b', 'c.0', 'c.1.0']


def test_what_is_left_out_is_not_compared(tmp_path):
    """A method's memory of images, whose shape is that of the data it was trained on."""
    memory = {'epoch': np.zeros((2, 50), np.int32)}
    with _open(tmp_path) as checkpoints:
        checkpoints.save(3, {'params': _params(), 'memory': memory}, {})
        target = {'params': _zeros(_params()), 'memory': None}
        for restored in (
            checkpoints.restore(3, target, ('memory.',)),
            checkpoints.restore_newest(target, ('memory.',)),
        ):
            assert_trees_equal(restored[1], {'params': _params(), 'memory': None})
        with pytest.raises(UserError, match='memory.epoch is not in this one'):
            checkpoints.restore(3, target)


def test_want_of_memory_is_no_damage(tmp_path, monkeypatch):
    with _open(tmp_path) as checkpoints:
        checkpoints.save(3, _params(), {})
        checkpoints.wait()
        read = mock.Mock(side_effect=MemoryError())
        monkeypatch.setattr(checkpoints, 'read', read)
        for restore in (checkpoints.restore_newest, functools.partial(checkpoints.restore, 3)):
            with pytest.raises(MemoryError):
                restore(_params())
