"""Language models, texts, tables of sentences, tokenizers and what is measured on them."""

import functools
import json
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax import sharpness
from sam_jax.benchmarks import evaluate_language, forgetting, quantize_language
from sam_jax.errors import UserError
from sam_jax.language import measures, sentences, texts, tokenizers, training
from sam_jax.models import formats, language_files, pretrained
from sam_jax.models.language import Decoder, Encoder
from sam_jax.quantization import quantize_kernels, quantized_inputs

SIZES = dict(vocabulary=11, length=8, width=8, depth=1, heads=2)
DECODER, ENCODER = Decoder(**SIZES), Encoder(num_classes=3, **SIZES)
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 8))
OPT = dict(
    model_type='opt',
    vocab_size=11,
    max_position_embeddings=8,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    ffn_dim=32,
)


def _drawn(variables):
    """All params anew, none of them 0, so that each of them matters."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 2, variables)


def _shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), int))


@pytest.fixture(scope='module')
def variables():
    return _drawn(_shapes(DECODER))


@functools.partial(jax.jit, static_argnames=('activation_bits',))
def _decode(variables, tokens, mask, activation_bits=None):
    with quantized_inputs(activation_bits):
        return DECODER.apply(variables, tokens, mask)


ALL = np.ones((2, 8), bool)


# The models; that they are transformers' is tested in language_peers_test.py.


@pytest.mark.parametrize('activation_bits', [None, 4])
def test_decoder_does_not_look_ahead(variables, activation_bits):
    """Nor do the scales of its activations, which are of each token."""
    logits = _decode(variables, TOKENS, ALL, activation_bits)
    changed = _decode(
        variables, np.concatenate([TOKENS[:, :5], TOKENS[:, 5:] ^ 1], 1), ALL, activation_bits
    )
    helpers.assert_trees_equal(logits[:, :5], changed[:, :5])
    assert (np.abs(logits - changed)[:, 5:].max(-1) > 1e-3).all()


def test_masked_tokens_do_not_matter(variables):
    """Behind a text nor before it, where positions are counted from the first that is there."""
    mask = np.arange(8) >= np.array([[3], [0]])
    other = np.where(mask, TOKENS, 7)
    logits, changed = (_decode(variables, tokens, mask) for tokens in (TOKENS, other))
    helpers.assert_trees_equal(logits[mask], changed[mask])
    shifted = np.roll(TOKENS, -3, axis=1)
    there = _decode(variables, shifted, ALL)
    helpers.assert_trees_close(logits[0, 3:], there[0, :5], atol=1e-5)


def test_encoder_sees_all_that_is_there():
    variables = _drawn(_shapes(ENCODER))
    encode = jax.jit(ENCODER.apply)
    mask = np.arange(8) < np.array([[8], [5]])
    logits = encode(variables, TOKENS, mask)
    changed = encode(variables, np.where(np.arange(8) >= 5, TOKENS ^ 1, TOKENS), mask)
    assert logits.shape == (2, 3)
    helpers.assert_trees_equal(logits[1], changed[1])
    assert np.abs(logits[0] - changed[0]).max() > 1e-3


def test_a_token_is_a_distribution(variables):
    one_hot = jax.nn.one_hot(TOKENS, 11)
    helpers.assert_trees_close(
        _decode(variables, one_hot, ALL), _decode(variables, TOKENS, ALL), atol=1e-5
    )


def test_too_long_a_text():
    with pytest.raises(UserError, match='9 tokens is too long for this model: it has 8 positions'):
        jax.eval_shape(DECODER.init, jax.random.key(0), jnp.zeros((1, 9), int))
    with pytest.raises(UserError, match='width of 8 does not divide among 3 heads'):
        Decoder(**{**SIZES, 'heads': 3})


# Files of transformers.


def _theirs(model, form, variables):
    """Our arrays by their names and in their layout."""
    flat = {
        '/'.join(('params', m, k)): x for m, d in variables['params'].items() for k, x in d.items()
    }
    return {form.name(model, path): form.layout(path, x, x.ndim) for path, x in flat.items()}


def test_names_of_opt_and_bert(variables):
    arrays = _theirs(DECODER, formats.TRANSFORMERS_OPT, variables)
    assert arrays['model.decoder.layers.0.self_attn.q_proj.weight'].shape == (8, 8)
    assert arrays['model.decoder.embed_positions.weight'].shape == (10, 8)
    stored = {name.removeprefix('model.'): x for name, x in arrays.items()}
    stored['lm_head.weight'] = arrays['model.decoder.embed_tokens.weight']
    zeros = jax.tree.map(np.zeros_like, variables)
    found = pretrained.load(stored, DECODER, zeros)
    helpers.assert_trees_equal(found['params'], variables['params'])
    with pytest.raises(UserError, match='lack model.decoder.layers.0.fc1.bias, .32,.: another'):
        del stored['decoder.layers.0.fc1.bias']
        pretrained.load(stored, DECODER, zeros)

    ours = _drawn(_shapes(ENCODER))
    arrays = _theirs(ENCODER, formats.TRANSFORMERS_BERT, ours)
    old = {
        name.removeprefix('bert.').replace('LayerNorm.weight', 'LayerNorm.gamma'): x
        for name, x in arrays.items()
        if not name.startswith('classifier')
    }
    old['cls.predictions.bias'] = old['cls.seq_relationship.bias'] = np.zeros(2)
    zeros = jax.tree.map(np.zeros_like, ours)
    zeros['params']['head'] = ours['params']['head']  # which the file has not
    helpers.assert_trees_equal(pretrained.load(old, ENCODER, zeros)['params'], ours['params'])


def test_bad_folders(tmp_path):
    def message(**config):
        (tmp_path / 'config.json').write_text(json.dumps({**OPT, **config}))
        with pytest.raises(UserError) as e:
            language_files.load_folder(tmp_path)
        return str(e.value)

    with pytest.raises(UserError, match=r'config.json: no such file'):
        language_files.load_folder(tmp_path)
    assert message().endswith('holds no .safetensors.')
    assert message(model_type='llama').endswith("model_type is 'llama'; it must be opt or bert.")
    gelu = "activation_function is 'gelu'; only 'relu' is known here."
    assert message(activation_function='gelu').endswith(gelu)
    (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="has no key 'vocab_size'"):
        language_files.load_folder(tmp_path)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(UserError, match='cannot be read as JSON'):
        language_files.load_folder(tmp_path)


# Texts.


def test_characters_are_tokens():
    text = 'Ab~\n é'
    tokens = texts.encode(text)
    assert texts.decode(tokens) == 'Ab~\n ?'
    assert tokens.dtype == np.int32 and set(texts.encode(texts.CHARACTERS)) == set(range(1, 97))
    assert texts.VOCABULARY == 97 and tokens[-1] == 0


def test_windows_predict_each_token_once():
    tokens = np.arange(11)
    np.testing.assert_array_equal(texts.windows(tokens, 4), [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]])
    learned, held_out = texts.split(tokens, 0.3)
    assert list(learned) == list(range(8)) and list(held_out) == [8, 9, 10]
    with pytest.raises(UserError, match='of 3 tokens is too short for a window: at least 5'):
        texts.windows(held_out, 4)


def test_what_stands_twice_is_there_once(tmp_path):
    assert texts.paragraphs(['a\n\nb\n\na\n', 'b\n\nc']) == 'a\n\nb\n\nc\n'
    (tmp_path / 'one').write_text('x\n\ny')
    (tmp_path / 'two').write_text('y')
    (tmp_path / 'link').symlink_to(tmp_path / 'two')
    text = texts.licences(tmp_path)
    assert text.text == 'x\n\ny\n'
    # printf 'x\n\ny\n' | sha256sum
    assert text.described() == 'licences of Debian: 5 characters, sha256 ' + HASH
    topics = texts.find('python')
    assert len(topics.text) > 200_000 and topics == texts.python_topics()


HASH = '9e999adc348bc9bf'


def test_bad_texts(tmp_path):
    with pytest.raises(UserError, match='no such text, it is none of python, licences'):
        texts.find(str(tmp_path / 'nothing'))
    (tmp_path / 'bytes').write_bytes(b'ab\xff')
    with pytest.raises(UserError, match='is not UTF-8: byte 2'):
        texts.find(str(tmp_path / 'bytes'))
    (tmp_path / 'empty').write_text('\n')
    with pytest.raises(UserError, match='empty; it must hold a text'):
        texts.find(str(tmp_path / 'empty'))
    with pytest.raises(UserError, match='no such folder, as Debian has it'):
        texts.licences(tmp_path / 'nothing')


# What is measured.


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    windows = np.random.default_rng(0).integers(0, 11, (5, 9))
    total = measures.of_text(lambda tokens: jnp.zeros((*tokens.shape, 11)), windows, batch=2)
    assert total.tokens == 40
    assert total.perplexity == pytest.approx(11, rel=1e-6)
    assert total.bits == pytest.approx(math.log2(11), rel=1e-6)
    assert total.perplexity_per(20) == pytest.approx(121, rel=1e-6)


def test_masked_positions_do_not_count():
    """Even where the loss is NaN; and the rows that fill up the last batch are none."""
    windows = np.array([[0, 1, 2], [0, 2, 1], [1, 1, 1]])
    mask = np.array([[True, False], [True, True], [False, True]])

    def logits_of(tokens):
        right = 5.0 * jax.nn.one_hot((tokens + 1) % 3, 3)
        return right.at[0, 1].set(jnp.nan)

    total = measures.of_text(logits_of, windows, mask, batch=3)
    by_hand = [math.log(math.exp(5) + 2) - 5 * hit for hit in (1, 0, 0, 0)]
    assert total.tokens == 4 and total.nats == pytest.approx(sum(by_hand), rel=1e-6)
    assert measures.of_text(logits_of, windows[1:], mask[1:], batch=8).tokens == 3
    values = jnp.array([1.0, jnp.nan, 5.0])
    assert measures.masked_mean(values, jnp.array([True, False, True])) == 3
    assert measures.masked_mean(values, jnp.zeros(3, bool)) == 0


def test_accuracy_of_sentences():
    inputs = TOKENS, ALL, np.zeros_like(TOKENS)

    def logits_of(tokens, mask, types):
        return jax.nn.one_hot(tokens[:, 0] % 3, 3)

    labels = TOKENS[:, 0] % 3
    assert measures.of_sentences(logits_of, inputs, labels, batch=8) == 100
    assert measures.of_sentences(logits_of, inputs, labels + [0, 1], batch=1) == 50


# Sentences and tokenizers.


@pytest.fixture
def word_piece(tmp_path):
    path = tmp_path / 'vocab.txt'
    path.write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\nun\n##able\nable\n!\ncafe\n##s')
    return tokenizers.WordPiece(path)


def test_words_in_pieces(word_piece):
    assert word_piece.encode('Unable CAFÉS!able\t zebra') == [4, 5, 8, 9, 7, 6, 1]
    assert word_piece.encode('un' * 60) == [1] and word_piece.encode(' \n') == []


def test_pairs_of_bytes(tmp_path):
    space = 'Ġ'
    pieces = ['a', 'b', 'ab', 'abab', f'{space}ab', space, '1', 'Ã', '©']
    (tmp_path / 'vocab.json').write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (tmp_path / 'merges.txt').write_text(f'#version: 0.2\na b\nab ab\n{space} ab\n')
    pairs = tokenizers.BytePairs(tmp_path / 'vocab.json', tmp_path / 'merges.txt')
    assert pairs.encode('abab ab1aé') == [3, 4, 6, 0, 7, 8]
    with pytest.raises(UserError, match="has no piece 'z'"):
        pairs.encode('z')
    (tmp_path / 'merges.txt').write_text('a b c\n')
    with pytest.raises(UserError, match="'a b c' is no pair of pieces"):
        tokenizers.BytePairs(tmp_path / 'vocab.json', tmp_path / 'merges.txt')
    with pytest.raises(UserError, match=r'has no line \[PAD\]'):
        tokenizers.WordPiece(tmp_path / 'merges.txt')


def test_tables_of_sentences(tmp_path, word_piece):
    path = tmp_path / 'dev.tsv'
    path.write_text('sentence\tlabel\tother\n"un\t1\table able able\nable\t0\tun\n')
    read = sentences.read(path, pair='other')
    assert read.texts == [('"un', 'able able able'), ('able', 'un')]
    assert list(read.labels) == [1, 0]
    tokens, mask, types = sentences.encode(read, word_piece, 7)
    np.testing.assert_array_equal(tokens, [[2, 1, 4, 3, 6, 6, 3], [2, 6, 3, 4, 3, 0, 0]])
    np.testing.assert_array_equal(types, [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]])
    np.testing.assert_array_equal(mask.sum(1), [7, 5])
    path.write_text('x\tno\t*\tun able\n')
    read = sentences.read(path, text=3, label=1, classes={'no': 0, 'yes': 1})
    assert read.texts == [('un able', '')] and list(read.labels) == [0]
    np.testing.assert_array_equal(sentences.encode(read, word_piece, 5)[0], [[2, 4, 6, 3, 0]])


def test_bad_tables(tmp_path):
    path = tmp_path / 'dev.tsv'
    with pytest.raises(UserError, match='dev.tsv cannot be read as a table'):
        sentences.read(path)
    path.write_text('sentence\tlabel\nsome\n')
    with pytest.raises(UserError, match='line 2: 1 columns, where 2 are needed'):
        sentences.read(path)
    with pytest.raises(UserError, match="no column 'text'; its columns are sentence, label"):
        sentences.read(path, text='text')
    path.write_text('sentence\tlabel\nsome\tgood\n')
    with pytest.raises(UserError, match="line 2: the class is 'good'; it must be a number"):
        sentences.read(path)
    with pytest.raises(UserError, match="is 'good'; it must be one of no, yes"):
        sentences.read(path, classes={'no': 0, 'yes': 1})
    path.write_text('sentence\tlabel\n')
    with pytest.raises(UserError, match='holds no sentences'):
        sentences.read(path)


# The generator, and the examples.


def test_generator_writes_a_share_anew(variables):
    """Texts that the networks know, and a gradient that is that of the masked distribution."""
    key, y = jax.random.key(3), variables['params']
    weights = np.random.default_rng(2).normal(size=(2, 8, 11)).astype(np.float32)

    @jax.jit
    def written(y, share):
        made = quantize_language.generate(DECODER, y, TOKENS, key, share)
        grads = jax.grad(
            lambda y: jnp.sum(weights * quantize_language.generate(DECODER, y, TOKENS, key, share))
        )(y)
        mask = jax.random.bernoulli(jax.random.split(key)[0], share, (2, 7))

        def masked(y):
            p = jax.nn.softmax(DECODER.apply({'params': y}, TOKENS)[:, :-1])
            return jnp.sum(weights[:, 1:] * mask[..., None] * p)

        return made, grads, jax.grad(masked)(y), mask

    made, grads, expected, mask = written(y, 0.5)
    assert set(np.unique(made)) <= {0.0, 1.0} and (made.sum(-1) == 1).all()
    kept = np.concatenate([np.ones((2, 1), bool), ~mask], 1)
    np.testing.assert_array_equal(made.argmax(-1)[kept], TOKENS[kept])
    helpers.assert_trees_close(grads, expected, atol=1e-5)
    assert np.abs(grads['embedding']['embedding']).max() > 1e-3
    made, grads, *_ = written(y, 0.0)
    np.testing.assert_array_equal(made.argmax(-1), TOKENS)
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_student_comes_to_its_teacher_and_a_text_is_learned():
    """Both examples in small: the loss falls, and what rounding cost becomes less."""
    model = Decoder(vocabulary=texts.VOCABULARY, length=16, width=16, depth=1, heads=2)
    tokens = texts.encode('the cat sat on the mat. ' * 200)
    tx = quantize_language.descent(sharpness.late_phase_sam(0.05, 0.8, total_steps=60), 1e-2, 60)
    params = model.init(jax.random.key(0), jnp.zeros((1, 16), int))['params']
    sizes = dict(model=model, tx=tx, batch=8, length=16, steps=60)
    params, _, found = training.run(params, tx.init(params), tokens, 0, **sizes)
    assert found[-1] < 0.5 * found[0]
    start = jnp.zeros((16, 16), int).at[:, 0].set(tokens[0])
    pool = training.continued(params, start, jax.random.key(1), model=model)
    assert (pool[:, 0] == tokens[0]).all() and len(np.unique(pool)) > 5
    down = quantize_language.descent(sharpness.sam(0.05), 5e-3, 40)
    x, y, f = quantize_language.train_student(
        params,
        pool,
        0,
        model=model,
        bits=2,
        activation_bits=8,
        steps=40,
        share=0.25,
        down=down,
        up=quantize_language.descent(sharpness.erm(), 1e-3, 40),
    )
    windows = texts.windows(tokens, 16)[:8]
    before, after = (
        quantize_language.measure(model, params, w, windows, 2).kl for w in (params, x)
    )
    assert after < 0.5 * before
    assert helpers.relative_distance(y, params) > 1e-4


def test_rounded_students(variables):
    """WxAy by hand for one dense layer; embeddings and norms are not rounded."""
    rounded = quantize_kernels(variables['params'], 2, per_channel=True)
    for name, module in rounded.items():
        for leaf, x in module.items():
            same = np.array_equal(x, variables['params'][name][leaf])
            assert same == (leaf != 'kernel'), (name, leaf)
    kernel = np.asarray(rounded['block0_query']['kernel'])
    assert all(len(np.unique(np.abs(column))) <= 2 for column in kernel.T)


# The commands.


def _printed(main, capsys, monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', ['command', *map(str, arguments)])
    main()
    return capsys.readouterr().out


@pytest.mark.slow
def test_commands_of_the_tables(tmp_path, capsys, monkeypatch):
    """Each with two seeds and hardly a step: every row is there, and pairs are of one seed."""
    text = tmp_path / 'text'
    text.write_text('\n\n'.join(f'{i} times {j} is {i * j}.' for i in range(9) for j in range(99)))
    few = ('--seeds=2', '--rho=0.05')
    printed = _printed(
        quantize_language.main,
        capsys,
        monkeypatch,
        f'--text={text}',
        '--bits=2',
        '--steps=1',
        '--teacher-steps=2',
        '--fixed',
        *few,
    )
    rows = [line.split(' | ') for line in printed.splitlines()[3:]]
    assert [row[1] for row in rows] == [
        'full precision',
        'rounded, not trained',
        'fixed generator',
        'plain min-max',
        'SAM min-max, rho 0.05',
    ]
    assert [bool(row[4].strip()) for row in rows] == [False, False, True, False, True]
    printed = _printed(
        forgetting.main,
        capsys,
        monkeypatch,
        f'--first={text}',
        '--second=python',
        '--steps=4',
        '--start=0',
        '--fine-steps=2',
        *few,
    )
    rows = [line.split(' | ') for line in printed.splitlines()[4:]]
    assert [row[0] for row in rows] == ['| Adam', '| late SAM, rho 0.05', '| less Adam']
    mean = [float(row[1].split(' ± ')[0]) for row in rows]
    assert mean[1] - mean[0] == pytest.approx(mean[2], abs=2e-3)


@pytest.mark.slow
def test_command_for_folders(tmp_path, capsys, monkeypatch, variables):
    """A folder of an OPT and one of a BERT, both with weights that were drawn."""
    from safetensors.numpy import save_file

    arrays = _theirs(DECODER, formats.TRANSFORMERS_OPT, variables)
    save_file({k: np.ascontiguousarray(x) for k, x in arrays.items()}, tmp_path / 'm.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(OPT))
    (tmp_path / 'vocab.json').write_text(json.dumps({c: i for i, c in enumerate('abcdefghijk')}))
    (tmp_path / 'merges.txt').write_text('')
    (tmp_path / 'text').write_text('abcdefghijk' * 9)
    command = tmp_path, f'--text={tmp_path / "text"}', '--length=8', '--bits=2'
    printed = _printed(evaluate_language.main, capsys, monkeypatch, *command).splitlines()
    assert [row.split(' | ')[0] for row in printed[3:]] == ['| W32A32', '| W2A8']
    assert all(row.endswith(' | 96 |') for row in printed[3:])

    arrays = _theirs(ENCODER, formats.TRANSFORMERS_BERT, _drawn(_shapes(ENCODER)))
    save_file({k: np.ascontiguousarray(x) for k, x in arrays.items()}, tmp_path / 'm.safetensors')
    bert = {**OPT, 'model_type': 'bert', 'intermediate_size': 32}
    (tmp_path / 'config.json').write_text(json.dumps(bert))
    (tmp_path / 'vocab.txt').write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\nc\nd\ne\nf\ng')
    table = tmp_path / 'table.tsv'
    table.write_text(
        'sentence\tlabel\n' + ''.join(f'a {c}\t{i % 3}\n' for i, c in enumerate('abcd'))
    )
    command = tmp_path, f'--table={table}', '--classes=3', '--length=8', '--bits=2'
    printed = _printed(evaluate_language.main, capsys, monkeypatch, *command).splitlines()
    accuracies = [float(row.split(' | ')[1].strip(' |')) for row in printed[2:]]
    assert len(accuracies) == 2 and all(a in (0, 25, 50, 75, 100) for a in accuracies)
    with pytest.raises(UserError, match='there is a class 2; --classes is 2'):
        _printed(evaluate_language.main, capsys, monkeypatch, *command[:2], '--classes=2')
