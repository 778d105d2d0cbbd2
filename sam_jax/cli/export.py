"""A trained run as files to use elsewhere: weights, a compiled program, a folder for the Hub.

    sam-jax-export RUN --out=FOLDER                     # weights.safetensors with its settings
    sam-jax-export RUN --out=FOLDER --to=stablehlo      # a program, which runs without sam_jax
    sam-jax-export RUN --out=FOLDER --to=saved_model    # the same for TensorFlow and TFLite
    sam-jax-export RUN --out=FOLDER --to=huggingface    # model.safetensors and a model card
    sam-jax-export RUN --out=FOLDER --to=orbax          # the weights as an Orbax checkpoint

RUN is the folder of a run, or one that this command has written. What comes out holds nothing but
what predictions take: no state of the optimizer. `sam_jax.load(FOLDER)` reads those of safetensors
and of huggingface.
"""

import os

from absl import flags

from sam_jax import trained
from sam_jax.cli import commands
from sam_jax.errors import UserError
from sam_jax.trained import card, elsewhere, folders, programs

_OUT = flags.DEFINE_string('out', '', 'Folder to write; made if it is not there.')
_TO = flags.DEFINE_enum(
    'to',
    'safetensors',
    ['safetensors', 'stablehlo', 'saved_model', 'huggingface', 'orbax'],
    'What is written.',
)
_EPOCH = flags.DEFINE_integer('epoch', None, 'After which epoch; default the newest checkpoint.')
_EMA = flags.DEFINE_bool('ema', None, 'The moving average or not; default if the run keeps one.')
_DTYPE = flags.DEFINE_enum(
    'dtype', None, folders.DTYPES, "Of the arrays in the file of weights; default the run's own."
)
_LICENSE = flags.DEFINE_string(
    'license', '', 'Of the weights, for the model card: its name on the Hub, such as apache-2.0.'
)


def main(arguments: list[str]) -> None:
    """Writes what the flags say."""
    if len(arguments) != 1 or not _OUT.value:
        raise UserError('Give one run and where to write: sam-jax-export RUN --out=FOLDER.')
    if _DTYPE.value and _TO.value not in ('safetensors', 'huggingface'):
        raise UserError(
            f'--dtype is {_DTYPE.value!r}; with --to={_TO.value} the types of the run are kept.'
        )
    if _LICENSE.value and _TO.value != 'huggingface':
        raise UserError(f'--license is {_LICENSE.value!r}; it is of --to=huggingface alone.')
    out = os.path.expanduser(_OUT.value)
    folders.check_out(out)
    model = trained.load(arguments[0], _EPOCH.value, _EMA.value)
    try:
        if _TO.value == 'stablehlo':
            path = programs.write(model, out)
        elif _TO.value == 'saved_model':
            path = elsewhere.write_saved_model(model, out)
        elif _TO.value == 'orbax':
            path = elsewhere.write_orbax(model, out)
        elif _TO.value == 'huggingface':
            path = card.write(model, out, _DTYPE.value or '', _LICENSE.value)
        else:
            path = folders.write(model, out, dtype=_DTYPE.value or '')
    except OSError as e:
        raise UserError(f'--out is {out!r}; it cannot be written: {e.strerror}.') from e
    print(f'{path}: {_size(path):,} bytes.')
    for name, fact in model.facts.items():
        print(f'  {name:<11}{fact}')


def _size(path):
    """Bytes of a file, or of all files of a folder."""
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(
        os.path.getsize(os.path.join(at, x)) for at, _, names in os.walk(path) for x in names
    )


def run() -> None:
    """Console command `sam-jax-export`."""
    commands.run(main, positional=True)


if __name__ == '__main__':
    run()
