"""The paper's figures, drawn of finished runs: each as a picture with its numbers.

A function for each takes the groups of runs and the paper's rows, and returns `Made`; it raises
`layouts.Lacking` where the runs lack what it needs.
"""

import math
import os
from typing import Any, NamedTuple

import numpy as np

from sam_jax import tables
from sam_jax.experiments import figures, flatness, layouts, predictor, report, results
from sam_jax.experiments.layouts import Cell, Lacking
from sam_jax.experiments.results import TEST, Group, PaperRow


class Made(NamedTuple):
    """A figure or a table.

    Attributes:
      text: Markdown.
      picture: Panels, or a figure of matplotlib; None of a table.
    """

    text: str
    picture: Any = None


def figure_1_left(groups: list[Group], paper: list[PaperRow]) -> Made:
    """The reduction of the error by switching to SAM, as the report has it."""
    switches = results.switches(groups)
    if not switches:
        raise Lacking('no method stands beside a baseline with the same other settings')
    keys = results.varying(groups)
    text = tables.of_records(report.rows_of_switches(switches, keys, paper))
    return Made(
        f'{text}\n\n{report.SWITCHES}', figures.reductions(report.rows_of_figure_1(switches, paper))
    )


# So many landscapes fit beside each other.
_SURFACES = 4


def figure_1_right(groups: list[Group], paper: list[PaperRow]) -> Made:
    """The landscapes that were measured, of the first run of each group."""
    del paper
    surfaces, rows = [], []
    for name, folder in _measured(groups, 'landscape_1.npz').items():
        with np.load(os.path.join(folder, 'landscape_1.npz')) as file:
            loss, places, done = file['loss'], file['places'], int(file['done'])
        if done < len(loss):
            continue
        ticks = np.unique(places[:, 0])
        surfaces.append(figures.Surface(name, ticks, loss.reshape(len(ticks), len(ticks))))
        rows.append(
            {
                'run': name,
                'loss at the minimum': f'{loss[len(loss) // 2]:.4g}',
                'highest loss': f'{np.max(loss):.4g}',
            }
        )
    if not surfaces:
        raise Lacking('no run has a landscape that is measured to its end')
    note = '' if len(rows) <= _SURFACES else f'\n\nThe first {_SURFACES} are drawn.'
    return Made(tables.of_records(rows) + note, figures.surfaces(surfaces[:_SURFACES]))


_TOP, _RATIO = 'lambda_max', 'lambda_max / lambda_5'
# Figure 3, left: (lambda_max, lambda_max / lambda_5).
SPECTRA = {
    ('sgd', 1): (62.9, 2.5),
    ('sgd', 50): (12.5, 1.7),
    ('sgd', 300): (24.2, 11.4),
    ('sam', 1): (18.6, 3.6),
    ('sam', 50): (8.9, 1.9),
    ('sam', 300): (1.0, 2.6),
}


def figure_3_left(groups: list[Group], paper: list[PaperRow]) -> Made:
    """Spectra of the Hessian by method and epoch; means over the runs in the table."""
    del paper
    rows, drawn = [], []
    for group, name in zip(groups, _names(groups)):
        by_epoch = {}
        for record in group.finished:
            of_run = {}
            for folder, said in flatness.analyses(record):
                run = said['runs'][0]
                if 'spectrum' in run:
                    of_run.setdefault(run['step'], (folder, run['spectrum']))
            for step, found in of_run.items():
                epoch = round(step * record.epochs_per_step, 3)
                by_epoch.setdefault(epoch, []).append(found)
        for epoch, measured in sorted(by_epoch.items()):
            title = f'{name}, epoch {epoch:g}'
            with np.load(os.path.join(measured[0][0], 'spectrum_1.npz')) as file:
                drawn.append(
                    figures.Spectrum(title, file['grid'], file['density'], file['eigenvalues'])
                )
            row = {'runs': name, 'epoch': f'{epoch:g}', 'number': len(measured)}
            for key, shown in (('lambda_max', _TOP), ('lambda_ratio', _RATIO)):
                values = [float(spectrum[key]) for _, spectrum in measured]
                row[shown] = results.interval(results.mean_and_interval(values))
            rows.append(row)
    if not drawn:
        raise Lacking('no run has a spectrum that is measured')
    theirs = [
        {'runs': method, 'epoch': epoch, _TOP: top, _RATIO: ratio}
        for (method, epoch), (top, ratio) in SPECTRA.items()
    ]
    note = 'The paper has WRN-40-10 without BatchNorm on CIFAR-10.'
    return Made(
        layouts.both(tables.of_records(rows), tables.of_records(theirs), note),
        figures.spectra(drawn),
    )


def figure_3_middle(groups: list[Group], paper: list[PaperRow]) -> Made:
    """Test error against rho, a curve for each m."""
    del paper
    found = sorted((_with_m(g) for g in groups), key=lambda g: g.settings['m'])
    return _against_rho(found, ('m',))


def _with_m(group):
    """Returns the group with m, in place of what it is made of, among its settings."""
    settings = dict(group.settings)
    # A baseline has no m, but its batches do.
    m = settings.pop('replica_batch_size') * settings.pop('sam.replicas_per_group', 1)
    return Group({**settings, 'm': m}, group.finished, group.unfinished)


def figure_3_right(groups: list[Group], paper: list[PaperRow]) -> Made:
    """How well m-sharpness tells the generalisation gap, for each m."""
    del paper
    known = predictor.networks(groups)
    found = predictor.associations(known)
    if not found:
        raise Lacking(
            f'{len(known)} of the finished runs have m-sharpness of the training split at their '
            f'end, and {predictor.LEAST} of one dataset are the least'
        )
    note = (
        'The gap is the test error less the training error. Mutual information is that of the '
        'signs of the differences between two networks, as a share of what is open (Jiang et al. '
        '2019); the conditional one is the least over what is given of up to two settings. The '
        'paper has two tasks of the PGDL competition, and its curves are not printed as numbers: '
        'the axes go from 0.030 to 0.050 and from 0.14 to 0.17.'
    )
    return Made(
        f'{tables.of_records(predictor.rows(found))}\n\n{note}', predictor.panels(known, found)
    )


