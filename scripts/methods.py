"""Every method on the digits with 40 % label noise: error and cost, the table of docs/methods.md.

    python scripts/methods.py [--out=runs/methods.jsonl] [--methods=sam,gsam] [--part=0/2]
    python scripts/methods.py --table [--out=runs/methods.jsonl]

Each method is trained with three to five values of rho and seed 0; while the best is at an end of
them, one more is tried beyond it, up to eight. The best, with the lowest error on the validation
split (the last tenth of the training set, its true labels; of equals the smallest value), is
trained with the seeds 1 to 4 as well. A finished run is a line of --out and is not run again;
--part=I/N takes each N-th method, for N processes at once. --table prints errors on the test split
with the 95 % t-interval of the mean, the largest eigenvalue of the Hessian of the training loss
(median over seeds; of 300 examples with the labels trained on), and the time of a step over SGD's,
the two taking turns in one process.

A WideResNet-10-1, 20 epochs of batches of 64 examples in one group: m = 64.
"""

import dataclasses
import functools
import itertools
import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
from absl import app, flags

from configs import digits
from sam_jax import data, evaluate, models, replicas, settings, sharpness, train_step
from sam_jax.analysis import hessian, monitor, objective
from sam_jax.experiments.results import mean_and_interval

_OUT = flags.DEFINE_string('out', 'runs/methods.jsonl', 'File of results, a line a run.')
_METHODS = flags.DEFINE_list('methods', list(sharpness.METHODS), 'Which.')
_PART = flags.DEFINE_string('part', '0/1', 'I/N: the methods I, I + N, ...')
_TABLE = flags.DEFINE_bool('table', False, 'Print the table of what is there.')
_EPOCHS = flags.DEFINE_integer('epochs', 20, 'Length of a run.')

SEARCH_SEED = 0
SEEDS = range(5)
MOST_VALUES = 8

# Where the search starts: key and values; sam.rho in 0.5, 1, 2 where nothing is said. Radii are in
# units of each method's own; the middle value is about what the digits sweep of README suggests.
GRIDS = {
    'sgd': ('sam.rho', (0.0,)),
    'esam': ('sam.rho', (0.1, 0.25, 0.5)),
    'unnormalized_sam': ('sam.rho', (0.2, 0.5, 1.0)),
    'asam': ('sam.rho', (2.0, 5.0, 10.0)),
    'layerwise_sam': ('sam.rho', (0.02, 0.05, 0.1)),
    'sparse_sam': ('sam.rho', (1.0, 2.0, 4.0)),
    'wsam': ('sam.rho', (0.05, 0.1, 0.2)),
    'look_layersam': ('sam.rho', (0.02, 0.05, 0.1)),
    'trace_sam': ('sam.rho', (0.01, 0.02, 0.05, 0.1, 0.2)),
    'det_sam': ('sam.rho', (1.0, 3.0, 10.0, 33.0)),
    'frob_sam': ('sam.lam', (0.005, 0.05, 0.5)),
    'random_sam': ('sam.rho', (1.0, 2.0, 5.0, 10.0, 20.0)),
    'momentum_sam': ('sam.rho', (1.0, 2.0, 4.0)),
    'extrapolated': ('sam.rho', (0.1, 0.3, 1.0)),
    'bsam': ('sam.rho', (0.01, 0.05, 0.2)),
    'saf': ('sam.lam', (0.1, 0.3, 1.0)),
    'mesa': ('sam.lam', (0.3, 0.8, 2.0)),
}
# Where the defaults make no sense on this task: bSAM's momentum is a mean and not a sum, and of
# Frob-SAM lam is the weight; its rho is only where the probes lie.
SETTINGS = {'bsam': {'optimizer.learning_rate': 0.5}, 'frob_sam': {'sam.rho': 0.005}}


def grid(method):
    """Returns (key, values) with which the search for a method starts."""
    return GRIDS.get(method, ('sam.rho', (0.5, 1.0, 2.0)))


