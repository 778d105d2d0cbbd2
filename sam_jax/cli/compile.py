"""Compiles the steps of a config for accelerators, there or not: what would they need?

    sam-jax-compile --target=tpu:v5e:2x4 --config=cifar:model=wrn16_4
    sam-jax-compile --target=gpu:h100:8 --config=cifar:model=wrn28_10 --json=facts.json
    sam-jax-compile --target=cpu:1 --config=cifar:model=resnet56 --config.batch_size=32
    sam-jax-compile --target=here --measure --config=cifar:model=wrn28_10

Nothing is allocated, and neither accelerator nor dataset is needed: the compilers come with pip
install 'sam_jax[tpu]' and 'sam_jax[cuda]', best into an environment of their own. Memory, exchanges
and kernels are the compiled program's; operations are those of its convolutions and matrix products
before compilation; bytes are operands and results of its instructions. Times, images/s and shares
of the peak are ESTIMATES and nothing that was measured: the longer one of operations over peak and
bytes over bandwidth, and the compiler's own cycles. With --measure the train step is run, too, on
random images; what that gives is called MEASURED.
"""

import functools
import json

import jax
from absl import flags

from sam_jax import memory, tables
from sam_jax.cli import commands
from sam_jax.errors import UserError
from sam_jax.targets import facts, hardware, measured, programs

_CONFIG = commands.define_config('The config.')
_TARGET = flags.DEFINE_string(
    'target',
    '',
    'tpu:KIND:SHAPE, gpu:KIND:NUMBER, cpu:NUMBER, or here for the devices of this machine: '
    'tpu:v5e:2x4, gpu:h100:8, cpu:1.',
)
_MEASURE = flags.DEFINE_bool('measure', False, 'Run the train step as well; with here or cpu.')
_STEPS = flags.DEFINE_list('steps', list(programs.STEPS), 'Of train, eval; empty for none.')
_JSON = flags.DEFINE_string('json', '', 'Where the figures go as JSON.')
_MARKDOWN = flags.DEFINE_string('markdown', '', 'Where what is printed goes as Markdown.')


def main() -> None:
    """Compiles what the flags say."""
    for step in _STEPS.value:
        if step not in programs.STEPS:
            raise UserError(f'--steps has {step!r}; the steps are {", ".join(programs.STEPS)}.')
    if _TARGET.value != hardware.HERE:
        # The process itself computes nothing: JAX must not look for accelerators.
        jax.config.update('jax_platforms', 'cpu')
        # A program for absent hardware cannot be read back.
        jax.config.update('jax_enable_compilation_cache', False)
        if _MEASURE.value and not _TARGET.value.startswith('cpu'):
            raise UserError(
                f'--measure runs the step, and --target is {_TARGET.value!r}; it must be '
                f'{hardware.HERE} or cpu:NUMBER.'
            )
    target = hardware.target(_TARGET.value)
    config = _CONFIG.value
    experiment = programs.experiment_for(config, target.devices)
    layout, room = experiment.layout, target.device.memory
    text = []

    def say(part):
        text.append(part)
        print(part + '\n', flush=True)

    say(
        f'{config.model.name} on {target.name}: {len(layout.devices)} devices on {target.hosts} '
        f'hosts; {layout.num_replicas} replicas of {config.replica_batch_size} images of '
        f'{experiment.dataset.name}. {experiment.note}'.rstrip()
    )
    needed = memory.needs(experiment)
    say(memory.summary(needed, room))
    written = {
        'target': target.name,
        'devices': len(layout.devices),
        'device_memory': room,
        'config': json.loads(config.to_json_best_effort()),
        'estimate': needed.as_json(),
    }
    _write(written, text)
    advice = memory.advice(needed, experiment, room)
    if advice:
        say(advice)
    for step, images in (('train', config.batch_size), ('eval', config.eval.batch_size)):
        if step not in _STEPS.value:
            continue
        program = programs.STEPS[step](experiment)
        measure = (
            functools.partial(measured.of_train_step, experiment=experiment)
            if _MEASURE.value and step == 'train'
            else None
        )
        found = facts.of_program(
            program.lowered, target, program.flops, config.model.dtype, measure
        )
        written[step] = found
        say(
            tables.markdown(
                (f'{step} step', ''), facts.rows(found, images, target, config.model.dtype)
            )
        )
        if found.get('costly'):
            say(
                tables.markdown(
                    ('layer', 'ESTIMATED cycles', 'bytes'),
                    [
                        (name, f'{cycles:,}', f'{moved:.3g}')
                        for name, cycles, moved in found['costly']
                    ],
                )
            )
        if not found['fits'] and step == 'train':
            say(f'The train step does not fit: use {memory.ways(experiment)}.')
        _write(written, text)


def _write(written, text):
    """Leaves in the files what is known so far: a compilation may take long."""
    for flag, content in ((_JSON, json.dumps(written, indent=2)), (_MARKDOWN, '\n\n'.join(text))):
        try:
            if flag.value:
                with open(flag.value, 'w') as file:
                    file.write(content + '\n')
        except OSError as e:
            raise UserError(
                f'--{flag.name} is {flag.value!r}; it cannot be written: {e.strerror}.'
            ) from e


def run() -> None:
    """Console command `sam-jax-compile`."""
    commands.run(main)


if __name__ == '__main__':
    run()
