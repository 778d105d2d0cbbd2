"""How a global batch is cut, what is refused, and which TPU devices are neighbours."""

import itertools
import os
import random
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import quick
from helpers import ROOT, UnderWay

from sam_jax import replicas
from sam_jax.errors import UserError


def _layout(batch_size, replica_batch_size, replicas_per_group, num_devices, loop='auto'):
    return replicas.make_layout(
        batch_size, replica_batch_size, replicas_per_group, loop, jax.devices()[:num_devices]
    )


def _pairs(*groups):
    return [list(range(start, stop)) for start, stop in groups]


# batch, replica, group, devices -> replicas a device, groups a device, devices a group, groups.
CUTS = [
    ((256, 32, 1, 8), (1, 1, 1, _pairs(*[(i, i + 1) for i in range(8)]))),
    ((256, 32, 2, 8), (1, 1, 2, _pairs((0, 2), (2, 4), (4, 6), (6, 8)))),
    ((256, 32, 4, 8), (1, 1, 4, _pairs((0, 4), (4, 8)))),
    ((256, 32, 8, 8), (1, 1, 8, None)),
    ((256, 32, 1, 4), (2, 2, 1, _pairs((0, 1), (1, 2), (2, 3), (3, 4)))),
    ((256, 32, 2, 4), (2, 1, 1, _pairs((0, 1), (1, 2), (2, 3), (3, 4)))),
    ((256, 32, 4, 4), (2, 1, 2, _pairs((0, 2), (2, 4)))),
    ((256, 32, 8, 4), (2, 1, 4, None)),
    ((256, 32, 1, 1), (8, 8, 1, None)),
    ((256, 32, 4, 1), (8, 2, 1, None)),
    ((256, 32, 8, 1), (8, 1, 1, None)),
    ((96, 8, 6, 2), (6, 1, 1, _pairs((0, 1), (1, 2)))),
    ((96, 8, 3, 2), (6, 2, 1, _pairs((0, 1), (1, 2)))),
    ((96, 8, 6, 4), (3, 1, 2, _pairs((0, 2), (2, 4)))),
    ((64, 64, 1, 1), (1, 1, 1, None)),
]


@pytest.mark.parametrize('given,expected', CUTS)
def test_cut(given, expected):
    layout, note = _layout(*given)
    assert note == ''
    assert layout.devices == tuple(jax.devices()[: given[3]])
    assert layout.num_replicas == given[0] // given[1]
    assert (layout.replica_batch_size, layout.replicas_per_group) == given[1:3]
    assert (
        layout.replicas_per_device,
        layout.groups_per_device,
        layout.devices_per_group,
        layout.axis_index_groups,
    ) == expected


def test_default_is_all_devices():
    assert replicas.make_layout(256, 32, 1)[0].devices == tuple(jax.devices())


def test_every_layout_holds_every_replica_once_and_no_group_is_torn():
    for num_replicas, group, n in itertools.product(range(1, 25), range(1, 25), range(1, 9)):
        try:
            layout, _ = _layout(num_replicas * 2, 2, group, n)
        except UserError:
            continue
        assert layout.replicas_per_device * len(layout.devices) == num_replicas
        owner = np.arange(num_replicas) // layout.replicas_per_device
        for members in owner.reshape(-1, group):
            together = set(members.tolist())
            if layout.devices_per_group == 1:
                assert len(together) == 1
                assert layout.groups_per_device * group == layout.replicas_per_device
            else:
                groups = layout.axis_index_groups or [list(range(len(layout.devices)))]
                assert sorted(together) in groups
                assert len(together) == layout.devices_per_group
                # A group that covers several devices covers them whole.
                assert layout.replicas_per_device * layout.devices_per_group == group


REFUSED = [
    ((100, 32, 1, 1), ['batch_size is 100', 'multiple of replica_batch_size, 32']),
    ((16, 32, 1, 1), ['batch_size is 16', 'multiple of replica_batch_size, 32']),
    (
        (256, 32, 3, 8),
        [
            'sam.replicas_per_group is 3',
            'must divide the 8 replicas',
            'batch_size 256',
            'replica_batch_size 32',
        ],
    ),
    ((256, 32, 16, 8), ['sam.replicas_per_group is 16', 'must divide the 8 replicas']),
    (
        (256, 32, 1, 3),
        [
            'The 8 replicas',
            'groups of 1',
            '3 devices',
            'batch_size 256',
            'replica_batch_size 32',
            'change',
        ],
    ),
    ((24, 2, 1, 8), ['The 12 replicas', '8 devices']),
    ((24, 2, 3, 6), ['The 12 replicas', 'groups of 3', '6 devices']),  # 2 a device: 3 tears one
    ((24, 2, 4, 4), ['The 12 replicas', 'groups of 4', '4 devices']),  # 3 a device
]


