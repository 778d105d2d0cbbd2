"""Launchers of several processes: what they would run; real processes, one of which dies."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import orbax.checkpoint as ocp
import pytest
import quick
from helpers import ROOT, lean_environment, relative_distance, training_process

SCRIPTS = ROOT / 'scripts'


def _launch(script, *arguments, **environment):
    return subprocess.run(
        [str(SCRIPTS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    'n,gpus,shares',
    [(2, '', [None, None]), (2, '0,1,2,3', ['0,1', '2,3']), (1, '5', ['5']), (3, '4,1,0', '410')],
)
def test_dry_run_on_this_machine(n, gpus, shares):
    done = _launch(
        'launch_local.sh',
        n,
        '--dry_run',
        'configs/digits.py:noise=0.4',
        '--workdir=a b',
        '--config.sam.rho=1',
        CUDA_VISIBLE_DEVICES=gpus,
        PORT='1234',
    )
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line.removesuffix('&')) for line in done.stdout.splitlines()]
    for i, (line, share) in enumerate(zip(lines, shares, strict=True)):
        device = f'CUDA_VISIBLE_DEVICES={share}' if share else 'JAX_PLATFORMS=cpu'
        assert line == [
            'env',
            device,
            str(SCRIPTS / 'train.sh'),
            'configs/digits.py:noise=0.4',
            '--workdir=a b',
            '--config.sam.rho=1',
            '--coordinator_address=localhost:1234',
            f'--num_processes={n}',
            f'--process_id={i}',
        ]


@pytest.mark.parametrize(
    'config,name',
    [
        ('digits', 'digits'),
        ('configs/digits.py:noise=0.4', 'digits:noise=0.4'),
        (
            'my/file.py:noise=0.4,labels_from=runs/a/b.npz',
            'file:noise=0.4,labels_from=runs_a_b.npz',
        ),
    ],
)
def test_the_folder_of_a_run_is_named_by_its_config(config, name, tmp_path):
    scripts = tmp_path / 'scripts'
    scripts.mkdir()
    shutil.copy(SCRIPTS / 'train.sh', scripts)
    (scripts / 'environment.sh').write_text('python() { echo "$@"; }\nexec() { "$@"; }\n')
    done = subprocess.run(
        [scripts / 'train.sh', config], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == f'--workdir={tmp_path}/runs/{name}', done.stdout


def test_dry_run_on_slurm(tmp_path):
    done = _launch(
        'launch_slurm.sh',
        '--dry_run',
        '--nodes=4',
        '--gpus_per_node=2',
        '--time=10:00',
        '--partition=fast',
        '--sbatch=--qos=high',
        'configs/imagenet.py:model=resnet50',
        f'--workdir={tmp_path}',
        '--config.data.dir=/data sets',
    )
    assert done.returncode == 0, done.stderr
    options = set(re.findall('#SBATCH (.*)', done.stdout))
    assert options >= {
        '--nodes=4',
        '--ntasks-per-node=1',
        '--gpus-per-node=2',
        '--time=10:00',
        '--requeue',
        '--partition=fast',
        '--qos=high',
        '--signal=B:TERM@120',
        f'--output={tmp_path}/log.txt',
    }
    assert 'export JAX_LOCAL_DEVICE_IDS=0,1\n' in done.stdout
    (line,) = (x for x in done.stdout.splitlines() if x.startswith('srun '))
    assert shlex.split(line)[2:-1] == [
        str(SCRIPTS / 'train.sh'),
        'configs/imagenet.py:model=resnet50',
        f'--workdir={tmp_path}',
        '--config.data.dir=/data sets',
        '--distributed',
    ]
    assert subprocess.run(['bash', '-n'], input=done.stdout, text=True, check=True)


POD = [
    '--name=pod',
    '--zone=z',
    '--type=v4-32',
    '--bucket=gs://b',
    '--repository=https://x/y.git',
    'configs/imagenet.py',
    '--workdir=runs/a',
]


def _words(line):
    """What bash makes of a line; shlex does not know its $'...'."""
    done = subprocess.run(
        ['bash', '-c', f'printf "%s\\0" {line}'], capture_output=True, text=True, check=True
    )
    return done.stdout.split('\0')[:-1]


def test_dry_run_on_a_tpu_pod():
    done = _launch('launch_tpu_pod.sh', '--dry_run', '--spot', *POD, '--config.seed=1')
    assert done.returncode == 0, done.stderr
    create, _, describe, setup, train, delete = map(_words, done.stdout.splitlines())
    assert create[3:] == [
        'queued-resources',
        'create',
        'pod',
        '--node-id=pod',
        '--zone=z',
        '--accelerator-type=v4-32',
        '--runtime-version=tpu-ubuntu2204-base',
        '--spot',
    ]
    assert describe[3:6] == ['queued-resources', 'describe', 'pod']
    assert {'ssh', 'pod', '--worker=all'} <= set(setup) & set(train)
    assert 'gcsfuse' in setup[-1] and 'https://x/y.git' in setup[-1]
    assert train[-1] == (
        '--command=cd sam_jax && ./scripts/train.sh configs/imagenet.py '
        '--config.seed=1 --workdir=/tmp/bucket/runs/a --distributed'
    )
    assert {'delete', '--force'} <= set(delete)


@pytest.mark.parametrize(
    'script,arguments,words',
    [
        ('launch_local.sh', [], 'N is'),
        ('launch_local.sh', ['0'], "N is '0'"),
        ('launch_local.sh', ['configs/digits.py'], "N is 'configs/digits.py'"),
        ('launch_local.sh', ['3'], 'it must divide the number of GPUs, 2'),
        ('launch_slurm.sh', ['configs/digits.py'], '--workdir is missing'),
        ('launch_slurm.sh', ['--nodes=two', '--workdir=x'], "--nodes is 'two'"),
        ('launch_slurm.sh', ['--node=2', '--workdir=x'], "unknown option '--node=2'"),
        ('launch_tpu_pod.sh', POD[1:], '--name is missing'),
        ('launch_tpu_pod.sh', [*POD, '--tpye=x'], "unknown option '--tpye=x'"),
        ('launch_tpu_pod.sh', [*POD, '--workdir=gs://b/x'], 'a folder in the bucket'),
    ],
)
def test_bad_input(script, arguments, words):
    done = _launch(script, *arguments, '--dry_run', CUDA_VISIBLE_DEVICES='0,1')
    assert done.returncode == 2 and words in done.stderr and done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1 and not done.stdout


GCLOUD = """#!/usr/bin/env bash
# Answers as gcloud would: with the next line of `states`, and of `codes` for how a run ends.
cd "$(dirname "$0")"
echo "${*:3:4}" >> calls
case "$*" in
  *describe*)
    state="$(head -n 1 states)"; sed -i 1d states
    case "$state" in
      NONE) echo 'ERROR: NOT_FOUND: no such resource' >&2; exit 1 ;;
      OFFLINE) echo 'ERROR: cannot connect' >&2; exit 1 ;;
      *) echo "$state" ;;
    esac ;;
  *train.sh*) code="$(head -n 1 codes)"; sed -i 1d codes; exit "$code" ;;
