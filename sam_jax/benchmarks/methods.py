"""All methods on one small task: the table in docs/methods.

    python -m sam_jax.benchmarks.methods --workdir=runs/methods --parallel=2 [--methods=sam,gsam]
        [--task=fashion_mnist:tiny,noise=0.4 --scale=0.1] [--budget=gradients]

Each method is trained on a task, the digits with 40 % label noise, with three to five values of
rho and seed 0; --scale multiplies them where a task wants smaller ones. While the best is at an end
of them, one more is tried beyond it, up to eight. The best, with the lowest error on the validation
split (the last tenth of the training set, its true labels; of equals the smallest value), is
trained with the seeds 1 to 4 as well. The runs are those of a sweep: the same command goes on where
it was stopped, and both budgets share the runs of as many epochs.

Prints errors on the test split with the 95 % t-interval of the mean, the largest eigenvalue of the
Hessian of the training loss (median over the seeds 1 to 4; of 300 examples with the labels trained
on) and the gradients a step. A value with which a run diverges is as bad as can be. A method whose
best is such a one, or of which a run failed otherwise (SAM-ON's where nothing normalises; a full
disk), has no row, and the command ends with an error that names it and what the run said. What a
step takes: `python -m sam_jax.benchmarks.step --methods=...`.

The digits: a WideResNet-10-1, batches of 64 examples in one group, m = 64. All methods train for
20 epochs, or, with --budget=gradients, for as many as take the gradients of 20 epochs of SAM.
"""

import math
import statistics
from typing import Any

from absl import flags

from sam_jax import sharpness, tables
from sam_jax.cli import commands
from sam_jax.errors import NOT_FINITE, UserError
from sam_jax.experiments import engines, grid
from sam_jax.experiments.results import TEST, VALIDATION, interval, mean_and_interval

_WORKDIR = flags.DEFINE_string('workdir', 'runs/methods', 'Folder of the runs.')
_METHODS = flags.DEFINE_list('methods', list(sharpness.METHODS), 'Which.')
_PARALLEL = flags.DEFINE_integer('parallel', 0, 'Runs at once; 0: as many as GPUs, or one.', 0)
_EPOCHS = flags.DEFINE_integer('epochs', 20, 'Length of a run, see --budget.', 1)
_TASK = flags.DEFINE_string(
    'task', 'digits:noise=0.4', 'Config of the runs; it takes the arguments method and seed.'
)
_SCALE = flags.DEFINE_float('scale', 1.0, 'Factor of the values of rho with which a search starts.')
_BUDGET = flags.DEFINE_enum(
    'budget',
    'epochs',
    ['epochs', 'gradients'],
    'What is the same for all methods: epochs, or the gradients of so many epochs of SAM.',
)

SEARCH_SEED = 0
SEEDS = range(5)
MOST_VALUES = 8

# Where the search starts: key and values; sam.rho in 0.5, 1, 2 where nothing is said. Radii are in
# units of each method's own; the middle value is about what the digits' sweep of rho suggests.
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

# Gradients a step of methods that decide while they train.
EXPECTED = {'late_phase_sam': 1.1, 'rst': 1.5, 'ae_sam': 1.5, 'ae_looksam': 1.5}


def start_of(method: str, scale: float = 1.0) -> tuple[str, tuple[float, ...]]:
    """Returns (key, values) with which the search for a method starts; scale is of rho alone."""
    key, values = GRIDS.get(method, ('sam.rho', (0.5, 1.0, 2.0)))
    if key == 'sam.rho':
        values = tuple(float(f'{scale * value:.2g}') for value in values)
    return key, values


def gradients_a_step(method: str) -> float:
    """Returns the mean number of gradients in a step of a method with its default options.

    Of those that decide while they train it is what is expected of them.
    """
    if method in EXPECTED:
        return EXPECTED[method]
    steps, options = 1000, sharpness.options(method)
    return statistics.mean(sharpness.gradients(method, step, **options) for step in range(steps))


def epochs_of(method: str, epochs: int, budget: str) -> int:
    """Returns how long a method trains: 'epochs', or as many as cost what SAM's cost."""
    return epochs if budget == 'epochs' else max(1, round(2 * epochs / gradients_a_step(method)))


def make_run(
    method: str, value: float, seed: int, workdir: str, epochs: int, task: str
) -> grid.Run:
    """Returns the run of a method with a value of the key that is searched."""
    overrides = {
        'data.validation': True,
        # Of a search only the error is asked.
        'analysis.every_epochs': 0 if seed == SEARCH_SEED else epochs,
        'analysis.examples': 300,
        'analysis.steps': 30,
        **SETTINGS.get(method, {}),
    }
    point = {':method': method, start_of(method)[0]: value, 'total_epochs': epochs, ':seed': seed}
    (run,) = grid.make_runs(task, [point], overrides, workdir)
    return run


