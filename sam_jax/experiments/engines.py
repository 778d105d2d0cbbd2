"""What runs the runs of a sweep: this machine, or a Slurm cluster; and the table meanwhile."""

import collections
import concurrent.futures
import dataclasses
import fcntl
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import sam_jax
from sam_jax.errors import EXIT_USER_ERROR, UserError, told
from sam_jax.experiments import grid

# Of a GPU's memory this much is for arrays where several runs share it. Each process takes some
# hundred MiB of the rest for itself.
SHARED = 0.8

# A run that was refused, or diverged, would be so again.
FINAL = (0, EXIT_USER_ERROR)


@dataclasses.dataclass
class Status:
    """How far a run is: 'waiting', 'running', 'finished', 'failed' or 'stopped', and a line."""

    state: str
    line: str = ''


def command(run: grid.Run) -> list[str]:
    """Returns what starts a run."""
    until = [f'--until_epoch={run.until_epoch}'] if run.until_epoch else []
    return [sys.executable, '-m', 'sam_jax.main', *run.flags, *until]


def log_path(run: grid.Run) -> str:
    """Returns the file of what a run says."""
    return os.path.join(run.workdir, 'log.txt')


def last_line(log: str) -> str:
    """Returns the last line of a file that is not empty."""
    try:
        with open(log, 'rb') as file:
            file.seek(max(0, os.path.getsize(log) - 2000))
            lines = file.read().decode(errors='replace').split('\n')
    except OSError:
        return ''
    return next((line.strip() for line in reversed(lines) if line.strip()), '')


def start(
    command: Sequence[str], log: str, environment: dict[str, str], ignored: Sequence[int] = ()
) -> subprocess.Popen:
    """Starts a process whose output is added to a log, which is locked for as long as it lives.

    Args:
      command: its parts.
      log: the file.
      environment: its variables.
      ignored: signals that it does not hear.

    Raises:
      BlockingIOError: another process holds the log.
    """
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, 'a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise BlockingIOError(
                f'{os.path.dirname(log)} is in use by another process; wait for it, or end it.'
            ) from e
        return subprocess.Popen(
            command,
            env=environment,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=(lambda: [signal.signal(s, signal.SIG_IGN) for s in ignored])
            if ignored
            else None,
        )


