"""Between the original code's names and ours, and its recipe for weights, images and labels.

The original names a tensor by its modules ('WideResnetGroup_1/WideResnetBlock_0/conv1/kernel',
'pre-pool-bn/mean'); we have {'params' or 'batch_stats': {module: {leaf: array}}}.
"""

import re

import jax
from golden.recipe import images, one_hot, recipe

__all__ = ['from_reference', 'images', 'one_hot', 'recipe', 'to_reference']

_THEIRS = {'conv_init': 'init_conv', 'bn_final': 'pre-pool-bn', 'head': 'Dense_3'}
_THEIR_PARTS = {'bn1': 'init_bn', 'bn2': 'bn_2', 'conv1': 'conv1', 'conv2': 'conv2'}
_OURS = {theirs: ours for ours, theirs in _THEIRS.items()}
_OUR_PARTS = {theirs: ours for ours, theirs in _THEIR_PARTS.items()}


def _to_our_module(module):
    match = re.fullmatch(r'WideResnetGroup_(\d+)/WideResnetBlock_(\d+)/(.+)', module)
    if not match:
        return _OURS[module]
    group, block, part = match.groups()
    return f'group{group}_block{block}_{_OUR_PARTS[part]}'


def _to_their_module(module):
    match = re.fullmatch(r'group(\d+)_block(\d+)_(.+)', module)
    if not match:
        return _THEIRS[module]
    group, block, part = match.groups()
    return f'WideResnetGroup_{group}/WideResnetBlock_{block}/{_THEIR_PARTS[part]}'


def from_reference(arrays):
    """{original name: array} -> our variables, with the collections that occur among the names."""
    variables = {}
    for name, array in arrays.items():
        module, leaf = name.rsplit('/', 1)
        collection = 'batch_stats' if leaf in ('mean', 'var') else 'params'
        module = _to_our_module(module)
        variables.setdefault(collection, {}).setdefault(module, {})[leaf] = array
    return variables


def to_reference(tree):
    """Our variables, or one collection of them -> {original name: array}."""
    arrays = {}
    for path, array in jax.tree.leaves_with_path(tree):
        *_, module, leaf = (key.key for key in path)
        arrays[f'{_to_their_module(module)}/{leaf}'] = array
    return arrays
