"""Learned prompts: CLIP's towers, its tokens and files, the context, base and new classes."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal, at_step

from configs import prompts as config
from sam_jax import data, metrics, models, nans, settings, train
from sam_jax.data.load import few_shots
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment
from sam_jax.models import bpe, clip, clip_files, formats, prompts, transformer
from sam_jax.settings import schema

TOWER = transformer.Size(16, 1, 2)
SIZE = clip.Size(TOWER, TOWER, 8, vocabulary=514, length=20)
SHAPE = (8, 8, 1)
CLASSES = ('0', 'one_two', '3')


def tiny(**options):
    return prompts.Prompts(size=SIZE, patch=4, num_classes=3, **{'context': 4, **options})


def random_towers(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.3), clip_files.shapes(model, SHAPE)['params']
    )


def run_config(method='sam', **changes):
    c = config.get_config(f'small,method={method}')
    with c.unlocked():
        c.data.name, c.model.name = 'digits', 'clip-tiny4'
        c.total_epochs = 1
        for key, value in changes.items():
            c.update_from_flattened_dict({key: value})
    return c


# Tokens


def test_a_word_is_joined_by_the_first_pair_of_the_file():
    numbers = {**bpe.of_bytes(517), 'ab': 512, 'bc</w>': 513, 'abc</w>': 514}
    both = bpe.Tokenizer(numbers, [('b', 'c</w>'), ('a', 'b'), ('a', 'bc</w>')])
    b, single = numbers['b'], numbers['a']
    assert both('abc') == [514] and both('ab') == [single, numbers['b</w>']]
    assert both('ABab') == [512, single, numbers['b</w>']]
    other = bpe.Tokenizer(numbers, [('a', 'b'), ('b', 'c</w>')])
    assert other('abc') == [512, numbers['c</w>']] and other('bbc') == [b, 513]
    assert (both.start, both.end) == (515, 516)


def test_words():
    text = "It's  T-shirt/top,\t12 e\u0301t\u00e9 \u00b2\u2167! don't"
    assert list(bpe.words(text)) == (
        ['it', "'s", 't', '-', 'shirt', '/', 'top', ',', '1', '2', 'été']
        + ['²', 'ⅷ', '!', 'don', "'t"]
    )
    tokens = bpe.Tokenizer(bpe.of_bytes(), [])
    assert tokens('é') == [bpe.of_bytes()['Ã'], bpe.of_bytes()['©</w>']]


def test_bytes_have_the_numbers_of_openai():
    numbers = bpe.of_bytes(49_408)
    assert [numbers[t] for t in ('!', 'a', '!</w>', bpe.START, bpe.END)] == (
        [0, 64, 256, 49_406, 49_407]
    )
    assert len({*numbers.values()}) == 514 and numbers['Ā'] == 188


# Names and the context


def test_names_leave_places_for_the_context():
    tokens = bpe.Tokenizer(bpe.of_bytes(), [])
    names = clip_files.names(tokens, CLASSES, context=4, length=20)
    start, end = 512, 513
    assert names.shape == (3, 1 + 4 + len('onetwo.') + 1)
    for row, name in zip(names, ('0', 'one two', '3')):
        said = [start, 0, 0, 0, 0, *tokens(f'{name}.'), end]
        np.testing.assert_array_equal(row, said + [0] * (names.shape[1] - len(said)))
    with pytest.raises(UserError, match="model.context is 13; .*'one_two' .* 22 tokens, .* 20"):
        clip_files.names(tokens, CLASSES, context=13, length=20)
    with pytest.raises(UserError, match='no names'):
        clip_files.names(tokens, (), 4, 20)
    unnamed = settings.default_config()
    schema.set_model(unnamed, 'clip-tiny4')
    unnamed.data.name, unnamed.model.context = 'fake_cifar10', 4
    with pytest.raises(UserError, match='no names'):  # before anything is computed
        Experiment.from_config(unnamed, jax.devices()[:1])


def test_the_context_stands_behind_the_first_token():
    embedded = np.arange(2 * 5 * 3, dtype=float).reshape(2, 5, 3)
    context = -np.ones((2, 3))
    out = np.asarray(prompts.prompted(jnp.asarray(embedded), jnp.asarray(context)))
    np.testing.assert_array_equal(out[:, 1:3], -np.ones((2, 2, 3)))
    np.testing.assert_array_equal(out[:, [0, 3, 4]], embedded[:, [0, 3, 4]])


@pytest.fixture(scope='module')
def learned():
    """(model, loss of a context, frozen variables) in float64, each compiled once."""
    with jax.enable_x64(True):
        model = tiny(dtype='float64', param_dtype='float64')
        frozen = clip_files.frozen(model, '', CLASSES, SHAPE, 0)
        frozen = {**frozen, 'clip': random_towers(model.clip)}
        images = np.random.default_rng(1).normal(size=(4, *SHAPE))

        def loss(vectors, names):
            variables = {'clip': frozen['clip'], 'names': names}
            params = {'context': {'vectors': vectors}}
            logits = model.apply({'params': params, 'frozen': variables}, images)
            return -jax.nn.log_softmax(logits)[:, 0].mean(), logits

        yield model, jax.jit(jax.value_and_grad(loss, has_aux=True)), frozen


def test_the_gradient_of_the_context(learned, x64):
    """Equals finite differences, and every vector has one."""
    _, loss, frozen = learned
    rng = np.random.default_rng(2)
    context, direction = rng.normal(size=(2, 4, 16))
    _, grads = loss(context, frozen['names'])
    up, down = (loss(context + h * direction, frozen['names'])[0][0] for h in (1e-5, -1e-5))
    np.testing.assert_allclose(np.vdot(grads, direction), (up - down) / 2e-5, rtol=1e-6)
    assert (np.linalg.norm(grads, axis=1) > 1e-4).all()


def test_logits_are_similarities_of_prompts(learned, x64):
    """Without a context of its own the prompt is a text, which CLIP itself compares."""
    model, loss, frozen = learned
    ids = frozen['names'].copy()
    ids[:, 1:5] = [7, 8, 9, 10]
    context = frozen['clip']['tokens']['embedding'][[7, 8, 9, 10]]
    (_, logits), _ = loss(context, frozen['names'])
    images = np.random.default_rng(1).normal(size=(4, *SHAPE))
    expected = jax.jit(model.clip.apply)({'params': frozen['clip']}, images, ids)
    np.testing.assert_allclose(logits, expected, rtol=1e-12)


def test_other_names_are_other_classes_and_a_later_token_changes_nothing(learned, x64):
    _, loss, frozen = learned
    context = np.random.default_rng(2).normal(size=(4, 16))
    (_, logits), _ = loss(context, frozen['names'])
    behind = frozen['names'].copy()
    ends = behind.argmax(axis=1)
    for row, end in zip(behind, ends):
        row[end + 1 :] = 5  # behind the end; the longest has none
    assert (behind != frozen['names']).any()
    np.testing.assert_array_equal(loss(context, behind)[0][1], logits)
    turned = frozen['names'][[1, 2, 0]]
    np.testing.assert_allclose(loss(context, turned)[0][1], logits[:, [1, 2, 0]], rtol=1e-12)
    before = frozen['names'].copy()
    before[1, ends[1] - 2] = 5
    changed = np.abs(loss(context, before)[0][1] - logits).max(axis=0) > 1e-9
    np.testing.assert_array_equal(changed, [False, True, False])


def test_the_context_begins_with_words():
    model = tiny(words='a b')
    towers = {'tokens': {'embedding': np.arange(514.0)[:, None] * np.ones(16)}}
    params = {'context': {'vectors': np.zeros((4, 16), np.float32)}}
    with pytest.raises(UserError, match="model.words is 'a b', which is 2 tokens; .* is 4"):
        clip_files.begun(model, '', towers, params)
    begun = clip_files.begun(tiny(context=2, words='a b'), '', towers, params)
    numbers = bpe.of_bytes()
    expected = [numbers['a</w>'], numbers['b</w>']]
    np.testing.assert_array_equal(begun['context']['vectors'][:, 0], expected)
    assert clip_files.begun(tiny(), '', towers, params) is params
    with pytest.raises(UserError, match='model.context is 18; .* at most 17'):
        tiny(context=18)


# Files


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """(folder, model, params) of a CLIP of our own."""
    place = str(tmp_path_factory.mktemp('clip'))
    model = tiny().clip
    params = jax.tree.map(np.float32, random_towers(model))
    clip_files.write(place, model, params, SHAPE)
    return place, model, params


def test_what_is_written_is_read(folder):
    place, model, params = folder
    assert_trees_equal(clip_files.read(place, model, SHAPE), params)
    sums = {
        clip_files.checksum({'clip': p}) for p in (params, jax.tree.map(lambda x: x + 0, params))
    }
    other = jax.tree.map(lambda x: x + 1, params)
    assert len(sums) == 1 and clip_files.checksum({'clip': other}) not in sums
    assert clip_files.checksum({}) == ''
    read = clip_files.frozen(tiny(), place, CLASSES, SHAPE, 0)
    assert_trees_equal(read['clip'], params)
    np.testing.assert_array_equal(
        read['names'], clip_files.frozen(tiny(), '', CLASSES, SHAPE, 0, params)['names']
    )


def test_names_of_transformers():
    name = formats.TRANSFORMERS_CLIP.name
    model = tiny().clip
    assert name(model, 'params/image/block3_query/kernel') == (
        'vision_model.encoder.layers.3.self_attn.q_proj.weight'
    )
    assert name(model, 'params/image/ln_pre/scale') == 'vision_model.pre_layrnorm.weight'
    assert name(model, 'params/text/ln_final/bias') == 'text_model.final_layer_norm.bias'
    assert name(model, 'params/logit_scale/scale') == 'logit_scale'


CONFIG = {'text_config': {'num_attention_heads': 2}, 'vision_config': {'num_attention_heads': 2}}


@pytest.mark.parametrize(
    'file, content, words',
    [
        ('vocab.json', None, ['There is no', 'vocab.json', 'merges.txt']),
        ('vocab.json', '{', ['vocab.json cannot be read']),
        ('vocab.json', '[1]', ['vocab.json must hold a JSON object']),
        ('vocab.json', '{"a": 514}', ["token 'a' of number 514; the model has 514"]),
        ('vocab.json', '{"a": 1}', ["is no vocabulary of CLIP: it has no token '<|startoftext|>'"]),
        ('merges.txt', None, ['There is no', 'merges.txt']),
        ('merges.txt', '#version: 0.2\na b\na b c\n', ["two tokens a line; pair 1 is 'a b c'"]),
        ('config.json', None, ['There is no', 'config.json']),
        ('config.json', '[]', ['config.json cannot be read']),
        (
            'config.json',
            json.dumps({**CONFIG, 'vision_config': {'num_attention_heads': 3}}),
            ['vision tower of 3 heads, and the model 2'],
        ),
        (
            'config.json',
            json.dumps({**CONFIG, 'text_config': {'hidden_act': 'gelu'}}),
            ["text tower with 'gelu'", 'model.exact_gelu'],
        ),
        ('model.safetensors', None, ['no such file']),
        ('model.safetensors', 'x', ['model.safetensors cannot be read as safetensors']),
    ],
)
def test_bad_files(folder, tmp_path, file, content, words):
    place = tmp_path / 'clip'
    place.mkdir()
    for name in ('vocab.json', 'merges.txt', 'config.json', 'model.safetensors'):
        with open(f'{folder[0]}/{name}', 'rb') as source:
            (place / name).write_bytes(source.read())
    if content is None:
        (place / file).unlink()
    else:
        (place / file).write_text(content)
    with pytest.raises(UserError) as e:
        clip_files.frozen(tiny(), str(place), CLASSES, SHAPE, 0)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert '\n' not in str(e.value)


def test_the_end_token_has_the_highest_number():
    numbers = {**bpe.of_bytes(), 'more': 514}
    with pytest.raises(ValueError, match='the highest number'):
        bpe.Tokenizer(numbers, [])


# Data


def test_shots():
    labels = np.random.default_rng(0).integers(0, 3, 60)
    labels[:2] = 3
    few, more = (few_shots(labels, shots, 7) for shots in (4, 9))
    np.testing.assert_array_equal(np.bincount(labels[few]), [4, 4, 4, 2])
    assert set(few) < set(more) and (np.diff(few) > 0).all()
    assert set(few) != set(few_shots(labels, 4, 8))
    # Of fewer classes the same ones.
    base = np.flatnonzero(labels < 2)
    np.testing.assert_array_equal(base[few_shots(labels[base], 4, 7)], few[labels[few] < 2])


def test_base_and_new():
    whole, split = run_config(), run_config()
    with whole.unlocked():
        whole.data.base_to_new, whole.data.shots = False, 0
    whole, split = (data.load_dataset(c.data) for c in (whole, split))
    assert (split.classes, split.new_classes) == (tuple('01234'), tuple('56789'))
    assert split.num_classes == 5 and len(split.train) == 5 * 16
    test = whole.evals['test']
    base, new = split.evals['test'], split.evals['new']
    assert len(base) + len(new) == len(test)
    np.testing.assert_array_equal(base.images, test.images[test.labels < 5])
    np.testing.assert_array_equal(new.images, test.images[test.labels >= 5])
    np.testing.assert_array_equal(new.labels, test.labels[test.labels >= 5] - 5)


class _Folder:
    """As `records.FolderStream`, of images that nobody reads."""

    def __init__(self, classes):
        self.classes = classes
        self.labels = np.arange(8 * len(classes)) % len(classes)

    def open(self, data_dir):
        del data_dir
        return self, self, len(self.classes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return b'', self.labels[i], f'{i}'


def test_base_and_new_of_a_folder():
    c = config.get_config('shots=3').data
    split = data.load_dataset(c, streams={'folder': _Folder(tuple('abcde'))})
    assert (split.classes, split.new_classes, split.num_classes) == (('a', 'b', 'c'), ('d', 'e'), 3)
    assert [len(split.train), *map(len, split.evals.values())] == [9, 24, 16, 9]
    assert [split.evals['new'][i][1] for i in range(4)] == [0, 1, 0, 1]
    assert {split.train[i][1] for i in range(9)} == {0, 1, 2}
    assert split.mean == data.load.CLIP_MEAN
    with pytest.raises(UserError, match='base_to_new is True; folder has 3 classes: .* four'):
        data.load_dataset(c, streams={'folder': _Folder(tuple('abc'))})


def test_harmonic_mean():
    assert metrics.harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert metrics.harmonic_mean(0.7, 0.7) == pytest.approx(0.7)
    assert metrics.harmonic_mean(0.0, 1.0) == metrics.harmonic_mean(0.0, 0.0) == 0


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'data.name': 'imagenet', 'data.image_size': 64}, ['data.shots is 16', 'streamed']),
        ({'data.normalization': 'clip'}, ["normalization is 'clip'", "'dataset'"]),
        ({'analysis.every_epochs': 1}, ['analysis.every_epochs is 1', 'prompts']),
        ({'data.name': 'fake_cifar10'}, ['base_to_new is True', 'no names']),
    ],
)
def test_bad_settings(changes, words):
    c = run_config(**changes)
    with pytest.raises(UserError) as e:
        settings.check(c)
        data.load_dataset(c.data)
    assert all(word in str(e.value) for word in words), str(e.value)


def test_only_prompts_know_new_classes():
    c = run_config()
    with c.unlocked():
        schema.set_model(c, 'wrn10_1')
        for option in ('context', 'words', 'exact_gelu'):
            del c.model[option]
    with pytest.raises(UserError, match='data.base_to_new is True; .* wrn10_1 does not read'):
        settings.check(c)


# Training


def test_only_the_context_is_trained():
    """Towers and names are no part of the state, and stay what they were."""
    experiment = Experiment.from_config(run_config('gradient_constrained'), jax.devices()[:1])
    before = jax.device_get(experiment.arrays(experiment.dataset.train)['frozen'])
    state = experiment.initial_state()
    (context,) = jax.tree.leaves(jax.device_get(state.params))
    assert context.shape == (16, 32)
    sizes = [np.size(x) for x in jax.tree.leaves(state)]
    assert max(sizes) == 16 * 32 and sizes.count(16 * 32) == 2  # params and momentum
    for feed in experiment.feeds(experiment.total_steps - 2):
        state, logged = experiment.train_step(state, feed, *experiment.constants)
    assert float(logged['train/perturbation_norm']) == pytest.approx(0.1, rel=1e-4)
    assert_trees_equal(jax.device_get(experiment.constants[0]['frozen']), before)
    assert (jax.tree.leaves(jax.device_get(state.params))[0] != context).any()


@pytest.mark.slow
def test_a_run(tmp_path):
    """Trains, is tested on base and new classes, and is opened by its folder."""
    import sam_jax

    train.train_and_evaluate(run_config(), str(tmp_path), jax.devices()[:1])
    result = json.loads((tmp_path / 'result.json').read_text())
    base, new = (1 - result[f'{name}/error_rate'] for name in ('test', 'new'))
    assert result['new/harmonic_mean'] == pytest.approx(2 * base * new / (base + new))
    model = sam_jax.load(tmp_path)
    split = data.load_dataset(run_config().data).evals['test']
    wrong = model.predict(split.images).argmax(axis=1) != split.labels
    assert wrong.mean() == pytest.approx(result['test/error_rate'])


@pytest.mark.slow
@pytest.mark.bitwise
def test_a_run_resumes_and_is_the_same_on_four_devices(tmp_path):
    # Five steps an epoch.
    changes = {'total_epochs': 2, 'replica_batch_size': 4, 'checkpoint.every_epochs': 1}
    c = run_config('gradient_constrained', **changes)

    def trained(folder, devices):
        state = train.train_and_evaluate(c, str(tmp_path / folder), jax.devices()[:devices])
        return jax.device_get(state)

    whole, four = trained('whole', 1), trained('four', 4)
    (one,), (other,) = (jax.tree.leaves(s.params) for s in (whole, four))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    with at_step(7, mock.Mock(side_effect=KeyboardInterrupt)), pytest.raises(KeyboardInterrupt):
        trained('stopped', 1)
    # Another CLIP in its place.
    with mock.patch.object(clip_files, 'checksum', lambda frozen: 'x'):
        with pytest.raises(UserError, match='with another CLIP .* and is x; let model.init_from'):
            trained('stopped', 1)
    assert_trees_equal(trained('stopped', 1), whole)


@pytest.mark.parametrize(
    'name, count',
    [
        ('clip-b16', 149_620_737),
        pytest.param('clip-b32', 151_277_313, marks=pytest.mark.slow),
        pytest.param('clip-l14', 427_616_513, marks=pytest.mark.slow),
    ],
)
def test_sizes_of_openai(name, count):
    shapes = clip_files.shapes(models.create_model(name, 2).clip, (224, 224, 3))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_they_are_looked_at_for_what_is_not_finite():
    experiment = Experiment.from_config(run_config(), jax.devices()[:1])
    feed = experiment.layout.shard(experiment.dataset.train_feed(0, 0, experiment.layout))
    state, finder = jax.eval_shape(experiment.create_state), nans.Finder(experiment)
    found = jax.eval_shape(finder._look, state, feed, *experiment.constants)
    assert found.shape[-1] == len(finder._names) > 10
