"""What is done now and then: when it is due."""

import time
import types

import jax
import pytest

from sam_jax import periodic


def _run(last_step, **settings):
    settings = {'every_epochs': 0, 'keep_epochs': (), 'every_minutes': 0.0} | settings
    config = types.SimpleNamespace(
        checkpoint=types.SimpleNamespace(**settings), log_every_steps=100
    )
    experiment = types.SimpleNamespace(steps_per_epoch=10, total_steps=60, config=config)
    return periodic.Run(experiment, '', *5 * (None,), last_step)


def test_an_action_is_due_after_the_last_step():
    """Also of a call that ends before the run: what it says of itself is of its last step."""
    due = [done for done in range(1, 31) if _run(30).due(done, 2)]
    assert due == [20, 30]
    assert [done for done in range(1, 61) if _run(60).due(done, 0)] == [60]


@pytest.mark.parametrize('processes,saved', [(1, [3, 4, 100]), (2, [100])])
def test_the_clock_decides_when_a_run_saves(processes, saved, monkeypatch):
    """At any step of one process; several must agree, which costs time."""
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(jax, 'process_count', lambda: processes)
    monkeypatch.setattr(periodic.distributed, 'broadcast', lambda value: value)
    saving = periodic.Saving(_run(60, every_minutes=2.0), None)
    found = []
    for done in (1, 2, 3, 4, 100):
        now[0] = 50.0 * done
        found += [done] * saving._due(done, ())
    assert found == saved
