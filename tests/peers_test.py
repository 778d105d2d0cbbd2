"""The logits of timm and transformers, of the same random weights: ./scripts/test_peers.sh.

Both write their own files, which are read as any user's.
"""

import re

import jax
import numpy as np
import pytest
from reference import images

from sam_jax import models
from sam_jax.models import pretrained, vit_files

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::FutureWarning'),
    pytest.mark.filterwarnings('ignore::UserWarning'),
]
CLASSES = 10
BOUND = 1e-5  # of the largest logit
# Our name, its image size, timm's name.
NAMES = [
    ('vit-ti16', 224, 'vit_tiny_patch16_224'),
    ('vit-s32', 224, 'vit_small_patch32_224'),
    ('vit-s16', 224, 'vit_small_patch16_224'),
    ('vit-b32', 224, 'vit_base_patch32_224'),
    ('vit-b16', 224, 'vit_base_patch16_224'),
    ('vit-l16', 224, 'vit_large_patch16_224'),
    ('vit-s16', 384, 'vit_small_patch16_224'),
    ('vit-ti4', 32, 'vit_tiny_patch16_224'),
]


def _random(module):
    """Every parameter drawn anew, so that none of them is 0 and head, scales and biases matter."""
    torch = pytest.importorskip('torch')
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 and not re.search('token|pos', name) else 25
            p.copy_(torch.randn(p.shape, generator=generator) * fan_in**-0.5)
            if re.search(r'norm.*weight', name):
                p.add_(1)
    return module.eval()


def _compare(theirs, path, name, size, **options):
    torch = pytest.importorskip('torch')
    x = images(1, (2, size, size, 3))
    with torch.no_grad():
        expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    variables = pretrained.load_reference_checkpoint(
        path, name, CLASSES, image_size=size, exact_gelu=True, **options
    )
    model = models.create_model(name, CLASSES, exact_gelu=True, **options)
    with jax.default_matmul_precision('highest'):
        logits = np.asarray(jax.jit(model.apply)(variables, x))
    distance = np.abs(logits - expected).max() / np.abs(expected).max()
    print(f'{name} at {size}: {distance:.1e} of the largest logit')
    assert np.abs(expected).max() > 0.1
    assert distance < BOUND


@pytest.mark.parametrize('name, size, theirs', NAMES)
def test_timm(name, size, theirs, tmp_path):
    timm = pytest.importorskip('timm')
    from safetensors.torch import save_file

    patch = int(re.search(r'\d+', name)[0])
    module = timm.create_model(theirs, img_size=size, patch_size=patch, num_classes=CLASSES)
    save_file(_random(module).state_dict(), tmp_path / 'model.safetensors')
    _compare(module, tmp_path / 'model.safetensors', name, size)


def test_timm_without_a_class_token(tmp_path):
    timm = pytest.importorskip('timm')
    from safetensors.torch import save_file

    options = dict(class_token=False, global_pool='avg', fc_norm=False, num_classes=CLASSES)
    module = _random(timm.create_model('vit_tiny_patch16_224', **options))
    save_file(module.state_dict(), tmp_path / 'model.safetensors')
    _compare(module, tmp_path / 'model.safetensors', 'vit-ti16', 224, class_token=False)


@pytest.mark.parametrize('name, size', [('vit-ti16', 224), ('vit-b16', 224), ('vit-s4', 32)])
def test_transformers(name, size, tmp_path):
    transformers = pytest.importorskip('transformers')
    model = models.create_model(name, CLASSES)
    config = transformers.ViTConfig(
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.heads,
        intermediate_size=4 * model.width,
        image_size=size,
        patch_size=model.patch,
        num_labels=CLASSES,
        layer_norm_eps=model.layer_norm_epsilon,
    )
    module = _random(transformers.ViTForImageClassification(config))
    module.save_pretrained(tmp_path)
    _compare(lambda x: module(x).logits, tmp_path / 'model.safetensors', name, size)


@pytest.mark.parametrize('old, new', [(14, 24), (24, 14), (7, 8)])
def test_positions_are_resized_as_timm_does(old, new):
    torch = pytest.importorskip('torch')
    layers = pytest.importorskip('timm.layers')
    table = np.random.default_rng(0).normal(size=(1, old * old, 8)).astype(np.float32)
    theirs = layers.resample_abs_pos_embed(torch.tensor(table), [new, new], num_prefix_tokens=0)
    ours = vit_files.bicubic(table.reshape(old, old, 8), new).reshape(1, new * new, 8)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
