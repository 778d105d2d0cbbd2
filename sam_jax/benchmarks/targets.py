"""Does every row of the paper fit? Compiles them for hardware that is not there.

    python -m sam_jax.benchmarks.targets --out=FOLDER [--hardware=v5e-8,...] [--models=...]
        [--dtypes=bfloat16] [--remat=False] [--minutes=30] [--estimate_only] [--table_only]

Runs `sam-jax-compile` for the train step of each row, one at a time, each in a process of its own,
and prints the table. The figures of a row go to a file of the folder; a row that is compiled is not
compiled again, so the command can be stopped and started at will. The file of a row that could not
be compiled says why; delete it to try again. With --estimate_only nothing is compiled and a row has
the estimate of sam_jax/memory.py alone.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from absl import app, flags

from sam_jax import memory, run_log, settings, tables
from sam_jax.targets import facts, programs
from sam_jax.targets import hardware as targets

_log = logging.getLogger(__name__)

# Model -> config of its row of the paper, and what differs. The paper has EfficientNet B7 and L2;
# the smaller ones are fine-tuned as B7 is, at their own resolution.
_SIDES = (224, 240, 260, 300, 380, 456, 528)
MODELS = {
    'wrn28_10': ('cifar:model=wrn28_10', {}),
    'shake_shake_26_2x96d': ('cifar:model=shake_shake_26_2x96d', {}),
    **{f'resnet{n}': (f'imagenet:model=resnet{n}', {}) for n in (50, 101, 152)},
    **{
        f'efficientnet-b{i}': (
            'finetune:dataset=imagenet,model=efficientnet-b7',
            {'model.name': f'efficientnet-b{i}', 'data.image_size': side},
        )
        for i, side in enumerate(_SIDES)
    },
    'efficientnet-b7': ('finetune:dataset=imagenet,model=efficientnet-b7', {}),
    'efficientnet-l2-475': ('finetune:dataset=imagenet,model=efficientnet-l2-475', {}),
    'pyramidnet272': ('cifar:model=pyramidnet272', {}),
    'pyramidnet272_shakedrop': ('cifar:model=pyramidnet272_shakedrop', {}),
}

# As people call it -> --target, and how many times the batch of the paper.
HARDWARE = {
    'h100 x 8': ('gpu:h100:8', 1),
    'a100-40 x 8': ('gpu:a100-40:8', 1),
    'a100-80 x 8': ('gpu:a100-80:8', 1),
    'v5e-8': ('tpu:v5e:2x4', 1),
    'v6e-8': ('tpu:v6e:2x4', 1),
    'v4-8': ('tpu:v4:2x2x1', 1),
    'v5p-8': ('tpu:v5p:2x2x1', 1),
    'v3-8': ('tpu:v3:2x2', 1),
    'v5e-256': ('tpu:v5e:16x16', 32),
}
DTYPES = ('bfloat16', 'float32')
# model.remat -> how many times the estimate a compiled step may need, see docs/targets.md.
REMAT = {'False': 1.2, 'True': 2.4}

_OUT = flags.DEFINE_string('out', None, 'Folder of the figures.', required=True)
_HARDWARE = flags.DEFINE_list('hardware', list(HARDWARE), 'What to compile for.')
_MODELS = flags.DEFINE_list('models', list(MODELS), 'Models, in this order.')
_DTYPES = flags.DEFINE_list('dtypes', list(DTYPES), 'Of model.dtype.')
_REMAT = flags.DEFINE_list('remat', list(REMAT), 'Of model.remat.')
_MINUTES = flags.DEFINE_float('minutes', 60, 'A row that takes longer is given up.')
_ESTIMATE_ONLY = flags.DEFINE_bool('estimate_only', False, 'Compile nothing, estimate.')
_TABLE_ONLY = flags.DEFINE_bool('table_only', False, 'Print what is there.')


class Row(NamedTuple):
    """What is compiled: a key of each of MODELS and HARDWARE, a dtype, and remat."""

    model: str
    hardware: str
    dtype: str
    remat: str

    @property
    def file(self) -> str:
        parts = (self.model, self.hardware.replace(' ', ''), self.dtype, f'remat{self.remat}')
        return os.path.join(_OUT.value, '_'.join(parts) + '.json')

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the config."""
        base, changes = MODELS[self.model]
        times = HARDWARE[self.hardware][1]
        if times > 1:
            changes = {**changes, 'batch_size': times * settings.load(base)[1].batch_size}
        return {**changes, 'model.dtype': self.dtype, 'model.remat': self.remat}


def rows() -> Iterator[Row]:
    """Yields the rows that the flags name, those of a hardware together."""
    for hardware in _HARDWARE.value:
        for dtype in _DTYPES.value:
            for remat in _REMAT.value:
                for model in _MODELS.value:
                    yield Row(model, hardware, dtype, remat)


def estimate(row: Row) -> None:
    """Writes the estimate of a row into its file, which no compiler is asked for."""
    config = settings.load(MODELS[row.model][0])[1]
    for key, value in row.changes.items():
        settings.override(config, key, str(value))
    experiment = programs.experiment_for(config, jax.devices())
    needed = memory.needs(experiment)
    found = {'config': json.loads(config.to_json_best_effort()), 'estimate': needed.as_json()}
    run_log.write_json(row.file, found)


