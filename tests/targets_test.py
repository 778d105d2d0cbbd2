"""Programs for hardware that is not there: how they are read, and, with libtpu, what is in them.

The latter by ./scripts/test_targets.sh
"""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, small_config

from sam_jax import data, memory, replicas, train
from sam_jax.errors import UserError
from sam_jax.metrics import LOGGED
from sam_jax.targets import absent, facts, hardware, hlo, measured, operations, programs

PROGRAM = """HloModule step, is_scheduled=true

%fused_computation (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %gather.2 = f32[128,2]{1,0:T(8,128)} gather(%p, %i), offset_dims={1}, collapsed_slice_dims={0}, slice_sizes={1,2}
  %gather.3 = f32[128]{0} gather(%p, %j), collapsed_slice_dims={0,1}, slice_sizes={1,1}
  ROOT %copy.9 = f32[8,4]{0,1} copy(%p)
}

%fused_slice (q: u8[5000,3072], i: s32[]) -> u8[8,3072] {
  %q = u8[5000,3072]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %slice.9 = u8[8,3072]{1,0} dynamic-slice(%q, %i), dynamic_slice_sizes={8,3072}
}

%fused_update (r: f32[100,8,4], s: f32[1,8,4], j: s32[]) -> f32[100,8,4] {
  %r = f32[100,8,4]{2,1,0} parameter(0)
  %s = f32[1,8,4]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %update.9 = f32[100,8,4]{2,1,0} dynamic-update-slice(%r, %s, %j, %j, %j)
}

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.9 = f32[] add(%x, %y)
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  ROOT %copy.3 = f32[8,4]{0,1} copy(%t), backend_config={"estimated_cycles":"7"}
}

%condition (t2: (s32[], f32[8,4])) -> pred[] {
  %t2 = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(5), metadata={op_name="jit(_fun)"}
  ROOT %lt = pred[] compare(%t2, %limit), direction=LT
}

ENTRY %main (a: u8[5000,3072]) -> f32[8,4] {
  %a = u8[5000,3072]{1,0:T(8,128)(4,1)} parameter(0)
  %copy.1 = u8[5000,3072]{0,1:T(8,128)(4,1)S(1)} copy(%a), metadata={op_name="args[3]"}, backend_config={"window_config":{"estimated_cycles":"646908"}}
  %copy-start = (f32[8,4]{1,0}, f32[8,4]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%b)
  %slice-start = ((f32[80,4]{1,0}), f32[8,4]{1,0:S(1)}, u32[]{:S(2)}) slice-start(%b), slice={[0:8], [0:4]}
  %fusion.1 = f32[8,4]{1,0:T(8,128)} fusion(%copy.1), kind=kLoop, calls=%fused_computation, metadata={op_name="jit(_fun)/shard_map/jvp(Net)/Net._conv/conv1/conv_general_dilated"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %slice.1 = u8[8,3072]{1,0} fusion(%a, %n), kind=kLoop, calls=%fused_slice
  %update.1 = f32[100,8,4]{2,1,0} fusion(%u, %fusion.1, %n), kind=kLoop, calls=%fused_update
  %while.1 = (s32[], f32[8,4]{1,0:T(8,128)}) while(%tuple), condition=%condition, body=%body
  %while.2 = (s32[], f32[8,4]{1,0}) while(%tuple), condition=%unknown, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %all-reduce.1 = (f32[64]{0:T(128)S(1)}, /*index=1*/f32[3,3]{1,0}) all-reduce(%fusion.1), channel_id=1, replica_groups={{0,1},{2,3}}, use_global_device_ids=true, to_apply=%sum
  %all-reduce.2 = f32[4]{0} all-reduce(%fusion.1), channel_id=2, replica_groups=[1,4]<=[4], use_global_device_ids=true, to_apply=%sum
  %recv-done = f32[4]{0} recv-done(%recv), channel_id=3
  ROOT %transpose.1 = bf16[8,4]{0,1} transpose(%fusion.1), dimensions={1,0}
}
"""


