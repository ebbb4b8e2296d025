"""What a compiled program costs one device, the bodies of loops multiplied out: XLA's own analysis counts them once."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cdlm_jax.planning.collectives import Groups, bytes_sent, kind_of, replica_groups
from cdlm_jax.planning.hlo import (
    Array,
    Computation,
    Instruction,
    Program,
    called_by,
    name_of,
    parse,
    total_bytes,
    trip_count,
)

# No work of their own, or that of the computations they run.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"while", "conditional", "call", "optimization-barrier"}

# Ops that change a part of their first operand in place, and which operand the new part is.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


# A loop of one round or none, of which one in a computation runs (`decoding.progress.switch`).
_SWITCH = re.compile(r'op_name="[^"]*/switch/while"')

# How often a loop runs whose length depends on data.
Trips = Callable[[Instruction], int]


class Collective(NamedTuple):
    """Bytes that one device sends in collectives of a kind within the same groups of devices (partition numbers)."""

    kind: str
    groups: Groups
    bytes: float


class Cost(NamedTuple):
    """Of one device: FLOPs of matrix products, bytes to and from its main memory, and what it sends to others."""

    flops: float
    bytes: float
    collectives: list[Collective]


def cost(text: str, unknown_trips: Trips = lambda loop: 1) -> Cost:
    """The cost of a compiled program's text (`compiled.as_text()`).

    Of a conditional or a `progress.switch`, the branch of most FLOPs counts. A Pallas kernel costs what it says.
    """
    program = parse(text)
    whole = _tally(program, program.entry, unknown_trips, fused=False)
    sent: defaultdict[tuple[str, Groups], float] = defaultdict(float)
    for (_, kind, groups), size in whole.sent.items():
        sent[kind, groups] += size
    return Cost(whole.flops, whole.bytes, [Collective(kind, groups, size) for (kind, groups), size in sent.items()])


@dataclasses.dataclass
class _Tally:
    """sent: bytes by (channel, kind, groups). A TPU's compiler spreads a collective over several fusions, next to
    products: such pieces share a channel and count once."""

    flops: float = 0.0
    bytes: float = 0.0
    sent: dict[tuple, float] = dataclasses.field(default_factory=dict)

    def add(self, other: "_Tally", times: float = 1, *, pieces: bool = False) -> None:
        """`pieces`: what `other` sends may be part of what was counted already."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for key, size in other.sent.items():
            before = self.sent.get(key, 0.0)
            self.sent[key] = max(before, size) if pieces else before + times * size


def _tally(program: Program, name: str, unknown_trips: Trips, *, fused: bool) -> _Tally:
    """One run of a computation; inside of a fusion nothing reaches memory."""
    computation, total = program.computations[name], _Tally()
    alternatives: list[_Tally] = []
    for instruction in computation.instructions.values():
        own = _Tally(kernel_cost(instruction).flops or product_flops(computation, instruction))
        if not fused:
            own.bytes = traffic(program, computation, instruction)
        if kind := kind_of(instruction):
            groups = replica_groups(instruction)
            key = (instruction.attribute("channel_id") or instruction.name, kind, groups)
            own.sent[key] = bytes_sent(computation, instruction, kind, groups)
        total.add(own, pieces=True)
        inside = fused or instruction.opcode == "fusion"
        called = [_tally(program, each, unknown_trips, fused=inside) for each in called_by(instruction)]
        if instruction.opcode == "conditional":
            called = [max(called, key=lambda branch: branch.flops)]
        if instruction.opcode == "while" and _SWITCH.search(instruction.attributes):
            alternatives += called
            continue
        trips: int | None = 1
        if instruction.opcode == "while":
            trips = trip_count(program, computation, instruction)
        trips = unknown_trips(instruction) if trips is None else trips
        for each in called:
            total.add(each, trips, pieces=instruction.opcode == "fusion")
    if alternatives:
        total.add(max(alternatives, key=lambda branch: branch.flops))
    return total


# ---- kernels -------------------------------------------------------------------------------------------------------

_ESTIMATE = re.compile(r'cost_estimate"?[:=]\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')


class KernelCost(NamedTuple):
    flops: int = 0
    bytes: int = 0


def kernel_cost(instruction: Instruction) -> KernelCost:
    """What a Pallas kernel says that it costs (`pl.CostEstimate`); zeros if it says nothing, or is none."""
    found = _ESTIMATE.search(instruction.attributes) if instruction.opcode == "custom-call" else None
    return KernelCost(*map(int, found.groups())) if found else KernelCost()