def make_config(method, value, seed):
    """The config of a run; `value` is that of the searched key."""
    config = digits.get_config(f'method={method},noise=0.4,seed={seed}')
    config.data.validation = True
    config.total_epochs = _EPOCHS.value
    for key, x in {**SETTINGS.get(method, {}), grid(method)[0]: value}.items():
        settings.override(config, key, x)
    settings.check(config)
    return config


@functools.cache
def hessian_program():
    """Returns an Objective whose compiled steps serve all methods and seeds."""
    config = make_config('sgd', 0.0, 0)
    layout, _ = replicas.make_layout(64, 64, 1, devices=jax.devices()[:1])
    dataset = data.load_dataset(config.data)
    model = models.from_config(config.model, dataset.num_classes)
    state = train_step.create_train_state(config, model, dataset.image_shape)
    return objective.create(
        model, {'params': state.params, 'batch_stats': state.batch_stats}, dataset, dataset.train,
        layout, 150)[0]


def lambda_max(state, dataset):
    """The largest eigenvalue of the Hessian of the training loss, without penalty."""
    program = hessian_program()
    split = monitor.chosen_examples(dataset.train, 300, 0)
    loss = dataclasses.replace(program, dataset=dataset).of_split(split).with_statistics(
        state.batch_stats)
    flat = hessian.flat(loss.hessian_product, state.params, loss.layout)
    return float(hessian.top_eigenpairs(
        flat.product, flat.size, k=1, steps=30, tolerance=1e-2).values[0])