@pytest.mark.parametrize(
    'text,groups',
    [
        ('{{0,2},{1,3}}, to_apply=%sum', [[0, 2], [1, 3]]),
        ('[2,2]<=[4], to_apply=%sum', [[0, 1], [2, 3]]),
        ("mesh['batch'=4] {'batch'}, use_global_device_ids=true", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}, to_apply=%sum", "mesh['a'=2,'b'=2] {'b'}"),
        ('[2,2]<=[2,2]T(1,0), to_apply=%sum', '[2,2]<=[2,2]T(1,0)'),
        ('{}, to_apply=%sum', '{}'),
    ],
)
def test_groups_of_all_versions(text, groups):
    line = f'ENTRY %m () -> f32[4] {{\n  %r = f32[4]{{0}} all-reduce(%x), replica_groups={text}\n}}'
    assert hlo.groups(hlo.instructions(line)[0]) == groups


def test_a_program_is_read():
    program = hlo.instructions(PROGRAM)
    by_name = {i.name: i for i in program}
    # What is within a fusion or a reduction is no instruction of its own; a loop's body is.
    assert {'copy.9', 'add.9'}.isdisjoint(by_name) and by_name['copy.3'].computation == 'body'
    assert by_name['copy.1'].bytes == 5000 * 3072
    assert by_name['copy.1'].cycles == 646908 and by_name['copy.1'].op_name == 'args[3]'
    assert by_name['all-reduce.1'].bytes == 4 * (64 + 9)
    assert by_name['transpose.1'].bytes == 2 * 32
    assert by_name['update.1'].inputs == ['u', 'fusion.1', 'n']
    assert [i.name for i in hlo.large_copies(program, 2**20)] == ['copy.1']
    assert [i.name for i in hlo.large_copies(program, 64)] == ['copy.1', 'transpose.1', 'copy.3']
    assert [hlo.groups(i) for i in hlo.collectives(program)] == [[[0, 1], [2, 3]], [[0, 1, 2, 3]]]
    assert [i.name for i in hlo.host_transfers(program)] == ['recv-done']
    assert hlo.gathers(PROGRAM) == [('gather.2', 2), ('gather.3', 1)]
    assert [i.name for i in hlo.loops(program)] == ['while.1', 'while.2']


def test_loops_count_with_their_turns():
    """Five that the condition says, four that the compiler says, of the same body."""
    program = hlo.instructions(PROGRAM)
    assert {i.name: i.times for i in program if i.times > 1} == {
        't': 9,
        'copy.3': 9,
        't2': 5,
        'limit': 5,
        'lt': 5,
    }
    assert [(name, cycles) for name, (cycles, _) in hlo.costly(program) if cycles] == [
        ('args[3]', 646908),
        ('jvp(Net)/conv1', 100),
        ('without a name', 63),
    ]
    # 2 copies at the start, 3 fusions, 2 reductions, copy.1, transpose.1; 9 copies, 5 comparisons.
    assert hlo.kernels(program) == 9 + 9 + 5


def test_what_only_logged_steps_do_does_not_count():
    text = """
%branch (x: f32[4]) -> f32[4] {
  ROOT %copy.1 = f32[4]{0} copy(%x)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  ROOT %c = f32[4]{0} conditional(%p, %a, %a), branch_computations={%branch, %branch}, metadata={op_name="jit(step)/SCOPE/cond"}
}
"""
    counted = hlo.instructions(text.replace('SCOPE', 'jvp(Net)'))
    assert [(i.name, i.times) for i in counted] == [('c', 1), ('copy.1', 2)]
    left = hlo.instructions(text.replace('SCOPE', LOGGED))
    assert [i.name for i in left] == ['c']


def test_bytes_are_those_of_main_memory():
    """S(1) is on the chip; of a slice the part counts, also within a fusion."""
    moved = {i.name: i.moved for i in hlo.instructions(PROGRAM)}
    array = 4 * 32
    assert moved['copy.1'] == 5000 * 3072
    assert moved['copy-start'] == moved['slice-start'] == moved['fusion.1'] == array
    assert moved['slice.1'] == 2 * 8 * 3072
    assert moved['update.1'] == 2 * array
    assert moved['all-reduce.1'] == array + 4 * 9
    assert moved['while.1'] == moved['recv-done'] == moved['a'] == 0
    assert hlo.bytes_moved(hlo.instructions(PROGRAM)) > 9 * moved['copy.3'] > 0


@pytest.mark.parametrize(
    'shape,size',
    [('f32[]', 4), ('pred[3]', 3), ('bf16[2,2]{1,0}', 8), ('s4[10]', 5), ('(u8[7], f64[2])', 23)],
)
def test_sizes(shape, size):
    assert hlo.size(shape) == size


