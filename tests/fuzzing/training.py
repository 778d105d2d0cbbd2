"""Whole runs of two steps: finite, resumed bit for bit, and the same on two devices."""

import pathlib
import shutil
import tempfile

import jax
import numpy as np
import sklearn.datasets  # noqa: F401  slow to import: once, and not in the process of each case
from helpers import compilations
from hypothesis import strategies as st

from fuzzing import OUTCOMES, Fault, check_sentence, configs
from sam_jax import run_log, train
from sam_jax.errors import UserError

BATCH = 16

# Those that compile quickly are drawn more often; the last three are none.
MODELS = (*configs.TINY, *4 * ('resnet8', 'wrn10_1'), 'wrn11_1', 'vit-tiny0', 'lenet')

# Of a step with this much rounding: what two orders of a sum may differ by, relatively.
TOLERANCES = {'float64': 1e-6, 'float32': 2e-2, 'bfloat16': 2e-1}

# Results that are NaN where they mean nothing, as `analysis.monitor` says.
UNDEFINED = ('analysis/edge', 'analysis/lambda_ratio')


@st.composite
def cases(draw) -> dict:
    """A case of `configs.cases` that, if it is valid, makes two steps of 16 images.

    Its numbers are of a usual size, but for those of two keys at most, which are of any kind.
    """
    case = draw(configs.cases(wild=2, usual=True, of=MODELS))
    changes = case['changes']
    replicas = draw(st.sampled_from([1, 2, 2, 4]))
    group = draw(st.sampled_from([g for g in (1, 2, 4) if g <= replicas]))
    changes |= {
        'batch_size': BATCH,
        'replica_batch_size': BATCH // replicas,
        'sam.replicas_per_group': group,
        'total_epochs': 2,
        'checkpoint.keep_epochs': (1,),
        'eval.batch_size': 64,
        'eval.every_epochs': draw(st.sampled_from([0, 0, 1, 2])),
        'model.dtype': draw(st.sampled_from(['float32', 'bfloat16', 'float64', 'float64'])),
    }
    if changes['data.name'] == 'fake_cifar10' and changes['model.dtype'] == 'float64':
        changes['model.dtype'] = 'float32'  # 1,000 images of 32 x 32: minutes in float64 on CPU
    if 'data.image_size' in changes:
        changes['data.image_size'] = draw(st.sampled_from([8, 16]))
    if 'model.alpha' in changes or case['model'] == 'pyramidnet11':
        changes['model.alpha'] = 4.0
    for key in ('data.fraction', 'data.base_to_new', 'optimizer.warmup_steps'):
        changes.pop(key, None)
    if changes['data.name'] in ('digits', 'fake_cifar10'):
        changes['data.shots'] = 2  # 20 examples: an epoch is a step
    else:
        changes.pop('data.shots', None)
    return case


def check(case: dict) -> None:
    """Trains, resumes and trains on two devices; or refuses before anything is compiled.

    Raises:
      Fault: none of it.
    """
    x64 = case['changes'].get('model.dtype') == 'float64'
    with jax.enable_x64(x64), tempfile.TemporaryDirectory(prefix='fuzz-') as folder:
        config = configs.build(case)
        with compilations() as compiled:
            try:
                whole = _train(config, f'{folder}/run', 1)
            except UserError as e:
                check_sentence(str(e))
                if not compiled:
                    OUTCOMES['refused'] += 1
                elif 'not finite' in str(e) or 'diverged' in str(e):
                    OUTCOMES['diverged'] += 1
                else:
                    raise Fault(f'refused after {len(compiled)} compilations: {e}') from e
                return
        for path, leaf in jax.tree_util.tree_leaves_with_path((whole.params, whole.batch_stats)):
            if not np.isfinite(np.asarray(leaf, np.float64)).all():
                raise Fault(f'{jax.tree_util.keystr(path)} is not finite')
        _check_result(folder)
        _check_resumed(config, folder, whole)
        try:
            other = _train(config, f'{folder}/other', 2)
        except UserError as e:
            check_sentence(str(e))
            OUTCOMES['trained, refused on two devices'] += 1
            return
        _check_near(whole, other, TOLERANCES[config.model.dtype])
        OUTCOMES['trained'] += 1


def _train(config, workdir, devices):
    return train.train_and_evaluate(config, workdir, jax.devices()[:devices], train.Watch(()))


def _check_result(folder):
    result = run_log.read_json(f'{folder}/run/result.json')
    for name, value in result.items():
        if not isinstance(value, (int, float)) and name not in UNDEFINED:
            raise Fault(f'result.json: {name} is {value}')
    if result['step'] != 2:
        raise Fault(f'{result["step"]} steps')


def _check_resumed(config, folder, whole):
    run = pathlib.Path(folder, 'run')
    shutil.rmtree(run / 'checkpoints' / '2')
    (run / 'result.json').unlink()
    again = _train(config, str(run), 1)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(again), strict=True
    ):
        if not np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True):
            raise Fault(f'resumed, {jax.tree_util.keystr(path)} is another')


def _check_near(whole, other, tolerance):
    for name in ('params', 'batch_stats'):
        a, b = (
            np.concatenate(
                [np.zeros(1)]
                + [np.ravel(x).astype(np.float64) for x in jax.tree.leaves(getattr(state, name))]
            )
            for state in (whole, other)
        )
        distance = np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-6)
        if not distance <= tolerance:
            raise Fault(f'on two devices {name} are {distance:.2g} away')


def minimal(method: str, **changes) -> dict:
    """A case of its own for tests: {'section.key': value} on the digits."""
    return {
        'model': 'resnet8',
        'method': method,
        'devices': 1,
        'changes': {
            'data.name': 'digits',
            'data.augment': 'none',
            'data.shots': 2,
            'batch_size': BATCH,
            'replica_batch_size': BATCH // 2,
            'total_epochs': 2,
            'checkpoint.keep_epochs': (1,),
            **changes,
        },
        'without': [],
    }
