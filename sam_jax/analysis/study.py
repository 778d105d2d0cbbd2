"""A run's flatness, measured and written down: its spectrum, its sharpness, its landscape."""

import dataclasses
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sam_jax import limits, optimizers, replicas, run_log
from sam_jax.analysis import hessian, landscape, monitor, sharpness, study_report
from sam_jax.analysis import objective as objectives
from sam_jax.errors import UserError
from sam_jax.experiment import Experiment
from sam_jax.experiments import figures
from sam_jax.sharpness import ascent, trees

# Takes (what, done, total) of the progress.
Tell = Callable[[str, int, int], None]

WHAT = ('spectrum', 'sharpness', 'landscape', 'order')
SPLIT, EXAMPLES = 'train', 1000


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and how finely.

    Attributes:
      what: some of WHAT.
      steps: products of Lanczos, at most.
      probes: starts of the density; the trace takes five times as many.
      rho: radius of the ball.
      adaptive_rho: radius of ASAM's ellipsoid, in its own units.
      m: group sizes of m-sharpness; those above the number of examples are left out.
      points: places along each axis of the landscape.
      extent: how far it goes along each axis, in units of the direction.
      directions: its axes, 'random' (filter-normalised) or 'eigenvectors'.
      seed: of the probes and directions.
    """

    what: tuple = WHAT[:3]
    steps: int = 80
    probes: int = 4
    rho: float = 0.05
    adaptive_rho: float = 0.5
    m: tuple = (1, 16, 64)
    points: int = 25
    extent: float = 1.0
    directions: str = 'random'
    seed: int = 0

    def __post_init__(self):
        for name in self.what:
            if name not in WHAT:
                raise UserError(f'what has {name!r}; it must be some of {", ".join(WHAT)}.')
        for name, low in (('steps', monitor.RATIO_TO), ('probes', 1), ('points', 3), ('seed', 0)):
            if getattr(self, name) < low:
                raise UserError(f'{name} is {getattr(self, name)}; it must be at least {low}.')
        for name in ('rho', 'adaptive_rho', 'extent'):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f'{name} is {getattr(self, name)}; it must be greater than 0.')
        if not self.points % 2:
            raise UserError(
                f'points is {self.points}; it must be odd, so that the run itself is '
                'one of the places.'
            )
        if min(self.m, default=1) < 1:
            raise UserError(f'm is {self.m}; it must hold numbers of examples, such as 1,16,64.')


def _quiet(what, done, total):
    """Shows no progress."""


class Run(NamedTuple):
    """A run opened for analysis.

    Attributes:
      name: of its folder and method.
      step: of the checkpoint.
      split: of which the examples are.
      objective: objective.Objective.
      params: on the devices.
      asked: {'examples', 'penalty'} as `open_run` was told them; None of a Run made otherwise.
    """

    name: str
    step: int
    split: str
    objective: Any
    params: Any
    asked: dict[str, Any] | None = None


def open_run(
    workdir: str,
    split: str = SPLIT,
    examples: int = EXAMPLES,
    penalty: bool = False,
    seed: int = 0,
    data_dir: str = '',
    epoch: int | None = None,
    batch_size: int = 0,
    devices: Sequence[replicas.Device] | None = None,
) -> Run:
    """Opens a checkpoint of a run on some examples; its moving average where it keeps one.

    Args:
      workdir: the folder of the run.
      split: 'train', with the labels trained on, or one that the run evaluates on.
      examples: how many of it; 0 for all.
      penalty: whether the run's L2 penalty is part of the loss.
      seed: of the choice of examples.
      data_dir: where the datasets lie; '' for the run's own.
      epoch: after which epoch; default the newest checkpoint.
      batch_size: examples computed at once; 0 for the run's eval.batch_size.
      devices: default all devices, however many the run was trained on.

    Raises:
      UserError: no run, no such checkpoint, no such split.
    """
    # One device fits every run's replicas; the analysis itself shares examples over all of them.
    devices = devices or jax.devices()
    experiment = Experiment.of_run(workdir, devices[:1], data_dir)
    state, step = experiment.restore(workdir, epoch)
    config, dataset = experiment.config, experiment.dataset
    layout, _ = replicas.make_layout(
        len(devices), 1, 1, devices=devices, backend=config.replica_backend
    )
    splits = {**dataset.evals, 'train': dataset.train}
    if split not in splits:
        raise UserError(f'split is {split!r}; it must be one of {", ".join(splits)}.')
    chosen = monitor.chosen_examples(splits[split], examples or len(splits[split]), seed)
    objective, params = objectives.create(
        experiment.model,
        experiment.weights(state),
        dataset,
        chosen,
        layout,
        batch_size or config.eval.batch_size,
        loss=config.loss,
        label_smoothing=config.label_smoothing,
        weight_decay=optimizers.penalty_factor(config.optimizer, config.optimizer.weight_decay)
        if penalty
        else 0.0,
        decay_norm_and_bias=config.optimizer.decay_norm_and_bias,
    )
    name = f'{config.sam.method}, {os.path.basename(os.path.normpath(workdir))}'
    return Run(name, step, split, objective, params, {'examples': examples, 'penalty': penalty})


def measure_spectrum(
    run: Run, settings: Settings, tell: Tell = _quiet
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns (what analysis.json says of the spectrum, arrays for the picture)."""
    layout, product = run.objective.layout, run.objective.hessian_product
    flat = hessian.flat(product, run.params, layout)
    steps, probes, seed = settings.steps, settings.probes, settings.seed
    began = time.perf_counter()
    top = _top_eigenpairs(run, flat, monitor.RATIO_TO, steps, seed, tell)
    seconds = time.perf_counter() - began
    density = hessian.density(
        flat.product,
        flat.size,
        probes,
        steps,
        seed,
        on_step=lambda i: tell(f'{run.name}: density', i, probes * steps),
    )
    trace = hessian.trace(
        product,
        run.params,
        layout,
        5 * probes,
        seed,
        on_step=lambda i: tell(f'{run.name}: trace', i, 5 * probes),
    )
    low, high = min(density.nodes.min(), 0.0), max(top.values[0], density.nodes.max())
    margin = 0.05 * (high - low)
    grid = np.linspace(low - margin, high + margin, 1000)
    said = {
        'lambda_max': float(top.values[0]),
        'lambda_ratio': monitor.lambda_ratio(top.values),
        'eigenvalues': top.values.tolist(),
        'residuals': top.residuals.tolist(),
        'lowest': min(top.lowest, float(density.nodes[density.weights > 0].min())),
        'products': top.steps,
        'seconds': seconds,
        'trace': trace.mean,
        'trace_standard_error': trace.standard_error,
        'layers': {
            name: {'trace': mean, 'standard_error': error}
            for name, (mean, error) in trace.layers.items()
        },
    }
    return said, {
        'grid': grid,
        'density': density.on(grid, 0.01 * (high - low)),
        'nodes': density.nodes,
        'weights': density.weights,
        'eigenvalues': top.values,
    }