@pytest.mark.parametrize(
    'shape,padded',
    [
        ('bf16[32,8,8,160]{3,0,2,1:T(8,128)(2,1)S(1)}', 2 * 32 * 8 * 8 * 256),
        ('bf16[32,8,8,160]{0,3,2,1:T(8,128)(2,1)}', 2 * 128 * 8 * 8 * 160),
        ('(f32[160]{0:T(256)}, f32[3,3,12,64]{3,2,1,0:T(8,128)})', 4 * (256 + 3 * 3 * 16 * 128)),
        ('f32[3,5]{1,0}', 60),
    ],
)
def test_padding_to_tiles(shape, padded):
    assert hlo.padded_size(shape) == padded
    result = hlo.Instruction('a', 'fusion', shape, '', '', 0, '')
    assert hlo.padding([result, result._replace(opcode='parameter')]) == padded / hlo.size(shape)


def _flops(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, 'float32') for shape in shapes]
    return operations.flops(jax.make_jaxpr(function)(*arrays))


def test_operations_of_products_and_loops():
    assert _flops(jnp.matmul, (2, 3), (3, 5)) == 2 * 2 * 3 * 5

    def powers(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=7)[0]

    assert _flops(powers, (3, 3)) == 7 * 2 * 27

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert _flops(either, (3, 3)) == 2 * 2 * 27


@pytest.mark.parametrize(
    'options,flops',
    [
        ({'padding': 'VALID'}, 2 * 8 * 4 * 6 * (6 * 3) ** 2),
        ({'padding': 'SAME'}, 2 * 8 * 4 * 6 * (8 * 3 - 2) ** 2),
        ({'padding': 'VALID', 'window_strides': (2, 2)}, 2 * 8 * 4 * 6 * (3 * 3) ** 2),
        ({'padding': 'VALID', 'rhs_dilation': (2, 2)}, 2 * 8 * 4 * 6 * (4 * 3) ** 2),
    ],
)
def test_operations_of_convolutions(options, flops):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            **{'window_strides': (1, 1), **options},
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )

    shapes = (4, 8, 8, 6), (3, 3, 6, 8)
    assert _flops(convolve, *shapes) == flops
    # Each of the two gradients meets the same pairs of pixel and weight.
    gradient = jax.grad(lambda x, w: convolve(x, w).sum(), argnums=(0, 1))
    assert _flops(gradient, *shapes) == 3 * flops


def test_operations_of_a_grouped_convolution():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=6
        )

    shapes = (4, 8, 8, 6), (3, 3, 1, 12)
    one = 2 * 12 * 4 * (6 * 3) ** 2
    assert _flops(convolve, *shapes) == one
    gradient = jax.grad(lambda x, w: convolve(x, w).sum(), argnums=(0, 1))
    assert _flops(gradient, *shapes) == 3 * one


CHIP = hardware.Chip(1e12, 5e11, 1e11, 2**30, 1e9)


def test_facts_of_a_program_for_devices_that_are_here():
    """Four of them: the gradients of SAM are exchanged, nothing goes to the host."""
    devices = jax.devices()[:4]
    target = hardware.Target('here', tuple(devices), CHIP, 1)
    experiment = programs.experiment_for(small_config(replica_batch_size=16), devices)
    found = facts.of_program(*_lowered(experiment, target))
    assert found['host_transfers'] == [] and found['flops'] > 1e8 and found['fits']
    params = jax.tree.leaves(jax.eval_shape(experiment.create_state).params)
    gradients = 4 * sum(x.size for x in params)
    assert gradients < sum(c['bytes'] for c in found['collectives']) < 1.1 * gradients
    assert found['roofline_seconds'] == max(found['flops'] / 5e11, found['bytes'] / 1e11)
    assert found['memory']['all'] > found['memory']['arguments'] > gradients
    shown = dict(facts.rows(found, 64, target))
    assert shown['transfers to the host'] == 'none' and 'of 1 GiB' in shown['memory of a device']
    assert set(shown) >= {'gathers, of single elements', 'loops', 'conditions'}
    evaluated = facts.of_program(*_lowered(experiment, target, 'eval'))
    assert found['flops'] / 20 < evaluated['flops'] * 500 / 512 / 8 < found['flops']


def _lowered(experiment, target, step='train'):
    program = programs.STEPS[step](experiment)
    return program.lowered, target, program.flops


