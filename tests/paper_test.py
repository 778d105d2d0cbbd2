"""Whole figures and tables of the paper, of made-up finished runs."""

import functools
import itertools
import json
import math
import re

import numpy as np
import pytest
from helpers import ROOT, run_commands
from report_runs import digits_config, write_run

from configs import ablations, cifar, finetune, imagenet, label_noise, svhn
from sam_jax.errors import UserError
from sam_jax.experiments import drawings, figures, layouts, paper, predictor, report, results


def _make(name, folder):
    """Returns the Made of a figure, which is drawn; a table has no picture."""
    made = paper.make(name, [str(folder)])
    assert (made.picture is None) == name.startswith('table-')
    assert made.text.startswith(f'# {paper.title(name)}\n\n{paper.WHOLE[name].shows}\n')
    return made


def _table(text, under=''):
    """Returns the rows of the first table below a heading, each a dict."""
    lines = re.findall(r'^\| (.*) \|$', text.partition(under)[2] if under else text, re.MULTILINE)
    whole = (text.partition(under)[2] if under else text).splitlines()
    start = next(i for i, line in enumerate(whole) if line.startswith('|'))
    end = next((i for i in range(start, len(whole)) if not whole[i].startswith('|')), len(whole))
    head, _, *rows = [[c.strip() for c in line.strip('|').split('|')] for line in whole[start:end]]
    assert lines
    return [dict(zip(head, row)) for row in rows]


def _analyse(
    run, below='', step=40, error_rate=0.0, sharpness=None, spectrum=None, rho=0.05, **more
):
    """Writes what sam_jax/analysis/study.py says of one run."""
    said = {
        'name': run.name,
        'step': step,
        'dataset': 'digits',
        'split': 'train',
        'examples': 100,
        'loss': 0.5,
        'error_rate': error_rate,
    }
    said.update(more)
    folder = run / 'analysis' / below
    folder.mkdir(parents=True, exist_ok=True)
    if sharpness:
        said['sharpness'] = {
            'SAM step': {'sharpness': 0.1, 'error_rise': 0.0},
            **{f'm = {m}': {'sharpness': x, 'error_rise': 0.0} for m, x in sharpness.items()},
        }
    if spectrum:
        said['spectrum'] = dict(zip(('lambda_max', 'lambda_ratio', 'trace'), (*spectrum, 1.0)))
        np.savez(folder / 'spectrum_1.npz', grid=[0, 1], density=[1, 0], eigenvalues=[spectrum[0]])
    (folder / 'analysis.json').write_text(
        json.dumps({'settings': {'rho': rho}, 'runs': [said], 'path': False})
    )


def _log(run, **metrics):
    """Adds to the lines of a run's log: {metric: its two values}."""
    file = run / 'metrics.jsonl'
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for i, line in enumerate(lines):
        line.update({f'train/{name}': values[i] for name, values in metrics.items()})
    file.write_text(''.join(f'{json.dumps(line)}\n' for line in lines))


# The registry.


def test_every_figure_and_table_of_the_paper_has_a_row():
    """Figure 2 explains the method and shows no result."""
    figures_of_paper = {name.partition('-')[0] for name in paper.WHOLE} - {'table'}
    assert figures_of_paper == {'1', '3', '4', '5', '6', '7'}
    assert {name for name in paper.WHOLE if name.startswith('table-')} == {
        f'table-{number}' for number in range(1, 12)
    }
    assert {'3-left', '3-middle', '3-right'} <= {*paper.WHOLE}


def test_the_page_has_the_list_of_the_registry():
    assert paper.overview() in (ROOT / 'docs' / 'howto' / 'figures.md').read_text()