def python_path() -> dict[str, str]:
    """Returns the environment variable by which a run finds sam_jax, installed or not."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(sam_jax.__file__)))
    given = os.environ.get('PYTHONPATH')
    return {'PYTHONPATH': os.pathsep.join(filter(None, [root, given]))}


def failure(code: int, log: str) -> str:
    """Returns a line on how a process ended."""
    why = f'status {code}' if code >= 0 else f'signal {-code}'
    return f'{why}: {last_line(log)} ({log})'


class Local:
    """This machine: so many runs at once, each with a share of the GPUs or of the cores."""

    def __init__(self, parallel, retries):
        gpus = _gpus()
        self._retries = retries
        self._parallel = parallel or max(1, len(gpus))
        self._slots = queue.SimpleQueue()
        for slot in range(self._parallel):
            self._slots.put(_slot(slot, self._parallel, gpus))
        self._processes = {}
        self._stopping = False

    def submit(self, runs: list[grid.Run], statuses: dict[str, Status]) -> None:
        """Begins to run them; their statuses change as they do."""
        self._pool = concurrent.futures.ThreadPoolExecutor(self._parallel)
        self._futures = [self._pool.submit(self._run, run, statuses) for run in runs]

    def working(self) -> bool:
        for future in self._futures:
            if future.done():
                future.result()  # raises what went wrong here, not in the run
        return not all(future.done() for future in self._futures)

    def stop(self) -> None:
        """Asks the runs to save and end."""
        self._stopping = True
        for process in list(self._processes.values()):
            process.terminate()

    def _run(self, run, statuses):
        slot = self._slots.get()
        try:
            statuses[run.name] = self._attempts(run, *slot, statuses)
        finally:
            self._slots.put(slot)

    def _attempts(self, run, environment, prefix, statuses):
        for _ in range(1 + self._retries):
            if self._stopping:
                return Status('stopped', 'before it started')
            statuses[run.name] = Status('running')
            try:
                process = start(
                    [*prefix, *command(run)],
                    log_path(run),
                    {**os.environ, **python_path(), **environment},
                )
            except OSError as e:  # a file in the place of its folder, say: the others go on
                return Status('failed', told(e) or str(e))
            self._processes[run.name] = process
            if self._stopping:  # since it was looked at above
                process.terminate()
            code = process.wait()
            del self._processes[run.name]
            if self._stopping and code:
                return Status('stopped', last_line(log_path(run)))
            if code in FINAL:
                break
        if code:
            return Status('failed', failure(code, log_path(run)))
        return Status('finished')


def _gpus():
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible is not None:
        return [gpu for gpu in visible.split(',') if gpu]
    if not shutil.which('nvidia-smi'):
        return []
    found = subprocess.run(
        ['nvidia-smi', '--query-gpu=index', '--format=csv,noheader'],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.split() if found.returncode == 0 else []


def _slot(slot, parallel, gpus):
    """Returns (environment, prefix of the command) of one of the runs at once."""
    if gpus:
        environment = {'CUDA_VISIBLE_DEVICES': gpus[slot % len(gpus)]}
        sharing = -(-parallel // len(gpus))
        if sharing > 1:
            environment['XLA_PYTHON_CLIENT_MEM_FRACTION'] = f'{SHARED / sharing:.3f}'
        return environment, ()
    if parallel == 1 or not hasattr(os, 'sched_getaffinity') or not shutil.which('taskset'):
        return {}, ()
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[slot::parallel] or [cores[slot % len(cores)]]
    return {}, ('taskset', '--cpu-list', ','.join(map(str, mine)))


class SlurmRun:
    """What submitit starts on a node: a run's command; preempted, it saves and is requeued.

    It goes there by value, so it and what it calls use nothing but Python's own modules.
    """

    def __init__(self, command, log, environment):
        self.parts = command, log, environment
        self.process = None

    def __call__(self):
        command, log, environment = self.parts
        # Slurm sends submitit's signal to all processes of the job; it is for submitit alone.
        self.process = start(command, log, {**os.environ, **environment}, ignored=[signal.SIGUSR2])
        while self.process.poll() is None:
            time.sleep(0.2)
        if self.process.returncode == 143 and self._goes_on():
            # A preemption with a GraceTime tells the run alone. It has saved; submitit requeues.
            os.kill(os.getpid(), signal.SIGUSR2)
        if self.process.returncode:
            raise RuntimeError(failure(self.process.returncode, log))

    def _goes_on(self):
        """Whether the job was not cancelled."""
        return 'JobState=RUNNING' in _show_job(os.environ['SLURM_JOB_ID'])

    def __submitit_checkpoint__(self):
        import submitit

        if self.process and self.process.returncode is None:
            os.kill(self.process.pid, signal.SIGTERM)
            # It is not reaped here: that is for the poll() above, which this has interrupted.
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(SlurmRun(*self.parts))


class Slurm:
    """A Slurm cluster, through submitit: a job array of one job a run."""

    def __init__(self, folder, parallel, parameters):
        try:
            import submitit
        except ImportError:
            raise UserError(
                '--engine is slurm; that needs submitit: pip install submitit.'
            ) from None
        # Without Slurm's accounting it says so again and again; results tell as much.
        logging.getLogger('submitit').setLevel(logging.ERROR)
        self._submitit = submitit
        self._folder = os.path.join(os.path.abspath(folder), 'slurm')
        try:
            self._executor = submitit.AutoExecutor(self._folder, cluster='slurm')
        except RuntimeError as e:
            raise UserError(f'--engine is slurm; {e}.') from e
        if parallel:
            parameters = {**parameters, 'slurm_array_parallelism': parallel}
        try:
            self._executor.update_parameters(name='sam_jax', **parameters)
        except (NameError, TypeError, ValueError) as e:
            raise UserError(f'--slurm: {" ".join(str(e).split())}') from e

    def submit(self, runs: list[grid.Run], statuses: dict[str, Status]) -> None:
        """Submits the runs that are not in the queue since an earlier call."""
        self._statuses = statuses
        queued = {run.name: self._queued(run) for run in runs}
        fresh = [run for run in runs if queued[run.name] is None]
        work = [SlurmRun(command(run), log_path(run), python_path()) for run in fresh]
        try:
            jobs = self._executor.map_array(_call, work) if work else []
        except self._submitit.core.utils.FailedJobError as e:
            raise UserError(f'sbatch refuses the sweep: {" ".join(str(e).split())}') from e
        for run, job in zip(fresh, jobs):
            os.makedirs(run.workdir, exist_ok=True)
            with open(_job_path(run), 'w') as file:
                file.write(job.job_id)
            queued[run.name] = job
        self._jobs = [(run, queued[run.name]) for run in runs]

    def _queued(self, run):
        if not os.path.exists(_job_path(run)):
            return None
        with open(_job_path(run)) as file:
            job = self._submitit.SlurmJob(self._folder, file.read().strip())
        return None if job.done(force_check=True) else job

    def working(self) -> bool:
        for run, job in self._jobs:
            if self._statuses[run.name].state in ('stopped', 'failed'):
                continue
            if not job.done():
                state = 'running' if job.state == 'RUNNING' else 'waiting'
                self._statuses[run.name] = Status(state, '' if state == 'running' else job.state)
            elif run.result():
                self._statuses[run.name] = Status('finished')
            elif (end := _end(job)) not in _NOT_YET:
                self._statuses[run.name] = Status(
                    'failed',
                    f'job {job.job_id} {end}: {last_line(log_path(run))} ({log_path(run)})',
                )
        return any(s.state in ('waiting', 'running') for s in self._statuses.values())

    def stop(self) -> None:
        """Leaves the jobs in the queue; the same command finds them there."""
        for name, status in self._statuses.items():
            if status.state in ('waiting', 'running'):
                self._statuses[name] = Status('stopped', 'here only: the job goes on')


# What Slurm says for a while of a job whose process has ended.
_NOT_YET = ('RUNNING', 'COMPLETING')


def _end(job):
    """The state in which a job has ended: by Slurm's accounting or, without, by its controller."""
    if job.state != 'UNKNOWN':
        return job.state
    shown = _show_job(job.job_id)
    return shown.partition('JobState=')[2].partition(' ')[0] or job.state


