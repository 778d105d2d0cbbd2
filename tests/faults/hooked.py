"""Disturbances from within a process: of its numbers, its clock, its rights."""

import os
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from faults.process import Hooks, obey
from sam_jax import experiment, periodic, train_step


def install(hooks: Hooks) -> None:
    """Disturbs this process as the hooks say."""
    if hooks.file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hooks.file_size, hooks.file_size))
    if hooks.obeys and os.getuid() == 0:
        obey()
    if hooks.clock:
        _shift_clock(*hooks.clock)
    if hooks.poison:
        _poison(*hooks.poison)
    if hooks.pace:
        _after_each_step(lambda done: time.sleep(hooks.pace))


def _after_each_step(action):
    real = periodic.Saving.__call__

    def call(self, done, state):
        action(done)
        real(self, done, state)

    periodic.Saving.__call__ = call


def _shift_clock(step, seconds):
    real, jumped = time.time, []
    time.time = lambda: real() + (seconds if jumped else 0.0)
    _after_each_step(lambda done: jumped.append(1) if done > step else None)


def _poison(where, step, value):
    """Puts a number that is not finite where it is asked for; programs stay as they are.

    The L2 penalty makes the gradient of it, and rho the params at which the second one is taken.
    Images are integers: theirs comes in with a constant of the step, see `poisoned`.
    """
    real: Any = experiment.Experiment.__dict__['train_step'].func

    def poisoned_step(self):
        made = real(self)

        def constant(number):
            return self.layout.replicate(np.asarray(number, np.float32))

        def at(state, feed, arrays, hparams):
            if int(np.asarray(jax.device_get(state.step))) == step:
                bad = constant(value)
                if where == 'perturbed gradient':
                    hparams = hparams.replace(rho=bad)
                elif where == 'gradient':
                    hparams = hparams.replace(weight_decay=bad)
                else:
                    arrays = {**arrays, POISON: bad}
            if where == 'batch' and POISON not in arrays:
                arrays = {**arrays, POISON: constant(0.0)}
            return made(state, feed, arrays, hparams)

        return at

    experiment.Experiment.train_step = property(poisoned_step)
    if where == 'batch':
        train_step.keyed_replicas = poisoned(train_step.keyed_replicas)


POISON = 'poison'


def poisoned(keyed_replicas: Any) -> Any:
    """As `keyed_replicas`, with images that all are the constant POISON where it is not 0."""

    def of_step(step, feed, arrays, *more):
        arrays = dict(arrays)
        poison = arrays.pop(POISON)
        replicas = keyed_replicas(step, feed, arrays, *more)
        image = replicas['image']
        replicas['image'] = jnp.where(poison == 0, image, poison.astype(image.dtype))
        return replicas

    return of_step
