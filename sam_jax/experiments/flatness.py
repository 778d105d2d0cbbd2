"""How flat the minima of many runs are: what `sam-jax-analyze` has written beside each of them."""

import math
import os

from sam_jax import run_log
from sam_jax.experiments.results import Group, Record, mean_and_interval


def analyses(record: Record) -> list[tuple[str, dict]]:
    """Returns [(folder, content of analysis.json), ...] of a run; the newest checkpoint first.

    The folders are `analysis` and, of one epoch each, `analysis/epoch=N` below it. Of the same step
    there may be two, that have measured different things.
    """
    whole = os.path.join(record.workdir, 'analysis')
    below = sorted(os.listdir(whole)) if os.path.isdir(whole) else []
    folders = (whole, *(os.path.join(whole, n) for n in below if n.startswith('epoch=')))
    found = [(f, run_log.read_json(os.path.join(f, 'analysis.json'))) for f in folders]
    return sorted(
        [(f, said) for f, said in found if said], key=lambda one: -one[1]['runs'][0]['step']
    )


def of_run(record: Record) -> dict[str, float]:
    """Returns {measure: value} of the run's analysis/analysis.json; nothing if there is none."""
    said = run_log.read_json(os.path.join(record.workdir, 'analysis', 'analysis.json'))
    if not said:
        return {}
    run = said['runs'][0]
    found = {f'loss of {run["examples"]} examples, split {run["split"]}': float(run['loss'])}
    spectrum = run.get('spectrum', {})
    for name, key in (
        ('lambda_max', 'lambda_max'),
        ('lambda_max / lambda_5', 'lambda_ratio'),
        ('trace', 'trace'),
    ):
        if key in spectrum:
            found[name] = float(spectrum[key])
    for name, rise in run.get('sharpness', {}).items():
        found[f'rise of the loss: {name}'] = float(rise['sharpness'])
        found[f'rise of the error rate: {name} (points of %)'] = 100 * float(rise['error_rise'])
    return found


def rows(groups: list[Group], names: list[str]) -> list[dict[str, str]]:
    """Returns a row for each measure, with a column for each group that was measured.

    Args:
      groups: Groups of runs.
      names: of the groups, all different.

    Returns:
      [{'measure': measure, name: 'mean ± half width of the 95 % t-interval', ...}, ...].
    """
    columns = {}
    for group, name in zip(groups, names):
        measured = [found for found in map(of_run, group.finished) if found]
        if measured:
            columns[name] = {
                measure: [found[measure] for found in measured if measure in found]
                for measure in dict.fromkeys(m for found in measured for m in found)
            }
    measures = dict.fromkeys(measure for column in columns.values() for measure in column)
    return [
        {
            'measure': measure,
            **{name: _shown(column.get(measure)) for name, column in columns.items()},
        }
        for measure in measures
    ]


def _shown(values):
    if not values:
        return ''
    mean, half = mean_and_interval(values)
    return f'{mean:.4g}' + ('' if math.isnan(half) else f' ± {half:.2g}')
