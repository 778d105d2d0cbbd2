"""Sweeps: which runs there are, what each is called, and what it is started with.

A config file may define `get_hyper(h)`, the convention of Google's research repositories:

    def get_hyper(h):
        return h.product([h.sweep('sam.rho', [0.05, 0.1, 0.2]), h.sweep(':seed', range(5))])

where h is this module. A sweep is a list with a dict {key: value} for each run. A key is one of the
config's ('sam.rho', or 'config.sam.rho'), or ':' and the name of an argument of the config file
(':model'), for what decides other settings as well.
"""

import collections
import copy
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable
from typing import Any

import ml_collections

from sam_jax import run_log
from sam_jax.errors import UserError
from sam_jax.settings import check, check_same_mathematics, jsonable, load, override, short_names

# A dict {key: value} for each run.
Sweep = list[dict[str, Any]]


def sweep(key: str, values: Iterable[Any]) -> Sweep:
    """A run for each value of a key."""
    return [{key.removeprefix('config.'): value} for value in values]


def fixed(key: str, value: Any) -> Sweep:
    """One run, with this value."""
    return sweep(key, [value])


def product(sweeps: Iterable[Sweep]) -> Sweep:
    """Each run of one sweep with each run of the others; the last one varies fastest."""
    return [_merged(parts) for parts in itertools.product(*sweeps)]


def zipit(sweeps: list[Sweep]) -> Sweep:
    """The first runs of all sweeps together, the second ones together, and so on."""
    lengths = [len(s) for s in sweeps]
    if len(set(lengths)) > 1:
        keys = ', '.join(f'{len(s)} of {"/".join(s[0]) if s else "nothing"}' for s in sweeps)
        raise UserError(f'Sweeps that go together must be equally long; these are {keys}.')
    return [_merged(parts) for parts in zip(*sweeps)]


def chainit(sweeps: Iterable[Sweep]) -> Sweep:
    """The runs of one sweep, then those of the next."""
    return list(itertools.chain(*sweeps))


def _merged(parts):
    merged = {}
    for part in parts:
        for key in part:
            # ':seed' and 'seed' are two ways to one setting.
            if key.lstrip(':') in {k.lstrip(':') for k in merged}:
                raise UserError(f'The sweep sets {key.lstrip(":")} twice.')
        merged.update(part)
    return merged


def parse(text: str) -> Sweep:
    """Returns the sweep that a --sweep flag names.

    Args:
      text: 'sam.rho=0.05,0.1'; with ';', keys that go together: 'sam.rho=0.1,0.2;seed=1,2'.

    Raises:
      UserError: it has another form.
    """
    sweeps = []
    for part in text.split(';'):
        key, equals, values = part.strip().partition('=')
        values = values.split(',')
        if not (key and equals and all(values)):
            raise UserError(
                f'--sweep is {text!r}; it must be of the form KEY=VALUE,VALUE, such as '
                'sam.rho=0.05,0.1.'
            )
        sweeps.append(sweep(key, values))
    return zipit(sweeps)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      name: 'rho=0.05,seed=1'.
      workdir: its folder.
      config: its settings, checked.
      flags: what sam_jax.main is started with.
      until_epoch: after which epoch it is to stop; 0 for its end.
    """

    name: str
    workdir: str
    config: ml_collections.ConfigDict
    flags: tuple
    until_epoch: int = 0

    def result(self) -> dict[str, Any] | None:
        """Returns the content of result.json, or None while the run is not finished.

        Where it stops before, the content of result_at_<epoch>.json.

        Raises:
          UserError: the folder holds a run with other settings.
        """
        made = run_log.read_json(os.path.join(self.workdir, 'config.json'))
        if made:
            try:
                check_same_mathematics(self.config, made['config'])
            except UserError as e:
                raise UserError(f'{self.workdir}: {e}') from e
        return run_log.read_json(run_log.result_path(self.workdir, self.until_epoch))


def make_runs(config_flag: str, hyper: Sweep, overrides: dict[str, Any], workdir: str) -> list[Run]:
    """Returns the runs of a sweep, each with its settings checked.

    Args:
      config_flag: 'FILE' or 'FILE:ARGUMENT'.
      hyper: the sweep, a list of {key: value}; values of config keys may be text.
      overrides: {key: value} of all runs.
      workdir: folder of the sweep; a run's folder in it has the run's name.

    Raises:
      UserError: no run, two runs of one name or of the same settings, or bad settings in one of
        them, which is named.
    """
    if not hyper:
        raise UserError('The sweep has no runs.')
    runs, of_files = [], []
    for name, settings in zip(_names(hyper), hyper):
        arguments = [f'{k[1:]}={v}' for k, v in settings.items() if k.startswith(':')]
        changes = {**overrides, **{k: v for k, v in settings.items() if not k.startswith(':')}}
        flag = config_flag
        if arguments:
            path, _, given = config_flag.partition(':')
            flag = f'{path}:{",".join([*filter(None, [given]), *arguments])}'
        try:
            config = copy.deepcopy(load(flag)[1])
            of_files.append(jsonable(config))
            for key, value in changes.items():
                override(config, key, value)
            check(config)
        except UserError as e:
            raise UserError(f'Run {name}: {e}') from e
        folder = os.path.join(workdir, name)
        flags = [
            f'--config={flag}',
            f'--workdir={folder}',
            *(f'--config.{k}={v}' for k, v in changes.items()),
        ]
        runs.append(Run(name, folder, config, tuple(flags)))
    _check_different(runs, of_files)
    return runs


SEEDS = ('seed', 'data.label_noise_seed', 'data.fraction_seed')


def seeds_of(flat: dict[str, Any]) -> tuple[int, int, int]:
    """Returns the SEEDS of flat settings; 0 in the place of one that decides nothing in them."""
    in_part = flat['data.fraction'] < 1 or flat['data.shots']
    used = True, flat['data.label_noise'], in_part
    seed, noise, part = (flat[key] if there else 0 for key, there in zip(SEEDS, used))
    return seed, noise, part


def _check_different(runs, of_files):
    """Refuses two runs that are the same; of_files are their settings before any was changed."""
    names = collections.Counter(run.name for run in runs)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise UserError(f'Two runs of the sweep are the same, {repeated[0]}.')
    seen = {}
    for run, before in zip(runs, of_files):
        flat = jsonable(run.config)
        rest = {key: value for key, value in flat.items() if key not in SEEDS}
        identity = json.dumps([rest, seeds_of(flat)], sort_keys=True)
        first, of_first, before_first = seen.setdefault(identity, (run, flat, before))
        if first is run:
            continue
        undone = [k for k in before if before[k] != before_first.get(k) and flat[k] == of_first[k]]
        why = (
            f'{undone[0]} is set to {flat[undone[0]]} in both, whatever the arguments of the config'
            if undone
            else 'the values of the sweep in which they differ mean the same'
        )
        raise UserError(f'Runs {first.name} and {run.name} of the sweep are the same: {why}.')


def _names(hyper):
    short = short_names(
        list(dict.fromkeys(key.lstrip(':') for settings in hyper for key in settings))
    )
    # Of a name, only what every file system and shell takes as it is.
    names = (
        ','.join(f'{short[key.lstrip(":")]}={value}' for key, value in settings.items())
        for settings in hyper
    )
    return [re.sub(r'[^\w.,=+-]', '_', name) or 'run' for name in names]