def make(row: Row, minutes: float) -> None:
    """Compiles a row in a process of its own; its file says what came of it.

    Args:
      row: what to compile.
      minutes: after which it is given up.
    """
    command = [
        *(sys.executable, '-m', 'sam_jax.cli.compile', '--steps=train', f'--json={row.file}'),
        f'--target={HARDWARE[row.hardware][0]}',
        f'--config={MODELS[row.model][0]}',
        *(f'--config.{key}={value}' for key, value in row.changes.items()),
    ]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60 * minutes)
        failed = '' if not ended.returncode else (ended.stderr.strip().splitlines() or ['?'])[-1]
    except subprocess.TimeoutExpired:
        failed = f'not compiled in {minutes:g} minutes'
    if failed:
        run_log.write_json(row.file, {**read(row), 'failed': failed})


def read(row: Row) -> dict[str, Any]:
    """Returns what the file of a row holds, {} where there is none."""
    return run_log.read_json(row.file) or {}


def device(hardware: str) -> targets.Chip:
    """Returns a device of the hardware; no compiler is asked how many a chip has."""
    return targets.device(HARDWARE[hardware][0].split(':')[1])


def cell(found: dict[str, Any], estimate: float, memory: float, remat: str) -> str:
    """Returns whether a row fits: with the GiB of its compiled step, or by estimate alone.

    Args:
      found: what the file of the row holds.
      estimate: bytes by estimate.
      memory: bytes of a device.
      remat: a key of REMAT.
    """
    if 'train' not in found:
        near = 'yes' if REMAT[remat] * estimate <= memory else 'near'
        return near if estimate <= memory else '**no**'
    needs, fits = found['train']['memory']['all'], found['train']['fits']
    return f'{needs / 2**30:.3g}' if fits else f'**{needs / 2**30:.3g}: no**'


SPEED = ('GFLOP a device', 'GB a device', 'kernels', 'ms', 'images/s', 'share of peak')


def speed(found: dict[str, Any], device: targets.Chip) -> tuple[str, ...]:
    """Returns the cells of SPEED of a row that is compiled for such devices."""
    step, config = found['train'], found['config']
    seconds = facts.seconds(step)
    if not seconds:  # it was refused
        return (f'{step["flops"] / 1e9:,.0f}', *[''] * (len(SPEED) - 1))
    peak = device.peak(config['model']['dtype'])
    return (
        f'{step["flops"] / 1e9:,.0f}',
        f'{step["bytes"] / 1e9:,.1f}',
        f'{step["kernels"]:,}',
        f'{1e3 * seconds:,.2f}',
        f'{config["batch_size"] / seconds:,.0f}',
        f'{100 * step["flops"] / seconds / peak:.0f} %',
    )


def table() -> str:
    """Returns the tables of memory, and of the estimated speed, of the rows that are there."""
    fitting, speeds = [], []
    for model in _MODELS.value:
        for dtype in _DTYPES.value:
            for remat in _REMAT.value:
                found = {h: read(Row(model, h, dtype, remat)) for h in HARDWARE}
                known = [f for f in found.values() if 'estimate' in f]
                if not known:
                    continue
                head = (model, dtype, 'yes' if remat == 'True' else '')
                # Of eight devices; with others no more than the data differs.
                estimate = known[0]['estimate']['all']
                shown = {h: found[h] for h in _HARDWARE.value}
                cells = [cell(f, estimate, device(h).memory, remat) for h, f in shown.items()]
                fitting.append((*head, f'{estimate / 2**30:.3g}', *cells))
                for h, f in shown.items():
                    if 'train' in f:
                        speeds.append((*head, h, *speed(f, device(h))))
    head = ('model', 'dtype', 'remat')
    rooms = [f'{h} ({device(h).memory / 2**30:.3g})' for h in _HARDWARE.value]
    return '\n\n'.join(
        [
            tables.markdown((*head, 'estimate', *rooms), fitting),
            tables.markdown((*head, 'hardware', *SPEED), speeds),
        ]
    )


def main(argv: list[str]) -> None:
    """Compiles what is missing and prints the table."""
    del argv
    logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S', level=logging.INFO)
    os.makedirs(_OUT.value, exist_ok=True)
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', 8)  # as most of the hardware has, for the estimates
    for row in rows() if not _TABLE_ONLY.value else ():
        done = read(row)
        if _ESTIMATE_ONLY.value and not done:
            estimate(row)
        elif not _ESTIMATE_ONLY.value and not {'train', 'failed'} & set(done):
            make(row, _MINUTES.value)
        else:
            continue
        done = read(row)
        shown = ''
        if 'estimate' in done:
            shown = cell(done, done['estimate']['all'], device(row.hardware).memory)
        _log.info('%s: %s %s', ' '.join(row), shown, done.get('failed', ''))
    print(table())


if __name__ == '__main__':
    app.run(main)
