"""A few random cases of each kind; `python scripts/fuzz.py` runs as many as there is time for.

What it has found is in errors_test.py and untrusted_test.py, a test each.
"""

import os
import subprocess
import sys

import hypothesis
import jax
import pytest
from fuzzing import OUTCOMES, Fault, check_sentence, commands, configs, files, training
from helpers import ROOT

from sam_jax import settings
from sam_jax.data import decode


def _run(cases, check, number):
    """The same cases at each call; the outcomes."""
    OUTCOMES.clear()
    options = hypothesis.settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    options(hypothesis.given(cases)(lambda case: check(case)))()
    return dict(OUTCOMES)


def test_settings():
    found = _run(configs.cases(), configs.check, 40)
    assert found['refused'] >= 5 and found['accepted'] >= 5


@pytest.fixture
def without_tensorflow(monkeypatch):
    """It takes seconds to be imported; scripts/fuzz.py has images decoded by it."""
    monkeypatch.setattr(decode, 'has_tensorflow', lambda: False)


def test_files(without_tensorflow):
    found = _run(files.cases(), files.check, 50)
    assert found['refused'] >= 10 and found['read'] >= 1


def test_files_without_damage_are_read(without_tensorflow):
    for name in ('idx', 'idx.gz', 'npz-packed', 'labels', 'run', 'image-png', 'weights-own.npz'):
        OUTCOMES.clear()
        whole = {'form': name, 'damages': [], 'changes': [], 'file': 'config.json'}
        files.check(whole)
        assert OUTCOMES == {'read': 1}, name


def test_faults_are_seen(monkeypatch):
    for message in (
        'short.',
        'two\nlines of text.',
        'Traceback (most recent call last).',
        'no end',
    ):
        with pytest.raises(Fault):
            check_sentence(message)
    case = {'model': 'lenet5', 'method': 'sgd', 'devices': 1, 'changes': {}, 'without': []}
    monkeypatch.setattr(settings, 'check', lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        configs.check(case)


ISOLATED = """
import os, sys
from fuzzing import OUTCOMES, Fault, isolated

def ends(kind):
    while kind == 'hangs':
        pass
    if kind == 'dies':
        os.abort()
    if kind == 'raises':
        raise ValueError('what is raised')
    OUTCOMES['well'] += 1

assert isolated.call(ends, 'well', 60) == {'well': 1} and not OUTCOMES
for kind, word in (('hangs', 'hangs'), ('dies', 'died'), ('raises', 'ValueError: what is raised')):
    try:
        isolated.call(ends, kind, 0.5 if kind == 'hangs' else 60)
        sys.exit(kind)
    except Fault as e:
        assert word in str(e), e
"""


def test_a_process_of_its_own():
    subprocess.run(
        [sys.executable, '-c', ISOLATED],
        env={**os.environ, 'PYTHONPATH': str(ROOT / 'tests')},
        check=True,
        timeout=120,
    )


KILLED = """
import os, time
from fuzzing import isolated

def says_who_it_is(case):
    print(os.getpid(), flush=True)
    time.sleep(600)

isolated.call(says_who_it_is, {}, 600)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='a process dies with its parent on Linux')
def test_a_process_of_its_own_does_not_outlive_the_campaign():
    with subprocess.Popen(
        [sys.executable, '-c', KILLED],
        env={**os.environ, 'PYTHONPATH': str(ROOT / 'tests')},
        stdout=subprocess.PIPE,
        text=True,
    ) as campaign:
        campaign.stdout.readline()
        campaign.kill()
        said, _ = campaign.communicate(timeout=30)  # until nobody holds the pipe any more
        assert not said


@pytest.mark.slow
def test_traces():
    _run(configs.cases(wild=0, of=configs.TINY), lambda case: configs.check(case, trace=True), 10)


@pytest.mark.slow
@pytest.mark.parametrize('method,dtype', [('sam', 'float64'), ('looksam', 'bfloat16')])
def test_training(method, dtype):
    OUTCOMES.clear()
    training.check(training.minimal(method, **{'model.dtype': dtype}))
    assert OUTCOMES == {'trained': 1}
    jax.clear_caches()


@pytest.mark.slow
def test_commands():
    found = _run(commands.cases(), commands.check, 40)
    assert found['refused'] >= 10
