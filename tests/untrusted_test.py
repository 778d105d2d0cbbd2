"""Files that come from others run no code, write nothing elsewhere, and are unpacked to a limit."""

import gzip
import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import struct
import zipfile
import zlib

import h5py
import msgpack
import numpy as np
import pytest
from fuzzing import files as fuzzed
from helpers import ROOT

import sam_jax
from sam_jax import limits
from sam_jax.data import decode, files, huggingface, image_files, labels, pillow, records
from sam_jax.errors import UserError
from sam_jax.models import bpe, language_files, pretrained

# No code.


class Plant:
    """What makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.fixture
def plant(tmp_path):
    """A pickle that leaves a trace if it is read; at the end there must be none."""
    trace = tmp_path / 'trace'
    planted = pickle.dumps(Plant(trace))
    pickle.loads(planted)
    assert trace.exists()  # it works
    trace.unlink()
    yield planted
    assert not trace.exists()


def _zip(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as z:
        for name, content in members.items():
            z.writestr(name, content)
    return file.getvalue()


def _npy_of_objects(planted):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {'descr': '|O', 'fortran_order': False, 'shape': (1,)}
    )
    return head.getvalue() + planted


def _h5_of_objects(planted):
    file = io.BytesIO()
    with h5py.File(file, 'w') as f:
        f['a/a/text:0'] = planted.hex()
        f['a/a/kernel:0'] = np.void(planted)
        f.attrs['pickle'] = np.void(planted)
        f.attrs['layer_names'] = [planted.hex()]
    return file.getvalue()


def _msgpack(value):
    return msgpack.packb({'optimizer': {'target': {'params': {'a': value}}}, 'model_state': {}})


PLANTS = {
    'x.npz': lambda p: _zip(**{'images.npy': _npy_of_objects(p), 'labels.npy': p}),
    'npy.npz': _npy_of_objects,
    'pickle.npz': lambda p: p,
    'x.npy': _npy_of_objects,
    'pickle.safetensors': lambda p: p,
    'x.safetensors': lambda p: struct.pack('<Q', len(p)) + p,
    'x.h5': _h5_of_objects,
    'pickle.h5': lambda p: p,
    'torch.pt': lambda p: _zip(**{'archive/data.pkl': p, 'archive/version': b'3'}),
    'pytorch_model.bin': lambda p: p,
    'checkpoint_1': lambda p: p,
    'extension': lambda p: _msgpack(msgpack.ExtType(42, p)),
    'objects': lambda p: _msgpack(msgpack.ExtType(1, msgpack.packb(((1,), 'O', p)))),
    'scalar': lambda p: _msgpack(msgpack.ExtType(3, msgpack.packb(((), 'O', p)))),
    'archive.tar': lambda p: p,
}


@pytest.mark.parametrize('name', PLANTS)
def test_no_file_of_arrays_runs_code(name, plant, tmp_path):
    path = tmp_path / name
    path.write_bytes(PLANTS[name](plant))
    model, variables = fuzzed.network('own')
    readers = [
        lambda: pretrained.load(path, model, variables),
        lambda: labels.predicted(str(path), 'x', range(12), 3, True),
        lambda: files.idx_array(str(path)),
    ]
    if name.endswith('.npz'):
        readers.append(lambda: files.read_npz(str(path)))
    for read in readers:
        with pytest.raises(UserError):
            read()


def test_no_folder_runs_code(plant, tmp_path):
    """Of transformers' folder, of published weights, of a dataset of Hugging Face."""
    folder = tmp_path / 'transformers'
    folder.mkdir()
    for name in ('pytorch_model.bin', 'modeling.py', 'training_args.bin', 'tokenizer.pkl'):
        (folder / name).write_bytes(plant)
    config = fuzzed._language('opt')
    config |= {'auto_map': {'AutoModel': 'modeling.py'}, '_class': {'py/reduce': [plant.hex()]}}
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='holds no .safetensors'):
        language_files.load_folder(folder)
    published = tmp_path / 'published'
    shutil.copytree(fuzzed.PUBLISHED, published)
    (published / 'weights.safetensors').write_bytes(plant)
    said = json.loads((published / 'config.json').read_text())
    said['weights']['sha256'] = hashlib.sha256(plant).hexdigest()
    said['config']['!!python/object/apply:os.system'] = plant.hex()
    (published / 'config.json').write_text(json.dumps(said))
    with pytest.raises(UserError):
        sam_jax.load(published)
    del said['config']['!!python/object/apply:os.system']
    (published / 'config.json').write_text(json.dumps(said))
    with pytest.raises(UserError, match='cannot be read as safetensors'):
        sam_jax.load(published)