def figure_4(groups: list[Group], paper: list[PaperRow]) -> Made:
    """SAM with and without the second-order terms, over training."""
    del paper
    methods = ('sam', 'second_order_sam')
    found = [g for g in groups if g.settings['sam.method'] in methods and g.finished]
    if {g.settings['sam.method'] for g in found} != {*methods}:
        raise Lacking('there are no finished runs of both sam and second_order_sam')
    drawn = (
        report.Drawn(report.percents(layouts.THERE), 'training error at w + eps (%)'),
        report.Drawn(report.percents(TEST), 'test error (%)'),
    )
    note = 'The paper finds the lower test error without the second-order terms.'
    return _over_training(found, drawn, note + layouts.unlogged(found))


def figure_5(groups: list[Group], paper: list[PaperRow]) -> Made:
    """How near SAM's update is to that with the second-order terms, over training."""
    del paper
    ways = (
        report.Drawn(_cosines, 'cosine of both orders'),
        report.Drawn(_logged_cosines, 'cosine of both orders, as logged'),
    )
    drawn = [way for way in ways if any(way.of(r) for g in groups for r in g.finished)]
    found = [g for g in groups if any(way.of(r) for way in drawn for r in g.finished)]
    if not found:
        raise Lacking('of no finished run the cosine of the two orders is measured or logged')
    note = (
        'The cosine is that of the two gradients of many examples together, at the params of the '
        'run. As it is logged it is that of a step of `second_order_sam` itself, the mean over its '
        'groups of m examples. The paper finds about 1 in the first half of the training and less '
        'near its end.'
    )
    return _over_training(found, drawn, note)


def _cosines(record):
    """Returns [(epoch, cosine), ...] of what was measured of a run."""
    runs = [said['runs'][0] for _, said in flatness.analyses(record)]
    found = {
        run['step'] * record.epochs_per_step: float(run['order_cosine'])
        for run in runs
        if 'order_cosine' in run
    }
    return sorted(found.items())


def _logged_cosines(record):
    """Returns the same of the log, of a run whose own step has both orders."""
    if record.written['config']['sam.method'] != 'second_order_sam':
        return []
    return record.curve('train/descent_cosine')


def figure_6(groups: list[Group], paper: list[PaperRow]) -> Made:
    """Test error against rho for balls of several norms and random directions."""
    del paper
    found = [g for g in groups if g.settings['sam.method'] in ('sgd', 'sam', 'random_sam')]
    return _against_rho(found, ('sam.method', 'sam.p'))


def figure_7(groups: list[Group], paper: list[PaperRow]) -> Made:
    """The rise of the training error that ascents of several steps find, over training."""
    del paper
    found = layouts.with_steps(groups)
    if not any(layouts.rise(record) for g in found for record in g.finished):
        raise Lacking(
            f'no finished run with several steps of ascent has {layouts.THERE} in its log, which '
            'older versions did not write'
        )
    note = 'L is the training error rate, a mean over the steps between two lines of the log.'
    drawn = (report.Drawn(layouts.rise, 'max L(w + eps) - L(w) (%)'),)
    return _over_training(found, drawn, note + layouts.unlogged(found))


def _names(groups):
    keys = results.varying(groups)
    names = [report.label(g, keys) for g in groups]
    return [f'{name} ({i})' if name in names[:i] else name for i, name in enumerate(names)]


def _measured(groups, file):
    """Returns {name of a group: the first folder of its measurements with the file}."""
    found = {}
    for group, name in zip(groups, _names(groups)):
        for record in group.finished:
            for folder, _ in flatness.analyses(record):
                if os.path.exists(os.path.join(folder, file)):
                    found.setdefault(name, folder)
    return found


def _against_rho(groups, keys):
    """Curves of the test error against rho, and the same as a table with a column for each."""
    panels = report.rho_panels(groups)
    if not panels:
        raise Lacking('no finished runs differ in rho alone')
    found = sorted(
        [g for g in groups if g.values(TEST)], key=lambda g: g.settings.get('sam.rho', 0.0)
    )
    columns = [key for key in keys if key in results.varying(found)]
    others = layouts.other_keys(found, (*columns, 'sam.rho'))
    cells = [Cell(g.settings, 'test error (%)', g) for g in found]
    text = layouts.arrange(cells, ('sam.rho', *others), columns, layouts.errors)
    return Made(f'{text}\n\nThe paper prints none of its values.', panels)


def _over_training(groups, drawn, note):
    """Curves over epochs, and their last values as a table with a row for each group."""
    rows = []
    for group, name in zip(groups, _names(groups)):
        row = {'runs': name, 'number': len(group.finished)}
        for of, what, _ in drawn:
            told = [told[-1] for told in map(of, group.finished) if told]
            last = [value for _, value in told]
            pair = results.mean_and_interval(last) if last else (math.nan, math.nan)
            row[f'{what}: epoch'] = ', '.join(dict.fromkeys(f'{epoch:g}' for epoch, _ in told))
            half = '' if math.isnan(pair[1]) else f' ± {pair[1]:.2g}'
            row[what] = f'{pair[0]:.4g}{half}' if last else ''
        rows.append(row)
    text = f'{tables.of_records(rows)}\n\n{note}'
    return Made(text, report.training_panels(groups, drawn))
