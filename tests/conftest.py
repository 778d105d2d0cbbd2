"""Eight fake CPU devices and strict numerics for every test.

With SAM_JAX_TEST_PLATFORMS, which ./scripts/test_accelerator.sh sets, it is the real devices of
JAX's platforms of these names, and products in float32 are not cut to fewer bits.
"""

import os
import tempfile

import quick

PLATFORMS = os.environ.get('SAM_JAX_TEST_PLATFORMS', 'cpu')

# Processes that tests start as users do have what users have.
if PLATFORMS == 'cpu':
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {quick.flags(devices=8)}'.strip()
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

# Runs as users start them keep compiled programs. Those of the tests go elsewhere, where workers
# and the processes that they start find each other's, and go away with the process that began.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    _caches = tempfile.TemporaryDirectory()
    os.environ['XDG_CACHE_HOME'] = _caches.name

import jax
import numpy as np
import pytest
import quadratics

jax.config.update('jax_platforms', PLATFORMS)
if PLATFORMS != 'cpu':
    jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update(
    'jax_compilation_cache_dir', os.path.join(os.environ['XDG_CACHE_HOME'], 'sam_jax', 'compiled')
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


@pytest.fixture
def x64():
    """Runs the test in float64, which separates a bug from rounding."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def problem(x64):
    """What formulas are of: params, loss, A, w and g = A w of a quadratic, in float64."""
    params, loss, a = quadratics.layers(np.float64)
    w = quadratics.flat(params)
    return params, loss, a, w, a @ w


@pytest.fixture(autouse=True)
def kernels_of_users(request, monkeypatch):
    """Compiles as users' programs are, where two programs must agree to the last bit."""
    if quick.TWO_WAYS and PLATFORMS == 'cpu' and request.node.get_closest_marker('bitwise'):
        from jax._src import compiler

        options = compiler.get_compile_options
        monkeypatch.setattr(
            compiler,
            'get_compile_options',
            lambda *args, env_options_overrides=None, **kwargs: options(
                *args,
                env_options_overrides={**(env_options_overrides or {}), quick.EMITTERS: True},
                **kwargs,
            ),
        )


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
    """Frees what a file has compiled.

    Each program takes memory maps, of which Linux gives a process 65,530: past them LLVM dies of a
    segmentation fault.
    """
    yield
    jax.clear_caches()


# A file stays with one worker: the long ones come first, so that no worker ends alone with one.
LONG = (
    'train_test.py',
    'golden_train_test.py',
    'zoo_test.py',
    'pods_test.py',
    'smoke_test.py',
    'streaming_test.py',
    'sweeps_test.py',
    'topology_test.py',
    'labels_test.py',
    'methods_in_training_test.py',
    'methods_test.py',
    'convolutions_test.py',
    'methods_by_hand_test.py',
    'layers_test.py',
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
