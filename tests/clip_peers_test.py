"""CLIP against transformers', of the same random weights and texts: ./scripts/test_peers.sh.

transformers writes its files, which are read as any user's; and it reads ours.
"""

import json
import re

import jax
import numpy as np
import pytest
from reference import images

from sam_jax import models
from sam_jax.models import bpe, clip_files

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::FutureWarning'),
    pytest.mark.filterwarnings('ignore::UserWarning'),
]
BOUND = 1e-5  # of the largest value


def _peer(model, side, channels=3):
    """transformers' CLIP of these sizes, every parameter drawn anew."""
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    size, last = model.size, model.size.vocabulary - 1
    act = 'gelu' if model.exact_gelu else 'quick_gelu'

    def tower(t):
        return dict(
            hidden_size=t.width,
            intermediate_size=4 * t.width,
            num_hidden_layers=t.depth,
            num_attention_heads=t.heads,
            hidden_act=act,
        )

    ids = dict(bos_token_id=last - 1, eos_token_id=last, pad_token_id=last)
    config = transformers.CLIPConfig(
        text_config=dict(
            **tower(size.text),
            **ids,
            vocab_size=size.vocabulary,
            max_position_embeddings=size.length,
        ),
        vision_config=dict(
            **tower(size.image), image_size=side, patch_size=model.patch, num_channels=channels
        ),
        projection_dim=size.projection,
    )
    module = transformers.CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 and 'embedding.weight' not in name else 25
            p.copy_(torch.randn(p.shape, generator=generator) * fan_in**-0.5)
            if re.search(r'norm.*weight', name):
                p.add_(1)
    return module


def _compare(theirs, model, params, side, channels=3):
    """What both towers say, scaled to length 1, and the logits."""
    torch = pytest.importorskip('torch')
    x = images(1, (2, side, side, channels))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.size.vocabulary - 2, (3, 12))
    ids[:, 0], ids[[0, 1, 2], [11, 4, 7]] = model.size.vocabulary - 2, model.size.vocabulary - 1
    with torch.no_grad():
        out = theirs(
            pixel_values=torch.tensor(x.transpose(0, 3, 1, 2)), input_ids=torch.tensor(ids)
        )

    @jax.jit
    def run(params, x, ids):
        def of(method, *args):
            return model.apply({'params': params}, *args, method=method)

        texts = of('encode_texts', of('embed', ids), ids.argmax(axis=-1))
        towers = (of('encode_images', x), texts)
        return *towers, of('similarities', *towers)

    with jax.default_matmul_precision('highest'):
        image, text, logits = map(np.asarray, run(params, x, ids))
    for name, ours, expected in [
        ('image', image / np.linalg.norm(image, axis=1, keepdims=True), out.image_embeds),
        ('text', text / np.linalg.norm(text, axis=1, keepdims=True), out.text_embeds),
        ('logits', logits, out.logits_per_image),
    ]:
        expected = expected.numpy()
        distance = np.abs(ours - expected).max() / np.abs(expected).max()
        print(f'{name}: {distance:.1e} of the largest')
        assert distance < BOUND, name


@pytest.mark.parametrize(
    'name, side, options',
    [
        ('clip-tiny4', 28, {}),
        ('clip-tiny8', 32, {'exact_gelu': True}),
        ('clip-b32', 224, {}),
        ('clip-b16', 224, {}),
        ('clip-l14', 224, {}),
    ],
)
def test_clip_of_transformers(name, side, options, tmp_path):
    model = models.create_model(name, 2, **options).clip
    theirs = _peer(model, side)
    theirs.save_pretrained(tmp_path)
    _compare(theirs, model, clip_files.read(str(tmp_path), model, (side, side, 3)), side)


def test_transformers_reads_ours(tmp_path):
    transformers = pytest.importorskip('transformers')
    model = models.create_model('clip-tiny7', 2).clip
    shapes = clip_files.shapes(model, (28, 28, 1))['params']
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape, scale=0.2)), shapes)
    clip_files.write(str(tmp_path), model, params, (28, 28, 1))
    theirs = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    _compare(theirs, model, params, 28, channels=1)
    tokens = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ours = bpe.read(str(tmp_path), model.size.vocabulary)
    assert tokens('A photo.')['input_ids'] == [ours.start, *ours('A photo.'), ours.end]


def _merges(rng, count):
    """A vocabulary with so many joined pairs, drawn from what is there so far."""
    numbers = {t: i for t, i in bpe.of_bytes(514).items() if t not in (bpe.START, bpe.END)}
    open_, pairs = list('abcdefghijklmnopqrstuvwxyz'), []
    while len(pairs) < count:
        first = open_[rng.integers(len(open_))]
        second = open_[rng.integers(len(open_))] + ('</w>' if rng.integers(3) == 0 else '')
        if first + second in numbers or second not in numbers or first not in numbers:
            continue
        pairs.append((first, second))
        numbers[first + second] = len(numbers)
        if not second.endswith('</w>'):
            open_.append(first + second)
    return {**numbers, bpe.START: len(numbers), bpe.END: len(numbers) + 1}, pairs


def test_tokens_of_transformers(tmp_path):
    """Of random texts, with letters, numbers, signs and spaces of all kinds, and random merges."""
    transformers = pytest.importorskip('transformers')
    rng = np.random.default_rng(0)
    numbers, pairs = _merges(rng, 300)
    (tmp_path / 'vocab.json').write_text(json.dumps(numbers))
    (tmp_path / 'merges.txt').write_text(
        '#version: 0.2\n' + '\n'.join(' '.join(pair) for pair in pairs) + '\n'
    )
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ours = bpe.read(str(tmp_path), len(numbers))
    alphabet = list('abcdefghijklmnopqrstuvwxyz' * 4 + "ABC  \t\n'''.,/-_!?019") + (
        ['é', 'ß', 'Ω', 'я', '中', '²', 'Ⅷ', '½', '\u00a0', '\u0301', '٣', '😀', 'İ', "'s", "'ll"]
    )
    texts = [''.join(rng.choice(alphabet, rng.integers(1, 30))) for _ in range(2000)] + [
        'T-shirt/top.',
        "it's a dog's life, we'll see",
        'Ankle boot.',
    ]
    for text in texts:
        assert theirs(text)['input_ids'] == [ours.start, *ours(text), ours.end], repr(text)
