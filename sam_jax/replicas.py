"""Replicas and groups: how a global batch is cut, and which device computes which part.

The global batch is cut into replicas of `replica_batch_size` examples (the unit of BatchNorm
statistics), consecutive replicas into groups that ascend together (m = replica_batch_size x
replicas_per_group, the paper's m-sharpness). Both are functions of the config alone. Devices only
decide where a replica is computed: each holds a consecutive run of replicas, and a group either
lies within one device or covers several whole ones.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sam_jax.errors import UserError
from sam_jax.limits import free_host_memory

AXIS = 'batch'

# Ways to run one function on all devices, see `Layout.map`.
BACKENDS = ('pmap', 'shard_map')

# Programs that may be under way at once: enough to hide the host, few enough to stop at a signal
# and to hold few batches. XLA of jax 0.10 hangs with more than 32 of several CPU devices.
IN_FLIGHT = 2

# jax.Device, of which jaxlib tells type checkers nothing.
Device = Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the replicas of a run are computed.

    Attributes:
      devices: the devices used, of all processes, in the order of the axis.
      num_replicas: replicas in a global batch.
      replica_batch_size: examples in a replica.
      replicas_per_group: replicas that share an ascent.
      unroll: whether several replicas on a device are unrolled or scanned.
      backend: one of `BACKENDS`; no number depends on it.
    """

    devices: tuple
    num_replicas: int
    replica_batch_size: int
    replicas_per_group: int
    unroll: bool
    backend: str = 'pmap'

    @property
    def replicas_per_device(self) -> int:
        return self.num_replicas // len(self.devices)

    @property
    def devices_per_group(self) -> int:
        return max(self.replicas_per_group // self.replicas_per_device, 1)

    @property
    def groups_per_device(self) -> int:
        return max(self.replicas_per_device // self.replicas_per_group, 1)

    @property
    def axis_index_groups(self) -> list[list[int]] | None:
        """Positions of the devices of each group; None where a group covers all devices."""
        size = self.devices_per_group
        if size == len(self.devices):
            return None
        return [list(range(i, i + size)) for i in range(0, len(self.devices), size)]

    @functools.cached_property
    def local_positions(self) -> list[int]:
        """Positions on the axis of this process's devices, ascending."""
        here = jax.process_index()
        return [i for i, d in enumerate(self.devices) if d.process_index == here]

    @functools.cached_property
    def _mesh(self):
        return Mesh(np.array(self.devices), (AXIS,))

    @functools.cached_property
    def _local_mesh(self):
        return Mesh(np.array([self.devices[i] for i in self.local_positions]), (AXIS,))

    def map(
        self,
        function: Callable[..., Any],
        in_axes: Sequence[int | None],
        out_axes: int | None = None,
        donate_argnums: int | Sequence[int] = (),
    ) -> jax.stages.Wrapped:
        """Compiles a function that each device computes of its own row, all in step.

        Within it `AXIS` names the axis of the devices, for sums over all of them or over groups of
        neighbours. With 'pmap' it is `jax.pmap`, with 'shard_map' the `jax.shard_map` under
        `jax.jit` that a pmap is made of, so that both compile the same program. On several
        processes a pmap's arrays are those of its process, the other's are of all processes.

        Args:
          function: pure. Its arrays are one device's, without the axis of the devices.
          in_axes: of each argument, 0 where a device gets its row of what `shard` placed, None
            where all get the same, which `replicate` placed.
          out_axes: None where the results are the same on all devices; 0 where each has its own,
            its row of them.
          donate_argnums: arguments whose memory the results may take.
        """
        if self.backend == 'pmap':
            return jax.pmap(
                function,
                axis_name=AXIS,
                in_axes=tuple(in_axes),
                out_axes=out_axes,
                donate_argnums=donate_argnums,
                devices=self.devices,
            )

        def of_rows(*arguments):
            arguments = [
                x if axis is None else jax.tree.map(lambda row: lax.squeeze(row, [0]), x)
                for x, axis in zip(arguments, in_axes, strict=True)
            ]
            result = function(*arguments)
            if out_axes is None:
                return result
            return jax.tree.map(lambda x: lax.expand_dims(x, [0]), result)

        in_specs = tuple(map(_spec, in_axes))
        # Unchecked: JAX cannot tell which results of a sum over groups are equal everywhere.
        mapped = jax.shard_map(
            of_rows, mesh=self._mesh, in_specs=in_specs, out_specs=_spec(out_axes), check_vma=False
        )
        return jax.jit(
            mapped,
            in_shardings=tuple(NamedSharding(self._mesh, spec) for spec in in_specs),
            out_shardings=NamedSharding(self._mesh, _spec(out_axes)),
            donate_argnums=donate_argnums,
        )

    def replicate(self, tree: Any) -> Any:
        """Places a pytree of host arrays, the same on all processes, on every device."""
        return self._place(tree, None)

    def shard(self, tree: Any) -> Any:
        """Places arrays of shape (devices of this process, ...), one row a device."""
        return self._place(tree, 0)

    def _place(self, tree, axis):
        placed = jax.device_put(tree, NamedSharding(self._local_mesh, _spec(axis)))
        if self.backend == 'pmap' or len(self.local_positions) == len(self.devices):
            return placed
        sharding = NamedSharding(self._mesh, _spec(axis))

        def of_all_processes(x):
            shape = x.shape if axis is None else (len(self.devices), *x.shape[1:])
            parts = [shard.data for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(shape, sharding, parts)

        return jax.tree.map(of_all_processes, placed)


def _spec(axis):
    return PartitionSpec() if axis is None else PartitionSpec(AXIS)


def paced(results: Iterable[Any]) -> Iterator[Any]:
    """Yields results of programs; each is waited for when `IN_FLIGHT` later ones are dispatched.

    Args:
      results: pytrees of arrays; a program is dispatched whenever the next one is asked for.
    """
    waiting = collections.deque()
    for result in results:
        waiting.append(result)
        if len(waiting) > IN_FLIGHT:
            yield jax.block_until_ready(waiting.popleft())
    yield from waiting


def free_memory(devices: Sequence[Device]) -> tuple[float, int]:
    """Returns (free bytes of the memory that holds this process's arrays, devices that share it).

    Of accelerators the least, which each has for itself; on CPU all devices share the machine's.
    Infinite where the platform does not tell.
    """
    local = [d for d in devices if d.process_index == jax.process_index()]
    stats = [d.memory_stats() for d in local]
    if all(stats):
        return min(s['bytes_limit'] - s['bytes_in_use'] for s in stats), 1
    return free_host_memory(), len(local)


def peak_memory(device: Device) -> int:
    """Returns the most bytes that a device ever held in this process; 0 where it does not tell."""
    return (device.memory_stats() or {}).get('peak_bytes_in_use', 0)


def memory_in_use(layout: Layout) -> int:
    """Returns the bytes that are in use: of the fullest device of this process; on CPU, of it."""
    return _of_memory(layout, 'bytes_in_use', 'VmRSS')


def memory_peak(layout: Layout) -> int:
    """Returns the most bytes that were ever in use in this process; else as `memory_in_use`."""
    return _of_memory(layout, 'peak_bytes_in_use', 'VmHWM')


def _of_memory(layout, of_device, of_process):
    """0 where neither the devices nor the system tell."""
    stats = [layout.devices[i].memory_stats() or {} for i in layout.local_positions]
    told = max((s.get(of_device, 0) for s in stats), default=0)
    if told:
        return told
    try:
        with open('/proc/self/status') as file:
            fields = dict(line.split(':', 1) for line in file)
        return 1024 * int(fields[of_process].split()[0])
    except (OSError, KeyError):
        return 0


def make_layout(
    batch_size: int,
    replica_batch_size: int,
    replicas_per_group: int,
    loop: str = 'auto',
    devices: Sequence[Device] | None = None,
    backend: str = 'pmap',
    to_train: bool = True,
) -> tuple[Layout, str]:
    """Cuts the batch and chooses the devices.

    Args:
      batch_size: examples in the global batch.
      replica_batch_size: examples in a replica.
      replicas_per_group: replicas that share an ascent.
      loop: 'unroll', 'scan', or 'auto', which is to scan: it compiles a program of one replica, and
        docs/compile.md finds no step that is worth more.
      devices: default all devices of all processes.
      backend: of the layout.
      to_train: False where nothing is trained: then as many devices are used as fit.

    Returns:
      (layout, note): note is a sentence if fewer devices are used than there are, else ''.

    Raises:
      UserError: the batch cannot be cut into these replicas, groups and devices.
    """
    if batch_size % replica_batch_size:
        raise UserError(
            f'batch_size is {batch_size}; it must be a multiple of replica_batch_size, '
            f'{replica_batch_size}.'
        )
    num_replicas = batch_size // replica_batch_size
    if num_replicas % replicas_per_group:
        raise UserError(
            f'sam.replicas_per_group is {replicas_per_group}; it must divide the {num_replicas} '
            f'replicas (batch_size {batch_size} / replica_batch_size {replica_batch_size}).'
        )
    devices = list(devices if devices is not None else jax.devices())
    available = len(devices)
    note = ''
    fits = functools.partial(_fits, num_replicas, replicas_per_group)
    if num_replicas < available or not (to_train or fits(available)):
        used = max(filter(fits, range(1, min(num_replicas, available) + 1)))
        fix = (
            f'batch_size {batch_size} has {num_replicas} replicas of {replica_batch_size} for '
            f'{available} devices'
        )
        if jax.process_count() > 1:
            raise UserError(
                f'{fix}: on several processes every device needs one; set replica_batch_size to '
                f'{max(batch_size // available, 1)} or use fewer processes.'
            )
        devices, note = devices[:used], f'{fix}: {used} of them are used.'
    elif not fits(available):
        raise UserError(
            f'The {num_replicas} replicas (batch_size {batch_size} / replica_batch_size '
            f'{replica_batch_size}) in groups of {replicas_per_group} cannot be shared equally by '
            f'{available} devices; change replica_batch_size, sam.replicas_per_group or the number '
            'of devices.'
        )
    group_devices = max(replicas_per_group * len(devices) // num_replicas, 1)
    devices = tuple(neighbour_order(devices, group_devices))
    return Layout(
        devices, num_replicas, replica_batch_size, replicas_per_group, loop == 'unroll', backend
    ), note


def _fits(num_replicas, replicas_per_group, num_devices):
    per_device = num_replicas // num_devices
    return num_replicas % num_devices == 0 and (
        per_device % replicas_per_group == 0 or replicas_per_group % per_device == 0
    )


def neighbour_order(devices: Sequence[Device], group_size: int) -> list[Device]:
    """Orders devices so that each run of `group_size` is a block of neighbours on a TPU's mesh.

    TPU devices carry `coords` (x, y, z) and `core_on_chip`; the mesh is tiled by boxes of
    `group_size` devices, as near to cubes as its sides allow. A box lies within one host's part of
    the mesh or consists of several hosts' parts, so that the devices of a process, too, are a run:
    a pmap takes no others. Devices without coordinates (GPU, CPU), or a mesh that no such box
    tiles, keep the order they came in, which is by process.
    """
    if group_size == 1 or not all(hasattr(d, 'coords') for d in devices):
        return list(devices)
    places = np.array([(getattr(d, 'core_on_chip', 0), *d.coords) for d in devices])
    places -= places.min(axis=0)
    sides = places.max(axis=0) + 1
    host = _host_box(places, [d.process_index for d in devices])
    # A part of a mesh, or several slices of which each has coordinates of its own, are no mesh.
    whole = len(np.unique(places, axis=0)) == len(devices) == np.prod(sides)
    if not whole or host is None:
        return list(devices)
    box = _tiling_box(sides, host, group_size)
    if box is None:
        return list(devices)
    inner, outer = np.minimum(box, host), np.maximum(box, host)

    def rank(i):
        # The core comes last within a box and the boxes are in the mesh's order: z, y, x, core.
        parts = places[i] // outer, places[i] % outer // inner, places[i] % inner
        return tuple(np.concatenate([part[::-1] for part in parts]))

    return [devices[i] for i in sorted(range(len(devices)), key=rank)]


def _host_box(places, processes):
    """The sides of the box that each process has of the mesh, or None."""
    mine = places[np.equal(processes, processes[0])]
    sides = mine.max(axis=0) - mine.min(axis=0) + 1
    boxes = [tuple(box) for box in places // sides]
    owners = set(zip(boxes, processes))
    return sides if len(owners) == len(set(boxes)) == len(set(processes)) else None


def _tiling_box(sides, host, size):
    """The most cubic box of `size` cells whose sides divide `sides`, or None.

    Its sides divide those of a host's box, or are multiples of them.
    """
    best = None
    for core in _divisors(sides[0]):
        for x in _divisors(sides[1]):
            for y in _divisors(sides[2]):
                z, rest = divmod(size, core * x * y)
                if rest or z < 1 or sides[3] % z:
                    continue
                box = np.array([core, x, y, z])
                if np.any(host % box) and np.any(box % host):
                    continue
                # Cores of a chip are nearest of all; then the least extent on the mesh.
                key = (-core, x + y + z, max(x, y, z))
                if best is None or key < best[0]:
                    best = key, box
    return None if best is None else best[1]


def _divisors(n):
    return [d for d in range(1, int(n) + 1) if n % d == 0]