esac
"""


def _pod(folder, states, codes, *flags):
    """Runs the launcher with a stand-in for gcloud; returns (process, calls but for questions)."""
    for name, content in (('states', states), ('codes', codes), ('gcloud', GCLOUD)):
        (folder / name).write_text(
            content if isinstance(content, str) else ''.join(f'{x}\n' for x in content)
        )
    (folder / 'gcloud').chmod(0o755)
    done = _launch(
        'launch_tpu_pod.sh',
        *POD,
        *flags,
        POLL_SECONDS='0.01',
        PATH=f'{folder}{os.pathsep}{os.environ["PATH"]}',
    )
    calls = [call.split()[1] for call in (folder / 'calls').read_text().splitlines()]
    return done, [call for call in calls if call != 'describe']


def test_a_preempted_tpu_pod_is_asked_for_again(tmp_path):
    states = [
        'NONE',
        'WAITING_FOR_RESOURCES',
        'OFFLINE',
        'ACTIVE',
        'OFFLINE',
        'SUSPENDED',
        'SUSPENDED',
        'PROVISIONING',
        'ACTIVE',
    ]
    done, calls = _pod(tmp_path, states, [255, 0])
    assert done.returncode == 0, done.stderr
    assert calls == ['create', 'ssh', 'ssh', 'delete', 'create', 'ssh', 'ssh', 'delete']
    assert 'was preempted (SUSPENDED)' in done.stderr


def test_a_run_that_fails_on_a_tpu_pod(tmp_path):
    done, calls = _pod(tmp_path, ['ACTIVE'] * 4, [2, 2])
    assert done.returncode == 2 and 'failed with status 2' in done.stderr
    assert calls == ['ssh'] * 4, 'tried twice, and the slice is kept to look at'


# Two epochs of 32 steps, each of 4 replicas that ascend together.
FLAGS = [
    '--config.batch_size=40',
    '--config.replica_batch_size=10',
    '--config.total_epochs=2',
    '--config.sam.replicas_per_group=4',
    '--config.model.dtype=float64',
    '--config.log_every_steps=8',
    '--config.checkpoint.every_epochs=1',
    '--config.analysis.every_epochs=1',
    '--config.analysis.examples=40',
    '--config.analysis.steps=5',
]


class _Launched:
    """Real processes that hold 4 devices together, and what they have said so far."""

    def __init__(self, n, workdir):
        self.workdir = workdir
        self.log = workdir.parent / f'{workdir.name}.log'
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen(
                [
                    str(SCRIPTS / 'launch_local.sh'),
                    str(n),
                    'configs/digits.py',
                    f'--workdir={workdir}',
                    *FLAGS,
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=lean_environment(
                    workdir.parent,
                    JAX_ENABLE_X64='1',
                    CUDA_VISIBLE_DEVICES='',
                    VIRTUAL_ENV=sys.prefix,
                    PATH=f'{sys.prefix}/bin:{os.environ["PATH"]}',
                    XLA_FLAGS=quick.flags(devices=4 // n, level=1),
                ),
            )

    def wait_for(self, words, seconds=300):
        end = time.time() + seconds
        while words not in self.log.read_text():
            assert self.process.poll() is None and time.time() < end, self.log.read_text()
            time.sleep(0.05)

    def ends(self, status, words, seconds=300):
        assert self.process.wait(seconds) == status, self.log.read_text()
        assert words in self.log.read_text(), self.log.read_text()

    def worker(self, process_id):
        """The number of one of its processes, or None."""
        return training_process(f'--workdir={self.workdir}', f'--process_id={process_id}')


def _arrays(workdir):
    with ocp.CheckpointManager(workdir / 'checkpoints') as manager:
        state = manager.restore(64, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    return {name: x for name, x in state.items() if name.startswith(('params.', 'batch_stats.'))}


@pytest.mark.slow
def test_processes_end_and_others_go_on(tmp_path):
    """2 processes asked to stop, then 1 that finishes: as 1 alone."""
    _Launched(1, tmp_path / 'alone').ends(0, 'Finished.')
    workdir = tmp_path / 'many'
    two = _Launched(2, workdir)
    two.wait_for('step 32: analysis/lambda_max')
    two.process.send_signal(signal.SIGTERM)
    two.ends(143, 'Stopped by SIGTERM at step')
    _Launched(1, workdir).ends(0, 'Resuming at step')
    _assert_same(workdir, tmp_path / 'alone')


def _assert_same(workdir, alone):
    assert relative_distance(_arrays(workdir), _arrays(alone)) < 1e-9
    mixed, expected = (
        [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        for folder in (workdir, alone)
    )
    steps = [line['step'] for line in mixed]
    assert steps == sorted(steps) and steps.count(64) == 3 and len(set(steps)) == 8
    for name in ('lambda_max', 'sharpness', 'gap'):
        measured, alone = (
            [line[f'analysis/{name}'] for line in lines if f'analysis/{name}' in line]
            for lines in (mixed, expected)
        )
        assert len(alone) == 2 and measured == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
def test_processes_end_and_die_and_others_go_on(tmp_path):
    """2 processes asked to stop, then 1, then 4 of which one is killed, then 1: as 1 alone."""
    _Launched(1, tmp_path / 'alone').ends(0, 'Finished.')
    workdir = tmp_path / 'many'
    for n, step in ((2, 8), (1, 24)):
        some = _Launched(n, workdir)
        some.wait_for(f'step {step}/64')
        some.process.send_signal(signal.SIGTERM)
        some.ends(143, 'Stopped by SIGTERM at step', 60)
    assert 'Resuming at step' in some.log.read_text()

    four = _Launched(4, workdir)
    four.wait_for('step 40/64')
    os.kill(four.worker(2), signal.SIGKILL)
    four.ends(137, 'Process 2 of 4 ended with status 137', 60)
    assert 'another task died' in four.log.read_text()
    assert four.worker(0) is None
    _Launched(1, workdir).ends(0, 'Resuming at step 32 of 64')
    _assert_same(workdir, tmp_path / 'alone')
