"""CoOp, CoOp with SAM, and GCSCoOp on a CLIP that is trained here: the table of prompts.md.

    python -m sam_jax.benchmarks.prompts [--seeds=5] [--workdir=runs/prompts]

First a CLIP of the size `clip-tiny14` learns from Fashion-MNIST what the names of its ten classes
mean: a step has 64 images and one caption of each class, 'a photo of a ...' or one of its like. The
images are a part of the training set that none of the runs' shots is in. Then each method learns
its prompts by `configs/prompts.py:small`, from 16 images of each of the first five classes, and is
tested on these, and on the other five by their names. Accuracy in percent, mean and 95 % t-interval
over seeds, which decide on shots, order and the context's first values; CLIP is the same for all.
What is there already in WORKDIR is not done again.
"""

import argparse
import dataclasses
import functools
import logging
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_jax import data, metrics, models, rngs, run_log, settings, tables
from sam_jax.cli import commands
from sam_jax.data.load import few_shots
from sam_jax.data.sources import SOURCES
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment
from sam_jax.experiments.results import interval, mean_and_interval
from sam_jax.models import bpe, clip_files

CAPTIONS = (
    'a photo of a {}.',
    'a picture of a {}.',
    'an image of a {}.',
    'a black and white photo of a {}.',
    'a small photo of a {}.',
    'this is a {}.',
)
IMAGES = 4000  # that CLIP is trained on
BATCH, STEPS, LEARNING_RATE = 64, 400, 3e-3
CLIP_SEED = 0
METHODS = {'CoOp': 'sgd', 'CoOp + SAM': 'sam', 'GCSCoOp': 'gradient_constrained'}


def captions(classes: tuple[str, ...], template: str, length: int, size: int) -> np.ndarray:
    """Returns the captions of the classes as numbers, (classes, length) int32."""
    tokens = bpe.Tokenizer(bpe.of_bytes(size), [])
    rows = [[tokens.start, *tokens(template.format(name)), tokens.end] for name in classes]
    if max(map(len, rows)) > length:
        raise ValueError(f'a caption has more than {length} tokens.')
    return np.array([row + [0] * (length - len(row)) for row in rows], np.int32)


@functools.partial(jax.jit, static_argnames=('model', 'tx'))
def pretraining_step(
    params: Any,
    state: Any,
    images: jax.Array,
    labels: jax.Array,
    ids: jax.Array,
    *,
    model: Any,
    tx: Any,
) -> tuple[Any, Any, jax.Array]:
    """One step on images (N, H, W, C) and a caption of each class (classes, T)."""

    def loss(params):
        logits = model.apply({'params': params}, images, ids)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def pretrain(folder: str, config: Any, seeds: int) -> None:
    """Trains CLIP on images that no run's shots are among, and writes its folder."""
    whole = config.copy_and_resolve_references()
    with whole.unlocked():
        whole.data.base_to_new, whole.data.shots = False, 0
    dataset = load(whole.data)
    model = models.from_config(whole.model, dataset.num_classes).clip
    labels = dataset.train.labels
    # Those of the base classes alone, too: shots are chosen class by class.
    used = [few_shots(labels, config.data.shots, seed) for seed in range(seeds)]
    free = np.setdiff1d(np.arange(len(labels)), np.concatenate(used))
    chosen = free[rngs.permutation(CLIP_SEED, 'clip_images', len(free))[:IMAGES]]
    images, labels = dataset.train.images[chosen], labels[chosen]
    size = model.size
    texts = [captions(dataset.classes, c, size.length, size.vocabulary) for c in CAPTIONS]
    zeros = jnp.zeros((1, *dataset.image_shape))
    params = jax.jit(model.init)(rngs.key(CLIP_SEED, 'clip'), zeros, texts[0])['params']
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, STEPS // 10, STEPS)
    tx = optax.adamw(schedule, weight_decay=0.01)
    state = tx.init(params)
    for step in range(STEPS):
        i = rngs.integers(CLIP_SEED, 'clip_batch', BATCH, len(images), step)
        ids = texts[rngs.integers(CLIP_SEED, 'clip_caption', 1, len(texts), step)[0]]
        pixels = dataset.preprocessing(jnp.asarray(images[i]))
        params, state, loss = pretraining_step(
            params, state, pixels, labels[i], ids, model=model, tx=tx
        )
        if (step + 1) % 50 == 0:
            tell(f'CLIP: step {step + 1} of {STEPS}, loss {float(loss):.3f}')
    clip_files.write(folder, model, params, dataset.image_shape)


