"""The logits of transformers' OPT and BERT, of the same random weights: ./scripts/test_peers.sh.

transformers writes its own folders, which are read as any user's.
"""

import json

import jax
import numpy as np
import pytest
from peers_test import BOUND, _random

from sam_jax.language import tokenizers
from sam_jax.models import language_files

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::FutureWarning'),
    pytest.mark.filterwarnings('ignore::UserWarning'),
]
VOCABULARY, LENGTH = 101, 24
OPT = dict(
    vocab_size=VOCABULARY,
    max_position_embeddings=LENGTH,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    ffn_dim=80,
    word_embed_proj_dim=48,
)
BERT = dict(
    vocab_size=VOCABULARY,
    max_position_embeddings=LENGTH,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
)


def _tokens():
    """Three texts, of which two are shorter than the longest."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3, 20))
    return tokens, np.arange(20)[None] < np.array([[20], [7], [13]])


def _compare(theirs, folder, num_classes=0, **more):
    torch = pytest.importorskip('torch')
    _random(theirs).save_pretrained(folder)
    tokens, mask = _tokens()
    with torch.no_grad():
        expected = theirs(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(int)),
            **{k: torch.tensor(v) for k, v in more.items()},
        ).logits.numpy()
    model, variables = language_files.load_folder(folder, num_classes)
    if more:
        more = {'types': more['token_type_ids']}
    with jax.default_matmul_precision('highest'):
        logits = np.asarray(jax.jit(model.apply)(variables, tokens, mask, **more))
    if not num_classes:  # of the tokens that are there
        logits, expected = logits[mask], expected[mask]
    distance = np.abs(logits - expected).max() / np.abs(expected).max()
    print(f'{type(theirs).__name__}: {distance:.1e} of the largest logit')
    assert logits.shape == expected.shape and np.abs(expected).max() > 0.1
    assert distance < BOUND


@pytest.mark.parametrize(
    'options',
    [{}, {'do_layer_norm_before': False, 'word_embed_proj_dim': 32}],
    ids=['opt', 'opt-350m'],
)
def test_opt(options, tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.OPTConfig(**{**OPT, **options})
    _compare(transformers.OPTForCausalLM(config), tmp_path)


def test_bert_of_masked_tokens(tmp_path):
    transformers = pytest.importorskip('transformers')
    _compare(transformers.BertForMaskedLM(transformers.BertConfig(**BERT)), tmp_path)


def test_bert_of_sentences(tmp_path):
    transformers = pytest.importorskip('transformers')
    types = (np.arange(20)[None] > np.array([[9], [3], [20]])).astype(int)
    config = transformers.BertConfig(**BERT, num_labels=3)
    theirs = transformers.BertForSequenceClassification(config)
    _compare(theirs, tmp_path, 3, token_type_ids=types)


def test_bert_with_no_head(tmp_path):
    """What a file has not is as initialised, and the rest is the file's."""
    transformers = pytest.importorskip('transformers')
    theirs = _random(transformers.BertModel(transformers.BertConfig(**BERT)))
    theirs.save_pretrained(tmp_path)
    one, other = (language_files.load_folder(tmp_path, 3, seed)[1]['params'] for seed in (0, 1))
    np.testing.assert_array_equal(
        one['pooler']['kernel'], theirs.pooler.dense.weight.detach().numpy().T
    )
    assert np.abs(one['head']['kernel'] - other['head']['kernel']).max() > 0


def test_word_pieces(tmp_path):
    transformers = pytest.importorskip('transformers')
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] the un ##able ##s able cafe ! , . 1 ##9 中 don ' t"
    path = tmp_path / 'vocab.txt'
    path.write_text('\n'.join(pieces.split()))
    theirs = transformers.BertTokenizer(str(path))
    text = "The Unable cafés, don't 19! 中中 naïve\tthe\u00a0un."
    expected = theirs(text, add_special_tokens=False)['input_ids']
    assert tokenizers.WordPiece(path).encode(text) == expected


def test_pairs_of_bytes(tmp_path):
    transformers = pytest.importorskip('transformers')
    merges = ['t h', 'th e', 'Ġ the', 'Ġ t', 'e r', 'Ã ©', 'Ġ Ġ']
    pieces = [*tokenizers._of_bytes().values(), *(m.replace(' ', '') for m in merges)]
    (tmp_path / 'vocab.json').write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(merges))
    files = str(tmp_path / 'vocab.json'), str(tmp_path / 'merges.txt')
    theirs = transformers.GPT2Tokenizer(*files, unk_token=pieces[0])
    text = "the  other\n\n  thé they're 12 _a_ the-\u00e9\u00e9 中 there   "
    expected = theirs(text)['input_ids']
    assert tokenizers.BytePairs(*files).encode(text) == expected
