"""Flags of XLA with which a program is compiled quickly; to be read before JAX is imported.

The tests compile much and compute little. Without LLVM's optimizations, with one module of LLVM for
a program, without a search for graphs of XNNPACK, and with XLA's older way to make kernels of fused
operations, a training run of a tiny network compiles in half of the time.
"""

import importlib.metadata

EMITTERS = 'xla_cpu_use_fusion_emitters'
TWO_WAYS = importlib.metadata.version('jaxlib').startswith('0.10.')  # later ones have one alone


def flags(devices: int = 1, level: int = 0) -> str:
    """Returns the value of XLA_FLAGS for so many fake CPU devices and LLVM's level."""
    given = {
        'xla_force_host_platform_device_count': devices,
        'xla_backend_optimization_level': level,
        'xla_cpu_parallel_codegen_split_count': 1,
        'xla_cpu_experimental_xnn_graph_fusion_mode': 'XNN_GRAPH_FUSION_MODE_DISABLED',
    }
    if TWO_WAYS:
        given[EMITTERS] = 'false'
    return ' '.join(f'--{name}={value}' for name, value in given.items())