def zero_shot(config: Any) -> dict[str, float]:
    """Returns the accuracies of 'a photo of a NAME.', no image of a class seen for them."""
    dataset = load(config.data)
    model = models.from_config(config.model, dataset.num_classes).clip
    params = clip_files.read(config.model.init_from, model, dataset.image_shape)
    apply = jax.jit(model.apply)

    def accuracy(name, classes):
        split = dataset.evals[name]
        ids = captions(classes, CAPTIONS[0], model.size.length, model.size.vocabulary)
        right = 0
        for start in range(0, len(split), 1000):
            pixels = dataset.preprocessing(jnp.asarray(split.images[start : start + 1000]))
            logits = apply({'params': params}, pixels, ids)
            right += int((np.argmax(logits, axis=-1) == split.labels[start : start + 1000]).sum())
        return right / len(split)

    base, new = accuracy('test', dataset.classes), accuracy('new', dataset.new_classes)
    return {'base': base, 'new': new, 'mean': metrics.harmonic_mean(base, new)}


def learn(experiment: Experiment) -> dict[str, float]:
    """Returns the accuracies of a run's prompts after its last step."""
    state = experiment.initial_state()
    for feed in experiment.feeds():
        state, _ = experiment.train_step(state, feed, *experiment.constants)
    result = experiment.evaluate(state)
    base, new = (1 - result[f'{name}/error_rate'] for name in ('test', 'new'))
    return {'base': base, 'new': new, 'mean': result['new/harmonic_mean']}


class Runs:
    """Runs that differ in their seeds; what each says is kept in a file of a folder."""

    def __init__(self, folder: str) -> None:
        self._folder, self._first = folder, None

    def __call__(self, config: Any) -> dict[str, float]:
        """Returns the accuracies of a run."""
        path = os.path.join(self._folder, f'seed={config.seed}.json')
        if not os.path.exists(path):
            experiment = Experiment.of_any_size(config, jax.devices()[:1], load=load)
            self._first = self._first or experiment
            # They differ in values alone: what is compiled for the first one is for all.
            steps = {name: getattr(self._first, name) for name in ('train_step', 'eval_step')}
            experiment.__dict__.update(steps)
            result = learn(experiment)
            os.makedirs(self._folder, exist_ok=True)
            run_log.write_json(path, result)
        return run_log.read_json(path)


@functools.cache
def read_once(name: str, folder: str) -> Any:
    """Returns the splits of a dataset, read when it is first asked for."""
    return SOURCES[name].read(folder)


def load(settings: Any) -> Any:
    """Returns the dataset of a run."""
    read = functools.partial(read_once, settings.name)
    source: Any = SOURCES[settings.name]
    return data.load_dataset(settings, {settings.name: dataclasses.replace(source, read=read)})


def tell(text: str) -> None:
    """Says how far it is."""
    print(text, file=sys.stderr, flush=True)


def row(name: str, results: list[dict[str, float]]) -> tuple[str, ...]:
    """Returns a row of the table, in percent."""
    return (
        name,
        *(
            interval(mean_and_interval([100 * r[key] for r in results]))
            for key in ('base', 'new', 'mean')
        ),
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', default='runs/prompts', help='Gets CLIP and the runs.')
    parser.add_argument('--seeds', type=int, default=5, help='Seeds 0, 1, ...')
    parser.add_argument('--arguments', default='', help="Further arguments, 'rho=0.05,epochs=20'.")
    args = parser.parse_args()
    for name in ('sam_jax', 'absl'):
        logging.getLogger(name).setLevel(logging.WARNING)

    further = f',{args.arguments}' if args.arguments else ''

    def config_of(method, seed):
        _, config = settings.load(f'prompts:small,method={method},seed={seed}{further}')
        config.model.init_from = os.path.join(args.workdir, 'clip')
        return config

    first = config_of('sgd', 0)
    if not os.path.exists(os.path.join(first.model.init_from, 'vocab.json')):
        pretrain(first.model.init_from, first, args.seeds)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    runs = {m: Runs(os.path.join(args.workdir, m + further)) for m in METHODS.values()}
    for seed in range(args.seeds):
        for name, method in METHODS.items():
            result = runs[method](config_of(method, seed))
            results[name].append(result)
            said = ', '.join(f'{key} {100 * x:.2f} %' for key, x in result.items())
            tell(f'{name}, seed {seed}: {said}')
    rows = [row("'a photo of a ...'", [zero_shot(first)])]
    rows += [row(name, of_seeds) for name, of_seeds in results.items()]
    print(tables.markdown(('prompt', 'base (%)', 'new (%)', 'harmonic mean (%)'), rows))


if __name__ == '__main__':
    try:
        main()
    except (UserError, OSError) as e:
        commands.leave(str(e))
