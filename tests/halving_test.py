"""Successive halving: what is run and chosen, whatever the order, the stops and the divergences."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import ROOT, assert_trees_equal, lean_environment, training_process, wait_until

from sam_jax import run_log
from sam_jax.errors import NOT_FINITE, UserError
from sam_jax.experiments import engines, grid, halving

DIGITS = str(ROOT / 'configs' / 'digits.py')
TOTAL = 27


def _runs(folder, hyper=None, **overrides):
    hyper = hyper or grid.product(
        [
            grid.sweep('sam.rho', [0.0, 0.1, 0.5]),
            grid.sweep('optimizer.learning_rate', [0.1, 0.2, 0.4]),
        ]
    )
    settings = {'data.validation': True, 'total_epochs': TOTAL, **overrides}
    return grid.make_runs(DIGITS, hyper, settings, str(folder))


def _error(run, epoch):
    """Falls with the epochs; of rho 0.5 slowly at first, and to the least at the end."""
    rho, rate = run.config.sam.rho, run.config.optimizer.learning_rate
    noise = (17 * run.config.seed % 5) / 1000
    return 0.3 - 0.1 * rate + (0.02 - 0.4 * rho) * epoch / TOTAL + 0.05 * rho + noise


class Fake:
    """Runs runs by writing what they would; counts epochs; may stop, or break some."""

    def __init__(self, stop_after=10**9, diverge=(), fail=()):
        self.left, self.diverge, self.fail = stop_after, diverge, fail
        self.trained = {}

    def __call__(self, runs, behind):
        statuses = {}
        for run in random.sample(runs, len(runs)):
            statuses[run.name] = engines.Status('finished')
            if run.name in self.diverge:
                line = f'status 2: error: The loss {NOT_FINITE} 7; the run stops.'
                statuses[run.name] = engines.Status('failed', line)
            elif run.name in self.fail:
                statuses[run.name] = engines.Status('failed', 'status 1: no space left')
            elif not run.result():
                if not self.left:
                    statuses[run.name] = engines.Status('stopped', 'before it started')
                    continue
                self.left -= 1
                self._train(run)
        return statuses

    def _train(self, run):
        os.makedirs(run.workdir, exist_ok=True)
        epoch = run.until_epoch or TOTAL
        assert self.trained.get(run.name, 0) < epoch, 'never backwards'
        self.trained[run.name] = epoch
        run_log.write_json(
            run_log.result_path(run.workdir, run.until_epoch),
            {
                'epochs': epoch,
                'gradient_evaluations': 2 * epoch,
                'wall_time': 1.0,
                'validation/error_rate': _error(run, epoch),
                'test/error_rate': 0.5 - _error(run, epoch),  # the opposite order
            },
        )


def _search(runs, factor=3, **faults):
    fake = Fake(**faults)
    return halving.search(runs, factor, fake), fake


@pytest.mark.parametrize(
    'candidates,total,factor,epochs',
    [
        (27, 27, 3, [1, 3, 9]),
        (26, 27, 3, [3, 9]),
        (25, 60, 3, [7, 20]),
        (3, 60, 3, [20]),
        (8, 60, 2, [8, 15, 30]),
        (100, 2, 3, [1]),
        (9, 1, 3, []),
    ],
)
def test_rungs(candidates, total, factor, epochs):
    assert halving.rungs(candidates, total, factor) == epochs


def test_the_best_third_goes_on_and_the_winner_has_the_least_validation_error(tmp_path):
    runs = _runs(tmp_path)
    found, fake = _search(runs)
    assert [(rung['epoch'], len(rung['errors']), len(rung['kept'])) for rung in found['rungs']] == [
        (3, 9, 3),
        (9, 3, 1),
        (27, 1, 1),
    ]
    assert sorted(fake.trained.values()) == [3] * 6 + [9] * 2 + [27]
    for rung in found['rungs']:
        assert max(rung['errors'][k] for k in rung['kept']) <= min(
            [e for name, e in rung['errors'].items() if name not in rung['kept']], default=1
        )
    assert found['winner'] == 'rho=0.5,learning_rate=0.4'
    assert found['runs'] == [str(tmp_path / found['winner'])]
    winner = next(run for run in runs if run.name == found['winner'])
    assert found['validation/error_rate'] == _error(winner, TOTAL)
    assert found['test/error_rate'] == 0.5 - _error(winner, TOTAL)
    assert found['epochs'] == 6 * 3 + 2 * 9 + 27 and found['epochs_of_grid'] == 9 * 27
    assert found['gradient_evaluations'] == 2 * found['epochs']
    told = halving.summary(found)
    assert '63, 26 % of the 243 of the grid' in told and told.count('test error') == 1
    tested = [key for key in re.findall(r'"([^"]*)":', json.dumps(found)) if 'test' in key]
    assert tested == ['test/error_rate'], "the winner's alone"


def test_stops_and_the_order_of_the_runs_change_nothing(tmp_path):
    expected, _ = _search(_runs(tmp_path / 'a'))
    for seed in range(3):
        random.seed(seed)
        stops = 0
        while True:
            assert stops < 20
            try:
                found, _ = _search(_runs(tmp_path / str(seed)), stop_after=1 + stops % 2)
                break
            except halving.Interrupted as e:
                assert 'stopped' in {status.state for status in e.statuses.values()}
                stops += 1
        assert stops > 5
        assert {**found, 'runs': 0} == {**expected, 'runs': 0}


def test_of_equal_errors_the_first_goes_on():
    assert halving.best({'b': 0.2, 'a': 0.2, 'c': 0.1}, 2) == ['c', 'b']


def test_seeds_of_a_setting_go_together(tmp_path):
    hyper = grid.product(
        [grid.sweep('optimizer.learning_rate', [0.1, 0.2, 0.4]), grid.sweep(':seed', range(3))]
    )
    runs = _runs(tmp_path, hyper)
    found, fake = _search(runs)
    assert found['candidates'] == 3 and found['winner'] == 'learning_rate=0.4'
    assert len(found['runs']) == 3 and sorted(fake.trained.values()) == [9] * 6 + [27] * 3
    mine = [run for run in runs if run.name.startswith('learning_rate=0.4')]
    mean = np.mean([_error(run, TOTAL) for run in mine])
    assert found['validation/error_rate'] == pytest.approx(mean)


def test_what_diverges_is_left_behind_and_what_breaks_is_waited_for(tmp_path):
    bad = 'rho=0.5,learning_rate=0.4'
    found, _ = _search(_runs(tmp_path / 'a'), diverge=[bad])
    assert found['rungs'][0]['diverged'] == [bad] and found['winner'] != bad
    assert '9 settings, 1 diverged, 3 go on' in halving.summary(found)
    with pytest.raises(halving.Interrupted):
        _search(_runs(tmp_path / 'b'), fail=[bad])
    found, _ = _search(_runs(tmp_path / 'b'))
    assert found['winner'] == bad
    runs = _runs(tmp_path / 'c')
    with pytest.raises(UserError, match='All settings diverged before epoch 3; sweep lower'):
        _search(runs, diverge=[run.name for run in runs])


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    runs = _runs(tmp_path)
    _search(runs)
    written = {'config': halving.jsonable(runs[0].config)}
    run_log.write_json(os.path.join(runs[0].workdir, 'config.json'), written)
    with pytest.raises(UserError, match='label_smoothing'):
        _search(_runs(tmp_path, label_smoothing=0.1))


@pytest.mark.parametrize(
    'how,factor,words',
    [
        ({'data.validation': False}, 3, 'run rho=0.0,learning_rate=0.1 has data.validation False'),
        ({}, 1, '--factor is 1; it must be at least 2'),
        ({}, 10, 'needs at least 10 settings to choose from, but the sweep has 9'),
    ],
)
def test_bad_searches(how, factor, words, tmp_path):
    with pytest.raises(UserError, match=words) as e:
        _search(_runs(tmp_path, **how), factor)
    assert str(e.value).endswith('.') and not list(tmp_path.iterdir())


def test_epochs_are_no_subject_of_a_search(tmp_path):
    runs = _runs(tmp_path, grid.sweep('total_epochs', [1, 2, 3]))
    with pytest.raises(UserError, match='total_epochs is 1 in run total_epochs=1 and 2 in run'):
        _search(runs)


def test_a_run_is_told_until_which_epoch(tmp_path):
    run = _runs(tmp_path)[0]
    short = engines.command(dataclasses.replace(run, until_epoch=3))
    assert short == [*engines.command(run), '--until_epoch=3']


# Real runs.


COMMON = [
    *(f'--config={DIGITS}:model=lenet5', '--config.data.image_size=28', '--config.total_epochs=8'),
    '--config.data.validation=True',
]


def _command(workdir, *flags):
    return [
        *(sys.executable, '-m', 'sam_jax.cli.sweep', *COMMON, f'--workdir={workdir}'),
        *('--search=halving', '--factor=2', '--sweep=sam.rho=0,0.1'),
        *('--sweep=optimizer.learning_rate=0.1,1e30', *flags),
    ]


@pytest.mark.slow
def test_no_list_of_commands_of_what_is_not_known_yet(tmp_path):
    done = subprocess.run(
        _command(tmp_path, '--engine=print'),
        env=lean_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2 and '--engine is print, but what' in done.stderr, done.stderr


def _final(workdir):
    with ocp.CheckpointManager(workdir / 'checkpoints') as manager:
        step = manager.latest_step()
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_winner_and_the_winner_is_the_run_of_the_grid(tmp_path):
    """SIGTERM to the search, SIGKILL to a run of a later rung; one setting diverges."""
    environment = lean_environment(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'cache'))
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    done = subprocess.run(
        _command(whole), env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    assert '4 settings, 2 diverged' in done.stdout and done.stdout.count('test error') == 1

    def there(epoch):
        return len(list(killed.glob(f'*/result_at_{epoch}.json')))

    process = subprocess.Popen(_command(killed), env=environment, stderr=subprocess.PIPE)
    wait_until(lambda: there(2) == 1, 900)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 143
    process = subprocess.Popen(_command(killed), env=environment, stdout=subprocess.PIPE)
    wait_until(lambda: there(2) == 2 and training_process('--until_epoch=4'), 900)
    os.kill(training_process('--until_epoch=4'), signal.SIGKILL)
    told = process.communicate(timeout=1200)[0].decode()
    assert process.returncode == 0 and told == done.stdout
    found, expected = (
        json.loads((folder / 'search.json').read_text()) for folder in (killed, whole)
    )
    assert found['winner'] == expected['winner'] and found['rungs'] == expected['rungs']
    assert found['epochs'] == 4 + 8 and found['epochs_of_grid'] == 4 * 8

    rho = found['winner'].partition(',')[0].removeprefix('rho=')
    flags = [f'--config.sam.rho={rho}', '--config.optimizer.learning_rate=0.1']
    subprocess.run(
        [sys.executable, '-m', 'sam_jax.main', *COMMON, f'--workdir={tmp_path / "plain"}', *flags],
        env=environment,
        check=True,
        timeout=1200,
    )
    plain = _final(tmp_path / 'plain')
    for folder in (killed, whole):
        assert_trees_equal(_final(folder / found['winner']).state, plain.state)
