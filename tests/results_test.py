"""What is said of finished runs together: intervals, groups, the best rho, the paper's numbers."""

import csv
import functools
import json
import math
import re

import pytest
from helpers import run_commands
from report_runs import TRIED, digits_config, write_run, write_sweep, write_tried

from configs import ablations, cifar, imagenet, label_noise, relatives, svhn
from sam_jax import settings
from sam_jax.errors import UserError
from sam_jax.experiments import drawings, report, results

PAPER = results.read_paper(report.PAPER)


def _groups(folder):
    return results.group(results.find([str(folder)]))


def test_mean_and_interval():
    """Student's t with 2 degrees of freedom: 4.302653 at 97.5 %."""
    mean, half = results.mean_and_interval([1.0, 2.0, 4.0])
    assert math.isclose(mean, 7 / 3)
    assert math.isclose(half, 4.302653 * math.sqrt(7 / 3 / 3), rel_tol=1e-6)
    assert results.mean_and_interval([5.0])[0] == 5 and math.isnan(
        results.mean_and_interval([5.0])[1]
    )


@pytest.mark.parametrize(
    'pair,digits,text',
    [
        ((1 / 3, 0.128), 2, '0.33 ± 0.13'),
        ((12.0, 1.26), 1, '12.0 ± 1.3'),
        ((5.0, math.nan), 2, '5.00'),
        (None, 2, ''),
    ],
)
def test_interval(pair, digits, text):
    assert results.interval(pair, digits) == text


def test_interval_of_a_difference():
    assert results.interval((0.284, 0.15), 1, sign=True) == '+0.3 ± 0.1'
    assert results.interval((-0.001, math.nan), sign=True) == '+0.00'


def test_groups_are_runs_that_differ_in_seed_alone(tmp_path):
    for seed in range(3):
        config = digits_config(data__dir=f'/{seed}', eval__batch_size=64 + seed)
        write_run(tmp_path / f'a{seed}', config, error=1 + seed, seed=seed)
    write_run(tmp_path / 'b', digits_config('rho=0.1'), error=7)
    write_run(tmp_path / 'c', digits_config(optimizer__weight_decay=0.0), error=8)
    write_run(tmp_path / 'd', digits_config('method=sgd,rho=0.1'), error=9)
    write_run(tmp_path / 'e', digits_config('method=sgd,rho=0.2'), error=11, seed=1)
    groups, notes = _groups(tmp_path)
    assert not notes
    errors = sorted([100 * v for v in g.values('test/error_rate')] for g in groups)
    assert errors == [pytest.approx(x) for x in ([1, 2, 3], [7], [8], [9, 11])]
    (first,) = (g for g in groups if len(g.finished) == 3)
    mean, half = first.percent('test/error_rate')
    assert math.isclose(mean, 2) and math.isclose(half, 4.302653 / math.sqrt(3), rel_tol=1e-6)


def test_places_are_told_relative_to_the_folder_of_all_runs(tmp_path):
    for seed in (0, 1):
        write_run(
            tmp_path / 'new' / f'b{seed}',
            digits_config(model__init_from=str(tmp_path / 'old' / f'{seed}')),
            error=1,
            seed=seed,
        )
    write_run(tmp_path / 'other' / 'c', digits_config())
    records = results.find([str(tmp_path / 'new'), str(tmp_path / 'other')])
    assert [r.name for r in records] == ['new/b0', 'new/b1', 'other/c']
    assert results.group(records)[1] == ['One mean is over runs with a file each: old/0, old/1.']
    assert [r.name for r in results.find([str(tmp_path / 'new')])] == ['b0', 'b1']
    assert [r.name for r in results.find([str(tmp_path / 'other' / 'c')])] == ['c']


def test_the_same_run_twice_counts_once(tmp_path):
    write_run(tmp_path / 'a', digits_config())
    write_run(tmp_path / 'b', digits_config(), error=2)
    write_run(tmp_path / 'c', digits_config(), error=3)
    groups, notes = _groups(tmp_path)
    assert [r.workdir[-1] for r in groups[0].finished] == ['b'] and not groups[0].unfinished
    assert len(notes) == 2 and 'a is left out' in notes[0] and 'c is left out' in notes[1]
    with pytest.raises(UserError, match='holds no run'):
        results.find([str(tmp_path), str(tmp_path / 'b')])


