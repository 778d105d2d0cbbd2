"""Are SAM's minima flatter? SGD against SAM on the digits, in one table.

    python scripts/flatness.py [--out=runs/flatness] [--seeds=5] [--noise=0.4] [--pictures=docs]

Trains what is not trained yet (configs/digits.py with its own rho), measures every run on its
training set, and prints a table of means with 95 % t-intervals over the seeds. Of seed 0 the
pictures of both runs beside each other are drawn into --pictures, if that is given. A run that is
trained or measured is not done again.
"""

import os
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
from absl import app, flags

from configs import digits
from sam_jax import run_log, train
from sam_jax.analysis import study
from sam_jax.experiments.results import mean_and_interval

_OUT = flags.DEFINE_string('out', 'runs/flatness', 'Folder of the runs.')
_SEEDS = flags.DEFINE_integer('seeds', 5, 'How many.')
_NOISE = flags.DEFINE_float('noise', 0.0, 'Fraction of training labels drawn anew.')
_PICTURES = flags.DEFINE_string('pictures', '', 'Folder for the pictures of seed 0.')
_PART = flags.DEFINE_string('part', '0/1', 'I/N: only trains and measures seeds I, I + N, ...')

METHODS = ('sgd', 'sam')
# The eigenvalues are found after fewer steps; the density is drawn of two runs alone, with more.
SETTINGS = study.Settings(what=('spectrum', 'sharpness'), steps=30, m=(1, 64))
MEASURES = {
    'test error (%)': lambda said: 100 * said['test_error'],
    'training loss': lambda said: said['loss'],
    'lambda_max': lambda said: said['spectrum']['lambda_max'],
    'lambda_max / lambda_5': lambda said: said['spectrum']['lambda_ratio'],
    'trace': lambda said: said['spectrum']['trace'],
    **{f'rise of the loss: {name}': lambda said, name=name: said['sharpness'][name]['sharpness']
       for name in ('SAM step', '5 projected steps', 'average direction', 'adaptive, rho 0.5',
                    'm = 1', 'm = 64')},
    'rise of the error rate: SAM step (points of %)': lambda said: 100 * said['sharpness'][
        'SAM step']['error_rise'],
}


def folder(method, seed):
    return os.path.join(_OUT.value, f'noise{_NOISE.value:g}', method, str(seed))


def measured(method, seed):
    """What analysis.json says of a run, which is trained and measured if it was not."""
    workdir = folder(method, seed)
    result, said = (os.path.join(workdir, *name) for name in (
        ('result.json',), ('analysis', 'analysis.json')))
    if not os.path.exists(result):
        config = digits.get_config(f'method={method},noise={_NOISE.value},seed={seed}')
        train.train_and_evaluate(config, workdir, devices=jax.devices()[:1])
    if not os.path.exists(said):
        study.analyze([study.open_run(workdir, examples=0)], os.path.dirname(said), SETTINGS)
        print(f'{workdir} is measured.', file=sys.stderr, flush=True)
    return {**run_log.read_json(said)['runs'][0],
            'test_error': run_log.read_json(result)['test/error_rate']}


def table(runs):
    """The Markdown table of {method: what is said of its runs}."""
    lines = ['| | ' + ' | '.join(runs) + ' |', '|---|' + '---|' * len(runs)]
    for name, value in MEASURES.items():
        cells = ['{:.4g} ± {:.2g}'.format(*mean_and_interval(
            [float(value(said)) for said in of_method])) for of_method in runs.values()]
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def draw(place):
    """Draws both runs of seed 0 beside each other into a folder."""
    both = [study.open_run(folder(method, 0), examples=0) for method in METHODS]
    out = os.path.join(_OUT.value, f'noise{_NOISE.value:g}', 'pictures')
    study.analyze(both, out, study.Settings(what=('spectrum', 'landscape')))
    for name in ('spectrum', 'landscape'):
        shutil.copy(os.path.join(out, f'{name}.png'), place)


def main(argv):
    del argv
    part, parts = map(int, _PART.value.split('/'))
    runs = {method: [measured(method, seed) for seed in range(_SEEDS.value)[part::parts]]
            for method in METHODS}
    if parts > 1:
        return
    print(table(runs))
    if _PICTURES.value:
        draw(_PICTURES.value)


if __name__ == '__main__':
    app.run(main)
