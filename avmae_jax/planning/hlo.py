"""What a compiled program sends between devices, read from the text of its optimised HLO.

The text is a list of computations, and lines of one call others: a loop its body, a fusion what was fused. A line runs
as often as all the loops around it say together, which is why XLA's own count, where the body of a loop counts once,
is of no use here.

A TPU's compiler hides some collectives: a reduce-scatter is a fusion of any name with a computation called
all-reduce-scatter, and one that runs beside computing is a pair of fusions, async-collective-start and -done, with
further fusions between that repeat it.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
# Bits, as small types are packed.
_BITS = {'pred': 8, 'bf16': 16, 'tf32': 32, 'f8e4m3fn': 8, 'f8e5m2': 8} | {
    f'{kind}{bits}': bits for kind in 'fsu' for bits in (2, 4, 8, 16, 32, 64)
}
_COMPUTATION = re.compile(r'^(ENTRY )?%([\w.\-]+) \(')
_LINE = re.compile(r'^\s+(?:ROOT )?%([\w.\-]+) = ')
_ARRAY = re.compile(r'\b([a-z][a-z0-9]*)\[([\d,]*)\]')
_OPCODE = re.compile(r'\s([a-z][a-z\-]*)\(')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_NOT_COMPUTING = {'get-tuple-element', 'tuple', 'bitcast', 'constant', 'parameter', 'copy', 'copy-start', 'copy-done'}


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
      result: text of its type: an array, or several in brackets.
      rest: the text behind the opcode: operands and attributes.
    """

    name: str
    opcode: str
    result: str
    rest: str

    @property
    def operands(self) -> list[str]:
        inside = self.rest[: _closing(self.rest, 0)]
        return re.findall(r'%([\w.\-]+)', inside)

    @property
    def called(self) -> list[str]:
        branches = _BRANCHES.search(self.rest)
        return _CALLED.findall(self.rest) + (re.findall(r'%([\w.\-]+)', branches[1]) if branches else [])

    def attribute(self, name: str) -> str:
        found = re.search(rf'\b{name}=%([\w.\-]+)', self.rest)
        assert found, (self.name, name)
        return found[1]


class Program(NamedTuple):
    """Attributes: computations: name -> lines in the order in which they run; entry: the name of the first."""

    computations: dict[str, list[Instruction]]
    entry: str


class Collective(NamedTuple):
    """A collective operation of a step.

    Attributes:
      kind: one of KINDS.
      dtype: of what is sent; arrays of several that go together are as many collectives here.
      array_bytes: of the whole array on one device: the result of an all-gather, what goes into every other kind.
      times: how often a step runs it.
      group: the devices that take part in one with each other, by their place in the mesh; of the first such group.
      overlapped: whether something is computed while it runs.
      where: the operation of the model that it comes from, as the compiler noted it; of several, the first.
      forward_bytes: those of `array_bytes` that are made in the forward pass.
    """

    kind: str
    dtype: str
    array_bytes: int
    times: int
    group: tuple[int, ...]
    overlapped: bool
    where: str
    forward_bytes: int

    @property
    def wire_bytes(self) -> float:
        """What each device sends, once."""
        size = len(self.group)
        share = (size - 1) / size
        return self.array_bytes * {'all-reduce': 2 * share, 'collective-permute': 1.0}.get(self.kind, share)