def test_runs_on_other_parts_of_the_data_are_in_the_mean(tmp_path):
    """A seed of what there is none of tells no runs apart."""
    for fraction, error in ((0.5, 1), (1.0, 5)):
        for seed in (0, 1):
            config = digits_config(data__fraction=fraction, data__fraction_seed=seed)
            write_run(tmp_path / f'{fraction}-{seed}', config, error=error + seed)
    groups, notes = _groups(tmp_path)
    values = {g.settings['data.fraction']: g.values('test/error_rate') for g in groups}
    assert values == {0.5: [0.01, 0.02], 1.0: [0.05]}
    assert notes == ['1.0-1 is left out: 1.0-0 has the same settings and seeds.']


@pytest.mark.parametrize(
    'content,other',
    [
        ({'vision_config': {'hidden_size': 8}}, 'something else'),
        ({'config': {'optimizer': 'adam'}}, 'something else'),
        ([1, 2], 'something else'),
        ({'config': settings.jsonable(digits_config()), 'weights': {}}, 'exported weights'),
    ],
    ids=['clip', 'config', 'list', 'exported'],
)
def test_what_is_no_run_is_left_out_and_named(content, other, tmp_path, caplog):
    write_run(tmp_path / 'run', digits_config(), error=1)
    place = tmp_path / 'other'
    place.mkdir()
    (place / 'config.json').write_text(json.dumps(content))
    (place / 'result.json').write_text('of whatever it is')
    assert [r.name for r in results.find([str(tmp_path)])] == ['run']
    assert caplog.messages == [f'{place} is left out: its config.json is that of {other}.']
    with pytest.raises(UserError, match='holds no run'):
        results.find([str(place)])


def test_folders_of_images_are_data_sets(tmp_path):
    for name, error in (('birds', 1), ('planes', 2)):
        write_run(
            tmp_path / name,
            digits_config(data__name='folder', data__dir=f'/some/{name}/'),
            error=error,
        )
    assert [g.settings['data.dir'] for g in _groups(tmp_path)[0]] == ['birds', 'planes']


@pytest.mark.parametrize('key', ['data__labels_from', 'model__init_from'])
def test_runs_with_files(key, tmp_path):
    """A file a seed is one experiment; several files a seed are several."""
    for seed in (0, 1):
        write_run(
            tmp_path / 'one' / str(seed), digits_config(**{key: f'{seed}.npz'}), error=1, seed=seed
        )
    (group,), notes = _groups(tmp_path / 'one')
    assert len(group.finished) == 2 and 'a file each: 0.npz, 1.npz' in notes[0]
    write_run(tmp_path / 'two', digits_config(**{key: 'other.npz'}), error=9, seed=1)
    groups, notes = _groups(tmp_path)
    errors = sorted(g.percent('test/error_rate')[0] for g in groups)
    assert errors == pytest.approx([1, 1, 9]) and not notes


def test_best_rho_is_of_the_validation_split_and_has_no_diverged_run(tmp_path):
    write_tried(tmp_path)
    for rho in TRIED:
        write_run(tmp_path / f'final-{rho}', digits_config(f'rho={rho}'), error=10 * rho)
    write_run(tmp_path / 'other', digits_config('rho=0.2,noise=0.4'), error=1)
    best = results.best(_groups(tmp_path)[0])
    assert [
        (g.settings['sam.rho'], g.settings['data.validation'], g.settings['data.label_noise'])
        for g in best
    ] == [(0.2, True, 0), (0.2, False, 0)]


def test_no_best_rho_by_test_error(tmp_path):
    for rho in TRIED:
        write_run(tmp_path / f'{rho}', digits_config(f'rho={rho}'), error=rho)
    write_run(tmp_path / 'sgd', digits_config('method=sgd'), error=4)
    groups = _groups(tmp_path)[0]
    assert not results.best(groups) and not results.switches(groups)


def _gsam(rho, rho_min, validation=True):
    config = digits_config(f'rho={rho}', data__validation=validation, sam__rho_min=rho_min)
    config.sam.schedule = 'learning_rate'
    return config


