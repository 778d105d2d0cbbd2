"""Every public function has types; those with shapes in them are true."""

import ast
import os
import subprocess
import sys

import pytest
from helpers import ROOT

MODULES = sorted((ROOT / 'sam_jax').rglob('*.py'))


def _public(body, name=''):
    """Yields (name, node) of the functions and methods whose names have no leading underscore."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith('_'):
                continue
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f'{name}{node.name}.')
            else:
                yield name + node.name, node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _public(
                [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)], name
            )


def _untyped(source):
    """Returns 'function: parameter' and 'function: result' of all that has no annotation."""
    found = []
    for name, node in _public(ast.parse(source).body):
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        found += [
            f'{name}: {p.arg}'
            for p in parameters
            if p.annotation is None and p.arg not in ('self', 'cls')
        ]
        if node.returns is None:
            found.append(f'{name}: result')
    return found


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_functions_have_types(path):
    assert _untyped(path.read_text()) == []


def test_what_has_no_type_is_found():
    source = """
def f(a, b: int, *args, c=1, **kwargs) -> int: ...
def _g(a): ...
class C:
    def m(self, a: int): ...
    def _n(self): ...
    @property
    def p(self): ...
class _D:
    def m(self): ...
if True:
    def h(a: int): ...
"""
    assert _untyped(source) == ['f: a', 'f: c', 'C.m: result', 'C.p: result', 'h: result']


# The shapes, checked by beartype in a process where jaxtyping adds the checks to the functions.

PREAMBLE = """
import jaxtyping
for name in ('sam_jax.losses', 'sam_jax.data.ops'):
    jaxtyping.install_import_hook(name, 'beartype.beartype')
import jax.numpy as jnp
from sam_jax import losses
from sam_jax.data import ops

logits, classes = jnp.zeros((2, 4, 3)), jnp.zeros((2, 4), jnp.int32)
image, center = jnp.zeros((8, 6, 3), jnp.uint8), jnp.zeros(2)
op = ops.resolve('Rotate', 5.0, False, (8, 6, 3), ops.FAITHFUL)

def refused(function, *args):
    try:
        function(*args)
    except jaxtyping.TypeCheckError:
        return
    raise AssertionError(f'{function.__name__} took {args}')
"""
RIGHT = """
assert losses.cross_entropy(logits, classes, 0.1).shape == (2, 4)
assert losses.cross_entropy(logits, jnp.zeros((2, 4, 3))).shape == (2, 4)
assert losses.cross_entropy(jnp.zeros(3), jnp.zeros((), jnp.int32)).shape == ()
assert losses.cross_entropy(logits.astype(jnp.bfloat16), classes).shape == (2, 4)
assert losses.target_distribution(classes, 3, jnp.float32).shape == (2, 4, 3)
assert losses.trajectory(logits, logits, 5.0).shape == (2, 4)
assert losses.l2_penalty({'w': jnp.ones((2, 3))}, 0.5, True) == 1.5
assert losses.l2_penalty({}, 0.5) == 0
assert losses.l2_penalty({'w': jnp.ones((2, 3))}, jnp.float32(0.5)) == 1.5
assert ops.apply(op, image, center).shape == (8, 6, 3)
assert ops.resolve('Cutout', 5.0, True, (8, 6, 1), ops.corrected(8)).table.shape == (256,)
"""
WRONG = """
refused(losses.cross_entropy, logits, jnp.zeros((2, 3), jnp.int32))
refused(losses.cross_entropy, logits, jnp.zeros((2, 4, 5)))
refused(losses.cross_entropy, classes, classes)
refused(losses.trajectory, logits, logits[..., :2], 5.0)
refused(losses.target_distribution, jnp.zeros((2, 4, 3)) > 0, 3, jnp.float32)
refused(losses.l2_penalty, {'w': jnp.ones(3)}, jnp.ones(2))
refused(ops.apply, op, image[..., 0], center)
refused(ops.apply, op, image.astype(jnp.float32), center)
refused(ops.apply, op, image, jnp.zeros(3))
refused(ops.resolve, 'Rotate', 5.0, False, (8, 6), ops.FAITHFUL)
"""


@pytest.mark.parametrize('calls', [RIGHT, WRONG], ids=['right', 'wrong'])
def test_shapes(calls):
    environment = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': '',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    }
    result = subprocess.run(
        [sys.executable, '-c', PREAMBLE + calls],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
