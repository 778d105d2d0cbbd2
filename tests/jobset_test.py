"""The manifest of a JobSet: against the schema of its cluster, and played with real processes."""

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time

import kubelet
import orbax.checkpoint as ocp
import pytest
from helpers import GOLDEN, ROOT, assert_trees_equal, free_port, lean_environment

from sam_jax.errors import UserError
from sam_jax.targets import hardware, jobset

SCHEMA = json.loads((GOLDEN / 'jobset_v1alpha2.json').read_text())['schema']
TYPES = {
    'object': dict,
    'array': list,
    'string': str,
    'integer': int,
    'boolean': bool,
    'number': (int, float),
}


def _manifest(target='gpu:h100:2x8', name='run', arguments=('--config=digits',), **others):
    hosts = jobset.hosts_of(target)
    return jobset.manifest(name, 'image:1', hosts, arguments, **{'claim': 'disk', **others})


def _faults(value, schema, path='it'):
    """What the API server would say of a value: unknown fields as kubectl's strict check does."""
    kinds = schema.get('type', [])
    kinds = tuple(TYPES[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds))
    if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
        return [f'{path} is {value!r}, not of type {schema["type"]}']
    found = []
    if 'enum' in schema and value not in schema['enum']:
        found.append(f'{path} is {value!r}, not one of {schema["enum"]}')
    if 'pattern' in schema and not re.search(schema['pattern'], str(value)):
        found.append(f'{path} is {value!r}, not of the form {schema["pattern"]}')
    if isinstance(value, dict):
        found += [f'{path} has no {key}' for key in schema.get('required', ()) if key not in value]
        known, others = schema.get('properties'), schema.get('additionalProperties')
        for key, x in value.items():
            if known and key in known:
                found += _faults(x, known[key], f'{path}.{key}')
            elif others:
                found += _faults(x, others, f'{path}.{key}')
            elif known:
                found.append(f'{path} has the unknown field {key}')
    if isinstance(value, list) and 'items' in schema:
        for i, x in enumerate(value):
            found += _faults(x, schema['items'], f'{path}[{i}]')
    return found


@pytest.mark.parametrize('target', ['tpu:v5e:4x4', 'tpu:v4:2x2x1', 'gpu:h100:8', 'gpu:h100:2x8'])
def test_the_cluster_would_take_it(target):
    made = _manifest(target, selector={'pool': 'mine'})
    assert _faults(made, SCHEMA) == []
    json.dumps(made)  # nothing but what YAML has


def _set(made, path, value):
    *way, last = re.findall(r'\w+', path)
    for key in way:
        made = made[int(key) if key.isdigit() else key]
    if value is None:
        del made[last]
    else:
        made[last] = value


POD = 'spec.replicatedJobs.0.template.spec.template.spec'


@pytest.mark.parametrize(
    'path,value,words',
    [
        ('spec.failurePolicy.maxRestart', 1, 'unknown field maxRestart'),
        ('spec.failurePolicy.maxRestarts', '3', 'not of type integer'),
        ('spec.failurePolicy.rules.0.action', 'Restart', "'Restart', not one of"),
        ('spec.replicatedJobs.0.template', None, 'has no template'),
        ('spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.action', None, 'no action'),
        (f'{POD}.grace', 1, 'unknown field grace'),
        (f'{POD}.containers.0.env.0.valueFrom.fieldRef.fieldPath', None, 'has no fieldPath'),
        (f'{POD}.containers.0.resources.limits', {'a': 'eight'}, 'not of the form'),
    ],
)
def test_the_check_of_the_schema_can_fail(path, value, words):
    made = json.loads(json.dumps(_manifest()))
    _set(made, path, value)
    faults = _faults(made, SCHEMA)
    assert len(faults) == 1 and words in faults[0], faults