@pytest.mark.parametrize('name', paper.WHOLE)
def test_what_lacks_gets_one_sentence_with_the_command(name, tmp_path):
    write_run(tmp_path / 'run', digits_config('method=asam'), error=2)
    with pytest.raises(UserError) as caught:
        paper.make(name, [str(tmp_path)])
    text = str(caught.value)
    assert text.startswith(f'{paper.title(name)} cannot be made of {tmp_path}: ')
    assert all(command in text for command in paper.WHOLE[name].commands) and '\n' not in text


run_figures = functools.partial(run_commands, 'sam_jax.cli.figure')


def test_the_command(tmp_path):
    for method, error in (('sgd', 4), ('sam', 3)):
        write_run(tmp_path / 'runs' / method, digits_config(f'method={method}'), error=error)
    listed, done = run_figures([], ['1-left', tmp_path / 'runs'])
    assert listed.returncode == 0
    assert all(f'{name}: {whole.shows}\n' in listed.stdout for name, whole in paper.WHOLE.items())
    assert done.returncode == 0, done.stderr
    assert '25.0' in done.stdout and 'figure-1-left.svg' in done.stdout
    assert '<svg' in (tmp_path / 'runs' / 'figure-1-left.svg').read_text()
    assert '25.0' in (tmp_path / 'runs' / 'figure-1-left.md').read_text()
    cases = (
        (['8', tmp_path / 'runs'], "no figure '8'; there are 1-left"),
        (['1-left'], 'No folder is given'),
        (['1-left', tmp_path / 'runs', '--out=x.gif'], "--out is 'x.gif'"),
        (['table-1', tmp_path / 'runs', '--out=x.svg'], "--out is 'x.svg'"),
        (['3-right', tmp_path / 'runs'], 'sam-jax-analyze --runs'),
    )
    for done, (_, words) in zip(run_figures(*(row for row, _ in cases)), cases):
        assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1


def test_unfinished_runs_make_no_figure(tmp_path):
    write_run(tmp_path / 'run', digits_config())
    with pytest.raises(UserError, match='None of the runs .* is finished'):
        paper.make('1-left', [str(tmp_path)])


# Figure 3, right.


def _half(p):
    """Entropy of a coin, in bits."""
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q)


@pytest.mark.parametrize('order', [*itertools.permutations(range(4))])
def test_mutual_information_is_a_function_of_tau(order):
    """Without ties both signs are fair coins that agree with probability (1 + tau) / 2."""
    agree = sum((order[i] > order[j]) == (i > j) for i, j in itertools.combinations(range(4), 2))
    expected = 1 - _half(agree / 6)
    assert predictor.mutual_information(range(4), order) == pytest.approx(expected, abs=1e-12)


def test_mutual_information_of_what_is_known_already_is_nothing():
    """Two values of a setting decide everything but an order within, which is independent."""
    within = [0, 1, 2, 3], [2, 0, 3, 1]
    assert predictor.mutual_information(*within) == pytest.approx(0, abs=1e-12)
    measure, gap = ([x + 10 * k for k in (0, 1) for x in values] for values in within)
    known = [0] * 4 + [1] * 4
    assert predictor.mutual_information(measure, gap) > 0.1
    assert predictor.mutual_information(measure, gap, known) == pytest.approx(0, abs=1e-12)
    assert math.isnan(predictor.mutual_information(measure, gap, range(8)))  # nothing is open


def test_ties_say_nothing():
    assert math.isnan(predictor.mutual_information([1, 2, 3], [5, 5, 5]))
    assert math.isnan(predictor.mutual_information([1, 1, 1], [5, 6, 7]))
    assert predictor.mutual_information([1, 2, 2], [5, 6, 7]) == 1


def _network(gap, rise, **settings):
    return predictor.Network('digits', settings, gap, {16: rise}, 0.05)


