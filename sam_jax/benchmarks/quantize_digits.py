"""Quantises a trained digits network without its training data: the table in docs/quantization.md.

    python -m sam_jax.benchmarks.quantize_digits [--workdir=RUN] [--seeds=5] [--bits=4] [--rho=0.05]

The teacher is the full-precision network of RUN or, if none is given, for each seed one of its own,
which is trained first. The student begins as a copy whose kernels are rounded to so many bits in
every forward pass, with one scale a kernel; activations, biases and BatchNorm are left alone. Then
the student descends and a generator ascends, on nothing but the generator's images,

    f = mean |teacher's logits - student's logits| - STATISTICS mismatch of BatchNorm statistics

where the mismatch is that of the images' statistics in the teacher with the running ones, which
every trained network carries within. It keeps the images near the data; the student does not see
it. Real images serve for the printed figures and for no step: test accuracy, and the mean
difference of the logits on test images, of full precision, of rounding alone, of plain min-max and
of SAM min-max. Mean and 95 % t-interval over seeds; the gain over plain min-max is of pairs of the
same seed.
"""

import argparse
import functools
import logging
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sam_jax import rngs, settings, sharpness, tables, train
from sam_jax.cli import commands
from sam_jax.data import augment
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment
from sam_jax.experiments.results import interval, mean_and_interval
from sam_jax.quantization import min_max_step, quantize_kernels

EPOCHS = 20  # of a teacher that is trained here
BATCH, LATENTS = 64, 32
LEARNING_RATE = 1e-3  # Adam's, of student and generator; it falls to 0 along a cosine
STATISTICS = 100.0


class Generator(nn.Module):
    """Latents (N, LATENTS) -> images (N, *shape), normalised as the network's input is."""

    shape: tuple
    mean: tuple
    std: tuple

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(128)(latents))
        x = nn.relu(nn.Dense(128)(x))
        pixels = 255 * nn.sigmoid(nn.Dense(math.prod(self.shape))(x))
        return augment.normalize(pixels.reshape(-1, *self.shape), self.mean, self.std)


def divergence(model: Any, teacher: Any, params: Any, images: jax.Array) -> jax.Array:
    """Mean absolute difference of the logits of the teacher's variables and a student's params."""
    student = {**teacher, 'params': params}
    return jnp.mean(
        jnp.abs(
            model.apply(teacher, images, train=False) - model.apply(student, images, train=False)
        )
    )


def mismatch(model: Any, teacher: Any, images: jax.Array) -> jax.Array:
    """How far a training pass on the images would move the running BatchNorm statistics.

    The mean square of each mean's and variance's way, summed over layers. The way is 1 - momentum
    of that to the statistics of the images, whatever the architecture.
    """
    moved = model.apply(teacher, images, train=True, mutable=['batch_stats'])[1]['batch_stats']
    ways = jax.tree.map(lambda new, old: jnp.mean((new - old) ** 2), moved, teacher['batch_stats'])
    return sum(jax.tree.leaves(ways))


@functools.partial(jax.jit, static_argnames=('model', 'generator', 'bits', 'descent', 'ascent'))
def step(
    teacher: Any,
    x: Any,
    y: Any,
    states: Any,
    key: jax.Array,
    *,
    model: Any,
    generator: Generator,
    bits: int,
    descent: optax.GradientTransformation,
    ascent: optax.GradientTransformation,
) -> tuple[Any, Any, Any]:
    """One min-max step of student x and generator y on new latents; returns (x, y, states)."""
    latents = jax.random.normal(key, (BATCH, LATENTS))

    def f(x, y):
        images = generator.apply({'params': y}, latents)
        return divergence(
            model, teacher, quantize_kernels(x, bits), images
        ) - STATISTICS * mismatch(model, teacher, images)

    return min_max_step(f, x, y, states, descent, ascent)


def train_student(
    teacher: Any,
    seed: int,
    steps: int,
    *,
    generator: Generator,
    descent: optax.GradientTransformation,
    ascent: optax.GradientTransformation,
    **parts: Any,
) -> tuple[Any, Any]:
    """Returns the params of student and generator after so many steps; `parts` as of `step`."""
    x = teacher['params']
    y = generator.init(rngs.key(seed, 'generator'), jnp.zeros((1, LATENTS)))['params']
    states = descent.init(x), ascent.init(y)
    for i in range(steps):
        x, y, states = step(
            teacher,
            x,
            y,
            states,
            rngs.key(seed, 'latents', i),
            generator=generator,
            descent=descent,
            ascent=ascent,
            **parts,
        )
    return x, y