@pytest.mark.parametrize(
    'target,number,devices,label',
    [
        ('tpu:v5e:1x1', 1, 1, 'tpu-v5-lite-podslice'),
        ('tpu:v5e:2x4', 1, 8, 'tpu-v5-lite-podslice'),
        ('tpu:v5e:16x16', 64, 4, 'tpu-v5-lite-podslice'),
        ('tpu:v6e:4x8', 8, 4, 'tpu-v6e-slice'),
        ('tpu:v4:2x2x1', 1, 4, 'tpu-v4-podslice'),
        ('tpu:v5p:2x4x4', 8, 4, 'tpu-v5p-slice'),
        ('tpu:v5p:4x4x12', 48, 4, 'tpu-v5p-slice'),
        ('gpu:h200:8', 1, 8, None),
        ('gpu:h100:16x8', 16, 8, None),
    ],
)
def test_hosts_of_a_target(target, number, devices, label):
    hosts = jobset.hosts_of(target)
    assert (hosts.number, hosts.devices) == (number, devices)
    assert hosts.selector.get('cloud.google.com/gke-tpu-accelerator') == label
    job = _manifest(target)['spec']['replicatedJobs'][0]['template']['spec']
    assert job['parallelism'] == job['completions'] == number
    (limit,) = job['template']['spec']['containers'][0]['resources']['limits'].values()
    assert limit == devices


def test_eight_chips_are_one_host_or_two():
    assert jobset.hosts_of('tpu:v6e:2x4', 2)[:2] == (2, 4)
    assert set(hardware.EIGHT_ON_A_HOST) == {'v5e:2x4', 'v6e:2x4'}


@pytest.mark.parametrize(
    'target,number,words',
    [
        ('tpu:v5e:4x4', 3, '--hosts is 3; tpu:v5e:4x4 has 4.'),
        ('tpu:v5e:2x4', 4, '--hosts is 4; tpu:v5e:2x4 has 1 or 2.'),
        ('gpu:h100:2x8', 4, '--hosts is 4; gpu:h100:2x8 has 2.'),
        ('tpu:v5e:3x4', 0, 'the shape of a v5e must be one of 1x1, 2x2'),
        ('tpu:v5e:4x4x4', 0, 'the shape of a v5e must be'),
        ('tpu:v4:4x4', 0, 'the shape of a v4 must be 2x2x1'),
        ('tpu:v4:4x2x4', 0, 'three multiples of 4 in order'),
        ('tpu:v4:4x4x20', 0, 'up to 12x16x16'),
        ('tpu:v3:2x2', 0, 'it must be tpu:KIND:SHAPE'),
        ('gpu:h100:2x2x8', 0, 'it must say how many a host has'),
        ('gpu:h100:0x8', 0, 'it must say how many a host has'),
        ('cpu:1', 0, 'it must be tpu:KIND:SHAPE'),
        ('', 0, "--target is ''"),
    ],
)
def test_hosts_that_are_not_there(target, number, words):
    with pytest.raises(UserError) as e:
        jobset.hosts_of(target, number)
    assert words in str(e.value) and str(e.value).endswith('.')


@pytest.mark.parametrize('name', ['', 'Run', '1run', 'run-', 'a_b', 'a' * 53])
def test_names_that_kubernetes_refuses(name):
    with pytest.raises(UserError, match='--name is .* at most 52 lower-case letters'):
        _manifest(name=name)


def _container(made):
    return made['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers'][
        0
    ]


def test_each_pod_is_told_which_process_it_is():
    first, *joining = _container(_manifest(name='rn'))['args']
    assert first == '--config=digits' and joining == [
        '--coordinator_address=rn-worker-0-0.rn:8476',
        '--num_processes=2',
        '--process_id=$(PROCESS_ID)',
    ]
    assert _container(_manifest('tpu:v5e:4x4'))['args'][1:] == ['--distributed']
    assert _container(_manifest('gpu:h100:8'))['args'][1:] == []
    assert _container(_manifest('tpu:v5e:2x2'))['args'][1:] == []
    assert _container(_manifest(arguments=['--config.data.dir=$(HOME)']))['args'][0].endswith(
        '$$(HOME)'
    )


def _command(*flags):
    return subprocess.run(
        [sys.executable, '-m', 'sam_jax.cli.jobset', *flags],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )


