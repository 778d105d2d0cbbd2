"""Folders of runs as the loop leaves them, for tests of what reads them."""

import itertools
import json

from configs import digits
from sam_jax import settings


def write_run(folder, config, error=None, validation=None, seed=0, epochs=4, **more):
    """A run's folder without checkpoints; without errors (in percent) it is not finished."""
    with config.unlocked():
        config.seed = config.data.label_noise_seed = seed
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(
        json.dumps(
            {
                'config': settings.jsonable(config),
                'git_revision': 'abc',
                'device_kind': 'cpu',
                'device_count': 1,
                **more,
            }
        )
    )
    if error is None:
        return
    result = {
        'test/error_rate': error / 100,
        'step': 40,
        'epochs': epochs,
        'wall_time': 36.0,
        'gradient_evaluations': 80 if config.sam.method == 'sam' else 40,
    }
    if validation is not None:
        result['validation/error_rate'] = validation / 100
    (folder / 'result.json').write_text(json.dumps(result))
    lines = [
        {
            'step': 20 * i,
            'epoch': epochs * i / 2,
            'train/loss': 1 / i,
            'test/error_rate': error / 100,
        }
        for i in (1, 2)
    ]
    (folder / 'metrics.jsonl').write_text(''.join(f'{json.dumps(x)}\n' for x in lines))


def digits_config(argument='', **overrides):
    """configs/digits.py with settings of sections given as section__name."""
    config = digits.get_config(argument)
    for key, value in overrides.items():
        section, name = key.split('__')
        config[section][name] = value
    return config


# rho: validation errors of two seeds (None: diverged), test error.
TRIED = {0.1: ((3, 5), 1.0), 0.2: ((2, 3), 2.0), 0.5: ((1, None), 0.5)}


def write_tried(folder):
    """A sweep of rho with a validation split."""
    for rho, (validation, test) in TRIED.items():
        for seed, error in enumerate(validation):
            write_run(
                folder / f'{rho}-{seed}',
                digits_config(f'rho={rho}', data__validation=True),
                seed=seed,
                **({} if error is None else {'error': test, 'validation': error}),
            )


def write_sweep(folder):
    """The same with a baseline, and another run far away."""
    write_tried(folder)
    write_run(
        folder / 'sgd', digits_config('method=sgd', data__validation=True), error=4, validation=4
    )
    write_run(folder / 'noise', digits_config('noise=0.4'), error=20)


def write_many(folder):
    """A sweep over models, noise and methods in folders of long names; one run is not finished.

    Its curves are of 1, 2, 60 and 1800 epochs.
    """
    length = dict(zip((0.0, 0.2, 0.4, 0.8), (1, 2, 60, 1800)))
    methods = {
        'method=sgd': 0,
        'method=sam,rho=0.05': 1,
        'method=sam,rho=0.1': 0.5,
        'method=asam,rho=1.0': 0.7,
    }
    for model, noise, method, seed in itertools.product(
        ('wrn10_1', 'wrn28_10'), length, methods, (0, 1)
    ):
        config = digits_config(f'{method},noise={noise}', data__validation=True, model__name=model)
        config.total_epochs = length[noise]
        run = folder / f'model={model},label_noise={noise},{method},name=of_some_length' / f'{seed}'
        error = 2 + 20 * noise + methods[method] + 0.1 * seed
        write_run(run, config, error, validation=error, seed=seed, epochs=length[noise])
    write_run(folder / 'one_that_is_not_finished_and_has_a_long_name', digits_config())
