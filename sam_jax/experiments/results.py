"""What finished runs say together: means and intervals over seeds, the best rho, the paper's rows.

Of a run only `config.json`, `result.json` and `metrics.jsonl` are read, so runs made anywhere can
be put together anywhere.
"""

import collections
import csv
import dataclasses
import functools
import json
import logging
import math
import os
import shlex
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy import stats

from sam_jax import data, run_log
from sam_jax.errors import UserError
from sam_jax.experiments import grid
from sam_jax.settings import FREE_AT_RESUME, completed, jsonable, load, override, short_names

TEST, VALIDATION = 'test/error_rate', 'validation/error_rate'

# What differs between the runs of one mean, and what does not change the result.
_NOT_COMPARED = (*grid.SEEDS, 'log_every_steps', *FREE_AT_RESUME)
# Their places differ from seed to seed and from machine to machine; whether there is one matters.
_FILES = ('model.init_from', 'data.labels_from')
# What may differ between a method and the baseline that it is compared with.
_OF_METHOD = ('sam.', 'total_epochs')

_log = logging.getLogger(__name__)


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Returns (mean, half width of the 95 % t-interval of the mean); NaN for one value."""
    if len(values) < 2:
        return values[0], math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def interval(pair: tuple[float, float] | None, digits: int = 2, sign: bool = False) -> str:
    """Returns '0.28 ± 0.15' of a (mean, half width); '0.28' where that is NaN; '' of None.

    With a sign, of a difference, '+0.28 ± 0.15'.
    """
    if pair is None:
        return ''
    mean, half = pair
    form = f'{"+z" if sign else ""}.{digits}f'
    return f'{mean:{form}}' + ('' if math.isnan(half) else f' ± {half:.{digits}f}')


def shown(value: Any) -> str:
    """Returns the value of a setting as a reader is told it; '' of None."""
    return '' if value is None else f'{value:g}' if isinstance(value, float) else str(value)


def headings(keys: Sequence[str]) -> dict[str, str]:
    """Returns {key: its name in a table}: the short one; `model` and `data` of their names."""
    return {
        **short_names(keys),
        **{key: key.removesuffix('.name') for key in keys if key.endswith('.name')},
    }


def settings_of(flat: dict[str, Any]) -> dict[str, Any]:
    """Returns what decides the distribution of a run's result, of its flat settings.

    That is all but seeds and what does not change the mathematics; of files only whether there is
    one; of data sets of one's own the name of the folder or file, which is the data set; of method
    `sgd` no setting of an ascent that it does not have.
    """
    settings = {k: v for k, v in completed(flat).items() if not k.startswith(_NOT_COMPARED)}
    if flat['data.name'] in data.OWN:
        settings['data.dir'] = os.path.basename(os.path.normpath(flat['data.dir']))
    settings.update({k: bool(settings[k]) for k in _FILES if k in settings})
    if settings.get('sam.method') == 'sgd':
        settings = {
            k: v for k, v in settings.items() if k == 'sam.method' or not k.startswith('sam.')
        }
    return settings


@dataclasses.dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
      workdir: its folder.
      written: config.json's content.
      result: result.json's content, or None.
      base: a folder around it, relative to which a reader is told of places.
    """

    workdir: str
    written: dict
    result: dict | None
    base: str = ''

    @property
    def name(self) -> str:
        """Its folder, relative to `base`."""
        return os.path.relpath(self.workdir, self.base or None)

    def near(self, path: str) -> str:
        """Returns a path relative to `base`, if it is not relative already."""
        return os.path.relpath(path, self.base or None) if os.path.isabs(path) else path

    @functools.cached_property
    def lines(self) -> list[dict]:
        """What metrics.jsonl holds; a line that is not yet whole is left out."""
        return run_log.read_lines(os.path.join(self.workdir, 'metrics.jsonl'))

    @functools.cached_property
    def epochs_per_step(self) -> float | None:
        """Epochs of a step, or None if the run has said nothing of its epochs yet."""
        told = (
            [self.result['epochs'] / self.result['step']]
            if self.result
            else [line['epoch'] / line['step'] for line in self.lines if 'epoch' in line]
        )
        return told[-1] if told else None

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """Returns [(epoch, value), ...] of a metric in metrics.jsonl.

        Values that are not finite are left out.
        """
        if self.epochs_per_step is None:
            return []
        return [
            (line['step'] * self.epochs_per_step, line[metric])
            for line in self.lines
            if isinstance(line.get(metric), float)
        ]


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of the same settings with other seeds.

    Attributes:
      settings: of `settings_of`.
      finished, unfinished: Records, by seed.
    """

    settings: dict
    finished: list
    unfinished: list

    def values(self, metric: str) -> list[float]:
        """The metric of the runs that have it."""
        return [r.result[metric] for r in self.finished if metric in r.result]

    def percent(self, metric: str) -> tuple[float, float] | None:
        """Returns (mean, half interval) of an error rate in percent, or None if no run has it."""
        values = self.values(metric)
        return mean_and_interval([100 * v for v in values]) if values else None

    def without(self, *keys) -> tuple[tuple[str, str], ...]:
        """The settings, but for those of which one of the keys is the beginning; hashable."""
        return tuple(
            (k, str(v)) for k, v in sorted(self.settings.items()) if not k.startswith(keys)
        )

    @property
    def radii(self) -> tuple[float, float]:
        """(rho, rho_min) of an ascent."""
        return self.settings['sam.rho'], self.settings.get('sam.rho_min', 0.0)

    @property
    def is_baseline(self) -> bool:
        """Whether it descends along the plain gradient."""
        return self.settings['sam.method'] == 'sgd' or self.settings['sam.rho'] == 0


def find(folders: Iterable[str]) -> list[Record]:
    """Returns the Records of all runs in the folders and below, in the order of their paths.

    A folder whose config.json is of something else, such as weights, is left out; the log says so.

    Raises:
      UserError: a folder that is not there or without runs; a file that cannot be read.
    """
    found = {}
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f'{folder!r} is no folder.')
        before = len(found)
        for place, subfolders, files in os.walk(folder):
            subfolders[:] = sorted(s for s in subfolders if s != 'checkpoints')
            if 'config.json' not in files:
                continue
            written = run_log.read_json(os.path.join(place, 'config.json'))
            if other := _no_run(written):
                _log.warning('%s is left out: its config.json is that of %s.', place, other)
                continue
            result = run_log.read_json(os.path.join(place, 'result.json'))
            found.setdefault(os.path.realpath(place), (place, written, result))
        if len(found) == before:
            raise UserError(f'{folder!r} holds no run (no config.json) that is not counted yet.')
    base = os.path.commonpath(
        [os.path.dirname(os.path.abspath(place)) for place, _, _ in found.values()] or ['.']
    )
    return [Record(*one, base) for one in found.values()]


def _no_run(written):
    """Returns what a config.json is of, if not of a run; else ''."""
    config = written.get('config') if isinstance(written, dict) else None
    if not isinstance(config, dict) or 'sam.method' not in config:
        return 'something else'
    return 'exported weights' if 'weights' in written else ''


def group(records: Iterable[Record]) -> tuple[list[Group], list[str]]:
    """Returns (groups, notes): a Group for all runs that differ in seed only, in order of settings.

    Of two runs with the same settings, files and seeds the later one is left out; a note says so.
    Runs that start from files or learn the labels in them go together if each seed has one file;
    where a seed has several, each file is a group.
    """
    together, notes = collections.defaultdict(dict), []
    for record in records:
        flat = completed(record.written['config'])
        runs = together[json.dumps(settings_of(flat), sort_keys=True)]
        key = grid.seeds_of(flat), tuple(record.near(flat[k]) for k in _FILES)
        kept = runs.setdefault(key, record)
        if kept is not record:
            if record.result and not kept.result:
                runs[key], record = record, kept
            notes.append(
                f'{record.name} is left out: {runs[key].name} has the same settings and seeds.'
            )
    groups = []
    for settings, runs in together.items():
        settings = json.loads(settings)
        files = sorted({own for _, own in runs})
        if len({seeds for seeds, _ in runs}) == len(runs):
            groups.append(_make_group(settings, runs))
            if len(files) > 1:
                each = ', '.join(' '.join(filter(None, own)) for own in files)
                notes.append(f'One mean is over runs with a file each: {each}.')
        else:
            groups += [
                _make_group(
                    {**settings, **dict(zip(_FILES, own))},
                    {key: r for key, r in runs.items() if key[1] == own},
                )
                for own in files
            ]
    return sorted(groups, key=_order), notes


def _make_group(settings, runs):
    ordered = [runs[key] for key in sorted(runs)]
    return Group(settings, [r for r in ordered if r.result], [r for r in ordered if not r.result])


def _order(group):
    # Experiments together; in one, the baseline first, then methods by name and rho.
    settings = group.settings
    return (
        _by_size(group.without(*_OF_METHOD, 'data.validation')),
        not settings['data.validation'],
        settings['sam.method'] != 'sgd',
        settings['sam.method'],
        settings['total_epochs'],
        _by_size(group.without('sam.rho')),
        group.radii if 'sam.rho' in settings else (),
    )


def _by_size(pairs):
    # Numbers are text in them, of which '128' is before '16'.
    def size(text):
        try:
            return 0, float(text), ''
        except ValueError:
            return 1, 0.0, text

    return [(key, size(value)) for key, value in pairs]


def varying(groups: list[Group]) -> list[str]:
    """Returns the settings that are not the same in all groups; rho last.

    Those of an ascent count among the groups that have them.
    """
    keys = dict.fromkeys(key for g in groups for key in g.settings)
    differ = [
        key
        for key in keys
        if len(
            {
                json.dumps(g.settings.get(key))
                for g in groups
                if key in g.settings or not key.startswith('sam.')
            }
        )
        > 1
    ]
    return sorted(differ, key=lambda key: (key == 'sam.rho', key.startswith('sam.'), key))


def best(groups: list[Group]) -> list[Group]:
    """Returns the groups whose rho is the best of those tried, by the held-out validation split.

    Tried are the groups with data.validation that differ in rho alone, or in rho_min, which may
    follow it. Those that train on all data with the rho and rho_min found are best as well. A rho
    with unfinished runs, which may have diverged, is not chosen; nor is any by its test error.
    """
    tried = collections.defaultdict(list)
    for g in groups:
        if g.settings['data.validation'] and 'sam.rho' in g.settings:
            tried[g.without('sam.rho', 'data.validation')].append(g)
    chosen = {}
    for key, candidates in tried.items():
        complete = [g for g in candidates if g.values(VALIDATION) and not g.unfinished]
        if len(candidates) > 1 and complete:
            found = min(complete, key=lambda g: (g.percent(VALIDATION)[0], g.radii))
            chosen[key] = found.radii
    return [
        g
        for g in groups
        if 'sam.rho' in g.settings
        and chosen.get(g.without('sam.rho', 'data.validation')) == g.radii
    ]


@dataclasses.dataclass(frozen=True)
class Switch:
    """A method beside its baseline.

    Attributes:
      baseline, method: Groups.
      reduction: of the mean test error, in percent of the baseline's.
    """

    baseline: Group
    method: Group
    reduction: float


def switches(groups: list[Group]) -> list[Switch]:
    """Returns a Switch for each method that has a baseline, as the paper's Figure 1 counts them.

    The baseline is the better one of those with as many epochs and with twice as many (the paper's
    rule of equal compute). Of a method, the best rho is taken, or the only one; never by test
    error.
    """
    chosen, found = best(groups), []
    experiments = collections.defaultdict(list)
    for g in groups:
        if g.values(TEST):
            experiments[g.without(*_OF_METHOD)].append(g)
    for together in experiments.values():
        baselines = [g for g in together if g.is_baseline]
        methods = collections.defaultdict(list)
        for g in together:
            if not g.is_baseline:
                methods[g.without('sam.rho')].append(g)
        for candidates in methods.values():
            epochs = candidates[0].settings['total_epochs']
            equal = [g for g in baselines if g.settings['total_epochs'] in (epochs, 2 * epochs)]
            baseline = min(equal, key=lambda g: g.percent(TEST)[0], default=None)
            picked = candidates if len(candidates) == 1 else [g for g in candidates if g in chosen]
            if picked and baseline and baseline.percent(TEST)[0]:
                before, after = (g.percent(TEST)[0] for g in (baseline, picked[0]))
                found.append(Switch(baseline, picked[0], 100 * (before - after) / before))
    return found


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """A number of the paper: its table, the metric, the error in percent, its interval as printed.

    `settings` are those of the config that reproduces it; `note` says what to know about it;
    `digits` is the error as printed.
    """

    table: str
    command: str
    metric: str
    percent: float
    interval: str
    note: str
    settings: dict
    digits: str

    def __str__(self):
        interval = f' ± {self.interval}' if self.interval else ''
        note = f': {self.note}' if self.note else ''
        kind = {TEST: '', VALIDATION: ' validation', 'test/top5_error_rate': ' top-5'}[self.metric]
        return f'{self.percent:g}{interval}{kind} ({self.table}{note})'


def read_paper(path: str | os.PathLike) -> list[PaperRow]:
    """Returns the PaperRows of a CSV file whose commands name the configs that reproduce them."""
    rows = []
    with open(path, newline='') as file:
        for line in csv.DictReader(file):
            flag, *overrides = shlex.split(line['command'])
            # By name: wherever one is, whatever `configs` lies there.
            config = load(flag.removeprefix('configs/').replace('.py', '', 1))[1]
            for change in overrides:
                key, _, value = change.removeprefix('--config.').partition('=')
                override(config, key, value)
            rows.append(
                PaperRow(
                    line['table'],
                    line['command'],
                    line['metric'],
                    float(line['percent']),
                    line['interval'],
                    line['note'],
                    settings_of(jsonable(config)),
                    line['percent'],
                )
            )
    return rows


def of_paper(group: Group, rows: list[PaperRow]) -> list[PaperRow]:
    """Returns the rows of the paper whose config has all the settings of a group."""
    settings = {**group.settings, **{k: bool(group.settings[k]) for k in _FILES}}
    return [row for row in rows if {**row.settings, 'data.dir': ''} == {**settings, 'data.dir': ''}]