def test_association():
    """The gap is linear in the logarithm of the sharpness; the other way round tau is -1."""
    rises = [1e-3, 1e-2, 1e-1, 1.0]
    known = [_network(3 * math.log10(x), x, rho=x) for x in rises]
    found = predictor.association(known, 16)
    assert found[:4] == (4, pytest.approx(1), pytest.approx(1), pytest.approx(1))
    back = predictor.association([_network(-n.gap, n.sharpness[16]) for n in known], 16)
    assert back[1:] == (pytest.approx(-1), pytest.approx(-1), pytest.approx(1), pytest.approx(1))
    negative = predictor.association([*known, _network(-10, -1e-4)], 16)
    assert math.isnan(negative.pearson) and negative.kendall == pytest.approx(1)


def test_the_condition_that_tells_most_counts():
    """The setting decides both, and within its values there is nothing."""
    known = [
        _network(gap + 10 * k, rise + 10 * k + 1, method=k)
        for k in (0, 1)
        for rise, gap in zip([0, 1, 2, 3], [2, 0, 3, 1])
    ]
    found = predictor.association(known, 16)
    assert found.information > 0.1 and found.conditional == pytest.approx(0, abs=1e-12)


@pytest.fixture
def many(tmp_path):
    """Networks whose gap grows with the sharpness of m = 1, and tells nothing of m = 16."""
    for i, (rho, seed) in enumerate(itertools.product((0.1, 0.2), (0, 1))):
        run = tmp_path / f'{i}'
        write_run(run, digits_config(f'rho={rho}'), error=3 + i, seed=seed)
        other = [0.3, 0.1, 0.4, 0.2][i]
        _analyse(run, error_rate=0.01, sharpness={1: 10.0 ** (i - 4), 16: other})
    return tmp_path


def test_figure_3_right(many, tmp_path):
    made = _make('3-right', many)
    rows = _table(made.text)
    assert [(r['m'], r['networks'], r["Kendall's tau"]) for r in rows] == [
        ('1', '4', '1.000'),
        ('16', '4', '0.000'),
    ]
    assert [r['mutual information'] for r in rows] == ['1.000', '0.000']
    assert rows[0]['Pearson, of the logarithm'] == '1.000'
    dots, information = made.picture
    assert [c.label for c in dots.curves] == ['m = 1: tau 1.000', 'm = 16: tau 0.000']
    assert dots.curves[0].mean == pytest.approx([2, 3, 4, 5]) and dots.dots
    assert dots.curves[0].x == [1e-4, 1e-3, 1e-2, 1e-1]
    assert information.curves[0].x == [1, 16] and information.curves[0].mean == [1, 0]
    paper.write('3-right', [str(many)], str(tmp_path / 'out' / 'f.png'))
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'f.png', 'f.md'}
    (ax, _) = figures.panels(made.picture).axes
    assert ax.get_xscale() == 'log' and all(x.get_linestyle() == 'None' for x in ax.get_lines())


def test_the_training_error_is_that_of_the_whole_set_and_of_the_average_where_it_is_known(many):
    result = json.loads((many / '0' / 'result.json').read_text())
    result['train_set/error_rate'] = 0.02
    (many / '0' / 'result.json').write_text(json.dumps(result))
    result.update({'test/ema_error_rate': 0.5, 'train_set/ema_error_rate': 0.1})
    (many / '1' / 'result.json').write_text(json.dumps(result))
    groups, _ = results.group(results.find([str(many)]))
    assert [n.gap for n in predictor.networks(groups)] == pytest.approx([1, 40, 4, 5])


def test_networks_that_cannot_be_compared(many):
    write_run(many / 'early', digits_config('rho=0.7'), error=2)
    _analyse(many / 'early', 'epoch=1', step=10, sharpness={1: 1.0})
    groups, _ = results.group(results.find([str(many)]))
    assert len(predictor.networks(groups)) == 4  # at its end that run was not measured
    write_run(many / 'wide', digits_config('rho=0.8'), error=2)
    _analyse(many / 'wide', sharpness={1: 1.0}, rho=0.5)
    with pytest.raises(UserError, match='measured with rho 0.05, 0.5'):
        paper.make('3-right', [str(many)])


