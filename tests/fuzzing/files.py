"""Files that come from others: valid ones with bits, lengths or values changed.

Each form has a valid file and a reader, which may raise a UserError of one sentence, or of images a
ValueError with the reason. Damage is of bytes, or of values of JSON and arrays before they are
written.
"""

import copy
import functools
import gzip
import io
import json
import os
import pathlib
import resource
import struct
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.serialization
import flax.traverse_util
import h5py
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save as save_safetensors

import sam_jax
from fuzzing import OUTCOMES, Fault, check_sentence
from sam_jax import models, settings
from sam_jax.data import files, huggingface, image_files, labels
from sam_jax.errors import UserError
from sam_jax.language import tokenizers
from sam_jax.models import bpe, formats, language_files, pretrained
from sam_jax.settings import schema

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MORE = 2**20  # KiB that one file may take at most
PUBLISHED = ROOT / 'published' / 'digits_sam'

# Damages.

_place = st.floats(0, 1)
BYTES = st.one_of(
    st.tuples(st.just('flip'), _place, st.integers(0, 7)),
    st.tuples(st.just('cut'), _place),
    st.tuples(st.just('set'), _place, st.binary(min_size=1, max_size=8)),
    st.tuples(
        st.just('set'),
        st.integers(0, 64),
        st.sampled_from([b'\xff' * 4, b'\x7f\xff\xff\xff', b'\0' * 4, b'\xff' * 8, b'\0\0\1\0']),
    ),
    st.tuples(st.just('flip'), st.integers(0, 200), st.integers(0, 7)),
    st.tuples(st.just('insert'), _place, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just('drop'), _place, st.integers(1, 50)),
    st.tuples(st.just('double'), _place),
)


def damaged(content: bytes, damages: list[tuple]) -> bytes:
    """Returns a file's bytes with damages, one after the other."""
    for kind, place, *rest in damages:
        at = place if isinstance(place, int) else int(place * len(content))
        at = min(at, max(len(content) - 1, 0))
        if kind == 'flip' and content:
            content = content[:at] + bytes([content[at] ^ 1 << rest[0]]) + content[at + 1 :]
        elif kind == 'cut':
            content = content[:at]
        elif kind == 'set':
            content = content[:at] + rest[0] + content[at + len(rest[0]) :]
        elif kind == 'insert':
            content = content[:at] + rest[0] + content[at:]
        elif kind == 'drop':
            content = content[:at] + content[at + rest[0] :]
        elif kind == 'double':
            content = content + content[at:]
    return content


ODD = (None, True, -1, 0, 1, 2.5, 10**30, '', 'x', 'nan', 'é' * 50, [], [1], [[]], {}, {'a': 1})
VALUES = st.lists(
    st.tuples(
        st.sampled_from(['set', 'set', 'set', 'drop', 'add']),
        st.integers(0, 10_000),
        st.integers(0, len(ODD) - 1),
    ),
    min_size=1,
    max_size=3,
)


def _nodes(tree, path=()):
    yield path
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield from _nodes(value, (*path, key))


def changed(tree: Any, changes: list[tuple]) -> Any:
    """Returns a tree of JSON with other values at some of its places."""
    tree = copy.deepcopy(tree)
    for kind, place, value in changes:
        nodes = list(_nodes(tree))
        path = nodes[place % len(nodes)]
        if not path:
            tree = ODD[value] if kind == 'set' and place % 7 == 0 else tree
            continue
        inside = functools.reduce(lambda t, key: t[key], path[:-1], tree)
        if kind == 'set':
            inside[path[-1]] = ODD[value]
        elif kind == 'drop':
            del inside[path[-1]]
        elif isinstance(inside, dict):
            inside[f'{path[-1]}x'] = ODD[value]
        else:
            inside.append(ODD[value])
    return tree


# Images.


