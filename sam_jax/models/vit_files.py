"""What files of Vision Transformers hold in another form than a renamed and transposed one.

Each function takes the arrays of a whole file, {foreign name: array}, and returns them so that
every one of ours has one of its own there: queries, keys and values apart, a class token with its
position added to it, and positions of as many patches as the model has.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.models.layers import Network

Arrays = dict[str, np.ndarray]

# The numbers of modules in files of before flax linen -> those of today.
_LINEN = {'LayerNorm_2': 'LayerNorm_1', 'MultiHeadDotProductAttention_1': '', 'MlpBlock_3': ''}


def of_timm(model: Network, ours: Arrays, arrays: Arrays) -> Arrays:
    """Returns timm's arrays with `attn.qkv` in three."""
    del model
    found = {}
    for name, x in arrays.items():
        head, qkv, leaf = name.partition('.attn.qkv.')
        if qkv:
            for part, values in zip(('query', 'key', 'value'), np.split(x, 3)):
                found[f'{head}.attn.{part}.{leaf}'] = values
        else:
            found[name] = x
    return _with_positions(found, ours, 'cls_token', 'pos_embed', bicubic)


def of_transformers(model: Network, ours: Arrays, arrays: Arrays) -> Arrays:
    """Returns the arrays of Hugging Face's transformers."""
    del model
    names = 'vit.embeddings.cls_token', 'vit.embeddings.position_embeddings'
    return _with_positions(dict(arrays), ours, *names, bicubic)


def of_big_vision(model: Network, ours: Arrays, arrays: Arrays) -> Arrays:
    """Returns the params of big_vision, or of vision_transformer, whatever else a file holds.

    Of its forms: with the optimizer or without, scanned blocks as one array with a leading axis,
    modules numbered as before linen, positions in a module, bfloat16 as two bytes without a type.
    """
    del model
    for prefix in ('params/', 'opt/target/'):
        inside = {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
        arrays = inside or arrays
    found = {}
    for name, x in arrays.items():
        x = x.view(jnp.bfloat16) if x.dtype == np.dtype('V2') else x
        name = re.sub('^Transformer/(posembed_input/)?pos_embedding$', 'pos_embedding', name)
        scanned = re.fullmatch('Transformer/encoderblock/(.+)', name)
        if scanned:
            blocks = {f'Transformer/encoderblock_{i}/{scanned[1]}': y for i, y in enumerate(x)}
            found.update(blocks)
        else:
            found[name] = x
    if any('/MlpBlock_3/' in name for name in found):
        found = {_numbered_as_linen(name): x for name, x in found.items()}
    return _with_positions(found, ours, 'cls', 'pos_embedding', bilinear)


def _numbered_as_linen(name):
    for old, new in _LINEN.items():
        name = name.replace(f'/{old}/', f'/{new or old[:-1] + "0"}/')
    return name


def _with_positions(arrays, ours, token, positions, resize: Callable):
    """Adds the class token's position to it, and fits the others to the model's grid."""
    if token in arrays:
        arrays[token] = arrays[token].reshape(-1)
    if positions not in arrays:
        return arrays
    table = arrays[positions].reshape(-1, arrays[positions].shape[-1])
    if token in arrays and math.isqrt(len(table)) ** 2 + 1 == len(table):
        arrays[token] = arrays[token] + table[0]
        table = table[1:]
    wanted = ours.get('params/positions/position', table)
    old, new = math.isqrt(len(table)), math.isqrt(len(wanted))
    # Grids that are not square are left to be compared as they are.
    if old != new and (old**2, new**2) == (len(table), len(wanted)):
        grid = resize(table.reshape(old, old, -1), new)
        table = grid.reshape(new**2, -1)
    return {**arrays, positions: table}


def bicubic(grid: np.ndarray, side: int) -> np.ndarray:
    """Returns positions (H, H, C) at another side, as timm resizes them: bicubic, antialiased."""
    shape = (side, side, grid.shape[-1])
    return np.asarray(jax.image.resize(np.asarray(grid, np.float32), shape, 'cubic'))


def bilinear(grid: np.ndarray, side: int) -> np.ndarray:
    """Returns positions (H, H, C) at another side, as big_vision resizes them.

    Bilinear, corners on corners: `scipy.ndimage.zoom(grid, ..., order=1)`.
    """
    old = np.arange(len(grid))
    new = np.linspace(0, len(grid) - 1, side)
    weights = np.stack([np.interp(new, old, row) for row in np.eye(len(grid))], axis=1)
    return np.einsum('ai,bj,ijc->abc', weights, weights, np.asarray(grid, np.float32))