def test_networks_of_two_data_sets_of_one_s_own_are_two_tasks(tmp_path):
    for i, name in enumerate(('birds', 'planes')):
        config = digits_config(data__name='folder', data__dir=f'/some/{name}')
        write_run(tmp_path / name, config, error=2 + i)
        _analyse(tmp_path / name, sharpness={1: 1.0})
    write_run(tmp_path / 'digits', digits_config(), error=2)
    _analyse(tmp_path / 'digits', sharpness={1: 1.0})
    groups, _ = results.group(results.find([str(tmp_path)]))
    assert {n.task for n in predictor.networks(groups)} == {'birds', 'planes', 'digits'}


# The other figures.


def test_figure_1_right(tmp_path):
    for method, height in (('sgd', 2.0), ('sam', 1.0)):
        run = tmp_path / method
        write_run(run, digits_config(f'method={method}'), error=2)
        _analyse(run)
        ticks = np.linspace(-1, 1, 3)
        places = np.array([(x, y) for x in ticks for y in ticks])
        loss = 0.1 + height * (places**2).sum(1)
        np.savez(run / 'analysis' / 'landscape_1.npz', loss=loss, places=places, done=9)
    rows = _table(_make('1-right', tmp_path).text)
    assert [tuple(r.values()) for r in rows] == [('sgd', '0.1', '4.1'), ('sam', '0.1', '2.1')]
    np.savez(tmp_path / 'sam' / 'analysis' / 'landscape_1.npz', loss=loss, places=places, done=5)
    assert [r['run'] for r in _table(_make('1-right', tmp_path).text)] == ['sgd']


def test_figure_3_left(tmp_path):
    for method, seed in itertools.product(('sgd', 'sam'), (0, 1)):
        run = tmp_path / f'{method}{seed}'
        write_run(run, digits_config(f'method={method}'), error=2, seed=seed, epochs=300)
        _analyse(run, spectrum=(10.0 + seed, 2.0))
        _analyse(run, 'epoch=150', step=20, spectrum=(20.0, 3.0))
    made = _make('3-left', tmp_path)
    rows = _table(made.text)
    assert [(r['runs'], r['epoch'], r['number']) for r in rows] == [
        ('sgd', '150', '2'),
        ('sgd', '300', '2'),
        ('sam', '150', '2'),
        ('sam', '300', '2'),
    ]
    assert rows[1]['lambda_max'] == '10.50 ± 6.35' and rows[0]['lambda_max'] == '20.00 ± 0.00'
    assert [*_table(made.text, '## The paper')[5].values()] == ['sam', '300', '1.0', '2.6']
    assert len(made.picture.axes) == 4


def test_figure_3_middle(tmp_path):
    for m, rho in itertools.product((1, 16), (0.05, 0.1)):
        config = ablations.get_config(f'figure=m,m={m},rho={rho}')
        write_run(tmp_path / f'{m}-{rho}', config, error=m + rho)
    made = _make('3-middle', tmp_path)
    assert [tuple(r.values()) for r in _table(made.text)] == [
        ('0.05', '1.05', '16.05'),
        ('0.1', '1.10', '16.10'),
    ]
    (panel,) = made.picture
    assert [(c.label, c.x) for c in panel.curves] == [('m 1', [0.05, 0.1]), ('m 16', [0.05, 0.1])]


def test_figure_4(tmp_path):
    for method, error in (('sam', 2), ('second_order_sam', 3)):
        write_run(
            tmp_path / method, ablations.get_config(f'figure=order,method={method}'), error=error
        )
        _log(tmp_path / method, perturbed_error_rate=[1.0, error / 10])
    made = _make('4', tmp_path)
    ends = [[*r.values()][-4:] for r in _table(made.text)]
    assert ends == [['4', '20', '4', '2'], ['4', '30', '4', '3']]
    assert [p.ylabel for p in made.picture] == ['training error at w + eps (%)', 'test error (%)']
    assert 'older versions' not in made.text


