"""The paper's tables in their layout: of finished runs, and with the paper's own numbers below.

Rows and columns are settings, so that runs of any dataset and model have a place.
"""

import collections
import functools
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from sam_jax import run_log, tables
from sam_jax.experiments import results
from sam_jax.experiments.results import TEST, VALIDATION, Group, PaperRow

TOP5 = 'test/top5_error_rate'
# The training error at the perturbed weights.
THERE = 'train/perturbed_error_rate'
BASELINES = (
    'The baseline is the better one of those with as many epochs and with twice as many. rho is '
    'the best one of the validation split, or the only one.'
)
_ROWS = ('model.name', 'total_epochs', 'data.augment')


class Lacking(Exception):
    """Says in one sentence what the runs lack."""


class Cell(NamedTuple):
    """Something that belongs into a cell of a table.

    Attributes:
      settings: of which the row and the column are chosen.
      name: what it is, the end of the column's name.
      content: anything; the contents of one cell are shown together.
    """

    settings: dict
    name: str
    content: Any


def arrange(
    cells: Iterable[Cell],
    rows: Sequence[str],
    columns: Sequence[str],
    show: Callable[[list], str] = ', '.join,
) -> str:
    """Returns the Markdown table of Cells.

    Args:
      rows: settings that name a row, or 'row' for what is in `settings` under that name.
      columns: settings that begin the name of a column.
      show: takes the different contents of a cell.
    """
    short = results.headings(rows)
    found, heads = {}, {}
    for settings, name, content in cells:
        # Data sets of one's own all have the name of their kind.
        settings = {**settings, 'data.name': settings.get('data.dir') or settings.get('data.name')}
        row = tuple((short[key], results.shown(settings.get(key))) for key in rows)
        place = ', '.join(filter(None, [_value(key, settings.get(key)) for key in columns]))
        head = ': '.join(filter(None, [place, name]))
        heads[head] = ''
        contents = found.setdefault(row, {}).setdefault(head, [])
        if content not in contents:
            contents.append(content)
    return tables.of_records(
        [
            {**dict(row), **heads, **{head: show(contents) for head, contents in inside.items()}}
            for row, inside in found.items()
        ]
    )


def _value(key, value):
    name = {'data.label_noise': 'noise ', 'model.name': '', 'data.name': ''}.get(key, f'{key} ')
    return '' if value is None else f'{name}{results.shown(value)}'


def errors(groups: list[Group], metric: str = TEST, paper: Sequence[PaperRow] = ()) -> str:
    """Returns '2.75 ± 0.10 (paper: 2.7 ± 0.1)': the mean over all runs of the groups, in percent.

    The paper's number is there where all settings are those of a config that reproduces it.
    """
    values = [100 * value for g in groups for value in g.values(metric)]
    if not values:
        return ''
    theirs = dict.fromkeys(
        printed(row)
        for g in groups
        for row in results.of_paper(g, list(paper))
        if row.metric == metric
    )
    beside = f' (paper: {", ".join(theirs)})' if theirs else ''
    return results.interval(results.mean_and_interval(values)) + beside


def printed(row: PaperRow) -> str:
    """Returns '14.0 ± 0.1' of a row of the paper, with its digits."""
    return row.digits + (f' ± {row.interval}' if row.interval else '')


def other_keys(groups: Sequence[Group], known: Sequence[str]) -> tuple[str, ...]:
    """Returns the settings that differ between groups and have no place in the layout yet."""
    placed = {*known, 'sam.method', 'sam.rho', 'data.labels_from'}
    if 'data.name' in known:
        placed.add('data.dir')
    return tuple(key for key in results.varying(list(groups)) if key not in placed)


def of_table(paper: Sequence[PaperRow], *numbers: int) -> list[PaperRow]:
    """Returns the rows of these tables of the paper, each once."""
    names = {f'Table {number}' for number in numbers}
    # A baseline's number is that of the better of two lengths, and stands there for both.
    return [row for row in paper if row.table in names and 'doubled=true' not in row.command]


def _of_paper(row):
    """Returns the settings of a row; what is read from a folder has the name of its dataset."""
    told = re.search(r'dataset=(\w+)', row.command)
    folder = 'data.dir' in row.settings and told
    return {**row.settings, **({'data.dir': told[1]} if folder else {})}


