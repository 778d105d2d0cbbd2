"""Language models in folders of transformers: config.json and safetensors."""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.errors import UserError, first_line
from sam_jax.models.language import Decoder, Encoder, LanguageModel

Arrays = dict[str, np.ndarray]

# Of each size; the vocabulary is the largest that there are.
_LARGEST = 2**24

# What a config.json must say, where it says it, to be one of ours.
_FIXED = {
    'opt': {
        'activation_function': 'relu',
        'enable_bias': True,
        'layer_norm_elementwise_affine': True,
        '_remove_final_layer_norm': False,
        'tie_word_embeddings': True,
    },
    'bert': {
        'hidden_act': 'gelu',
        'is_decoder': False,
        'layer_norm_eps': 1e-12,
        'position_embedding_type': 'absolute',
        'tie_word_embeddings': True,
    },
}


def of_opt(model: Any, ours: Arrays, arrays: Arrays) -> Arrays:
    """Returns the arrays of an OPT with a head or without one."""
    del model, ours
    found = {f'model.{n}' if n.startswith('decoder.') else n: x for n, x in arrays.items()}
    return {n: x for n, x in found.items() if n != 'lm_head.weight'}  # the embeddings once more


def of_bert(model: Any, ours: Arrays, arrays: Arrays) -> Arrays:
    """Returns the arrays of a BERT, with those of a head that is not asked for left out.

    Of its forms: with a head and with none ('bert.' before the names), and of before 2019, when a
    norm's were called gamma and beta. A head and a pooler that a file has not are ours.
    """
    found = {}
    for name, x in arrays.items():
        if name.startswith(('embeddings.', 'encoder.', 'pooler.')):
            name = f'bert.{name}'
        name = name.replace('LayerNorm.gamma', 'LayerNorm.weight')
        found[name.replace('LayerNorm.beta', 'LayerNorm.bias')] = x
    heads = ('cls.', 'classifier.', 'bert.pooler.')
    kept = heads[1:] if model.num_classes else heads[:1]
    found = {
        name: x
        for name, x in found.items()
        if (not name.startswith(heads) or name.startswith(kept))
        and not name.startswith(('cls.seq_relationship', 'cls.predictions.decoder'))
        and not name.endswith('position_ids')
    }
    for module, name in (('pooler', 'bert.pooler.dense'), ('head', 'classifier')):
        if f'params/{module}/kernel' in ours and f'{name}.weight' not in found:
            found[f'{name}.weight'] = ours[f'params/{module}/kernel'].T
            found[f'{name}.bias'] = ours[f'params/{module}/bias']
    return found


def model_of(config: dict[str, Any], where: str, num_classes: int = 0) -> LanguageModel:
    """Returns the model that a config.json of transformers describes.

    Args:
      config: what the file says.
      where: its name, for messages.
      num_classes: of sentences, of a BERT; 0 for logits over the vocabulary.

    Raises:
      UserError: neither OPT nor BERT, a key is missing, or something that ours do not have.
    """
    if not isinstance(config, dict):
        raise UserError(f'{where} must hold a JSON object; it holds a {type(config).__name__}.')
    kind = config.get('model_type')
    if not isinstance(kind, str) or kind not in _FIXED:
        raise UserError(f'{where}: model_type is {kind!r}; it must be opt or bert.')
    for key, value in _FIXED[kind].items():
        if config.get(key, value) != value:
            raise UserError(f'{where}: {key} is {config[key]!r}; only {value!r} is known here.')
    try:
        sizes: dict[str, Any] = dict(
            num_classes=num_classes,
            vocabulary=config['vocab_size'],
            length=config['max_position_embeddings'],
            width=config['hidden_size'],
            depth=config['num_hidden_layers'],
            heads=config['num_attention_heads'],
            hidden=config['ffn_dim' if kind == 'opt' else 'intermediate_size'],
        )
    except KeyError as e:
        raise UserError(f'{where} has no key {e.args[0]!r}.') from e
    more: dict[str, Any] = (
        {'types': config.get('type_vocab_size', 2)}
        if kind == 'bert'
        else {'embedding_width': config.get('word_embed_proj_dim') or 0}
    )
    pre_norm = config.get('do_layer_norm_before', True)
    for name, size in {**sizes, **more}.items():
        least = 0 if name in ('num_classes', 'embedding_width') else 1
        if type(size) is not int or not least <= size <= _LARGEST:
            raise UserError(
                f'{where}: its {name} is {size!r}; it must be a whole number from {least} to '
                f'{_LARGEST}.'
            )
    if sizes['width'] % sizes['heads'] or type(pre_norm) is not bool:
        raise UserError(
            f'{where}: its width is {sizes["width"]}, its heads are {sizes["heads"]} and '
            f'do_layer_norm_before is {pre_norm!r}; heads must divide the width, and the last be '
            'true or false.'
        )
    if kind == 'bert':
        return Encoder(**sizes, **more)
    return Decoder(**sizes, **more, pre_norm=pre_norm)


def load_folder(
    folder: str | os.PathLike, num_classes: int = 0, seed: int = 0
) -> tuple[LanguageModel, dict[str, Any]]:
    """Reads an OPT or a BERT as transformers' `save_pretrained` writes them.

    Args:
      folder: with config.json and one or more .safetensors.
      num_classes: as of `model_of`.
      seed: of a head that the file has not, or has for another number of classes.

    Returns:
      (model, {'params': ..., 'batch_stats': {}}).

    Raises:
      UserError: a file is missing, cannot be read, or is of another architecture.
    """
    from sam_jax.models import pretrained  # which asks `formats`, which asks for this file

    folder = pathlib.Path(folder)
    path = folder / 'config.json'
    try:
        config = json.loads(path.read_text())
    except OSError as e:
        raise UserError(f'{path}: no such file; transformers writes one beside the weights.') from e
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} cannot be read as JSON: {first_line(e)}.') from e
    model = model_of(config, str(path), num_classes)
    files = sorted(folder.glob('*.safetensors'))
    if not files:
        raise UserError(f'The folder {folder} holds no .safetensors.')
    arrays = {name: x for file in files for name, x in pretrained.read(file).items()}
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), int))
    return model, pretrained.load(arrays, model, variables)
