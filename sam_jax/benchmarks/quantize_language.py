"""Quantises a small language model without data, as ZSAQ does: a table in docs/quantization.md.

    python -m sam_jax.benchmarks.quantize_language [--text=python] [--seeds=5] [--bits=8,4,2]

For each seed a teacher is trained first: a decoder as OPT's, of characters, on nine tenths of a
text. The student begins as a copy. In each forward pass its kernels are rounded to so many bits
with a scale for each output channel, and what its dense layers are given to 8 bits with a scale for
each token; embeddings, which are the output too, and norms are left alone. Then the student
descends and a generator ascends, on nothing but texts that come from the teacher:

    f = mean over tokens of KL(teacher || student), on the generator's texts

The generator begins as another copy of the teacher. It is given texts that the teacher wrote once,
by drawing one character after another, and writes a share of their characters anew, each drawn from
what it says of those before. Its gradient goes through these draws straight, as a distribution over
the vocabulary that meets each network's own embeddings. The text's last tenth serves for the
printed figures and for no step: bits per character and KL of full precision, of rounding alone (W8,
W4 and W2), of plain min-max, of SAM min-max, and with --fixed of a generator that is not trained.
Mean and 95 % t-interval over seeds; gaps and gains are of pairs of the same seed.
"""

import argparse
import functools
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_jax import losses, rngs, schedules, sharpness, tables
from sam_jax.cli import commands
from sam_jax.errors import UserError
from sam_jax.experiments.results import interval, mean_and_interval
from sam_jax.language import measures, texts, training
from sam_jax.models.language import Decoder
from sam_jax.quantization import min_max_step, quantize_kernels, quantized_inputs

LENGTH = 64
TEACHER_BATCH, TEACHER_RATE, WARMUP = 16, 3e-3, 0.1
BATCH, POOL = 8, 64  # of the texts a step, of all that the teacher writes
RATE_X, RATE_Y = 1e-3, 1e-4  # Adam's; they fall to 0 along a cosine
REWRITTEN = 0.25
ACTIVATION_BITS = 8
TEST_WINDOWS = 256

# Rows of the table: (setting, student), and students of each setting.
FULL = ('W32A32', 'full precision')
ROUNDED, FIXED, PLAIN = 'rounded, not trained', 'fixed generator', 'plain min-max'


class Measured(NamedTuple):
    """On the test text: bits per character, and KL(teacher || student) in nats per character."""

    bits: float
    kl: float


def small_decoder() -> Decoder:
    """Returns the model of the table: two blocks of width 64, of characters."""
    return Decoder(vocabulary=texts.VOCABULARY, length=LENGTH, width=64, depth=2, heads=4)


def descent(method: Any, rate: float, steps: int) -> optax.GradientTransformation:
    """Returns method, then Adam at a rate that warms up and falls to 0 along a cosine."""
    schedule = schedules.create('cosine', rate, steps, WARMUP * steps)
    return optax.chain(method, optax.adam(schedule))


def quantized(
    model: Any, params: Any, tokens: jax.Array, bits: int, activation_bits: int | None
) -> jax.Array:
    """Logits of a student: kernels of so many bits per output channel, inputs of so many."""
    with quantized_inputs(activation_bits):
        return model.apply({'params': quantize_kernels(params, bits, per_channel=True)}, tokens)


