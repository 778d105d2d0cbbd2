"""Weights from files: the SAM paper's, Keras, timm, transformers, big_vision, and our own.

Files are read whole, compared with the model name by name and shape by shape, and only then used.
What the parameters are called there stands in `formats`.
"""

import os
import pathlib
import re
from typing import Any

import flax
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import limits, models
from sam_jax.errors import UserError, first_line
from sam_jax.models.formats import FORMATS

# A file may have so many times the bytes of a model, for the state of its optimizer and a moving
# average, and these besides.
TIMES, LARGEST = 16, 2**26

# The names of files of weights in the folders of sam-jax-export.
EXPORTED = ('weights.safetensors', 'model.safetensors')


def load_reference_checkpoint(
    source: str | os.PathLike | dict[str, np.ndarray],
    model_name: str,
    num_classes: int,
    seed: int = 0,
    image_size: int = 32,
    **options,
) -> dict[str, Any]:
    """Reads a checkpoint of the SAM paper's code, or of any other format known here.

    Args:
      source: path of a file or of a folder of checkpoints, or a flat dict {foreign name: array}.
      model_name, num_classes, **options: as of `create_model`.
      seed: of the head, where the file's has another number of classes.
      image_size: side of the images, for models that learn a position of each patch.

    Returns:
      {'params': ..., 'batch_stats': ...} of NumPy arrays.

    Raises:
      UserError: no such file, a file of no known format, or of another architecture; names the
        first parameter that differs, and both shapes.
    """
    model = models.create_model(model_name, num_classes, **options)
    shapes = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0), jnp.zeros((1, image_size, image_size, 3)), train=False
        )
    )
    # Zeros for all that comes from the file; only the head may have to be made.
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    kernel = shapes['params']['head']['kernel']
    variables['params']['head']['kernel'] = model.head_init(
        jax.random.key(seed), kernel.shape, kernel.dtype
    )
    return load(source, model, variables)


def load(
    source: str | os.PathLike | dict[str, np.ndarray], model: nn.Module, variables: dict[str, Any]
) -> dict[str, Any]:
    """Returns `variables` of `model` with the weights of a file in their place.

    The head is kept as initialised if the file's has another number of classes.

    Args:
      source: path of a file or of a folder of checkpoints, or a flat dict {foreign name: array}.
      model: module of `create_model`, or `clip.CLIP`.
      variables: its initialised variables; gives shapes and dtypes.

    Raises:
      UserError: as `load_reference_checkpoint`.
    """
    ours = {
        k: np.asarray(v)
        for k, v in flax.traverse_util.flatten_dict(
            jax.device_get(dict(variables)), sep='/'
        ).items()
    }
    most = LARGEST + TIMES * sum(x.nbytes for x in ours.values())
    arrays = dict(source) if hasattr(source, 'items') else read(source, most)
    where = 'The weights' if hasattr(source, 'items') else f'The weights in {os.fspath(source)}'
    _check_numbers(arrays, where)
    readings = [
        (
            form,
            _arranged(form, model, ours, arrays),
            {form.name(model, path): path for path in ours},
        )
        for form in FORMATS
        if isinstance(model, tuple(form.modules))
    ]
    if not any(names.keys() & found.keys() for _, found, names in readings):
        kind = type(model).__name__
        raise UserError(
            f'{where} are not those of {kind}: none of their names is known; the '
            f'first is {min(arrays, default="(nothing)")!r}.'
        )
    form, arrays, names = max(readings, key=lambda r: len(r[2].keys() & r[1].keys()))
    head = {name for name, path in names.items() if path.startswith('params/head/')}
    values = {}
    for name, path in sorted(names.items()):
        if name not in arrays:
            raise UserError(f'{where} lack {name}, {ours[path].shape}: another architecture.')
        array = np.asarray(arrays[name])
        try:
            array = form.layout(path, array, ours[path].ndim)
        except (ValueError, IndexError):
            pass  # of other axes, so of another shape
        if array.shape == ours[path].shape:
            values[path] = array.astype(ours[path].dtype)
        elif name not in head or array.shape[:-1] != ours[path].shape[:-1]:
            raise UserError(
                f'{where} are of another architecture: {name} has shape '
                f'{array.shape}, the model {ours[path].shape}.'
            )
    surplus = sorted(arrays.keys() - names.keys())
    if surplus:
        raise UserError(
            f'{where} are of another architecture: the model has no {surplus[0]}, '
            f'{np.shape(arrays[surplus[0]])}.'
        )
    if not all(names[name] in values for name in head):
        values = {path: v for path, v in values.items() if not path.startswith('params/head/')}
    found = flax.traverse_util.unflatten_dict({**ours, **values}, sep='/')
    return {**dict.fromkeys(variables, {}), **found}  # a network may have no statistics


