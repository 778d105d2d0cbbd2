"""The floors of the architecture, read from the imports; and what must work without TensorFlow."""

import ast
import os
import subprocess
import sys

import pytest
from helpers import ROOT

FLOORS = [
    {
        'errors',
        'limits',
        'tables',
        'rngs',
        'losses',
        'metrics',
        'schedules',
        'sharpness',
        'convolutions',
        'cuda',
    },
    {
        'models',
        'data',
        'optimizers',
        'checkpoint',
        'run_log',
        'progress',
        'distributed',
        'replicas',
        'quantization',
        'language',
    },
    {'train_step', 'train_state', 'gradients', 'trajectory', 'evaluate'},
    {'settings'},
    {'experiment', 'experiments', 'memory', 'step_log', 'provenance', 'trackers'},
    {'analysis', 'targets', 'trained'},
    {'periodic', 'nans', 'profiling', 'watchdog'},
    {'train'},
    {'cli'},
    {'main', 'benchmarks'},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Imports within a floor: checkpoints ask for the number of processes, models for the axis, the
# registry of methods writes its table.
NEIGHBOURS = {
    ('checkpoint', 'distributed'),
    ('train_step', 'gradients'),
    ('train_step', 'trajectory'),
    ('train_step', 'train_state'),
    ('train_state', 'trajectory'),
    ('models', 'replicas'),
    ('sharpness', 'tables'),
    ('limits', 'errors'),
}

# Rooms that a room on a higher floor nevertheless may not enter: input and output.
CLOSED = {(room, door) for room in FLOORS[2] for door in ('data', 'checkpoint', 'run_log')}

# Where each outside library may be imported, besides jax, numpy and Python's own.
LIBRARIES = {
    'optax': {
        'sharpness',
        'optimizers',
        'train_step',
        'train_state',
        'provenance',
        'quantization',
        'language',
        'benchmarks',
    },
    'jaxtyping': {'sharpness', 'losses', 'data'},
    'flax': {
        'models',
        'train_step',
        'train_state',
        'provenance',
        'trained',
        'nans',
        'quantization',
        'benchmarks',
    },
    'sklearn': {'data'},
    'tensorflow': {'data', 'benchmarks', 'trained'},
    'grain': {'data'},
    'PIL': {'cli', 'data'},
    'pyarrow': {'data'},
    'tensorflow_datasets': {'data', 'benchmarks'},
    'orbax': {'checkpoint', 'trained'},
    'clu': {'run_log', 'benchmarks'},
    'tqdm': {'progress'},
    'matplotlib': {'experiments'},
    'scipy': {'experiments', 'analysis', 'data'},
    'absl': {'cli', 'main', 'benchmarks'},
    'ml_collections': {'settings', 'cli', 'main', 'experiments'},
    'markdown': {'experiments'},
    'rich': {'experiments'},
    'submitit': {'experiments'},
    'torch': {'benchmarks'},
    'pyhessian': {'benchmarks'},
    'matfree': {'benchmarks'},
    'h5py': {'models'},
    'safetensors': {'models', 'trained'},
    'yaml': {'cli', 'trained'},
    'wandb': {'trackers'},
    'mlflow': {'trackers'},
    'trackio': {'trackers'},
}
# Imported inside functions only: slow, or absent on many machines.
LAZY = {
    'sklearn',
    'grain',
    'PIL',
    'pyarrow',
    'tensorflow',
    'tensorflow_datasets',
    'orbax',
    'clu',
    'tqdm',
    'h5py',
    'safetensors',
    'rich',
    'submitit',
    'yaml',
    'wandb',
    'mlflow',
    'trackio',
}

MODULES = sorted((ROOT / 'sam_jax').rglob('*.py'))


def _room(path):
    return path.relative_to(ROOT / 'sam_jax').with_suffix('').parts[0]


def _imports(path, top_level_only=False):
    """Yields the full dotted names that a file imports."""
    tree = ast.parse(path.read_text())
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if top_level_only and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path}: imports are absolute'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _rooms_entered(path):
    """Yields the rooms of sam_jax that a file imports from."""
    for name in _imports(path):
        parts = name.split('.')
        if parts[0] == 'sam_jax' and len(parts) > 1:
            yield parts[1]


def test_every_room_has_a_floor():
    rooms = {_room(path) for path in MODULES} - {'__init__'}
    assert rooms == set(FLOOR)


