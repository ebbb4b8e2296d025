"""The second gate of the GPU kernels: the compiler takes them for the board, and the decoders with them inside.

It needs JAX's CUDA plugin, not a GPU: pip install 'jax[cuda13]'.
"""

import dataclasses
import re

import jax
import pytest
from aot.chips import compiled, kernels, mesh
from aot.test_aot_block_attention_tpu import CASES as ON_TPU
from aot.test_aot_block_attention_tpu import DREAM, LLADA, arguments
from aot.test_aot_decode_tpu import LENGTH, PROMPT, ROWS, decoder
from published import DREAM as DREAM_7B
from published import LLADA as LLADA_8B

from cdlm_jax.config import InputError
from cdlm_jax.kernels.block_attention import block_attention
from cdlm_jax.mesh.sharding import MeshConfig

BOTH = [f"{model}, {forward}" for forward in ("block", "commit and refine", "prefill") for model in ("Dream", "LLaDA")]
CASES = {name: ON_TPU[name] for name in (*BOTH, "three key heads of 64")} | {
    "Dream, one row": (arguments(1, 32, *DREAM, 32768), {"return_lse": True}),
    "LLaDA, one row": (arguments(1, 32, *LLADA, 32768), {}),
    "small pages": (arguments(8, 32, *DREAM, 1024, paged=True), {"return_lse": True}),
    "one key head, odd slots": (arguments(3, 12, 7, 1, 128, 1001), {"return_lse": True}),
}
IDS = ["Dream", "Dream, tensor 4", "LLaDA, tensor 2"]
FAST = ("Dream, block", "LLaDA, prefill", "Dream, one row", "small pages")


@pytest.mark.parametrize("case", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES])
def test_block_attention_compiles(case):
    shapes, options = CASES[case]
    with jax.set_mesh(mesh("h100")):
        program = compiled(lambda shapes: block_attention(**shapes, **options), shapes)
    assert kernels(program.as_text()) == ["block_attention"]


@pytest.mark.parametrize("board", ["a100", "b200"])
def test_other_boards_use_xla(board):
    shapes, _ = CASES["Dream, block"]
    with jax.set_mesh(mesh(board)):
        with pytest.raises(InputError, match=r"needs Hopper's wgmma, which the NVIDIA \S+ has not; allowed: 'xla'"):
            jax.eval_shape(lambda shapes: block_attention(**shapes, implementation="gpu"), shapes)
        program = compiled(lambda shapes: block_attention(**shapes), shapes)
    assert not kernels(program.as_text())


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tensor", "walks"), [(DREAM_7B, 1, 1), (DREAM_7B, 4, 1), (LLADA_8B, 2, 2)], ids=IDS)
def test_the_decoder_compiles_with_the_kernels_inside(model, tensor, walks):
    """walks: of the vocabulary's kernel; two where a device's columns are no multiple of those gathered at a time."""
    with jax.set_mesh(mesh("h100", MeshConfig(fsdp=4 // tensor, tensor=tensor))):
        text = decoder(model).as_text()
    assert kernels(text) == ["block_attention"] * 3 + ["vocab_statistics"] * walks  # prefill, refine, commit and refine


@pytest.mark.slow
@pytest.mark.parametrize("merge_commit", [True, False])
def test_the_cache_stays_where_it_is(merge_commit):
    """Neither is a layer cut out of the cache, nor the whole of it copied, but for its zeros at the start."""
    sizes = {"hidden_size": 512, "num_layers": 6, "num_heads": 4, "num_kv_heads": 4, "mlp_size": 512}
    ids = {"vocab_size": 1024, "mask_token_id": 5, "eos_token_id": 6, "pad_token_id": 6}
    with jax.set_mesh(mesh("h100")):
        text = decoder(dataclasses.replace(LLADA_8B, **sizes, **ids), merge_commit=merge_commit).as_text()
    assert kernels(text) == ["block_attention"] * (3 if merge_commit else 2) + ["vocab_statistics"]
    cache = rf"= bf16\[(?:6,{ROWS}|1,{ROWS}|{6 * ROWS}|{ROWS}),{PROMPT + LENGTH},4,128\]\S* "
    assert re.search(cache + r"bitcast\(", text)
    assert not re.findall(cache + r"(?:copy|dynamic-slice)\((?!%broadcast)", text)
