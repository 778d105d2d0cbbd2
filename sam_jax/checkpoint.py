"""Checkpoints: orbax, asynchronous, checked when read.

    workdir/checkpoints/<step>/state    {path of a leaf: array}
    workdir/checkpoints/<step>/meta     JSON: config, fingerprint of the data, checksums, wall time

The arrays are one host's copy of the replicated state, so a checkpoint knows no topology. Orbax
writes beside and renames, so a process killed during a save leaves the previous checkpoint newest.

Of several processes the main one alone writes, and each reads for itself: to orbax each is alone.
So none waits for another one whose write has failed, which orbax has them do for minutes.
"""

import contextlib
import json
import logging
import os
import shutil
import threading
import time
import warnings
import zlib
from typing import Any

import jax
import numpy as np

from sam_jax import distributed
from sam_jax.errors import Preempted, UserError, first_line, is_memory, of_system

NEWEST_KEPT = 2
_ORBAX_THREADS = ('async_save', 'save_finalize')

_log = logging.getLogger(__name__)


def _flatten(tree):
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator='.') for path, _ in leaves]
    return {name: x for name, (_, x) in zip(names, leaves)}, structure


class Checkpoints:
    """The checkpoints of one run.

    The newest two are kept, besides those of `keep_steps`, which are never deleted. With read_only
    nothing is written, deleted or moved: the run may still be training.
    """

    def __init__(self, directory, keep_steps=(), read_only=False):
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

        self._ocp = ocp
        self._directory, self._read_only, self._failed = directory, read_only, False
        self._writes = distributed.is_main() and not read_only
        if not read_only:
            with self._writing():
                os.makedirs(directory, exist_ok=True)
        keep = [policies.LatestN(NEWEST_KEPT)]
        if keep_steps:
            keep.append(policies.CustomSteps(list(keep_steps)))
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=self._writes,
                create=False,
                read_only=not self._writes,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=jax.process_index(), active_processes={jax.process_index()}
                ),
            ),
        )

    def steps(self) -> list[int]:
        """Returns the steps with a checkpoint, ascending."""
        if not self._writes:
            self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copies the state to the host and writes it in the background.

        Args:
          step: number of steps made.
          state: pytree of arrays, the same on all devices.
          meta: dict that JSON can hold.
        """
        if not self._writes:
            return
        # A real copy: on CPU a host array may share its memory with the device's, which the next
        # step is given to overwrite.
        arrays = {name: np.array(x, copy=True) for name, x in _flatten(state)[0].items()}
        meta = {**meta, 'checksums': {name: _checksum(x) for name, x in arrays.items()}}
        meta = {**meta, 'checksum': _meta_checksum(meta)}
        with self._writing():
            self._manager.save(
                step,
                args=self._ocp.args.Composite(
                    state=self._ocp.args.StandardSave(arrays), meta=self._ocp.args.JsonSave(meta)
                ),
            )

    @contextlib.contextmanager
    def _writing(self):
        """Says of a write that fails, perhaps one that began before, what the system says."""
        try:
            yield
        except Exception as e:  # whatever orbax, TensorStore or the file system raise
            self._failed = True
            if is_memory(e):
                raise
            raise UserError(
                f'A checkpoint cannot be written to {self._directory}: {of_system(e)}.'
            ) from e

    def restore_newest(
        self, target: Any, without: tuple[str, ...] = ()
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns (step, state, meta) of the newest whole checkpoint, or None if there is none.

        A damaged checkpoint is named in the log and moved to `damaged/`, and the one before it is
        tried.

        Args:
          target: pytree of arrays of the wanted structure and shapes.
          without: leaves whose path begins so are left out.

        Raises:
          UserError: there are checkpoints and all are damaged, or the newest whole one is of
            another model.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                arrays, meta = self.read(step)
            except Exception as e:  # whatever orbax or the file system raise at damaged files
                if is_memory(e):
                    raise  # which says nothing of the file
                _log.error('Checkpoint %d is damaged and not used: %s', step, first_line(e))
                damaged.append(step)
                continue
            for other in damaged if not self._read_only else ():
                self._set_aside(other)
            return step, _unflatten(arrays, target, step, without), meta
        if damaged:
            raise UserError(
                f'All checkpoints in {self._directory} are damaged (steps '
                f'{", ".join(map(str, damaged))}); restore one from elsewhere, or choose a new '
                'workdir to start anew.'
            )
        return None

    def restore(
        self, step: int, target: Any, without: tuple[str, ...] = ()
    ) -> tuple[int, Any, dict[str, Any]]:
        """Returns (step, state, meta) of one checkpoint; arguments as of `restore_newest`.

        Raises:
          UserError: there is none of that step, it is damaged, or it is of another model.
        """
        if step not in self.steps():
            raise UserError(
                f'There is no checkpoint of step {step} in {self._directory}; there '
                f'are those of {", ".join(map(str, self.steps()))}.'
            )
        try:
            arrays, meta = self.read(step)
        except Exception as e:  # whatever orbax or the file system raise at damaged files
            if is_memory(e):
                raise  # which says nothing of the file
            raise UserError(
                f'Checkpoint {step} in {self._directory} is damaged: {first_line(e)}.'
            ) from e
        return step, _unflatten(arrays, target, step, without), meta

    def read_meta(self, step: int) -> dict[str, Any] | None:
        """Returns the meta dict of a checkpoint, or None if it cannot be read."""
        try:
            meta = self._manager.restore(
                step, args=self._ocp.args.Composite(meta=self._ocp.args.JsonRestore())
            ).meta
            _check_meta(meta)
            return meta
        except Exception:  # whatever orbax or the file system raise at damaged files
            return None

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns ({name: array}, meta) of a checkpoint; raises whatever its damage makes raise."""
        with warnings.catch_warnings():
            # "Sharding info not provided": these are host arrays, placed by the caller.
            warnings.simplefilter('ignore')
            restored = self._manager.restore(
                step,
                args=self._ocp.args.Composite(
                    state=self._ocp.args.StandardRestore(), meta=self._ocp.args.JsonRestore()
                ),
            )
        _check_meta(restored.meta)
        arrays = {name: np.asarray(x) for name, x in restored.state.items()}
        for name, checksum in restored.meta['checksums'].items():
            if name not in arrays or _checksum(arrays[name]) != checksum:
                raise ValueError(f'the checksum of {name} does not fit')
        return arrays, restored.meta

    def _set_aside(self, step):
        distributed.barrier(f'read_{step}')
        if distributed.is_main():
            place = os.path.join(os.path.dirname(self._directory), 'damaged')
            os.makedirs(place, exist_ok=True)
            shutil.move(
                os.path.join(self._directory, str(step)),
                os.path.join(place, f'{step}-{len(os.listdir(place))}'),
            )
        distributed.barrier(f'set_aside_{step}')
        self._manager.reload()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Closes; but not after an error of one of several, whose end the others await."""
        if kind in (None, Preempted) or jax.process_count() == 1:
            self.close()

    def wait(self) -> None:
        """Waits until everything is written; on all processes."""
        with self._writing():
            self._manager.wait_until_finished()
        distributed.barrier('written')

    def close(self) -> None:
        """Waits until everything is written and lets go of the directory."""
        if self._failed:  # it has been said, and would be once more
            with contextlib.suppress(Exception):
                self._manager.close()
            return
        with self._writing():
            self._manager.close()


def threads_end(seconds: float) -> bool:
    """Waits for orbax's threads; returns whether they have ended.

    After a save that failed half-way some wait for signals that never come, for many minutes.
    """
    end = time.monotonic() + seconds
    own = [t for t in threading.enumerate() if not t.daemon and _is_orbax(t)]
    for thread in own:
        # Orbax's own join raises what the thread has raised.
        threading.Thread.join(thread, max(0.0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in own)


def _is_orbax(thread):
    return type(thread).__module__.startswith('orbax') or thread.name in _ORBAX_THREADS


def _checksum(x):
    return zlib.crc32(np.ascontiguousarray(x).tobytes())


def _meta_checksum(meta):
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _check_meta(meta):
    """Raises ValueError if the meta dict is not what was written; older ones have no checksum."""
    content = {name: x for name, x in meta.items() if name != 'checksum'}
    if 'checksum' in meta and meta['checksum'] != _meta_checksum(content):
        raise ValueError('the checksum of its meta does not fit')


def _unflatten(arrays, target, step, without):
    wanted, structure = _flatten(target)
    arrays = {name: x for name, x in arrays.items() if not name.startswith(without)}
    # A sum of the log that an older version did not keep is unknown until the next line.
    unknown = {
        name: np.full_like(x, np.nan) for name, x in wanted.items() if name.startswith('sums.')
    }
    arrays = {**unknown, **arrays}
    for name, x in wanted.items():
        if name not in arrays:
            raise UserError(f'Checkpoint {step} is of another model: it has no {name}.')
        if arrays[name].shape != np.shape(x):
            raise UserError(
                f'Checkpoint {step} is of another model: {name} has shape {arrays[name].shape} '
                f'there and {np.shape(x)} here.'
            )
    for name in arrays:
        if name not in wanted:
            raise UserError(f'Checkpoint {step} is of another model: {name} is not in this one.')
    return jax.tree.unflatten(structure, [arrays[name] for name in wanted])
