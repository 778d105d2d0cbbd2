"""The code is broken on purpose, in a copy, and a test must notice: ./scripts/test.sh -m slow."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

STEP, TRANSFORM, ASCENT = (
    f'sam_jax/{name}.py' for name in ('train_step', 'sharpness/transform', 'sharpness/ascent'))
STREAM, AUGMENT = 'sam_jax/data/streaming.py', 'sam_jax/data/augment.py'
STEP_TEST = 'tests/train_step_test.py'
ALGORITHM_1 = f'{STEP_TEST}::test_step_is_algorithm_1_with_clean_statistics_and_one_dropout_mask'

MUTANTS = {
    'sign of the perturbation': (
        TRANSFORM, 'promote(w) + e', 'promote(w) - e', ALGORITHM_1),
    'no perturbation': (
        TRANSFORM, 'promote(w) + e', 'promote(w) + 0 * e', ALGORITHM_1),
    'perturbation of half the length': (
        ASCENT, 'rho / jnp.where(norm > 0, norm, 1.0), 0.0)', '0.5 * rho / norm, 0.0)',
        ALGORITHM_1),
    'norm without a guard': (
        ASCENT, 'jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1.0), 0.0)', 'rho / norm',
        'tests/sharpness_test.py'),
    'perturbed weights in the dtype of the params': (
        TRANSFORM, 'promote(w) + e', '(promote(w) + e).astype(w.dtype)',
        f'{STEP_TEST}::test_bfloat16_params_are_perturbed_in_float32'),
    'no mean over devices': (
        STEP, '    if layout.devices_per_group < len(layout.devices):\n'
              '        result = mean_over_devices(result)\n', '', ALGORITHM_1),
    'gradient averaged before the ascent': (
        STEP, '        if layout.devices_per_group > 1:\n'
              '            result = mean_over_devices(result, layout.axis_index_groups)',
        '        result = mean_over_devices(result)', ALGORITHM_1),
    'statistics of the second pass': (
        STEP, "    return updates, sharpness_state, aux['batch_stats'], report",
        '    moved = jax.tree.map(lambda w, g: w + 0.5 * g / optax.tree.norm(grads),\n'
        '                         state.params, grads)\n'
        "    return updates, sharpness_state, group_gradient(moved)[1]['batch_stats'], report",
        ALGORITHM_1),
    'the same dropout in all replicas': (
        STEP, 'fold_in, key))(replica)', 'fold_in, key))(0 * replica)', ALGORITHM_1),
    'replicas summed': (STEP, 't / n if', 't if', ALGORITHM_1),
    'augmentation by device': (
        STEP, '(\n        replica[0] * layout.replica_batch_size)', '0', 'tests/topology_test.py'),
    'no weight decay in the second gradient': (
        STEP, 'return loss + penalty, aux', 'return loss, aux', ALGORITHM_1),
    'rho as a constant of the program': (
        STEP, 'config.sam, hparams.rho,', 'config.sam, config.sam.rho,',
        f'{STEP_TEST}::test_swept_values_are_not_constants_of_the_program'),
    'clipping forgotten': (
        'sam_jax/optimizers.py', 'if clip else optax.identity()', 'if False else optax.identity()',
        'tests/golden_train_test.py::test_every_value_after_three_steps'),
    'checkpoint shares the buffers of the state': (
        'sam_jax/checkpoint.py', 'np.array(x, copy=True)', 'np.asarray(x)',
        'tests/checkpoint_test.py'),
    'sums of the report not saved': (
        STEP, 'jnp.where(position == 0, 0.0, state.sums[name])', '0.0',
        f'{STEP_TEST}::test_metrics_are_means_since_the_last_report'),
    'windows do not depend on the step': (
        STREAM, 'step, self._places[j])', '0, self._places[j])',
        'tests/streaming_test.py::test_windows_differ_between_steps_and_places'),
    'windows depend on the place within the process': (
        STREAM, 'step, self._places[j])', 'step, j)',
        'tests/streaming_test.py::test_each_process_reads_its_share_alone'),
    'a resumed run begins at the first step': (
        STREAM, 'step += self._first_step', 'step += 0', 'tests/streaming_test.py::'
        'test_an_epoch_is_a_permutation_and_any_step_can_be_the_first'),
    'padding counts in the evaluation': (
        STREAM, "'mask': np.float32(0)}", "'mask': np.float32(1)}",
        'tests/streaming_test.py::test_evaluation_sees_every_example_once'),
    'partners on the same device': (
        AUGMENT, 'if axis_name is None:', 'if True:', 'tests/data_test.py::'
        'test_augmentation_depends_on_seed_step_and_place_alone'),
    'mixup with the smaller weight': (
        AUGMENT, 'jnp.maximum(weights, 1 - weights)', 'jnp.minimum(weights, 1 - weights)',
        'tests/augment_test.py::test_mixup_is_the_original_s'),
    'noise that depends on what it is asked for together': (
        'sam_jax/data/labels.py', 'draws[index]', 'draws[:len(index)]', 'tests/labels_test.py'),
    'noise for all but the drawn': (
        'sam_jax/data/labels.py', 'np.where(hit', 'np.where(~hit', 'tests/labels_test.py'),
}


def _copy(tmp_path):
    for name in ('sam_jax', 'configs', 'tests', 'pyproject.toml'):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(source, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('name', MUTANTS)
def test_a_test_notices(name, tmp_path):
    file, old, new, test = MUTANTS[name]
    _copy(tmp_path)
    text = (tmp_path / file).read_text()
    assert text.count(old) == 1, f'{file} has {text.count(old)} times {old!r}'
    (tmp_path / file).write_text(text.replace(old, new))
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-x', *test.split()], cwd=tmp_path, capture_output=True,
        text=True, env={**os.environ, 'PYTHONPATH': ''}, check=False)
    assert run.returncode == 1 and 'failed' in run.stdout, run.stdout[-2000:]