def divergence(teacher_logits: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(teacher || student) in nats, mean over tokens."""
    return jnp.mean(losses.trajectory(logits, teacher_logits, 1.0))


def generate(model: Any, y: Any, written: jax.Array, key: jax.Array, share: float) -> jax.Array:
    """Returns texts (N, L, V) of which about `share` is drawn anew by the generator.

    With z the text, m a mask and t ~ p = softmax(generator(z)): onehot(m ? t : z), whose derivative
    by the generator is that of m p. The first character stays.

    Args:
      model, y: the generator, a decoder, and its params.
      written: (N, L) tokens.
      key: of mask and draws.
      share: of characters, in [0, 1].
    """
    of_mask, of_draws = jax.random.split(key)
    logits = model.apply({'params': y}, written)[:, :-1]
    drawn = jax.random.categorical(of_draws, logits)
    mask = jax.random.bernoulli(of_mask, share, drawn.shape)
    tokens = jnp.where(mask, drawn, written[:, 1:])
    p = mask[..., None] * jax.nn.softmax(logits)
    anew = jax.nn.one_hot(tokens, logits.shape[-1]) + (p - jax.lax.stop_gradient(p))
    first = jax.nn.one_hot(written[:, :1], logits.shape[-1])
    return jnp.concatenate([first, anew], axis=1)


@functools.partial(
    jax.jit, static_argnames=('model', 'bits', 'activation_bits', 'steps', 'share', 'down', 'up')
)
def train_student(
    teacher: Any,
    pool: jax.Array,
    seed: jax.Array,
    *,
    model: Any,
    bits: int,
    activation_bits: int | None,
    steps: int,
    share: float,
    down: optax.GradientTransformation,
    up: optax.GradientTransformation,
) -> tuple[Any, Any, jax.Array]:
    """Min-max steps of student x and generator y, both copies of the teacher at the start.

    Args:
      teacher: params of `model`.
      pool: (N, L) tokens, texts of the teacher.
      seed: of what is drawn.
      model: the decoder of all three.
      bits, activation_bits: of the student's kernels and of what its dense layers are given.
      steps: their number.
      share: as of `generate`.
      down, up: descent of x, ascent of y, as of `min_max_step`.

    Returns:
      (x, y, f at each step before it (steps,)).
    """

    def step(now, i):
        x, y, states = now
        of_texts, of_draws = jax.random.split(rngs.key(seed, 'generator', i))
        written = pool[jax.random.choice(of_texts, len(pool), (BATCH,), replace=False)]

        def f(x, y):
            tokens = generate(model, y, written, of_draws, share)
            wanted = model.apply({'params': teacher}, tokens)
            return divergence(wanted, quantized(model, x, tokens, bits, activation_bits))

        return min_max_step(f, x, y, states, down, up), f(x, y)

    start = teacher, teacher, (down.init(teacher), up.init(teacher))
    (x, y, _), found = jax.lax.scan(step, start, jnp.arange(steps))
    return x, y, found


def train_teacher(
    model: Any, tokens: np.ndarray, seed: int, steps: int, tx: optax.GradientTransformation
) -> Any:
    """Returns the params of a decoder that was trained on a text by a chain such as `descent`."""
    params = jax.jit(model.init)(rngs.key(seed, 'init'), jnp.zeros((1, LENGTH), int))['params']
    sizes = dict(model=model, batch=TEACHER_BATCH, length=LENGTH)
    return training.run(params, tx.init(params), tokens, seed, tx=tx, steps=steps, **sizes)[0]


def written_by(model: Any, teacher: Any, seed: int) -> jax.Array:
    """Returns texts (POOL, LENGTH) that a teacher wrote, each begun with any character."""
    start = jax.random.choice(rngs.key(seed, 'starts'), texts.VOCABULARY, (POOL, 1))
    tokens = jnp.zeros((POOL, LENGTH), int).at[:, :1].set(start)
    return training.continued(teacher, tokens, rngs.key(seed, 'pool'), model=model)


@functools.partial(jax.jit, static_argnames=('model', 'bits', 'activation_bits'))
def _on_windows(teacher, x, windows, *, model, bits, activation_bits):
    wanted = model.apply({'params': teacher}, windows[:, :-1])
    logits = (
        model.apply({'params': x}, windows[:, :-1])
        if bits is None
        else quantized(model, x, windows[:, :-1], bits, activation_bits)
    )
    return jnp.mean(losses.cross_entropy(logits, windows[:, 1:])), divergence(wanted, logits)


def measure(
    model: Any,
    teacher: Any,
    x: Any,
    windows: np.ndarray,
    bits: int | None,
    activation_bits: int | None = ACTIVATION_BITS,
) -> Measured:
    """Returns the figures of a student on windows of a text; bits None is full precision."""
    found = _on_windows(
        teacher, x, windows, model=model, bits=bits, activation_bits=activation_bits
    )
    loss, kl = map(float, found)
    return Measured(measures.Total(loss, 1).bits, kl)


def row(
    setting: str,
    name: str,
    results: list[Measured],
    full: list[Measured],
    plain: list[Measured] | None = None,
) -> tuple[str, ...]:
    """Returns a row of the table; `full` and `plain` are of the same seeds."""

    def less(others):
        return mean_and_interval([a.bits - b.bits for a, b in zip(results, others)])

    return (
        setting,
        name,
        interval(mean_and_interval([r.bits for r in results]), 3),
        '' if results is full else interval(less(full), 4, sign=True),
        '' if plain is None else interval(less(plain), 4, sign=True),
        interval(mean_and_interval([r.kl for r in results]), 4),
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--text', default='python', help=f'{", ".join(texts.SHIPPED)}, or a file with a text.'
    )
    parser.add_argument('--seeds', type=int, default=5, help='Seeds 0, 1, ...')
    parser.add_argument('--first-seed', type=int, default=0, help='Begin with another seed.')
    parser.add_argument('--bits', default='8,4,2', help='Bits of the kernels.')
    parser.add_argument('--rho', default='0.05', help="SAM's radii.")
    parser.add_argument('--steps', type=int, default=60, help='Steps of student and generator.')
    parser.add_argument('--teacher-steps', type=int, default=500, help='Steps of a teacher.')
    parser.add_argument(
        '--fixed', action='store_true', help='Also a generator that is not trained.'
    )
    args = parser.parse_args()
    begin = time.perf_counter()

    text = texts.find(args.text)
    print(text.described(), flush=True)
    learned, held_out = texts.split(texts.encode(text.text))
    windows = texts.windows(held_out, LENGTH)[:TEST_WINDOWS]
    model = small_decoder()
    # Each made once, so that each program is compiled once for all seeds.
    tx = descent(sharpness.erm(), TEACHER_RATE, args.teacher_steps)
    adam = descent(sharpness.erm(), RATE_Y, args.steps)
    plain, fixed = descent(sharpness.erm(), RATE_X, args.steps), optax.set_to_zero()
    methods = {
        **({FIXED: (plain, fixed)} if args.fixed else {}),
        PLAIN: (plain, adam),
        **{
            f'SAM min-max, rho {rho}': (
                descent(sharpness.sam(float(rho)), RATE_X, args.steps),
                adam,
            )
            for rho in args.rho.split(',')
        },
    }

    found: dict[tuple[str, str], list[Measured]] = {}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        teacher = train_teacher(model, learned, seed, args.teacher_steps, tx)
        pool = written_by(model, teacher, seed)
        results = {FULL: measure(model, teacher, teacher, windows, None)}
        for bits in map(int, args.bits.split(',')):
            setting = f'W{bits}A{ACTIVATION_BITS}'
            results[setting, ROUNDED] = measure(model, teacher, teacher, windows, bits)
            for name, (down, up) in methods.items():
                x, _, _ = train_student(
                    teacher,
                    pool,
                    seed,
                    model=model,
                    bits=bits,
                    activation_bits=ACTIVATION_BITS,
                    steps=args.steps,
                    share=REWRITTEN,
                    down=down,
                    up=up,
                )
                results[setting, name] = measure(model, teacher, x, windows, bits)
        for key, result in results.items():
            found.setdefault(key, []).append(result)
            shown = f'{result.bits:.4f} bits, KL {result.kl:.4f}'
            elapsed = time.perf_counter() - begin
            print(f'{elapsed:.0f} s, seed {seed}, {": ".join(key)}: {shown}', file=sys.stderr)
        sys.stderr.flush()

    rows = []
    for (setting, name), results in found.items():
        compared = name not in (FULL[1], ROUNDED, PLAIN)
        plain_results = found[setting, PLAIN] if compared else None
        rows.append(row(setting, name, results, found[FULL], plain_results))
    head = ('setting', 'student', 'bits per character', 'more than full', 'more than plain', 'KL')
    print(tables.markdown(head, rows))


if __name__ == '__main__':
    try:
        main()
    except (UserError, OSError) as e:
        commands.leave(str(e))