def test_imports_are_found():
    found = {(_room(path), room) for path in MODULES for room in _rooms_entered(path)}
    assert {('train_step', 'sharpness'), ('main', 'train'), ('data', 'rngs')} | NEIGHBOURS <= found
    assert 'tensorflow' in [name for path in MODULES for name in _imports(path)]


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    room = _room(path)
    if room == '__init__':
        assert not list(_imports(path, top_level_only=True))  # no import of a part loads the whole
        assert set(_imports(path)) == {'sam_jax.trained.load'}
        return
    for other in _rooms_entered(path):
        assert other in FLOOR, f'{path} imports sam_jax.{other}, which has no floor'
        assert (room, other) not in CLOSED
        assert other == room or (room, other) in NEIGHBOURS or FLOOR[other] < FLOOR[room], (
            f'{room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})'
        )


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_outside_libraries(path):
    everywhere = {'sam_jax', 'jax', 'numpy', *sys.stdlib_module_names}
    for name in _imports(path):
        library = name.split('.')[0]
        assert library in everywhere or _room(path) in LIBRARIES.get(library, ()), name
    top = {name.split('.')[0] for name in _imports(path, top_level_only=True)}
    assert not top & LAZY


@pytest.mark.parametrize('name', ['pmap', 'shard_map'])
def test_one_place_maps_over_the_devices(name):
    """`Layout.map`; so a run's `replica_backend` is that of all its programs."""
    callers = {
        path.relative_to(ROOT / 'sam_jax').as_posix()
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr == name)
        or (isinstance(node, ast.alias) and node.name.split('.')[-1] == name)
    }
    assert callers == {'replicas.py'}


def test_sizes():
    # A habit and not a law, with room to spare: 300 and 80 lines are aimed at.
    lengths = {path: len(path.read_text().splitlines()) for path in MODULES}
    assert max(lengths.values()) <= 470
    assert lengths[ROOT / 'sam_jax' / 'main.py'] <= 100


def test_sizes_of_what_the_project_is_about():
    """The methods, the gradients and the step: files of 320 lines, functions of 80.

    The formatter gives an argument of a long call a line of its own.
    """
    core = [ROOT / 'sam_jax' / f'{name}.py' for name in ('train_step', 'train_state', 'gradients')]
    for path in [*core, *(ROOT / 'sam_jax' / 'sharpness').rglob('*.py')]:
        text = path.read_text()
        assert len(text.splitlines()) <= 320, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f'{path}: {node.name}'


# Without TensorFlow.


PREAMBLE = """
import sys
for name in ('tensorflow', 'tensorflow_datasets', 'clu', 'tensorboard', 'keras'):
    sys.modules[name] = None  # importing it is an ImportError
"""
IMPORTS = (
    PREAMBLE
    + """
import sam_jax.sharpness, sam_jax.models, sam_jax.train_step, sam_jax.evaluate, sam_jax.train
import sam_jax.main, sam_jax.data, sam_jax.run_log, sam_jax.checkpoint
sam_jax.load
libraries = {m.split('.')[0] for m in sys.modules}
slow = {'sklearn', 'grain', 'PIL', 'orbax', 'tqdm', 'pandas', 'matplotlib'} & libraries
assert not slow, slow
"""
)
TRAINING = (
    PREAMBLE
    + """
sys.argv[1:] = [
    '--config=configs/digits.py', '--workdir=' + sys.argv[1], '--config.total_epochs=1',
    '--config.batch_size=640', '--config.replica_batch_size=640', '--config.eval.batch_size=500']
from sam_jax import main
main.run()
"""
)


def _run(code, *args):
    # One device, unoptimised: quick to compile.
    environment = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': '',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    }
    return subprocess.run(
        [sys.executable, '-c', code, *args],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_imports_without_tensorflow():
    result = _run(IMPORTS)
    assert (result.returncode, result.stderr) == (0, ''), result.stderr


def test_training_without_tensorflow(tmp_path):
    result = _run(TRAINING, str(tmp_path))
    assert result.returncode == 0, result.stderr
    about = [line for line in result.stderr.splitlines() if 'TensorBoard' in line]
    assert len(about) == 1 and 'No TensorBoard files' in about[0] and 'clu' in about[0]
    assert 'Traceback' not in result.stderr and 'Finished.' in result.stderr
    files = {p.name for p in tmp_path.iterdir()}
    assert {'result.json', 'config.json', 'metrics.jsonl', 'checkpoints'} <= files
    assert not [name for name in files if 'tfevents' in name]


# Places.


def test_no_file_names_a_machine():
    listed = subprocess.run(
        ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip('not a git checkout')
    files = [ROOT / name for name in listed.stdout.split('\0') if name]
    assert ROOT / 'sam_jax' / 'train.py' in files
    homes = [f'/{name}/'.encode() for name in ('work', 'root')]
    named = [
        str(path)
        for path in files
        if path.is_file()
        if any(home in path.read_bytes() for home in homes)
    ]
    assert not named
