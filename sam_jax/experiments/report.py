"""A report on finished runs: Markdown and HTML with tables and pictures, and CSV files."""

import collections
import csv
import json
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sam_jax import tables
from sam_jax.errors import UserError
from sam_jax.experiments import figures, flatness, results, web
from sam_jax.experiments.results import TEST, VALIDATION

PAPER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'paper.csv')

FAR = 3  # times the least error: from there on the axis of errors is logarithmic

# Settings that name a panel of curves; what else differs names a curve in it.
PANEL = ('model.name', 'data.name', 'data.augment', 'data.label_noise')
# Settings whose values are names.
NAMES = ('model.name', 'data.name', 'sam.method')
# The rows of the paper's Figure 1.
KINDS = {
    'imagenet': 'ImageNet',
    'cifar10': 'CIFAR-10',
    'cifar100': 'CIFAR-100',
    'svhn': 'SVHN, Fashion-MNIST',
    'fashion_mnist': 'SVHN, Fashion-MNIST',
}

SWITCHES = (
    'As in Figure 1 of the paper: the reduction of the test error in percent of that of the '
    'baseline, which is the better one of those with as many epochs and with twice as many. rho is '
    'the best one of the validation split, or the only one. (On noisy labels that figure takes '
    'mixup for the baseline; here everything but the method is the same.)'
)


def mean_of(group: results.Group, metric: str, scale: float = 1.0) -> float | None:
    """Mean of a number of result.json, or None."""
    values = group.values(metric)
    return statistics.mean(values) * scale if values else None


def rows_of_table(
    groups: list[results.Group], keys: list[str], best: Any, paper: list[results.PaperRow]
) -> list[dict]:
    """Returns a dict for each group, in the order of the columns."""
    short = results.headings(keys)
    rows = []
    for g in groups:
        row = {short[key]: results.shown(g.settings.get(key)) for key in keys}
        runs = len(g.finished) + len(g.unfinished)
        row['runs'] = str(runs) if not g.unfinished else f'{len(g.finished)} of {runs}'
        row['test error (%)'] = results.interval(g.percent(TEST))
        row['validation error (%)'] = results.interval(g.percent(VALIDATION))
        row['best rho'] = 'best' if g in best else ''
        row['paper (%)'] = '; '.join(str(r) for r in results.of_paper(g, paper))
        evaluations = mean_of(g, 'gradient_evaluations')
        row['gradient evaluations'] = '' if evaluations is None else f'{evaluations:,.0f}'
        hours = mean_of(g, 'wall_time', 1 / 3600)
        row['hours'] = '' if hours is None else f'{hours:.3g}'
        row['hardware'] = ', '.join(
            sorted(
                {f'{r.written["device_count"]} x {r.written["device_kind"]}' for r in g.finished}
            )
        )
        rows.append(row)
    return rows


def write_csv(path: str, rows: list[dict]) -> None:
    """Writes dicts of one kind."""
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def rows_of_csv(
    groups: list[results.Group], keys: list[str], best: Any, paper: list[results.PaperRow]
) -> list[dict]:
    """Returns the same as numbers, for machines."""
    rows = []
    for g in groups:
        row = {key: g.settings.get(key, '') for key in keys}
        row.update(finished=len(g.finished), unfinished=len(g.unfinished))
        for metric in (TEST, VALIDATION, 'test/top5_error_rate', 'test/ema_error_rate'):
            mean, half = g.percent(metric) or ('', '')
            row.update({f'{metric} (%)': mean, f'{metric} (%) interval': half})
        row['best rho'] = g in best
        row['paper'] = '; '.join(str(r) for r in results.of_paper(g, paper))
        row['gradient_evaluations'] = mean_of(g, 'gradient_evaluations')
        row['hours'] = mean_of(g, 'wall_time', 1 / 3600)
        rows.append(row)
    return rows


def rows_of_runs(groups: list[results.Group]) -> list[dict]:
    """Returns a dict for each run: its folder, all its settings and results."""
    rows = [
        {'workdir': r.name, **r.written['config'], **(r.result or {})}
        for g in groups
        for r in (*g.finished, *g.unfinished)
    ]
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{column: row.get(column, '') for column in columns} for row in rows]


def by_panel(groups: list[results.Group]) -> dict:
    """Returns {title: groups} of the panels of curves."""
    varying = results.varying(groups)
    differ = [key for key in PANEL if key in varying]
    found = collections.defaultdict(list)
    for g in groups:
        found[_named(g, differ) or _named(g, ['model.name', 'data.name'])].append(g)
    return found


def label(group: results.Group, keys: list[str]) -> str:
    """'sam, rho 0.1': what the keys say of a group."""
    return _named(group, keys) or group.settings['sam.method']


def _named(group, keys):
    short = results.headings(keys)
    shown = {key: results.shown(group.settings.get(key)) for key in keys}
    # What has a name of its own needs no other; a number says of what it is.
    return ', '.join(
        value if key in NAMES else f'{short[key].replace("_", " ")} {value}'
        for key, value in shown.items()
        if value
    )