def _check_numbers(arrays, where):
    for name, x in arrays.items():
        dtype = getattr(x, 'dtype', None)
        # Two bytes without a type are what NumPy makes of a bfloat16.
        known = dtype is not None and (dtype == np.dtype('V2') or jnp.issubdtype(dtype, np.number))
        if not known or jnp.issubdtype(dtype, np.complexfloating):
            raise UserError(
                f'{where} hold {dtype or type(x).__name__} in {name}; weights are numbers.'
            )


def _arranged(form, model, ours, arrays):
    """What `Format.arrange` makes of a file; nothing of one whose arrays it cannot take."""
    try:
        return form.arrange(model, ours, arrays)
    except (ValueError, IndexError, TypeError):  # of other axes or types than such a file has
        return {}


def _number(path):
    return int(path.name.rpartition('_')[2])


def find(path: str | os.PathLike) -> pathlib.Path:
    """Returns the file of weights at a path.

    Of a folder it is the file that sam-jax-export wrote there, else the `checkpoint_N` with the
    highest N.

    Raises:
      UserError: there is none.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        found = [p for p in path.iterdir() if re.fullmatch(r'checkpoint_\d+', p.name)]
        exported = [path / name for name in EXPORTED if (path / name).is_file()]
        if not found and not exported:
            raise UserError(f'The folder {path} holds no checkpoint_N and no {EXPORTED[0]}.')
        path = exported[0] if exported else max(found, key=_number)
    if not path.is_file():
        raise UserError(f'{path}: no such file or folder of weights.')
    return path


def read(path: str | os.PathLike, most: float | None = None) -> dict[str, np.ndarray]:
    """Returns the arrays of a file as {name: array}.

    Args:
      path: .npz, .safetensors, .h5, or msgpack of flax 0.2, or a folder, see `find`.
      most: bytes that they may take; default what this machine has free.

    Raises:
      UserError: it cannot be read, or its arrays take more.
    """
    path = find(path)
    reader = {
        '.npz': _read_npz,
        '.safetensors': _read_safetensors,
        '.h5': _read_h5,
        '.hdf5': _read_h5,
    }.get(path.suffix, _read_msgpack)
    limits.check_unpacked(f'{path}', path.stat().st_size, most)
    try:
        return reader(path, most)
    except UserError:
        raise
    except ImportError as e:
        raise UserError(f'To read {path} install {e.name}.') from e
    except Exception as e:  # whatever the libraries find wrong
        raise UserError(f'{path} cannot be read as {reader.__name__[6:]}: {first_line(e)}.') from e


def _read_npz(path, most):
    # Opened here: of a damaged file NumPy leaves its own open.
    with open(path, 'rb') as opened, np.load(opened, allow_pickle=False) as f:
        size = sum(member.file_size for member in f.zip.infolist())
        limits.check_unpacked(f'{path}, unpacked,', size, most)
        return dict(f)


def _read_safetensors(path, most):
    del most
    from safetensors.numpy import load_file

    # Counters of steps say nothing about the weights.
    return {k: v for k, v in load_file(path).items() if not k.endswith('num_batches_tracked')}


def _read_h5(path, most):
    """{'layer/kind or number of the weight': array}, from the layout of Keras 2 or 3."""
    import h5py

    arrays, size = {}, 0

    def visit(name, item):
        nonlocal size
        if not isinstance(item, h5py.Dataset) or 'optimizer' in name:
            return
        if item.external or item.is_virtual:
            raise UserError(f'{path}: {name} is that of another file, which is not read.')
        size += item.nbytes
        limits.check_unpacked(f'{path}, unpacked,', size, most)
        parts = name.split('/')
        if len(parts) < 2:
            raise UserError(f'{path}: {name} is of no layer; Keras writes LAYER/LAYER/WEIGHT.')
        if parts[-2] == 'vars':  # Keras 3: layers/<class>_<number>/vars/<number>
            layer, leaf = parts[-3], parts[-1]
        else:  # Keras 2: <layer>/<layer>/<kind>:0
            layer, leaf = parts[-2], parts[-1].partition(':')[0]
        if not layer.startswith('normalization'):  # of the input; the pipeline's task here
            arrays[f'{layer}/{leaf.replace("depthwise_kernel", "kernel")}'] = np.asarray(item)

    with h5py.File(path) as f:
        f.visititems(visit)
    return arrays


def _read_msgpack(path, most):
    del most
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    if 'optimizer' in tree:  # what the paper's trainer writes
        params, state = tree['optimizer']['target']['params'], tree['model_state']
    else:  # (model, state): what its fine-tuning reads
        params, state = tree['0']['params'], tree['1']
    arrays = flax.traverse_util.flatten_dict(params, sep='/')
    for module, leaves in state.items():
        arrays.update({f'{module.strip("/")}/{leaf}': x for leaf, x in leaves.items()})
    return arrays