@functools.cache
def _picture():
    rows = np.add.outer(np.arange(20), np.arange(30)) * 5
    return np.stack([rows, rows // 2, 255 - rows], -1).astype(np.uint8)


def encoded(form: str, mode: str = 'RGB', size: tuple = (30, 20), **options) -> bytes:
    """Returns an image file of Pillow's."""
    file = io.BytesIO()
    Image.fromarray(_picture()).resize(size).convert(mode).save(file, form, **options)
    return file.getvalue()


@functools.cache
def _images():
    return {
        'png': encoded('png'),
        'png-palette': encoded('png', 'P'),
        'png-interlaced': encoded('png', 'RGBA', (9, 7)),
        'jpeg': encoded('jpeg'),
        'jpeg-progressive': encoded('jpeg', progressive=True, quality=60),
        'jpeg-cmyk': encoded('jpeg', 'CMYK'),
        'gif': encoded('gif', 'P'),
        'gif-animated': encoded(
            'gif', 'P', save_all=True, append_images=[Image.new('P', (30, 20), i) for i in range(3)]
        ),
        'bmp': encoded('bmp'),
        'webp': encoded('webp', lossless=True),
    }


def _read_image(path):
    for shape, of_files in (((8, 8, 3), False), ((8, 8, 1), False), ((8, 8, 3), True)):
        pixels = image_files.read(path, shape, of_files)
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise Fault(f'an image {pixels.dtype} {pixels.shape}')


# Datasets.


def _arrays():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (12, 4, 4), np.uint8)
    classes = np.arange(12) % 3
    return {'images': images, 'labels': classes, 'test_images': images, 'test_labels': classes}


def _npz(arrays, **options):
    file = io.BytesIO()
    (np.savez_compressed if options else np.savez)(file, **arrays)
    return file.getvalue()


def _idx():
    images = _arrays()['images']
    return bytes([0, 0, 8, 3]) + struct.pack('>3I', *images.shape) + images.tobytes()


def _predictions():
    probabilities = np.full((12, 3), 1 / 3, np.float32)
    return _npz({'probabilities': probabilities, 'dataset': np.array('x')})


def _read_labels(path):
    relabel = labels.predicted(path, 'x', range(12), 3, True)
    table = relabel(np.arange(12), np.zeros(12, np.int32))
    if table.shape != (12, 3) or not np.isfinite(table).all():
        raise Fault(f'labels {table.shape}')


def _table(form):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{'bytes': encoded('png', size=(4, 4)), 'path': None}] * 6
    features = {'image': {'_type': 'Image'}, 'label': {'_type': 'ClassLabel', 'names': ['a', 'b']}}
    table = pa.table({'image': images, 'label': [0, 1] * 3})
    said = json.dumps({'info': {'features': features}})
    table = table.replace_schema_metadata({'huggingface': said})
    file = io.BytesIO()
    if form == 'parquet':
        pq.write_table(table, file)
    else:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return file.getvalue()


def _read_table(path):
    folder = os.path.dirname(path)
    os.link(path, os.path.join(folder, f'test{os.path.splitext(path)[1]}'))
    os.rename(path, os.path.join(folder, f'train{os.path.splitext(path)[1]}'))
    train, test, names = huggingface.read_huggingface(folder)
    if train.images.dtype != np.uint8 or len(train) != len(test) or not isinstance(names, tuple):
        raise Fault('a table')


# Weights.

NETWORKS = {
    'reference': (formats.REFERENCE, 'wrn10_1'),
    'keras': (formats.KERAS, 'efficientnet-tiny'),
    'timm': (formats.TIMM, 'efficientnet-tiny'),
    'timm-vit': (formats.TIMM_VIT, 'vit-tiny4'),
    'transformers-vit': (formats.TRANSFORMERS_VIT, 'vit-tiny4'),
    'big-vision': (formats.BIG_VISION, 'vit-tiny4'),
    'own': (formats.OWN, 'lenet5'),
}


@functools.cache
def network(name: str) -> tuple[Any, dict]:
    """Returns (model, its variables of zeros) of one of NETWORKS."""
    model = models.create_model(NETWORKS[name][1], 4)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    return model, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@functools.cache
def foreign(name: str) -> dict[str, np.ndarray]:
    """Returns {foreign name: array} as a file of another codebase has it."""
    form, _ = NETWORKS[name]
    model, variables = network(name)
    found = {}
    for path, x in flax.traverse_util.flatten_dict(variables, sep='/').items():
        if form.layout is formats.TIMM.layout and path.endswith('/kernel'):
            x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
        if form is formats.REFERENCE and '_depthwise/kernel' in path:
            x = x.swapaxes(2, 3)
        found[path if form is formats.OWN else form.name(model, path)] = np.ascontiguousarray(x)
    if form is formats.TIMM_VIT:
        for leaf in ('weight', 'bias'):
            for block in (0, 1):
                parts = [
                    found.pop(f'blocks.{block}.attn.{p}.{leaf}') for p in ('query', 'key', 'value')
                ]
                found[f'blocks.{block}.attn.qkv.{leaf}'] = np.concatenate(parts)
    return found


def _odd_array(array, how):
    """An array of another type or shape."""
    return (
        lambda: array.astype(np.float64),
        lambda: array.astype(np.float16),
        lambda: array.astype(np.int8),
        lambda: array.astype(np.complex64),
        lambda: array.astype('S3'),
        lambda: array.astype('U3'),
        lambda: array.astype(bool),
        lambda: array.ravel(),
        lambda: array[None],
        lambda: array.T,
        lambda: array[..., :0],
        lambda: array[..., :1],
        lambda: np.zeros((), np.float32),
        lambda: np.zeros(7, np.float32),
        lambda: array * np.nan,
        lambda: array.astype('datetime64[s]'),
        lambda: np.zeros(array.shape, [('a', 'f4'), ('b', 'i2')]),
    )[how % 17]()