def _show_job(job_id):
    """What the controller says of a job; '' when it has forgotten it, after some minutes."""
    shown = subprocess.run(['scontrol', 'show', 'job', job_id], capture_output=True, check=False)
    return shown.stdout.decode()


def _call(work):
    return work()


def _job_path(run):
    return os.path.join(run.workdir, 'slurm_job')


class Display:
    """The table of the runs: live on a terminal, elsewhere a line for each change."""

    def __init__(self, runs, statuses):
        self._runs, self._statuses = runs, statuses
        self._shown = {}
        self._live = None
        if sys.stderr.isatty():
            import rich.console
            import rich.live

            self._live = rich.live.Live(
                console=rich.console.Console(stderr=True), auto_refresh=False
            )
            self._live.start()

    def update(self) -> None:
        if self._live:
            self._live.update(self._table(), refresh=True)
            return
        for run in self._runs:
            status = self._statuses[run.name]
            if self._shown.get(run.name, 'waiting') != status.state:
                print(
                    f'{run.name}: {" ".join(self._cells(run, status))}'.strip(),
                    file=sys.stderr,
                    flush=True,
                )
            self._shown[run.name] = status.state

    def _table(self):
        import rich.table

        table = rich.table.Table('run', 'state', 'last line')
        for run in self._runs:
            table.add_row(run.name, *self._cells(run, self._statuses[run.name]))
        return table

    def _cells(self, run, status):
        line = status.line
        if status.state == 'finished':
            result = run.result()
            # Of runs among which one is chosen, that by which it is.
            split = 'validation' if 'validation/error_rate' in result else 'test'
            line = f'{split} error {100 * result[f"{split}/error_rate"]:.2f} %'
        elif status.state == 'running':
            line = last_line(log_path(run))
        return status.state, line

    def close(self) -> None:
        if self._live:
            self._live.stop()


def execute(
    engine: Any, runs: list[grid.Run], aside: Sequence[tuple[grid.Run, Status]] = ()
) -> dict[str, Status]:
    """Runs the runs that are not finished, and keeps the page of the sweep meanwhile.

    Args:
      engine: Local or Slurm.
      runs: the runs.
      aside: others of the sweep, which are only shown on the page, after these.

    Returns:
      {name: Status} at the end.
    """
    from sam_jax.experiments import page  # with matplotlib and scipy: slow

    statuses = {run.name: Status('finished' if run.result() else 'waiting') for run in runs}
    asked = []
    previous = {
        s: signal.signal(s, lambda *_: asked.append(True)) for s in (signal.SIGINT, signal.SIGTERM)
    }
    shown = collections.ChainMap(statuses, {run.name: status for run, status in aside})
    live = page.Live([*runs, *(run for run, _ in aside)], shown)
    display = Display(runs, statuses)
    try:
        engine.submit([run for run in runs if statuses[run.name].state != 'finished'], statuses)
        while engine.working():
            display.update()
            live.update()
            if asked:
                asked.clear()
                engine.stop()
            time.sleep(0.2)
        display.update()
        live.update()
    except BaseException:  # of the sweep itself: it leaves no runs behind
        engine.stop()
        raise
    finally:
        display.close()
        live.close()
        for s, handler in previous.items():
            signal.signal(s, handler)
    return statuses