def test_no_table_runs_code(plant, tmp_path):
    """The extension types of Arrow that were pickles."""
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq

    named = {b'ARROW:extension:name': b'arrow.py_extension_type'}
    field = pa.field('image', pa.binary(), metadata={**named, b'ARROW:extension:metadata': plant})
    schema = pa.schema([field, pa.field('label', pa.int64())])
    for split in ('train', 'test'):
        table = pa.table([[fuzzed.encoded('png', size=(4, 4))], [0]], schema=schema)
        pq.write_table(table, tmp_path / f'{split}.parquet')
    try:
        huggingface.read_huggingface(str(tmp_path))
    except UserError:
        pass


def test_no_image_starts_a_program(plant, tmp_path, monkeypatch):
    """Pillow starts Ghostscript for PostScript, whatever a file is called."""
    monkeypatch.setattr('subprocess.Popen', None)
    postscript = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n%%EOF\n'
    for content in (postscript, b'P6 2 2 255\n' + bytes(12), plant):
        path = tmp_path / 'x.png'
        path.write_bytes(content)
        for of_files in (False, True):
            with pytest.raises(ValueError, match='no image of a known format'):
                image_files.read(str(path), (8, 8, 3), of_files)


FORBIDDEN = re.compile(
    r'\b(pickle|dill|joblib|cloudpickle|marshal|shelve|tarfile|extractall|unpack_archive'
    r'|unsafe_load|trust_remote_code|(Full|Unsafe)Loader|os\.system|popen'
    r'|allow_pickle=True|shell=True)\b|\b(yaml|torch)\.load\b|(?<![\w.])(eval|exec)\('
)


def test_no_module_can_run_code_of_data():
    modules = {path: path.read_text() for path in (ROOT / 'sam_jax').rglob('*.py')}
    assert not {
        str(path): FORBIDDEN.search(x) for path, x in modules.items() if FORBIDDEN.search(x)
    }
    assert FORBIDDEN.search('np.load(f, allow_pickle=True)') and FORBIDDEN.search('x = eval(y)')
    assert not FORBIDDEN.search('jax.eval(x); ast.literal_eval(y); allow_pickle=False')
    # Code is loaded from files that --config names alone.
    assert [path.name for path, x in modules.items() if 'exec_module' in x] == ['files.py']


# Nothing elsewhere.


def test_archives_write_nothing(tmp_path):
    inside = tmp_path / 'inside'
    inside.mkdir()
    arrays = {name: fuzzed._arrays()[name] for name in fuzzed._arrays()}
    content = io.BytesIO()
    np.savez(content, **arrays)
    with zipfile.ZipFile(content, 'a') as z:
        z.writestr('../outside.npy', b'x')
        z.writestr(f'{tmp_path}/absolute.npy', b'x')
    (inside / 'x.npz').write_bytes(content.getvalue())
    files.read_npz(str(inside))
    assert {'images', '../outside'} <= pretrained.read(inside / 'x.npz').keys()
    assert {p.name for p in tmp_path.rglob('*')} == {'inside', 'x.npz'}


def test_h5_reads_no_other_file(tmp_path):
    secret = tmp_path / 'secret'
    secret.write_bytes(bytes(400))
    with h5py.File(tmp_path / 'x.h5', 'w') as f:
        f.create_dataset('a/a/kernel:0', (100,), 'f4', external=[(str(secret), 0, 400)])
    with pytest.raises(UserError, match='a/a/kernel:0 is that of another file'):
        pretrained.read(tmp_path / 'x.h5')
    with h5py.File(tmp_path / 'x.h5', 'w') as f:
        f['a/a/kernel:0'] = h5py.ExternalLink(str(tmp_path / 'y.h5'), '/a')
    assert pretrained.read(tmp_path / 'x.h5') == {}


# Limits.


def _chunk(kind, content):
    return (
        struct.pack('>I', len(content))
        + kind
        + content
        + struct.pack('>I', zlib.crc32(kind + content))
    )


def _png_bomb(side=2**16):
    """Black pixels, `side` x `side`, in a few kilobytes of a file."""
    head = _chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 1, 0, 0, 0, 0))
    packed = zlib.compress(bytes(2**20), 9)
    return b'\x89PNG\r\n\x1a\n' + head + _chunk(b'IDAT', packed) + _chunk(b'IEND', b'')