def test_figure_4_of_runs_without_the_error_at_the_perturbed_weights(tmp_path):
    """A gap and a sentence."""
    for method in ('sam', 'second_order_sam'):
        write_run(tmp_path / method, ablations.get_config(f'figure=order,method={method}'), error=2)
    _log(tmp_path / 'sam', perturbed_error_rate=[1.0, 0.5])
    made = _make('4', tmp_path)
    ends = [[*r.values()][-4:] for r in _table(made.text)]
    assert ends == [['4', '50', '4', '2'], ['', '', '4', '2']]
    assert [len(p.curves) for p in made.picture] == [1, 2]
    assert '1 of the runs do not have train/perturbed_error_rate in their log' in made.text


def test_figure_5(tmp_path):
    for method, end in (('sam', 0.5), ('second_order_sam', 0.25)):
        run = tmp_path / method
        write_run(run, ablations.get_config(f'figure=order,method={method}'), error=2)
        for below, step, cosine in (
            ('epoch=1', 10, 1.0),
            ('epoch=2', 20, 0.75),
            ('epoch=4', 40, end),
        ):
            _analyse(run, below, step=step, order_cosine=cosine)
        _analyse(run, step=40, sharpness={1: 1.0})  # hides nothing
    made = _make('5', tmp_path)
    assert [[*r.values()][-2:] for r in _table(made.text)] == [['4', '0.5'], ['4', '0.25']]
    (panel,) = made.picture
    assert [(c.x, list(c.mean)) for c in panel.curves] == [
        ([1.0, 2.0, 4.0], [1.0, 0.75, 0.5]),
        ([1.0, 2.0, 4.0], [1.0, 0.75, 0.25]),
    ]


def test_figure_5_of_the_log(tmp_path):
    """Of the method whose step has both orders; SAM's own cosine is 1 and says nothing."""
    for method in ('sam', 'second_order_sam'):
        write_run(tmp_path / method, ablations.get_config(f'figure=order,method={method}'), error=2)
        _log(tmp_path / method, descent_cosine=[1.0, 0.5])
    made = _make('5', tmp_path)
    assert [[*r.values()][-2:] for r in _table(made.text)] == [['4', '0.5']]
    (panel,) = made.picture
    assert panel.ylabel == 'cosine of both orders, as logged' and len(panel.curves) == 1
    _analyse(tmp_path / 'sam', step=40, order_cosine=0.25)
    assert [len(p.curves) for p in _make('5', tmp_path).picture] == [1, 1]


def test_figure_6(tmp_path):
    for p, rho in itertools.product((2.0, math.inf), (1e-6, 0.1)):
        config = ablations.get_config(f'figure=p_norm,rho={rho}')
        with config.unlocked():
            config.sam.p = p
        write_run(tmp_path / f'{p}-{rho}', config, error=p if p == 2 else 3)
    for rho in (1e-6, 0.1):
        config = ablations.get_config(f'figure=random,rho={rho}')
        write_run(tmp_path / f'random-{rho}', config, error=4)
    made = _make('6', tmp_path)
    assert [[*r.values()] for r in _table(made.text)] == [
        ['1e-06', '4.00', '2.00', '3.00'],
        ['0.1', '4.00', '2.00', '3.00'],
    ]
    (panel,) = made.picture
    assert len(panel.curves) == 3 and all(c.x == [1e-6, 0.1] for c in panel.curves)


@pytest.fixture
def steps(tmp_path):
    for n, seed in itertools.product((1, 2), (0, 1)):
        run = tmp_path / f'{n}-{seed}'
        write_run(run, ablations.get_config(f'figure=steps,steps={n}'), error=2 + seed, seed=seed)
        _log(run, error_rate=[0.5, 0.25], perturbed_error_rate=[0.75, 0.25 + n / 4])
    return tmp_path


