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

from absl import app, flags

from sam_jax import tables
from sam_jax.targets import hardware as targets

_log = logging.getLogger(__name__)

# Model -> the flags of its row of the paper. The paper's EfficientNets are B7 and L2; the smaller
# ones are fine-tuned as B7 is, at their own resolution.
_SIDES = (224, 240, 260, 300, 380, 456, 528)
MODELS = {
    'wrn28_10': ('--config=cifar:model=wrn28_10',),
    'shake_shake_26_2x96d': ('--config=cifar:model=shake_shake_26_2x96d',),
    **{f'resnet{n}': (f'--config=imagenet:model=resnet{n}',) for n in (50, 101, 152)},
    **{
        f'efficientnet-b{i}': (
            '--config=finetune:dataset=imagenet,model=efficientnet-b7',
            f'--config.model.name=efficientnet-b{i}',
            f'--config.data.image_size={side}',
        )
        for i, side in enumerate(_SIDES)
    },
    'efficientnet-b7': ('--config=finetune:dataset=imagenet,model=efficientnet-b7',),
    'efficientnet-l2-475': ('--config=finetune:dataset=imagenet,model=efficientnet-l2-475',),
    'pyramidnet272': ('--config=cifar:model=pyramidnet272',),
    'pyramidnet272_shakedrop': ('--config=cifar:model=pyramidnet272_shakedrop',),
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
REMAT = ('False', 'True')

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
    def flags(self) -> list[str]:
        """The arguments of `sam-jax-compile`."""
        target, times = HARDWARE[self.hardware]
        more = [f'--config.batch_size={times * _paper_batch(self.model)}'] if times > 1 else []
        return [
            f'--target={target}',
            *MODELS[self.model],
            f'--config.model.dtype={self.dtype}',
            f'--config.model.remat={self.remat}',
            *more,
        ]


def _paper_batch(model):
    if model == 'efficientnet-l2-475':
        return 512
    if model.startswith('efficientnet'):
        return 1024
    return 4096 if model.startswith('resnet') else 256


def rows() -> Iterator[Row]:
    """Yields the rows that the flags name, those of a hardware together."""
    for hardware in _HARDWARE.value:
        for dtype in _DTYPES.value:
            for remat in _REMAT.value:
                for model in _MODELS.value:
                    yield Row(model, hardware, dtype, remat)


def make(row: Row, steps: str, minutes: float) -> None:
    """Estimates and compiles a row in a process of its own; its file says what came of it.

    Args:
      row: what to compile.
      steps: 'train', or '' for the estimate alone.
      minutes: after which it is given up.
    """
    command = [sys.executable, '-m', 'sam_jax.cli.compile', f'--steps={steps}']
    try:
        ended = subprocess.run(
            [*command, f'--json={row.file}', *row.flags],
            capture_output=True,
            text=True,
            timeout=60 * minutes,
        )
        failed = '' if not ended.returncode else (ended.stderr.strip().splitlines() or ['?'])[-1]
    except subprocess.TimeoutExpired:
        failed = f'not compiled in {minutes:g} minutes'
    if failed:
        known = read(row)  # first of all: opening the file to write empties it
        with open(row.file, 'w') as file:
            json.dump({**known, 'failed': failed}, file, indent=2)


def read(row: Row) -> dict[str, Any]:
    """Returns what the file of a row holds, {} where there is none."""
    if not os.path.exists(row.file):
        return {}
    with open(row.file) as file:
        return json.load(file)


def room(hardware: str) -> float:
    """Returns the bytes of a device."""
    platform, kind, _ = HARDWARE[hardware][0].split(':')
    if platform == 'gpu':
        return targets.GPUS[kind].memory
    # Each of the two cores of a v3 chip is a device.
    return targets.TPUS[kind].memory / (2 if kind == 'v3' else 1)


def cell(found: dict[str, Any], estimate: float, memory: float) -> str:
    """Returns the GiB of a train step, bold with ! where they are more than a device has.

    Args:
      found: what the file of a row holds.
      estimate: bytes by estimate, which stand with ~ where the row is not compiled.
      memory: bytes of a device.
    """
    compiled = found.get('train')
    needs = compiled['memory']['all'] if compiled else estimate
    fits = compiled['fits'] if compiled else needs <= memory
    text = f'{needs / 2**30:.3g}' if compiled else f'~{needs / 2**30:.3g}'
    return text if fits else f'**{text if needs else "refused"} !**'


def speed(found: dict[str, Any]) -> str:
    """Returns the images/s of a compiled step, by the slower of the estimates of its time."""
    step = found.get('train', {})
    seconds = max(step.get('roofline_seconds', 0), step.get('compiler_seconds', 0))
    return f'{found["config"]["batch_size"] / seconds:,.0f}' if seconds else ''


def table() -> str:
    """Returns the tables of memory, and of the estimated speed, of the rows that are there."""
    memory, speeds = [], []
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
                memory.append((*head, *(cell(f, estimate, room(h)) for h, f in shown.items())))
                if any(map(speed, shown.values())):
                    speeds.append((*head, *map(speed, shown.values())))
    head = ('model', 'dtype', 'remat')
    rooms = [f'{h} ({room(h) / 2**30:.3g})' for h in _HARDWARE.value]
    return '\n\n'.join(
        [
            tables.markdown((*head, *rooms), memory),
            tables.markdown((*head, *_HARDWARE.value), speeds),
        ]
    )


def main(argv: list[str]) -> None:
    """Compiles what is missing and prints the table."""
    del argv
    logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S', level=logging.INFO)
    os.makedirs(_OUT.value, exist_ok=True)
    steps = '' if _ESTIMATE_ONLY.value else 'train'
    for row in rows() if not _TABLE_ONLY.value else ():
        done = read(row)
        if not done or steps and not {'train', 'failed'} & set(done):
            _log.info('%s ...', ' '.join(row))
            make(row, steps, _MINUTES.value)
            done = read(row)
            _log.info('%s', done.get('failed') or cell(done, done['estimate']['all'], room(row.hardware)))
    print(table())


if __name__ == '__main__':
    app.run(main)
