"""What other codebases call our parameters, and how they lay out the arrays."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from sam_jax.models import language_files, vit_files
from sam_jax.models.clip import CLIP
from sam_jax.models.efficientnet import EfficientNet
from sam_jax.models.language import Decoder, Encoder
from sam_jax.models.layers import Network
from sam_jax.models.pyramidnet import PyramidNet
from sam_jax.models.resnet import ResNet
from sam_jax.models.shake_shake import ShakeShake
from sam_jax.models.vit import ViT
from sam_jax.models.wide_resnet import WideResNet


class Format(NamedTuple):
    """How another codebase calls and lays out the parameters of ours.

    Attributes:
      modules: per architecture {pattern of our module's name: its foreign name}; the foreign name
        is a template of the pattern's groups, or a function (model, *groups) -> name.
      leaf: (our leaf, our module) -> its foreign name, '' where the module's name is all.
      separator: what stands between the two.
      layout: (path of ours, foreign array, our number of axes) -> the array as we have it.
      arrange: (model, {path: array} of ours, {name: array} of a file) -> the latter with an array
        for each of ours, see `vit_files`.
    """

    modules: dict
    leaf: Callable[[str, str], str]
    separator: str
    layout: Callable[[str, Any, int], Any]
    arrange: Callable[[Any, dict, dict], dict] = lambda model, ours, arrays: arrays

    def name(self, model: nn.Module, path: str) -> str:
        """Foreign name of our 'params/module/leaf' or 'batch_stats/module/leaf'."""
        module, _, leaf = path.partition('/')[2].rpartition('/')
        rules = next(r for cls, r in self.modules.items() if isinstance(model, cls))
        for pattern, theirs in rules.items():
            match = re.fullmatch(pattern, module)
            if match:
                theirs = (
                    theirs(model, *match.groups()) if callable(theirs) else (match.expand(theirs))
                )
                return self.separator.join(filter(None, (theirs, self.leaf(leaf, module))))
        return f'(no name for {module})'


def _resnet_block(model, group, block, part):
    index = sum(model.blocks[: int(group)]) + int(block)
    kind, _, rest = part.partition('_')
    kind, number = re.fullmatch(r'(conv|bn)(\d?)', kind).groups()
    if rest == 'shortcut':
        return f'BottleneckResNetBlock_{index}/{"conv" if kind == "conv" else "norm"}_proj'
    layer = 2 * (int(number) - 1)
    return f'BottleneckResNetBlock_{index}/' + (
        f'Conv_{layer}' if kind == 'conv' else f'BatchNorm_{layer + 1}'
    )


def _mbconv(model, block, part):
    expanded = _stage_of(model, int(block))[0].expansion > 1
    kind, _, place = part.partition('_')
    if kind == 'se':
        name = {'reduce': 'reduce_conv2d_0', 'expand': 'expand_conv2d_1'}[place]
        return f'MBConvBlock_{int(block) + 1}/SqueezeExcite_0/{name}'
    if place == 'depthwise' and kind == 'conv':
        return f'MBConvBlock_{int(block) + 1}/depthwise_conv2d'
    places = ('expand', 'depthwise', 'project') if kind == 'bn' else ('expand', 'project')
    number = places.index(place) - (not expanded)
    name = 'batch_normalization' if kind == 'bn' else f'{place}_conv2d'
    return f'MBConvBlock_{int(block) + 1}/{name}_{number}'


def _stage_of(model, block):
    """(stage, its number, the block's number in it) of the block-th MBConv block."""
    for number, (stage, n) in enumerate(zip(model.stages, model.repeats)):
        if block < n:
            return stage, number, block
        block -= n
    raise IndexError(block)


def _reference_layout(path, array, ndim):
    del ndim
    return array.swapaxes(2, 3) if '_depthwise/kernel' in path else array


REFERENCE = Format(
    modules={
        WideResNet: {
            'conv_init': 'init_conv',
            'bn_final': 'pre-pool-bn',
            'head': 'Dense_3',
            r'group(\d)_block(\d+)_bn1': r'WideResnetGroup_\1/WideResnetBlock_\2/init_bn',
            r'group(\d)_block(\d+)_bn2': r'WideResnetGroup_\1/WideResnetBlock_\2/bn_2',
            r'group(\d)_block(\d+)_(conv\d)': r'WideResnetGroup_\1/WideResnetBlock_\2/\3',
        },
        ShakeShake: {
            'conv_init': 'init_conv',
            'bn_init': 'init_bn',
            'head': 'Dense_3',
            r'group(\d)_block(\d+)_conv_shortcut(\d)': r'WideResnetShakeShakeGroup_\1/ShakeShakeBlock_\2/Shortcut_0/conv_h\3',
            r'group(\d)_block(\d+)_bn_shortcut': r'WideResnetShakeShakeGroup_\1/ShakeShakeBlock_\2/Shortcut_0/bn_residual',
            r'group(\d)_block(\d+)_(conv|bn)_([ab])(\d)': r'WideResnetShakeShakeGroup_\1/ShakeShakeBlock_\2/\3_\4_\5',
        },
        PyramidNet: {
            'conv_init': 'init_conv',
            'bn_init': 'init_bn',
            'bn_final': 'final_bn',
            'head': lambda model: f'Dense_{(model.depth - 2) // 3}',
            r'block(\d+)_bn1': r'BottleneckShakeDrop_\1/bn_1_pre',
            r'block(\d+)_bn2': r'BottleneckShakeDrop_\1/bn_1_post',
            r'block(\d+)_bn3': r'BottleneckShakeDrop_\1/bn_2',
            r'block(\d+)_bn4': r'BottleneckShakeDrop_\1/bn_3',
            r'block(\d+)_conv1': r'BottleneckShakeDrop_\1/1x1_conv_contract',
            r'block(\d+)_conv2': r'BottleneckShakeDrop_\1/3x3',
            r'block(\d+)_conv3': r'BottleneckShakeDrop_\1/1x1_conv_expand',
        },
        ResNet: {
            '(conv_init|bn_init)': r'\1',
            'head': lambda model: f'Dense_{sum(model.blocks)}',
            r'group(\d)_block(\d+)_(.+)': _resnet_block,
        },
        EfficientNet: {
            'conv_stem': 'Stem_0/conv2d',
            'bn_stem': 'Stem_0/batch_normalization',
            'conv_head': lambda model: f'Head_{sum(model.repeats) + 1}/conv2d',
            'bn_head': lambda model: f'Head_{sum(model.repeats) + 1}/batch_normalization',
            'head': lambda model: f'Head_{sum(model.repeats) + 1}/dense',
            r'block(\d+)_(.+)': _mbconv,
        },
    },
    leaf=lambda leaf, module: (
        'depthwise_kernel' if (module[-9:], leaf) == ('depthwise', 'kernel') else leaf
    ),
    separator='/',
    layout=_reference_layout,
)


_KERAS_PARTS = {
    'conv_expand': 'expand_conv',
    'bn_expand': 'expand_bn',
    'conv_depthwise': 'dwconv',
    'bn_depthwise': 'bn',
    'se_reduce': 'se_reduce',
    'se_expand': 'se_expand',
    'conv_project': 'project_conv',
    'bn_project': 'project_bn',
}


def _keras_block(model, block, part):
    _, stage, number = _stage_of(model, int(block))
    return f'block{stage + 1}{chr(ord("a") + number)}_{_KERAS_PARTS[part]}'


_KERAS_LEAVES = {'scale': 'gamma', 'mean': 'moving_mean', 'var': 'moving_variance'}

KERAS = Format(
    modules={
        EfficientNet: {
            'conv_stem': 'stem_conv',
            'bn_stem': 'stem_bn',
            'conv_head': 'top_conv',
            'bn_head': 'top_bn',
            'head': 'predictions',
            r'block(\d+)_(.+)': _keras_block,
        }
    },
    leaf=lambda leaf, module: (
        'beta' if leaf == 'bias' and 'bn_' in module else _KERAS_LEAVES.get(leaf, leaf)
    ),
    separator='/',
    layout=_reference_layout,
)


def _keras3_name(model, module):
    """<class>_<how many of the class came before>: Keras 3 does not write layers' names."""
    modules = ['conv_stem', 'bn_stem']
    for block in range(sum(model.repeats)):
        parts = list(_KERAS_PARTS)[0 if _stage_of(model, block)[0].expansion > 1 else 2 :]
        modules += [f'block{block}_{part}' for part in parts]
    modules += ['conv_head', 'bn_head', 'head']

    def kind(module):
        if module.endswith('conv_depthwise'):
            return 'depthwise_conv2d'
        if module == 'head':
            return 'dense'
        return 'batch_normalization' if 'bn_' in module else 'conv2d'

    before = [kind(m) for m in modules[: modules.index(module)]].count(kind(module))
    return kind(module) + (f'_{before}' if before else '')


KERAS3 = Format(
    modules={EfficientNet: {'(.+)': _keras3_name}},
    leaf=lambda leaf, module: str(
        ['scale', 'bias', 'mean', 'var'].index(leaf)
        if 'bn_' in module
        else ['kernel', 'bias'].index(leaf)
    ),
    separator='/',
    layout=_reference_layout,
)


def _timm_block(model, block, part):
    stage, number, position = _stage_of(model, int(block))
    expanded = stage.expansion > 1
    theirs = {
        'conv_expand': 'conv_pw',
        'bn_expand': 'bn1',
        'conv_depthwise': 'conv_dw',
        'bn_depthwise': 'bn2' if expanded else 'bn1',
        'se_reduce': 'se.conv_reduce',
        'se_expand': 'se.conv_expand',
        'conv_project': 'conv_pwl' if expanded else 'conv_pw',
        'bn_project': 'bn3' if expanded else 'bn2',
    }[part]
    return f'blocks.{number}.{position}.{theirs}'


_TIMM_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'mean': 'running_mean',
    'var': 'running_var',
    'token': '',
    'position': '',
    'embedding': '',
}


def _timm_layout(path, array, ndim):
    if not path.endswith('/kernel'):
        return array
    return array.transpose(2, 3, 1, 0) if ndim == 4 else array.T


TIMM = Format(
    modules={
        EfficientNet: {
            'conv_stem': 'conv_stem',
            'bn_stem': 'bn1',
            'conv_head': 'conv_head',
            'bn_head': 'bn2',
            'head': 'classifier',
            r'block(\d+)_(.+)': _timm_block,
        }
    },
    leaf=lambda leaf, module: _TIMM_LEAVES.get(leaf, leaf),
    separator='.',
    layout=_timm_layout,
)

TIMM_VIT = TIMM._replace(
    modules={
        ViT: {
            'embedding': 'patch_embed.proj',
            'class_token': 'cls_token',
            'positions': 'pos_embed',
            r'block(\d+)_ln(\d)': r'blocks.\1.norm\2',
            r'block(\d+)_(query|key|value)': r'blocks.\1.attn.\2',
            r'block(\d+)_out': r'blocks.\1.attn.proj',
            r'block(\d+)_mlp(\d)': r'blocks.\1.mlp.fc\2',
            'ln_final': 'norm',
            'head': 'head',
        }
    },
    arrange=vit_files.of_timm,
)

TRANSFORMERS_VIT = TIMM._replace(
    modules={
        ViT: {
            'embedding': 'vit.embeddings.patch_embeddings.projection',
            'class_token': 'vit.embeddings.cls_token',
            'positions': 'vit.embeddings.position_embeddings',
            r'block(\d+)_ln1': r'vit.encoder.layer.\1.layernorm_before',
            r'block(\d+)_ln2': r'vit.encoder.layer.\1.layernorm_after',
            r'block(\d+)_(query|key|value)': r'vit.encoder.layer.\1.attention.attention.\2',
            r'block(\d+)_out': r'vit.encoder.layer.\1.attention.output.dense',
            r'block(\d+)_mlp1': r'vit.encoder.layer.\1.intermediate.dense',
            r'block(\d+)_mlp2': r'vit.encoder.layer.\1.output.dense',
            'ln_final': 'vit.layernorm',
            'head': 'classifier',
        }
    },
    arrange=vit_files.of_transformers,
)


def _clip_tower(model, tower, part):
    """Of a tower's module: transformers calls the same modules of the two by two names."""
    del model
    text = tower == 'text'
    inside = re.fullmatch(r'block(\d+)_(.+)', part)
    if inside:
        block, part = inside.groups()
        within = {
            'ln1': 'layer_norm1',
            'ln2': 'layer_norm2',
            'mlp1': 'mlp.fc1',
            'mlp2': 'mlp.fc2',
            **{name: f'self_attn.{name[0]}_proj' for name in ('query', 'key', 'value')},
            'out': 'self_attn.out_proj',
        }
        name = f'encoder.layers.{block}.{within[part]}'
    else:
        name = {
            'embedding': 'embeddings.patch_embedding',
            'class_token': 'embeddings.class_embedding',
            'positions': 'embeddings.position_embedding',
            'ln_pre': 'pre_layrnorm',  # so it is called
            'ln_final': 'final_layer_norm' if text else 'post_layernorm',
        }[part]
    return f'{"text" if text else "vision"}_model.{name}'


def _without_counters(model, ours, arrays):
    del model, ours
    return {k: x for k, x in arrays.items() if not k.endswith('.position_ids')}


TRANSFORMERS_CLIP = TIMM._replace(
    modules={
        CLIP: {
            '(image|text)/(.+)': _clip_tower,
            'tokens': 'text_model.embeddings.token_embedding',
            'image_projection': 'visual_projection',
            'text_projection': 'text_projection',
            'logit_scale': 'logit_scale',
        }
    },
    leaf=lambda leaf, module: {
        'kernel': 'weight',
        'embedding': 'weight',
        'position': 'weight',
        'token': '',
        'scale': '' if module == 'logit_scale' else 'weight',
    }.get(leaf, leaf),
    arrange=_without_counters,
)


def _big_vision_module(model, block, part):
    del model
    name = {
        'ln1': 'LayerNorm_0',
        'ln2': 'LayerNorm_1',
        'mlp1': 'MlpBlock_0/Dense_0',
        'mlp2': 'MlpBlock_0/Dense_1',
    }.get(part, f'MultiHeadDotProductAttention_0/{part}')
    return f'Transformer/encoderblock_{block}/{name}'


def _big_vision_layout(path, array, ndim):
    """Heads are an axis there: kernels (C, heads, d) and (heads, d, C), biases (heads, d)."""
    _, module, leaf = path.split('/')
    if re.fullmatch(r'block\d+_(query|key|value)', module):
        return array.reshape(*array.shape[:-2], -1)
    if module.endswith('_out') and leaf == 'kernel':
        return array.reshape(-1, array.shape[-1])
    return array


BIG_VISION = Format(
    modules={
        ViT: {
            'embedding': 'embedding',
            'class_token': 'cls',
            'positions': 'pos_embedding',
            r'block(\d+)_(.+)': _big_vision_module,
            'ln_final': 'Transformer/encoder_norm',
            'head': 'head',
        }
    },
    leaf=lambda leaf, module: '' if leaf in ('token', 'position') else leaf,
    separator='/',
    layout=_big_vision_layout,
    arrange=vit_files.of_big_vision,
)

_OPT, _BERT = 'model.decoder', 'bert.encoder.layer'

TRANSFORMERS_OPT = TIMM._replace(
    modules={
        Decoder: {
            'embedding': f'{_OPT}.embed_tokens.weight',
            'positions': f'{_OPT}.embed_positions.weight',
            '(project_in|project_out)': rf'{_OPT}.\1',
            r'block(\d+)_ln1': rf'{_OPT}.layers.\1.self_attn_layer_norm',
            r'block(\d+)_ln2': rf'{_OPT}.layers.\1.final_layer_norm',
            r'block(\d+)_([qkv])(uery|ey|alue)': rf'{_OPT}.layers.\1.self_attn.\2_proj',
            r'block(\d+)_out': rf'{_OPT}.layers.\1.self_attn.out_proj',
            r'block(\d+)_mlp(\d)': rf'{_OPT}.layers.\1.fc\2',
            'ln_final': f'{_OPT}.final_layer_norm',
        }
    },
    arrange=language_files.of_opt,
)

TRANSFORMERS_BERT = TIMM._replace(
    modules={
        Encoder: {
            'embedding': 'bert.embeddings.word_embeddings.weight',
            'positions': 'bert.embeddings.position_embeddings.weight',
            'types': 'bert.embeddings.token_type_embeddings.weight',
            'ln_embedding': 'bert.embeddings.LayerNorm',
            r'block(\d+)_(query|key|value)': rf'{_BERT}.\1.attention.self.\2',
            r'block(\d+)_out': rf'{_BERT}.\1.attention.output.dense',
            r'block(\d+)_ln1': rf'{_BERT}.\1.attention.output.LayerNorm',
            r'block(\d+)_mlp1': rf'{_BERT}.\1.intermediate.dense',
            r'block(\d+)_mlp2': rf'{_BERT}.\1.output.dense',
            r'block(\d+)_ln2': rf'{_BERT}.\1.output.LayerNorm',
            'pooler': 'bert.pooler.dense',
            'head': 'classifier',
            'mlm': 'cls.predictions.transform.dense',
            'mlm_ln': 'cls.predictions.transform.LayerNorm',
            'mlm_out': 'cls.predictions',
        }
    },
    arrange=language_files.of_bert,
)


def _without_collection(model, ours, arrays):
    """{'module/leaf': array} of {'params/module/leaf': array}."""
    del model, ours
    return {re.sub('^(params|batch_stats)/', '', name): x for name, x in arrays.items()}


# What sam-jax-export writes: our own names and layout.
OWN = Format(
    modules={Network: {'.*': r'\g<0>'}},
    leaf=lambda leaf, module: leaf,
    separator='/',
    layout=lambda path, array, ndim: array,
    arrange=_without_collection,
)

FORMATS = (
    REFERENCE,
    KERAS,
    KERAS3,
    TIMM,
    TIMM_VIT,
    TRANSFORMERS_VIT,
    BIG_VISION,
    TRANSFORMERS_OPT,
    TRANSFORMERS_BERT,
    TRANSFORMERS_CLIP,
    OWN,
)
