"""Between the original code's names and ours, and its recipe for weights, images and labels.

The original names a tensor by its modules ('WideResnetGroup_1/WideResnetBlock_0/conv1/kernel',
'pre-pool-bn/mean'); we have {'params' or 'batch_stats': {module: {leaf: array}}}.
"""

import ast

import flax.traverse_util
import jax
import jax.numpy as jnp
from golden.recipe import images, one_hot, recipe

from sam_jax.models.formats import REFERENCE

__all__ = [
    'from_reference',
    'golden_shapes',
    'images',
    'one_hot',
    'recipe',
    'recipe_variables',
    'shapes',
    'to_reference',
]


def shapes(model, image_shape=(32, 32, 3)):
    """Variables as shapes and dtypes: nothing is computed."""
    return jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False)
    )


def to_reference(model, variables):
    """Our variables -> {original name: array}."""
    arrays = {}
    for path, x in flax.traverse_util.flatten_dict(variables, sep='/').items():
        # The layout is its own inverse.
        arrays[REFERENCE.name(model, path)] = REFERENCE.layout(path, x, x.ndim)
    return arrays


def from_reference(model, arrays):
    """{original name: array} -> our variables, those whose names occur."""
    flat = {}
    for path in flax.traverse_util.flatten_dict(shapes(model), sep='/'):
        name = REFERENCE.name(model, path)
        if name in arrays:
            flat[path] = REFERENCE.layout(path, arrays[name], arrays[name].ndim)
    assert len(flat) == len(arrays), arrays.keys()
    return flax.traverse_util.unflatten_dict(flat, sep='/')


def recipe_variables(model):
    """The weights and statistics with which golden logits were computed.

    Of models that the original does not have, something of the same kind.
    """
    flat = {}
    known = isinstance(model, tuple(REFERENCE.modules))
    for path, x in flax.traverse_util.flatten_dict(shapes(model), sep='/').items():
        name = REFERENCE.name(model, path) if known else path
        shape = x.shape[:2] + x.shape[:1:-1] if name.endswith('depthwise_kernel') else x.shape
        flat[path] = REFERENCE.layout(path, recipe(name, shape), x.ndim)
    return flax.traverse_util.unflatten_dict(flat, sep='/')


def golden_shapes(file):
    """{original name: shape} of a model_*.npz."""
    return {
        name: ast.literal_eval(shape)
        for kind in ('param', 'state')
        for name, shape in zip(
            file[f'{kind}_names'].tolist(), file[f'{kind}_shapes'].tolist(), strict=True
        )
    }
