"""The benchmark of all kernels: on a chip measured, elsewhere what the cost model and the compilers say.

    python benchmarks/kernels.py                  on a TPU or GPU: values, then times; else the compile-time report
    python benchmarks/kernels.py --tune           there: also search tiles, and write the best into tuning.json
    python benchmarks/kernels.py --profile=DIR    also one call of each kernel as an XProf trace, by name
    python benchmarks/kernels.py --chips=v5e,v6e  compile for these only

Values are checked first, against plain JAX, and those of searched tiles before they are written. A time is of the
device alone: many calls chained inside one program, less what the same loop takes without them. Block attention is
compared with XLA and, where they take such a call, JAX's paged, ragged paged and splash attention (on a GPU cuDNN),
the vocabulary with the plain XLA path and with all logits in memory. (Writing into the cache is not timed: chained, it
would copy the cache that a decoder updates in place.)

A kernel of another kind of device: its platform in `KERNELS` of block_attention_cases.py and vocab_cases.py (what it is
compared with is in `LIBRARIES`), a machine in `MACHINES` here.
"""

import argparse
import re
from pathlib import Path

import block_attention_cases
import jax
import vocab_cases
from cases import Case, check, seconds, tune

from cdlm_jax.config import InputError
from cdlm_jax.mesh import chips, sharding
from cdlm_jax.mesh.sharding import MeshConfig
from cdlm_jax.planning import topology

MODULES = (block_attention_cases, vocab_cases)
MACHINES = {
    "tpu": {name: f"{name}:{shape}" for name, shape in topology.SMALLEST.items()},
    "gpu": {"h100": "h100:1"},
}
GPUS = ("H100", "H200")  # of `chips.CHIPS`, those with a kernel
MIB = 2**20


def cases(platform: str) -> list[Case]:
    return [case for module in MODULES for case in module.cases(platform)]


def table(head: list[str], lines: list[list[str]]) -> str:
    """Columns as wide as they have to be, those of numbers to the right."""
    columns = list(zip(head, *lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    aligned = [str.rjust if column[1][:1].isdecimal() else str.ljust for column in columns]

    def joined(cells):
        padded = (align(cell, width) for align, cell, width in zip(aligned, cells, widths, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join(map(joined, [head, *lines]))


# ---- no chip -------------------------------------------------------------------------------------------------------


def cost_models() -> None:
    tpus = [chip for chip in chips.CHIPS if chip.torus]
    gpus = [chip for chip in chips.CHIPS if chip.name in GPUS]
    for module in MODULES:
        for kind in (tpus, gpus):
            print(f"\n{table(*module.cost_model(kind))}")


def compile_all(names: list[str]) -> None:
    """Each kernel for one device of each machine: what its program takes."""
    for platform, machines in MACHINES.items():
        for name in names or machines:
            if name in machines:
                compile_for(platform, machines[name])


def compile_for(platform: str, machine: str) -> None:
    try:
        found = topology.load(machine)
    except InputError as error:
        print(f"\nnot compiled for {machine}: {error}")
        return
    print(f"\nCompiled for {found.chip.name}")
    calls = [(case.name, case.call, jax.eval_shape(case.make)) for case in cases(platform)]
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=1), found.devices[:1])):
        lines = [[name, *compiled(call, shapes)] for name, call, shapes in calls]
    print(table(["call", "on-chip MiB", "temporaries MiB", "kernels"], lines))


def compiled(call, shapes) -> list[str]:
    """Memory of the compiled program: on the chip by its kernels, the most of any, and beside arguments and results."""
    everywhere = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in shapes]
    try:
        program = jax.jit(call).lower(*shapes).compile()
    except (InputError, jax.errors.JaxRuntimeError) as error:
        return ["", "", str(error).splitlines()[0][:60]]
    text = program.as_text() or ""
    sizes = on_chip(text)
    used = f"{max(sizes) / MIB:.1f}" if sizes else ""
    memory = program.memory_analysis()
    temporaries = f"{memory.temp_size_in_bytes / MIB:.0f}" if memory else ""
    kernels = re.findall(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu)', text)
    return [used, temporaries, str(len(kernels))]


def on_chip(text: str) -> list[int]:
    """Bytes of VMEM that the kernels of a compiled program use, as the TPU's compiler notes beside each."""
    calls = re.split(r'custom_call_target="tpu_custom_call"', text)[1:]
    used = r'"used_scoped_memory_configs":\[(?:\{"memory_space":"1","offset":"\d+","size":"(\d+)"\})?'
    found = (re.search(used, call) for call in calls)
    return [int(each[1] or 0) if each else 0 for each in found]


# ---- a chip --------------------------------------------------------------------------------------------------------


def measure(platform: str, search: bool) -> None:
    kind = jax.devices()[0].device_kind
    print(f"\nMeasured on one {kind}, us a call")
    for case in cases(platform):
        arguments = case.make()
        check(case, arguments)
        call = case.call
        if search and case.tuning:
            call = tune(case, arguments, kind)
        ours = seconds(call, arguments)
        others = {name: seconds(other.call, other.prepare(*arguments)) for name, other in case.others.items()}
        compared = ", ".join(f"{name} {1e6 * taken:.1f}" for name, taken in others.items())
        print(f"{case.name}: {1e6 * ours:.1f} ({case.least / ours / 1e9:.0f} GB/s of what has to move); {compared}")


def profile(platform: str, folder: Path) -> None:
    """One call of each kernel, after one that compiles it."""
    for case in cases(platform):
        arguments, call = case.make(), jax.jit(case.call)
        jax.block_until_ready(call(*arguments))
        with jax.profiler.trace(folder / re.sub(r"\W+", "_", case.name)), jax.profiler.TraceAnnotation(case.name):
            jax.block_until_ready(call(*arguments))
    print(f"traces in {folder}: xprof --logdir={folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="search tiles and write the best into tuning.json")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write an XProf trace of each kernel")
    parser.add_argument("--chips", default="", metavar="NAMES", help="compile for these (v5e,v6e), not for all")
    options = parser.parse_args()
    names = [name for name in options.chips.split(",") if name]
    known = [name for machines in MACHINES.values() for name in machines]
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"unknown chip {unknown[0]}, known: {', '.join(known)}")
    platform = jax.default_backend()
    if cases(platform):
        measure(platform, options.tune)
        if options.profile:
            profile(platform, options.profile)
        return
    if options.tune or options.profile:
        parser.error(f"there is no kernel for {platform}, nothing to tune or to profile")
    print(f"No chip with a kernel here, only {platform}: nothing is measured. What the cost model and compilers say:")
    cost_models()
    compile_all(names)


if __name__ == "__main__":
    main()