def test_operations_do_not_depend_on_the_devices():
    def flops(devices, **settings):
        config = small_config(replica_batch_size=16, **settings)
        experiment = programs.experiment_for(config, jax.devices()[:devices])
        return devices * programs.train_step_of(experiment).flops

    # Plain SGD has one gradient, SAM two; four replicas are scanned on one device.
    assert flops(1) == flops(2) == flops(4) == 2 * flops(4, sam__method='sgd')


def test_a_program_that_the_compiler_refuses_is_told_of():
    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G '
                'hbm. Exceeded hbm capacity by 4.75G.'
            )

    target = hardware.Target('here', (), CHIP, 1)
    found = facts.of_program(Refused(), target, 1e12)
    assert not found['fits'] and found['memory'] == {'all': 20.5 * 2**30}
    shown = dict(facts.rows(found, 64, target))
    assert shown['fits'] == 'NO' and '20.5 of 1 GiB' in shown['memory of a device']


# Datasets that are not there.


@pytest.mark.parametrize('name', sorted(absent.SIZES))
def test_every_dataset_has_a_shape(name):
    """Without a byte of it: on this machine most of them are not. Of one's own they are read."""
    assert {*absent.SIZES} == {'folder', *data.NAMES} - {*data.OWN}.difference(['folder'])
    config = small_config(data__name=name, data__augment='none', replica_batch_size=32)
    if not absent.SIZES[name].shape:
        config.data.image_size = 64
    dataset = absent.load_dataset(config.data)
    assert dataset.num_train_examples == absent.SIZES[name].train
    assert len(dataset.evals['test']) == absent.SIZES[name].test
    assert dataset.num_classes == absent.CLASSES[name] > 1
    experiment = programs.experiment_for(config, jax.devices()[:2])
    feed = experiment.dataset.train_feed(0, 3, experiment.layout)
    assert feed['label'].shape == (2, 1, 32) and feed['label'].dtype == np.int32
    (evaluated, *_) = experiment.dataset.eval_feeds(dataset.evals['test'], 64, experiment.layout)
    assert evaluated['mask'].shape == (2, 32)
    if dataset.num_images:
        assert feed['index'].shape == (2, 1, 32)
        # Zeros that one byte stands for.
        assert not any(dataset.train.images.strides)
        assert not any(dataset.device_arrays(dataset.train)['images'].strides)
    else:
        assert feed['pixels'].shape == (2, 1, 32, 64, 64, 3) and not any(feed['pixels'].strides)
        assert evaluated['pixels'].shape == (2, 32, 64, 64, 3)


@pytest.mark.parametrize('name', ['digits', 'fake_cifar10'])
def test_the_shapes_are_those_of_the_datasets(name):
    settings = small_config(data__name=name, data__validation=True, data__label_noise=0.4).data
    real, shape = data.load_dataset(settings), absent.load_dataset(settings)
    assert shape.num_train_examples == real.num_train_examples
    assert shape.image_shape == real.image_shape and shape.num_images == real.num_images
    assert {'test', 'validation', 'train'} <= set(shape.evals)
    arrays = real.device_arrays(real.train)
    assert programs.shapes(shape.device_arrays(shape.train)) == programs.shapes(arrays)


def test_a_folder_that_is_named_is_looked_at(tmp_path):
    for place in ('train/a/1.png', 'train/b/1.png', 'test/a/1.png'):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(b'')
    config = small_config(data__name='folder', data__dir=str(tmp_path), data__augment='none')
    config.data.image_size = 64
    dataset = absent.load_dataset(config.data)
    assert dataset.num_classes == 2 and dataset.num_train_examples == 2


# Memory, before compilation.


def _needs(batch_size=32, **settings):
    config = small_config(batch_size=batch_size, replica_batch_size=32, **settings)
    return memory.needs(programs.experiment_for(config, jax.devices()[:1]))


def test_what_a_step_needs():
    sgd, sam = _needs(sam__method='sgd'), _needs()
    params = sgd.gradients
    assert sam.gradients == 2 * params
    assert (sam.data, sam.activations) == (sgd.data, sgd.activations)
    # Params and momentum, and little else.
    assert 2 * params < sam.state < 2.1 * params
    assert sam.data == 64 * (1297 + 500)
    assert sam.known == sam.state + params + sam.data
    # Four replicas: the sum of their gradients, and four times the images; one is kept at a time.
    scanned = _needs(batch_size=128)
    assert scanned.gradients == 3 * params
    assert scanned.activations - sam.activations == 3 * 4 * 32 * 64
    half, remat = _needs(model__dtype='bfloat16'), _needs(model__remat=True)
    assert 0.4 < half.activations / sam.activations < 0.8
    assert remat.activations < sam.activations


