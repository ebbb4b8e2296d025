"""The exchanges of a compiled program: what a collective makes a device send, and among which devices."""

import math
import re

import numpy as np

from cdlm_jax.planning.hlo import Computation, Instruction, total_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

Groups = tuple[tuple[int, ...], ...]


def kind_of(instruction: Instruction) -> str | None:
    """The kind of a collective, None for anything else. Of an asynchronous pair the first counts."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def replica_groups(instruction: Instruction) -> Groups:
    """The groups of partitions among which a collective exchanges, from any of the three ways that they are written."""
    text = instruction.attributes
    if instruction.opcode.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
        return tuple(sorted(_integers(pair) for pair in re.findall(r"\{([\d,]+)", pairs[1]))) if pairs else ()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        return _mesh_groups(*found.groups())
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims = _integers(found[1]), _integers(found[2])
        devices = np.arange(math.prod(dims)).reshape(dims)
        devices = devices.transpose(_integers(found[3])) if found[3] else devices
        return tuple(map(tuple, devices.reshape(shape).tolist()))
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        return tuple(_integers(group) for group in re.findall(r"\{([\d,]+)\}", found[1]))
    return ()


def _mesh_groups(axes: str, used: str) -> Groups:
    """`mesh['a'=2,'b'=4] {'b'}`: the groups along the named axes."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    names = re.findall(r"'([^']+)'", used)
    devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    kept = [axis for axis, name in enumerate(sizes) if name not in names]
    order = kept + [list(sizes).index(name) for name in names]
    group = math.prod(sizes[name] for name in names)
    return tuple(map(tuple, devices.transpose(order).reshape(-1, group).tolist()))


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def bytes_sent(computation: Computation, instruction: Instruction, kind: str, groups: Groups) -> float:
    """Bytes that a device sends in a ring of n: of an array of `size` bytes, its share n - 1 times, and so on."""
    n = len(groups[0]) if groups else 1
    operands = sum(total_bytes(computation.instructions[name].arrays) for name in instruction.operands)
    share = (n - 1) / n if n else 0.0
    match kind:
        case "all-gather":
            return operands * (n - 1)
        case "all-reduce":
            return 2 * operands * share
        case "reduce-scatter" | "all-to-all":
            return operands * share
    return float(operands)
