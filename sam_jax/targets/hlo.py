"""What an optimised program says of itself: its instructions, their cost, collectives, copies."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from sam_jax.metrics import LOGGED

BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5}
COLLECTIVES = ('all-reduce', 'all-gather', 'all-to-all', 'reduce-scatter', 'collective-permute')
HOST = ('infeed', 'outfeed', 'send', 'recv')
# What names an array, or runs what stands elsewhere, and moves nothing itself.
FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all')
FREE += ('while', 'conditional', 'call', 'opt-barrier')
SLICES = ('dynamic-slice', 'gather', 'slice')


class Instruction(NamedTuple):
    """One instruction of a program.

    Attributes:
      name: its name.
      opcode: what it does, 'fusion', 'copy', 'all-reduce'.
      shape: of its result, as the program has it, with layouts.
      operands: the text behind the opcode: operands and attributes.
      computation: in which it stands.
      cycles: the compiler's estimate for once; 0 where there is none.
      op_name: the path of JAX's operation that it comes from, or ''.
      times: how often it is executed.
      moved: bytes that it reads from main memory and writes there, once.
    """

    name: str
    opcode: str
    shape: str
    operands: str
    computation: str
    cycles: int
    op_name: str
    times: int = 1
    moved: float = 0.0

    @property
    def bytes(self) -> float:
        """Size of the result."""
        return size(self.shape)

    @property
    def inputs(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r'%([\w.-]+)', self.operands[: _closing(f'({self.operands}') - 1])


def size(shape: str) -> float:
    """Returns the bytes of an array or tuple, 'f32[8,32]{1,0}' or '(f32[8], u8[2])'."""
    return sum(each for each, _, _ in _arrays(shape))


def in_main_memory(shape: str) -> float:
    """Returns the bytes of those of the arrays that lie in main memory and not on the chip."""
    return sum(each for each, _, layout in _arrays(shape) if 'S(' not in layout)


def _arrays(shape):
    """Yields (bytes, lengths of its dimensions, layout) of each array."""
    for kind, dimensions, layout in re.findall(
        r'\b(pred|[a-z]+\d\w*)\[([\d,]*)\](\{[^}]*\})?', shape
    ):
        bits = re.search(r'\d+', kind)
        each = BYTES.get(kind, int(bits[0]) / 8 if bits else 1)
        lengths = [int(n) for n in dimensions.split(',') if n]
        yield each * math.prod(lengths), lengths, layout


def padded_size(shape: str) -> float:
    """Returns the bytes of an array or tuple with its last dimensions padded to whole tiles.

    In 'bf16[32,8,8,160]{3,0,2,1:T(8,128)(2,1)}' the last two in memory, 32 and 160, are padded to
    multiples of 8 and 128: 32 and 256. An array without tiles is not padded.
    """
    total = 0.0
    for each, lengths, layout in _arrays(shape):
        tiled = re.match(r'\{([\d,]+):T\(([\d,]+)\)', layout)
        if tiled:
            order, tile = ([int(n) for n in x.split(',')] for x in tiled.groups())
            for axis, side in zip(order, reversed(tile)):
                each *= -(-lengths[axis] // side) * side / max(lengths[axis], 1)
        total += each
    return total


def instructions(text: str) -> list[Instruction]:
    """Returns the instructions that are executed as such: not those within a fusion.

    Of a loop whose number of turns the program tells, the instructions are executed so often; of
    any other one, once. All branches of a condition are counted, but what only logged steps do.

    Args:
      text: of `compiled.as_text()`.
    """
    computations, entry = _computations(text)
    shapes = {i.name: i.shape for inside in computations.values() for i in inside}
    return [
        i._replace(times=times, moved=_moved(i, shapes, computations))
        for name, times in _executed(computations, entry).items()
        for i in computations[name]
    ]


def _computations(text):
    """({computation: its instructions}, the one at which the program enters)."""
    found: dict[str, list[Instruction]] = {}
    computation = entry = ''
    for line in text.splitlines():
        header = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line)
        if header:
            computation = header[2]
            found[computation] = []
            entry = computation if header[1] else entry
            continue
        match = re.match(r'\s+(?:ROOT )?%?([\w.-]+) = ', line)
        if not match:
            continue
        shape, rest = _shape(line[match.end() :])
        opcode, _, operands = rest.partition('(')
        cycles = re.search(r'"estimated_cycles":"(\d+)"', operands)
        op_name = re.search(r'op_name="([^"]*)"', operands)
        found[computation].append(
            Instruction(
                match[1],
                opcode,
                shape,
                operands,
                computation,
                int(cycles[1]) if cycles else 0,
                op_name[1] if op_name else '',
            )
        )
    return found, entry


def _shape(text):
    """(shape, what follows) of the text behind '='."""
    if not text.startswith('('):
        shape, _, rest = text.partition(' ')
        return shape, rest
    end = _closing(text)
    return text[:end], text[end + 1 :]


def _closing(text):
    """Where the bracket that a text begins with is closed: the place behind it."""
    depth = 0
    for end, character in enumerate(text):
        depth += {'(': 1, ')': -1}.get(character, 0)
        if not depth:
            return end + 1
    return len(text)


def _executed(computations, entry):
    """{computation: how often it is executed} of those that are not within an instruction."""
    times: Counter[str] = Counter()

    def enter(name, turns):
        times[name] += turns
        for i in computations.get(name, ()):
            if i.opcode == 'while':
                for part in re.findall(r'(?:condition|body)=%?([\w.-]+)', i.operands):
                    enter(part, turns * _trips(i, computations))
            elif i.opcode in ('conditional', 'call') or i.opcode.endswith('-start'):
                for part in () if LOGGED in i.op_name.split('/') else _called(i):
                    enter(part, turns)

    enter(entry, 1)
    return {name: turns for name, turns in times.items() if name in computations}


def _called(i):
    listed = re.search(r'branch_computations=\{([^}]*)\}', i.operands)
    single = re.findall(
        r'(?:calls|true_computation|false_computation|to_apply)=%?([\w.-]+)', i.operands
    )
    if i.opcode.startswith(COLLECTIVES):  # what they reduce by
        return []
    return re.findall(r'[\w.-]+', listed[1]) if listed else single


def _trips(loop, computations):
    """How many turns a loop makes: as the compiler says, or as it counts up to a constant."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.operands)
    if known:
        return int(known[1])
    condition = re.search(r'condition=%?([\w.-]+)', loop.operands)
    inside = computations.get(condition[1], ()) if condition else ()
    limits = [i for i in inside if i.opcode == 'constant' and i.shape.startswith('s32[]')]
    compared = [i for i in inside if i.opcode == 'compare' and 'direction=LT' in i.operands]
    if len(limits) == len(compared) == 1:
        return int(limits[0].operands.partition(')')[0])
    return 1