def method_of(settings: dict) -> str:
    """Returns the method's name; with rho = 0 it is the baseline."""
    return settings['sam.method'] if settings.get('sam.rho') != 0 else 'sgd'


def both(here: str, paper: str, note: str = '') -> str:
    """Returns the Markdown of a table of the runs and one of the paper."""
    return '\n\n'.join(
        part for part in ('## These runs', here, '## The paper', paper, note) if part
    )


def beside_baseline(
    groups: list[Group],
    paper: list[PaperRow],
    number: int,
    rows: Sequence[str] = _ROWS,
    columns: Sequence[str] = ('data.name',),
    metrics: Sequence[tuple[str, str]] = (('', TEST),),
    rho: float | None = None,
) -> str:
    """Tables 1, 2, 3, 5 and 9: the error of each method beside that of its baseline.

    Args:
      number: of the table.
      metrics: (what it is called, its name in result.json).
      rho: where given, the runs of that rho alone.

    Raises:
      Lacking: no method has a baseline.
    """
    switches = _switches(groups, rho)
    own = (*rows, *other_keys([s.method for s in switches], (*rows, *columns)))
    numbers = of_table(paper, number)
    if number == 9:  # its baselines are those of Table 1
        numbers += [r for r in of_table(paper, 1) if r.settings['sam.method'] == 'sgd']
    parts = []
    for title, metric in metrics:
        named = f'{title} error (%)'.strip()
        here = [
            Cell(s.method.settings, f'{method_of(g.settings)} {named}', g)
            for s in switches
            for g in (s.method, s.baseline)
        ]
        theirs = [
            Cell(_of_paper(r), f'{method_of(r.settings)} {named}', printed(r))
            for r in numbers
            if r.metric == metric
        ]
        if any(g.values(metric) for _, _, g in here):
            show = functools.partial(errors, metric=metric, paper=numbers)
            parts.append(both(arrange(here, own, columns, show), arrange(theirs, rows, columns)))
    return '\n\n'.join([*parts, BASELINES])


def _switches(groups, rho=None):
    if rho is not None:
        groups = [g for g in groups if g.is_baseline or g.settings['sam.rho'] == rho]
    switches = results.switches(groups)
    if not switches:
        of_rho = '' if rho is None else f' with rho {rho:g}'
        raise Lacking(
            f'no method{of_rho} stands beside a baseline with the same other settings (of several '
            'rho the validation split chooses)'
        )
    return switches


def fixed_rho_beside_best(groups: list[Group], paper: list[PaperRow]) -> str:
    """Table 10: the method with the best rho, with rho = 0.05, and the baseline."""
    fixed, best = _switches(groups, 0.05), results.switches(groups)
    rows = ('data.name',)
    here = [
        Cell(s.method.settings, f'{method_of(g.settings)}{which} error (%)', g)
        for switches, rho in ((best, ', best rho'), (fixed, ', rho 0.05'))
        for s in switches
        for g, which in ((s.method, rho), (s.baseline, ''))
    ]
    numbers = [
        r
        for r in of_table(paper, 3)
        if r.settings['model.name'] == 'efficientnet-b7' and r.settings['data.name'] != 'imagenet'
    ]
    theirs = [
        Cell(
            _of_paper(r),
            f'{method_of(r.settings)}{"" if method_of(r.settings) == "sgd" else rho} error (%)',
            printed(r),
        )
        for which, rho in ((numbers, ', best rho'), (of_table(paper, 10), ', rho 0.05'))
        for r in which
    ]
    own = (*rows, *other_keys([s.method for s in (*best, *fixed)], rows))
    show = functools.partial(errors, paper=of_table(paper, 10))
    return both(arrange(here, own, (), show), arrange(theirs, rows, ()))


