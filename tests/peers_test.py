"""The logits of PyTorch's networks, of the same random weights: ./scripts/test_peers.sh.

Vision Transformers are those of timm and transformers. Both write their own files, which are read
as any user's. ResNets for CIFAR are built here of PyTorch's layers, as their papers draw them, and
VGG is timm's up to its head.
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


# ResNets for CIFAR and VGG.


def _block(torch, bottleneck, preactivation, channels_in, channels, stride):
    """A block of He et al. (CVPR 2016, or ECCV 2016 with pre-activation), as a torch module."""
    nn = torch.nn
    sizes = (
        [(channels, 1, 1), (channels, 3, stride), (4 * channels, 1, 1)]
        if bottleneck
        else [(channels, 3, stride), (channels, 3, 1)]
    )

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs, self.bns, c = nn.ModuleList(), nn.ModuleList(), channels_in
            for out, kernel, step in sizes:
                conv = nn.Conv2d(c, out, kernel, step, kernel // 2, bias=False)
                self.convs.append(conv)
                self.bns.append(nn.BatchNorm2d(c if preactivation else out))
                c = out
            self.project = stride != 1 or channels_in != c
            if self.project:
                self.shortcut = nn.Conv2d(channels_in, c, 1, stride, bias=False)
            if self.project and not preactivation:
                self.shortcut_bn = nn.BatchNorm2d(c)
            self.channels = c

        def forward(self, x):
            y, skip = x, x
            for i, (conv, bn) in enumerate(zip(self.convs, self.bns)):
                if preactivation:
                    y = bn(y).relu()
                    skip = y if i == 0 and self.project else skip
                    y = conv(y)
                else:
                    y = bn(conv(y))
                    y = y.relu() if i + 1 < len(self.convs) else y
            if self.project:
                skip = self.shortcut(skip)
            if preactivation:
                return y + skip
            return (y + (self.shortcut_bn(skip) if self.project else skip)).relu()

    return Block()


def _small_resnet(torch, model):
    """Returns (torch module, {ours: its layer}) of one of our ResNets for CIFAR."""
    nn = torch.nn
    stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    parts, names, channels = [stem], {'conv_init': stem}, 64
    if not model.preactivation:
        names['bn_init'] = nn.BatchNorm2d(64)
        parts += [names['bn_init'], nn.ReLU()]
    for group, blocks in enumerate(model.blocks):
        for i in range(blocks):
            stride = 2 if i == 0 and group else 1
            block = _block(
                torch, model.bottleneck, model.preactivation, channels, 64 * 2**group, stride
            )
            ours = f'group{group}_block{i}'
            for k, (conv, bn) in enumerate(zip(block.convs, block.bns), 1):
                names |= {f'{ours}_conv{k}': conv, f'{ours}_bn{k}': bn}
            if block.project:
                names[f'{ours}_conv_shortcut'] = block.shortcut
            if block.project and not model.preactivation:
                names[f'{ours}_bn_shortcut'] = block.shortcut_bn
            parts.append(block)
            channels = block.channels
    names['head'] = nn.Linear(channels, CLASSES)
    return nn.Sequential(*parts, nn.AvgPool2d(4), nn.Flatten(), names['head']), names


def _vgg(torch, timm, name, model):
    """The same of a VGG: timm's, without what lies between its last pool and its head."""
    nn = torch.nn
    features = timm.create_model(name).features
    layers = [x for x in features if isinstance(x, nn.Conv2d | nn.BatchNorm2d)]
    step = 2 if model.batch_norm else 1
    ours = [
        f'group{group}_{kind}{i}'
        for group, count in enumerate(model.convolutions)
        for i in range(count)
        for kind in ('conv', 'bn')[:step]
    ]
    head = nn.Linear(512, CLASSES)
    names = {**dict(zip(ours, layers, strict=True)), 'head': head}
    return nn.Sequential(features, nn.Flatten(), head), names


def _variables(names):
    """Our variables of {our name: torch layer}."""
    variables = {'params': {}, 'batch_stats': {}}
    for name, layer in names.items():
        arrays = {k: x.detach().numpy() for k, x in layer.state_dict().items()}
        own = {'bias': arrays['bias']} if 'bias' in arrays else {}
        weight = arrays['weight']
        if 'running_mean' in arrays:
            own['scale'] = weight
            variables['batch_stats'][name] = {
                'mean': arrays['running_mean'],
                'var': arrays['running_var'],
            }
        else:
            own['kernel'] = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        variables['params'][name] = own
    return variables


@pytest.mark.parametrize(
    'name',
    [
        'cifar_resnet18',
        'cifar_resnet34',
        'cifar_resnet50',
        'preact_resnet18',
        'preact_resnet34',
        'preact_resnet50',
        'vgg11_bn',
        'vgg13_bn',
        'vgg16_bn',
        'vgg19_bn',
        'vgg16',
    ],
)
def test_what_the_relatives_train(name):
    torch = pytest.importorskip('torch')
    timm = pytest.importorskip('timm')
    model = models.create_model(name, CLASSES)
    vgg = name.startswith('vgg')
    module, names = _vgg(torch, timm, name, model) if vgg else _small_resnet(torch, model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in names.values():
            if isinstance(layer, torch.nn.BatchNorm2d):
                for x in (layer.weight, layer.running_var):
                    x.copy_(1 + 0.1 * torch.rand(x.shape, generator=generator))
                mean = torch.randn(layer.running_mean.shape, generator=generator)
                layer.running_mean.copy_(0.1 * mean)
            else:
                fan_in = layer.weight[0].numel()
                x = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.copy_(x * (2 / fan_in) ** 0.5)
            if layer.bias is not None:
                layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=generator))
    variables = _variables(names)
    assert sum(x.size for x in jax.tree.leaves(variables['params'])) == sum(
        p.numel() for p in module.parameters()
    )
    x = images(1, (4, 32, 32, 3))
    theirs = torch.tensor(x.transpose(0, 3, 1, 2))
    with torch.no_grad(), jax.default_matmul_precision('highest'):
        expected = module.eval()(theirs).numpy()
        logits = np.asarray(jax.jit(model.apply)(variables, x))
    distance = np.abs(logits - expected).max() / np.abs(expected).max()
    print(f'{name}: {distance:.1e} of the largest logit')
    assert np.abs(expected).max() > 0.1
    assert distance < BOUND