def test_what_is_kept_is_about_what_the_compiled_step_takes():
    devices = jax.devices()[:1]
    config = small_config(batch_size=128, replica_batch_size=128)
    experiment = programs.experiment_for(config, devices)
    target = hardware.Target('here', tuple(devices), CHIP, 1)
    found = facts.of_program(*_lowered(experiment, target))
    assert 0.5 < memory.needs(experiment).all / found['memory']['all'] < 2


class _Accelerator:
    """A device with so many free bytes; the rest is that of a CPU device."""

    platform, process_index = 'gpu', 0

    def __init__(self, free):
        self._free = free

    def memory_stats(self):
        return self._free and {'bytes_limit': self._free, 'bytes_in_use': 0}


def _check(free, **settings):
    config = small_config(**{'batch_size': 64, 'replica_batch_size': 32, **settings})
    experiment = programs.experiment_for(config, [_Accelerator(free)])
    memory.check(experiment)


def test_a_run_that_cannot_fit_is_refused_before_it_is_compiled():
    known = int(_needs(batch_size=64).known)
    with pytest.raises(UserError) as e:
        _check(known - 1)
    message = str(e.value)
    assert re.fullmatch(
        r'A step needs about \S+ GiB of a device \(state .*\), which has \S+; .*', message
    )
    for way in ('--config.model.remat=True', 'a replica_batch_size below 32', 'more devices'):
        assert way in message
    assert message.endswith(', or devices with more memory.')
    with pytest.raises(UserError) as e:
        _check(1, batch_size=1, replica_batch_size=1, model__remat=True)
    assert 'use devices with more memory.' in str(e.value)


def test_a_run_that_may_not_fit_is_warned_of(caplog):
    needed = _needs(batch_size=64)
    _check(int(needed.known) + 1)
    (record,) = caplog.records
    assert record.levelname == 'WARNING' and 'This is an estimate.' in record.getMessage()
    caplog.clear()
    _check(int(needed.all) + 1)
    _check(None)  # of an accelerator that does not tell its memory
    assert not caplog.records


def test_on_cpu_the_estimate_refuses_too(monkeypatch, caplog):
    """No compiler does, and the system ends what takes more than there is without a word."""
    config = small_config(batch_size=64, replica_batch_size=32)
    experiment = programs.experiment_for(config, jax.devices()[:2])
    needed = memory.needs(experiment)

    def check(free):
        monkeypatch.setattr(replicas, 'free_memory', lambda devices: (free, len(devices)))
        memory.check(experiment)

    with pytest.raises(UserError, match='use --config.model.remat=True, a replica_batch_size') as e:
        check(2 * needed.all / 1.8)
    assert 'more devices' not in str(e.value)
    check(2 * needed.all / 1.6)
    assert 'This is an estimate.' in caplog.text
    caplog.clear()
    check(2 * needed.all + 2)
    assert not caplog.records


def test_training_asks(tmp_path, monkeypatch):
    def refuse(experiment):
        raise UserError(f'{experiment.config.model.name} does not fit.')

    monkeypatch.setattr(memory, 'check', refuse)
    with pytest.raises(UserError, match='wrn10_1 does not fit'):
        train.train_and_evaluate(small_config(), str(tmp_path))


# The command.


@pytest.mark.slow
def test_the_command_on_this_machine(tmp_path):
    out = tmp_path / 'facts.md'
    flags = ('--steps=train', '--measure', f'--markdown={out}')
    found = _compiled(tmp_path, 'cpu:2', *SMALL, *flags)
    assert found['devices'] == 2 and found['train']['fits'] and 'eval' not in found
    assert found['estimate']['all'] > 0 and found['config']['batch_size'] == 32
    text = out.read_text()
    assert 'wrn10_1 on cpu:2' in text and '| fits | yes |' in text
    assert 'ESTIMATED images/s' not in text  # of a CPU no speed is known
    took = found['train']['measured_seconds']
    assert 1e-4 < took < 10 and f'| MEASURED images/s | {32 / took:,.0f} |' in text


