"""What several test files share: small configs, golden files, comparison of pytrees."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import quick

from configs import digits
from sam_jax import data, replicas, train_state, train_step

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = pathlib.Path(__file__).resolve().parent / 'golden'


def small_config(**overrides):
    """The real digits config, made small: 2 epochs of 20 steps, WRN-10-1.

    Keys of sections are given with a double underscore: sam__rho=0.1.
    """
    c = digits.get_config(f'method={overrides.get("sam__method", "sam")}')
    c.total_epochs = 2
    c.eval.every_epochs = 1
    for key, value in overrides.items():
        *sections, name = key.split('__')
        section = c
        for s in sections:
            section = section[s]
        section[name] = value
    return c


def golden(name):
    """A file of numbers computed by the original code."""
    return np.load(GOLDEN / f'{name}.npz')


def assert_trees_equal(a, b):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def assert_trees_close(a, b, rtol=1e-5, atol=0.0):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol),
        jax.device_get(a),
        jax.device_get(b),
    )


def relative_distance(a, b):
    """||a - b|| / ||b|| over all leaves together."""
    a, b = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(t))]) for t in (a, b)
    )
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def at_step(step, action):
    """Calls action when the loop asks for the batch of a step of a resident dataset."""
    real = data.ResidentDataset.train_feed

    def feed(self, seed, current, layout):
        if current == step:
            action()
        return real(self, seed, current, layout)

    return mock.patch.object(data.ResidentDataset, 'train_feed', feed)


def assert_sam_lowers_the_loss(model, steps):
    """So many steps on one batch of digits, two replicas that ascend each on its own."""
    config = small_config(
        batch_size=32,
        replica_batch_size=16,
        log_every_steps=1,
        sam__rho=0.05,
        optimizer__learning_rate=0.02,
        optimizer__schedule='constant',
    )
    dataset = data.load_dataset(config.data)
    layout, _ = replicas.make_layout(32, 16, 1, devices=jax.devices()[:2])
    step = train_step.make_train_step(model, config, layout, dataset)
    state = layout.replicate(train_state.create_train_state(config, model, dataset.image_shape))
    arguments = (
        layout.shard(dataset.train_feed(0, 0, layout)),
        layout.replicate(dataset.device_arrays(dataset.train)),
        layout.replicate(train_state.HParams.from_config(config)),
    )
    losses = []
    for _ in range(steps):
        state, metrics = step(state, *arguments)
        np.testing.assert_allclose(metrics['train/perturbation_norm'], 0.05, rtol=1e-3)
        losses.append(float(metrics['train/loss']))
    assert np.mean(losses[-3:]) < 0.9 * losses[0], losses


class Net(nn.Module):
    """Convolution, BatchNorm, dropout, head: all that a step must mind, quick to compile."""

    dtype: str = 'float32'
    dropout_rate: float = 0.0
    batch_norm: bool = True
    num_classes: int = 10
    batch_norm_axis: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        common = dict(dtype=self.dtype, param_dtype=param_dtype)
        x = nn.Conv(8, (3, 3), **common)(x)
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, **common)(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(nn.relu(x))
        x = nn.Dense(self.num_classes, **common)(x.mean(axis=(1, 2)))
        return x.astype(param_dtype)


# For processes that make many steps: level 0, which a test's own process has, makes a step ten
# times slower.
QUICK_TO_COMPILE = quick.flags(level=1)


def lean_environment(folder, **environment):
    """Environment of processes that do not import TensorFlow for its logs: they start sooner."""
    stub = folder / 'stubs' / 'clu.py'
    stub.parent.mkdir(exist_ok=True)
    stub.write_text("raise ImportError('left out in this test')")
    return {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': QUICK_TO_COMPILE,
        **environment,
        'PYTHONPATH': str(stub.parent),
    }


COMPILED = '/jax/core/compile/backend_compile_duration'


@contextlib.contextmanager
def compilations():
    """A list to which each compilation adds."""
    events = []

    def note(event, *args, **kwargs):
        if event == COMPILED:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield events
    jax.monitoring.unregister_event_duration_listener(note)


# Children of one process, which has imported the module that they run.
_FORKED = """
import importlib, json, os, subprocess, sys, tempfile
module, *rows = json.loads(sys.stdin.read())
command = importlib.import_module(module)
ended = []
for row in rows:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = [command.__file__, *row]
            command.run()
            os._exit(99)  # run ends by sys.exit
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        ended.append([row, code, *texts])
print(json.dumps(ended))
"""


def run_commands(module, *rows):
    """A console command with each row of arguments: [CompletedProcess, ...]; imports take once."""
    done = subprocess.run(
        [sys.executable, '-c', _FORKED],
        input=json.dumps([module, *([*map(str, row)] for row in rows)]),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [subprocess.CompletedProcess(*ended) for ended in json.loads(done.stdout)]


def training_process(*flags):
    """The number of the process of sam_jax.main that has all these flags, or None."""
    for entry in pathlib.Path('/proc').iterdir():
        try:
            words = (entry / 'cmdline').read_bytes().decode().split('\0')
        except (OSError, UnicodeDecodeError):
            continue
        if {'sam_jax.main', *flags} <= {*words}:
            return int(entry.name)
    return None


def wait_until(condition, seconds=120):
    """Waits until condition() holds."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def run_processes(flags, workdir, num_processes=2, devices_each=2, config='configs/digits.py'):
    """Runs sam_jax.main in several real processes over gloo; returns their outputs."""
    environment = {
        **os.environ,
        'JAX_ENABLE_X64': '1',
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': quick.flags(devices_each, level=1),
    }
    address = f'localhost:{free_port()}'
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                '-m',
                'sam_jax.main',
                f'--config={config}',
                f'--workdir={workdir}',
                f'--coordinator_address={address}',
                f'--num_processes={num_processes}',
                f'--process_id={i}',
                *flags,
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(num_processes)
    ]
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * num_processes, outputs
    return outputs


class UnderWay:
    """A result of a program that is under way until it is waited for.

    `counts`, {'now', 'most'}, holds how many are under way and how many were at once.
    """

    def __init__(self, counts):
        self._counts, self._done = counts, False
        counts['now'] += 1
        counts['most'] = max(counts['most'], counts['now'])

    def block_until_ready(self):
        self._counts['now'] -= not self._done
        self._done = True
        return self
