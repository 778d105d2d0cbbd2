"""Programs for hardware that is not there: how they are read, and, with libtpu, what is in them.

The latter by ./scripts/test_targets.sh
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT, small_config

from sam_jax import replicas
from sam_jax.errors import UserError
from sam_jax.targets import facts, hardware, hlo, programs

PROGRAM = """HloModule step, is_scheduled=true

%fused_computation (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %copy.9 = f32[8,4]{0,1} copy(%p)
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  ROOT %copy.3 = f32[8,4]{0,1} copy(%t), backend_config={"estimated_cycles":"7"}
}

ENTRY %main (a: u8[5000,32,32,3]) -> f32[8,4] {
  %a = u8[5000,32,32,3]{3,2,1,0:T(8,128)(4,1)} parameter(0)
  %copy.1 = u8[5000,32,32,3]{2,1,3,0:T(8,128)(4,1)S(1)} copy(%a), metadata={op_name="args[3]"}, backend_config={"window_config":{"estimated_cycles":"646908"}}
  %copy-start = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%b)
  %fusion.1 = f32[8,4]{1,0:T(8,128)} fusion(%copy.1), kind=kLoop, calls=%fused_computation, metadata={op_name="jit(_fun)/shard_map/jvp(Net)/Net._conv/conv1/conv_general_dilated"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %all-reduce.1 = (f32[64]{0:T(128)S(1)}, /*index=1*/f32[3,3]{1,0}) all-reduce(%fusion.1), channel_id=1, replica_groups={{0,1},{2,3}}, use_global_device_ids=true
  %all-reduce.2 = f32[4]{0} all-reduce(%fusion.1), channel_id=2, replica_groups=[1,4]<=[4], use_global_device_ids=true
  %recv-done = f32[4]{0} recv-done(%recv), channel_id=3
  ROOT %transpose.1 = bf16[8,4]{0,1} transpose(%fusion.1), dimensions={1,0}
}
"""


def test_a_program_is_read():
    program = hlo.instructions(PROGRAM)
    by_name = {i.name: i for i in program}
    # What is within a fusion is no instruction of its own; a loop's body is.
    assert 'copy.9' not in by_name and by_name['copy.3'].computation == 'body'
    assert by_name['copy.1'].bytes == 5000 * 32 * 32 * 3
    assert by_name['copy.1'].cycles == 646908 and by_name['copy.1'].op_name == 'args[3]'
    assert by_name['all-reduce.1'].bytes == 4 * (64 + 9)
    assert by_name['transpose.1'].bytes == 2 * 32
    assert [i.name for i in hlo.large_copies(program, 2**20)] == ['copy.1']
    assert [i.name for i in hlo.large_copies(program, 64)] == ['copy.3', 'copy.1', 'transpose.1']
    assert [hlo.groups(i) for i in hlo.collectives(program)] == [[[0, 1], [2, 3]], '[1,4]<=[4]']
    assert [i.name for i in hlo.host_transfers(program)] == ['recv-done']
    assert hlo.cycles_by_layer(program) == [
        ('args[3]', 646908),
        ('jvp(Net)/conv1', 100),
        ('without a name', 7),
    ]


@pytest.mark.parametrize(
    'shape,size',
    [('f32[]', 4), ('pred[3]', 3), ('bf16[2,2]{1,0}', 8), ('s4[10]', 5), ('(u8[7], f64[2])', 23)],
)
def test_sizes(shape, size):
    assert hlo.size(shape) == size


def test_facts_of_a_program_for_devices_that_are_here():
    """Four of them: the gradients of SAM are exchanged, nothing goes to the host."""
    devices = jax.devices()[:4]
    target = hardware.Target('here', tuple(devices), hardware.Chip(1e12, 1e11, 2**30, 1e9), 1)
    experiment = programs.experiment_for(small_config(replica_batch_size=16), devices)
    found = facts.of_program(programs.lower_train_step(experiment), target)
    assert found['host_transfers'] == [] and found['flops'] > 1e8
    params = jax.tree.leaves(jax.eval_shape(experiment.create_state).params)
    gradients = 4 * sum(x.size for x in params)
    assert gradients < sum(c['bytes'] for c in found['collectives']) < 1.1 * gradients
    assert found['roofline_seconds'] == max(found['flops'] / 1e12, found['bytes'] / 1e11)
    assert found['memory']['all'] > found['memory']['arguments'] > gradients
    shown = dict(facts.rows(found, 64, target))
    assert shown['transfers to the host'] == 'none' and 'of 1 GiB' in shown['memory of a device']
    evaluated = facts.of_program(programs.lower_eval_step(experiment), target)
    assert evaluated['flops'] > 1e8


@pytest.mark.parametrize('name', ['', 'tpu', 'tpu:v5e', 'tpu:v9:2x2', 'gpu:h99:8', 'tpu:v5e:2by2'])
def test_other_targets_get_a_sentence(name):
    with pytest.raises(UserError, match=f"--target is '{name}'; it must be"):
        hardware.target(name)


# With libtpu.


SMALL = (
    '--config=cifar:smoke',
    '--config.data.name=fake_cifar10',
    '--config.batch_size=32',
    '--config.replica_batch_size=8',
)


def _compiled(tmp_path, target, *flags):
    out = tmp_path / 'facts.json'
    ended = subprocess.run(
        [
            sys.executable,
            '-m',
            'sam_jax.cli.compile',
            f'--target={target}',
            f'--json={out}',
            *flags,
        ],
        cwd=ROOT,
        env={**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(out.read_text())


@pytest.mark.targets
def test_a_step_on_a_tpu_copies_no_dataset_and_exchanges_once(tmp_path):
    """fake_cifar10 is 15 MB on each device; 4 replicas, each on a device with its own ascent."""
    found = _compiled(tmp_path, 'tpu:v5e:2x2', *SMALL)
    for step in ('train', 'eval'):
        assert found[step]['copies'] == [] and found[step]['host_transfers'] == []
        assert len(found[step]['collectives']) == 1
    (exchange,) = found['train']['collectives']
    assert exchange['opcode'] == 'all-reduce' and exchange['groups'] == [[0, 1, 2, 3]]
    assert found['train']['compiler_cycles'] > found['eval']['compiler_cycles'] > 0


@pytest.mark.targets
def test_a_slice_of_several_hosts(tmp_path):
    found = _compiled(tmp_path, 'tpu:v5e:2x4', *SMALL, '--config.batch_size=64', '--steps=eval')
    assert found['eval']['collectives'][0]['groups'] == [list(range(8))]


def _all_reduces(lowered):
    """The groups of each all-reduce of a lowered program, arrays of positions."""

    def within(operation):
        if operation.name == 'stablehlo.all_reduce':
            yield np.array(operation.attributes['replica_groups'])
        for region in operation.regions:
            for block in region:
                for inner in block:
                    yield from within(inner.operation)

    return list(within(lowered.compiler_ir('stablehlo').operation))


@pytest.mark.targets
@pytest.mark.parametrize('backend', replicas.BACKENDS)
@pytest.mark.parametrize(
    'size,box',  # of two cores a chip, and chips by x, y, z
    [(2, (2, 1, 1, 1)), (4, (2, 1, 2, 1)), (8, (2, 2, 2, 1)), (16, (2, 2, 2, 2))],
)
def test_groups_are_blocks_of_the_torus(size, box, backend):
    """128 devices of 16 hosts: a group's all-reduce stays among neighbours, and within a host."""
    devices = hardware.target('tpu:v4:4x4x4').devices
    config = small_config(
        batch_size=8 * len(devices),
        replica_batch_size=8,
        sam__replicas_per_group=size,
        replica_backend=backend,
    )
    experiment = programs.experiment_for(config, devices)
    ordered = experiment.layout.devices
    places = np.array([(d.core_on_chip, *d.coords) for d in ordered])
    hosts = np.array([d.process_index for d in ordered])
    found = [g for g in _all_reduces(programs.lower_train_step(experiment)) if g.shape[1] == size]
    assert found
    for groups in found:
        assert sorted(groups.ravel()) == list(range(len(devices)))
        for group in groups:
            sides = np.ptp(places[group], axis=0) + 1
            assert sorted(sides) == sorted(box) and np.prod(sides) == size
            assert len(set(hosts[group])) == max(size // 8, 1)


@pytest.mark.targets
def test_a_group_of_a_compiled_step_exchanges_one_gradient(tmp_path):
    """SAM on a v4 slice, groups of 8 devices: one all-reduce of theirs, and one of all."""
    found = _compiled(
        tmp_path,
        'tpu:v4:4x4x4',
        '--config=digits',
        '--config.batch_size=1024',
        '--config.replica_batch_size=8',
        '--config.sam.replicas_per_group=8',
        '--steps=train',
    )
    group, everyone = found['train']['collectives']
    assert group['groups'] == np.arange(128).reshape(16, 8).tolist()
    assert everyone['groups'] == [list(range(128))]
    assert everyone['bytes'] == pytest.approx(group['bytes'], rel=1e-3)