ARRAYS = st.lists(
    st.tuples(
        st.sampled_from(['odd', 'odd', 'drop', 'rename', 'add']),
        st.integers(0, 999),
        st.integers(0, 99),
    ),
    min_size=1,
    max_size=3,
)


def odd_arrays(arrays: dict, changes: list[tuple]) -> dict:
    """Returns arrays by name, some of them others."""
    arrays = dict(arrays)
    for kind, place, how in changes:
        if not arrays:
            break
        name = sorted(arrays)[place % len(arrays)]
        if kind == 'odd':
            arrays[name] = _odd_array(arrays[name], how)
        elif kind == 'drop':
            del arrays[name]
        elif kind == 'rename':
            arrays[f'{name}x'] = arrays.pop(name)
        else:
            arrays[f'{name}{"_.-"[how % 3]}x'] = _odd_array(arrays[name], how)
    return arrays


def _h5(arrays):
    file = io.BytesIO()
    with h5py.File(file, 'w') as f:
        for name, x in arrays.items():
            layer, _, leaf = name.rpartition('/')
            x = (
                x
                if x.dtype.kind not in 'UM'
                else x.astype('S20')
                if x.dtype.kind == 'U'
                else x.view('i8')
            )
            f[f'{layer or "x"}/{layer or "x"}/{leaf}:0'] = x
    return file.getvalue()


def _msgpack(arrays):
    params = {k: x for k, x in arrays.items() if x.dtype.kind in 'biufc'}
    statistics = {k: x for k, x in params.items() if k.endswith(('/mean', '/var'))}
    tree = flax.traverse_util.unflatten_dict(
        {k: x for k, x in params.items() if k not in statistics}, sep='/'
    )
    state: dict = {}
    for name, x in statistics.items():
        module, _, leaf = name.rpartition('/')
        state.setdefault(f'/{module}', {})[leaf] = x
    return flax.serialization.msgpack_serialize(
        {'optimizer': {'target': {'params': tree}, 'state': {}}, 'model_state': state}
    )


def _safetensors(arrays):
    return save_safetensors({k: x for k, x in arrays.items() if x.dtype.kind in 'biuf'})


WRITERS: dict[str, Callable[[dict], bytes]] = {
    '.npz': _npz,
    '.safetensors': _safetensors,
    '.h5': _h5,
    '': _msgpack,
}


def _read_weights(name, path):
    model, variables = network(name)
    found = pretrained.load(path, model, variables)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, found, variables)
    if not all(jax.tree.leaves(same)):
        raise Fault('weights of other shapes')


# Folders of JSON.


@functools.cache
def _run_config():
    config = settings.default_config()
    schema.set_model(config, 'wrn10_1')
    return {'config': settings.jsonable(config), 'versions': {}, 'device_count': 1}


def _read_run(folder):
    settings.check(settings.of_run(folder))


def _read_published(folder):
    model = sam_jax.load(folder)
    rows = model.predict(np.zeros((2, *model.preprocessing.shape), np.uint8))
    if rows.shape != (2, len(model.classes)) or not np.isfinite(rows).all():
        raise Fault(f'predictions {rows.shape}')
    if not all(isinstance(fact, str) for fact in model.facts.values()):
        raise Fault('facts')


def _language(kind):
    common = {'vocab_size': 40, 'max_position_embeddings': 8, 'hidden_size': 8}
    common |= {'num_hidden_layers': 1, 'num_attention_heads': 2}
    return common | {'model_type': kind, 'ffn_dim' if kind == 'opt' else 'intermediate_size': 16}


def _read_language(folder):
    model, _ = language_files.load_folder(folder)
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), int)))


@functools.cache
def _language_weights(kind):
    model = language_files.model_of(_language(kind), kind)
    form = formats.TRANSFORMERS_OPT if kind == 'opt' else formats.TRANSFORMERS_BERT
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), int)))
    flat = flax.traverse_util.flatten_dict(shapes, sep='/')
    return save_safetensors(
        {
            form.name(model, path): np.zeros(x.shape[::-1] if 'kernel' in path else x.shape, 'f4')
            for path, x in flat.items()
        }
    )


def _read_bpe(folder):
    bpe.read(folder, 514)('some text')


def _read_pairs(folder):
    tokenizers.BytePairs(f'{folder}/vocab.json', f'{folder}/merges.txt').encode('some text')