def _top_eigenpairs(run, flat, k, steps, seed, tell):
    needed, free = 4 * steps * flat.size, limits.free_host_memory()
    if needed > free:
        raise UserError(
            f'steps is {steps}; so many vectors of the {flat.size:,} params need '
            f'{needed / 2**30:.3g} GiB of the host, and {free / 2**30:.3g} are '
            'free: take fewer.'
        )
    try:
        return hessian.top_eigenpairs(
            flat.product,
            flat.size,
            k=min(k, flat.size),
            steps=steps,
            seed=seed,
            on_step=lambda i: tell(f'{run.name}: eigenvalues', i, steps),
        )
    except FloatingPointError as e:
        raise UserError(
            f'{run.name}: the loss has no finite curvature at step {run.step}: {e}'
        ) from e


def measure_sharpness(
    run: Run, settings: Settings, tell: Tell = _quiet
) -> dict[str, dict[str, float]]:
    """Returns what analysis.json says of the sharpness: {measure: Rise as a dict}."""
    objective, params, rho = run.objective, run.params, settings.rho
    metric = ascent.adaptive_metric(0.01, 'weights')
    ascents = {
        'SAM step': ascent.lp_ball(rho),
        '5 projected steps': ascent.projected_steps(rho, 5, step_size=0.5),
        f'adaptive, rho {settings.adaptive_rho:g}': ascent.metric_ball(
            settings.adaptive_rho, metric
        ),
    }
    measures = {
        name: lambda a=a: sharpness.of_ball(objective, params, a) for name, a in ascents.items()
    }
    measures['average direction'] = lambda: sharpness.of_average_direction(
        objective, params, rho, seed=settings.seed
    )
    for m in settings.m:
        if m <= len(objective):
            measures[f'm = {m}'] = lambda m=m: sharpness.make_m_sharpness(
                objective, m, ascent.lp_ball(rho)
            )(params, objective.batch_stats)
    said = {}
    for i, (name, measure) in enumerate(measures.items()):
        rise = measure()
        said[name] = {**rise._asdict(), 'sharpness': rise.sharpness, 'error_rise': rise.error_rise}
        tell(f'{run.name}: sharpness', i + 1, len(measures))
    return said