def parse(text: str) -> Program:
    """Computations and their lines."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = '', []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
            continue
        named = _LINE.match(line)
        if not named:
            continue
        rest = line[named.end() :]
        after_type = _closing(rest, 1) + 1 if rest.startswith('(') else 0
        opcode = _OPCODE.search(rest, max(0, after_type - 1))
        if opcode:
            lines.append(Instruction(named[1], opcode[1], rest[: opcode.start()], rest[opcode.end() :]))
    if not entry:
        raise ValueError('The text has no ENTRY computation: it is no HLO module.')
    return Program(computations, entry)


def _closing(text: str, start: int) -> int:
    """Where the bracket closes that was opened before `start`."""
    depth = 1
    for i in range(start, len(text)):
        depth += {'(': 1, ')': -1}.get(text[i], 0)
        if not depth:
            return i
    return len(text)


def array_bytes(text: str) -> dict[str, int]:
    """dtype -> bytes of the arrays in the text of a type; scalars are left out."""
    found: dict[str, int] = collections.Counter()
    for dtype, dims in _ARRAY.findall(text):
        if dtype in _BITS and dims:
            found[dtype] += math.prod(int(dim) for dim in dims.split(',')) * _BITS[dtype] // 8
    return dict(found)


def trip_count(program: Program, line: Instruction, inside: Sequence[Instruction]) -> int:
    """How often a `while` runs its body; 1 where the text does not tell.

    Args:
      inside: the computation in which the loop stands.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line.rest)
    if known:
        return int(known[1])
    condition = {each.name: each for each in program.computations[line.attribute('condition')]}
    compares = [each for each in condition.values() if each.opcode == 'compare' and 'direction=LT' in each.rest]
    for compare in compares:
        counter, limit = (condition.get(name) for name in compare.operands)
        if counter is None or limit is None or limit.opcode != 'constant':
            continue
        index = re.search(r'index=(\d+)', counter.rest)
        begin = _element(inside, line.operands[0], int(index[1])) if index else 0
        return max(0, int(limit.rest.split(')')[0]) - begin)
    return 1


def _element(lines: Sequence[Instruction], name: str, index: int) -> int:
    """The constant that a tuple holds at a place; 0 where it is none."""
    named = {line.name: line for line in lines}
    found = named.get(name)
    if found is not None and found.opcode == 'tuple':
        found = named.get(found.operands[index])
    while found is not None and found.opcode == 'copy':
        found = named.get(found.operands[0])
    return int(found.rest.split(')')[0]) if found is not None and found.opcode == 'constant' else 0


def executions(program: Program) -> Iterator[tuple[Instruction, Sequence[Instruction], int]]:
    """(line, the computation it stands in, how often it runs) of all lines outside of fusions.

    Of a conditional the branch that sends most counts, or else that makes most: one runs, and nobody knows which.
    """

    def walk(name: str, count: int) -> Iterator[tuple[Instruction, Sequence[Instruction], int]]:
        lines = program.computations[name]
        for line in lines:
            yield line, lines, count
            if line.opcode == 'while':
                yield from walk(line.attribute('body'), count * trip_count(program, line, lines))
            elif line.opcode == 'call':
                yield from walk(line.called[0], count)
            elif line.opcode == 'conditional':
                yield from max((list(walk(called, count)) for called in line.called), key=made)

    def made(runs: Sequence[tuple[Instruction, Sequence[Instruction], int]]) -> tuple[int, int]:
        sizes = [(line.opcode.removesuffix('-start'), count * sum(array_bytes(line.result).values()))
                 for line, _, count in runs]  # fmt: skip
        return sum(size for opcode, size in sizes if opcode in KINDS), sum(size for _, size in sizes)

    return walk(program.entry, 1)