class Form(NamedTuple):
    """A kind of file.

    Attributes:
      name: that a reader sees.
      content: returns a valid one.
      read: takes its path.
      json: {name: content} of the JSON files of a folder, which the reader takes.
      arrays: what a file of weights holds; see NETWORKS.
    """

    name: str
    read: Callable[[str], Any]
    content: Callable[[], bytes] | None = None
    json: Callable[[], dict[str, Any]] | None = None
    arrays: str = ''


def _published_files():
    return {
        name: json.loads((PUBLISHED / name).read_text()) for name in ('config.json', 'result.json')
    }


def _vocabulary():
    return {'vocab.json': bpe.of_bytes()}


def _forms():
    found = {
        f'image-{name}': Form(
            f'x.{name.partition("-")[0]}', _read_image, lambda name=name: _images()[name]
        )
        for name in _images()
    }
    found |= {
        'idx': Form('x', files.idx_array, _idx),
        'idx.gz': Form('x.gz', files.idx_array, lambda: gzip.compress(_idx())),
        'npz': Form('x.npz', files.read_npz, lambda: _npz(_arrays())),
        'npz-packed': Form('x.npz', files.read_npz, lambda: _npz(_arrays(), packed=True)),
        'labels': Form('x.npz', _read_labels, _predictions),
        'parquet': Form('x.parquet', _read_table, lambda: _table('parquet')),
        'arrow': Form('x.arrow', _read_table, lambda: _table('arrow')),
        'run': Form('config.json', _read_run, json=lambda: {'config.json': _run_config()}),
        'published': Form('config.json', _read_published, json=_published_files),
        'opt': Form('config.json', _read_language, json=lambda: {'config.json': _language('opt')}),
        'bert': Form(
            'config.json', _read_language, json=lambda: {'config.json': _language('bert')}
        ),
        'clip-vocabulary': Form('vocab.json', _read_bpe, json=_vocabulary),
        'gpt2-vocabulary': Form('vocab.json', _read_pairs, json=_vocabulary),
    }
    for name in NETWORKS:
        for suffix in WRITERS:
            read = functools.partial(_read_weights, name)
            found[f'weights-{name}{suffix or ".msgpack"}'] = Form(f'x{suffix}', read, arrays=name)
    return found


FORMS: dict[str, Form] = _forms()


@st.composite
def cases(draw) -> dict:
    """A case: {'form', 'damages' of bytes, 'changes' of values}."""
    name = draw(st.sampled_from(sorted(FORMS)))
    form = FORMS[name]
    case: dict = {'form': name, 'damages': [], 'changes': []}
    whole = form.content is None and draw(st.booleans())
    if whole:
        case['changes'] = draw(VALUES if form.json else ARRAYS)
    else:
        case['damages'] = draw(st.lists(BYTES, min_size=1, max_size=3))
    if form.json:
        case['file'] = draw(st.sampled_from(sorted(form.json())))
    return case


def write(case: dict, folder: str) -> str:
    """Writes the damaged file of a case; returns what its reader takes."""
    form = FORMS[case['form']]
    path = os.path.join(folder, form.name)
    if form.json:
        for name, tree in form.json().items():
            if name == case['file']:
                tree = changed(tree, case['changes'])
            content = json.dumps(tree).encode()
            if name == case['file']:
                content = damaged(content, case['damages'])
            pathlib.Path(folder, name).write_bytes(content)
        if case['form'] == 'published':
            os.link(PUBLISHED / 'weights.safetensors', f'{folder}/weights.safetensors')
        if case['form'] in ('opt', 'bert'):
            weights = _language_weights(case['form'])
            pathlib.Path(folder, 'model.safetensors').write_bytes(weights)
        pathlib.Path(folder, 'merges.txt').write_text('#version: 0.2\ns o\n')
        return folder
    if form.arrays:
        suffix = os.path.splitext(form.name)[1]
        content = WRITERS[suffix](odd_arrays(foreign(form.arrays), case['changes']))
    else:
        assert form.content
        content = form.content()
    pathlib.Path(path).write_bytes(damaged(content, case['damages']))
    return path


def check(case: dict) -> None:
    """Reads the file of a case: a valid result, one sentence, and not much memory.

    Raises:
      Fault: none of it.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(prefix='fuzz-') as folder:
        path = write(case, folder)
        image = case['form'].startswith('image')
        try:
            FORMS[case['form']].read(path)
            OUTCOMES['read'] += 1
        except UserError as e:
            check_sentence(str(e))
            OUTCOMES['refused'] += 1
        except ValueError as e:
            if not image or type(e) is not ValueError or '\n' in str(e):
                raise
            OUTCOMES['refused'] += 1
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if more > MORE:
        raise Fault(f'takes {more / 2**20:.1f} GiB')
