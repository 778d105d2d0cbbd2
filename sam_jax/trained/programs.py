"""A trained network as one compiled program, which runs without this package.

program.stablehlo    what jax.export serialises: uint8 (N, H, W, C) -> probabilities (N, classes)
program.json         its input, its output, the classes, the run's result

import jax
program = jax.export.deserialize(open('program.stablehlo', 'rb').read())
probabilities = program.call(images)
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax import export

from sam_jax import run_log
from sam_jax.trained.model import Trained

PROGRAM = 'program.stablehlo'

# Where it runs; JAX chooses when it is called.
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


@contextlib.contextmanager
def no_places() -> Iterator[None]:
    """Has programs that are lowered here name no files of this machine."""
    settings: Any = jax.config
    name = 'jax_hlo_source_file_canonicalization_regex'
    before = getattr(settings, name)
    settings.update(name, '.*')
    try:
        yield
    finally:
        settings.update(name, before)


def exported(model: Trained) -> export.Exported:
    """Returns the program of a network: preprocessing, network, softmax; for any number of images.

    The weights are constants in it.
    """

    def probabilities(images):
        return jax.nn.softmax(model.apply(model.variables, images)).astype('float32')

    (number,) = export.symbolic_shape('n')
    images = jax.ShapeDtypeStruct((number, *model.preprocessing.shape), 'uint8')
    with no_places():
        return export.export(jax.jit(probabilities), platforms=PLATFORMS)(images)


def write(model: Trained, folder: str) -> str:
    """Writes the program and what is to be known of it into a folder; returns the program's path.

    Raises:
      OSError: the folder cannot be written.
    """
    content = exported(model).serialize()
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, PROGRAM)
    with open(path, 'wb') as file:
        file.write(content)
    described = {
        'input': f'uint8 ({", ".join(["N", *map(str, model.preprocessing.shape)])})',
        'output': f'float32 (N, {len(model.classes)}), probabilities',
        'classes': list(model.classes),
        'model': model.config.model.name,
        'dataset': model.config.data.name,
        'result': model.result,
    }
    run_log.write_json(os.path.join(folder, 'program.json'), described)
    return path