def measure_surface(
    run: Run, directions: list[Any], places: np.ndarray, path: str, key: str, tell: Tell = _quiet
) -> dict[str, np.ndarray]:
    """Returns {'loss', 'error_rate'} at the places; what is measured is kept in a file.

    Args:
      run: Run.
      directions: of `landscape.make_surface`.
      places: float (n, dimensions).
      path: of the file, .npz, whose content is used if it is of the same key.
      key: what the surface depends on, as text.
      tell: takes (what, done, total) of the progress.
    """
    n = len(places)
    known = {name: np.full(n, np.nan) for name in ('loss', 'error_rate')}
    done = 0
    if os.path.exists(path):
        with np.load(path) as file:
            if str(file['key']) == key:
                known = {name: file[name] for name in known}
                done = int(file['done'])
    surface = landscape.make_surface(run.objective, run.params, directions) if done < n else None
    saved_at = time.perf_counter()
    at_once = len(run.objective.layout.devices)
    while done < n:
        part = slice(done, min(done + at_once, n))
        for name, values in surface(places[part]).items():
            known[name][part] = values
        done = part.stop
        if done == n or time.perf_counter() - saved_at > 10:
            _save(path, key=key, done=done, places=places, **known)
            saved_at = time.perf_counter()
        tell(f'{run.name}: places', done, n)
    return known


def _save(path, **arrays):
    partial = path.removesuffix('.npz') + '.part.npz'
    np.savez(partial, **arrays)
    os.replace(partial, path)


def _axes_of(run, settings, tell):
    if settings.directions == 'random':
        return [landscape.random_direction(run.params, settings.seed, i) for i in range(2)]
    flat = hessian.flat(run.objective.hessian_product, run.params, run.objective.layout)
    top = _top_eigenpairs(run, flat, 2, settings.steps, settings.seed, tell)
    # Of the length of a random axis, so that the extent means the same.
    length = float(trees.lp_norm(landscape.random_direction(run.params, settings.seed)))
    return [flat.unflatten(length * v) for v in top.vectors]


def analyze(
    runs: list[Run], out: str, settings: Settings = Settings(), tell: Tell = _quiet
) -> dict[str, Any]:
    """Measures one run or two and writes everything into a folder.

    Args:
      runs: Runs of `open_run`.
      out: the folder.
      settings: Settings.
      tell: takes (what, done, total) of the progress.

    Returns:
      The content of analysis.json.
    """
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as e:
        raise UserError(f'out is {out!r}, where nothing can be written: {e.strerror}.') from e
    said = {
        'settings': dataclasses.asdict(settings),
        'runs': [
            {
                'name': r.name,
                'step': r.step,
                'dataset': r.objective.dataset.name,
                'split': r.split,
                'examples': len(r.objective),
                'asked': r.asked,
                'weight_decay': r.objective.weight_decay,
                'label_smoothing': r.objective.label_smoothing,
                **r.objective.value(r.params),
            }
            for r in runs
        ],
    }
    for name in ('dataset', 'examples'):
        if len({of_run[name] for of_run in said['runs']}) > 1:
            raise UserError(
                f'The {name} of the two runs are '
                f'{" and ".join(str(r[name]) for r in said["runs"])}; they must be the '
                'same to be compared.'
            )
    drawn = []
    for i, (run, of_run) in enumerate(zip(runs, said['runs'])):
        if 'spectrum' in settings.what:
            of_run['spectrum'], arrays = measure_spectrum(run, settings, tell)
            _save(os.path.join(out, f'spectrum_{i + 1}.npz'), **arrays)
            drawn.append(
                figures.Spectrum(run.name, arrays['grid'], arrays['density'], arrays['eigenvalues'])
            )
        if 'sharpness' in settings.what:
            of_run['sharpness'] = measure_sharpness(run, settings, tell)
        if 'order' in settings.what:
            of_run['order_cosine'] = sharpness.order_cosine(run.objective, run.params, settings.rho)
    if drawn:
        figures.save(figures.spectra(drawn), os.path.join(out, 'spectrum.png'))
    # Between networks of different shapes there is no line.
    said['path'] = (
        len(runs) == 2 and len({str(jax.tree.map(np.shape, r.params)) for r in runs}) == 1
    )
    picture = os.path.join(out, 'landscape.png')
    if 'landscape' in settings.what and os.path.exists(picture):
        os.remove(picture)  # of an earlier command; `is_done` asks for it
    # Written before what may take longest.
    run_log.write_json(os.path.join(out, 'analysis.json'), said)
    with open(os.path.join(out, 'report.md'), 'w') as file:
        file.write(study_report.markdown(said))
    if 'landscape' in settings.what:
        _landscapes(runs, out, settings, tell)
        if said['path']:
            _path_between(runs, out, settings.points, tell)
    return said


