"""Sweeps: their runs and names; the local engine with real processes, some of which die."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, lean_environment, training_process, wait_until

from sam_jax.errors import UserError
from sam_jax.experiments import engines, grid

DIGITS = str(ROOT / 'configs' / 'digits.py')
# A run of a few seconds: 20 steps an epoch.
QUICK = {'total_epochs': 2, 'batch_size': 64, 'replica_batch_size': 64, 'eval.batch_size': 64}


def _make(hyper, flag=DIGITS, overrides=None):
    return grid.make_runs(flag, hyper, overrides or {}, 'DIR')


# Which runs there are.


def test_product_has_every_pair_and_varies_the_last_fastest():
    assert grid.product(
        [
            grid.sweep('config.sam.rho', [1, 2]),
            grid.sweep('seed', 'ab'),
            grid.fixed('total_epochs', 3),
        ]
    ) == [
        {'sam.rho': 1, 'seed': 'a', 'total_epochs': 3},
        {'sam.rho': 1, 'seed': 'b', 'total_epochs': 3},
        {'sam.rho': 2, 'seed': 'a', 'total_epochs': 3},
        {'sam.rho': 2, 'seed': 'b', 'total_epochs': 3},
    ]
    assert grid.product([]) == [{}]


def test_zipit_pairs_and_chainit_appends():
    a, b = grid.sweep('a', [1, 2]), grid.sweep('b', [3, 4])
    assert grid.zipit([a, b]) == [{'a': 1, 'b': 3}, {'a': 2, 'b': 4}]
    assert grid.chainit([a, b]) == [{'a': 1}, {'a': 2}, {'b': 3}, {'b': 4}]
    with pytest.raises(UserError, match='these are 2 of a, 1 of b'):
        grid.zipit([a, b[:1]])
    for combine in (grid.product, grid.zipit):
        with pytest.raises(UserError, match='sets a twice'):
            combine([a, a])
        with pytest.raises(UserError, match='sets a twice'):
            combine([a, grid.sweep(':a', [1, 2])])


def test_sweeps_on_the_command_line():
    assert grid.parse('sam.rho=0,0.05') == [{'sam.rho': '0'}, {'sam.rho': '0.05'}]
    assert grid.parse('sam.rho=0,1; seed=3,4') == [
        {'sam.rho': '0', 'seed': '3'},
        {'sam.rho': '1', 'seed': '4'},
    ]
    assert grid.parse(':model=wrn10_1') == [{':model': 'wrn10_1'}]


@pytest.mark.parametrize('text', ['', 'sam.rho', 'sam.rho=', 'sam.rho=1,,2', '=1', 'seed=1;'])
def test_bad_sweeps_on_the_command_line(text):
    with pytest.raises(UserError, match='must be of the form KEY=VALUE'):
        grid.parse(text)


# The runs.


def test_runs_have_names_settings_and_flags():
    runs = _make(
        grid.product([grid.parse('sam.rho=0.05,1e-3'), grid.sweep(':seed', [7])]),
        f'{DIGITS}:noise=0.4',
        {'total_epochs': 3},
    )
    assert [run.name for run in runs] == ['rho=0.05,seed=7', 'rho=1e-3,seed=7']
    config = runs[1].config
    assert (config.sam.rho, config.seed, config.data.label_noise_seed) == (0.001, 7, 7)
    assert (config.data.label_noise, config.total_epochs) == (0.4, 3)
    assert runs[1].workdir == os.path.join('DIR', 'rho=1e-3,seed=7')
    assert runs[1].flags == (
        f'--config={DIGITS}:noise=0.4,seed=7',
        '--workdir=DIR/rho=1e-3,seed=7',
        '--config.total_epochs=3',
        '--config.sam.rho=1e-3',
    )


def test_settings_have_the_type_of_their_key():
    config = _make(
        [
            {
                'optimizer.nesterov': 'false',
                'checkpoint.keep_epochs': '(1, 2)',
                'sam.p': 'inf',
                'optimizer.learning_rate': 1,
                'model.dropout_rate': '0.5',
            }
        ]
    )[0].config
    assert config.optimizer.nesterov is False and config.checkpoint.keep_epochs == (1, 2)
    assert config.sam.p == float('inf') and config.model.dropout_rate == 0.5
    assert config.optimizer.learning_rate == 1.0


def test_names_are_short_where_that_is_clear_and_safe_as_folders():
    runs = _make([{'sam.warmup_epochs': 1, 'optimizer.warmup_epochs': 2, 'data.dir': '/a b/c'}])
    assert runs[0].name == 'sam.warmup_epochs=1,optimizer.warmup_epochs=2,dir=_a_b_c'
    assert _make([{}])[0].name == 'run'


@pytest.mark.parametrize(
    'hyper,words',
    [
        ([], ['no runs']),
        ([{'sam.rho': 1}, {'sam.rho': 1}], ['rho=1', 'the same']),
        ([{'sam.rho': 1}, {'sam.roh': 2}], ['Run roh=2', 'Unknown config key sam.roh', 'sam.rho']),
        ([{'sam.rho': 'x'}], ["Run rho=x: sam.rho is 'x'", 'float']),
        ([{'seed': '1.5'}], ["seed is '1.5'", 'int']),
        ([{'optimizer.nesterov': 'maybe'}], ["'maybe'", 'bool']),
        ([{'checkpoint.keep_epochs': '(1'}], ["'(1'", 'tuple']),
        ([{'seed': True}], ['seed is True', 'int']),
        ([{'sam.rho': -1.0}], ['Run rho=-1.0', 'at least 0']),
        ([{':modle': 'x'}], ['Run modle=x', "'modle'"]),
        ([{':model': 'wrn11_1'}], ['Run model=wrn11_1', 'depth']),
    ],
)
def test_bad_runs_are_refused_before_any_starts(hyper, words):
    with pytest.raises(UserError) as e:
        _make(hyper)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert str(e.value).endswith('.')


@pytest.mark.parametrize(
    'hyper,overrides,words',
    [
        (grid.sweep(':seed', range(3)), {'seed': 7}, 'seed is set to 7 in both'),
        (grid.parse(':rho=0.1,0.2'), {'sam.rho': 0.5}, 'sam.rho is set to 0.5 in both'),
        (
            grid.product([grid.parse(':rho=0.1,0.2'), grid.parse('sam.rho=0.5')]),
            {},
            'sam.rho is set to 0.5 in both',
        ),
        (grid.parse('sam.rho=0.1,0.10'), {}, 'mean the same'),
    ],
)
def test_runs_of_two_names_that_are_the_same_are_refused(hyper, overrides, words):
    with pytest.raises(UserError, match=f'^Runs .* and .* are the same: .*{words}.*[.]$'):
        _make(hyper, overrides=overrides)


def test_seeds_of_noise_tell_runs_apart_where_there_is_noise():
    runs = _make(grid.sweep(':seed', range(2)), f'{DIGITS}:noise=0.4', {'seed': 7})
    assert [run.config.data.label_noise_seed for run in runs] == [0, 1]


# The command.


def _command(workdir, *flags, config=DIGITS):
    settings = [f'--config.{key}={value}' for key, value in QUICK.items()]
    return [
        sys.executable,
        '-m',
        'sam_jax.cli.sweep',
        f'--config={config}',
        f'--workdir={workdir}',
        *settings,
        *flags,
    ]


def _environment():
    return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}


def _sweep(workdir, *flags, **config):
    return subprocess.run(
        _command(workdir, *flags, **config),
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_get_hyper_of_a_config_and_printed_commands(tmp_path):
    file = tmp_path / 'mine.py'
    file.write_text(
        'from configs import digits\n\n\n'
        'def get_config(arg=""):\n    return digits.get_config(arg)\n\n\n'
        'def get_hyper(h):\n'
        '    return h.product([h.sweep("config.sam.rho", [0.1, 0.2]), h.fixed("sam.p", 3.0)])\n'
    )
    watched = ['--tracker=tensorboard,wandb', '--hang_minutes=60']
    done = _sweep(tmp_path / 'out', '--seeds=2', '--engine=print', *watched, config=file)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[4].rpartition('/')[2] for line in lines] == [
        f'rho={rho},p=3.0,seed={seed}' for rho in (0.1, 0.2) for seed in (0, 1)
    ]
    assert lines[3][1:4] == ['-m', 'sam_jax.main', f'--config={file}:seed=1']
    assert {'--config.sam.rho=0.2', '--config.sam.p=3.0', '--config.total_epochs=2'} <= set(
        lines[3]
    )
    assert lines[3][-2:] == ['--tracker=tensorboard,wandb', '--hang_minutes=60.0']
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'flags,words',
    [
        (['--sweep=sam.rho=1'], 'must name the folder of the sweep'),
        (['--workdir=DIR'], 'Nothing is swept'),
        (['--workdir=DIR', '--sweep=sam.rho=1', '--tracker=wandbb'], "--tracker has 'wandbb'"),
        (['--workdir=DIR', '--sweep=sam.rho'], 'must be of the form'),
        (['--workdir=DIR', '--sweep=sam.roh=1'], 'Unknown config key sam.roh'),
        (['--workdir=DIR', '--sweep=sam.rho=1', '--config.bathc_size=1'], 'bathc_size'),
        (['--workdir=DIR', '--sweep=sam.rho=1', '--engine=cloud'], 'engine'),
        (['--workdir=DIR', '--sweep=sam.rho=1', '--engine=slurm', '--slurm=x'], 'NAME=VALUE'),
    ],
)
def test_bad_flags(flags, words, tmp_path):
    done = _sweep('', *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    'parallel,fraction,gpus', [(2, None, '45'), (3, '0.400', '454'), (8, '0.200', '45454545')]
)
def test_runs_share_gpus_and_their_memory(parallel, fraction, gpus):
    slots = [engines._slot(slot, parallel, ['4', '5'])[0] for slot in range(parallel)]
    assert ''.join(slot['CUDA_VISIBLE_DEVICES'] for slot in slots) == gpus
    assert {slot.get('XLA_PYTHON_CLIENT_MEM_FRACTION') for slot in slots} == {fraction}


@pytest.mark.slow
def test_a_sweep_survives_kills_and_names_what_failed(tmp_path):
    """SIGTERM to the sweep, SIGKILL to a run, one that diverges; finished ones are not repeated."""
    flags = ['--sweep=optimizer.learning_rate=0.1,0.2,1e30', '--parallel=2']
    names = [f'learning_rate={x}' for x in ('0.1', '0.2', '1e30')]
    command = _command(
        tmp_path, *flags, '--config.total_epochs=20', '--config.checkpoint.every_epochs=1'
    )

    def begin():
        return subprocess.Popen(
            command, env=lean_environment(tmp_path), stderr=subprocess.PIPE, text=True
        )

    def steps(name):
        try:
            return (tmp_path / name / 'metrics.jsonl').read_text().count('"step"')
        except OSError:
            return 0

    process = begin()
    wait_until(lambda: steps(names[1]) > 2)  # the first may be further, or at its end
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and 'Stopped; the same command goes on' in output, output
    assert not any(training_process(f'--workdir={tmp_path / name}') for name in names)
    assert 'Stopped by SIGTERM' in (tmp_path / names[1] / 'log.txt').read_text()

    process = begin()
    flag = f'--workdir={tmp_path / names[1]}'
    wait_until(
        lambda: (
            training_process(flag)
            and 'Resuming at step' in (tmp_path / names[1] / 'log.txt').read_text()
        )
    )
    os.kill(training_process(flag), signal.SIGKILL)
    output = process.communicate(timeout=200)[1]
    assert process.returncode == 1, output
    assert f'failed: {names[2]}: status 2: ' in output and 'not finite' in output
    assert '2 finished, 1 failed' in output
    assert len(re.findall('Resuming at step', (tmp_path / names[1] / 'log.txt').read_text())) == 2
    results = [tmp_path / name / 'result.json' for name in names]
    assert [r.exists() for r in results] == [True, True, False]
    assert json.loads(results[1].read_text())['step'] == 400

    before = [r.stat().st_mtime_ns for r in results[:2]]
    process = begin()
    output = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and f'{names[2]}: running' in output
    assert f'{names[0]}: finished test error' in output and f'{names[0]}: running' not in output
    assert [r.stat().st_mtime_ns for r in results[:2]] == before

    changed = _sweep(tmp_path, *flags, '--config.total_epochs=21')
    assert changed.returncode == 2 and 'total_epochs (was 20, now 21)' in changed.stderr


def test_a_run_in_use_is_not_started_twice(tmp_path):
    folder = tmp_path / 'seed=0'
    folder.mkdir()
    with open(folder / 'log.txt', 'a') as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        done = _sweep(tmp_path, '--seeds=1')
    assert done.returncode == 1 and 'in use by another process' in done.stderr, done.stderr


def _made_up(folder, names, command, monkeypatch):
    """Runs of which each is a command of the shell, in its folder."""
    monkeypatch.setattr(
        engines, 'command', lambda run: ['sh', '-c', f'cd {run.workdir}; {command}']
    )
    return [grid.Run(name, str(folder / name), None, ()) for name in names]


def test_a_run_that_cannot_start_does_not_end_the_sweep(tmp_path, monkeypatch):
    (tmp_path / 'a').write_text('no folder')
    finish = """echo '{"test/error_rate": 0.5}' > result.json"""
    runs = _made_up(tmp_path, 'abc', finish, monkeypatch)
    statuses = engines.execute(engines.Local(1, retries=0), runs)
    assert [statuses[name].state for name in 'abc'] == ['failed', 'finished', 'finished']
    assert statuses['a'].line == f'{tmp_path / "a"}: File exists.'


def test_an_error_of_the_sweep_itself_leaves_no_runs_behind(tmp_path, monkeypatch):
    runs = _made_up(tmp_path, 'ab', 'touch begun; exec sleep 100', monkeypatch)

    def break_down(display):
        wait_until((tmp_path / 'a' / 'begun').exists)
        raise RuntimeError('the terminal is gone')

    monkeypatch.setattr(engines.Display, 'update', break_down)
    engine = engines.Local(1, retries=0)
    with pytest.raises(RuntimeError, match='the terminal is gone'):
        engines.execute(engine, runs)
    wait_until(lambda: not engine.working())
    assert not (tmp_path / 'b').exists()


@pytest.mark.slow
def test_a_sweep_compiles_once(tmp_path):
    """rho, learning rate, weight decay and seed are arguments of one compiled program."""
    environment = {
        **_environment(),
        'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    contents = []
    for sweep in (
        'sam.rho=0.1',
        'sam.rho=0.2;optimizer.learning_rate=0.05;optimizer.weight_decay=0.001;seed=3',
    ):
        subprocess.run(
            _command(tmp_path / 'runs', f'--sweep={sweep}', '--config.total_epochs=1'),
            env=environment,
            capture_output=True,
            check=True,
            timeout=120,
        )
        contents.append({p.name for p in (tmp_path / 'cache').glob('*-cache')})
    assert contents[0] and contents[0] == contents[1]


BUDGETS = """
from sam_jax import errors, sharpness
from sam_jax.benchmarks import methods

