"""The text of a compiled program (HLO): its instructions, what they hold, and how often loops run.

Shapes are those of one device. `planning.cost` and `planning.collectives` measure what is parsed here.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}

# `f32[2,3]{1,0:T(8,128)S(1)}`: S(1) and above is memory on the chip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


class Array(NamedTuple):
    """One array of a shape; `on_chip`: it lives in fast memory, so that its use costs no traffic to the main one."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> int:
        bits = ITEM_BITS.get(self.dtype)
        if bits is None:
            digits = re.match(r"[a-z]+(\d+)", self.dtype)
            bits = int(digits[1]) if digits else 0  # a token holds nothing
        return math.prod(self.dims) * bits // 8


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape's text, a tuple's in order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, bool(re.search(r"S\([1-9]", layout))))
    return found


def total_bytes(found: list[Array]) -> int:
    return sum(array.bytes for array in found)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), attributes`.

    operands: names within the same computation; value: the number of a parameter, the text of a constant.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    value: str = ""

    @functools.cached_property
    def arrays(self) -> list[Array]:
        return arrays(self.shape)

    def attribute(self, name: str) -> str:
        """The word or the {...} that follows `name=`; "" where it does not occur."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    instructions: dict[str, Instruction]
    root: str

    def parameter(self, number: int) -> Instruction:
        found = (x for x in self.instructions.values() if x.opcode == "parameter" and x.value == str(number))
        return next(found)

    def source(self, name: str) -> Instruction:
        """Where a value comes from, past copies."""
        instruction = self.instructions[name]
        while instruction.opcode in ("copy", "bitcast", "convert") and instruction.operands[0] in self.instructions:
            instruction = self.instructions[instruction.operands[0]]
        return instruction


@dataclasses.dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """The computations of an HLO module's text, such as `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, name, lines = "", None, list[str]()
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if name is None:
            if header := _COMPUTATION.match(line):
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):  # which closes a kernel's metadata, over lines
            computations[name], name = _computation(lines), None
        else:
            lines.append(line)
    return Program({name: _unwrapped(each, computations) for name, each in computations.items()}, entry)


def _unwrapped(computation: Computation, computations: dict[str, Computation]) -> Computation:
    """With copies for the fusions that only copy: TPU7x's compiler changes layouts by such, inside of others too."""
    instructions = dict(computation.instructions)
    for name, fusion in instructions.items():
        if fusion.opcode != "fusion":
            continue
        inner = computations[name_of(fusion.attribute("calls"))]
        source = inner.source(inner.root)
        if source.opcode == "parameter":
            copied = fusion.operands[int(source.value)]
            instructions[name] = dataclasses.replace(fusion, opcode="copy", operands=(copied,))
    return dataclasses.replace(computation, instructions=instructions)


def _computation(lines: list[str]) -> Computation:
    instructions, root = {}, ""
    for line in lines:
        if found := _INSTRUCTION.match(line):
            instruction = _instruction(found[2], found[3])
            instructions[instruction.name] = instruction
            root = instruction.name if found[1] else root
    return Computation(instructions, root)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    inside, attributes = rest[:end], rest[end + 1 :]
    if opcode in ("parameter", "constant"):
        return Instruction(name, shape, opcode, (), attributes, inside)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, shape, opcode, operands, attributes)


def _closing(text: str) -> int:
    """Where the parenthesis that opens `text` is closed."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return at
    return len(text)


# ---- how often -----------------------------------------------------------------------------------------------------


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs its body; None if its data say so. Loops count up to a constant: JAX's by 1, XLA's own,
    such as products whose operands arrive in pieces, by more where they are unrolled."""
    known = re.search(r'known_trip_count"?[:=]\s*\{"n":"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[name_of(loop.attribute("condition"))]
    test = condition.instructions[condition.root]
    if test.opcode == "fusion":  # of the comparison alone: its parameters are the operands
        inner = program.computations[name_of(test.attribute("calls"))].instructions
        compared = next((each for each in inner.values() if each.opcode == "compare"), None)
        if compared is None or "direction=LT" not in compared.attributes or len(test.operands) != 2:
            return None
    elif test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = sorted((condition.source(name) for name in test.operands), key=lambda x: x.opcode == "constant")
    if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
        return None
    index = int(counter.attribute("index"))
    start, step = _start(computation, loop, index), _step(program.computations[name_of(loop.attribute("body"))], index)
    return max(0, math.ceil((int(limit.value) - start) / step))


def _start(computation: Computation, loop: Instruction, index: int) -> int:
    """The first value of a loop's counter: 0 unless the text says otherwise."""
    carried = computation.source(loop.operands[0])
    if carried.opcode == "tuple":
        first = computation.source(carried.operands[index])
        if first.opcode == "constant" and re.fullmatch(r"-?\d+", first.value):
            return int(first.value)
    return 0


def _step(body: Computation, index: int) -> int:
    """What a round adds to a loop's counter: 1 unless the text says otherwise."""
    root = body.instructions[body.root]
    added = body.source(root.operands[index]) if root.opcode == "tuple" else root
    if added.opcode == "add":
        for term in map(body.source, added.operands):
            if term.opcode == "constant" and re.fullmatch(r"[1-9]\d*", term.value):
                return int(term.value)
    return 1


def name_of(reference: str) -> str:
    """The computation that an attribute such as `calls=%name` means."""
    return reference.lstrip("%")


def called_by(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs: a loop's body, a conditional's branches, what is inside of a fusion.

    Not those that are applied to each element, such as a reduction's.
    """
    if instruction.opcode == "while":
        return [name_of(instruction.attribute("body"))]
    if instruction.opcode not in ("fusion", "call", "conditional", "async-start", "custom-call"):
        return []
    branches = re.findall(r"[\w.\-]+", instruction.attribute("branch_computations"))
    return _CALLED.findall(instruction.attributes) + branches