def rho_panels(groups: list[results.Group]) -> Any:
    """Returns the Panels of test error against rho, and of validation error where there is one."""
    described = []
    for title, inside in by_panel(groups).items():
        families = _families([g for g in inside if 'sam.rho' in g.settings and g.values(TEST)])
        if not families:
            continue
        keys = [k for k in results.varying([f[0] for f in families]) if k != 'sam.rho']
        curves = []
        for i, family in enumerate(families):
            for metric, dashed in ((TEST, False), (VALIDATION, True)):
                with_it = [g for g in family if g.values(metric)]
                if with_it:
                    means, halves = zip(*(g.percent(metric) for g in with_it))
                    name = f'{label(family[0], keys)}{", validation" if dashed else ""}'
                    curves.append(
                        figures.Curve(
                            name,
                            [g.settings['sam.rho'] for g in with_it],
                            means,
                            halves,
                            f'C{i}',
                            dashed,
                        )
                    )
        sgd = [g for g in inside if g.settings['sam.method'] == 'sgd' and g.values(TEST)]
        level = min((g.percent(TEST) for g in sgd), default=None)
        name = 'error (%)' if any(curve.dashed for curve in curves) else 'test error (%)'
        means = [mean for curve in curves for mean in curve.mean]
        # Beside runs that failed, the others would all lie on one line.
        far = max(means) > FAR * min(means) > 0
        level = level and ('sgd', *level)
        described.append(figures.Panel(title, 'rho', name, curves, level, log_x=True, log_y=far))
    return described


def _families(groups):
    """Returns lists of groups that differ in rho, ascending, and in rho_min where it follows rho.

    Where a rho has several rho_min, each of those has a list of its own.
    """
    together, families = collections.defaultdict(list), collections.defaultdict(list)
    for g in groups:
        together[g.without('sam.rho')].append(g)
    for rest, tried in together.items():
        rhos = {rho for rho, _ in (g.radii for g in tried)}
        for g in tried:
            families[rest, g.radii[1] if len(rhos) < len(tried) else None].append(g)
    return [sorted(f, key=lambda g: g.radii) for f in families.values() if len(f) > 1]


class Drawn(NamedTuple):
    """A curve over epochs.

    Attributes:
      of: takes a Record, returns [(epoch, value), ...].
      name: of its axis.
      log_y: whether that is logarithmic.
    """

    of: Callable[[results.Record], list[tuple[float, float]]]
    name: str
    log_y: bool = False


def percents(metric: str) -> Callable[[results.Record], list[tuple[float, float]]]:
    """Returns Drawn.of of an error rate, in percent."""
    return lambda record: [(epoch, 100 * value) for epoch, value in record.curve(metric)]


TRAINING = (
    Drawn(lambda record: record.curve('train/loss'), 'training loss', log_y=True),
    Drawn(percents(TEST), 'test error (%)'),
)


def training_panels(groups: list[results.Group], drawn: Sequence[Drawn] = TRAINING) -> Any:
    """Returns the Panels of what is drawn against epochs."""
    described = []
    for title, inside in by_panel(groups).items():
        inside = [g for g in inside if g.finished]
        if not inside:
            continue
        keys = [k for k in results.varying(inside) if k not in PANEL] or ['sam.method']
        for of, name, log_y in drawn:
            curves = []
            for i, g in enumerate(inside):
                points = collections.defaultdict(list)
                for record in g.finished:
                    for epoch, value in of(record):
                        points[epoch].append(value)
                if points:
                    x = sorted(points)
                    means, halves = zip(*(results.mean_and_interval(points[p]) for p in x))
                    color = figures.shade(i / max(1, len(inside) - 1))
                    curves.append(figures.Curve(label(g, keys), x, means, halves, color))
            if curves:
                described.append(figures.Panel(title, 'epoch', name, curves, log_y=log_y))
    return described


def rows_of_switches(
    switches: list[Any], keys: list[str], paper: list[results.PaperRow]
) -> list[dict]:
    """Returns a dict for each method beside its baseline."""
    rows = []
    for s in switches:
        theirs = reduction_of_paper(s, paper)
        rows.append(
            {
                'from': label(s.baseline, keys),
                'to': label(s.method, keys),
                'test error (%)': f'{results.interval(s.baseline.percent(TEST))} to '
                f'{results.interval(s.method.percent(TEST))}',
                'reduction (%)': f'{s.reduction:.1f}',
                'paper (%)': '' if theirs is None else f'{theirs:.1f}',
            }
        )
    return rows


def reduction_of_paper(switch: Any, paper: list[results.PaperRow]) -> float | None:
    """The reduction between the paper's two numbers, if both are rows of one of its tables."""
    for before in results.of_paper(switch.baseline, paper):
        for after in results.of_paper(switch.method, paper):
            if before.table == after.table and before.metric == after.metric == TEST:
                return 100 * (before.percent - after.percent) / before.percent
    return None