def test_figure_7(steps):
    made = _make('7', steps)
    (panel,) = made.picture
    assert [(c.x, list(c.mean)) for c in panel.curves] == [
        ([2.0, 4.0], [25.0, 25.0]),
        ([2.0, 4.0], [25.0, 50.0]),
    ]


def test_steps_of_runs_without_the_error_at_the_perturbed_weights(tmp_path):
    """Table 11 still has their test errors."""
    run = tmp_path / 'run'
    write_run(run, ablations.get_config('figure=steps,steps=3'), error=2)
    _log(run, loss=[1.0, 0.5], perturbed_loss=[1.5, 1.0])
    with pytest.raises(UserError, match='has train/perturbed_error_rate in its log, which older'):
        paper.make('7', [str(tmp_path)])
    text = _make('table-11', tmp_path).text
    assert [[*r.values()] for r in _table(text, '## These')] == [['3', '2']]
    assert '1 of the runs do not have train/perturbed_error_rate' in text


def test_table_11(steps):
    text = _make('table-11', steps).text
    assert [[*r.values()] for r in _table(text, '## These')] == [
        ['1', '2.5 ± 0.71', '25 ± 0'],
        ['2', '2.5 ± 0.71', '50 ± 0'],
    ]
    assert [*_table(text, '## The paper')[3].values()] == [
        '5', '2.77 ± 0.03', '16.60 ± 0.06', '2.26 ± 0.05', '2.82 ± 0.04'
    ]  # fmt: skip


def test_table_11_has_a_row_for_each_rho_of_a_dataset(tmp_path):
    """But not where each dataset has one of its own, as in the paper."""

    def rows(of):
        for dataset, rho, error in of:
            config = ablations.get_config(f'figure=steps,steps=3,dataset={dataset},rho={rho}')
            write_run(tmp_path / f'{dataset}-{rho}', config, error=error)
        return [[*r.values()] for r in _table(_make('table-11', tmp_path).text, '## These')]

    assert rows([('cifar10', 0.05, 2), ('cifar100', 0.1, 3)]) == [['3', '2', '3']]
    assert rows([('cifar10', 0.1, 9)]) == [['3', '0.05', '2', ''], ['3', '0.1', '9', '3']]


# The other tables.


def _pairs(folder, configs):
    """Writes a run of SAM (error 2, 3, ...) and of SGD (error 4, 5, ...) for each config."""
    for i, (get_config, argument) in enumerate(configs):
        for method, error in (('sam', 2), ('sgd', 4)):
            config = get_config(f'{argument},method={method}')
            write_run(folder / f'{i}-{method}', config, error=error + i)


def test_table_1_and_6_of_the_paper_s_own_settings(tmp_path):
    _pairs(
        tmp_path,
        [(cifar.get_config, f'dataset={d},augment=cutout') for d in ('cifar10', 'cifar100')],
    )
    text = _make('table-1', tmp_path).text
    (row,) = _table(text, '## These')
    assert row == {
        'model': 'wrn28_10',
        'total_epochs': '200',
        'augment': 'cutout',
        'cifar10: sam error (%)': '2.00 (paper: 2.3 ± 0.1)',
        'cifar10: sgd error (%)': '4.00 (paper: 2.6 ± 0.1)',
        'cifar100: sam error (%)': '3.00 (paper: 14.9 ± 0.2)',
        'cifar100: sgd error (%)': '5.00 (paper: 16.9 ± 0.1)',
    }
    theirs = _table(text, '## The paper')
    assert len(theirs) == 15 and [*theirs[0].values()][3:] == [
        '2.7 ± 0.1', '3.5 ± 0.1', '16.5 ± 0.2', '18.8 ± 0.2'
    ]  # fmt: skip
    assert [*_table(_make('table-6', tmp_path).text, '## These')[0].values()] == [
        'wrn28_10', '200', '0.1', '0.0005', '0.05', '0.1', '0.0005', '0.1'
    ]  # fmt: skip
    rows = _table(_make('table-6', tmp_path).text, '## The paper')
    assert len(rows) == 5 and [*rows[3].values()] == [
        'pyramidnet272', rows[3]['total_epochs'], '0.05', '0.0005', '0.05', '0.05', '0.0005', '0.2'
    ]  # fmt: skip