# (rho, rho_min): validation error; the best stands neither first nor at the smallest test error.
RADII = {(0.1, 0.0): 5, (0.2, 0.0): 3, (0.2, 0.05): 2, (0.2, 0.1): 4}


@pytest.fixture
def radii(tmp_path):
    for i, ((rho, rho_min), error) in enumerate(RADII.items()):
        write_run(tmp_path / f'tried{i}', _gsam(rho, rho_min), error=10 - i, validation=error)
        write_run(tmp_path / f'final{i}', _gsam(rho, rho_min, False), error=10 - i)
    write_run(tmp_path / 'sgd', digits_config('method=sgd'), error=16)
    return tmp_path


def test_the_best_rho_is_with_its_rho_min(radii):
    groups, _ = _groups(radii)
    best = results.best(groups)
    assert [g.radii for g in best] == [(0.2, 0.05), (0.2, 0.05)]
    (switch,) = results.switches(groups)
    assert switch.method.radii == (0.2, 0.05) and switch.reduction == pytest.approx(50)


def test_curves_against_rho_are_of_one_rho_min_unless_it_follows_rho(radii, tmp_path):
    (panel,) = report.rho_panels(
        [g for g in _groups(radii)[0] if not g.settings['data.validation']]
    )
    assert [(c.label, c.x, list(c.mean)) for c in panel.curves] == [('sam', [0.1, 0.2], [10, 9])]
    for rho in TRIED:
        write_run(tmp_path / 'follows' / f'{rho}', _gsam(rho, rho / 2, False), error=10 * rho)
    (panel,) = report.rho_panels(_groups(tmp_path / 'follows')[0])
    assert [c.x for c in panel.curves] == [[*TRIED]]


@pytest.mark.parametrize('failed,logarithmic', [(90, True), (20, False)])
def test_curves_for_each_m_are_in_its_order(failed, logarithmic, tmp_path):
    """By size, where text has 128 before 16; runs that failed do not press the others flat."""
    for m in (128, 16, 32, 4):
        for rho, error in ((0.1, 10.0), (0.2, failed)):
            config = digits_config(f'rho={rho}')
            with config.unlocked():
                config.batch_size, config.replica_batch_size = 128, m
            write_run(tmp_path / f'{m}-{rho}', config, error=error)
    groups, _ = _groups(tmp_path)
    (panel,) = report.rho_panels(groups)
    assert panel.log_y == logarithmic
    for text in (
        ' '.join(c.label for c in panel.curves),
        drawings.figure_3_middle(groups, []).text,
    ):
        places = [text.index(f'{m}') for m in (4, 16, 32, 128)]
        assert places == sorted(places)


def _reductions(folder):
    return [
        (s.baseline.settings['sam.method'], s.method.settings['sam.rho'], s.reduction)
        for s in results.switches(_groups(folder)[0])
    ]


def test_switches(tmp_path):
    """The baseline is the better one of one and two lengths; rho that of the validation split."""
    write_tried(tmp_path / 'tried')
    for rho in TRIED:
        write_run(tmp_path / f'final-{rho}', digits_config(f'rho={rho}'), error=10 * rho)
    write_run(tmp_path / 'sgd', digits_config('method=sgd'), error=5)
    for times, error in ((2, 4), (3, 1)):
        config = digits_config('method=sgd')
        config.total_epochs *= times
        write_run(tmp_path / f'long{times}', config, error=error)
    write_run(tmp_path / 'elsewhere', digits_config('method=sgd,noise=0.4'), error=9)
    assert _reductions(tmp_path) == [('sgd', 0.2, pytest.approx(100 * (4 - 2) / 4))]


def test_rho_0_is_a_baseline_and_one_rho_needs_no_choice(tmp_path):
    write_run(tmp_path / 'a', digits_config('rho=0'), error=5)
    write_run(tmp_path / 'b', digits_config('rho=0.5'), error=6)
    assert _reductions(tmp_path) == [('sam', 0.5, pytest.approx(-20))]


