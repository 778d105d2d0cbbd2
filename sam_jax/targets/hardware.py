"""Devices that are compiled for and need not be there, and what their makers say of them."""

import json
import math
import os
import re
from typing import Any, NamedTuple

import jax

from sam_jax import replicas
from sam_jax.errors import UserError, first_line


class Chip(NamedTuple):
    """A kind of chip, by its maker's data sheet.

    Attributes:
      flops: dense bfloat16 operations a second; 0 where it is not known.
      float32_flops: the same of float32 as JAX multiplies it by default: in bfloat16 on TPUs, in
        TensorFloat-32 on GPUs.
      bandwidth: bytes a second between chip and main memory; 0 where it is not known.
      memory: bytes.
      clock: cycles a second.
    """

    flops: float
    float32_flops: float
    bandwidth: float
    memory: float
    clock: float

    def peak(self, dtype: str) -> float:
        """Returns the operations a second in a `model.dtype`."""
        return self.flops if dtype == 'bfloat16' else self.float32_flops

    def part(self, share: float) -> 'Chip':
        """Returns a device that has this share of the chip."""
        return self._replace(
            flops=self.flops * share,
            float32_flops=self.float32_flops * share,
            bandwidth=self.bandwidth * share,
            memory=self.memory * share,
        )


# That flops are matrix units x their size x 2 x clock holds for each of them.
TPUS = {
    kind: Chip(flops, flops, bandwidth, gib * 2**30, clock)
    for kind, flops, bandwidth, gib, clock in (
        ('v3', 123e12, 900e9, 32, 0.94e9),
        ('v4', 275e12, 1228e9, 32, 1.05e9),
        ('v5e', 197e12, 819e9, 16, 1.5e9),
        ('v5p', 459e12, 2765e9, 95, 1.75e9),
        ('v6e', 918e12, 1640e9, 32, 1.75e9),
    )
}
GPUS = {
    'a100-40': Chip(312e12, 156e12, 1555.2e9, 42331013120, 1.41e9),
    'a100-80': Chip(312e12, 156e12, 2039.04e9, 85100068864, 1.41e9),
    'h100': Chip(989e12, 494.5e12, 3352.32e9, 84942979072, 1.98e9),
    'h200': Chip(989e12, 494.5e12, 4800e9, 150754820096, 1.98e9),
}

# What JAX calls the devices of a TPU; those of a GPU have the names of GPU_FACTS.
TPU_NAMES = {
    'TPU v3': 'v3',
    'TPU v4': 'v4',
    'TPU v5 lite': 'v5e',
    'TPU v5': 'v5p',
    'TPU v6 lite': 'v6e',
}

# What the compiler wants to know of a GPU that it cannot ask, besides the above.
GPU_LIMITS = {
    'threads_per_block_limit': 1024,
    'threads_per_warp': 32,
    'shared_memory_per_block': 49152,
    'threads_per_core_limit': 2048,
    'block_dim_limit_x': 2147483647,
    'block_dim_limit_y': 65535,
    'block_dim_limit_z': 65535,
    'registers_per_core_limit': 65536,
    'registers_per_block_limit': 65536,
}
A100 = {
    'cuda_compute_capability': {'major': 8},
    'core_count': 108,
    'fpus_per_core': 64,
    'shared_memory_per_core': 167936,
    'shared_memory_per_block_optin': 166912,
    'l2_cache_size': 41943040,
}
H100 = {
    'cuda_compute_capability': {'major': 9},
    'core_count': 132,
    'fpus_per_core': 128,
    'shared_memory_per_core': 233472,
    'shared_memory_per_block_optin': 232448,
    'l2_cache_size': 52428800,
}
GPU_FACTS = {
    'a100-40': ('NVIDIA A100-SXM4-40GB', A100),
    'a100-80': ('NVIDIA A100-SXM4-80GB', A100),
    'h100': ('NVIDIA H100 80GB HBM3', H100),
    'h200': ('NVIDIA H200', {**H100, 'l2_cache_size': 62914560}),
}

HERE = 'here'

# A v4 chip is one device of two cores, which is not what the compiler takes for granted.
TPU_OPTIONS = {'v4': {'chip_config_name': 'megacore'}}
# Eight chips of these kinds are one host; of larger slices each host has four.
EIGHT_ON_A_HOST = ('v5e:2x4', 'v6e:2x4')


class Target(NamedTuple):
    """A slice of accelerators.

    Attributes:
      name: such as 'tpu:v5e:2x4'.
      devices: of JAX, to be compiled for.
      device: one of them: a chip, or half of one where each of its two cores is a device.
      hosts: processes of a run on it.
    """

    name: str
    devices: tuple[Any, ...]
    device: Chip
    hosts: int


