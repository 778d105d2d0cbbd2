"""Draws what the network will see.

    sam-jax-preview --config=configs/cifar.py:augment=autoaugment --out=grid.png
    sam-jax-preview --config=... --what=ops --out=ops.png

`batch` is the beginning of a training step's batch after augmentation, the same that the run of
this config and seed gets; `ops` shows the operations of AutoAugment and RandAugment one by one.
"""

import logging
import os

import jax
import numpy as np
from absl import flags

from sam_jax import settings
from sam_jax.cli import commands
from sam_jax.data import pictures
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment

_CONFIG = commands.define_config('File with get_config(), as of sam_jax.main.')
_OUT = flags.DEFINE_string('out', 'grid.png', 'Picture to write.')
_WHAT = flags.DEFINE_enum('what', 'batch', ['batch', 'ops'], 'What to draw.')
_STEP = flags.DEFINE_integer('step', 0, 'Training step of the batch, counted from 0.', 0)
_IMAGES = flags.DEFINE_integer('images', 64, 'At most so many images of the batch.', 1)
_SIDE = flags.DEFINE_integer('side', 64, 'Smaller images are drawn at least so large.', 1)

_log = logging.getLogger(__name__)


def main() -> None:
    """Draws what the flags say."""
    from PIL import Image, ImageDraw

    config, out = _CONFIG.value, _OUT.value
    kind = Image.registered_extensions().get(os.path.splitext(out)[1].lower())
    if kind not in Image.SAVE:
        raise UserError(f'--out is {out!r}; it must end in .png or another kind of picture.')
    experiment = Experiment.from_config(config, jax.devices()[:1], to_train=False)
    dataset, layout = experiment.dataset, experiment.layout
    settings.check_to_train(config, dataset)
    if _WHAT.value == 'batch':
        images = pictures.training_images(dataset, config.seed, _STEP.value, layout, _IMAGES.value)
        names, columns = [], None
    else:
        pixels = dataset.original_images(8)
        names, images = pictures.operations(pixels, dataset.augmentation)
        columns = len(pixels)
    scale = -(-_SIDE.value // images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    pixels = np.rint(pictures.grid(images, columns)[0] * 255).astype(np.uint8)
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    if names:
        width = 110  # of the longest name and its level
        whole = Image.new('RGB', (width + picture.width, picture.height), 'white')
        whole.paste(picture, (width, 0))
        draw = ImageDraw.Draw(whole)
        for row, name in enumerate(names):
            draw.text((4, (row + 0.5) * images.shape[1] - 6), name, fill='black')
        picture = whole
    try:
        picture.save(out)
    except OSError as e:
        raise UserError(f'--out is {out!r}; it cannot be written: {e}.') from e
    _log.info(
        '%s: %s of %s, %d images.',
        out,
        f'step {_STEP.value}' if not names else 'the operations on images',
        dataset.name,
        len(images),
    )


def run() -> None:
    """Console command `sam-jax-preview`."""
    commands.run(main)


if __name__ == '__main__':
    run()