assert methods.epochs_of('sgd', 20, 'gradients') == 40
assert methods.epochs_of('second_order_sam', 20, 'gradients') == 10
assert methods.epochs_of('second_order_sam', 1000, 'epochs') == 1000
for name in sharpness.METHODS:
    epochs = methods.epochs_of(name, 1000, 'gradients')
    assert abs(epochs * methods.gradients_a_step(name) / 2000 - 1) < 0.01, name
task = 'fashion_mnist:small,fraction=0.1,noise=0.4'
told = methods.make_run('gsam', 0.1, 3, 'runs', 7, task).config
assert (told.total_epochs, told.data.fraction, told.sam.method) == (7, 0.1, 'gsam')


class Made:
    done = {}

    def __init__(self, value, seed):
        self.name = f'{value},{seed}'

    def result(self):
        return self.done.get(self.name)


def names(method):
    return [run.name for run in method.next_runs()]


sam = methods.Method('sam', 'runs', 20, task, 0.1)
sam._run = Made
assert names(sam) == ['0.05,0', '0.1,0', '0.2,0']
Made.done = {f'{rho},0': {'validation/error_rate': rho} for rho in (0.05, 0.1)}
assert names(sam) == ['0.2,0']
diverged = f'status 2: error: The loss {errors.NOT_FINITE} 7.'
sam.failures['0.2,0'] = diverged
assert names(sam) == ['0.025,0']  # the best was at an end
sam.failures['0.025,0'] = diverged
assert names(sam) == [f'0.05,{seed}' for seed in (1, 2, 3, 4)] and not sam.lost()
sam.failures['0.05,3'] = diverged
assert names(sam) == [] and sam.lost() == diverged
Made.done = {}
lost = methods.Method('sam_on', 'runs', 20, task, 2.0)
lost._run = Made
lost.failures = dict.fromkeys(names(lost), diverged)
assert names(lost) == [] and lost.lost() == diverged
# Of a value with which a run broke nothing is known: no other is chosen in its place.
Made.done = {f'{rho},0': {'validation/error_rate': rho} for rho in (0.05, 0.1)}
broken = methods.Method('sam', 'runs', 20, task, 0.1)
broken._run = Made
broken.failures['0.2,0'] = 'status 1: the disk is full'
assert names(broken) == [] and broken.lost() == 'status 1: the disk is full'
assert methods.start_of('random_sam', 0.1)[1] == (0.1, 0.2, 0.5, 1.0, 2.0)
assert methods.start_of('saf', 0.1) == ('sam.lam', (0.1, 0.3, 1.0))
"""


def test_a_budget_of_gradients_and_a_search_in_which_runs_fail():
    """Each method takes the gradients of SAM's epochs; in a process, since commands share flags."""
    done = subprocess.run(
        [sys.executable, '-c', BUDGETS], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
