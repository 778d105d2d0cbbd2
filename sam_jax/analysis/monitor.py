"""How flat the minimum is, measured between epochs of a training run."""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sam_jax import rngs
from sam_jax.analysis import hessian, sharpness
from sam_jax.analysis import objective as objectives
from sam_jax.errors import UserError
from sam_jax.sharpness.ascent import lp_ball
from sam_jax.sharpness.trees import lp_norm

# lambda_max over this one is the ratio of the SAM paper's Figure 3.
RATIO_TO = 5


def lambda_ratio(values: Sequence[float] | np.ndarray) -> float:
    """Returns lambda_max / lambda_5 of eigenvalues in descending order.

    NaN where it means nothing: there are fewer than five, or the fifth is not positive.
    """
    if len(values) < RATIO_TO or values[RATIO_TO - 1] <= 0:
        return float('nan')
    return float(values[0] / values[RATIO_TO - 1])


def chosen_examples(split: Any, count: int, seed: int) -> Any:
    """Returns that many examples of a split (all if it has no more), the same for every run."""
    return split.subset(rngs.permutation(seed, 'analysis', len(split))[:count])


class Monitor:
    """Measures a run's states as `config.analysis` says; changes nothing of them."""

    def __init__(self, experiment, state):
        """Places the examples; compiles nothing yet.

        Args:
          experiment: of the run.
          state: a TrainState on the devices.
        """
        config, dataset, layout = experiment.config, experiment.dataset, experiment.layout
        settings = config.analysis
        self._settings, self._layout = settings, layout
        self._scheduled = experiment.scheduled
        self._rho_counts = {'sgd': False, 'sam': True}.get(config.sam.method)
        if config.sam.p != 2:
            self._rho_counts = None
        split = chosen_examples(dataset.train, settings.examples, 0)
        # A product takes more memory than an evaluation: no more at once than training has.
        batch_size = min(config.eval.batch_size, config.replica_batch_size * len(layout.devices))
        self._objective, _ = objectives.create(
            experiment.model,
            {'params': state.params, 'batch_stats': state.batch_stats},
            dataset,
            split,
            layout,
            batch_size,
            arrays=experiment.arrays(dataset.train),
            loss=config.loss,
            label_smoothing=config.label_smoothing,
        )
        if not self._objective.count:  # placed now: what does not fit is said before the first step
            raise UserError('All images of the analysis are damaged.')
        m = min(config.replica_batch_size * config.sam.replicas_per_group, len(split))
        self._ascent = lp_ball(settings.rho)
        self._gap = sharpness.make_m_sharpness(self._objective, m, self._ascent)
        self._seconds, self._began = 0.0, time.perf_counter()

    def __call__(self, state):
        """Returns {'analysis/...': value} of a TrainState.

        lambda_max and lambda_ratio of the Hessian, sharpness: the rise of the loss of all examples
        over the ball of radius rho, gap: that of groups of the run's own m (of all examples, if
        they are fewer), edge: see `_edge`, seconds: it took. The loss is without penalty, BatchNorm
        in evaluation mode; of the params themselves, also where the run keeps a moving average.
        """
        began = time.perf_counter()
        objective = self._objective.with_statistics(state.batch_stats)
        values = self._eigenvalues(objective, state.params)
        results = {
            'lambda_max': float(values[0]),
            'lambda_ratio': lambda_ratio(values),
            'sharpness': sharpness.of_ball(objective, state.params, self._ascent).sharpness,
            'gap': self._gap(state.params, state.batch_stats).sharpness,
            'edge': self._edge(objective, state),
        }
        results['seconds'] = time.perf_counter() - began
        self._seconds += results['seconds']
        return {f'analysis/{name}': x for name, x in results.items()}

    def _eigenvalues(self, objective, params):
        """The largest ones; NaN where the loss is not finite, which ends no training."""
        flat = hessian.flat(objective.hessian_product, params, self._layout)
        try:
            # With a tolerance each process would decide for itself when to stop.
            return hessian.top_eigenpairs(
                flat.product,
                flat.size,
                k=min(RATIO_TO, flat.size),
                steps=self._settings.steps,
                tolerance=0,
            ).values
        except FloatingPointError:
            return [float('nan')]

    def _edge(self, objective, state):
        """The curvature up to which the last step was stable, see `sharpness.edge_of_stability`.

        NaN but for SGD and SAM in the 2-norm.
        """
        if self._rho_counts is None:
            return math.nan
        learning_rate, rho = self._scheduled(max(int(jax.device_get(state.step)) - 1, 0))
        return sharpness.edge_of_stability(
            float(lp_norm(objective.gradient(state.params))),
            learning_rate,
            rho if self._rho_counts else 0.0,
        )

    def share(self) -> float:
        """Returns the part of the time since this was made that the measuring took."""
        return self._seconds / (time.perf_counter() - self._began)