def is_done(
    out: str, settings: Settings, step: int, split: str, examples: int, penalty: bool = False
) -> bool:
    """Whether a folder holds the same measurements of the same step, whole; see `open_run`."""
    said = run_log.read_json(os.path.join(out, 'analysis.json'))
    if not said:
        return False
    run = said['runs'][0]
    # Older versions noted no question: of them only what certainly answers this one stands.
    known = {'examples': run['examples'], 'penalty': run['weight_decay'] > 0}
    drawn = 'landscape' not in settings.what or os.path.exists(os.path.join(out, 'landscape.png'))
    return (
        drawn
        and json.loads(json.dumps(dataclasses.asdict(settings))) == said['settings']
        and (run['step'], run['split']) == (step, split)
        and (run.get('asked') or known) == {'examples': examples, 'penalty': penalty}
    )


def _identity(run):
    """What a surface of a run depends on, besides its directions and places."""
    on = run.objective
    checksum = _checksum([run.params, on.batch_stats, on.split.index])
    return [run.name, run.step, run.split, checksum, on.weight_decay, on.loss, on.label_smoothing]


def _checksum(tree):
    checksum = 0
    for x in jax.tree.leaves(jax.device_get(tree)):
        checksum = zlib.crc32(np.ascontiguousarray(x).tobytes(), checksum)
    return checksum


def _landscapes(runs, out, settings, tell):
    ticks, places = landscape.grid(settings.extent, settings.points, 2)
    drawn = []
    for i, run in enumerate(runs):
        axes = _axes_of(run, settings, tell)
        key = json.dumps([_identity(run), settings.points, settings.extent, _checksum(axes)])
        found = measure_surface(
            run, axes, places, os.path.join(out, f'landscape_{i + 1}.npz'), key, tell
        )
        drawn.append(
            figures.Surface(run.name, ticks, found['loss'].reshape(len(ticks), len(ticks)))
        )
    axis = {'random': 'direction', 'eigenvectors': 'eigenvector'}[settings.directions]
    figures.save(
        figures.surfaces(drawn, f'{axis} 1', f'{axis} 2'), os.path.join(out, 'landscape.png')
    )


def _path_between(runs, out, points, tell):
    variables = [{'params': r.params, 'batch_stats': r.objective.batch_stats} for r in runs]
    # Not beyond the runs, where BatchNorm's variances may be negative.
    places = np.linspace(0.0, 1.0, 2 * points - 1)
    way = landscape.difference(*variables)
    key = json.dumps([*map(_identity, runs), points])
    found = measure_surface(
        runs[0], [way], places[:, None], os.path.join(out, 'path.npz'), key, tell
    )
    no_interval = [math.nan] * len(places)
    figures.save(
        figures.panels(
            [
                figures.Panel(
                    f'from {runs[0].name} (0) to {runs[1].name} (1)',
                    'share of the way',
                    label,
                    [figures.Curve(label, places, list(values), no_interval)],
                    log_y=log_y,
                )
                for label, values, log_y in (
                    ('loss', found['loss'], True),
                    ('error rate (%)', 100 * found['error_rate'], False),
                )
            ]
        ),
        os.path.join(out, 'path.png'),
    )