def test_what_is_measured_is_a_step_on_random_images_and_labels():
    """Of a method, too, that asks for the batch before; images of zeros would not do."""
    config = small_config(data__name='fake_cifar10', sam__method='friendly_sam')
    experiment = programs.experiment_for(config, jax.devices()[:2])
    _, feed, arrays, _ = measured.arguments(experiment)
    pixels = np.asarray(arrays['images'][0])
    assert 110 < pixels.mean() < 145 and pixels.std() > 60
    assert 5 < len(np.unique(feed['label'])) <= 10
    soft = {'label': np.zeros((2, 3, 10), np.float32)}
    drawn = measured._random(np.random.default_rng(0), soft, 10)['label']
    assert (
        drawn.shape == (2, 3, 10)
        and (drawn.sum(-1) == 1).all()
        and np.unique(drawn.argmax(-1)).size > 1
    )


@pytest.mark.parametrize(
    'flags,sentence',
    [
        (['--steps=trian'], "--steps has 'trian'; the steps are train, eval."),
        (['--target=gpu:h100:1', '--measure'], "--target is 'gpu:h100:1'; it must be here or cpu"),
        (['--steps=', '--json=nowhere/f.json'], "--json is 'nowhere/f.json'; it cannot be written"),
    ],
)
def test_bad_flags_get_a_sentence(flags, sentence):
    ended = _command('--target=cpu:1', *SMALL, *flags)
    assert ended.returncode == 2 and sentence in ended.stderr
    assert 'Traceback' not in ended.stderr


def test_here_is_what_jax_finds_and_known_kinds_have_a_speed():
    here = hardware.target('here')
    assert here.devices == tuple(jax.local_devices()) and here.device.flops == 0
    assert hardware.known('NVIDIA H200') == hardware.GPUS['h200']
    assert 2 * hardware.known('TPU v3').flops == hardware.TPUS['v3'].flops  # a core of two
    assert hardware.known('cpu') is None


@pytest.mark.parametrize(
    'name', ['', 'tpu', 'tpu:v5e', 'tpu:v9:2x2', 'gpu:h99:8', 'tpu:v5e:2by2', 'cpu:many']
)
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
    ended = _command(f'--target={target}', f'--json={out}', *flags)
    assert ended.returncode == 0, ended.stderr
    return json.loads(out.read_text())


