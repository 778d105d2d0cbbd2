"""Successive halving: a sweep that ends most of its runs early.

All candidates train up to a first epoch, the rung. The best 1/factor of them by validation error go
on to the next rung, from their checkpoints, and so on; the last ones train to the end, and the best
of those is chosen. (Jamieson and Talwalkar, 2016, https://arxiv.org/abs/1502.07943.)

Every run has the schedules of its full length, so a run at a rung is the beginning of the run that
the grid would make, bit for bit. A rung is decided when all its runs are there, from their files
alone: neither the order in which they end nor a restart can change a decision. Optuna's pruner does
the opposite: it compares a trial with those that came before it, and can suspend none.
"""

import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sam_jax import run_log
from sam_jax.errors import NOT_FINITE, UserError
from sam_jax.experiments import grid
from sam_jax.experiments.results import TEST, VALIDATION, settings_of
from sam_jax.settings import jsonable

FILE = 'search.json'

# What runs a rung: (runs, [(run that was left behind, why), ...]) -> {name: Status}.
Execute = Callable[[list[grid.Run], list[tuple[grid.Run, str]]], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting: its runs differ in their seeds alone, and its error is the mean of theirs."""

    runs: tuple[grid.Run, ...]

    @property
    def name(self) -> str:
        """That of its runs, without the seed if they have several."""
        if len(self.runs) == 1:
            return self.runs[0].name
        parts = [set(run.name.split(',')) for run in self.runs]
        first = self.runs[0].name.split(',')
        return ','.join(part for part in first if all(part in p for p in parts)) or 'all seeds'

    def until(self, epoch: int) -> 'Candidate':
        """The same, whose runs stop after an epoch; 0 for the end."""
        return Candidate(tuple(dataclasses.replace(r, until_epoch=epoch) for r in self.runs))

    def mean(self, metric: str) -> float:
        """The mean of a metric over its runs, all of which are there."""
        return statistics.fmean((run.result() or {})[metric] for run in self.runs)


class Interrupted(Exception):
    """Runs of a rung are missing, so it cannot be decided; `statuses` says which."""

    def __init__(self, statuses: Mapping[str, Any]) -> None:
        super().__init__()
        self.statuses = statuses


def candidates_of(runs: Sequence[grid.Run]) -> list[Candidate]:
    """Returns the candidates of a sweep, in its order.

    Raises:
      UserError: the runs have no validation split, or not all as many epochs.
    """
    together: dict[str, list[grid.Run]] = {}
    for run in runs:
        if not run.config.data.validation:
            raise UserError(
                '--search is halving, which chooses by the validation split, but run '
                f'{run.name} has data.validation False; give --config.data.validation=True.'
            )
        if run.config.total_epochs != runs[0].config.total_epochs:
            raise UserError(
                f'--search is halving; all runs must have as many epochs, but total_epochs is '
                f'{runs[0].config.total_epochs} in run {runs[0].name} and '
                f'{run.config.total_epochs} in run {run.name}.'
            )
        key = json.dumps(settings_of(jsonable(run.config)), sort_keys=True)
        together.setdefault(key, []).append(run)
    return [Candidate(tuple(runs)) for runs in together.values()]


def rungs(candidates: int, total_epochs: int, factor: int) -> list[int]:
    """Returns the epochs of the rungs before the end, ascending.

    They are ceil(total_epochs / factor^i) for i = h, ..., 1, where
    h = floor(log_factor(candidates)): 27 candidates of 27 epochs and factor 3 have the rungs 1, 3
    and 9, which leaves 9, 3 and 1 of them.

    Raises:
      UserError: factor is below 2, or there are fewer candidates than that.
    """
    if factor < 2:
        raise UserError(f'--factor is {factor}; it must be at least 2.')
    if candidates < factor:
        raise UserError(
            f'--search is halving; with --factor={factor} it needs at least {factor} settings to '
            f'choose from, but the sweep has {candidates}.'
        )
    halvings = 0
    while factor ** (halvings + 1) <= candidates:
        halvings += 1
    epochs = {-(-total_epochs // factor**i) for i in range(1, halvings + 1)}
    return sorted(epochs - {total_epochs})


def best(errors: Mapping[str, float], number: int) -> list[str]:
    """Returns the names of the lowest errors, lowest first; of equal ones the first in order."""
    return sorted(errors, key=lambda name: errors[name])[:number]


def search(runs: Sequence[grid.Run], factor: int, execute: Execute) -> dict[str, Any]:
    """Searches among the runs of a sweep.

    Args:
      runs: of the sweep.
      factor: one in so many goes on to the next rung, rounded up.
      execute: what runs the runs of a rung, those that are not there yet.

    Returns:
      {'winner': name of a candidate, 'runs': its folders, 'validation/error_rate': by which it was
      chosen, 'test/error_rate': of it alone, 'candidates': their number, 'rungs': [{'epoch',
      'errors': {candidate: validation error}, 'diverged': [candidate], 'kept': [candidate]}],
      'epochs', 'gradient_evaluations' and 'wall_time' of all runs together, 'epochs_of_grid'}.

    Raises:
      Interrupted: runs were stopped or failed, but for those that diverged.
      UserError: of `candidates_of` and `rungs`; all candidates diverged.
    """
    left = {candidate.name: candidate for candidate in candidates_of(runs)}
    number, total = len(left), runs[0].config.total_epochs
    behind: list[tuple[grid.Run, str]] = []
    decided, reached = [], {}
    for epoch in [*rungs(number, total, factor), 0]:
        left = {name: candidate.until(epoch) for name, candidate in left.items()}
        statuses = execute([run for c in left.values() for run in c.runs], behind)
        errors, diverged = _errors(left, statuses)
        reached |= left
        kept = best(errors, -(-len(left) // factor) if epoch else 1)
        decided.append(
            {'epoch': epoch or total, 'errors': errors, 'diverged': diverged, 'kept': kept}
        )
        for name, candidate in left.items():
            if name not in kept:
                why = 'diverged' if name in diverged else f'left behind at epoch {epoch or total}'
                behind += [(run, why) for run in candidate.runs]
        left = {name: left[name] for name in left if name in kept}
        if not left:
            raise UserError(
                f'All settings diverged before epoch {epoch or total}; sweep lower values of '
                'optimizer.learning_rate or sam.rho.'
            )
    (winner,) = left.values()
    made = [run.result() or {} for c in reached.values() for run in c.runs]
    return {
        'winner': winner.name,
        'runs': [run.workdir for run in winner.runs],
        VALIDATION: winner.mean(VALIDATION),
        TEST: winner.mean(TEST),
        'candidates': number,
        'rungs': decided,
        'epochs_of_grid': total * len(runs),
        **{
            key: sum(result.get(key, 0) for result in made)
            for key in ('epochs', 'gradient_evaluations', 'wall_time')
        },
    }


def _errors(candidates, statuses):
    """Returns ({name: validation error}, names of those that diverged)."""
    diverged, missing = [], False
    for name, candidate in candidates.items():
        failed = [statuses[r.name] for r in candidate.runs if statuses[r.name].state != 'finished']
        if any(NOT_FINITE in status.line for status in failed):
            diverged.append(name)
        elif failed:
            missing = True
    if missing:
        raise Interrupted(statuses)
    errors = {n: c.mean(VALIDATION) for n, c in candidates.items() if n not in diverged}
    return errors, diverged


def summary(found: Mapping[str, Any]) -> str:
    """The few lines at the end of a search."""
    lines = []
    for rung in found['rungs'][:-1]:
        lost = f', {len(rung["diverged"])} diverged' if rung['diverged'] else ''
        lines.append(
            f'epoch {rung["epoch"]}: {len(rung["errors"]) + len(rung["diverged"])} settings{lost}, '
            f'{len(rung["kept"])} go on.'
        )
    share = 100 * found['epochs'] / found['epochs_of_grid']
    return '\n'.join(
        [
            *lines,
            f'Chosen by the validation split: {found["winner"]}',
            f'  validation     {100 * found[VALIDATION]:.2f} %',
            f'  test error     {100 * found[TEST]:.2f} %',
            f'  epochs         {found["epochs"]:,}, {share:.0f} % of the '
            f'{found["epochs_of_grid"]:,} of the grid',
        ]
    )


def save(workdir: str, found: Mapping[str, Any]) -> None:
    """Writes WORKDIR/search.json."""
    run_log.write_json(os.path.join(workdir, FILE), found)
