"""What a run does now and then between steps: evaluate, measure its flatness, save and stop.

An action is called after every step with (steps made, state) and sees for itself whether it is due;
the last step is. Its `results(state)` are its part of result.json.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from sam_jax import analysis, distributed, run_log, settings
from sam_jax.checkpoint import Checkpoints
from sam_jax.errors import Preempted
from sam_jax.experiment import Experiment
from sam_jax.progress import Progress
from sam_jax.step_log import StepLog
from sam_jax.train_state import TrainState


class Run(NamedTuple):
    """A run while it goes on.

    Attributes:
      experiment: what is trained.
      workdir: its folder.
      checkpoints: of it.
      log: of its steps.
      writer: of metrics.
      progress: what a person sees.
      wall_time: returns the seconds that it took so far, before restarts too.
      last_step: after which this call ends: that of the run, or of `until_epoch`.
    """

    experiment: Experiment
    workdir: str
    checkpoints: Checkpoints
    log: StepLog
    writer: run_log.RunWriter
    progress: Progress
    wall_time: Callable[[], float]
    last_step: int

    def epoch_ends(self, done: int, period: int) -> bool:
        """Whether these steps make whole epochs, and a multiple of the period; 0 is never."""
        epoch, position = divmod(done, self.experiment.steps_per_epoch)
        return position == 0 and period > 0 and epoch % period == 0

    def due(self, done: int, period: int) -> bool:
        """Whether an action of so many epochs is due: after the last step, too."""
        return done == self.last_step or self.epoch_ends(done, period)

    def report(self, done: int, results: dict[str, float], form: str) -> None:
        """Writes results and shows them; the time since the step was no training."""
        self.writer.scalars(done, results)
        self.progress.say(
            f'step {done}: '
            + ', '.join(f'{name} {value:{form}}' for name, value in results.items())
        )
        self.progress.start_clock(done)


class Action(Protocol):
    """What is called after every step; see above."""

    def __call__(self, done: int, state: TrainState) -> None: ...

    def results(self, state: TrainState) -> dict[str, Any]: ...


class Evaluation:
    """Evaluates the splits that the config asks for, every `eval.every_epochs`."""

    def __init__(self, run: Run) -> None:
        self._run, self._latest = run, {}

    def __call__(self, done: int, state: TrainState) -> None:
        period = self._run.experiment.config.eval.every_epochs
        if self._run.due(done, period):
            self._run.log.flush()
            self._latest = self._run.experiment.evaluate(state)
            self._run.report(done, self._latest, '.4f')

    def results(self, state: TrainState) -> dict[str, Any]:
        # A run that was stopped after its last step has made no step now.
        return self._latest or self._run.experiment.evaluate(state)


class Flatness:
    """Measures how flat the minimum is, every `analysis.every_epochs`."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._run, self._latest = run, {}
        self._monitor = analysis.monitor.Monitor(run.experiment, state)

    def __call__(self, done: int, state: TrainState) -> None:
        if self._run.due(done, self._run.experiment.config.analysis.every_epochs):
            self._run.log.flush(refuse_bad=True)
            self._latest = self._monitor(state)
            self._run.report(done, self._latest, '.4g')

    def results(self, state: TrainState) -> dict[str, Any]:
        return {**(self._latest or self._monitor(state)), 'analysis/share': self._monitor.share()}


class Saving:
    """Saves a checkpoint as `checkpoint` says, and at a signal, which ends the run."""

    def __init__(self, run: Run, stop: Any) -> None:
        """`stop.received(step)` says whether the run is asked to stop, the same everywhere."""
        self._run, self._stop = run, stop
        self._saved_at = time.monotonic()

    def __call__(self, done: int, state: TrainState) -> None:
        run, total = self._run, self._run.experiment.total_steps
        stopping = self._stop.received(done)
        if done == run.last_step or stopping or self._due(done, state):
            run.log.flush(refuse_bad=True)
            run.checkpoints.save(
                done,
                run.experiment.whole(state),
                {
                    'config': settings.jsonable(run.experiment.config),
                    # The main process writes it; of many files it takes a while.
                    'data': run.experiment.dataset.fingerprint if distributed.is_main() else '',
                    'frozen': run.experiment.frozen_checksum,
                    'steps_per_epoch': run.experiment.steps_per_epoch,
                    'wall_time': run.wall_time(),
                    'metrics': run.writer.mark,
                },
            )
            self._saved_at = time.monotonic()
        if stopping and done < total:
            run.checkpoints.wait()
            raise Preempted(
                f'Stopped by SIGTERM at step {done} of {total}; the state is saved, the same '
                'command goes on from here.'
            )

    def _due(self, done, state):
        config = self._run.experiment.config
        epoch, position = divmod(done, self._run.experiment.steps_per_epoch)
        if self._run.epoch_ends(done, config.checkpoint.every_epochs) or (
            position == 0 and epoch in config.checkpoint.keep_epochs
        ):
            return True
        minutes, several = config.checkpoint.every_minutes, jax.process_count() > 1
        if not minutes or several and done % config.log_every_steps:
            return False
        overdue = time.monotonic() - self._saved_at > 60 * minutes
        if not several:
            return overdue
        # The clocks of processes differ, so one of them decides, now and then. On CPUs of several
        # hosts its message must not meet those of a step that is under way.
        jax.block_until_ready(state)
        return bool(distributed.broadcast(overdue))

    def results(self, state: TrainState) -> dict[str, Any]:
        return {}
