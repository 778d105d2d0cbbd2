"""What an optimised program says of itself: its instructions, collectives and copies."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5}
COLLECTIVES = ('all-reduce', 'all-gather', 'all-to-all', 'reduce-scatter', 'collective-permute')
HOST = ('infeed', 'outfeed', 'send', 'recv')


class Instruction(NamedTuple):
    """One instruction of a program.

    Attributes:
      name: its name.
      opcode: what it does, 'fusion', 'copy', 'all-reduce'.
      shape: of its result, as the program has it, with layouts.
      operands: the text behind the opcode: operands and attributes.
      computation: in which it stands.
      cycles: the compiler's estimate; 0 where there is none.
      op_name: the path of JAX's operation that it comes from, or ''.
    """

    name: str
    opcode: str
    shape: str
    operands: str
    computation: str
    cycles: int
    op_name: str

    @property
    def bytes(self) -> float:
        """Size of the result."""
        return size(self.shape)


def size(shape: str) -> float:
    """Returns the bytes of an array or tuple, 'f32[8,32]{1,0}' or '(f32[8], u8[2])'."""
    total = 0.0
    for kind, dimensions in re.findall(r'\b(pred|[a-z]+\d\w*)\[([\d,]*)\]', shape):
        bits = re.search(r'\d+', kind)
        each = BYTES.get(kind, int(bits[0]) / 8 if bits else 1)
        total += each * math.prod(int(n) for n in dimensions.split(',') if n)
    return total


def padded_size(shape: str) -> float:
    """Returns the bytes of an array or tuple with its last dimensions padded to whole tiles.

    In 'bf16[32,8,8,160]{3,0,2,1:T(8,128)(2,1)}' the last two in memory, 32 and 160, are padded to
    multiples of 8 and 128: 32 and 256. An array without tiles is not padded.
    """
    total = 0.0
    for array, dimensions, order, tile in re.findall(
        r'(\w+\[([\d,]+)\])\{([\d,]+):T\(([\d,]+)\)', shape
    ):
        lengths, order, tile = ([int(n) for n in x.split(',')] for x in (dimensions, order, tile))
        padded = math.prod(lengths)
        for axis, side in zip(order, reversed(tile)):
            padded = padded // lengths[axis] * (-(-lengths[axis] // side) * side)
        total += size(array) * padded / math.prod(lengths)
    return total or size(shape)


def instructions(text: str) -> list[Instruction]:
    """Returns the instructions that are executed as such: not those within a fusion.

    Args:
      text: of `compiled.as_text()`.
    """
    found, computation, fused = [], '', set()
    for line in text.splitlines():
        header = re.match(r'(?:ENTRY )?%?([\w.-]+) \(.*\{$', line)
        if header:
            computation = header[1]
            continue
        match = re.match(r'\s+(?:ROOT )?%?([\w.-]+) = ', line)
        if not match:
            continue
        shape, rest = _shape(line[match.end() :])
        opcode, _, operands = rest.partition('(')
        if opcode == 'fusion':
            fused.update(re.findall(r'calls=%?([\w.-]+)', operands))
        cycles = re.search(r'"estimated_cycles":"(\d+)"', operands)
        op_name = re.search(r'op_name="([^"]*)"', operands)
        found.append(
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
    return [i for i in found if i.computation not in fused]


def _shape(text):
    """(shape, what follows) of the text behind '='."""
    if not text.startswith('('):
        shape, _, rest = text.partition(' ')
        return shape, rest
    depth = 0
    for end, character in enumerate(text):
        depth += {'(': 1, ')': -1}.get(character, 0)
        if not depth:
            return text[: end + 1], text[end + 2 :]
    return text, ''


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


def groups(instruction: Instruction) -> list[list[int]] | str:
    """Returns the devices that exchange with each other; as text, where it is in another form."""
    match = re.search(r'replica_groups=(\{(?:\{[\d,]*\},?)*\}|\S+?)(?:, |$)', instruction.operands)
    if not match:
        return ''
    listed = re.findall(r'\{([\d,]+)\}', match[1])
    return [[int(n) for n in group.split(',')] for group in listed] or match[1]


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
        if not re.match(r'jit\(|shard_map$|pmap$|while$|body$|cond$|branch_\d', part)
        and not re.match(r'\w+\.(run_block|_\w+|conv|norm)$', part)
    ]
    return '/'.join(parts[:-1]) or ''.join(parts) or 'without a name'


def cycles_by_layer(program: Iterable[Instruction]) -> list[tuple[str, int]]:
    """Returns [(layer, estimated cycles), ...], the most first. Of a loop one turn counts."""
    total: Counter[str] = Counter()
    for i in program:
        total[layer(i.op_name)] += i.cycles
    return [(name, cycles) for name, cycles in total.most_common() if cycles]