def hyperparameters(groups: list[Group], paper: list[PaperRow], number: int) -> str:
    """Tables 6 and 7: learning rate, weight decay and the rho taken of each model and dataset."""
    rows, columns = ('model.name', 'total_epochs'), ('data.name',)
    keys = {'optimizer.learning_rate': 'LR', 'optimizer.weight_decay': 'WD', 'sam.rho': 'rho'}
    numbers = of_table(paper, {6: 1, 7: 5}[number])

    def cells(settings_of_all):
        return [
            Cell(settings, name, results.shown(settings[key]))
            for settings in settings_of_all
            for key, name in keys.items()
        ]

    here = cells([s.method.settings for s in _switches(groups)])
    theirs = cells([r.settings for r in numbers if r.settings['sam.method'] != 'sgd'])
    return both(arrange(here, rows, columns), arrange(theirs, rows, columns))


# Label noise.


def label_noise(groups: list[Group], paper: list[PaperRow]) -> str:
    """Table 4: the ACCURACY with label noise, a row for each way of training."""
    noisy = [(settings, g) for settings, g in map(_with_noise, groups) if settings]
    noisy = [(settings, g) for settings, g in noisy if g.values(TEST)]
    if not noisy:
        raise Lacking('no finished run has noisy labels')
    here = [Cell({**settings, 'row': _way(settings)}, '', g) for settings, g in _chosen(noisy)]
    theirs = [
        Cell({**settings, 'row': _way(settings, best=True)}, '', f'{100 - row.percent:.1f}')
        for row in of_table(paper, 4)
        for settings in [_paper_noise(row)]
    ]
    rows, columns = ('row',), ('data.label_noise',)
    others = other_keys(
        [g for _, g in noisy], ('data.label_noise', 'data.mixup_alpha', 'model.init_from')
    )
    return both(
        arrange(here, (*rows, *others), columns, _accuracies),
        arrange(theirs, rows, columns),
        'Test accuracy (%) on clean labels. In the paper mixup has the best alpha of each noise.',
    )


def _accuracies(groups):
    values = [100 * (1 - value) for g in groups for value in g.values(TEST)]
    return results.interval(results.mean_and_interval(values))


def _with_noise(group):
    """Returns (settings, group); of the bootstrap with the noise of the labels it learned first.

    That stands in the config of the first run, where sam-jax-predict writes beside it. The settings
    are None of a run without noise.
    """
    settings = group.settings
    if not settings['data.labels_from']:
        return (settings if settings['data.label_noise'] else None), group
    levels = set()
    for record in group.finished:
        first = os.path.dirname(record.written['config']['data.labels_from'])
        said = run_log.read_json(os.path.join(first, 'config.json'))
        levels.add(said['config']['data.label_noise'] if said else 'unknown')
    return {**settings, 'data.label_noise': levels.pop() if len(levels) == 1 else 'unknown'}, group


def _paper_noise(row):
    """Returns the settings of a row of the paper; the bootstrap's noise is told by its note."""
    told = re.match(r'bootstrap at (\d+) %', row.note)
    return {**row.settings, **({'data.label_noise': int(told[1]) / 100} if told else {})}


def _way(settings, best=False):
    alpha = settings['data.mixup_alpha']
    method = method_of(settings)
    mixup = f'mixup{"" if best else f" {alpha:g}"}' if alpha else ''
    return ' + '.join(
        filter(
            None,
            [
                'bootstrap' if settings['data.labels_from'] else '',
                mixup,
                '' if mixup and method == 'sgd' else method,
            ],
        )
    )


def _chosen(noisy):
    """Leaves out the rho that the validation split has not chosen, where there are several."""
    best = results.best([g for _, g in noisy])
    several = {}
    for _, g in noisy:
        several.setdefault(g.without('sam.rho'), []).append(g)
    kept = [(s, g) for s, g in noisy if len(several[g.without('sam.rho')]) == 1 or g in best]
    if not kept:
        raise Lacking('there are several rho, and no validation split to choose one')
    return kept


