"""Says what a report of a problem needs to say, and makes a few steps of SAM.

    sam-jax-doctor

Versions and devices, where datasets and compiled programs are looked for, whether what is optional
is there, and how fast a small network trains for a few seconds. Ends with status 1 if that fails.
"""

import importlib.metadata
import os
import platform
import sys
import time

import jax

import sam_jax
from sam_jax import replicas, settings
from sam_jax.cli import commands
from sam_jax.experiment import Experiment
from sam_jax.settings import shipped

LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
# Library -> what it is for.
OPTIONAL = {
    'tensorflow-cpu': 'datasets of TFDS, images, TensorBoard (or tensorflow)',
    'tensorflow': 'the same',
    'tensorflow-datasets': 'datasets of TFDS',
    'clu': 'TensorBoard',
    'pyarrow': 'datasets of Hugging Face on disk',
    'submitit': 'sweeps on Slurm',
    'libtpu': 'TPUs',
    'jax-cuda13-plugin': 'NVIDIA GPUs',
    'jax-cuda12-plugin': 'NVIDIA GPUs',
}
SECONDS = 5


def _version(library):
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, str]:
    """Returns {what: how it is} of this environment, in the order of the report."""
    found = {
        'sam_jax': f'{sam_jax.__version__} in {os.path.dirname(os.path.abspath(sam_jax.__file__))}',
        'python': f'{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores',
    }
    found |= {name: _version(name) or 'MISSING' for name in LIBRARIES}
    found |= {
        name: f'{_version(name) or "not there"} (for {what})' for name, what in OPTIONAL.items()
    }
    devices = jax.devices()
    found['devices'] = f'{len(devices)} x {devices[0].device_kind}, {jax.process_count()} process'
    free, _ = replicas.free_memory(devices)
    found['free memory'] = f'{free / 2**30:.3g} GiB'
    folder = os.environ.get('TFDS_DATA_DIR') or os.path.expanduser('~/tensorflow_datasets')
    sets = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found['datasets'] = f'{folder}: {", ".join(sets) or "none"}'
    cache = jax.config.jax_compilation_cache_dir
    programs = len(os.listdir(cache)) if cache and os.path.isdir(cache) else 0
    found['compiled programs'] = f'{cache or "not kept"}: {programs}'
    found['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') or 'none'
    found['configs'] = f'{", ".join(shipped.names())} in {shipped.folder()}'
    return found


def try_steps(seconds: float = SECONDS) -> dict[str, float]:
    """Trains the digits with SAM for some seconds.

    Returns:
      {'compile_s', 'step_ms', 'steps', 'loss'}: the loss is that of the last step.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    _, config = settings.load('digits')
    experiment = Experiment.from_config(config, jax.devices()[:1])
    layout = experiment.layout
    state = experiment.initial_state()
    feed = layout.shard(experiment.dataset.train_feed(config.seed, 0, layout))
    began = time.perf_counter()
    step = experiment.train_program.lower(state, feed, *experiment.constants).compile()
    compiled = time.perf_counter()
    steps, metrics = 0, {}
    while time.perf_counter() - compiled < seconds:
        state, metrics = step(state, feed, *experiment.constants)
        jax.block_until_ready(metrics)
        steps += 1
    if int(metrics['bad_step']):
        raise FloatingPointError(f'step {int(metrics["bad_step"])} is not finite')
    return {
        'compile_s': compiled - began,
        'step_ms': 1e3 * (time.perf_counter() - compiled) / steps,
        'steps': steps,
        'loss': float(metrics['train/loss']),
    }


def main() -> None:
    """Prints the report."""
    for name, value in facts().items():
        print(f'{name:22}{value}', flush=True)
    try:
        found = try_steps()
    except Exception as e:  # whatever is wrong here is what this is for
        print(f'{"SAM on the digits":22}FAILED: {type(e).__name__}: {e}')
        sys.exit(1)
    print(
        f'{"SAM on the digits":22}compiled in {found["compile_s"]:.1f} s, {found["steps"]} steps '
        f'of {found["step_ms"]:.1f} ms, loss {found["loss"]:.4f}'
    )


def run() -> None:
    """Console command `sam-jax-doctor`."""
    commands.run(main)


if __name__ == '__main__':
    run()
