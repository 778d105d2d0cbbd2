"""A trained network in the forms of two other libraries: TensorFlow's SavedModel, and Orbax.

Both folders hold `network.json` besides: what goes in and comes out, the classes, and the run's
result.

    saved_model.pb, variables/, ...    TensorFlow: uint8 (N, H, W, C) -> probabilities (N, classes)
    weights/                           Orbax: {'params', 'batch_stats'}
"""

import logging
import os
import shutil

import jax

from sam_jax import convolutions, run_log
from sam_jax.errors import UserError
from sam_jax.models import layers
from sam_jax.trained import programs
from sam_jax.trained.model import Trained

# Of a SavedModel, as jax2tf knows them.
PLATFORMS = ('cpu', 'cuda', 'tpu')

DESCRIPTION, WEIGHTS = 'network.json', 'weights'


def write_saved_model(model: Trained, folder: str) -> str:
    """Writes preprocessing, network and softmax as TensorFlow's SavedModel.

    The programs are StableHLO within it (jax2tf's native serialization). Two signatures take
    `images` and return `probabilities`: `serving_default` any number of them, on CPU, GPU and TPU,
    and `one` a single one on a CPU. The latter is for `tf.lite.TFLiteConverter`: its shapes are
    known, and no operation in it is one that TFLite does not have.

    Returns:
      The path of saved_model.pb.

    Raises:
      UserError: TensorFlow is not installed.
      OSError: the folder cannot be written.
    """
    try:
        import tensorflow as tf
        from jax.experimental import jax2tf
    except ImportError as e:
        raise UserError(f'A SavedModel needs TensorFlow, which cannot be imported: {e}.') from e
    shape = model.preprocessing.shape

    def probabilities(images):
        with layers.no_scatter():
            return jax.nn.softmax(model.apply(model.variables, images)).astype('float32')

    def signature(number, platforms):
        call = jax2tf.convert(
            probabilities,
            polymorphic_shapes=None if number else ['(n, ...)'],
            with_gradient=False,
            native_serialization_platforms=platforms,
        )
        images = tf.TensorSpec((number, *shape), tf.uint8, name='images')
        function = tf.function(
            lambda images: {'probabilities': call(images)},
            autograph=False,
            input_signature=[images],
        )
        return function.get_concrete_function()

    os.makedirs(folder, exist_ok=True)
    logging.disable(logging.INFO)  # TensorFlow tells of its microseconds
    with programs.no_places():
        signatures = {'serving_default': signature(None, PLATFORMS)}
        with convolutions.as_jax_does():  # TFLite is not XLA, and knows convolutions
            signatures['one'] = signature(1, ('cpu',))
        tf.saved_model.save(tf.Module(), folder, signatures=signatures)
    logging.disable(logging.NOTSET)
    _describe(model, folder)
    return os.path.join(folder, 'saved_model.pb')


def write_orbax(model: Trained, folder: str) -> str:
    """Writes the weights as a checkpoint that `orbax.checkpoint.StandardCheckpointer` restores.

    Returns:
      The path of the checkpoint, a folder.

    Raises:
      OSError: the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    os.makedirs(folder, exist_ok=True)
    path = os.path.join(os.path.abspath(folder), WEIGHTS)
    shutil.rmtree(path, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, model.variables)
    _describe(model, folder)
    return path


def _describe(model, folder):
    shape = ', '.join(map(str, model.preprocessing.shape))
    description = {
        'input': f'uint8 (N, {shape})',
        'output': f'float32 (N, {len(model.classes)}), probabilities',
        'preprocessing': model.preprocessing.described(),
        'classes': list(model.classes),
        'model': model.config.model.name,
        'dataset': model.config.data.name,
        'method': model.config.sam.method,
        'step': model.step,
        'ema': model.ema,
        'result': model.result,
    }
    run_log.write_json(os.path.join(folder, DESCRIPTION), description)