@pytest.mark.parametrize(
    'config,metric,expected',
    [
        (cifar.get_config('dataset=cifar100,augment=cutout'), 'test', ['14.9 ± 0.2']),
        (cifar.get_config('rho=0.05'), 'test', ['2.7 ± 0.1', '2.7']),  # Tables 1 and 9
        (cifar.get_config('rho=0.06'), 'test', []),
        (cifar.get_config('method=sgd,rho=0.7,doubled=true'), 'test', ['3.5 ± 0.1']),
        (cifar.get_config('method=sgd,smoke'), 'test', []),
        (svhn.get_config('augment=autoaugment_only_cutout'), 'test', ['0.99 ± 0.01']),
        (label_noise.get_config('noise=0.8'), 'test', ['22.1']),
        (ablations.get_config('figure=steps,steps=3'), 'test', ['2.73 ± 0.04']),
        (label_noise.get_config('noise=0.8,method=sgd,mixup=16'), 'test', ['29.8']),
        (
            label_noise.get_config('labels_from=x,noise=0.8,rho=0.2,validation=true'),
            'validation',
            # The settings do not tell the noise of the first run.
            [f'{x} validation' for x in (5.3, 7.4, 23.3, 77.1)],
        ),
        (imagenet.get_config(), 'test', ['22.5 ± 0.1', '6.28 ± 0.08 top-5']),
    ],
)
def test_runs_know_their_row_of_the_paper(config, metric, expected, tmp_path):
    write_run(tmp_path / 'run', config, error=3)
    (group,) = _groups(tmp_path)[0]
    rows = results.of_paper(group, PAPER)
    assert [str(row).partition(' (')[0] for row in rows] == expected
    assert {row.metric for row in rows} <= {f'{metric}/error_rate', 'test/top5_error_rate'}


def test_every_row_of_the_relatives_finds_its_number():
    """Each is beside a run of its config alone, as its notebook has it."""
    commands = [r.command for r in PAPER if 'relatives.py' in r.command]
    assert len(set(commands)) == len(commands) > 40
    for row in PAPER:
        if row.command in commands:
            found = results.of_paper(results.Group(row.settings, [], []), PAPER)
            assert [r.command for r in found] == [row.command]
            assert row.digits in relatives.__doc__ and row.table not in ('Table 1', 'Table 2')
            assert row.percent == float(row.digits)
    config = relatives.get_config('paper=gsam,model=vit-b16,seed=4')
    group = results.Group(results.settings_of(settings.jsonable(config)), [], [])
    assert [str(r) for r in results.of_paper(group, PAPER)] == ['19 (GSAM Table 1)']
    config.sam.alpha = 0.5
    group = results.Group(results.settings_of(settings.jsonable(config)), [], [])
    assert not results.of_paper(group, PAPER)


def test_numbers_of_the_paper():
    """Against what the configs' notebooks say, and the dots of the paper's Figure 1."""
    numbers = {}
    model = ''
    for line in cifar.__doc__.splitlines():
        if match := re.match(
            r' {4}([a-z._]\S*(?:, \d+)?)? +(basic|cutout|autoaugment) +(\d.*)', line
        ):
            model = match[1] or model
            numbers[model, match[2]] = re.findall(r'\d+\.\d', match[3])
    assert len(numbers) == 15
    models = {
        'wrn28_10, 200': 'wrn28_10',
        'wrn28_10, 1800': 'wrn28_10,epochs=1800',
        '..._shakedrop': 'pyramidnet272_shakedrop',
    }
    table = {row.command: row for row in PAPER if row.table == 'Table 1'}
    assert len(table) == 15 * 2 * 3
    for (model, augment), values in numbers.items():
        for dataset, (sam, sam_half, sgd, sgd_half) in zip(
            ('cifar10', 'cifar100'), (values[:4], values[4:])
        ):
            command = (
                f'configs/cifar.py:model={models.get(model, model)},dataset={dataset},'
                f'augment={augment}'
            )
            for suffix, mean, half in (
                ('', sam, sam_half),
                (',method=sgd', sgd, sgd_half),
                (',method=sgd,doubled=true', sgd, sgd_half),
            ):
                row = table[command + suffix]
                assert (row.percent, row.interval.strip('<')) == (float(mean), half), command

    noisy = {row.command.partition(':')[2]: row.percent for row in PAPER if row.table == 'Table 4'}
    reductions = [
        100 * (1 - noisy[f'noise={n}'] / noisy[f'noise={n},method=sgd,mixup=8'])
        for n in (0.2, 0.4, 0.6, 0.8)
    ]
    assert [round(r, 1) for r in reductions] == [30.0, 34.0, 41.4, 25.8]


