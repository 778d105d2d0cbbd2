"""What is known of a program before it ever runs: memory, operations, time as it is estimated."""

import re
import time
from collections.abc import Callable
from typing import Any

import jax

from sam_jax.targets import hlo
from sam_jax.targets.hardware import Target

LARGE = 2**20  # bytes of an array whose copies are told
COSTLY = 10  # layers that are named


def of_program(
    lowered: jax.stages.Lowered,
    target: Target,
    flops: float,
    dtype: str = 'float32',
    measure: Callable[[Any], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Compiles a program for a target and returns what it says, as JSON holds it.

    {'compile_seconds'; 'fits': whether a device holds it; 'memory': bytes of a device by use;
    'flops', 'bytes', 'kernels' of a device, with all turns of loops: `operations.flops`,
    `hlo.bytes_moved`, `hlo.kernels`; 'xla_flops', 'xla_bytes': by XLA's own count, of loops one
    turn, 0 for GPUs that are not there; 'roofline_seconds': the longer one of flops / peak and
    bytes / bandwidth; 'compiler_cycles', 'compiler_seconds': the compiler's own estimate, where it
    makes one; 'collectives'; 'padding': of results, see `hlo.padding`; 'host_transfers'; 'copies'
    of large arrays; 'gathers' and what each reads at a place, in elements; 'loops'; 'conditions';
    'costly': [layer, cycles, bytes]}.

    A compiler that refuses a program because it is too large leaves 'compile_seconds', 'fits',
    'memory' (only 'all', and 0 where it does not say how much), 'flops' and 'refused', its words.

    Args:
      lowered: of a step.
      target: Target.
      flops: of the step, by `operations.flops`.
      dtype: `model.dtype`, which decides the peak.
      measure: what is told besides of the compiled program, `measured.of_train_step`.
    """
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        return {
            'compile_seconds': time.perf_counter() - began,
            'fits': False,
            'memory': {'all': _asked_for(str(e))},
            'flops': flops,
            'refused': str(e)[:1000],
        }
    took = time.perf_counter() - began
    cost: Any = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    text = compiled.as_text() or ''
    program = hlo.instructions(text)
    cycles = sum(i.times * i.cycles for i in program)
    moved, memory, device = hlo.bytes_moved(program), memory_of(compiled), target.device
    return {
        'compile_seconds': took,
        'fits': memory['all'] <= device.memory,
        'memory': memory,
        'flops': flops,
        'bytes': moved,
        'kernels': hlo.kernels(program),
        'xla_flops': cost.get('flops', 0.0),
        'xla_bytes': cost.get('bytes accessed', 0.0),
        'roofline_seconds': max(_over(flops, device.peak(dtype)), _over(moved, device.bandwidth)),
        'compiler_cycles': cycles,
        'compiler_seconds': _over(cycles, device.clock),
        'collectives': [
            {**_told(i, 'name', 'opcode', 'bytes', 'times'), 'groups': hlo.groups(i)}
            for i in hlo.collectives(program)
        ],
        'padding': hlo.padding(program),
        'host_transfers': [i.name for i in hlo.host_transfers(program)],
        'copies': [
            _told(i, 'name', 'opcode', 'shape', 'bytes', 'times')
            for i in hlo.large_copies(program, LARGE)
        ],
        'gathers': [{'name': name, 'elements': n} for name, n in hlo.gathers(text)],
        'loops': [_told(i, 'name', 'op_name') for i in hlo.loops(program)],
        'conditions': [_told(i, 'name', 'op_name') for i in hlo.conditions(program)],
        'costly': [[name, *cost] for name, cost in hlo.costly(program)[:COSTLY]],
        **(measure(compiled) if measure else {}),
    }


def seconds(found: dict[str, Any]) -> float:
    """Returns the ESTIMATED time of `of_program`: the slower one; 0 where there is none."""
    return max(found.get('roofline_seconds', 0.0), found.get('compiler_seconds', 0.0))


def _over(amount, speed):
    """Seconds; 0 where the speed is not known."""
    return amount / speed if speed else 0.0


def _told(instruction, *names):
    return {name: getattr(instruction, name) for name in names}


def _asked_for(message):
    """Bytes that a compiler says it would need, 'Used 20.52G of 15.75G hbm'; 0 if it says none."""
    match = re.search(r'[Uu]sed ([\d.]+)([KMGT]) of', message)
    return float(match[1]) * 1024 ** ('KMGT'.index(match[2]) + 1) if match else 0


def memory_of(compiled: Any) -> dict[str, int]:
    """Returns the bytes of a device: arguments, outputs, temporaries, program, all at once."""
    memory = compiled.memory_analysis()
    parts = {
        'arguments': memory.argument_size_in_bytes,
        # What takes the place of an argument that is given up needs none of its own.
        'outputs': memory.output_size_in_bytes - memory.alias_size_in_bytes,
        'temporaries': memory.temp_size_in_bytes,
        'program': memory.generated_code_size_in_bytes,
    }
    return {**parts, 'all': sum(parts.values())}


def rows(
    found: dict[str, Any], images: int, target: Target, dtype: str = 'float32'
) -> list[tuple[str, str]]:
    """Returns (what, how much) of `of_program`, for a person.

    Args:
      found: of `of_program`.
      images: that all devices together take at once.
      target: that it was compiled for.
      dtype: `model.dtype`.
    """
    memory, gib = found['memory'], 2**30
    parts = ', '.join(f'{name} {memory[name] / gib:.3g}' for name in memory if name != 'all')
    room = f'{memory["all"] / gib:.3g} of {target.device.memory / gib:.3g} GiB'
    shown = [
        ('compiled in', f'{found["compile_seconds"]:.1f} s'),
        ('fits', 'yes' if found['fits'] else 'NO'),
        ('memory of a device', f'{room}: {parts}' if parts else f'{room}: the compiler refuses it'),
        ('operations of convolutions and products', f'{found["flops"]:.4g} FLOP'),
    ]
    if 'refused' in found:
        return shown
    single = sum(gather['elements'] == 1 for gather in found['gathers'])
    return [
        *shown,
        ('bytes to and from main memory', f'{found["bytes"]:.4g} B'),
        ('kernels', f'{found["kernels"]:,}'),
        *_estimates(found, images, target, dtype),
        *_measured(found, images, target, dtype),
        (
            'exchanges between devices',
            _listed(
                f'{c["opcode"]} {c["bytes"] / 2**20:.3g} MiB in {_described(c["groups"])}'
                + _repeated(c)
                for c in found['collectives']
            ),
        ),
        ('results padded to tiles', f'{found["padding"]:.2f} times their size'),
        ('transfers to the host', str(len(found['host_transfers']) or 'none')),
        (
            'copies of large arrays',
            _listed(f'{c["opcode"]} {c["shape"]}' + _repeated(c) for c in found['copies']),
        ),
        ('gathers, of single elements', f'{len(found["gathers"])}, {single}'),
        ('loops', str(len(found['loops']) or 'none')),
        ('conditions', str(len(found['conditions']) or 'none')),
    ]


def _listed(texts):
    return '; '.join(texts) or 'none'


def _repeated(c):
    return f', {c["times"]} times' if c['times'] > 1 else ''


def _described(groups):
    if not isinstance(groups, list):
        return f'groups {groups or "of all"}'
    return f'{len(groups)} group{"s" * (len(groups) > 1)} of {len(groups[0])}'


def _estimates(found, images, target, dtype):
    roofline, cycles = found['roofline_seconds'], found['compiler_cycles']
    slower = seconds(found)
    if not slower:
        return [('estimates of time', 'none: the speed of this target is not known')]
    share = found['flops'] / slower / target.device.peak(dtype)
    own = f'{1e3 * found["compiler_seconds"]:.4g} ms ({cycles:,} cycles)' if cycles else 'none'
    return [
        ('ESTIMATED time, roofline', f'{1e3 * roofline:.4g} ms'),
        ("ESTIMATED time, compiler's", own),
        ('ESTIMATED images/s, by the slower one', f'{images / slower:,.0f}'),
        ('ESTIMATED share of peak', f'{100 * share:.1f} %'),
    ]


def _measured(found, images, target, dtype):
    if 'measured_seconds' not in found:
        return []
    took, memory = found['measured_seconds'], found['measured_memory']
    peak, slower = target.device.peak(dtype), seconds(found)
    shown = [
        ('MEASURED time', f'{1e3 * took:.4g} ms, +- {50 * found["measured_spread"]:.1f} %'),
        ('MEASURED images/s', f'{images / took:,.0f}'),
    ]
    if peak:
        shown.append(('MEASURED share of peak', f'{100 * found["flops"] / took / peak:.1f} %'))
    if slower:
        shown.append(('measured / estimated time', f'{took / slower:.2f}'))
    if memory:
        shown.append(('MEASURED most memory in use', f'{memory / 2**30:.3g} GiB'))
    return shown