def collectives(text: str) -> list[Collective]:
    """Every collective of the program, with how often it runs."""
    program = parse(text)
    named = {line.name: line for lines in program.computations.values() for line in lines}
    types = {name: line.result for name, line in named.items()}
    found = []
    for line, lines, count in executions(program):
        kind, asynchronous = line.opcode.removesuffix('-start'), line.opcode.endswith('-start')
        inner = line
        if line.opcode in ('fusion', 'async-start'):
            starts = line.opcode == 'async-start' or line.name.startswith('async-collective-start')
            # Other fusions with a collective in them follow a start, and repeat it.
            if not starts and not any(name.startswith('all-reduce-scatter') for name in line.called):
                continue
            fused = [each for name in line.called for each in program.computations[name]]
            inside = [each for each in fused if each.opcode.removesuffix('-start') in KINDS]
            if not inside:
                continue
            inner = inside[0]
            kind = inner.opcode.removesuffix('-start')
            asynchronous = starts
            if kind == 'all-reduce' and any(each.opcode == 'dynamic-slice' for each in fused):
                kind = 'reduce-scatter'
        if kind not in KINDS or not count:
            continue
        sizes = array_bytes(_whole(kind, inner, types))
        if not sizes:  # Of scalars alone, such as the loss.
            sizes = {dtype: _BITS[dtype] // 8 for dtype, _ in _ARRAY.findall(inner.result) if dtype in _BITS}
        where = _source(inner) or _source(line)
        sent = inner.operands
        origins = [where] if len(sent) == 1 else [_origin(name, named) or where for name in sent]
        forward = array_bytes(
            ' '.join(types.get(name, '') for name, origin in zip(sent, origins, strict=True) if _is_forward(origin))
        )
        for dtype, size in sizes.items():
            found.append(
                Collective(
                    kind=kind,
                    dtype=dtype,
                    array_bytes=size,
                    times=count,
                    group=_first_group(inner),
                    overlapped=asynchronous and _computes_meanwhile(line, lines),
                    where=where,
                    forward_bytes=min(size, forward.get(dtype, 0)),
                )
            )
    return found


def _whole(kind: str, line: Instruction, types: Mapping[str, str]) -> str:
    """The text of the types that a collective's bytes are counted by."""
    sent = ' '.join(types.get(name, '') for name in line.operands)
    if kind != 'all-gather':
        return sent
    if not line.opcode.endswith('-start'):
        return line.result
    # (operands, results): what is gathered is what is not an operand.
    arrays = [f'{dtype}[{dims}]' for dtype, dims in _ARRAY.findall(line.result) if dims]
    return ' '.join(arrays[len(_ARRAY.findall(sent)) :])


def _source(line: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', line.rest)
    return found[1] if found else ''


def _origin(name: str, named: Mapping[str, Instruction]) -> str:
    """What made an operand: the compiler sends arrays together that come from all over the model."""
    line = named.get(name)
    while line is not None and not _source(line) and line.opcode in _NOT_COMPUTING and line.operands:
        line = named.get(line.operands[0])
    return '' if line is None else _source(line)


def _is_forward(where: str) -> bool:
    return 'jvp(' in where and 'transpose(' not in where


def _computes_meanwhile(start: Instruction, lines: Sequence[Instruction]) -> bool:
    """Whether anything that takes time stands between a start and its end."""
    names = {start.name}
    after = itertools.dropwhile(lambda line: line.name != start.name, lines)
    for line in itertools.islice(after, 1, None):
        used = names & set(line.operands)
        if used and (line.opcode.endswith('-done') or 'async-collective-done' in line.name):
            return False
        if used and line.opcode in ('get-tuple-element', 'tuple', 'bitcast'):
            names.add(line.name)
        elif line.opcode not in _NOT_COMPUTING and not line.opcode.endswith(('-start', '-done')):
            return True
    return False


def _first_group(line: Instruction) -> tuple[int, ...]:
    """Members of the first of a collective's groups, in any of the three ways in which they are written."""
    pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', line.rest)
    if pairs:
        first = re.search(r'(\d+),(\d+)', pairs[1])
        return (int(first[1]), int(first[2])) if first else (0,)
    listed = re.search(r'replica_groups=\{\{([\d,]*)\}', line.rest)
    if listed:
        return tuple(int(each) for each in listed[1].split(','))
    iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line.rest)
    if iota:
        shape, dims = ([int(each) for each in iota[i].split(',')] for i in (1, 2))
        devices = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            devices = devices.transpose([int(each) for each in iota[3].split(',')])
        return tuple(int(each) for each in devices.reshape(shape)[0].ravel())
    named = re.search(r'replica_groups=mesh\[([^\]]*)\](.*?) \{([^}]*)\}', line.rest)
    if named:
        return _named_group(named[1], named[2], named[3])
    return (0,)


def _named_group(axes: str, order: str, wanted: str) -> tuple[int, ...]:
    """'axis_0'=2,'axis_1'=8 and 'axis_1': of a mesh with named axes, those along some of them.

    A part of an axis is written 'axis_1':(2)4: of size 4, with 2 of it before. Devices in another order are written
    device_ids=([2,8]T(1,0)): counted in that shape, and then turned around.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    devices = np.arange(math.prod(sizes.values()))
    iota = re.search(r'device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)', order)
    if iota:
        dims, turned = ([int(each) for each in iota[i].split(',')] for i in (1, 2))
        devices = devices.reshape(dims).transpose(turned)
    devices = devices.reshape(list(sizes.values()))
    index: list[slice | int] = [0] * len(sizes)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", wanted):
        whole = sizes[name]
        step = whole // (int(before) * int(size)) if size else 1
        count = int(size) if size else whole
        index[list(sizes).index(name)] = slice(0, step * count, step)
    return tuple(int(each) for each in np.ravel(devices[tuple(index)]))


# -- Memory --

_NO_TRAFFIC = _NOT_COMPUTING - {'copy', 'copy-start'} | {
    'while',
    'conditional',
    'call',
    'after-all',
    'partition-id',
    'iota',
}
_PLACED = re.compile(r'\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?')
_ELSEWHERE = re.compile(r'S\([1-9]\d*\)')  # A memory space that is not HBM: of a TPU, one that is on the chip.
_SLICING = ('dynamic-slice', 'slice', 'gather')


def memory_traffic(text: str) -> int:
    """Bytes that a step reads from and writes to a device's HBM.

    What is fused stays on the chip. Of an array that is only sliced the slice counts, and of one that is updated in
    place the update.
    """
    program = parse(text)
    types = {line.name: line.result for lines in program.computations.values() for line in lines}
    total = 0
    for line, _, count in executions(program):
        if line.opcode in _NO_TRAFFIC or line.opcode.endswith('-done') or not count:
            continue
        if line.opcode == 'copy-start':  # (to, from, flags)
            to, origin = _in_memory(line.result)[:2]
            total += count * (to + origin)
            continue
        fused = program.computations[line.called[0]] if line.opcode == 'fusion' else [line]
        read = sum(
            _read(program, line, i, sum(_in_memory(types.get(name, '')))) for i, name in enumerate(line.operands)
        )
        results, written = _in_memory(line.result), _written(program, fused[-1], fused)
        if len(results) == len(written):
            results = [min(each) for each in zip(results, written, strict=True)]
        total += count * (read + sum(results))
    return total


def _in_memory(result: str) -> list[int]:
    """Bytes in HBM of each array in the text of a type."""
    return [
        math.prod(int(dim) for dim in dims.split(',') if dim) * _BITS.get(dtype, 0) // 8
        if not _ELSEWHERE.search(layout or '')
        else 0
        for dtype, dims, layout in _PLACED.findall(result)
    ]


def _read(program: Program, line: Instruction, index: int, whole: int) -> int:
    """Bytes that a line reads of its operand `index`, which has `whole` in HBM."""
    if not whole:
        return 0
    if line.opcode in _SLICING and index == 0:
        return min(whole, sum(array_bytes(line.result).values()))
    if line.opcode == 'dynamic-update-slice' and index == 0:
        return 0
    if line.opcode != 'fusion':
        return whole
    lines = program.computations[line.called[0]]
    names = {each.name for each in lines if each.opcode == 'parameter' and each.rest.startswith(f'{index})')}
    total = 0
    for each in lines:
        operands = each.operands
        if each.opcode == 'parameter' or not names & set(operands):
            continue
        if each.opcode == 'bitcast':
            names.add(each.name)
        else:
            total += sum(_read(program, each, i, whole) for i, name in enumerate(operands) if name in names)
    return min(whole, total)


def _written(program: Program, root: Instruction, lines: Sequence[Instruction]) -> list[int]:
    """Bytes of each result that a line gives, an update in place counting as the update."""
    named = {line.name: line for line in lines}
    if root.opcode == 'tuple':
        return [size for name in root.operands for size in _written(program, named[name], lines)]
    if root.opcode == 'bitcast' and root.operands[0] in named:
        return _written(program, named[root.operands[0]], lines)
    if root.opcode == 'dynamic-update-slice' and root.operands[1] in named:
        return [sum(array_bytes(named[root.operands[1]].result).values())]
    if root.opcode == 'fusion':
        inner = program.computations[root.called[0]]
        return _written(program, inner[-1], inner)
    return [
        math.prod(int(dim) for dim in dims.split(',') if dim) * _BITS.get(dtype, 0) // 8
        for dtype, dims in _ARRAY.findall(root.result)
    ]


# -- Sums --


def gradient_dtypes(found: Sequence[Collective], smallest: int = 16) -> dict[str, int]:
    """dtype -> bytes of what is added up over devices behind the forward pass: gradients of parameters.

    Args:
      smallest: arrays of fewer bytes are left out: losses and norms.
    """
    table: dict[str, int] = {}
    for each in found:
        size = each.array_bytes - each.forward_bytes
        if each.kind in ('all-reduce', 'reduce-scatter') and size >= smallest:
            table[each.dtype] = table.get(each.dtype, 0) + size * each.times
    return table
