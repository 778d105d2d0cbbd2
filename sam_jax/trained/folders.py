"""Folders that hold a trained network: that of a run, and that of published weights.

The latter holds no state of the optimizer and needs no dataset:

    weights.safetensors    {'params/MODULE/LEAF', 'batch_stats/MODULE/LEAF', 'frozen/...': array}
    config.json            settings, preprocessing, classes, and the checksum of the weights
    result.json            what the run says of itself after these weights' step

Nothing in it is code. What is read is compared with the network that the settings describe, name by
name and shape by shape, before it is used.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sam_jax import data, models, run_log, settings
from sam_jax.data.preprocessing import Preprocessing
from sam_jax.errors import UserError, first_line
from sam_jax.experiment import Experiment
from sam_jax.models import pretrained
from sam_jax.replicas import Device
from sam_jax.trained.model import Trained

# The latter as the tools of Hugging Face want it.
WEIGHTS, HUGGING_FACE = pretrained.EXPORTED

DTYPES = ('float32', 'float16')

# Settings that name files of the machine that trained; of these a published config keeps the name.
_PATHS = ('data.dir', 'data.labels_from', 'model.init_from')


def load(
    path: str | os.PathLike[str],
    epoch: int | None = None,
    ema: bool | None = None,
    devices: Sequence[Device] | None = None,
    data_dir: str = '',
) -> Trained:
    """Opens a trained network, to use it.

        model = sam_jax.load('published/digits_sam')
        probabilities = model.predict(images)

    Args:
      path: folder of published weights, or of a run, whose dataset must be there.
      epoch: of a run: after which epoch; default that of the newest checkpoint.
      ema: whether to take the run's moving average; default if it keeps one.
      devices: that compute; default all of this process.
      data_dir: where the dataset of a run lies; '' for the run's own place.

    Raises:
      UserError: it is no such folder, something in it is damaged or does not fit, or there are no
        such weights in it.
    """
    folder = os.path.expanduser(os.fspath(path))
    described = read_json(folder, 'config.json')
    if 'weights' in described:
        if epoch is not None:
            raise UserError(f'epoch is {epoch}; {folder!r} holds weights of one epoch alone.')
        return _published(folder, described, ema, devices)
    here = devices or jax.local_devices()
    config = settings.of_run(folder)
    if data_dir:
        config.data.dir = data_dir
    experiment = Experiment.of_any_size(config, here[:1], to_train=False, load=_with_own_labels)
    return of_experiment(experiment, folder, epoch, ema, devices)


def _with_own_labels(settings):
    """The dataset of `config.data` with its own labels: a file of others may be gone."""
    own = settings.copy_and_resolve_references()
    own.labels_from = ''
    return data.load_dataset(own)


def of_experiment(
    experiment: Experiment,
    workdir: str,
    epoch: int | None = None,
    ema: bool | None = None,
    devices: Sequence[Device] | None = None,
) -> Trained:
    """Returns the trained network of a run whose experiment is there; else as `load`."""
    state, step = experiment.restore(workdir, epoch)
    if ema and state.ema is None:
        raise UserError(
            f'ema is True; the run in {workdir!r} keeps no moving average (ema.decay is 0).'
        )
    plain = {'params': state.params, 'batch_stats': state.batch_stats}
    dataset = experiment.dataset
    frozen = experiment.frozen(dataset.train)
    written = read_json(workdir, 'config.json')
    return Trained(
        config=experiment.config,
        variables={
            **jax.device_get(plain if ema is False else experiment.weights(state)),
            **({'frozen': frozen} if frozen else {}),
        },
        preprocessing=dataset.preprocessing,
        classes=dataset.classes or tuple(map(str, range(dataset.num_classes))),
        result=_result(workdir, step),
        step=step,
        ema=state.ema is not None and ema is not False,
        origin={k: v for k, v in written.items() if k != 'config'},
        devices=tuple(devices or jax.local_devices()),
    )


def _result(workdir, step):
    """result.json of a run that ended at a step; else what its log says of it at that step."""
    path = os.path.join(workdir, 'result.json')
    result = read_json(workdir, 'result.json') if os.path.exists(path) else {}
    if result.get('step') == step:
        return result
    evaluated = ('test/', 'validation/', 'train_')
    return {
        'step': step,
        **{
            name: value
            for line in run_log.read_lines(os.path.join(workdir, 'metrics.jsonl'))
            if line['step'] == step
            for name, value in line.items()
            if name.startswith(evaluated)
        },
    }


def write(model: Trained, folder: str, name: str = WEIGHTS, dtype: str = '') -> str:
    """Writes the folder of a published network.

    Args:
      model: what `load` returns.
      folder: made if it is not there; what an earlier call wrote there is replaced.
      name: of the file of weights, `WEIGHTS` or `HUGGING_FACE`.
      dtype: of `DTYPES`, that of the arrays in the file; '' for that of the run.

    Returns:
      The path of the file of weights.

    Raises:
      UserError: the folder is that of a run, or a value is not finite in this dtype.
      OSError: the folder cannot be written.
    """
    from safetensors.numpy import save

    check_out(folder)
    flattened: dict[str, Any] = traverse_util.flatten_dict(model.variables, sep='/')
    with np.errstate(over='ignore'):
        arrays = {
            k: np.array(x, dtype if dtype and _floating(x) else x.dtype, order='C')
            for k, x in flattened.items()
        }
    for path, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f'The weights {path} are not finite in {array.dtype}.')
    content = save(arrays)
    flat: dict[str, Any] = settings.jsonable(model.config)
    flat.update({key: os.path.basename(os.path.normpath(flat[key])) for key in _PATHS if flat[key]})
    description = {
        **model.origin,
        'config': flat,
        'preprocessing': model.preprocessing.described(),
        'classes': list(model.classes),
        'weights': {
            'file': name,
            'sha256': checksum(content),
            'step': model.step,
            'ema': model.ema,
        },
    }
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    with open(path, 'wb') as file:
        file.write(content)
    run_log.write_json(os.path.join(folder, 'result.json'), model.result)
    # Last: without it the folder is none of a published network.
    run_log.write_json(os.path.join(folder, 'config.json'), description)
    return path


def _floating(array):
    return np.issubdtype(array.dtype, np.floating)


def check_out(folder: str) -> None:
    """Raises UserError if a folder is that of a run, in which nothing may be written."""
    config = os.path.join(folder, 'config.json')
    if os.path.exists(config) and 'weights' not in read_json(folder, 'config.json'):
        raise UserError(
            f'{folder!r} is the folder of a run, whose config.json must stay; choose another one.'
        )


def checksum(content: bytes) -> str:
    """Returns the SHA-256 of a file's content, as config.json has it."""
    return hashlib.sha256(content).hexdigest()


