"""Every figure and table of the paper that shows results, made of finished runs.

`WHOLE` has a row for each: what it shows, the commands that make the runs it needs, and the
function that draws it. Any dataset will do; the commands are those of the paper's own.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sam_jax import tables
from sam_jax.errors import UserError
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


class Whole(NamedTuple):
    """A figure or a table of the paper.

    Attributes:
      shows: what it shows, in one sentence.
      commands: that make the runs it needs, in this order.
      make: takes the groups of runs and the paper's rows, returns Made; raises layouts.Lacking.
    """

    shows: str
    commands: tuple[str, ...]
    make: Callable[[list[Group], list[PaperRow]], Made]


# Figures.


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
    for name, (_, folder, _) in _measured(groups, 'landscape_1.npz').items():
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
            for folder, said in flatness.analyses(record):
                run = said['runs'][0]
                if 'spectrum' in run:
                    epoch = run['step'] * record.epochs_per_step
                    by_epoch.setdefault(round(epoch, 3), []).append((folder, run['spectrum']))
        for epoch, measured in sorted(by_epoch.items()):
            title = f'{name}, epoch {epoch:g}'
            with np.load(os.path.join(measured[0][0], 'spectrum_1.npz')) as file:
                drawn.append(
                    figures.Spectrum(title, file['grid'], file['density'], file['eigenvalues'])
                )
            theirs = SPECTRA.get((layouts.method_of(group.settings), epoch), ('', ''))
            row = {'runs': name, 'epoch': f'{epoch:g}', 'number': len(measured)}
            for (key, shown), number in zip(
                (('lambda_max', 'lambda_max'), ('lambda_ratio', 'lambda_max / lambda_5')), theirs
            ):
                values = [float(spectrum[key]) for _, spectrum in measured]
                row[shown] = results.interval(results.mean_and_interval(values))
                row[f'{shown}, paper'] = number
            rows.append(row)
    if not drawn:
        raise Lacking('no run has a spectrum that is measured')
    note = 'The paper has WRN-40-10 without BatchNorm on CIFAR-10.'
    return Made(f'{tables.of_records(rows)}\n\n{note}', figures.spectra(drawn))


def figure_3_middle(groups: list[Group], paper: list[PaperRow]) -> Made:
    """Test error against rho, a curve for each m."""
    del paper
    return _against_rho(
        [_with_m(g) for g in groups if 'sam.rho' in g.settings or g.is_baseline], ('m',)
    )


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
        report.Drawn(
            lambda record: record.curve('train/perturbed_loss'), 'training loss at w + eps', True
        ),
        report.Drawn(report.percents(TEST), 'test error (%)'),
    )
    note = (
        'At w + eps the paper has the training error, and here it is the training loss. The paper '
        'finds the lower test error without the second-order terms.'
    )
    return _over_training(found, drawn, note)


def figure_6(groups: list[Group], paper: list[PaperRow]) -> Made:
    """Test error against rho for balls of several norms and random directions."""
    del paper
    found = [g for g in groups if g.settings['sam.method'] in ('sgd', 'sam', 'random_sam')]
    return _against_rho(found, ('sam.method', 'sam.p'))


def figure_7(groups: list[Group], paper: list[PaperRow]) -> Made:
    """The rise of the loss that ascents of several steps find, over training."""
    del paper
    found = layouts.with_steps(groups)
    if not any(layouts.rise(record) for g in found for record in g.finished):
        raise Lacking('no finished run with several steps of ascent logs its perturbed loss')
    note = 'The paper has the rise of the training error rate, and here it is that of the loss.'
    return _over_training(found, (report.Drawn(layouts.rise, 'max L(w + eps) - L(w)'),), note)


def _names(groups):
    keys = results.varying(groups)
    names = [report.label(g, keys) for g in groups]
    return [f'{name} ({i})' if name in names[:i] else name for i, name in enumerate(names)]


def _measured(groups, file):
    """Returns {name of a group: (its first record with the file, folder, analysis.json)}."""
    found = {}
    for group, name in zip(groups, _names(groups)):
        for record in group.finished:
            for folder, said in flatness.analyses(record):
                if os.path.exists(os.path.join(folder, file)):
                    found.setdefault(name, (record, folder, said))
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
            last = [told[-1][1] for told in map(of, group.finished) if told]
            pair = results.mean_and_interval(last) if last else (math.nan, math.nan)
            row[f'{what}, at the end'] = f'{pair[0]:.4g}' + (
                '' if math.isnan(pair[1]) else f' ± {pair[1]:.2g}'
            )
        rows.append(row)
    text = f'{tables.of_records(rows)}\n\n{note}'
    return Made(text, report.training_panels(groups, drawn))


# Tables.


def _table(function, *arguments, **options):
    return lambda groups, paper: Made(function(groups, paper, *arguments, **options))


def _sweep(config, *sweeps, folder, seeds=5, more=''):
    return ' '.join(
        [
            f'sam-jax-sweep --config={config}',
            *(f'--sweep={sweep}' for sweep in sweeps),
            *([f'--seeds={seeds}'] if seeds else []),
            *([more] if more else []),
            f'--workdir=runs/{folder}',
        ]
    )


_BOTH = ':method=sgd,sam'
_DOUBLED = "':method=sam,sgd,sgd;:doubled=false,false,true'"
_CIFAR = (':dataset=cifar10,cifar100', ':augment=basic,cutout,autoaugment')
_CKPT = '--config.model.init_from=CKPT'
_STEPS = _sweep(
    'ablations:figure=steps',
    ':steps=1,2,3,5',
    ':dataset=cifar10,cifar100',
    folder='steps',
    seeds=20,
)
_NORM_RHOS = 'sam.rho=1e-6,1e-4,1e-2,0.1,1,10,1000'
_NOISES = ':noise=0.2,0.4,0.6,0.8'

WHOLE = {
    '1-left': Whole(
        'How much the error falls by switching to SAM, a dot for each experiment.',
        (_sweep('cifar', _DOUBLED, *_CIFAR, folder='cifar'),),
        figure_1_left,
    ),
    '1-right': Whole(
        'The loss around a minimum of SGD (in the paper the middle) and of SAM.',
        (
            _sweep('ablations:figure=landscape', _BOTH, folder='landscape', seeds=0),
            'sam-jax-analyze --runs=runs/landscape --what=landscape --points=51 --examples=0',
        ),
        figure_1_right,
    ),
    '3-left': Whole(
        'The spectrum of the Hessian after 1, 50 and 300 epochs.',
        (
            _sweep('ablations:figure=spectrum', _BOTH, folder='spectrum', seeds=0),
            *(
                f'sam-jax-analyze --runs=runs/spectrum --what=spectrum --epoch={epoch}'
                for epoch in (1, 50, 300)
            ),
        ),
        figure_3_left,
    ),
    '3-middle': Whole(
        'Test error against rho, a curve for each m.',
        (
            _sweep(
                'ablations:figure=m',
                ':m=1,4,16,64,256',
                ':rho=0,0.05,0.1,0.15',
                folder='m',
                seeds=0,
            ),
        ),
        figure_3_middle,
    ),
    '3-right': Whole(
        'How well m-sharpness tells the generalisation gap of many networks, for each m.',
        (
            _sweep(
                'cifar:epochs=30',
                ':model=wrn10_1,resnet20',
                _BOTH,
                'optimizer.learning_rate=0.02,0.05,0.1',
                'optimizer.weight_decay=0,1e-4,5e-4',
                folder='many',
                seeds=2,
            ),
            'sam-jax-analyze --runs=runs/many --what=sharpness --m=1,4,16,64,256',
        ),
        figure_3_right,
    ),
    '4': Whole(
        'SAM with and without the second-order terms, over training.',
        (
            _sweep(
                'ablations:figure=order', ':method=sam,second_order_sam', folder='order', seeds=0
            ),
        ),
        figure_4,
    ),
    '6': Whole(
        'Test error against rho for balls of the 2-norm and the infinity norm, and for random '
        'directions.',
        (
            _sweep('ablations:figure=p_norm', 'sam.p=2,inf', _NORM_RHOS, folder='norms/p', seeds=0),
            _sweep('ablations:figure=random', _NORM_RHOS, folder='norms/random', seeds=0),
        ),
        figure_6,
    ),
    '7': Whole(
        'The rise of the loss that ascents of 1, 2, 3 and 5 steps find, over training.',
        (_STEPS,),
        figure_7,
    ),
    'table-1': Whole(
        'CIFAR: the test error of SAM and of SGD.',
        (_sweep('cifar', _DOUBLED, *_CIFAR, folder='cifar'),),
        _table(layouts.beside_baseline, 1),
    ),
    'table-2': Whole(
        'ImageNet: top-1 and top-5 error of SAM and of SGD.',
        (
            _sweep(
                'imagenet',
                ':model=resnet50,resnet101,resnet152',
                ':epochs=100,200,400',
                _BOTH,
                folder='imagenet',
            ),
        ),
        _table(
            layouts.beside_baseline,
            2,
            ('model.name', 'total_epochs'),
            (),
            (('top-1', TEST), ('top-5', layouts.TOP5)),
        ),
    ),
    'table-3': Whole(
        'Fine-tuning: the test error with and without SAM.',
        (
            _sweep(
                'finetune',
                ':dataset=flowers,cars,cifar10,cifar100',
                _BOTH,
                folder='finetune',
                more=_CKPT,
            ),
        ),
        _table(layouts.beside_baseline, 3, ('data.name',), ('model.name',)),
    ),
    'table-4': Whole(
        'Label noise: the test accuracy of SGD, mixup, SAM, and of the bootstrap with them.',
        (
            _sweep('label_noise', _NOISES, _BOTH, folder='noise'),
            _sweep('label_noise:method=sgd', _NOISES, ':mixup=1,8,16,32', folder='noise/mixup'),
        ),
        _table(layouts.label_noise),
    ),
    'table-5': Whole(
        'SVHN and Fashion-MNIST: the test error with and without SAM.',
        (
            _sweep('svhn', ':augment=basic,autoaugment_only_cutout', _DOUBLED, folder='t5/svhn'),
            _sweep('fashion_mnist', ':augment=basic,cutout', _DOUBLED, folder='t5/fashion'),
        ),
        _table(layouts.beside_baseline, 5, ('model.name', 'data.augment')),
    ),
    'table-6': Whole(
        'CIFAR: the learning rate, the weight decay and the rho that were taken.',
        (_sweep('cifar', _DOUBLED, *_CIFAR, folder='cifar'),),
        _table(layouts.hyperparameters, 6),
    ),
    'table-7': Whole(
        'The same of SVHN and Fashion-MNIST.',
        (
            _sweep('svhn', ':augment=basic,autoaugment_only_cutout', _DOUBLED, folder='t5/svhn'),
            _sweep('fashion_mnist', ':augment=basic,cutout', _DOUBLED, folder='t5/fashion'),
        ),
        _table(layouts.hyperparameters, 7),
    ),
    'table-8': Whole(
        'Label noise: the validation error of the bootstrap with SAM, by rho.',
        (
            'sam-jax-predict --workdir=FIRST_RUN',
            _sweep(
                'label_noise:labels_from=FIRST_RUN/predictions.npz,validation=true',
                ':rho=0,0.01,0.02,0.05,0.1,0.2,0.5',
                folder='bootstrap',
                seeds=0,
            ),
        ),
        _table(layouts.validation_by_rho),
    ),
    'table-9': Whole(
        'CIFAR with rho = 0.05 throughout.',
        (_sweep('cifar:rho=0.05', _DOUBLED, *_CIFAR, folder='cifar_005'),),
        _table(layouts.beside_baseline, 9, rho=0.05),
    ),
    'table-10': Whole(
        'Fine-tuning with the best rho and with rho = 0.05.',
        (
            _sweep(
                'finetune',
                ':dataset=flowers,cars',
                ':rho=0,0.02,0.05,0.1',
                '"data.validation=true,false"',
                folder='finetune_rho',
                more=_CKPT,
            ),
        ),
        _table(layouts.fixed_rho_beside_best),
    ),
    'table-11': Whole(
        'Test error and sharpness by the number of steps of ascent.',
        (_STEPS,),
        _table(layouts.inner_steps),
    ),
}


def title(name: str) -> str:
    """Returns 'Figure 3, right' of '3-right' and 'Table 1' of 'table-1'."""
    kind, _, rest = name.partition('-')
    return f'Table {rest}' if kind == 'table' else ', '.join(filter(None, [f'Figure {kind}', rest]))


def overview() -> str:
    """Returns the Markdown table of WHOLE: names, what they show, the commands before."""
    return tables.markdown(
        ('name', 'what it shows', 'made before, for the paper'),
        [
            [f'`{name}`', whole.shows, ', then '.join(f'`{c}`' for c in whole.commands)]
            for name, whole in WHOLE.items()
        ],
    )


def make(name: str, folders: Sequence[str]) -> Made:
    """Makes a figure or a table of the finished runs in folders.

    Raises:
      UserError: there is none of that name, no finished run, or the runs lack what it needs; the
        sentence names the commands.
    """
    if name not in WHOLE:
        raise UserError(f'There is no figure {name!r}; there are {", ".join(WHOLE)}.')
    whole = WHOLE[name]
    groups, notes = results.group(results.find(folders))
    groups = [g for g in groups if g.finished]
    told = ', '.join(folders)
    if not groups:
        raise UserError(f'None of the runs in {told} is finished (no result.json).')
    try:
        text, picture = whole.make(groups, results.read_paper(report.PAPER))
    except Lacking as e:
        raise UserError(
            f'{title(name)} cannot be made of {told}: {e}. The runs of the paper are made by: '
            f'{"; then ".join(whole.commands)}.'
        ) from e
    parts = [f'# {title(name)}', whole.shows, text]
    if notes:
        parts.append('\n'.join(f'- {note}' for note in notes))
    return Made('\n\n'.join(parts) + '\n', picture)


def write(name: str, folders: Sequence[str], out: str) -> str:
    """Makes a figure or a table and writes it; beside a picture its numbers, in Markdown.

    Args:
      out: file of the picture, of a table that of its Markdown.

    Returns:
      The Markdown.

    Raises:
      UserError: as of `make`; the end of `out` names no kind of file that can be written.
    """
    stem, end = os.path.splitext(out)
    pictures = ('.svg', '.png', '.pdf')
    known = ('.md',) if name.startswith('table-') else pictures
    if end not in known:
        raise UserError(f'--out is {out!r}; its end must be {" or ".join(known)}.')
    text, picture = make(name, folders)
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    if picture is not None:
        figure = figures.panels(picture) if isinstance(picture, list) else picture
        figures.save(figure, out)
    with open(f'{stem}.md', 'w') as file:
        file.write(text)
    return text