@pytest.mark.slow
def test_the_command():
    import yaml

    done = _command(
        *('--name=run', '--image=i:1', '--target=tpu:v5e:4x4', '--claim=disk'),
        *('--workdir=/data/run', '--config=cifar:smoke', '--config.sam.rho=0.2'),
        *('--grace_seconds=25', '--node_selector=cloud.google.com/gke-spot=true'),
        *('--hang_minutes=45', '--tracker='),
    )
    assert done.returncode == 0, done.stderr
    made = yaml.safe_load(done.stdout)
    assert _faults(made, SCHEMA) == []
    assert _container(made)['args'] == [
        *('--config=cifar:smoke', '--workdir=/data/run', '--config.sam.rho=0.2'),
        *('--tracker=', '--hang_minutes=45.0', '--distributed'),
    ]
    pod = made['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
    assert pod['terminationGracePeriodSeconds'] == 25
    assert pod['nodeSelector'] == {
        'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
        'cloud.google.com/gke-tpu-topology': '4x4',
        'cloud.google.com/gke-spot': 'true',
    }


# A cluster of this machine.


def verdict(made, code, disrupted):
    """What Kubernetes makes of a pod that failed: (reason of its Job, action of the JobSet)."""
    job = made['spec']['replicatedJobs'][0]['template']['spec']
    reason = 'BackoffLimitExceeded'
    for rule in job['podFailurePolicy']['rules']:
        exits, conditions = rule.get('onExitCodes'), rule.get('onPodConditions', [])
        if (exits and code in exits['values']) or (
            disrupted and {'type': 'DisruptionTarget', 'status': 'True'} in conditions
        ):
            reason = 'PodFailurePolicy'
            break
    for rule in made['spec']['failurePolicy']['rules']:
        if reason in rule['onJobFailureReasons']:
            return reason, rule['action']
    return reason, 'RestartJobSet'


@pytest.mark.parametrize(
    'code,disrupted,action',
    [
        (143, False, 'RestartJobSetAndIgnoreMaxRestarts'),
        (143, True, 'RestartJobSetAndIgnoreMaxRestarts'),
        (137, True, 'RestartJobSetAndIgnoreMaxRestarts'),
        (137, False, 'RestartJobSet'),
        (2, False, 'RestartJobSet'),
    ],
)
def test_preemptions_are_no_failures(code, disrupted, action):
    assert verdict(_manifest(), code, disrupted)[1] == action


class _Cluster:
    """Plays JobSet and kubelet on this machine, as far as the manifest says."""

    def __init__(self, made, folder):
        self.made, self.log = made, folder.parent / f'{folder.name}.log'
        self.processes = multiprocessing.get_context('forkserver')
        self.processes.set_forkserver_preload(kubelet.PRELOADED)
        job = made['spec']['replicatedJobs'][0]['template']['spec']
        self.number = job['completions']
        self.grace = job['template']['spec']['terminationGracePeriodSeconds']
        self.restarts, self.counted, self.lost = 0, 0, None
        self.log.touch()

    def start(self):
        address = f'localhost:{free_port()}'
        self.lost, self.pods = None, []
        for index in range(self.number):
            words = [
                re.sub(r'[\w-]+-0-0\.[\w-]+:\d+', address, a).replace('$(PROCESS_ID)', str(index))
                for a in _container(self.made)['args']
            ]
            self.pods.append(self.processes.Process(target=kubelet.pod, args=(words, self.log)))
            self.pods[-1].start()

    def take(self, index, how):
        """A pod is 'preempted' (SIGTERM), its 'node' is taken away, or it is 'killed'."""
        self.lost, self.gone_at = how, (time.time() + self.grace, index)
        signals = {'preempted': signal.SIGTERM}
        os.kill(self.pods[index].pid, signals.get(how, signal.SIGKILL))

    def ended(self):
        """Whether the Job is over: a pod has failed, or all have ended."""
        if self.lost and time.time() > self.gone_at[0]:
            self.pods[self.gone_at[1]].kill()  # it did not go, as one that starts may not
        codes = [pod.exitcode for pod in self.pods]
        return any(codes) or all(code == 0 for code in codes)

    def finish(self):
        """Ends the pods that are left. Returns whether the run is done; else it starts again."""
        codes = [pod.exitcode for pod in self.pods]
        if codes == [0] * self.number:
            return True
        first = next(code for code in codes if code)
        action = verdict(self.made, 128 - first if first < 0 else first, self.lost == 'node')[1]
        self.end()
        self.restarts += 1
        self.counted += action == 'RestartJobSet'
        assert self.counted <= self.made['spec']['failurePolicy']['maxRestarts'], self.said()
        self.start()
        return False

    def end(self):
        for pod in self.pods:
            pod.terminate()
        deadline = time.time() + self.grace
        for pod in self.pods:
            pod.join(max(0.1, deadline - time.time()))
            pod.kill()
            pod.join()

    def said(self):
        return self.log.read_text()[-8000:]


def _steps(workdir):
    path = workdir / 'metrics.jsonl'
    return path.read_text().count('"train/loss"') if path.exists() else 0


def _lines(workdir):
    return [
        {k: v for k, v in json.loads(line).items() if k != 'time' and 'perf/' not in k}
        for line in (workdir / 'metrics.jsonl').read_text().splitlines()
    ]


def _arrays(workdir):
    with ocp.CheckpointManager(workdir / 'checkpoints') as manager:
        step = manager.latest_step()
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))


