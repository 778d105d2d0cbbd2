"""SGD against SAM on the real digits under label noise: the table in README.

    python scripts/learning.py [--workdir=runs/learning] [--seeds=5] [--noise=0,0.4,0.8]

One run of configs/digits.py for each method, noise rate and seed, one after the other; finished
runs are not run again. Prints test error on clean test labels: mean and 95 % t-interval over seeds.
"""

import json
import logging
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import app, flags

from configs import digits
from sam_jax import train
from sam_jax.experiments.results import mean_and_interval

_WORKDIR = flags.DEFINE_string('workdir', 'runs/learning', 'Folder that holds a folder a run.')
_SEEDS = flags.DEFINE_integer('seeds', 5, 'Seeds 0, 1, ...')
_NOISE = flags.DEFINE_list('noise', ['0', '0.4', '0.8'], 'Rates of label noise.')

METHODS = ('sgd', 'sam')

# SAM's rho by rate of noise: the best of 0.2, 0.5, 1, 2 on the held-out tenth, seed 100:
# ./scripts/train.sh configs/digits.py:noise=0.4,rho=1,seed=100 --config.data.validation=True
RHO = {'0': 0.5, '0.4': 2.0, '0.8': 0.5}


def test_error(method, noise, seed):
    """Trains, or finds trained; returns the test error in percent."""
    workdir = os.path.join(_WORKDIR.value, f'{method}-noise{noise}-seed{seed}')
    result = os.path.join(workdir, 'result.json')
    if not os.path.exists(result):
        rho = RHO.get(noise, 0.5)
        train.train_and_evaluate(digits.get_config(
            f'method={method},noise={noise},rho={rho},seed={seed}'), workdir)
    with open(result) as f:
        error = 100 * json.load(f)['test/error_rate']
    print(f'{workdir}: {error:.1f} %', file=sys.stderr, flush=True)
    return error


def main(argv):
    del argv
    logging.getLogger('sam_jax').setLevel(logging.WARNING)
    logging.getLogger('absl').setLevel(logging.WARNING)
    print('| label noise | ' + ' | '.join(f'{m.upper()} test error (%)' for m in METHODS) + ' |')
    print('|---|' + '---|' * len(METHODS))
    for noise in _NOISE.value:
        cells = []
        for method in METHODS:
            errors = [test_error(method, noise, seed) for seed in range(_SEEDS.value)]
            mean, half = mean_and_interval(errors)
            cells.append(f'{mean:.1f} ± {half:.1f}')
        print(f'| {100 * float(noise):.0f} % | ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
    app.run(main)