def _jpeg_bomb():
    content = fuzzed.encoded('jpeg')
    at = content.index(b'\xff\xc0') + 5  # height and width of the frame
    return content[:at] + struct.pack('>HH', 65500, 65500) + content[at + 4 :]


BOMBS = {
    'png': _png_bomb,
    'jpeg': _jpeg_bomb,
    'gif': lambda: b'GIF89a' + struct.pack('<HH', 65535, 65535) + fuzzed.encoded('gif', 'P')[10:],
    'bmp': lambda: (lambda c: c[:18] + struct.pack('<ii', 50_000, 50_000) + c[26:])(
        fuzzed.encoded('bmp')
    ),
}


@pytest.mark.parametrize('form', BOMBS)
def test_images_of_too_many_pixels(form):
    with pytest.raises(ValueError, match='pixels'):
        pillow.decode(BOMBS[form]())


@pytest.mark.slow
@pytest.mark.parametrize('form', BOMBS)
def test_tensorflow_decodes_no_bomb_either(form):
    with pytest.raises(ValueError, match='pixels|content'):
        decode.center_crop(BOMBS[form](), 8)
    with pytest.raises(ValueError, match='pixels|content'):
        decode.random_crop(BOMBS[form](), 8, np.zeros(2, np.int32))


def test_packed_arrays_are_unpacked_to_a_limit(tmp_path, monkeypatch):
    (tmp_path / 'x.npz').write_bytes(fuzzed._npz(fuzzed._arrays(), packed=True))
    (tmp_path / 'y.npz').write_bytes(fuzzed._predictions())
    (tmp_path / 'z').write_bytes(gzip.compress(fuzzed._idx()))
    with h5py.File(tmp_path / 'x.h5', 'w') as f:  # 4 TiB that no byte is written of
        f.create_dataset('a/a/kernel:0', (2**40,), 'f4', chunks=True)
    monkeypatch.setattr(limits, 'free_host_memory', lambda: 100.0)
    for read in (
        lambda: files.read_npz(str(tmp_path / 'x.npz')),
        lambda: labels.predicted(str(tmp_path / 'y.npz'), 'x', range(12), 3, True),
        lambda: files.idx_array(str(tmp_path / 'z')),
        lambda: pretrained.read(tmp_path / 'x.npz'),
    ):
        with pytest.raises(UserError, match='GiB in memory, of which .* are free.'):
            read()
    with pytest.raises(UserError, match='GiB in memory, of which .* are allowed.'):
        pretrained.read(tmp_path / 'x.h5', 2**30)