class Trainer:
    """Runs of a method on one device; what differs between them in values shares a program."""

    def __init__(self, method):
        self.method = method
        self._programs = functools.cache(self._compile)

    def _compile(self, static):
        config = make_config(self.method, *static, seed=0)
        layout, _ = replicas.make_layout(
            config.batch_size, config.replica_batch_size, 1, devices=jax.devices()[:1])
        dataset = data.load_dataset(config.data)
        model = models.from_config(config.model, dataset.num_classes)
        return (layout, model, train_step.make_train_step(model, config, layout, dataset),
                evaluate.make_eval_step(model, layout, dataset))

    def start(self, value, seed):
        """Returns (step, state, feeds, evaluate): the run before its first step."""
        config = make_config(self.method, value, seed)
        # rho is a value of the program; other keys are constants of it.
        layout, model, step_fn, eval_fn = self._programs(
            (grid(self.method)[1][0],) if grid(self.method)[0] == 'sam.rho' else (value,))
        dataset = data.load_dataset(config.data)
        state = layout.replicate(train_step.create_train_state(
            config, model, dataset.image_shape, dataset.num_images))
        arrays = layout.replicate(dataset.device_arrays(dataset.train))
        hparams = layout.replicate(train_step.HParams.from_config(config))

        def feeds():
            previous, asks = None, train_step.asks_for_previous(config)
            total = config.total_epochs * (dataset.num_train_examples // config.batch_size)
            for feed in map(layout.shard, dataset.train_feeds(seed, 0, total, layout)):
                yield train_step.paired(feed, previous) if asks else feed
                previous = feed

        def errors(state):
            return {name: evaluate.evaluate(
                eval_fn, state.params, state.batch_stats,
                layout.replicate(dataset.device_arrays(dataset.evals[name])),
                dataset.eval_feeds(dataset.evals[name], 512, layout), layout)['error_rate']
                    for name in ('test', 'validation')}

        return (lambda state, feed: step_fn(state, feed, arrays, hparams), state, feeds(), errors,
                dataset)

    def run(self, value, seed):
        """Trains once; returns the line of the result."""
        step, state, feeds, errors, dataset = self.start(value, seed)
        for feed in feeds:
            state, _ = step(state, feed)
            jax.block_until_ready(state.step)
        steps = int(state.step)
        return {'method': self.method, 'value': value, 'seed': seed, 'steps': steps,
                'evaluations': 1 + int(state.sharpness_state.evaluations) / steps,
                'lambda_max': lambda_max(state, dataset), **errors(state)}


def time_ratio(method, rounds=20):
    """Mean time of a method's first steps, whether its gate is open or shut, over SGD's."""
    steppers = {}
    for name in ('sgd', method):
        step, state, feeds, *_ = Trainer(name).start(grid(name)[1][0], 0)
        feeds = itertools.cycle(list(itertools.islice(feeds, 20)))
        state, _ = step(state, next(feeds))
        steppers[name] = [step, jax.block_until_ready(state), feeds]
    times = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            then = time.perf_counter()
            for _ in range(5):
                stepper[1], _ = stepper[0](stepper[1], next(stepper[2]))
            jax.block_until_ready(stepper[1])
            times[name].append(time.perf_counter() - then)
    return sum(times[method]) / sum(times['sgd'])


def read_lines():
    """Returns the results that are there: {(method, value, seed): line}, and {method: ratio}."""
    runs, ratios = {}, {}
    if os.path.exists(_OUT.value):
        with open(_OUT.value) as file:
            for line in map(json.loads, file):
                if 'ratio' in line:
                    ratios[line['method']] = line['ratio']
                else:
                    runs[line['method'], line['value'], line['seed']] = line
    return runs, ratios


def search(method, runs):
    """Returns (values, best of them, the value to try next or None) of what has been run."""
    values = list(grid(method)[1])
    while True:
        missing = [value for value in values if (method, value, SEARCH_SEED) not in runs]
        if missing:
            return values, None, missing[0]
        best = min(values, key=lambda value: runs[method, value, SEARCH_SEED]['validation'])
        if len(values) in (1, MOST_VALUES) or best not in (values[0], values[-1]):
            return values, best, None
        if best == values[0]:
            values.insert(0, _beyond(*values[:2]))
        else:
            values.append(_beyond(*values[:-3:-1]))


def _beyond(end, neighbour):
    """The next value of a geometric grid, with two digits."""
    return float(f'{end ** 2 / neighbour:.2g}')


def measure(method):
    """Runs what is missing of a method and adds it to the file."""
    runs, ratios = read_lines()
    trainer = Trainer(method)

    def add(line):
        with open(_OUT.value, 'a') as file:
            file.write(json.dumps(line) + '\n')
        print(line, file=sys.stderr, flush=True)

    def ensure(value, seed):
        if (method, value, seed) not in runs:
            runs[method, value, seed] = trainer.run(value, seed)
            add(runs[method, value, seed])

    while (following := search(method, runs)[2]) is not None:
        ensure(following, SEARCH_SEED)
    for seed in SEEDS:
        ensure(search(method, runs)[1], seed)
    if method not in ratios:
        add({'method': method, 'ratio': time_ratio(method)})


def table():
    """Returns the Markdown table of all methods that are complete, best first."""
    runs, ratios = read_lines()
    rows = []
    for method in _METHODS.value:
        values, value, _ = search(method, runs)
        if method not in ratios or any((method, value, seed) not in runs for seed in SEEDS):
            continue
        lines = [runs[method, value, seed] for seed in SEEDS]
        mean, half = mean_and_interval([100 * line['test'] for line in lines])
        evaluations = statistics.mean(line['evaluations'] for line in lines)
        curvature = statistics.median(line['lambda_max'] for line in lines)
        values = ', '.join(f'**{v:g}**' if v == value else f'{v:g}' for v in values)
        rows.append((mean, f'| `{method}` | {mean:.1f} ± {half:.1f} | {curvature:.3g} | '
                     f'{evaluations:.2f} | '
                     f'{ratios[method]:.2f} | {grid(method)[0].removeprefix("sam.")}: {values} |'))
    head = ['| method | test error (%) | lambda_max | gradients a step | step / SGD step | '
            'searched, chosen |', '|---|---|---|---|---|---|']
    return '\n'.join(head + [row for _, row in sorted(rows)])


def main(argv):
    del argv
    if _TABLE.value:
        print(table())
        return
    os.makedirs(os.path.dirname(os.path.abspath(_OUT.value)), exist_ok=True)
    part, parts = map(int, _PART.value.split('/'))
    for method in _METHODS.value[part::parts]:
        measure(method)


if __name__ == '__main__':
    app.run(main)
