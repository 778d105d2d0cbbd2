"""Devices that are compiled for and need not be there, and what their makers say of them."""

import json
import math
import os
import re
from typing import Any, NamedTuple

from sam_jax.errors import UserError, first_line


class Chip(NamedTuple):
    """A kind of chip, by its maker's data sheet.

    Attributes:
      flops: dense bfloat16 operations a second.
      bandwidth: bytes a second between chip and memory.
      memory: bytes.
      clock: cycles a second.
    """

    flops: float
    bandwidth: float
    memory: float
    clock: float


GPUS = {'h100': Chip(989e12, 3352e9, 84942979072, 1.98e9)}

# What the compiler wants to know of a GPU that it cannot ask.
GPU_FACTS = {
    'h100': {
        'gpu_device_info': {
            'threads_per_block_limit': 1024,
            'threads_per_warp': 32,
            'shared_memory_per_block': 49152,
            'shared_memory_per_core': 233472,
            'threads_per_core_limit': 2048,
            'core_count': 132,
            'fpus_per_core': 128,
            'block_dim_limit_x': 2147483647,
            'block_dim_limit_y': 65535,
            'block_dim_limit_z': 65535,
            'memory_bandwidth': 3352320000000,
            'l2_cache_size': 52428800,
            'clock_rate_ghz': 1.98,
            'device_memory_size': 84942979072,
            'shared_memory_per_block_optin': 232448,
            'cuda_compute_capability': {'major': 9},
            'registers_per_core_limit': 65536,
            'registers_per_block_limit': 65536,
        },
        'platform_name': 'CUDA',
        'dnn_version_info': {'major': 9, 'minor': 8},
        'device_description_str': 'NVIDIA H100 80GB HBM3',
    }
}

# That flops are matrix units x their size x 2 x clock holds for each of them.
CHIPS = {
    'v3': Chip(123e12, 900e9, 32 * 2**30, 0.94e9),
    'v4': Chip(275e12, 1228e9, 32 * 2**30, 1.05e9),
    'v5e': Chip(197e12, 819e9, 16 * 2**30, 1.5e9),
    'v5p': Chip(459e12, 2765e9, 95 * 2**30, 1.75e9),
    'v6e': Chip(918e12, 1640e9, 32 * 2**30, 1.75e9),
}


class Target(NamedTuple):
    """A slice of accelerators.

    Attributes:
      name: 'tpu:v5e:2x4'.
      devices: of JAX, to be compiled for.
      device: one of them: a chip, or half of one where each of its two cores is a device.
      hosts: processes of a run on it.
    """

    name: str
    devices: tuple[Any, ...]
    device: Chip
    hosts: int


def target(name: str) -> Target:
    """Returns the slice of a name: 'tpu:v5e:2x4', 'gpu:h100:8', or 'gpu:h100:2x8' for two hosts.

    Raises:
      UserError: no such slice, or the compiler for it is not installed.
    """
    match = re.fullmatch(r'(tpu|gpu):(\w+):(\d+(?:x\d+)*)', name)
    chips = {'tpu': CHIPS, 'gpu': GPUS}.get(match[1], {}) if match else {}
    if not match or match[2] not in chips:
        raise UserError(
            f'--target is {name!r}; it must be tpu:KIND:SHAPE or gpu:KIND:NUMBER, with one of the '
            f'kinds {", ".join((*CHIPS, *GPUS))}, such as tpu:v5e:2x4 or gpu:h100:8.'
        )
    platform, kind, shape = match.groups()
    try:
        devices = tuple(_topology(platform, kind, shape).devices)
    except Exception as e:  # whatever the compiler, or its absence, has to say
        extra = {'tpu': 'tpu', 'gpu': 'cuda'}[platform]
        raise UserError(
            f'--target is {name!r}; it cannot be compiled for here ({first_line(e)}). The compiler '
            f"comes with: pip install 'sam_jax[{extra}]'."
        ) from e
    share = math.prod(map(int, shape.split('x'))) / len(devices)
    whole = chips[kind]
    device = Chip(whole.flops * share, whole.bandwidth * share, whole.memory * share, whole.clock)
    return Target(name, devices, device, len({d.process_index for d in devices}))


def _topology(platform, kind, shape):
    # Without it libtpu asks the machine's metadata service for a TPU, for minutes.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    from jax.experimental import topologies

    if platform == 'tpu':
        return topologies.get_topology_desc(platform='tpu', topology_name=f'{kind}:{shape}')
    hosts, gpus = map(int, f'1x{shape}'.split('x')[-2:])
    return topologies.get_topology_desc(
        platform='cuda',
        topology_name='',
        topology=f'1x{hosts}x{gpus}',
        target_config=_text_proto(GPU_FACTS[kind]),
    )


def _text_proto(facts):
    """A dict in the text form of protocol buffers."""
    return ' '.join(
        f'{name} {{ {_text_proto(value)} }}'
        if isinstance(value, dict)
        else f'{name}: {json.dumps(value)}'
        for name, value in facts.items()
    )
