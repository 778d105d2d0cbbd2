"""The one training loop: a step, then what is due of a list of periodic actions."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sam_jax import (
    distributed,
    memory,
    nans,
    periodic,
    profiling,
    provenance,
    replicas,
    run_log,
    settings,
    trackers,
    watchdog,
)
from sam_jax.data import pictures
from sam_jax.errors import Preempted, UserError, told
from sam_jax.experiment import Experiment
from sam_jax.progress import Progress
from sam_jax.step_log import StepLog
from sam_jax.train_state import TrainState

__all__ = ['Preempted', 'Watch', 'train_and_evaluate']

_log = logging.getLogger(__name__)


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


class Watch(NamedTuple):
    """How a run is watched; none of it changes its numbers.

    Attributes:
      trackers: of `trackers.NAMES`, where metrics go besides metrics.jsonl.
      profile: steps that are traced, or None.
      debug_nans: whether the first layer that is not finite is looked for.
      hang_minutes: how long a step, or reading the dataset, may take before the process ends,
        see `watchdog`; 0 for ever.
    """

    trackers: Sequence[str] = ('tensorboard',)
    profile: profiling.Steps | None = None
    debug_nans: bool = False
    hang_minutes: float = 0.0


def train_and_evaluate(
    config: Any,
    workdir: str,
    devices: Sequence[replicas.Device] | None = None,
    watch: Watch | None = None,
    until_epoch: int = 0,
) -> TrainState:
    """Trains, evaluates, saves and reports one run, or resumes it where it was stopped.

    The same config and seed give the same result on any number of devices and processes, up to
    rounding, and with any number of restarts, bit for bit.

    Args:
      config: ConfigDict with the keys of `settings.KEYS`.
      workdir: folder of the run; made if it is not there. Gets checkpoints/, TensorBoard events,
        metrics.jsonl, config.json and, at the end, result.json.
      devices: default all devices.
      watch: Watch; default with TensorBoard alone.
      until_epoch: after which epoch it stops, saved and evaluated, with result_at_<epoch>.json in
        place of result.json. Schedules are those of the whole run, so that a later call goes on as
        if there had been no stop. 0 for the end.

    Returns:
      The final TrainState.

    Raises:
      UserError: something in config or workdir that the caller can mend; or the run diverged.
      Preempted: SIGTERM came; the state is saved.
    """
    began, watch = time.monotonic(), watch or Watch()
    settings.check(config)
    until_epoch = _checked_until(until_epoch, config.total_epochs)
    trackers.check(watch.trackers)
    _check_workdir(workdir)
    with watchdog.Watchdog(watch.hang_minutes) as dog:
        experiment = Experiment.from_config(config, devices)
        dog.alive()
        memory.check(experiment)
        return _train(experiment, workdir, watch, until_epoch, dog, began)


def _train(experiment, workdir, watch, until_epoch, dog, began):
    """`train_and_evaluate` of an experiment."""
    config = experiment.config
    with experiment.checkpoints(workdir) as checkpoints, _Signal() as stop:
        last_step = (until_epoch or config.total_epochs) * experiment.steps_per_epoch
        state, first_step, wall_before = experiment.restore_from(checkpoints)
        main = distributed.is_main()
        result_path = run_log.result_path(workdir, until_epoch)
        if first_step >= last_step and (result := _result(result_path)):
            if main:
                _say_done(workdir, result, until_epoch)
            return state
        if first_step > last_step:
            raise UserError(
                f'--until_epoch is {until_epoch}; the run in {workdir} is beyond that, at step '
                f'{first_step}.'
            )
        opened = trackers.create(watch.trackers, workdir, first_step > 0) if main else []
        before = checkpoints.read_meta(first_step) if first_step else None
        mark = (before or {}).get('metrics')
        writer = run_log.RunWriter(workdir, main, first_step, opened, mark)
        progress = Progress(first_step, experiment.total_steps, config.batch_size, main)
        with contextlib.closing(writer), contextlib.closing(progress):
            log = StepLog(config, writer, progress, experiment.steps_per_epoch, first_step)
            run = periodic.Run(
                experiment,
                workdir,
                checkpoints,
                log,
                writer,
                progress,
                lambda: wall_before + time.monotonic() - began,
                last_step,
            )
            _announce(run, state, first_step)
            state, result = _loop(run, state, first_step, stop, watch, dog)
            if main:
                run_log.write_json(result_path, result)
                progress.say(
                    f'Stopped after epoch {until_epoch} of {config.total_epochs}, as asked; the '
                    'same command without --until_epoch goes on from here.'
                    if until_epoch
                    else provenance.summary(result, workdir)
                )
            return state


def _checked_until(until_epoch, total_epochs):
    if not 0 <= until_epoch <= total_epochs:
        raise UserError(
            f'--until_epoch is {until_epoch}; it must be from 0 to total_epochs, {total_epochs}.'
        )
    return until_epoch % total_epochs


def _say_done(workdir, result, until_epoch):
    if until_epoch:
        _log.info('The run in %s has reached epoch %d; nothing to do.', workdir, until_epoch)
        return
    _log.info(
        'The run in %s is finished; nothing to do. For another one choose another workdir.', workdir
    )
    _log.info('%s', provenance.summary(result, workdir))


def _announce(run, state, first_step):
    """Says what starts, and leaves it in the workdir."""
    experiment, progress = run.experiment, run.progress
    config, layout, dataset = experiment.config, experiment.layout, experiment.dataset
    if experiment.note:
        progress.say(experiment.note)
    if first_step:
        progress.say(f'Resuming at step {first_step} of {experiment.total_steps}.')
    if distributed.is_main():
        run_log.write_json(
            os.path.join(run.workdir, 'config.json'), provenance.provenance(config, layout)
        )
    if not first_step:
        images = pictures.training_images(dataset, config.seed, 0, layout)
        run.writer.start(provenance.hparams(config), {'train_images': pictures.grid(images)})
        progress.say(run_log.parameter_overview(state.params))
        if jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir:
            progress.say(f'Compiled programs are kept in {jax.config.jax_compilation_cache_dir}.')
        progress.say(
            f'Training {config.model.name} on {dataset.name} for '
            f'{experiment.total_steps} steps; the first one compiles.'
        )


def _loop(run, state, first_step, stop, watch, dog):
    """Trains from a step on; returns (final state, content of result.json)."""
    experiment = run.experiment
    step_fn, constants = experiment.train_step, experiment.constants
    if watch.debug_nans:
        step_fn = nans.Finder(experiment).step
    profiler = profiling.Profiler(
        watch.profile or profiling.NO_STEPS, run.workdir, run.progress.say
    )
    at_start = replicas.memory_in_use(experiment.layout)
    actions: list[periodic.Action] = [periodic.Evaluation(run)]
    if experiment.config.analysis.every_epochs:
        actions.append(periodic.Flatness(run, state))
    actions.append(periodic.Saving(run, stop))
    feeds = experiment.feeds(first_step, run.progress.waiting)
    try:
        for done in range(first_step + 1, run.last_step + 1):
            feed = next(feeds)
            profiler.before(done, state)
            state, metrics = step_fn(state, feed, *constants)
            profiler.after(done, state)
            run.log.add(done, metrics)
            for action in actions:
                dog.alive()
                action(done, state)
            dog.alive()
    except Exception as e:
        said = told(e)
        if said is None:
            raise
        if jax.process_count() == 1:  # of several the others do not wait now
            with contextlib.suppress(UserError):  # of a save that was under way
                run.checkpoints.wait()
        newest = run.checkpoints.steps()[-1:]
        kept = (
            f'the last good checkpoint is that of step {newest[0]}'
            if newest
            else ('no checkpoint was written yet')
        )
        raise UserError(f'{said} In {run.workdir} {kept}.') from e
    finally:
        profiler.close()
    run.checkpoints.wait()
    result = {
        'step': run.last_step,
        'epochs': run.last_step // experiment.steps_per_epoch,
        'seed': experiment.config.seed,
        'gradient_evaluations': run.last_step + int(state.sharpness_state.evaluations),
    }
    for action in actions:
        dog.alive()
        result |= action.results(state)
    return state, {
        **result,
        'wall_time': run.wall_time(),
        'perf/images_per_second': run.progress.overall_speed(),
        'perf/memory_at_start': at_start,
        'perf/memory_peak': replicas.memory_peak(experiment.layout),
    }


def _result(path):
    """The content of a result.json; None if there is none, or it has to be made once more."""
    try:
        return run_log.read_json(path)
    except UserError as e:
        _log.warning('%s It is written anew.', e)
        return None


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