def target(name: str) -> Target:
    """Returns the slice of a name.

    'tpu:v5e:2x4'; 'gpu:h100:8', or 'gpu:h100:2x8' for two hosts; 'cpu:1' for this machine's
    processors; 'here' for the devices that JAX finds on it.

    Raises:
      UserError: no such slice, or the compiler for it is not installed.
    """
    if name == HERE:
        devices = tuple(jax.local_devices())
        return Target(name, devices, _of_kind(devices), 1)
    match = re.fullmatch(r'(tpu|gpu):([\w-]+):(\d+(?:x\d+)*)|cpu:(\d+)', name)
    chips = {'tpu': TPUS, 'gpu': GPUS}.get(match[1], {}) if match else {}
    if not match or match[2] not in chips and not match[4]:
        raise UserError(
            f'--target is {name!r}; it must be {HERE}, tpu:KIND:SHAPE, gpu:KIND:NUMBER or '
            f'cpu:NUMBER, with one of the kinds {", ".join((*TPUS, *GPUS))}, such as tpu:v5e:2x4 '
            'or gpu:h100:8.'
        )
    platform, kind, shape, cpus = match.groups()
    if cpus:
        return _this_machine(name, int(cpus))
    try:
        devices = tuple(_topology(platform, kind, shape).devices)
    except Exception as e:  # whatever the compiler, or its absence, has to say
        extra = {'tpu': 'tpu', 'gpu': 'cuda'}[platform]
        raise UserError(
            f'--target is {name!r}; it cannot be compiled for here ({first_line(e)}). The compiler '
            f"comes with: pip install 'sam_jax[{extra}]'."
        ) from e
    share = math.prod(map(int, shape.split('x'))) / len(devices)
    hosts = len({d.process_index for d in devices})
    return Target(name, devices, chips[kind].part(share), hosts)


def _this_machine(name, number):
    """CPU devices."""
    jax.config.update('jax_num_cpu_devices', number)
    devices = tuple(jax.devices('cpu')[:number])
    return Target(name, devices, _of_kind(devices), 1)


def _of_kind(devices):
    """What is known of devices that are here: of their speed maybe nothing."""
    chip = known(devices[0].device_kind) or Chip(0, 0, 0, 0, 0)
    free, sharing = replicas.free_memory(devices)
    return chip._replace(memory=free / sharing)


def known(device_kind: str) -> Chip | None:
    """Returns what is known of the devices that JAX calls so, or None."""
    gpus = {called: kind for kind, (called, _) in GPU_FACTS.items()}
    kind = {**TPU_NAMES, **gpus}.get(device_kind)
    return device(kind) if kind else None


def device(kind: str) -> Chip:
    """Returns what JAX has for a device of a kind of chip: of a v3 each of its two cores."""
    return TPUS['v3'].part(1 / 2) if kind == 'v3' else {**TPUS, **GPUS}[kind]


def _topology(platform, kind, shape):
    # Without it libtpu asks the machine's metadata service for a TPU, for minutes.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    # One process at a time may use a TPU; any number may compile for one.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    from jax.experimental import topologies

    if platform == 'tpu':
        options: dict[str, Any] = dict(TPU_OPTIONS.get(kind, {}))
        if f'{kind}:{shape}' in EIGHT_ON_A_HOST:
            options['chips_per_host_bounds'] = (2, 4, 1)
        return topologies.get_topology_desc(
            platform='tpu', topology_name=f'{kind}:{shape}', **options
        )
    hosts, gpus = map(int, f'1x{shape}'.split('x')[-2:])
    return topologies.get_topology_desc(
        platform='cuda',
        topology_name='',
        topology=f'1x{hosts}x{gpus}',
        target_config=_text_proto(_gpu(kind)),
    )


def _gpu(kind):
    chip, (description, facts) = GPUS[kind], GPU_FACTS[kind]
    return {
        'gpu_device_info': {
            **GPU_LIMITS,
            **facts,
            'memory_bandwidth': round(chip.bandwidth),
            'clock_rate_ghz': chip.clock / 1e9,
            'device_memory_size': chip.memory,
        },
        'platform_name': 'CUDA',
        'dnn_version_info': {'major': 9, 'minor': 8},
        'device_description_str': description,
    }


def _text_proto(facts):
    """A dict in the text form of protocol buffers."""
    return ' '.join(
        f'{name} {{ {_text_proto(value)} }}'
        if isinstance(value, dict)
        else f'{name}: {json.dumps(value)}'
        for name, value in facts.items()
    )
