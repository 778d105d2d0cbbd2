"""The one training loop. It decides when; what is computed stands in `train_step.py`."""

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sam_jax import (
    analysis,
    data,
    distributed,
    evaluate,
    replicas,
    reports,
    schedules,
    train_step,
    writers,
)
from sam_jax import config as config_lib
from sam_jax.checkpoint import Checkpoints
from sam_jax.data import pictures
from sam_jax.errors import UserError
from sam_jax.models import pretrained

_log = logging.getLogger(__name__)


class Preempted(Exception):
    """The run was asked to stop and has saved its state; start it again to go on."""


class _Signal:
    """Notes SIGTERM; on several processes, agrees on the step at which all of them stop."""

    def __enter__(self):
        self._received = False
        self._previous = None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_):
        self._received = True

    def received(self, step):
        if jax.process_count() == 1:
            return self._received
        from jax.experimental import multihost_utils
        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


class _Arrays:
    """The arrays of splits on the devices, each array once, however many splits share it."""

    def __init__(self, dataset, layout):
        self._dataset, self._layout = dataset, layout
        self._placed = {}

    def __call__(self, split):
        arrays = self._dataset.device_arrays(split)
        for array in arrays.values():
            if id(array) not in self._placed:
                self._placed[id(array)] = self._layout.replicate(array)
        return {name: self._placed[id(array)] for name, array in arrays.items()}


class _Evaluator:
    """Evaluates a state on the splits that the config asks for."""

    def __init__(self, config, model, dataset, layout, arrays):
        self._step = evaluate.make_eval_step(model, layout, dataset, config.eval.top5)
        self._config, self._dataset, self._layout = config, dataset, layout
        self._arrays = arrays
        self._splits = _evaluated(config, dataset)

    def __call__(self, state):
        """Returns {'test/error_rate': ..., 'test/ema_error_rate': ..., ...}."""
        versions = {'': (state.params, state.batch_stats)}
        if state.ema is not None:
            versions['ema_'] = (state.ema['params'], state.ema['batch_stats'])
        results = {}
        for name, split in self._splits.items():
            prefix = name if name in ('test', 'validation') else f'{name}_set'
            for version, variables in versions.items():
                feeds = self._dataset.eval_feeds(
                    split, self._config.eval.batch_size, self._layout)
                means = evaluate.evaluate(
                    self._step, *variables, self._arrays(split), feeds, self._layout)
                results.update({f'{prefix}/{version}{k}': v for k, v in means.items()})
        return results


def _evaluated(config, dataset):
    return {name: split for name, split in dataset.evals.items()
            if config.eval.train_set or not name.startswith('train')}


class _Plan(NamedTuple):
    """What is known of a run before it starts."""

    config: Any
    workdir: str
    layout: replicas.Layout
    note: str
    dataset: Any
    model: Any
    steps_per_epoch: int
    total_steps: int

    @property
    def result_path(self):
        return os.path.join(self.workdir, 'result.json')


def train_and_evaluate(config: Any, workdir: str,
                       devices: Sequence[replicas.Device] | None = None) -> train_step.TrainState:
    """Trains, evaluates, saves and reports one run, or resumes it where it was stopped.

    The same config and seed give the same result on any number of devices and processes, up to
    rounding, and with any number of restarts, bit for bit.

    Args:
      config: ConfigDict with the keys of `configs/common.py`.
      workdir: folder of the run; made if it is not there. Gets checkpoints/, TensorBoard events,
        metrics.jsonl, config.json and, at the end, result.json.
      devices: default all devices.

    Returns:
      The final TrainState.

    Raises:
      UserError: something in config or workdir that the caller can mend; or the run diverged.
      Preempted: SIGTERM came; the state is saved.
    """
    began = time.time()
    plan = _make_plan(config, workdir, devices)
    with contextlib.closing(_checkpoints(plan)) as checkpoints, _Signal() as stop:
        state, first_step, wall_before = _restore(plan, checkpoints)
        main = distributed.is_main()
        if first_step == plan.total_steps and os.path.exists(plan.result_path):
            if main:
                _log.info('The run in %s is finished; nothing to do. For another one choose '
                          'another workdir.', workdir)
                _log.info('%s', reports.summary(writers.read_json(plan.result_path), workdir))
            return state
        writer = writers.RunWriter(workdir, main, first_step)
        progress = writers.Progress(first_step, plan.total_steps, config.batch_size, main)
        with contextlib.closing(writer), contextlib.closing(progress):
            _announce(plan, state, first_step, writer, progress)
            return _run(plan, state, first_step, checkpoints, writer, progress, stop,
                        wall_time=lambda: wall_before + time.time() - began)