def search(
    values: tuple[float, ...], errors: dict[float, float]
) -> tuple[list[float], float | None, list[float]]:
    """Returns (all values, the best of them if it is known, the values to be tried next).

    Args:
      values: with which the search starts, ascending.
      errors: of the values that were tried.
    """
    values = list(values)
    while True:
        missing = [value for value in values if value not in errors]
        if missing:
            return values, None, missing
        best = min(values, key=errors.__getitem__)
        at_an_end = best in (values[0], values[-1])
        if len(values) in (1, MOST_VALUES) or not at_an_end or math.isinf(errors[best]):
            return values, best, []
        if best == values[0]:
            values.insert(0, _beyond(*values[:2]))
        else:
            values.append(_beyond(*values[:-3:-1]))


def _beyond(end, neighbour):
    """The next value of a geometric grid, with two digits."""
    return float(f'{end**2 / neighbour:.2g}')


class Method:
    """The runs of a method: those of the search, then those of the other seeds."""

    def __init__(self, name, workdir, epochs, task, scale):
        self.name = name
        self.key, self._start = start_of(name, scale)
        self._run = lambda value, seed: make_run(name, value, seed, workdir, epochs, task)
        self._errors = {}
        self.failures = {}
        self.runs = []

    def next_runs(self) -> list[grid.Run]:
        """Returns the runs that are to be made before more is known; none at the end.

        `failures` is {name of a run: what it said} of those that cannot be made.
        """
        if self.lost():
            return []
        self.values, self.best, missing = search(self._start, self._errors)
        while missing:
            runs = {value: self._run(value, SEARCH_SEED) for value in missing}
            errors = {value: self._error(run) for value, run in runs.items()}
            if None in errors.values():
                return [run for value, run in runs.items() if errors[value] is None]
            self._errors |= errors
            self.values, self.best, missing = search(self._start, self._errors)
        self.runs = [self._run(self.best, seed) for seed in SEEDS]
        return [] if self.lost() else [run for run in self.runs if not run.result()]

    def lost(self) -> str:
        """Returns why it has no row, what a run said, or ''.

        A run of the best value failed; or any did that has not diverged, which says nothing of its
        value.
        """
        of_best = {run.name for run in self.runs}
        lines = (x for name, x in self.failures.items() if name in of_best or NOT_FINITE not in x)
        return next(lines, '')

    def _error(self, run):
        """On the validation split; infinite of a run that diverged, None of one not made yet."""
        if run.name in self.failures:
            return math.inf
        result = run.result()
        return result[VALIDATION] if result else None

    def row(self) -> tuple[str, ...]:
        """Returns its row of the table, once there are no more runs to be made."""
        results: list[Any] = [run.result() for run in self.runs]
        gradients = statistics.mean(r['gradient_evaluations'] / r['step'] for r in results)
        eigenvalues = [
            float(result['analysis/lambda_max'])
            for seed, result in zip(SEEDS, results)
            if seed != SEARCH_SEED
        ]
        tried = ', '.join(f'**{v:g}**' if v == self.best else f'{v:g}' for v in self.values)
        return (
            f'`{self.name}`',
            interval(mean_and_interval([100 * r[TEST] for r in results]), 1),
            f'{statistics.median(eigenvalues):.3g}',
            f'{gradients:.2f}',
            f'{self.key.removeprefix("sam.")}: {tried}',
        )


def main() -> None:
    """Runs what is missing and prints the table, best method first."""
    for name in _METHODS.value:
        if name not in sharpness.METHODS:
            raise UserError(
                f'--methods has {name!r}; it must be some of {", ".join(sharpness.METHODS)}.'
            )
    if not _SCALE.value > 0:
        raise UserError(f'--scale is {_SCALE.value}; it must be positive.')
    methods = []
    for name in _METHODS.value:
        epochs = epochs_of(name, _EPOCHS.value, _BUDGET.value)
        methods.append(Method(name, _WORKDIR.value, epochs, _TASK.value, _SCALE.value))
    while runs := {run.name: (m, run) for m in methods for run in m.next_runs()}:
        statuses = engines.execute(
            engines.Local(_PARALLEL.value, retries=1), [run for _, run in runs.values()]
        )
        for name, status in statuses.items():
            if status.state == 'stopped':
                raise UserError('It was stopped; the same command goes on.')
            if status.state != 'finished':
                runs[name][0].failures[name] = status.line
    lost = {method.name: method.lost() for method in methods if method.lost()}
    print(
        tables.markdown(
            ('method', 'test error (%)', 'lambda_max', 'gradients a step', 'searched, chosen'),
            sorted(
                (method.row() for method in methods if method.name not in lost),
                key=lambda row: float(row[1].split()[0]),
            ),
        )
    )
    if lost:
        raise UserError(
            'Without a row: ' + ' '.join(f'{name}: {line}' for name, line in lost.items())
        )


if __name__ == '__main__':
    commands.run(main)
