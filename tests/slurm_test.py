"""The sweep's Slurm engine on a real cluster of one node: ./scripts/test_slurm.sh."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, wait_until

pytestmark = pytest.mark.slurm

NAMES = ['learning_rate=0.1', 'learning_rate=1e30']


def _start(workdir, *flags):
    command = [
        sys.executable,
        '-m',
        'sam_jax.cli.sweep',
        f'--config={ROOT}/configs/digits.py',
        f'--workdir={workdir}',
        '--sweep=optimizer.learning_rate=0.1,1e30',
        '--engine=slurm',
        '--slurm=cpus_per_task=1',
        '--slurm=timeout_min=30',
        '--config.total_epochs=60',
        *flags,
    ]
    return subprocess.Popen(
        command,
        env={**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'},
        stderr=subprocess.PIPE,
        text=True,
    )


def _read(path):
    return path.read_text() if path.exists() else ''


def test_a_job_array_is_preempted_requeued_left_alone_and_found_again(tmp_path):
    log = tmp_path / NAMES[0] / 'log.txt'
    first = _start(tmp_path)
    wait_until(lambda: len(re.findall(r'step \d+/1200', _read(log))) > 5)
    job = _read(tmp_path / NAMES[0] / 'slurm_job')
    first.send_signal(signal.SIGINT)
    output = first.communicate(timeout=60)[1]
    assert first.returncode == (1 if 'failed:' in output else 143), output
    # The second run may have failed already, or not yet.
    assert 'the same command goes on from here' in output and re.search('[12] stopped', output)

    # The cluster takes the node away, as submitit hears of it.
    subprocess.run(['scancel', job, '--signal', 'USR2'], check=True)
    wait_until(lambda: 'Stopped by SIGTERM' in _read(log))
    second = _start(tmp_path)
    output = second.communicate(timeout=300)[1]
    assert second.returncode == 1, output
    assert f'{NAMES[0]}: finished test error' in output
    assert f'failed: {NAMES[1]}' in output and 'not finite' in output
    assert _read(tmp_path / NAMES[0] / 'slurm_job') == job, 'submitted twice'
    assert 'Resuming at step' in _read(log) and 'Finished.' in _read(log)


@pytest.mark.parametrize(
    'flag,words', [('--slurm=color=red', 'color'), ('--slurm=slurm_partition=none', 'none')]
)
def test_what_slurm_does_not_know(flag, words, tmp_path):
    process = _start(tmp_path, flag)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and words in output, output
    assert 'Traceback' not in output


def _launch(workdir, *flags, config='digits.py'):
    """launch_slurm.sh, with two tasks on the one node in place of two nodes; the job's number."""
    done = subprocess.run(
        [
            str(ROOT / 'scripts' / 'launch_slurm.sh'),
            '--nodes=1',
            '--gpus_per_node=0',
            '--cpus_per_task=1',
            '--time=30',
            '--sbatch=--ntasks-per-node=2',
            f'{ROOT}/configs/{config}',
            f'--workdir={workdir}',
            '--config.replica_batch_size=32',
            *flags,
        ],
        env={**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_two_processes_are_told_that_time_is_over_requeued_and_finish(tmp_path):
    job = _launch(tmp_path, '--config.total_epochs=30')
    log = tmp_path / 'log.txt'
    wait_until(lambda: 'step 40/600' in _read(log))
    subprocess.run(['scancel', '--batch', '--signal=TERM', job], check=True)
    wait_until(lambda: 'Stopped by SIGTERM at step' in _read(log))
    wait_until(lambda: 'Finished.' in _read(log), 400)
    assert 'Resuming at step' in _read(log)
    written = json.loads(_read(tmp_path / 'config.json'))
    assert (written['process_count'], written['device_count']) == (2, 2)


def test_two_processes_are_preempted_with_a_grace_period_and_go_on_until_cancelled(tmp_path):
    """An urgent job takes the node; the run saves within GraceTime and goes on behind it."""
    flags = ['--config.data.image_size=28', '--config.total_epochs=1000']
    job = _launch(tmp_path, '--partition=main', *flags, config='digits.py:model=lenet5')
    log = tmp_path / 'log.txt'
    wait_until(lambda: 'step 40/20000' in _read(log), 400)
    _take_the_node()
    wait_until(lambda: 'Stopped by SIGTERM at step' in _read(log), 100)
    step = int(re.search(r'Stopped by SIGTERM at step (\d+)', _read(log))[1])
    resumed = f'Resuming at step {step} of 20000'
    wait_until(lambda: f'step {step + 80 - step % 20}/' in _read(log).partition(resumed)[2], 600)
    assert 'Restarts=1' in _shown(job)
    subprocess.run(['scancel', job], check=True)
    wait_until(lambda: 'JobState=CANCELLED' in _shown(job) and not _queued(job), 100)
    assert 'Restarts=1' in _shown(job), 'what is cancelled does not come back'


def test_a_run_of_a_sweep_is_preempted_with_a_grace_period_and_goes_on_until_cancelled(tmp_path):
    run = tmp_path / NAMES[0]
    log = run / 'log.txt'
    sweep = _start(
        tmp_path,
        '--slurm=slurm_partition=main',
        '--slurm=cpus_per_task=2',
        '--slurm=slurm_array_parallelism=1',
        '--config.total_epochs=1000',
    )
    wait_until(lambda: 'step 40/20000' in _read(log), 400)
    job = _read(run / 'slurm_job')
    _take_the_node()
    wait_until(lambda: 'Stopped by SIGTERM at step' in _read(log), 100)
    step = int(re.search(r'Stopped by SIGTERM at step (\d+)', _read(log))[1])
    wait_until(lambda: f'Resuming at step {step} of 20000' in _read(log), 600)
    subprocess.run(['scancel', job.partition('_')[0]], check=True)
    wait_until(lambda: not _queued(job.partition('_')[0]), 100)
    output = sweep.communicate(timeout=100)[1]
    assert sweep.returncode == 1 and 'CANCELLED' in output, output


def _take_the_node():
    urgent = ['sbatch', '--partition=urgent', '--exclusive', '--output=/dev/null', '--wrap=sleep 5']
    subprocess.run(urgent, check=True, capture_output=True)


def _shown(job):
    return _answer('scontrol', 'show', 'job', job)


def _queued(job):
    return _answer('squeue', '--noheader', f'--jobs={job}')


def _answer(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