def _make_plan(config, workdir, devices, read_only=False):
    """Checks everything that can be checked before long work, and builds data and model."""
    config_lib.check(config)
    layout, note = replicas.make_layout(
        config.batch_size, config.replica_batch_size, config.sam.replicas_per_group,
        config.replica_loop, devices)
    if not read_only:
        config_lib.check_with_layout(config, layout)
        _check_workdir(workdir)
    dataset = data.load_dataset(config.data)
    config_lib.check_with_data(config, dataset)
    dataset.check_memory([dataset.train, *_evaluated(config, dataset).values()],
                         *replicas.free_memory(layout.devices))
    model = config_lib.create_model(config, dataset.num_classes)
    steps_per_epoch = dataset.num_train_examples // config.batch_size
    return _Plan(config, workdir, layout, note, dataset, model, steps_per_epoch,
                 config.total_epochs * steps_per_epoch)


def _restore(plan, checkpoints, step=None):
    """Returns (state on the devices, steps made, wall time so far), of a step or of the newest."""
    # The settings are compared first: of another model they say more than shapes do.
    metas = (checkpoints.read_meta(step) for step in reversed(checkpoints.steps()))
    meta = next(filter(None, metas), None)
    if meta:
        config_lib.check_same_mathematics(plan.config, meta['config'])
    state = train_step.create_train_state(
        plan.config, plan.model, plan.dataset.image_shape, plan.dataset.num_images)
    first_step, wall_time = 0, 0.0
    restored = (checkpoints.restore_newest(state) if step is None
                else checkpoints.restore(step, state))
    if restored:
        first_step, state, meta = restored
        wall_time = meta['wall_time']
    elif plan.config.model.init_from:
        state = _with_weights_of_a_file(state, plan)
    return plan.layout.replicate(jax.device_get(state)), first_step, wall_time


def _with_weights_of_a_file(state, plan):
    """The state before the first step with the weights of `model.init_from`."""
    variables = pretrained.load(
        plan.config.model.init_from, plan.model,
        {'params': state.params, 'batch_stats': state.batch_stats})
    ema = state.ema and jax.tree.map(np.copy, variables)
    return state.replace(ema=ema, **variables)


def restore(config: Any, workdir: str, devices: Sequence[replicas.Device] | None = None,
            epoch: int | None = None) -> tuple[_Plan, train_step.TrainState, int]:
    """Opens a run without training it on, or changing anything of it.

    Args:
      config: the run's config.
      workdir: its folder.
      devices: default all devices.
      epoch: after which epoch; default that of the newest checkpoint.

    Returns:
      (plan, state, step): plan.dataset, plan.model and plan.layout as the run uses them, the
      TrainState of the checkpoint on the devices, and its number of steps.

    Raises:
      UserError: there is no such checkpoint, or something in config or workdir is wrong.
    """
    plan = _make_plan(config, workdir, devices, read_only=True)
    none = UserError(f'workdir {workdir!r} holds no checkpoint; the run has to be trained first.')
    if not os.path.isdir(os.path.join(workdir, 'checkpoints')):
        raise none
    with contextlib.closing(_checkpoints(plan, read_only=True)) as checkpoints:
        if not checkpoints.steps():
            raise none
        wanted = None if epoch is None else epoch * plan.steps_per_epoch
        state, step, _ = _restore(plan, checkpoints, wanted)
    return plan, state, step


def _checkpoints(plan, read_only=False):
    return Checkpoints(
        os.path.join(os.path.abspath(plan.workdir), 'checkpoints'),
        [epoch * plan.steps_per_epoch for epoch in plan.config.checkpoint.keep_epochs], read_only)


def _announce(plan, state, first_step, writer, progress):
    """Says what starts, and leaves it in the workdir."""
    if plan.note:
        progress.say(plan.note)
    if first_step:
        progress.say(f'Resuming at step {first_step} of {plan.total_steps}.')
    if distributed.is_main():
        writers.write_json(os.path.join(plan.workdir, 'config.json'),
                           reports.provenance(plan.config, plan.layout))
    if not first_step:
        images = pictures.training_images(plan.dataset, plan.config.seed, 0, plan.layout)
        writer.start(reports.hparams(plan.config), {'train_images': pictures.grid(images)})
        progress.say(writers.parameter_overview(state.params))
        if jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir:
            progress.say(f'Compiled programs are kept in {jax.config.jax_compilation_cache_dir}.')
        progress.say(f'Training {plan.config.model.name} on {plan.dataset.name} for '
                     f'{plan.total_steps} steps; the first one compiles.')


