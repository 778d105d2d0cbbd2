"""The page of a sweep that goes on: how far its runs are, and their curves, in one HTML file."""

import collections
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sam_jax import run_log, tables
from sam_jax.experiments import figures, grid, results, web
from sam_jax.experiments.results import TEST, VALIDATION

FILE = 'index.html'
STATES = ('finished', 'running', 'waiting', 'stopped', 'failed')
# Seconds between two pages; and the share of the sweep's own time that they may take.
EVERY, SHARE = 10, 0.1

_log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """What the files of a run tell.

    Attributes:
      epoch: reached; None before the first line that names one.
      last: {name: its last value}, of the metrics, and of result.json at the end.
      errors: [(epoch, test error in percent), ...].
      seconds: from the start of its process to its last line; in all, of a finished run.
    """

    epoch: float | None
    last: dict
    errors: list
    seconds: float | None


def look(workdir: str) -> Seen:
    """Returns what config.json, metrics.jsonl and result.json of a run tell; of none, nothing."""
    result = run_log.read_json(os.path.join(workdir, 'result.json'))
    record = results.Record(workdir, {}, result)
    last = {name: value for line in record.lines for name, value in line.items()}
    last.update(result or {})
    per_step = record.epochs_per_step
    seconds = last.get('wall_time')
    if seconds is None and 'time' in last:
        seconds = max(0.0, last['time'] - os.path.getmtime(os.path.join(workdir, 'config.json')))
    return Seen(
        last['step'] * per_step if per_step else None,
        last,
        [(epoch, 100 * error) for epoch, error in record.curve(TEST)],
        seconds,
    )


def rows(
    runs: Sequence[grid.Run], statuses: Mapping[str, Any], seen: Mapping[str, Seen]
) -> list[dict[str, str]]:
    """Returns a dict for each run, in the order of the columns of the page's table."""
    return [
        {
            # A run that has not begun has no log.
            'run': (
                run.name
                if statuses[run.name].state == 'waiting'
                else f'[{run.name}]({run.name}/log.txt)'
            ),
            'state': statuses[run.name].state,
            'epoch': _epochs(seen[run.name].epoch, run.config.total_epochs),
            'training loss': _number(seen[run.name].last.get('train/loss'), '.4f'),
            'test error (%)': _number(seen[run.name].last.get(TEST), '.2f', 100),
            'validation error (%)': _number(seen[run.name].last.get(VALIDATION), '.2f', 100),
            'wall time': _duration(seen[run.name].seconds),
        }
        for run in runs
    ]


def _epochs(epoch, total):
    return '' if epoch is None else f'{math.floor(10 * epoch + 1e-6) / 10:g} of {total}'


def _number(value, form, scale=1):
    # What is not finite is text.
    return '' if value is None else value if isinstance(value, str) else f'{scale * value:{form}}'


def _duration(seconds):
    if seconds is None:
        return ''
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}'


def panel(runs: Sequence[grid.Run], seen: Mapping[str, Seen]) -> figures.Panel | None:
    """Returns the Panel of the test error of all runs against epochs; None before there is any."""
    curves = []
    for i, run in enumerate(runs):
        if errors := seen[run.name].errors:
            x, y = map(list, zip(*errors))
            # A color stays that of its run, whichever others have a curve by then.
            curves.append(
                figures.Curve(
                    run.name, x, y, [math.nan] * len(x), figures.shade(i / max(1, len(runs) - 1))
                )
            )
    if not curves:
        return None
    # One curve has no legend.
    title = curves[0].label if len(curves) == 1 else ''
    return figures.Panel(title, 'epoch', 'test error (%)', curves)


def html(
    title: str,
    runs: Sequence[grid.Run],
    statuses: Mapping[str, Any],
    seen: Mapping[str, Seen],
    now: float,
    refresh: int = 0,
    report: str = '',
) -> str:
    """Returns the page of a sweep: counts, table, curves, and why runs failed.

    Args:
      title: the name of the sweep.
      runs: of the sweep.
      statuses: {name of a run: with its `state` and a `line` on it}.
      seen: {name of a run: Seen}.
      now: seconds since 1970, of the page.
      refresh: seconds after which a browser loads it anew; 0 at the end of the sweep.
      report: address of the report on the sweep; '' for none.
    """
    counts = collections.Counter(status.state for status in statuses.values())
    count = ', '.join(f'{counts[state]} {state}' for state in STATES if counts[state])
    clock = time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(now))
    goes_on = f'; the page loads itself anew every {refresh} s' if refresh else ''
    parts = [f'# Sweep {title}', f'**{len(runs)} runs: {count}.** As of {clock}{goes_on}.']
    if report:
        parts.append(f'[Report on the finished runs]({report})')
    parts.append(tables.of_records(rows(runs, statuses, seen)))
    pictures = {}
    if drawn := panel(runs, seen):
        pictures['error'] = [figures.panels([drawn], width=5.5)]
        parts += ['## Test error', '![Test error](error)']
    failed = [
        f'{run.name}: {statuses[run.name].line}'
        for run in runs
        if statuses[run.name].state == 'failed'
    ]
    if failed:
        # Indented it is no Markdown, whatever a run may have said.
        lines = '\n'.join(failed).replace(_beginning(runs[0]), '').splitlines()
        parts += ['## Failed', '\n'.join(f'    {line}' for line in lines)]
    return web.page('\n\n'.join(parts), pictures, refresh)


def _beginning(run):
    """Returns what the paths of all runs begin with, up to their names."""
    return run.workdir.removesuffix(run.name)


class Live:
    """Keeps WORKDIR/index.html up to date while a sweep goes on; never ends the sweep itself."""

    def __init__(self, runs: Sequence[grid.Run], statuses: Mapping[str, Any]) -> None:
        self._runs, self._statuses = runs, statuses
        self._folder = _beginning(runs[0])
        self._looked = {}
        self._next = 0.0
        self._begun = False
        self._warned = False

    def update(self) -> None:
        """Writes the page if it is time to."""
        if time.monotonic() >= self._next:
            self._begun = True
            began = time.monotonic()
            self._write(EVERY)
            took = time.monotonic() - began
            self._next = time.monotonic() + max(EVERY, took / SHARE)

    def close(self) -> None:
        """Leaves the page as that of a sweep that is over."""
        if self._begun:
            self._write(0)

    def _write(self, refresh):
        try:
            seen = {run.name: self._look(run.workdir) for run in self._runs}
            title = os.path.basename(os.path.abspath(self._folder))
            report = os.path.join('report', 'report.html')
            there = os.path.exists(os.path.join(self._folder, report))
            text = html(
                title,
                self._runs,
                dict(self._statuses),
                seen,
                time.time(),
                refresh,
                report if there else '',
            )
            os.makedirs(self._folder or '.', exist_ok=True)
            path = os.path.join(self._folder, FILE)
            with open(path + '.part', 'w') as file:
                file.write(text)
            os.replace(path + '.part', path)
        except Exception as e:  # whatever it is, the runs go on
            if not self._warned:
                _log.warning('%s is not up to date: %s: %s', FILE, type(e).__name__, e)
            self._warned = True

    def _look(self, workdir):
        """The files of a run are read only if they have changed."""
        stamps = [
            _stamp(os.path.join(workdir, name))
            for name in ('config.json', 'metrics.jsonl', 'result.json')
        ]
        if self._looked.get(workdir, [None])[0] != stamps:
            self._looked[workdir] = stamps, look(workdir)
        return self._looked[workdir][1]


def _stamp(path):
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
