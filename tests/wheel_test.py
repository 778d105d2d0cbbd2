"""The package as users have it: a wheel, an environment, an empty folder, and no checkout."""

import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tomllib

import pytest
from helpers import QUICK_TO_COMPILE, ROOT

import sam_jax

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
COMMANDS = PROJECT['scripts']


def _lines(name):
    lines = (line.partition('#')[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {line.replace('"', "'") for line in lines if line and not line.startswith('-')}


def test_requirements_are_those_of_the_package():
    optional = PROJECT['optional-dependencies']
    assert _lines('requirements.txt') == {*PROJECT['dependencies'], *optional['tf']}
    assert _lines('requirements-test.txt') == {*optional['test']} - {'sam_jax[tf]'}
    assert _lines('requirements-docs.txt') == {*optional['docs']}


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """An environment with the wheel alone, and what this one has of other packages."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    listed = subprocess.run(
        ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip('not a git checkout')
    for name in filter(None, listed.stdout.split('\0')):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    python = folder / 'env' / 'bin' / 'python'
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
    for command in (
        [*pip, 'wheel', '--quiet', '--no-deps', '--wheel-dir', folder, source],
        [sys.executable, '-m', 'venv', '--without-pip', folder / 'env'],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob('*.whl')
    site = pathlib.Path(
        subprocess.run(
            [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    (site / 'others.pth').write_text(sysconfig.get_path('purelib') + '\n')
    done = subprocess.run(
        [
            *map(str, pip),
            '--python',
            str(python),
            'install',
            '--quiet',
            '--no-deps',
            '--force-reinstall',
            str(wheel),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / 'env' / 'bin', site


def _call(installed, folder, command, *arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    return subprocess.run(
        [str(installed[0] / command), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': QUICK_TO_COMPILE},
    )


def test_what_is_installed(installed):
    bin_folder, site = installed
    assert {p.name for p in bin_folder.iterdir()} >= set(COMMANDS)
    assert not (site / 'configs').exists() and not (site / 'published').exists()
    assert (site / 'sam_jax' / 'configs').is_dir()
    assert (site / 'sam_jax' / 'experiments' / 'paper.csv').is_file()
    assert (site / f'sam_jax-{sam_jax.__version__}.dist-info').is_dir()


def test_a_run_and_what_comes_after_it_in_an_empty_folder(installed, tmp_path):
    """By the name of a config; where somebody has `configs` of his own; the doctor."""
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / '__init__.py').write_text('')
    quick = [
        '--config.total_epochs=1',
        '--config.batch_size=640',
        '--config.replica_batch_size=640',
    ]
    done = _call(
        installed,
        tmp_path,
        'sam-jax-train',
        '--config=digits:noise=0.4,smoke',
        '--workdir=run',
        *quick,
    )
    assert done.returncode == 0 and 'Finished.' in done.stderr, done.stderr
    for command, file in (
        (('sam-jax-predict', '--workdir=run'), 'run/predictions.npz'),
        (('sam-jax-export', 'run', '--out=weights'), 'weights/weights.safetensors'),
        (('sam-jax-report', 'run'), 'run/report/report.html'),
    ):
        done = _call(installed, tmp_path, *command)
        assert done.returncode == 0 and (tmp_path / file).is_file(), done.stderr
    done = _call(
        installed,
        tmp_path,
        'sam-jax-sweep',
        '--config=digits',
        '--workdir=sweep',
        '--sweep=sam.rho=0,0.1',
        '--engine=print',
    )
    assert done.returncode == 0 and done.stdout.count('configs/digits.py') == 2, done.stderr
    done = _call(installed, tmp_path, 'sam-jax-train', '--config=dogits', '--workdir=x')
    assert done.returncode == 2 and re.search('there are .*digits', done.stderr), done.stderr
    (tmp_path / 'mine.py').write_text(
        'from configs import digits\n\n\ndef get_config():\n    return digits.get_config()\n'
    )
    (tmp_path / 'configs' / '__init__.py').unlink()
    (tmp_path / 'configs').rmdir()
    done = _call(
        installed,
        tmp_path,
        'sam-jax-sweep',
        '--config=mine.py',
        '--workdir=sweep',
        '--sweep=sam.rho=0',
        '--engine=print',
    )
    assert done.returncode == 0 and 'mine.py' in done.stdout, done.stderr
    done = _call(installed, tmp_path, 'sam-jax-figure')
    assert done.returncode == 0 and '3-right: ' in done.stdout, done.stderr
    done = _call(installed, tmp_path, 'sam-jax-doctor')
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r'SAM on the digits +compiled in [\d.]+ s, \d+ steps', done.stdout)
    assert all(word in done.stdout for word in ('jaxlib', 'devices', 'datasets', 'digits'))
