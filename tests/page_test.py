"""The page of a sweep that goes on: what it says of the runs, when, and that it never ends one."""

import json
import logging
import os
import re

import pytest
from report_runs import digits_config, write_run

from sam_jax.experiments import engines, grid, page
from sam_jax.experiments.engines import Status


def _run(folder, name, rho=0.1):
    config = digits_config(f'rho={rho}')
    config.total_epochs = 4
    return grid.Run(name, str(folder / name), config, ())


def _write_metrics(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text('{"config": {}}')
    os.utime(folder / 'config.json', (1000, 1000))
    (folder / 'metrics.jsonl').write_text(''.join(f'{json.dumps(x)}\n' for x in lines))


@pytest.fixture
def sweep(tmp_path):
    """One run of each state; what 'running' has said last is half a line."""
    runs = [_run(tmp_path, name) for name in page.STATES]
    write_run(tmp_path / 'finished', digits_config(), error=3.5, validation=4.25)
    _write_metrics(
        tmp_path / 'running',
        {'step': 20, 'epoch': 1.0, 'train/loss': 0.5, 'time': 1010.0},
        {'step': 20, 'test/error_rate': 0.25, 'time': 1020.0},
        {'step': 30, 'epoch': 1.5, 'train/loss': 0.25, 'time': 5661.0},
    )
    with open(tmp_path / 'running' / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 40, "epo')
    _write_metrics(
        tmp_path / 'failed', {'step': 20, 'epoch': 1.0, 'train/loss': 'nan', 'time': 1001.0}
    )
    statuses = {run.name: Status(run.name) for run in runs}
    statuses['failed'].line = f'status 2: <b> of *it* | ({tmp_path}/failed/log.txt)'
    return runs, statuses


def _page(sweep, **options):
    runs, statuses = sweep
    seen = {run.name: page.look(run.workdir) for run in runs}
    return page.html('rho', runs, statuses, seen, 1e9, **options)


def _rows(text):
    return {
        cells[0]: cells[1:]
        for cells in (
            [re.sub('<[^>]*>', '', cell) for cell in re.findall('<td>(.*?)</td>', row, re.DOTALL)]
            for row in re.findall('<tr>(.*?)</tr>', text, re.DOTALL)
        )
        if cells
    }


def test_each_run_has_a_row(sweep):
    text = _page(sweep)
    assert re.findall('<th>(.*?)</th>', text) == [
        'run',
        'state',
        'epoch',
        'training loss',
        'test error (%)',
        'validation error (%)',
        'wall time',
    ]
    assert _rows(text) == {
        'finished': ['finished', '4 of 4', '0.5000', '3.50', '4.25', '0:00:36'],
        'running': ['running', '1.5 of 4', '0.2500', '25.00', '', '1:17:41'],
        'waiting': ['waiting', '', '', '', '', ''],
        'stopped': ['stopped', '', '', '', '', ''],
        'failed': ['failed', '1 of 4', 'nan', '', '', '0:00:01'],
    }


def test_counts_clock_and_what_failed(sweep, tmp_path):
    text = _page(sweep)
    assert '5 runs: 1 finished, 1 running, 1 waiting, 1 stopped, 1 failed.' in text
    assert '2001-09-09 01:46:40 UTC' in text
    assert 'failed: status 2: &lt;b&gt; of *it* | (failed/log.txt)' in text
    assert str(tmp_path) not in text


def test_it_loads_itself_anew_until_the_end(sweep):
    assert '<meta http-equiv="refresh" content="10">' in _page(sweep, refresh=10)
    assert 'http-equiv' not in _page(sweep)


def test_the_report_is_linked_if_there_is_one(sweep):
    assert 'href="report/report.html"' in _page(sweep, report='report/report.html')
    assert 'report.html' not in _page(sweep)


def test_it_needs_no_other_file(sweep):
    text = _page(sweep)
    assert re.findall('src="(.{18})', text) == ['data:image/svg+xml'] and 'url(' not in text


def test_curves_of_test_error(sweep):
    runs, _ = sweep
    drawn = page.panel(runs, {run.name: page.look(run.workdir) for run in runs})
    assert [(c.label, c.x, c.mean) for c in drawn.curves] == [
        ('finished', [2.0, 4.0], pytest.approx([3.5, 3.5])),
        ('running', [1.0], [25.0]),
    ]
    one = {run.name: page.look(run.workdir + 'x' * (run.name != 'running')) for run in runs}
    assert [drawn.title, page.panel(runs, one).title] == ['', 'running']
    nothing = {run.name: page.look(run.workdir + 'x') for run in runs}
    assert page.panel(runs, nothing) is None


def test_it_is_drawn_now_and_then_and_reads_what_is_new(sweep, tmp_path, monkeypatch):
    runs, statuses = sweep
    clock, looked = [0.0], []
    look = page.look
    monkeypatch.setattr(page.time, 'monotonic', lambda: clock[0])
    monkeypatch.setattr(page, 'look', lambda w: (looked.append(os.path.basename(w)), look(w))[1])
    file = tmp_path / 'index.html'
    live = page.Live(runs, statuses)
    live.update()
    assert 'content="10"' in file.read_text() and len(looked) == 5
    file.unlink()
    clock[0] = 9.9
    live.update()
    assert not file.exists()
    with open(tmp_path / 'running' / 'metrics.jsonl', 'a') as metrics:
        metrics.write('ch": 2.0, "train/loss": 0.125, "time": 5662.0}\n')
    clock[0] = 10.0
    live.update()
    assert _rows(file.read_text())['running'][:3] == ['running', '2 of 4', '0.1250']
    assert looked[5:] == ['running']
    live.close()
    assert 'http-equiv' not in file.read_text()


def test_nothing_that_goes_wrong_ends_a_sweep(sweep, tmp_path, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise ValueError('no font')

    monkeypatch.setattr(page.figures, 'panels', fails)
    live = page.Live(*sweep)
    with caplog.at_level(logging.WARNING, 'sam_jax'):
        live.update()
        live.close()
    assert [r.getMessage() for r in caplog.records] == [
        'index.html is not up to date: ValueError: no font'
    ]
    assert not (tmp_path / 'index.html').exists()


class _Engine:
    """Finishes the runs one by one; keeps what the page said after each."""

    def __init__(self, folder):
        self.pages, self._folder = [], folder

    def submit(self, runs, statuses):
        self._runs, self._statuses = iter(runs), statuses

    def working(self):
        if (self._folder / 'index.html').exists():
            self.pages.append((self._folder / 'index.html').read_text())
        run = next(self._runs, None)
        if run:
            write_run(self._folder / run.name, run.config, error=2)
            self._statuses[run.name] = Status('finished')
        return run is not None

    def stop(self):
        pass


def test_a_sweep_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(page, 'EVERY', 0)
    monkeypatch.setattr(page, 'SHARE', 1e9)
    runs = [_run(tmp_path, f'rho={rho}', rho) for rho in (0.1, 0.2, 0.3)]
    engine = _Engine(tmp_path)
    engines.execute(engine, runs)
    counts = [
        re.search('<strong>3 runs: (.*?)[.]</strong>', text)[1]
        for text in [*engine.pages, (tmp_path / 'index.html').read_text()]
    ]
    assert counts == ['1 finished, 2 waiting', '2 finished, 1 waiting', '3 finished', '3 finished']
    # A sweep of finished runs has its page as well.
    (tmp_path / 'index.html').unlink()
    engines.execute(_Engine(tmp_path), runs)
    assert '3 runs: 3 finished.' in (tmp_path / 'index.html').read_text()
