"""Folders of CLIP as Hugging Face's transformers writes them, and what `Prompts` takes from one.

model.safetensors          the weights
config.json                sizes; read for what the weights do not tell
vocab.json, merges.txt     the tokenizer
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

from sam_jax import rngs
from sam_jax.errors import UserError, first_line
from sam_jax.models import bpe, pretrained
from sam_jax.models.clip import CLIP
from sam_jax.models.formats import TRANSFORMERS_CLIP
from sam_jax.models.layers import Network
from sam_jax.models.prompts import Prompts

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'


def shapes(model: CLIP, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the shapes of CLIP's variables, for images (H, W, C)."""
    images, ids = jnp.zeros((1, *image_shape)), jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, ids))


def read(folder: str, model: CLIP, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns CLIP's params, NumPy arrays, of a folder.

    Args:
      folder: as above.
      model: what they are for.
      image_shape: (H, W, C); each patch has a position of its own.

    Raises:
      UserError: a file is not there or damaged, or of another CLIP.
    """
    _check_config(folder, model)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes(model, image_shape))
    return pretrained.load(os.path.join(folder, WEIGHTS), model, zeros)['params']


def _check_config(folder, model):
    """What no array tells: the number of heads, and what stands between two layers."""
    path = os.path.join(folder, CONFIG)
    try:
        with open(path) as file:
            said = json.load(file)
        towers = {name: dict(said.get(f'{name}_config', {})) for name in ('text', 'vision')}
    except FileNotFoundError as e:
        raise UserError(f'There is no {path}; {folder!r} must hold a CLIP of transformers.') from e
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f'{path} cannot be read: {first_line(e)}.') from e
    gelu = 'gelu' if model.exact_gelu else 'quick_gelu'
    heads = {'text': model.size.text.heads, 'vision': model.size.image.heads}
    # Files of transformers leave out what is as by default.
    default = {'text': 8, 'vision': 12}
    for name, config in towers.items():
        found = config.get('hidden_act', 'quick_gelu')
        if found != gelu:
            raise UserError(
                f'{path} has the {name} tower with {found!r}, and the model {gelu!r}: set '
                'model.exact_gelu to true for gelu, to false for quick_gelu.'
            )
        found = config.get('num_attention_heads', default[name])
        if found != heads[name]:
            raise UserError(
                f'{path} has a {name} tower of {found} heads, and the model {heads[name]}: '
                'model.name is that of another CLIP.'
            )


def write(folder: str, model: CLIP, params: Any, image_shape: tuple[int, ...]) -> None:
    """Writes a CLIP whose tokens are bytes (`bpe.of_bytes`) as transformers reads it.

    Args:
      folder: made if it is not there.
      model, params: the CLIP.
      image_shape: (H, W, C) of square images.
    """
    from safetensors.numpy import save_file

    def foreign(path, x):
        # The layouts of formats.TRANSFORMERS_CLIP, backwards.
        if not path.endswith('/kernel'):
            return x
        return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T

    flat = traverse_util.flatten_dict({'params': jax.device_get(params)}, sep='/')
    os.makedirs(folder, exist_ok=True)
    save_file(
        {
            TRANSFORMERS_CLIP.name(model, path): np.array(foreign(path, np.asarray(x)), order='C')
            for path, x in flat.items()
        },
        os.path.join(folder, WEIGHTS),
        {'format': 'pt'},
    )
    size, last = model.size, model.size.vocabulary - 1
    towers = {'text': size.text, 'vision': size.image}
    config: dict[str, Any] = {'model_type': 'clip', 'projection_dim': size.projection}
    for name, tower in towers.items():
        config[f'{name}_config'] = {
            'hidden_size': tower.width,
            'intermediate_size': 4 * tower.width,
            'num_hidden_layers': tower.depth,
            'num_attention_heads': tower.heads,
            'projection_dim': size.projection,
            'hidden_act': 'gelu' if model.exact_gelu else 'quick_gelu',
        }
    config['text_config'] |= {
        'vocab_size': size.vocabulary,
        'max_position_embeddings': size.length,
        'bos_token_id': last - 1,
        'eos_token_id': last,
        'pad_token_id': last,
    }
    config['vision_config'] |= {
        'image_size': image_shape[0],
        'num_channels': image_shape[2],
        'patch_size': model.patch,
    }
    with open(os.path.join(folder, CONFIG), 'w') as file:
        json.dump(config, file, indent=2)
    bpe.write(folder, bpe.of_bytes(size.vocabulary))


def tokenizer(folder: str, size: int) -> bpe.Tokenizer:
    """Returns the tokenizer of a folder; of '', that of bytes, `size` tokens in all."""
    return bpe.read(folder, size) if folder else bpe.Tokenizer(bpe.of_bytes(size), [])


def require_names(classes: Sequence[str]) -> None:
    """Raises UserError if a dataset does not say the names of its classes."""
    if not classes:
        raise UserError(
            'The classes of this dataset have no names, which model.name needs; sort the images '
            "into data.name='folder', whose folders are named as the classes."
        )


def names(tokens: bpe.Tokenizer, classes: Sequence[str], context: int, length: int) -> np.ndarray:
    """Returns the texts of classes as numbers, (classes, T) int32.

    start, 0 where the context's vectors go, the name with a point behind it, end, 0. T is what the
    longest name needs: behind its end a text means nothing, since no token sees what comes after.

    Args:
      tokens: the tokenizer.
      classes: names; '_' stands for a space.
      context: number of the context's vectors.
      length: tokens that a text may have.

    Raises:
      UserError: there are no names, or one is too long.
    """
    require_names(classes)
    texts = [
        [tokens.start, *[0] * context, *tokens(f'{name.replace("_", " ")}.'), tokens.end]
        for name in classes
    ]
    longest = max(texts, key=len)
    if len(longest) > length:
        raise UserError(
            f'model.context is {context}; with the class {classes[texts.index(longest)]!r} that '
            f'makes a text of {len(longest)} tokens, and model.name has at most {length}.'
        )
    return np.array([t + [0] * (len(longest) - len(t)) for t in texts], np.int32)


def frozen(
    model: Network,
    folder: str,
    classes: Sequence[str],
    image_shape: tuple[int, ...],
    seed: int,
    towers: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the collection 'frozen' of a model on the host; {} where it has none.

    Args:
      model: of `models.create_model`.
      folder: of CLIP; '' for random weights and a tokenizer of bytes.
      classes: names of the classes that are told apart.
      image_shape: (H, W, C).
      seed: of random weights.
      towers: CLIP's params, where they are there already.

    Raises:
      UserError: as `read`, `bpe.read` and `names`.
    """
    if not isinstance(model, Prompts):
        return {}
    tokens = tokenizer(folder, model.size.vocabulary)
    return {
        'clip': towers or _towers(model, folder, image_shape, seed),
        'names': names(tokens, classes, model.context, model.size.length),
    }


def _towers(model, folder, image_shape, seed):
    if folder:
        return read(folder, model.clip, image_shape)
    images, ids = jnp.zeros((1, *image_shape)), jnp.zeros((1, 1), jnp.int32)
    init = jax.jit(model.clip.init)
    return jax.device_get(init(rngs.key(seed, 'towers'), images, ids)['params'])


def checksum(frozen: dict[str, Any]) -> str:
    """Returns 16 hexadecimal digits of the collection 'frozen'; '' of an empty one."""
    digest = hashlib.sha256()
    for path, x in sorted(traverse_util.flatten_dict(frozen, sep='/').items()):
        digest.update(f'{path} {x.dtype} {x.shape} '.encode())
        digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()[:16] if frozen else ''


def begun(model: Prompts, folder: str, towers: dict[str, Any], params: Any) -> Any:
    """Returns the params before the first step: a context that says `model.words`, if set.

    Args:
      model: of the run.
      folder: of CLIP, or ''.
      towers: CLIP's params.
      params: random ones, returned where `model.words` is ''.

    Raises:
      UserError: the words are not `model.context` tokens.
    """
    if not model.words:
        return params
    ids = tokenizer(folder, model.size.vocabulary)(model.words)
    if len(ids) != model.context:
        raise UserError(
            f'model.words is {model.words!r}, which is {len(ids)} tokens; model.context is '
            f'{model.context} and must be as many.'
        )
    vectors = np.asarray(towers['tokens']['embedding'])[np.array(ids)]
    return {'context': {'vectors': vectors.astype(params['context']['vectors'].dtype)}}