def read_json(folder: str, name: str) -> dict[str, Any]:
    """Returns the content of a JSON file that holds an object.

    Raises:
      UserError: it is not there, or holds something else.
    """
    path = os.path.join(folder, name)
    try:
        with open(path) as file:
            content = json.load(file)
    except FileNotFoundError as e:
        raise UserError(
            f'{folder!r} must be the folder of a run or of published weights; there is no {path}.'
        ) from e
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f'{path} cannot be read: {first_line(e)}.') from e
    if not isinstance(content, dict):
        raise UserError(f'{path} must hold a JSON object; it holds a {type(content).__name__}.')
    return content


def _published(folder, described, ema, devices):
    """Of a folder with this content of its config.json."""
    path = os.path.join(folder, 'config.json')
    weights, classes = described['weights'], described.get('classes')
    if not (
        isinstance(weights, dict)
        and weights.get('file') in (WEIGHTS, HUGGING_FACE)
        and type(weights.get('ema')) is bool
        and type(weights.get('step')) is int
        and isinstance(classes, list)
        and classes
        and all(isinstance(name, str) for name in classes)
    ):
        raise UserError(
            f'{path} is not as sam-jax-export writes it: its weights are {weights!r} and its '
            f'classes {classes!r}.'
        )
    if ema not in (None, weights['ema']):
        held = 'moving average' if weights['ema'] else 'weights without a moving average'
        raise UserError(f'ema is {ema}; {folder!r} holds the {held} alone.')
    try:
        preprocessing = Preprocessing.of_description(described.get('preprocessing'))
    except ValueError as e:
        raise UserError(f'{path} is not as sam-jax-export writes it: {e}.') from e
    config = settings.of_run(folder)
    try:
        settings.check(config)
        network = models.from_config(config.model, len(classes))
    except UserError as e:
        raise UserError(f'{path}: {e}') from e
    arrays = _arrays(os.path.join(folder, weights['file']), weights.get('sha256'))
    own = ('config', 'preprocessing', 'classes', 'weights')
    return Trained(
        config=config,
        variables=_variables(arrays, network, preprocessing, folder),
        preprocessing=preprocessing,
        classes=tuple(classes),
        result=read_json(folder, 'result.json'),
        step=weights['step'],
        ema=weights['ema'],
        origin={k: v for k, v in described.items() if k not in own},
        devices=tuple(devices or jax.local_devices()),
    )


def _arrays(path, wanted):
    """{name: array} of a file of weights with the wanted checksum."""
    from safetensors.numpy import load

    try:
        with open(path, 'rb') as file:
            content = file.read()
    except OSError as e:
        raise UserError(f'{path} cannot be read: {e.strerror}.') from e
    if checksum(content) != wanted:
        raise UserError(f'{path} is damaged, or not that of its config.json: the SHA-256 differs.')
    try:
        return load(content)
    except Exception as e:  # whatever safetensors finds wrong
        raise UserError(f'{path} cannot be read as safetensors: {first_line(e)}.') from e


def _variables(arrays, network, preprocessing, folder):
    """The variables of a network, of the arrays in a folder."""

    def init():
        images = preprocessing(jnp.zeros((1, *preprocessing.shape), jnp.uint8))
        return network.init(jax.random.key(0), images, train=False)

    wanted: dict[str, Any] = traverse_util.flatten_dict(jax.eval_shape(init), sep='/')
    begin = f'The weights in {folder!r} are not those of the network of its config.json'
    for name in sorted(wanted.keys() ^ arrays.keys()):
        where = 'is not among them' if name in wanted else 'is not of the network'
        raise UserError(f'{begin}: {name} {where}.')
    for name, array in sorted(arrays.items()):
        shape = wanted[name].shape
        if name == 'frozen/names' and array.ndim == 2:
            shape = (shape[0], array.shape[1])  # as long as the names are
        if array.shape != shape or _floating(array) != _floating(wanted[name]):
            raise UserError(
                f'{begin}: {name} is {array.dtype} {array.shape}, and must be '
                f'{wanted[name].dtype} {shape}.'
            )
        if not np.isfinite(array).all():
            raise UserError(f'The weights in {folder!r} are not finite: see {name}.')
    # Statistics, too, are of the type of the params, where that is float64.
    variables = {
        name: array.astype(network.param_dtype if _floating(array) else array.dtype)
        for name, array in arrays.items()
    }
    return {'batch_stats': {}, **traverse_util.unflatten_dict(variables, sep='/')}