def _run(plan, state, first_step, checkpoints, writer, progress, stop, wall_time):
    """The loop, and the result at its end."""
    config, layout, dataset = plan.config, plan.layout, plan.dataset
    place = _Arrays(dataset, layout)
    arrays = place(dataset.train)
    hparams = layout.replicate(train_step.HParams.from_config(config))
    step_fn = train_step.make_train_step(plan.model, config, layout, dataset)
    evaluator = _Evaluator(config, plan.model, dataset, layout, place)
    monitor, flatness = None, {}
    if config.analysis.every_epochs:
        monitor = analysis.during.Monitor(
            config, plan.model, dataset, layout, arrays, state, functools.partial(
                schedules.of_run, config, train_step.HParams.from_config(config),
                steps_per_epoch=plan.steps_per_epoch))
    outbox = reports.Reports(config, writer, progress, plan.steps_per_epoch, first_step)
    saved_at = time.time()
    results = None
    feeds = _feeds(plan, first_step, progress)
    try:
        for step in range(first_step, plan.total_steps):
            feed = next(feeds)
            state, metrics = step_fn(state, feed, arrays, hparams)
            done = step + 1
            outbox.add(done, metrics)
            last = done == plan.total_steps
            if last or _epoch_due(plan, done, config.eval.every_epochs):
                outbox.flush()
                results = evaluator(state)
                writer.scalars(done, results)
                progress.say(f'step {done}: ' + ', '.join(
                    f'{name} {value:.4f}' for name, value in results.items()))
                progress.start_clock(done)
            if monitor and (last or _epoch_due(plan, done, config.analysis.every_epochs)):
                outbox.flush(refuse_bad=True)
                flatness = monitor(state)
                writer.scalars(done, flatness)
                progress.say(f'step {done}: ' + ', '.join(
                    f'{name} {value:.4g}' for name, value in flatness.items()))
                progress.start_clock(done)
            stopping = stop.received(done)
            if last or stopping or _checkpoint_due(plan, done, saved_at):
                outbox.flush(refuse_bad=True)
                checkpoints.save(done, state, {
                    'config': reports.jsonable(config), 'wall_time': wall_time()})
                saved_at = time.time()
            if stopping and not last:
                checkpoints.wait()
                raise Preempted(
                    f'Stopped by SIGTERM at step {done} of {plan.total_steps}; the state is '
                    'saved, the same command goes on from here.')
    except UserError as e:
        checkpoints.wait()
        newest = checkpoints.steps()[-1:]
        kept = f'the last good checkpoint is that of step {newest[0]}' if newest else (
            'no checkpoint was written yet')
        raise UserError(f'{e} In {plan.workdir} {kept}.') from e
    checkpoints.wait()
    evaluations = plan.total_steps + int(state.sharpness_state.evaluations)
    result = {**(results or evaluator(state)), 'step': plan.total_steps,
              'gradient_evaluations': evaluations,
              'epochs': config.total_epochs, 'wall_time': wall_time(),
              'perf/images_per_second': progress.overall_speed(), 'seed': config.seed}
    if monitor:
        result.update(flatness or monitor(state), **{'analysis/share': monitor.share()})
    if distributed.is_main():
        writers.write_json(plan.result_path, result)
        progress.say(reports.summary(result, plan.workdir))
    return state


def _feeds(plan, first_step, progress):
    """Yields the feeds of the steps on the devices, with the one before for methods that want it.

    Before the first step there is none, and it is its own.
    """
    asks = train_step.asks_for_previous(plan.config)
    begin = max(first_step - 1, 0) if asks else first_step
    feeds = plan.dataset.train_feeds(plan.config.seed, begin, plan.total_steps, plan.layout)
    previous = None
    for step in range(begin, plan.total_steps):
        with progress.waiting():
            feed = next(feeds)
        # The copy to the devices goes on while they still compute the steps before.
        feed = plan.layout.shard(feed)
        if step >= first_step:
            yield train_step.paired(feed, previous) if asks else feed
        previous = feed


def _epoch_due(plan, done, period):
    epoch, position = divmod(done, plan.steps_per_epoch)
    return position == 0 and period > 0 and epoch % period == 0


def _checkpoint_due(plan, done, saved_at):
    settings = plan.config.checkpoint
    epoch, position = divmod(done, plan.steps_per_epoch)
    if _epoch_due(plan, done, settings.every_epochs) or (
            position == 0 and epoch in settings.keep_epochs):
        return True
    # The clocks of processes differ, so one of them decides, now and then.
    return bool(settings.every_minutes and done % plan.config.log_every_steps == 0
                and distributed.broadcast(time.time() - saved_at > 60 * settings.every_minutes))


def _check_workdir(workdir):
    if not workdir:
        raise UserError("--workdir is ''; it must name the folder of the run.")
    try:
        os.makedirs(workdir, exist_ok=True)
        probe = os.path.join(workdir, f'.writable-{jax.process_index()}')
        with open(probe, 'w'):
            pass
        os.remove(probe)
    except OSError as e:
        raise UserError(f'workdir {workdir!r} is not writable: {e.strerror}.') from e