def _moved(i, shapes, computations):
    """Bytes between main memory and the chip.

    They are those of operands and results; of what is only sliced, or only updated in part, those
    of the part.
    """
    if i.opcode in FREE or i.opcode.endswith('-done'):
        return 0.0
    if i.opcode.endswith('-start') and i.opcode != 'all-reduce-start':
        if i.opcode.startswith(SLICES):  # ((operand), result, ...), from one memory to the other
            return next(_arrays(i.shape[_closing(i.shape[1:]) + 1 :]))[0]
        return in_main_memory(i.shape)  # (operand, result, ...)
    if i.opcode in SLICES:
        return 2 * in_main_memory(i.shape)
    operands = [in_main_memory(shapes.get(name, '')) for name in i.inputs]
    if i.opcode in ('dynamic-update-slice', 'scatter'):
        return 2 * sum(operands[1:])
    result = in_main_memory(i.shape)
    if i.opcode == 'fusion':
        called = re.search(r'calls=%?([\w.-]+)', i.operands)
        inside = computations.get(called[1], ()) if called else ()
        parts = _parts(inside)
        operands = [min(n, parts.get(k, n)) for k, n in enumerate(operands)]
        if inside and inside[-1].opcode == 'dynamic-update-slice':
            sizes = {j.name: j.bytes for j in inside}
            result = min(result, sizes.get(inside[-1].inputs[1], result))
    return sum(operands) + result


def _parts(inside):
    """{operand of a fusion: bytes of it that are used}, of those used in part."""
    users: dict[str, list[Instruction]] = {}
    for i in inside:
        for name in dict.fromkeys(i.inputs):
            users.setdefault(name, []).append(i)
    found = {}
    for i in inside:
        if i.opcode != 'parameter':
            continue
        # Its first operand is what a slice is taken of, or what is updated in place.
        used = [
            (j.bytes if j.opcode in SLICES else 0.0)
            if j.opcode in (*SLICES, 'dynamic-update-slice') and j.inputs[0] == i.name
            else math.inf
            for j in users.get(i.name, ())
        ]
        found[int(i.operands.partition(')')[0])] = sum(used)
    return found


def kernels(program: Iterable[Instruction]) -> int:
    """Returns how many instructions run on the device: all that compute or copy, with repeats."""
    return sum(i.times for i in program if i.opcode not in FREE and not i.opcode.endswith('-done'))


