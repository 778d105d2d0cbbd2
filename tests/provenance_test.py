"""What a run says of the code that it is of."""

import os
import types

import jax
import pytest
from helpers import small_config

from sam_jax import provenance

LAYOUT = types.SimpleNamespace(devices=jax.devices()[:1])


def _revision():
    return provenance.provenance(small_config(), LAYOUT)['git_revision']


def test_the_revision_is_that_of_this_checkout():
    assert len(_revision().removesuffix('-dirty')) == 40


def test_without_git_a_run_starts(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert _revision() == 'unknown'


@pytest.mark.parametrize('place', ['venv/site-packages/sam_jax', 'sam_jax'])
def test_an_installed_package_has_none(monkeypatch, place):
    """Not even where it lies within a checkout of somebody else."""
    root = os.path.dirname(os.path.dirname(provenance.__file__))
    monkeypatch.setattr(provenance, '__file__', f'{root}/tests/{place}/provenance.py')
    assert _revision() == 'unknown'