@pytest.mark.parametrize('given,words', REFUSED)
def test_refused(given, words):
    with pytest.raises(UserError) as e:
        _layout(*given)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert str(e.value).endswith('.') and '\n' not in str(e.value)


@pytest.mark.parametrize(
    'given,used',
    [
        ((64, 64, 1, 8), 1),
        ((64, 32, 2, 8), 2),
        ((10, 2, 1, 8), 5),
        ((12, 2, 3, 8), 6),
        ((14, 2, 7, 8), 7),
    ],
)
def test_fewer_replicas_than_devices(given, used):
    layout, note = _layout(*given)
    assert layout.devices == tuple(jax.devices()[:used])
    for part in (
        f'batch_size {given[0]}',
        f'{given[0] // given[1]} replicas of {given[1]}',
        f'for {given[3]} devices',
        f'{used} of them are used',
    ):
        assert part in note


def test_what_is_not_trained_takes_the_devices_that_fit():
    for of, used in (((64, 8, 1), 2), ((24, 2, 4), 3), ((64, 8, 8), 2)):
        layout, note = replicas.make_layout(*of, devices=jax.devices()[:3], to_train=False)
        assert layout.devices == tuple(jax.devices()[:used])
        assert bool(note) == (used < 3)


def test_fewer_replicas_than_devices_on_several_processes(monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(UserError, match='2 replicas of 32 for 8 devices.*replica_batch_size to 8 '):
        _layout(64, 32, 1, 8)
    assert _layout(64, 8, 1, 8)[1] == ''


@pytest.mark.parametrize('loop,unroll', [('auto', False), ('scan', False), ('unroll', True)])
def test_loop(loop, unroll):
    assert replicas.make_layout(8, 2, 1, loop, jax.devices()[:1])[0].unroll == unroll


def test_local_positions():
    layout, _ = _layout(16, 2, 1, 8)
    assert layout.local_positions == list(range(8))
    devices = [types.SimpleNamespace(platform='gpu', process_index=i % 2) for i in range(8)]
    assert replicas.make_layout(16, 2, 1, devices=devices)[0].local_positions == [0, 2, 4, 6]


def test_replicate_and_shard_place_rows_in_order():
    layout, _ = replicas.make_layout(16, 2, 1, devices=jax.devices()[::-1])
    rows = np.arange(16).reshape(8, 2)
    for x, expected in [
        (layout.shard({'a': rows})['a'], rows[:, None]),
        (layout.replicate({'a': rows})['a'], [rows] * 8),
    ]:
        data = {shard.device: np.asarray(shard.data) for shard in x.addressable_shards}
        for device, part in zip(layout.devices, expected):
            np.testing.assert_array_equal(data[device], part)


# Neighbours on a TPU's mesh.


def _tpu(x, y, z, cores=1, host=(0, 0, 0)):
    """Devices of a TPU in the order of its mesh: by z, y, x, core; a host has a box of chips."""

    def process(place):
        across = [-(-n // h) if h else 1 for n, h in zip((x, y, z), host)]
        box = [p // h if h else 0 for p, h in zip(place, host)]
        return (box[2] * across[1] + box[1]) * across[0] + box[0]

    return [
        types.SimpleNamespace(
            platform='tpu',
            process_index=process(p[2::-1]),
            id=i,
            coords=(p[2], p[1], p[0]),
            core_on_chip=p[3],
        )
        for i, p in enumerate(itertools.product(range(z), range(y), range(x), range(cores)))
    ]


def _box(devices):
    """Extents (core, x, y, z) of the smallest box around some devices."""
    places = np.array([(d.core_on_chip, *d.coords) for d in devices])
    return tuple((places.max(axis=0) - places.min(axis=0) + 1).tolist())


# Mesh (x, y, z, cores), size of a group -> extents (core, x, y, z) of a group, its axes sorted.
BOXES = [
    ((4, 4, 1, 2), 2, (2, 1, 1, 1)),
    ((4, 4, 1, 2), 4, (2, 1, 1, 2)),
    ((4, 4, 1, 2), 8, (2, 1, 2, 2)),
    ((4, 4, 1, 2), 16, (2, 1, 2, 4)),
    ((4, 4, 1, 2), 32, (2, 1, 4, 4)),
    ((2, 2, 1, 1), 2, (1, 1, 1, 2)),
    ((2, 2, 1, 1), 4, (1, 1, 2, 2)),
    ((4, 4, 4, 1), 2, (1, 1, 1, 2)),
    ((4, 4, 4, 1), 4, (1, 1, 2, 2)),
    ((4, 4, 4, 1), 8, (1, 2, 2, 2)),
    ((4, 4, 4, 1), 16, (1, 2, 2, 4)),
    ((4, 4, 4, 1), 32, (1, 2, 4, 4)),
    ((4, 4, 4, 1), 64, (1, 4, 4, 4)),
    ((8, 8, 1, 1), 4, (1, 1, 2, 2)),
    ((8, 8, 1, 1), 16, (1, 1, 4, 4)),
    ((8, 2, 1, 1), 4, (1, 1, 2, 2)),
    ((6, 4, 1, 1), 6, (1, 1, 2, 3)),
    ((6, 4, 1, 1), 12, (1, 1, 3, 4)),
    ((6, 6, 1, 1), 9, (1, 1, 3, 3)),
]


def _ordered(mesh, size, extents):
    """The devices of a mesh, given in some order, as neighbours: each group has these extents."""
    devices = _tpu(*mesh)
    random.Random(0).shuffle(devices)
    ordered = replicas.neighbour_order(devices, size)
    assert sorted(d.id for d in ordered) == list(range(len(devices)))
    for start in range(0, len(ordered), size):
        core, *sides = _box(ordered[start : start + size])
        assert (core, *sorted(sides)) == extents
    return ordered


@pytest.mark.parametrize('mesh,size,extents', BOXES)
def test_groups_are_compact_boxes(mesh, size, extents):
    ordered = _ordered(mesh, size, extents)
    # The order is that of the places, not of the list that came in.
    again = replicas.neighbour_order(_tpu(*mesh)[::-1], size)
    assert [d.id for d in again] == [d.id for d in ordered]


# Mesh, a host's chips, size of a group -> extents of a group.
HOSTS = [
    ((4, 4, 4, 2, (2, 2, 1)), 2, (2, 1, 1, 1)),
    ((4, 4, 4, 2, (2, 2, 1)), 4, (2, 1, 1, 2)),
    ((4, 4, 4, 2, (2, 2, 1)), 8, (2, 1, 2, 2)),
    ((4, 4, 4, 2, (2, 2, 1)), 16, (2, 2, 2, 2)),
    ((4, 4, 4, 2, (2, 2, 1)), 32, (2, 2, 2, 4)),
    ((4, 4, 4, 1, (2, 2, 1)), 2, (1, 1, 1, 2)),
    ((4, 4, 4, 1, (2, 2, 1)), 8, (1, 2, 2, 2)),
    ((8, 8, 1, 1, (4, 2, 1)), 4, (1, 1, 2, 2)),
    ((8, 8, 1, 1, (4, 2, 1)), 16, (1, 1, 4, 4)),
    ((8, 4, 1, 1, (2, 2, 1)), 2, (1, 1, 1, 2)),
]


@pytest.mark.parametrize('mesh,size,extents', HOSTS)
def test_groups_are_boxes_and_so_are_hosts(mesh, size, extents):
    """Both are runs: of devices that a process holds here and there JAX makes no pmap."""
    ordered = _ordered(mesh, size, extents)
    processes = [process for process, _ in itertools.groupby(d.process_index for d in ordered)]
    assert len(processes) == len(set(processes)) > 1


def test_the_mesh_may_start_anywhere():
    devices = _tpu(4, 4, 1, 2)
    shifted = [
        types.SimpleNamespace(**{**vars(d), 'coords': tuple(np.add(d.coords, (3, 5, 1)).tolist())})
        for d in devices
    ]
    assert [d.id for d in replicas.neighbour_order(shifted[::-1], 8)] == [
        d.id for d in replicas.neighbour_order(devices, 8)
    ]


def _without(devices, *names):
    return [
        types.SimpleNamespace(**{k: v for k, v in vars(d).items() if k not in names})
        for d in devices
    ]


KEPT = {
    'group of one': (_tpu(4, 4, 1), 1),
    'size that no box has': (_tpu(4, 4, 4), 3),
    'size that divides no sides': (_tpu(4, 4, 1), 12),
    'a hole in the mesh': (_tpu(4, 4, 1)[:-2], 2),
    'no coordinates': (_without(_tpu(4, 4, 1), 'coords', 'core_on_chip'), 4),
    'no box is made of hosts': (_tpu(6, 4, 1, 1, (3, 2, 1)), 4),
    'hosts are no boxes': (
        [
            types.SimpleNamespace(**{**vars(d), 'process_index': (0, 1, 1, 0)[i]})
            for i, d in enumerate(_tpu(2, 1, 2))
        ],
        2,
    ),
    'some without coordinates': (_tpu(2, 2, 1) + _without(_tpu(2, 2, 1), 'coords'), 4),
}


@pytest.mark.parametrize('case', KEPT)
def test_the_order_is_kept(case):
    devices, size = KEPT[case]
    random.Random(1).shuffle(devices)
    assert replicas.neighbour_order(devices, size) == devices


def test_cores_are_not_needed():
    devices = _without(_tpu(4, 4, 1), 'core_on_chip')
    assert [d.id for d in replicas.neighbour_order(devices, 4)[:4]] == [0, 1, 4, 5]


def test_real_cpu_devices_keep_their_order():
    assert replicas.neighbour_order(jax.devices()[::-1], 4) == jax.devices()[::-1]


@pytest.mark.parametrize(
    'mesh,num_replicas,group,extents',
    [
        ((4, 4, 1, 2), 32, 8, (2, 1, 2, 2)),
        ((4, 4, 1, 2), 64, 8, (2, 1, 1, 2)),
        ((4, 4, 4, 1), 512, 64, (1, 2, 2, 2)),
        ((4, 4, 4, 1), 64, 4, (1, 1, 2, 2)),
    ],
)
def test_layout_groups_neighbours(mesh, num_replicas, group, extents):
    devices = _tpu(*mesh)
    random.Random(2).shuffle(devices)
    layout, _ = replicas.make_layout(2 * num_replicas, 2, group, devices=devices)
    assert layout.devices_per_group == np.prod(extents)
    for positions in layout.axis_index_groups:
        core, *sides = _box([layout.devices[i] for i in positions])
        assert (core, *sorted(sides)) == extents


def test_two_slices_keep_their_order():
    devices = _tpu(2, 2, 1) + _tpu(2, 2, 1)  # a slice has coordinates of its own
    assert replicas.neighbour_order(devices, 2) == devices


def test_the_host_does_not_run_far_ahead_and_results_keep_their_order():
    counts = {'now': 0, 'most': 0}
    all_results = []

    def dispatched():
        for i in range(50):
            all_results.append((UnderWay(counts), np.array(i)))
            yield all_results[-1]

    assert list(replicas.paced(dispatched())) == all_results
    assert counts == {'now': replicas.IN_FLIGHT, 'most': replicas.IN_FLIGHT + 1}


# XLA's CPU client waits for itself if more than 32 programs that exchange anything are under way.
MANY_BATCHES = """
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from sam_jax import evaluate, replicas

layout, _ = replicas.make_layout(4, 1, 1, devices=jax.devices())
slow = lambda x: lax.fori_loop(0, 20, lambda _, y: jnp.tanh(y @ x), x)
step = layout.map(
    lambda params, stats, arrays, feed: lax.psum(
        {'loss': jnp.sum(slow(params)) * feed, 'count': jnp.ones(())}, replicas.AXIS
    ),
    in_axes=(None, None, None, 0),
)
params = layout.replicate(np.eye(200, dtype=np.float32))
feeds = [np.full(4, i, np.float32) for i in range(100)]
print(evaluate.evaluate(step, params, {}, {}, feeds, layout)['loss'])
"""


def test_an_evaluation_of_many_batches_ends():
    result = subprocess.run(
        [sys.executable, '-c', MANY_BATCHES],
        cwd=ROOT,
        env={**os.environ, 'XLA_FLAGS': quick.flags(devices=4)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    value = 1.0
    for _ in range(20):
        value = np.tanh(value)
    np.testing.assert_allclose(float(result.stdout), 200 * value * 49.5, rtol=1e-5)