def test_weights_may_be_some_times_the_model_s(tmp_path, monkeypatch):
    model, variables = fuzzed.network('own')
    monkeypatch.setattr(pretrained, 'LARGEST', 0)
    path = tmp_path / 'x.npz'
    np.savez_compressed(path, **fuzzed.foreign('own'))
    pretrained.load(path, model, variables)
    size = sum(x.nbytes for x in fuzzed.foreign('own').values())
    np.savez_compressed(path, **fuzzed.foreign('own'), more=np.zeros(pretrained.TIMES * size // 4))
    with pytest.raises(UserError, match='are allowed'):
        pretrained.load(path, model, variables)


# Folders.


def test_pipes_devices_and_links_are_no_images(tmp_path):
    for split in ('train', 'test'):
        for name in ('a', 'b'):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            (folder / 'x.png').write_bytes(fuzzed.encoded('png'))
    place = tmp_path / 'train' / 'a'
    (place / 'folder.png').mkdir()
    os.mkfifo(place / 'pipe.png')
    (place / 'device.png').symlink_to('/dev/zero')
    (place / 'nothing.png').symlink_to('nowhere')
    (place / 'link.png').symlink_to('x.png')
    (place / 'circle').symlink_to('..')
    source = records.FolderStream().open(str(tmp_path))[0]
    read, refused = 0, []
    for i in range(len(source)):
        try:
            read += bool(source[i][0])
        except UserError as e:
            refused.append(str(e))
    assert read == 3 and len(refused) == 3
    assert sum('it is no file' in message for message in refused) == 2
    for name in ('pipe.png', 'device.png'):
        with pytest.raises(ValueError, match='it is no file'):
            image_files.read(str(place / name), (8, 8, 3), False)


def test_a_folder_that_leads_in_circles(tmp_path):
    for i in range(4):
        (tmp_path / f'circle{i}').symlink_to('.')
    with pytest.raises(UserError, match='holds the files none'):
        huggingface.read_huggingface(str(tmp_path))


# Odd images.


ODD = {
    'a pixel': lambda: fuzzed.encoded('png', 'RGB', (1, 1)),
    'a row': lambda: fuzzed.encoded('png', 'RGB', (5000, 1)),
    'two colours': lambda: fuzzed.encoded('png', '1'),
    'grey with alpha': lambda: fuzzed.encoded('png', 'LA'),
    '16 bits': lambda: fuzzed.encoded('png', 'I;16'),
    'palette': lambda: fuzzed.encoded('png', 'P'),
    'CMYK': lambda: fuzzed.encoded('jpeg', 'CMYK'),
    'animated': lambda: fuzzed._images()['gif-animated'],
}


@pytest.mark.parametrize('kind', ODD)
def test_odd_images(kind, tmp_path):
    (tmp_path / 'x').write_bytes(ODD[kind]())
    for shape in ((8, 8, 3), (8, 8, 1)):
        image = image_files.read(str(tmp_path / 'x'), shape, False)
        assert image.shape == shape and image.dtype == np.uint8


@pytest.mark.parametrize(
    'content', [b'', b'x', b'\x89PNG\r\n\x1a\n', b'\xff\xd8', b'GIF89a', b'BM']
)
def test_no_images(content, tmp_path):
    (tmp_path / 'x').write_bytes(content)
    with pytest.raises(ValueError) as e:
        image_files.read(str(tmp_path / 'x'), (8, 8, 3), False)
    assert str(e.value) and '\n' not in str(e.value)


# What the fuzz has found.


def _changed(folder, changes):
    for name, content in changes.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_odd_arrays_of_weights():
    model, variables = fuzzed.network('timm-vit')
    whole = fuzzed.foreign('timm-vit')
    for name, array, word in (
        ('patch_embed.proj.weight', np.zeros(5, np.float32), 'patch_embed.proj.weight has shape'),
        ('blocks.0.attn.qkv.bias', np.zeros(5, np.float32), 'The weights'),
        ('norm.weight', np.array(['x'] * 32), 'hold <U1 in norm.weight'),
        ('norm.weight', np.zeros(32, np.complex64), 'hold complex64 in norm.weight'),
        ('norm.weight', {'a': 1}, 'hold dict in norm.weight'),
    ):
        with pytest.raises(UserError, match=word):
            pretrained.load({**whole, name: array}, model, variables)


def test_odd_predictions(tmp_path):
    for array in (np.zeros(36), np.array('x'), np.full((12, 3), 'x'), -np.ones((12, 3))):
        np.savez(tmp_path / 'x.npz', probabilities=array, dataset='x')
        with pytest.raises(UserError, match='probabilities'):
            labels.predicted(str(tmp_path / 'x.npz'), 'x', range(12), 3, True)


def test_odd_configs_of_language_models(tmp_path):
    whole = fuzzed._language('opt')
    for config in (
        *('', '[]', '"x"', '[' * 100_000),
        *({**whole, 'hidden_size': size} for size in (None, 'x', 0, -1, 1e300, 10**30, 7)),
        *({**whole, key: None} for key in ('vocab_size', 'do_layer_norm_before', 'model_type')),
        {**whole, 'model_type': ['opt']},
    ):
        _changed(tmp_path, {'config.json': config})
        with pytest.raises(UserError, match='config.json'):
            language_files.load_folder(tmp_path)


def test_odd_vocabularies(tmp_path):
    for content in ('', '[]', '{"a": "b"}', '[' * 100_000):
        _changed(tmp_path, {'vocab.json': content, 'merges.txt': ''})
        for read in (fuzzed._read_pairs, lambda folder: bpe.read(folder, 514)):
            with pytest.raises(UserError, match='vocab.json'):
                read(str(tmp_path))


def test_odd_features_of_tables(tmp_path):
    pa = pytest.importorskip('pyarrow')
    columns = {'image': pa.array([b'x'], pa.binary()), 'label': pa.array([0])}
    table = pa.table(columns)
    named = {'_type': 'ClassLabel', 'names': 3}
    for said in (
        b'{',
        b'[]',
        b'{"info": []}',
        json.dumps({'info': {'features': {'label': named}}}),
    ):
        with pytest.raises(UserError, match='x.parquet'):
            huggingface._columns(
                table.replace_schema_metadata({'huggingface': said}).schema, 'x.parquet'
            )
    absent = json.dumps({'info': {'features': {'other': {'_type': 'ClassLabel'}}}})
    table = table.replace_schema_metadata({'huggingface': absent})
    assert huggingface._columns(table.schema, 'x.parquet') == ('image', 'label', ())
