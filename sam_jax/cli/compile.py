"""Compiles the steps of a config for accelerators that are not there: what would they need?

    sam-jax-compile --target=tpu:v5e:2x4 --config=cifar:model=wrn16_4 --config.data.dir=DIR
    sam-jax-compile --target=gpu:h100:8 --config=cifar:model=wrn28_10 --json=facts.json

Nothing is allocated, and no accelerator is needed: the compilers come with pip install
'sam_jax[tpu]' and 'sam_jax[cuda]', best into an environment of their own. Memory, operations and
exchanges are the program's. Times, images/s and shares of the peak are ESTIMATES: the longer one of
operations over peak and bytes over bandwidth, and the compiler's own cycles, of which a loop counts
once.
"""

import json

import jax
from absl import flags

from sam_jax import tables
from sam_jax.cli import commands
from sam_jax.targets import facts, hardware, programs

_CONFIG = commands.define_config('The config.')
_TARGET = flags.DEFINE_string(
    'target', '', 'tpu:KIND:SHAPE or gpu:KIND:NUMBER, such as tpu:v5e:2x4, gpu:h100:8.'
)
_STEPS = flags.DEFINE_list('steps', ['train', 'eval'], 'Of train, eval.')
_JSON = flags.DEFINE_string('json', '', 'Where the figures go as JSON.')


def main() -> None:
    """Compiles what the flags say."""
    target = hardware.target(_TARGET.value)
    config = _CONFIG.value
    experiment = programs.experiment_for(config, target.devices)
    print(
        f'{target.name}: {len(target.devices)} devices on {target.hosts} hosts; '
        f'{experiment.layout.num_replicas} replicas of {config.replica_batch_size} images.'
    )
    written = {}
    for step, lower, images in (
        ('train', programs.lower_train_step, config.batch_size),
        ('eval', programs.lower_eval_step, config.eval.batch_size),
    ):
        if step not in _STEPS.value:
            continue
        found = written[step] = facts.of_program(lower(experiment), target)
        print('\n' + tables.markdown((f'{step} step', ''), facts.rows(found, images, target)))
        if found['costly']:
            print()
            print(tables.markdown(('layer', 'estimated cycles'), found['costly']), flush=True)
    if _JSON.value:
        with open(_JSON.value, 'w') as file:
            json.dump({'target': target.name, **written}, file, indent=2)


def run() -> None:
    """Console command `sam-jax-compile`."""
    # The process itself computes nothing: JAX must not look for accelerators.
    jax.config.update('jax_platforms', 'cpu')
    # A program for absent hardware cannot be read back.
    jax.config.update('jax_enable_compilation_cache', False)
    commands.run(main)


if __name__ == '__main__':
    run()
