"""What is known of a program before it ever runs: memory, operations, time as it is estimated."""

import time
from typing import Any

import jax

from sam_jax.targets import hlo
from sam_jax.targets.hardware import Target

LARGE = 2**20  # bytes of an array whose copies are told
COSTLY = 10  # layers that are named


def of_program(lowered: jax.stages.Lowered, target: Target) -> dict[str, Any]:
    """Compiles a program for a target and returns what it says, as JSON holds it.

    {'compile_seconds'; 'memory': bytes of a device by use; 'flops', 'bytes': of a device, by XLA's
    count, 0 for GPUs that are not there, of which it counts nothing; 'roofline_seconds': the longer
    one of flops / peak and bytes / bandwidth; 'compiler_cycles', 'compiler_seconds': the compiler's
    own estimate, where it makes one, of loops one turn; 'collectives'; 'padding': of results, see
    `hlo.padding`; 'host_transfers'; 'copies' of large arrays; 'gathers' and what each reads at a
    place, in elements; 'loops'; 'costly': [layer, cycles]}.
    """
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    text = compiled.as_text() or ''
    program = hlo.instructions(text)
    cycles = sum(i.cycles for i in program)
    flops, moved = cost.get('flops', 0.0), cost.get('bytes accessed', 0.0)
    return {
        'compile_seconds': seconds,
        'memory': memory_of(compiled),
        'flops': flops,
        'bytes': moved,
        'roofline_seconds': max(flops / target.device.flops, moved / target.device.bandwidth),
        'compiler_cycles': cycles,
        'compiler_seconds': cycles / target.device.clock,
        'collectives': [
            {'name': i.name, 'opcode': i.opcode, 'bytes': i.bytes, 'groups': hlo.groups(i)}
            for i in hlo.collectives(program)
        ],
        'padding': hlo.padding(program),
        'host_transfers': [i.name for i in hlo.host_transfers(program)],
        'copies': [
            {'name': i.name, 'opcode': i.opcode, 'shape': i.shape, 'bytes': i.bytes}
            for i in hlo.large_copies(program, LARGE)
        ],
        'gathers': [{'name': name, 'elements': n} for name, n in hlo.gathers(text)],
        'loops': [{'name': i.name, 'op_name': i.op_name} for i in hlo.loops(program)],
        'costly': [list(pair) for pair in hlo.cycles_by_layer(program)[:COSTLY]],
    }


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


def rows(found: dict[str, Any], images: int, target: Target) -> list[tuple[str, str]]:
    """Returns (what, how much) of `of_program`, for a person.

    Args:
      found: of `of_program`.
      images: that all devices together take at once.
      target: that it was compiled for.
    """
    memory, gib = found['memory'], 2**30
    parts = ', '.join(f'{name} {memory[name] / gib:.3g}' for name in memory if name != 'all')
    together = found['collectives']
    single = sum(gather['elements'] == 1 for gather in found['gathers'])
    shown = [
        ('compiled in', f'{found["compile_seconds"]:.1f} s'),
        (
            'memory of a device',
            f'{memory["all"] / gib:.3g} of {target.device.memory / gib:.3g} GiB: {parts}',
        ),
        *_estimates(found, images, target),
        (
            'exchanges between devices',
            '; '.join(f'{c["opcode"]} {c["bytes"] / 2**20:.3g} MiB' for c in together) or 'none',
        ),
        ('results padded to tiles', f'{found["padding"]:.2f} times their size'),
        ('transfers to the host', str(len(found['host_transfers']) or 'none')),
        (
            'copies of large arrays',
            '; '.join(f'{c["opcode"]} {c["shape"]}' for c in found['copies']) or 'none',
        ),
        ('gathers, of single elements', f'{len(found["gathers"])}, {single}'),
        ('loops', str(len(found['loops']) or 'none')),
    ]
    return shown


def _estimates(found, images, target):
    if not found['flops']:
        return [('operations, bytes moved, times', 'not counted by the compiler for this target')]
    roofline, cycles = found['roofline_seconds'], found['compiler_cycles']
    slower = max(roofline, found['compiler_seconds'])
    share = found['flops'] / slower / target.device.flops
    own = f'{1e3 * found["compiler_seconds"]:.4g} ms ({cycles:,} cycles)' if cycles else 'none'
    return [
        ('operations, bytes moved', f'{found["flops"]:.4g} FLOP, {found["bytes"]:.4g} B'),
        ('estimated time, roofline', f'{1e3 * roofline:.4g} ms'),
        ("estimated time, compiler's", own),
        ('estimated images/s, by the slower one', f'{images / slower:,.0f}'),
        ('estimated share of peak', f'{100 * share:.1f} %'),
    ]
