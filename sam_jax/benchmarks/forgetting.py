"""Late SAM against forgetting and rounding, on a small language model: docs/quantization.md.

    python -m sam_jax.benchmarks.forgetting [--first=python] [--second=licences] [--seeds=5]

The question of Watts et al. (arXiv 2605.02105, ICML 2026): does SAM in the last part of pretraining
make a model that forgets less when it is fine-tuned, and loses less when it is rounded? A decoder
of characters is pretrained on a first text by Adam, in its last steps by SAM and Adam
(`sharpness.late_phase_sam`). Then it is fine-tuned on a second text by Adam, whatever came before.
Bits per character on the last tenth of each text, which no step sees:

    first     on the first text after pretraining
    W4, W2    what rounding of the kernels, per output channel, adds to it
    forgotten what fine-tuning adds to it
    second    on the second text after fine-tuning

Mean and 95 % t-interval over seeds; below them the differences from Adam of the same seed.
"""

import argparse
import sys
import time
from typing import NamedTuple

from sam_jax import sharpness, tables
from sam_jax.benchmarks import quantize_language as small
from sam_jax.cli import commands
from sam_jax.errors import UserError
from sam_jax.experiments.results import interval, mean_and_interval
from sam_jax.language import texts, training

FINE_RATE = 1e-3
ADAM = 'Adam'


class Outcome(NamedTuple):
    """Bits per character of one seed; the columns of the table."""

    first: float
    w4: float
    w2: float
    forgotten: float
    second: float


def rows(name: str, outcomes: list[Outcome], adam: list[Outcome] | None) -> list[tuple[str, ...]]:
    """Returns the rows of a method: its figures, and their differences from Adam's."""

    def cells(outcomes, sign=False):
        return [interval(mean_and_interval(list(values)), 3, sign) for values in zip(*outcomes)]

    shown = [(name, *cells(outcomes))]
    if adam:
        pairs = [[a - b for a, b in zip(o, p)] for o, p in zip(outcomes, adam)]
        shown.append(('less Adam', *cells(pairs, sign=True)))
    return shown


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = f'{", ".join(texts.SHIPPED)}, or a file with a text.'
    parser.add_argument('--first', default='python', help=f'The text of pretraining: {named}')
    parser.add_argument('--second', default='licences', help=f'The text of fine-tuning: {named}')
    parser.add_argument('--seeds', type=int, default=5, help='Seeds 0, 1, ...')
    parser.add_argument('--first-seed', type=int, default=0, help='Begin with another seed.')
    parser.add_argument('--rho', default='0.05,0.2', help="SAM's radii.")
    parser.add_argument('--start', type=float, default=0.8, help='Share of steps before SAM.')
    parser.add_argument('--steps', type=int, default=500, help='Steps of pretraining.')
    parser.add_argument('--fine-steps', type=int, default=150, help='Steps of fine-tuning.')
    args = parser.parse_args()
    begin = time.perf_counter()

    model = small.small_decoder()
    found = [texts.find(name) for name in (args.first, args.second)]
    print(*(text.described() for text in found), sep='\n', flush=True)
    (first, first_test), (second, second_test) = (
        texts.split(texts.encode(text.text)) for text in found
    )
    first_test, second_test = (
        texts.windows(tokens, small.LENGTH)[: small.TEST_WINDOWS]
        for tokens in (first_test, second_test)
    )
    fine = small.descent(sharpness.erm(), FINE_RATE, args.fine_steps)
    methods = {
        ADAM: sharpness.erm(),
        **{
            f'late SAM, rho {rho}': sharpness.late_phase_sam(
                float(rho), start=args.start, total_steps=args.steps
            )
            for rho in args.rho.split(',')
        },
    }
    # Each made once, so that each program is compiled once for all seeds.
    methods = {
        name: small.descent(method, small.TEACHER_RATE, args.steps)
        for name, method in methods.items()
    }
    sizes = dict(model=model, batch=small.TEACHER_BATCH, length=small.LENGTH)

    def bits(params, windows, kernel_bits=None):
        return small.measure(model, params, params, windows, kernel_bits, None).bits

    def outcome(seed, tx):
        params = small.train_teacher(model, first, seed, args.steps, tx)
        tuned, *_ = training.run(
            params, fine.init(params), second, seed, tx=fine, steps=args.fine_steps, **sizes
        )
        start = bits(params, first_test)
        return Outcome(
            start,
            *(bits(params, first_test, n) - start for n in (4, 2)),
            bits(tuned, first_test) - start,
            bits(tuned, second_test),
        )

    found: dict[str, list[Outcome]] = {name: [] for name in methods}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name, tx in methods.items():
            found[name].append(outcome(seed, tx))
            shown = ' '.join(f'{value:.4f}' for value in found[name][-1])
            elapsed = time.perf_counter() - begin
            print(f'{elapsed:.0f} s, seed {seed}, {name}: {shown}', file=sys.stderr, flush=True)
    table = [
        row
        for name, outcomes in found.items()
        for row in rows(name, outcomes, None if name == ADAM else found[ADAM])
    ]
    print(tables.markdown(('pretraining', 'first', 'W4', 'W2', 'forgotten', 'second'), table))


if __name__ == '__main__':
    try:
        main()
    except (UserError, OSError) as e:
        commands.leave(str(e))