def test_a_table_of_another_dataset_and_setting(tmp_path):
    """Seeds are one mean; what has no place in the layout is a column of its own."""
    for method, seed, decay in itertools.product(('sam', 'sgd'), (0, 1), (0.0, 0.1)):
        error = {'sam': 1, 'sgd': 3}[method] + seed + 10 * decay
        config = digits_config(f'method={method}', optimizer__weight_decay=decay)
        write_run(tmp_path / f'{method}{seed}{decay}', config, error=error, seed=seed)
    for name in ('table-1', 'table-5'):
        rows = _table(_make(name, tmp_path).text, '## These')
        assert [r['weight_decay'] for r in rows] == ['0', '0.1']
        assert [r['digits: sam error (%)'] for r in rows] == ['1.50 ± 6.35', '2.50 ± 6.35']
        assert [r['digits: sgd error (%)'] for r in rows] == ['3.50 ± 6.35', '4.50 ± 6.35']


def test_table_2(tmp_path):
    _pairs(tmp_path, [(imagenet.get_config, 'model=resnet50')])
    for method, top5 in (('sam', 0.06), ('sgd', 0.07)):
        file = tmp_path / f'0-{method}' / 'result.json'
        file.write_text(json.dumps({**json.loads(file.read_text()), layouts.TOP5: top5}))
    text = _make('table-2', tmp_path).text
    assert [*_table(text, '## These')[0].values()][2:] == [
        '2.00 (paper: 22.5 ± 0.1)', '4.00 (paper: 22.9 ± 0.1)'
    ]  # fmt: skip
    below = text.partition('## The paper')[2]
    assert [*_table(below, '## These')[0].values()][2:] == [
        '6.00 (paper: 6.28 ± 0.08)', '7.00 (paper: 6.62 ± 0.11)'
    ]  # fmt: skip
    assert len(_table(text, '## The paper')) == 9


def test_table_3_5_7_and_9(tmp_path):
    for name, get_config, argument in (
        ('3', finetune.get_config, 'dataset=cars'),
        ('5', svhn.get_config, 'augment=basic'),
        ('9', cifar.get_config, 'rho=0.05'),
    ):
        _pairs(tmp_path / name, [(get_config, argument)])
    for run in ('0-sam', '0-sgd'):
        file = tmp_path / '3' / run / 'config.json'
        said = json.loads(file.read_text())
        said['config']['model.init_from'] = 'CKPT'
        file.write_text(json.dumps(said))
    for number, sam, sgd, rows in (
        ('3', '5.18 ± 0.02', '5.94 ± 0.06', 9),
        ('5', '1.42 ± 0.02', '1.58 ± 0.03', 6),
        ('9', '2.7', '3.5 ± 0.1', 15),
    ):
        text = _make(f'table-{number}', tmp_path / number).text
        (row,) = _table(text, '## These')
        assert [*row.values()][-2] == f'2.00 (paper: {sam})'
        assert [*row.values()][-1] == f'4.00 (paper: {sgd})'
        assert len(_table(text, '## The paper')) == rows
    text = _make('table-7', tmp_path / '5').text
    assert [*_table(text, '## These')[0].values()][2:] == ['0.01', '0.0005', '0.01']
    assert [*_table(text, '## The paper')[1].values()][2:] == [
        '0.01', '0.0005', '0.01', '0.1', '0.0005', '0.02'
    ]  # fmt: skip