def _campaign(tmp_path, processes, seconds, epochs, seed=0):
    """An undisturbed run and one that loses pods at random for so long; their ends are equal."""
    clusters = {}
    for name in ('undisturbed', 'disturbed'):
        arguments = [
            *(
                '--config=digits:model=lenet5',
                f'--workdir={tmp_path / name}',
                f'--config.total_epochs={epochs}',
            ),
            *('--config.batch_size=64', f'--config.replica_batch_size={64 // processes}'),
            *('--config.log_every_steps=2', '--config.checkpoint.every_epochs=1'),
            *('--config.eval.every_epochs=0', '--config.data.image_size=28'),
        ]
        made = _manifest(
            f'gpu:h100:{processes}x1', arguments=arguments, grace_seconds=20, retries=1000
        )
        clusters[name] = _Cluster(made, tmp_path / name)
    rng, taken = random.Random(seed), []
    for name, cluster in clusters.items():
        began = time.time()
        print(f'{name} begins', file=sys.stderr)
        cluster.start()
        try:
            for turn in itertools.count():
                seen, wanted = _steps(tmp_path / name), rng.randint(1, 20)
                while not cluster.ended():
                    time.sleep(0.05)
                    seen = min(seen, _steps(tmp_path / name))  # resumed from before
                    disturb = name == 'disturbed' and (
                        time.time() - began < seconds or len(taken) < 3
                    )
                    # At some step, and now and then before the first one, while pods start.
                    due = _steps(tmp_path / name) - seen >= wanted or (
                        turn % 3 == 2 and rng.random() < 0.005
                    )
                    if disturb and due and not cluster.lost:
                        taken.append(rng.choice(['preempted', 'node', 'killed']))
                        index = rng.randrange(processes)
                        print(f'{time.time() - began:.0f} s: {taken[-1]} {index}', file=sys.stderr)
                        cluster.take(index, taken[-1])
                if cluster.finish():
                    break
        finally:
            cluster.end()
        print(f'{name} took {time.time() - began:.0f} s', file=sys.stderr)
    assert clusters['undisturbed'].restarts == 0
    disturbed = clusters['disturbed']
    assert len(taken) >= 3 and len(taken) >= disturbed.restarts >= 1, taken
    assert 'Resuming at step' in disturbed.log.read_text()
    assert_trees_equal(
        _arrays(tmp_path / 'disturbed').state, _arrays(tmp_path / 'undisturbed').state
    )
    assert _lines(tmp_path / 'disturbed') == _lines(tmp_path / 'undisturbed')
    print(
        f'{processes} processes, {len(taken)} lost, {disturbed.restarts} restarts', file=sys.stderr
    )
    return disturbed, taken


@pytest.mark.slow
def test_sixteen_processes_that_come_and_go_end_bit_identical(tmp_path, monkeypatch):
    """MINUTES=10 ./scripts/test.sh -m slow tests/jobset_test.py; by default two minutes."""
    minutes = float(os.environ.get('MINUTES', '2'))
    for name, value in lean_environment(
        tmp_path,
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'cache'),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
    ).items():
        monkeypatch.setenv(name, value)
    paths = [os.environ['PYTHONPATH'], str(ROOT), str(ROOT / 'tests')]
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(paths))
    _campaign(tmp_path, 16, 60 * minutes, epochs=max(8, round(3 * minutes)))