def rows_of_figure_1(switches: list[Any], paper: list[results.PaperRow]) -> list[dict]:
    """Returns {kind of data: [(reduction, the paper's), ...]}."""
    rows = collections.defaultdict(list)
    for s in switches:
        settings = s.method.settings
        kind = KINDS.get(settings['data.name'], settings['data.name'])
        if settings['data.label_noise'] or settings['data.labels_from']:
            kind += ', noisy labels'
        elif settings['model.init_from']:
            kind = 'Fine-tuning'
        rows[kind].append((s.reduction, reduction_of_paper(s, paper)))
    return rows


def notes_of(groups: list[results.Group]) -> list[str]:
    """Returns what else a reader should know."""
    notes = [f'{r.name} is not finished.' for g in groups for r in g.unfinished]
    finished = [r for g in groups for r in g.finished]
    for what in ('git_revision', 'device_kind'):
        different = sorted({r.written[what] for r in finished})
        if len(different) > 1:
            notes.append(f'The runs differ in {what}: {", ".join(different)}.')
    return notes


def document(
    groups: list[results.Group],
    keys: list[str],
    best: Any,
    notes: list[str],
    paper: list[results.PaperRow],
) -> tuple[str, dict]:
    """Returns (Markdown, {name of a picture in it: its Panels, or its figure})."""
    switches = results.switches(groups)
    pictures = {}
    finished = sum(len(g.finished) for g in groups)
    parts = [
        f'# {finished} finished runs, {len(groups)} settings',
        'Means over seeds and 95 % t-intervals.',
        tables.of_records(rows_of_table(groups, keys, best, paper)),
    ]
    tried = any('sam.rho' in g.settings for g in groups)
    if best:
        parts.append('The best rho is that of the lowest mean error on the validation split.')
    elif tried:
        parts.append(
            'No best rho is named: that takes finished runs of several rho that hold out '
            'a validation split (`--config.data.validation=true`).'
        )
    if described := rho_panels(groups):
        pictures['rho.png'] = described
        parts += ['## Error against rho', '![Error against rho](rho.png)']
    if switches:
        pictures['switches.png'] = figures.reductions(rows_of_figure_1(switches, paper))
        parts += [
            '## What switching to SAM gains',
            tables.of_records(rows_of_switches(switches, keys, paper)),
            SWITCHES,
            '![Error reduction by switching to SAM](switches.png)',
        ]
    if described := training_panels(groups):
        pictures['training.png'] = described
        parts += ['## Training', '![Training loss and test error](training.png)']
    if measured := flatness.rows(groups, [label(g, keys) for g in groups]):
        parts += [
            '## Flatness',
            'What `sam-jax-analyze` has measured, of each run by itself.',
            tables.of_records(measured),
        ]
    notes = [*notes, *notes_of(groups)]
    if notes:
        parts += ['## Notes', '\n'.join(f'- {note}' for note in notes)]
    everywhere = {
        key: {json.dumps(g.settings[key]) for g in groups if key in g.settings}
        for key in sorted({key for g in groups for key in g.settings})
    }
    # The baselines lack the settings of an ascent.
    common = [
        f'{key} = {results.shown(json.loads(*values))}'
        for key, values in everywhere.items()
        if len(values) == 1 and key not in keys
    ]
    parts += ['## Settings of all runs', ', '.join(f'`{setting}`' for setting in common)]
    return '\n\n'.join(parts) + '\n', pictures


def write(folders: list[str], out: str) -> str:
    """Reports on the finished runs in folders, into another: Markdown, HTML and CSV.

    Returns:
      The Markdown.

    Raises:
      UserError: there is no finished run.
    """
    groups, notes = results.group(results.find(folders))
    if not any(g.finished for g in groups):
        raise UserError(f'None of the runs in {", ".join(folders)} is finished (no result.json).')
    paper = results.read_paper(PAPER)
    os.makedirs(out, exist_ok=True)
    keys, best = results.varying(groups), results.best(groups)
    text, pictures = document(groups, keys, best, notes, paper)
    single = {}
    for name, drawn in pictures.items():
        whole = figures.panels(drawn) if isinstance(drawn, list) else drawn
        figures.save(whole, os.path.join(out, name))
        # On the page each panel by itself: a narrow window has them one below the other.
        single[name] = (
            [figures.panels([panel]) for panel in drawn] if isinstance(drawn, list) else [drawn]
        )
    with open(os.path.join(out, 'report.md'), 'w') as file:
        file.write(text)
    with open(os.path.join(out, 'report.html'), 'w') as file:
        file.write(web.page(text, single))
    write_csv(os.path.join(out, 'report.csv'), rows_of_csv(groups, keys, best, paper))
    write_csv(os.path.join(out, 'runs.csv'), rows_of_runs(groups))
    return text
