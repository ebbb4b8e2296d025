"""What the vocabulary's kernels cost, as the cost model has it.

python benchmarks/kernels_vocab.py
"""

from cdlm_jax.chips import CHIPS, Chip
from cdlm_jax.kernels.vocab.cost import Cost, backward, forward, on_gpu

KIB, MIB = 2**10, 2**20
CORES_AND_VMEM = {
    "TPU v4": (2, 16 * MIB),
    "TPU v5e": (1, 128 * MIB),
    "TPU v5p": (2, 64 * MIB),
    "TPU v6e": (1, 128 * MIB),
    "TPU7x": (1, 64 * MIB),
}
GPUS = ("H100", "H200")
MODELS = {"Dream-7B": (3584, 152064), "LLaDA-8B": (4096, 126464)}
CASES = {
    "confidence, 32 rows": lambda *at: forward("confidence", 32, *at),
    "confidence, drawn, 32 rows": lambda *at: forward("confidence, drawn", 32, *at),
    "confidence, 1024 rows": lambda *at: forward("confidence", 1024, *at),
    "KL, 16384 rows": lambda *at: forward("KL", 16384, *at),
    "KL, d hidden": lambda *at: backward("KL", "hidden", 16384, *at),
    "KL, d head": lambda *at: backward("KL", "head", 16384, *at),
    "NLL, 16384 rows": lambda *at: forward("NLL", 16384, *at),
}


def main() -> None:
    print("bfloat16; bound is the roofline's, by HBM or by FLOPs")
    sizes = f"{'R x C':>10} {'VMEM MiB':>12} {'moved / least':>13} {'FLOPs/B':>7}"
    print(f"{'model':9} {'kernel':29} {'chip':7} {sizes}  bound")
    for model, sizes in MODELS.items():
        for name, case in CASES.items():
            for chip in CHIPS:
                if chip.name not in CORES_AND_VMEM:
                    continue
                cores, vmem = CORES_AND_VMEM[chip.name]
                found = case(*sizes, cores, vmem)
                show(model, name, chip, found, f"{found.vmem / MIB:.1f} of {vmem // MIB}")
        for n in (32, 1024):
            for op in ("confidence", "confidence, drawn"):
                for chip in CHIPS:
                    if chip.name in GPUS:
                        found = on_gpu(op, n, *sizes)
                        show(model, f"{op}, {n} rows", chip, found, f"{found.vmem / KIB:.0f} of 227 K")


def show(model: str, name: str, chip: Chip, found: Cost, used: str) -> None:
    tiles = f"{found.tiles.rows} x {found.tiles.columns}"
    limit = "FLOPs" if found.intensity > chip.ridge else "HBM"
    print(
        f"{model:9} {name:29} {chip.name:7} {tiles:>10} {used:>12} {found.ratio:13.3f} "
        f"{found.intensity:7.0f}  {1e3 * found.seconds(chip):.3g} ms, {limit}"
    )


if __name__ == "__main__":
    main()