def validation_by_rho(groups: list[Group], paper: list[PaperRow]) -> str:
    """Table 8: the error on the validation split for each rho and noise."""
    tried = [(s or g.settings, g) for s, g in map(_with_noise, groups) if g.values(VALIDATION)]
    tried = sorted(
        [(s, g) for s, g in tried if 'sam.rho' in s],
        key=lambda pair: (pair[0]['sam.rho'], str(pair[0]['data.label_noise'])),
    )
    if not tried:
        raise Lacking('no finished run of a method with a rho holds out a validation split')
    here = [Cell(s, 'bootstrap' if s['data.labels_from'] else '', g) for s, g in tried]
    theirs = [Cell(_paper_noise(r), 'bootstrap', printed(r)) for r in of_table(paper, 8)]
    rows, columns = ('sam.rho',), ('data.label_noise',)
    own = (*rows, *other_keys([g for _, g in tried], (*columns, *rows)))
    return both(
        arrange(here, own, columns, functools.partial(errors, metric=VALIDATION)),
        arrange(theirs, rows, columns),
        'Validation error (%) on clean labels.',
    )


# Several steps of ascent.

# Table 11: (mean, standard deviation) of the rise of the training error rate in percent, by steps.
RISES = {
    'cifar10': {1: (0.17, 0.03), 2: (0.82, 0.03), 3: (1.49, 0.05), 5: (2.26, 0.05)},
    'cifar100': {1: (0.82, 0.05), 2: (1.83, 0.05), 3: (2.36, 0.03), 5: (2.82, 0.04)},
}


def rise(record: results.Record) -> list[tuple[float, float]]:
    """Returns [(epoch, max L(w + eps) - L(w)), ...], L the training error rate in percent.

    The rise is that which the run's own ascent finds. Both errors are means over the training
    batches since the last line of the log. It is empty of a run that was logged before there was
    `train/perturbed_error_rate`.
    """
    low = dict(record.curve('train/error_rate'))
    return [
        (epoch, 100 * (high - low[epoch])) for epoch, high in record.curve(THERE) if epoch in low
    ]


def unlogged(groups: list[Group]) -> str:
    """Returns a sentence if finished runs lack the error at the perturbed weights, else ''."""
    lacking = sum(not record.curve(THERE) for g in groups for record in g.finished)
    if not lacking:
        return ''
    return (
        f' {lacking} of the runs do not have {THERE} in their log, which older versions did not '
        'write: their curves and numbers of it are left out.'
    )


def with_steps(groups: list[Group]) -> list[Group]:
    """Returns the groups with a finished run whose ascent has a number of steps."""
    return [g for g in groups if 'sam.steps' in g.settings and g.finished]


def inner_steps(groups: list[Group], paper: list[PaperRow]) -> str:
    """Table 11: test error and sharpness by steps of ascent; mean and STANDARD DEVIATION."""
    found = with_steps(groups)
    if not found:
        raise Lacking('no finished run has several steps of ascent')
    found = sorted(found, key=lambda g: (g.settings['data.name'], g.settings['sam.steps'], g.radii))
    radii = collections.defaultdict(set)
    for g in found:
        radii[g.without('sam.rho', 'sam.steps')].add(g.radii[0])
    # Each dataset of the paper has one rho of its own, which is no setting of its rows.
    several = ('sam.rho',) if max(map(len, radii.values())) > 1 else ()
    here = []
    for g in found:
        rises = [told[-1][1] for told in map(rise, g.finished) if told]
        here.append(Cell(g.settings, 'error (%)', [100 * x for x in g.values(TEST)]))
        here.append(Cell(g.settings, 'rise of the error (%)', rises))
    theirs = [Cell(r.settings, 'error (%)', printed(r)) for r in of_table(paper, 11)] + [
        Cell({'data.name': name, 'sam.steps': steps}, 'rise of the error (%)', f'{a:g} ± {b:g}')
        for name, of_steps in RISES.items()
        for steps, (a, b) in of_steps.items()
    ]
    rows, columns = ('sam.steps',), ('data.name',)
    own = (*rows, *several, *other_keys(found, (*rows, *columns)))
    return both(
        arrange(here, own, columns, _deviations),
        arrange(theirs, rows, columns),
        'Mean and standard deviation over the runs. The rise is that of the training error rate '
        f'from the weights to the perturbed ones, at the end of the log.{unlogged(found)}',
    )


def _deviations(contents):
    values = [x for content in contents for x in content]
    if not values:
        return ''
    half = f' ± {statistics.stdev(values):.2g}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.4g}{half}'