def open_teacher(workdir: str, seed: int) -> tuple[Experiment, Any]:
    """Returns (experiment, weights) of a run; where workdir is '', of one that is trained now."""
    if not workdir:
        workdir = os.path.join('runs', 'quantize_digits', f'seed={seed}')
        _, config = settings.load(f'digits:seed={seed}')
        config.total_epochs = EPOCHS
        train.train_and_evaluate(config, workdir)
    experiment = Experiment.of_run(workdir)
    state, _ = experiment.restore(workdir)
    return experiment, jax.device_get(experiment.weights(state))


def make_measure(experiment: Experiment) -> Callable[..., tuple[float, float]]:
    """Returns the function (teacher, params) -> (test accuracy in %, divergence on test images)."""
    dataset, model = experiment.dataset, experiment.model
    split = dataset.evals['test']
    (feed,) = dataset.eval_feeds(split, len(split), experiment.layout)
    batch = dataset.eval_batch(dataset.device_arrays(split), feed)
    # The places that fill up the last device come last.
    images, labels = (
        batch[k].reshape(-1, *batch[k].shape[2:])[: len(split)] for k in ('image', 'label')
    )

    @jax.jit
    def measure(teacher, params):
        logits = model.apply({**teacher, 'params': params}, images, train=False)
        return (
            100 * jnp.mean(jnp.argmax(logits, -1) == labels),
            divergence(model, teacher, params, images),
        )

    return lambda *arguments: tuple(map(float, measure(*arguments)))


def row(
    bits: int,
    name: str,
    results: list[tuple[float, float]],
    plain: list[tuple[float, float]] | None = None,
) -> tuple[Any, ...]:
    """Returns a row of the table: results are those of `measure`, one a seed."""
    accuracies, distances = zip(*results)
    gain = ''
    if plain:
        pairs = [a - b for a, (b, _) in zip(accuracies, plain)]
        gain = interval(mean_and_interval(pairs), sign=True)
    return (
        bits,
        name,
        interval(mean_and_interval(list(accuracies))),
        gain,
        interval(mean_and_interval(list(distances)), 3),
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', default='', help='Folder of a run on the digits.')
    parser.add_argument('--seeds', type=int, default=5, help='Seeds 0, 1, ...')
    parser.add_argument('--bits', default='4', help='Bits of the kernels.')
    parser.add_argument('--rho', default='0.05', help="SAM's radii.")
    parser.add_argument('--steps', type=int, default=300, help='Steps of student and generator.')
    args = parser.parse_args()
    for name in ('sam_jax', 'absl'):
        logging.getLogger(name).setLevel(logging.WARNING)

    experiments, teachers = zip(*(open_teacher(args.workdir, seed) for seed in range(args.seeds)))
    experiment, measure = experiments[0], make_measure(experiments[0])
    dataset = experiment.dataset
    generator = Generator(dataset.image_shape, dataset.mean, dataset.std)
    adam = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, args.steps))
    methods = {
        'plain min-max': sharpness.erm(),
        **{f'SAM min-max, rho {rho}': sharpness.sam(float(rho)) for rho in args.rho.split(',')},
    }

    rows = [row(32, 'full precision', [measure(t, t['params']) for t in teachers])]
    for bits in map(int, args.bits.split(',')):
        rows.append(
            row(
                bits,
                'rounded, not trained',
                [measure(t, quantize_kernels(t['params'], bits)) for t in teachers],
            )
        )
        plain = None
        for name, method in methods.items():
            parts = dict(
                model=experiment.model,
                generator=generator,
                bits=bits,
                ascent=adam,
                descent=optax.chain(method, adam),
            )
            results = []
            for seed, teacher in enumerate(teachers):
                x, _ = train_student(teacher, seed, args.steps, **parts)
                results.append(measure(teacher, quantize_kernels(x, bits)))
                print(
                    f'{bits} bits, {name}, seed {seed}: {results[-1][0]:.1f} %',
                    file=sys.stderr,
                    flush=True,
                )
            rows.append(row(bits, name, results, plain))
            plain = plain or results
    print(
        tables.markdown(
            ('bits', 'student', 'test accuracy (%)', 'gain over plain (%)', 'difference of logits'),
            rows,
        )
    )


if __name__ == '__main__':
    try:
        main()
    except (UserError, OSError) as e:
        commands.leave(str(e))