run_reports = functools.partial(run_commands, 'sam_jax.cli.report')


def test_the_report(tmp_path):
    write_sweep(tmp_path / 'runs')
    write_run(tmp_path / 'more', cifar.get_config('rho=0.05'), error=3, device_kind='gpu')
    (done,) = run_reports([tmp_path / 'runs', tmp_path / 'more'])
    assert done.returncode == 0, done.stderr
    out = tmp_path / 'runs' / 'report'
    text = (out / 'report.md').read_text()
    assert '# 8 finished runs, 6 settings' in text and text.startswith(done.stdout[:100])
    assert '2 of 2' not in text and '| 1 of 2 |' in text
    (line,) = (x for x in text.splitlines() if '| best |' in x)
    assert '| 0.2 | 2 | 2.00 ± 0.00 | 2.50 ± 6.35 |' in line and '| 80 | 0.01 |' in line
    assert '2.7 ± 0.1 (Table 1); 2.7 (Table 9)' in text and '| 50.0 |' in text
    assert '0.5-1 is not finished.' in text and 'differ in device_kind: cpu, gpu' in text
    with open(out / 'report.csv') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and [r['sam.rho'] for r in rows if r['best rho'] == 'True'] == ['0.2']
    with open(out / 'runs.csv') as file:
        assert len(list(csv.DictReader(file))) == 9
    page = (out / 'report.html').read_text()
    alts = re.findall('<img alt="([^"]*)" src="data:image/svg[+]xml;base64,', page)
    assert page.count('<img') == len(alts) == 1 + 1 + 2 * 3
    assert alts[:2] == ['Error against rho', 'Error reduction by switching to SAM']
    assert all(alt.startswith('Training loss and test error: ') for alt in alts[2:])
    assert str(tmp_path) not in text + page + (out / 'runs.csv').read_text()
    assert page.count('<tr>') == text.count('\n| ') and 'http' not in page
    assert {p.name for p in out.glob('*.png')} == {'rho.png', 'switches.png', 'training.png'}
    # A report in the folder of its runs is none of them, and is made anew.
    (again,) = run_reports([tmp_path / 'runs', tmp_path / 'more'])
    assert again.stdout == done.stdout


def test_the_report_of_two_methods_says_their_rho(tmp_path):
    for method in ('sgd', 'sam'):
        write_run(tmp_path / method, digits_config(f'method={method},rho=0.3'), error=1)
    assert results.varying(_groups(tmp_path)[0]) == ['sam.method']
    (done,) = run_reports([tmp_path])
    assert (done.returncode, done.stderr) == (0, '')
    assert '`sam.rho = 0.3`' in (tmp_path / 'report' / 'report.md').read_text()


def test_panels_name_the_setting(tmp_path):
    for noise in (0.0, 0.4):
        write_run(tmp_path / str(noise), digits_config(f'noise={noise}'), error=2)
    groups, _ = _groups(tmp_path)
    assert list(report.by_panel(groups)) == ['label noise 0', 'label noise 0.4']
    assert report.label(groups[1], ['data.label_noise', 'sam.method', 'sam.rho']) == (
        'label noise 0.4, sam, rho 0.5'
    )


def test_bad_input_of_the_report(tmp_path):
    (tmp_path / 'empty').mkdir()
    write_run(tmp_path / 'unfinished' / 'run', digits_config())
    write_run(tmp_path / 'damaged' / 'run', digits_config(), error=1)
    (tmp_path / 'damaged' / 'run' / 'result.json').write_text('{"step": ')
    cases = (
        ([], 'No folder is given'),
        ([tmp_path / 'none'], 'is no folder'),
        ([tmp_path / 'empty'], 'holds no run'),
        ([tmp_path / 'unfinished'], 'is finished'),
        ([tmp_path / 'damaged'], 'result.json is damaged'),
    )
    for done, (_, words) in zip(run_reports(*(row for row, _ in cases)), cases):
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert done.stderr.count('\n') == 1 and done.stderr.count('is damaged') < 2
