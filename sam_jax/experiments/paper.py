"""Every figure and table of the paper that shows results, made of finished runs.

`WHOLE` has a row for each: what it shows, the commands that make the runs it needs, and the
function that draws it. Any dataset will do; the commands are those of the paper's own.
"""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sam_jax import tables
from sam_jax.errors import UserError
from sam_jax.experiments import drawings, figures, layouts, report, results
from sam_jax.experiments.drawings import Made
from sam_jax.experiments.results import TEST, Group, PaperRow


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
_CIFAR_RUNS = _sweep('cifar', _DOUBLED, *_CIFAR, folder='cifar')
_TABLE_5_RUNS = (
    _sweep('svhn', ':augment=basic,autoaugment_only_cutout', _DOUBLED, folder='t5/svhn'),
    _sweep('fashion_mnist', ':augment=basic,cutout', _DOUBLED, folder='t5/fashion'),
)
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
        (_CIFAR_RUNS,),
        drawings.figure_1_left,
    ),
    '1-right': Whole(
        'The loss around a minimum of SGD (in the paper the middle) and of SAM.',
        (
            _sweep('ablations:figure=landscape', _BOTH, folder='landscape', seeds=0),
            'sam-jax-analyze --runs=runs/landscape --what=landscape --points=51 --examples=0',
        ),
        drawings.figure_1_right,
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
        drawings.figure_3_left,
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
        drawings.figure_3_middle,
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
        drawings.figure_3_right,
    ),
    '4': Whole(
        'SAM with and without the second-order terms, over training.',
        (
            _sweep(
                'ablations:figure=order', ':method=sam,second_order_sam', folder='order', seeds=0
            ),
        ),
        drawings.figure_4,
    ),
    '5': Whole(
        "The cosine between SAM's update and that with the second-order terms, over training.",
        (
            _sweep(
                'ablations:figure=order',
                ':method=sam,second_order_sam',
                folder='order',
                seeds=0,
                more="--config.checkpoint.keep_epochs='(1,50,100,150,200)'",
            ),
            *(
                f'sam-jax-analyze --runs=runs/order --what=order --epoch={epoch}'
                for epoch in (1, 50, 100, 150, 200)
            ),
        ),
        drawings.figure_5,
    ),
    '6': Whole(
        'Test error against rho for balls of the 2-norm and the infinity norm, and for random '
        'directions.',
        (
            _sweep('ablations:figure=p_norm', 'sam.p=2,inf', _NORM_RHOS, folder='norms/p', seeds=0),
            _sweep('ablations:figure=random', _NORM_RHOS, folder='norms/random', seeds=0),
        ),
        drawings.figure_6,
    ),
    '7': Whole(
        'The rise of the training error that ascents of 1, 2, 3 and 5 steps find, over training.',
        (_STEPS,),
        drawings.figure_7,
    ),
    'table-1': Whole(
        'CIFAR: the test error of SAM and of SGD.',
        (_CIFAR_RUNS,),
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
        _TABLE_5_RUNS,
        _table(layouts.beside_baseline, 5, ('model.name', 'data.augment')),
    ),
    'table-6': Whole(
        'CIFAR: the learning rate, the weight decay and the rho that were taken.',
        (_CIFAR_RUNS,),
        _table(layouts.hyperparameters, 6),
    ),
    'table-7': Whole(
        'The same of SVHN and Fashion-MNIST.', _TABLE_5_RUNS, _table(layouts.hyperparameters, 7)
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
    except layouts.Lacking as e:
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
