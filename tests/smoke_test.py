"""Each of the paper's configs, made tiny by `:smoke`, takes two steps on data of its shape."""

import dataclasses
import importlib
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from sam_jax import settings, sharpness, train
from sam_jax.data import records, sources
from sam_jax.data.resident import Split

ROWS = [('cifar', ''), ('ablations', 'figure=landscape,method=sgd'), ('ablations', 'figure=m,m=1')]
# Longer to compile, of parts that other tests have as well.
SLOW_ROWS = [
    ('fashion_mnist', 'augment=cutout'),
    ('fashion_mnist', 'small,noise=0.4'),
    ('imagenet', 'model=vit-s16,method=gsam'),
    ('label_noise', 'noise=0.4,mixup=8,validation'),
    ('ablations', 'figure=order'),
    ('cifar', 'model=shake_shake_26_2x96d,augment=autoaugment,dataset=cifar100'),
    ('cifar', 'model=pyramidnet272,augment=cutout'),
    ('cifar', 'model=pyramidnet272_shakedrop,method=sgd,doubled'),
    ('imagenet', ''),
    ('imagenet', 'model=vit-b32,recipe=augmented'),
    ('cifar', 'model=vit-ti4'),
    ('finetune', 'dataset=aircraft,model=efficientnet-l2-475'),
    ('ablations', 'figure=spectrum'),
    ('ablations', 'figure=steps,steps=2,dataset=cifar100'),
    ('ablations', 'figure=random'),
    ('ablations', 'figure=p_norm'),
    ('ablations', 'figure=sync'),
    ('digits', ''),
    ('prompts', 'small'),
    ('svhn', 'augment=autoaugment_only_cutout'),
    ('finetune', 'dataset=cifar10'),
    ('finetune', 'dataset=imagenet'),
    *(
        ('relatives', argument)
        for argument in (
            'paper=gsam',
            'paper=gsam,model=vit-b32',
            'paper=asam',
            'paper=looksam',
            'paper=esam,model=wrn28_10',
            'paper=saf,method=mesa',
            'paper=cr_sam',
            'paper=universal',
            'paper=universal,method=sparse_sam',
            'paper=fsam',
            'paper=vasso',
            'paper=sam_on',
            'paper=msam',
            'paper=msam,model=vit-s32',
            'paper=wsam',
            'paper=sampa',
            'paper=sassha',
            'paper=saf',
        )
    ),
]
# One of each class of the datasets whose classes are parted in two, see `prompts`.
TEST = 10

SHAPES = {'digits': (8, 8, 1), 'fashion_mnist': (28, 28, 1)}


def _get(stem, argument):
    return importlib.import_module(f'configs.{stem}').get_config(argument)


def _images(n, shape):
    return np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)


def _jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'jpeg')
    return file.getvalue()


class _FakeStream:
    """JPEG images as `records.Stream.open` gives them."""

    def __init__(self, num_train, num_classes):
        self._num_train, self._num_classes = num_train, num_classes

    def open(self, data_dir):
        train, test = (
            [
                (_jpeg(image), i % self._num_classes, f'example {i}')
                for i, image in enumerate(_images(n, (80, 100, 3)))
            ]
            for n in (self._num_train, TEST)
        )
        return train, test, self._num_classes


def _fake(monkeypatch, name, num_train):
    """Puts random images of the right shape and classes in the place of the dataset `name`."""
    if name in records.STREAMS:
        classes = getattr(records.STREAMS[name], 'num_classes', 100)
        monkeypatch.setitem(records.STREAMS, name, _FakeStream(num_train, classes))
        return
    source = sources.SOURCES[name]

    def read(data_dir):
        return tuple(
            Split(
                _images(n, SHAPES.get(name, (32, 32, 3))),
                np.arange(n, dtype=np.int32) % source.num_classes,
            )
            for n in (num_train, TEST)
        )

    monkeypatch.setitem(
        sources.SOURCES, name, dataclasses.replace(source, read=read, validation_size=0)
    )


@pytest.mark.parametrize(
    'stem,argument', [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_ROWS)]
)
def test_two_steps(stem, argument, tmp_path, monkeypatch):
    config = _get(stem, f'{argument},smoke')
    config.log_every_steps = 1
    images = 2 * config.batch_size // config.total_epochs + config.data.validation
    _fake(monkeypatch, config.data.name, images)
    train.train_and_evaluate(config, str(tmp_path), devices=jax.devices()[:2])
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['step'] == 2
    method = config.sam.method
    of_steps = [sharpness.gradients(method, step) for step in range(2)]
    assert result['gradient_evaluations'] == sum(of_steps)
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    norms = [line['train/perturbation_norm'] for line in lines if 'train/perturbation_norm' in line]
    assert np.isfinite(result['test/loss']) and len(norms) == 2
    # At the second step, since momentum and warm-ups begin at 0; at the first of a gate that then
    # shuts.
    climbs = 0 if of_steps[1] < of_steps[0] else 1
    assert (norms[climbs] > 0) == bool(sharpness.METHODS[method].norm)


@pytest.mark.parametrize('stem,argument', ROWS + SLOW_ROWS)
def test_smoke_changes_sizes_only(stem, argument):
    full, tiny = (settings.flatten(_get(stem, a)) for a in (argument, f'{argument},smoke'))
    changed = {key for key in full if full[key] != tiny[key]}
    assert full.keys() == tiny.keys()
    assert changed <= {
        'model.name',
        'model.alpha',
        'batch_size',
        'replica_batch_size',
        'eval.batch_size',
        'sam.replicas_per_group',
        'data.image_size',
        'total_epochs',
        'checkpoint.keep_epochs',
        'optimizer.warmup_steps',
        'optimizer.warmup_epochs',
        'optimizer.milestones',
        'sam.warmup_epochs',
        'sam.start_epoch',
        'sam.epochs_ago',
    }