def bytes_moved(program: Iterable[Instruction]) -> float:
    """Returns the bytes between main memory and the chip, of all instructions, with repeats."""
    return sum(i.times * i.moved for i in program)


def collectives(program: Iterable[Instruction]) -> list[Instruction]:
    """Returns the exchanges between devices; of an asynchronous one its start."""
    return [i for i in program if i.opcode.removesuffix('-start') in COLLECTIVES]


def host_transfers(program: Iterable[Instruction]) -> list[Instruction]:
    """Returns what goes to the host or comes from it."""
    return [i for i in program if i.opcode.removesuffix('-done') in HOST]


def gathers(text: str) -> list[tuple[str, int]]:
    """Returns [(name, elements that are read at each place), ...], those within fusions as well.

    Gathers of single elements are slow on a TPU.

    Args:
      text: of `compiled.as_text()`.
    """
    found = re.findall(r'%?([\w.-]+) = \S+ gather\(.*slice_sizes=\{([\d,]*)\}', text)
    return [(name, math.prod(int(n) for n in sizes.split(',') if n)) for name, sizes in found]


def loops(program: Iterable[Instruction]) -> list[Instruction]:
    """Returns the loops."""
    return [i for i in program if i.opcode == 'while']


def conditions(program: Iterable[Instruction]) -> list[Instruction]:
    """Returns the conditions; a GPU's host waits for each that is in no CUDA graph."""
    return [i for i in program if i.opcode == 'conditional']


def groups(instruction: Instruction) -> list[list[int]] | str:
    """Returns the devices that exchange with each other; as text, where it is in another form.

    Read are {{0,1},{2,3}}; [2,4]<=[8], rows of 0, 1, 2, ...; and mesh['a'=2,'b'=4] {'a','b'} where
    it names all axes.
    """
    forms = r'\{(?:\{[\d,]*\},?)*\}|mesh\[.*?\] \{.*?\}|\S+?'
    match = re.search(rf'replica_groups=({forms})(?:, |$)', instruction.operands)
    if not match:
        return ''
    text = match[1]
    if iota := re.fullmatch(r'\[(\d+),(\d+)\]<=\[\d+\]', text):
        rows, size = map(int, iota.groups())
        return [list(range(size * row, size * row + size)) for row in range(rows)]
    if mesh := re.fullmatch(r'mesh\[(.*)\] \{(.*)\}', text):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        if {*axes} == {*re.findall(r"'(\w+)'", mesh[2])}:
            return [list(range(math.prod(map(int, axes.values()))))]
    listed = re.findall(r'\{([\d,]+)\}', text)
    return [[int(n) for n in group.split(',')] for group in listed] or text


def large_copies(program: Iterable[Instruction], least: float) -> list[Instruction]:
    """Returns the copies and transposes of arrays of at least so many bytes.

    A copy into the fast memory of the chip, which the compiler makes ahead of time where an array
    fits (`copy-start`), is none.
    """
    return [i for i in program if i.opcode in ('copy', 'transpose') and i.bytes >= least]


def padding(program: Iterable[Instruction]) -> float:
    """Returns how many times their size the results of a program's fusions take, padded to tiles.

    1 where there are no tiles; much more says that a short dimension, such as the images of a
    replica, lies along the lanes.
    """
    shapes = [i.shape for i in program if i.opcode == 'fusion']
    return sum(map(padded_size, shapes)) / sum(map(size, shapes)) if shapes else 1.0


def layer(op_name: str) -> str:
    """Returns the layer of the network, or the part of the step, that an operation belongs to."""
    parts = [
        part
        for part in op_name.split('/')
        if not re.match(r'jit\(|shard_map$|pmap$|while$|body$|cond$|branch_\d|closed_call$', part)
        and not re.match(r'\w+\.(run_block|_\w+|conv|norm)$', part)
    ]
    return '/'.join(parts[:-1]) or ''.join(parts) or 'without a name'


def costly(program: Iterable[Instruction]) -> list[tuple[str, tuple[float, float]]]:
    """Returns [(layer, (estimated cycles, bytes moved)), ...] with repeats, the costliest first.

    The order is that of the cycles, and of the bytes where the compiler estimates no cycles.
    """
    cycles: dict[str, float] = defaultdict(float)
    moved: dict[str, float] = defaultdict(float)
    for i in program:
        name = layer(i.op_name)
        cycles[name] += i.times * i.cycles
        moved[name] += i.times * i.moved
    costs = [(name, (cycles[name], moved[name])) for name in cycles]
    return sorted((pair for pair in costs if any(pair[1])), key=lambda pair: pair[1], reverse=True)