# ---- FLOPs ---------------------------------------------------------------------------------------------------------


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """Two per multiplied pair of a `dot` or a `convolution`."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (computation.instructions[name].arrays[0].dims for name in instruction.operands[:2])
    result = instruction.arrays[0].dims
    if instruction.opcode == "dot":
        contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims"))
        return 2.0 * math.prod(result) * math.prod(left[int(dim)] for dim in contracted)
    return 2.0 * _convolved(instruction, left, right, result)


def _convolved(instruction: Instruction, left, right, result) -> int:
    """Multiplied pairs of a convolution; a TPU runs every matrix product as one, batches as dilated windows of which
    only the places inside of the image count."""
    labels = instruction.attribute("dim_labels")
    image, rest = labels.split("_")
    kernel, output = rest.split("->")
    total = result[output.index("b")] * result[output.index("f")] * right[kernel.index("i")]
    window = _window(instruction.attributes, sum(label.isdigit() for label in image))
    for dim, (size, stride, before, left_dilation, right_dilation) in enumerate(window):
        label = str(dim)
        length, places = left[image.index(label)], result[output.index(label)]
        at = np.arange(places)[:, None] * stride + np.arange(size) * right_dilation - before
        inside = (at >= 0) & (at <= (length - 1) * left_dilation) & (at % left_dilation == 0)
        total *= int(inside.sum())
    return total // int(instruction.attribute("batch_group_count") or 1)


def _window(attributes: str, dims: int) -> list[tuple[int, int, int, int, int]]:
    """(size, stride, padding before, image dilation, kernel dilation) of each spatial dimension."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    values = dict(item.split("=") for item in text[1].split()) if text else {}

    def each(name: str, default: str) -> list[str]:
        return values[name].split("x") if name in values else [default] * dims

    return [
        (int(size), int(stride), int(pad.split("_")[0]), int(left), int(right))
        for size, stride, pad, left, right in zip(
            each("size", "1"),
            each("stride", "1"),
            each("pad", "0_0"),
            each("lhs_dilate", "1"),
            each("rhs_dilate", "1"),
            strict=True,
        )
    ]


# ---- memory --------------------------------------------------------------------------------------------------------


def traffic(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Bytes that an instruction outside of fusions reads from and writes to main memory.

    What only a slice is read of, or only a slice is updated in place, counts as that slice.
    """
    opcode = instruction.opcode
    if moved := kernel_cost(instruction).bytes:
        return moved
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode == "fusion":
        return _fusion_traffic(program, computation, instruction)
    written = _main(instruction.arrays)
    if opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * written
    if opcode in UPDATES:
        return 2 * _main(computation.instructions[instruction.operands[UPDATES[opcode]]].arrays)
    read = sum(_main(computation.instructions[name].arrays) for name in instruction.operands)
    return read if opcode.endswith("-start") else read + written


def _fusion_traffic(program: Program, computation: Computation, fusion: Instruction) -> int:
    inner = program.computations[name_of(fusion.attribute("calls"))]
    carried_in, carried_out = _carried(inner, fusion)
    total = 0
    for number, name in enumerate(fusion.operands):
        outer = computation.instructions[name].arrays
        if number not in carried_in and _main(outer):
            total += _read(program, inner, inner.parameter(number))
    root = inner.instructions[inner.root]
    results = root.operands if root.opcode == "tuple" else (inner.root,)
    for number, (name, array) in enumerate(zip(results, fusion.arrays, strict=False)):
        if number in carried_out or array.on_chip:
            continue
        result = inner.source(name)
        part = result.operands[UPDATES[result.opcode]] if result.opcode in UPDATES else None
        total += array.bytes if part is None else total_bytes(inner.instructions[part].arrays)
    return total


def _carried(inner: Computation, fusion: Instruction) -> tuple[set[int], set[int]]:
    """Operands and results that only pass through a fusion which holds a piece of a collective."""
    if not any(kind_of(each) for each in inner.instructions.values()):
        return set(), set()
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{", fusion.attributes)
    return {int(operand) for _, operand in pairs}, {int(result or 0) for result, _ in pairs}


def _read(program: Program, inner: Computation, parameter: Instruction) -> int:
    """Bytes that a fusion reads of its parameter: all, or the slices that it takes, or none where it overwrites it."""
    names, total = {parameter.name}, 0
    for user in inner.instructions.values():
        for place, operand in enumerate(user.operands):
            if operand not in names:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += total_bytes(user.arrays)
            elif user.opcode == "fusion":
                nested = program.computations[name_of(user.attribute("calls"))]
                total += _read(program, nested, nested.parameter(place))
            elif user.opcode in ("copy", "bitcast") and user.name != inner.root:
                names.add(user.name)  # nothing is copied within a fusion: what is read is what is taken of the copy
            elif not (user.opcode in UPDATES and place == 0):
                return total_bytes(parameter.arrays)
    return min(total, total_bytes(parameter.arrays))


def _main(found: list[Array]) -> int:
    """Bytes of the arrays in main memory."""
    return sum(array.bytes for array in found if not array.on_chip)
