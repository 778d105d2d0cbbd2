"""Everything compiles for accelerators that are not there: methods, augmentation, analyses.

./scripts/test_targets.sh runs it.
"""

import jax
import jax.numpy as jnp
import pytest
from helpers import small_config

from configs import cifar, imagenet, prompts
from sam_jax import models, optimizers
from sam_jax.analysis import objective as objectives
from sam_jax.settings import schema
from sam_jax.sharpness import registry
from sam_jax.targets import hardware, hlo, programs

TARGETS = ('tpu:v5e:2x2', 'gpu:h100:4')

pytestmark = pytest.mark.targets


@pytest.fixture(autouse=True)
def no_cache():
    """A program for absent hardware cannot be read back, and some hundred take gigabytes."""
    jax.config.update('jax_enable_compilation_cache', False)
    yield
    jax.clear_caches()


def _compiled(lowered, **options):
    return hlo.instructions(lowered.compile(compiler_options=options or None).as_text())


def _experiment(target, **settings):
    # As many epochs as methods of the past want.
    config = small_config(batch_size=64, replica_batch_size=16, total_epochs=20, **settings)
    return programs.experiment_for(config, hardware.target(target).devices)


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('method', registry.METHODS)
def test_every_method(method, target):
    """One exchange of all devices at least, and nothing goes to the host."""
    program = _compiled(programs.train_step_of(_experiment(target, sam__method=method)).lowered)
    assert hlo.collectives(program) and not hlo.host_transfers(program)


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('remat', [False, True])
def test_vision_transformer(remat, target):
    """With all that its config brings: GSAM, AdamW, a schedule after the warm-up."""
    config = imagenet.get_config('model=vit-s16,method=gsam,smoke')
    config.batch_size, config.replica_batch_size = 64, 16
    config.model.dtype, config.model.remat = 'bfloat16', remat
    config.model.dropout_rate = config.model.stochastic_depth_rate = 0.1
    experiment = programs.experiment_for(config, hardware.target(target).devices)
    program = _compiled(programs.train_step_of(experiment).lowered)
    assert hlo.collectives(program) and not hlo.host_transfers(program)


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('name', [f.tiny for f in models.FAMILIES.values()])
def test_every_family(name, target):
    """At its smallest; of CLIP its prompts are learned."""
    if name.startswith('clip'):
        config = prompts.get_config('small,smoke')
        config.batch_size, config.replica_batch_size = 16, 4
    else:
        config = cifar.get_config('smoke')
        with config.unlocked():
            for option in schema.model_options(config.model.name):
                del config.model[option]
            schema.set_model(config, name)
        config.data.name = 'fake_cifar10'
        config.batch_size, config.replica_batch_size = 32, 8
    # Without a GPU to try them on, XLA finds no tiles for a product of 150 x 32 by 32 x 32.
    options = {'xla_gpu_enable_triton_gemm': False} if target.startswith('gpu') else {}
    experiment = programs.experiment_for(config, hardware.target(target).devices)
    program = _compiled(programs.train_step_of(experiment).lowered, **options)
    assert hlo.collectives(program) and not hlo.host_transfers(program)


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('name', optimizers.DECOUPLED)
def test_every_optimizer(name, target):
    experiment = _experiment(target, optimizer__name=name, optimizer__epsilon=1e-8)
    program = _compiled(programs.train_step_of(experiment).lowered)
    assert hlo.collectives(program) and not hlo.host_transfers(program)


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize(
    'settings',
    [
        {'data__augment': 'randaugment'},
        {'data__augment': 'autoaugment_cutout', 'data__cutout_per_image': True},
        {'data__mixup_alpha': 0.2},
        {'data__cutmix_alpha': 1.0, 'data__mix_per_image': True},
    ],
    ids=str,
)
def test_augmentation_grows_by_no_instruction_with_the_batch(settings, target):
    def size(images):
        config = small_config(
            data__name='fake_cifar10', batch_size=4 * images, replica_batch_size=images, **settings
        )
        experiment = programs.experiment_for(config, hardware.target(target).devices)
        lowered = programs.train_step_of(experiment).lowered
        return lowered, lowered.as_text().count('\n')

    (lowered, lines), (_, more) = size(8), size(32)
    assert lines == more
    assert not hlo.host_transfers(_compiled(lowered))


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('kind', ['sums', 'gradient', 'hessian', 'gauss_newton'])
def test_analyses(kind, target):
    experiment = _experiment(target)
    dataset, layout = experiment.dataset, experiment.layout
    state = jax.eval_shape(experiment.create_state)
    split = dataset.evals['test']
    arrays = programs.shapes(dataset.device_arrays(split))
    objective = objectives.Objective(
        experiment.model, dataset, split, layout, 64, state.batch_stats, arrays
    )
    feed = programs.shapes(next(dataset.eval_feeds(split, 64, layout)))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    total = {'loss': scalar, 'error_rate': scalar} if kind == 'sums' else state.params
    vectors = (state.params,) if kind in ('hessian', 'gauss_newton') else ()
    step = objectives._make_steps(objective)[kind]
    lowered = step.lower(total, state.params, state.batch_stats, arrays, feed, vectors)
    assert hlo.collectives(_compiled(lowered))