def test_table_10(tmp_path):
    """The best rho is that of the validation split."""
    for rho, validation in ((0.05, 3), (0.1, 2)):
        for held_out in (True, False):
            config = finetune.get_config(f'dataset=cars,rho={rho}')
            with config.unlocked():
                config.model.init_from, config.data.validation = 'CKPT', held_out
            more = {'validation': validation} if held_out else {}
            write_run(tmp_path / f'{rho}-{held_out}', config, error=100 * rho, **more)
    config = finetune.get_config('dataset=cars,method=sgd')
    with config.unlocked():
        config.model.init_from = 'CKPT'
    write_run(tmp_path / 'sgd', config, error=20)
    text = _make('table-10', tmp_path).text
    (row,) = _table(text, '## These')
    assert [row[f'sam, {which} error (%)'] for which in ('best rho', 'rho 0.05')] == [
        '10.00', '5.00 (paper: 5.57)'
    ]  # fmt: skip
    assert row['sgd error (%)'] == '20.00'
    (cars,) = (r for r in _table(text, '## The paper') if r['data'] == row['data'])
    assert len(_table(text, '## The paper')) == 8
    assert {*cars.values()} == {row['data'], '5.18 ± 0.02', '5.94 ± 0.06', '5.57'}


@pytest.fixture
def noisy(tmp_path):
    """SGD, mixup and SAM at two levels of noise, and the bootstrap of SAM's predictions."""
    for noise, more in itertools.product((0.2, 0.4), ('method=sgd', 'method=sgd,mixup=8', '')):
        config = label_noise.get_config(f'noise={noise},{more}')
        write_run(tmp_path / f'{noise}-{more}', config, error=100 * noise + len(more))
        if not more:
            labels = tmp_path / f'{noise}-' / 'predictions.npz'
            config = label_noise.get_config(f'labels_from={labels}')
            write_run(tmp_path / f'{noise}-bootstrap', config, error=100 * noise - 5)
    return tmp_path


def test_table_4(noisy):
    text = _make('table-4', noisy).text
    rows = {r.pop('row'): [*r.values()] for r in _table(text, '## These')}
    assert rows == {
        'sgd': ['70.00', '50.00'],
        'mixup 8': ['62.00', '42.00'],
        'sam': ['80.00', '60.00'],
        'bootstrap + sam': ['85.00', '65.00'],
    }
    rows = {r.pop('row'): [*r.values()] for r in _table(text, '## The paper')}
    assert rows == {
        'sgd': ['84.8', '68.8', '48.2', '26.2'],
        'mixup': ['93.0', '90.0', '83.8', '70.2'],
        'sam': ['95.1', '93.4', '90.5', '77.9'],
        'bootstrap + mixup': ['93.3', '92.0', '87.6', '72.0'],
        'bootstrap + sam': ['95.4', '94.2', '91.8', '79.9'],
    }


def test_table_8(noisy):
    for noise, rho in itertools.product((0.2, 0.4), (0.1, 0.05)):
        labels = noisy / f'{noise}-' / 'predictions.npz'
        config = label_noise.get_config(f'labels_from={labels},validation=true,rho={rho}')
        write_run(noisy / f't8-{noise}-{rho}', config, error=1, validation=100 * rho + noise)
    text = _make('table-8', noisy).text
    assert [[*r.values()] for r in _table(text, '## These')] == [
        ['0.05', '5.20', '5.40'],
        ['0.1', '10.20', '10.40'],
    ]
    theirs = _table(text, '## The paper')
    assert [*theirs[4].values()] == ['0.1', '4.6', '6.0', '8.7', '56.1'] and len(theirs) == 7


def test_numbers_that_are_not_in_the_table_of_the_paper_s_rows():
    """Those of Figure 3, left, and of Table 11, as the configs' notebook and the docs have them."""
    assert drawings.SPECTRA['sgd', 300] == (24.2, 11.4) and drawings.SPECTRA['sam', 300][1] == 2.6
    assert all({*of} == {1, 2, 3, 5} for of in layouts.RISES.values())
    assert report.PAPER.endswith('paper.csv')