def _command(*flags):
    return subprocess.run(
        [sys.executable, '-m', 'sam_jax.cli.compile', *flags],
        cwd=ROOT,
        env={**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.targets
@pytest.mark.parametrize('target', ['tpu:v5e:2x2', 'gpu:h100:4'])
def test_a_step_copies_no_dataset_and_exchanges_once(tmp_path, target):
    """fake_cifar10 is 15 MB on each device; 4 replicas, each on a device with its own ascent."""
    found = _compiled(tmp_path, target, *SMALL)
    for step in ('train', 'eval'):
        assert found[step]['copies'] == [] and found[step]['host_transfers'] == []
        assert len(found[step]['collectives']) == 1
    (exchange,) = found['train']['collectives']
    assert exchange['opcode'].removesuffix('-start') == 'all-reduce'
    assert exchange['groups'] == [[0, 1, 2, 3]]
    assert found['train']['flops'] > found['eval']['flops'] > 0
    if target.startswith('tpu'):
        assert found['train']['compiler_cycles'] > found['eval']['compiler_cycles'] > 0


@pytest.mark.targets
def test_a_slice_of_several_hosts(tmp_path):
    found = _compiled(tmp_path, 'tpu:v5e:4x4', *SMALL, '--config.batch_size=128', '--steps=eval')
    assert found['eval']['collectives'][0]['groups'] == [list(range(16))]


@pytest.mark.targets
@pytest.mark.parametrize(
    'name,devices,hosts,gib',
    [
        ('tpu:v3:2x2', 8, 1, 16),
        ('tpu:v4:2x2x1', 4, 1, 32),
        ('tpu:v5e:2x4', 8, 1, 16),
        ('tpu:v5e:4x4', 16, 4, 16),
        ('tpu:v5e:16x16', 256, 64, 16),
        ('tpu:v5p:2x2x1', 4, 1, 95),
        ('tpu:v6e:2x4', 8, 1, 32),
    ],
)
def test_slices_are_what_they_are_called(name, devices, hosts, gib):
    target = hardware.target(name)
    assert (len(target.devices), target.hosts) == (devices, hosts)
    assert target.device.memory == gib * 2**30


@pytest.mark.targets
def test_images_of_a_replica_do_not_fill_the_lanes_of_a_tpu(tmp_path):
    """Channels do: with the 32 images there results are padded 3.4-fold, and twice as slow."""
    found = _compiled(
        tmp_path,
        'tpu:v5e:2x2',
        '--config=cifar:model=wrn10_4,augment=none',
        '--config.data.name=fake_cifar10',
        '--config.batch_size=128',
        '--config.replica_batch_size=32',
        '--config.model.dtype=bfloat16',
        '--steps=train',
    )
    assert found['train']['padding'] < 2.2


@pytest.mark.targets
@pytest.mark.parametrize('method, conditions', [('sgd', 0), ('sam', 0), ('periodic_sam', 1)])
def test_a_step_of_gpus_copies_no_params_and_waits_for_its_gate_alone(tmp_path, method, conditions):
    """Kernels of 3 x 3 x 256 x 256 are 2.4 MB; cuDNN's gradients of them lie otherwise."""
    found = _compiled(
        tmp_path,
        'gpu:h100:4',
        f'--config=cifar:model=wrn10_4,augment=none,method={method}',
        '--config.data.name=fake_cifar10',
        '--config.batch_size=64',
        '--config.replica_batch_size=16',
        '--config.model.dtype=bfloat16',
        '--steps=train',
    )
    assert found['train']['copies'] == []
    assert len(found['train']['conditions']) == conditions


@pytest.mark.targets
@pytest.mark.parametrize('recipe', ['autoaugment_cutout', 'randaugment'])
def test_augmentation_on_a_tpu_reads_no_single_elements_and_loops_over_no_images(tmp_path, recipe):
    """Of the loops none but that over the replicas of a device, of which there is one here."""
    found = {
        augment: _compiled(
            tmp_path, 'tpu:v5e:2x2', *SMALL, f'--config.data.augment={augment}', '--steps=train'
        )['train']
        for augment in ('none', recipe)
    }
    assert found[recipe]['loops'] == found['none']['loops']
    assert all(gather['elements'] > 1 for gather in found[recipe]['gathers'])
    # 0.13 GB, of 8 images or of 32; of gathers of single pixels XLA counts some 50 GB for these 8.
    assert found[recipe]['xla_bytes'] < found['none']['xla_bytes'] + 2e8


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
    'size,box', [(2, (1, 1, 2)), (4, (1, 2, 2)), (8, (2, 2, 2)), (16, (2, 2, 4))]
)
def test_groups_are_blocks_of_the_torus(size, box, backend):
    """64 chips of 16 hosts: a group's all-reduce stays among neighbours, and in whole hosts."""
    devices = hardware.target('tpu:v4:4x4x4').devices
    config = small_config(
        batch_size=8 * len(devices),
        replica_batch_size=8,
        sam__replicas_per_group=size,
        replica_backend=backend,
    )
    experiment = programs.experiment_for(config, devices)
    ordered = experiment.layout.devices
    places = np.array([d.coords for d in ordered])
    hosts = np.array([d.process_index for d in ordered])
    found = [
        g for g in _all_reduces(programs.train_step_of(experiment).lowered) if g.shape[1] == size
    ]
    assert found
    for groups in found:
        assert sorted(groups.ravel()) == list(range(len(devices)))
        for group in groups:
            sides = np.ptp(places[group], axis=0) + 1
            assert tuple(sorted(sides)) == box and np.prod(sides) == size
            assert len(set(hosts[group])) == max(size // 4, 1)


@pytest.mark.targets
def test_a_group_of_a_compiled_step_exchanges_one_gradient(tmp_path):
    """SAM on a v4 slice, groups of 8 chips: their gradient, in parts or whole, and that of all."""
    found = _compiled(
        tmp_path,
        'tpu:v4:4x4x4',
        '--config=digits',
        '--config.batch_size=512',
        '--config.replica_batch_size=8',
        '--config.sam.replicas_per_group=8',
        '--steps=train',
    )
    exchanges = found['train']['collectives']
    (everyone,) = [e for e in exchanges if e['groups'] == [list(range(64))]]
    parts = [e for e in exchanges if e is not everyone]
    assert len(parts) in (1, 2)  # as the compiler likes
    for part in parts:
        assert part['groups'] == np.arange(64).reshape(8, 8).tolist() and part['times'] == 1
    assert everyone['bytes'] == pytest.approx(sum(part['bytes'] for part in parts), rel=1e-3)
