"""The flatness of many runs in their report, of what `sam-jax-analyze` has left beside them."""

import json

import pytest
from report_runs import digits_config, write_run

from sam_jax.errors import UserError
from sam_jax.experiments import flatness, report, results


def _measure(run, lambda_max, what=('spectrum', 'sharpness'), split='train'):
    """Writes what sam_jax/analysis/study.py says of one run."""
    said = {
        'name': 'sam',
        'step': 40,
        'dataset': 'digits',
        'split': split,
        'examples': 100,
        'weight_decay': 0.0,
        'label_smoothing': 0.0,
        'loss': 0.5,
        'error_rate': 0.01,
    }
    if 'spectrum' in what:
        said['spectrum'] = {'lambda_max': lambda_max, 'lambda_ratio': 2.5, 'trace': 70.0}
    if 'sharpness' in what:
        said['sharpness'] = {'m = 16': {'sharpness': 0.25, 'error_rise': 0.02}}
    (run / 'analysis').mkdir()
    (run / 'analysis' / 'analysis.json').write_text(
        json.dumps({'settings': {'what': what}, 'runs': [said], 'path': False})
    )


@pytest.fixture
def folder(tmp_path):
    """sgd: two seeds measured; sam: one of two, its sharpness alone; asam: none."""
    for method in ('sgd', 'sam', 'asam'):
        for seed in (0, 1):
            write_run(
                tmp_path / f'{method}-{seed}', digits_config(f'method={method}'), error=2, seed=seed
            )
    _measure(tmp_path / 'sgd-0', 10.0)
    _measure(tmp_path / 'sgd-1', 30.0)
    _measure(tmp_path / 'sam-1', None, what=('sharpness',))
    return tmp_path


def _groups(folder):
    return results.group(results.find([str(folder)]))[0]


def test_rows_are_means_over_the_measured_runs_of_each_group(folder):
    groups = _groups(folder)
    names = [g.settings['sam.method'] for g in groups]
    rows = {row.pop('measure'): row for row in flatness.rows(groups, names)}
    assert rows == {
        'loss of 100 examples, split train': {'sgd': '0.5 ± 0', 'sam': '0.5'},
        # 12.706 is the t-value of one degree of freedom; the deviation is sqrt(200).
        'lambda_max': {'sgd': '20 ± 1.3e+02', 'sam': ''},
        'lambda_max / lambda_5': {'sgd': '2.5 ± 0', 'sam': ''},
        'trace': {'sgd': '70 ± 0', 'sam': ''},
        'rise of the loss: m = 16': {'sgd': '0.25 ± 0', 'sam': '0.25'},
        'rise of the error rate: m = 16 (points of %)': {'sgd': '2 ± 0', 'sam': '2'},
    }


def test_runs_of_a_group_that_were_measured_differently(folder):
    _measure(folder / 'sam-0', 8.0, what=('spectrum',), split='test')
    groups = _groups(folder)
    rows = {
        row['measure']: row
        for row in flatness.rows(groups, [g.settings['sam.method'] for g in groups])
    }
    assert rows['lambda_max']['sam'] == '8' and rows['rise of the loss: m = 16']['sam'] == '0.25'
    assert {'loss of 100 examples, split train', 'loss of 100 examples, split test'} <= set(rows)


def test_the_report_has_them(folder, tmp_path):
    text = report.write([str(folder)], str(tmp_path / 'out'))
    section = text.partition('## Flatness\n')[2].partition('\n## ')[0]
    assert '| measure | sgd | sam |' in section
    assert '| rise of the loss: m = 16 | 0.25 ± 0 | 0.25 |' in section
    assert '<h2>Flatness</h2>' in (tmp_path / 'out' / 'report.html').read_text()


def test_without_measurements_there_is_no_section(tmp_path):
    write_run(tmp_path / 'run', digits_config(), error=2)
    groups = _groups(tmp_path)
    assert flatness.rows(groups, ['sam']) == []
    assert '## Flatness' not in report.write([str(tmp_path)], str(tmp_path / 'report'))


def test_a_damaged_file_gets_a_sentence(folder):
    (folder / 'sgd-0' / 'analysis' / 'analysis.json').write_text('{"runs": ')
    with pytest.raises(UserError, match='analysis.json is damaged'):
        flatness.rows(_groups(folder), ['a', 'b', 'c'])
