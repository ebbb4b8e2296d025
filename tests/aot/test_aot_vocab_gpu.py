"""The second gate of the vocabulary's GPU kernel: the compiler takes it for an H100 (tests/test_vocab_gpu.py is the
first). It needs JAX's CUDA plugin, not a GPU: pip install 'jax[cuda13]'."""

import jax
import jax.numpy as jnp
import pytest
from aot.chips import compiled, kernels, mesh

from cdlm_jax.config import InputError
from cdlm_jax.kernels.vocab import confidence, linear_nll
from cdlm_jax.mesh import sharding
from cdlm_jax.mesh.sharding import MeshConfig

Shape = jax.ShapeDtypeStruct
DREAM, LLADA = (3584, 152064), (4096, 126464)


def seen(hidden, head, implementation="gpu"):
    return confidence(hidden, head, forbidden=(7, 9), implementation=implementation)


def drawn(hidden, head):
    return confidence(hidden, head, forbidden=(7,), temperature=0.5, key=jax.random.key(0), implementation="gpu")


def arguments(n, d, vocab):
    return Shape((n, d), jnp.bfloat16), Shape((d, vocab), jnp.bfloat16)


CASES = {
    "Dream, a block": (seen, arguments(32, *DREAM)),
    "Dream, a block, drawn": (drawn, arguments(32, *DREAM)),
    "Dream, 32 blocks": (seen, arguments(1024, *DREAM)),
    "Dream, 32 blocks, drawn": (drawn, arguments(1024, *DREAM)),
    "LLaDA, a block": (seen, arguments(32, *LLADA)),
    "LLaDA, a block, drawn": (drawn, arguments(32, *LLADA)),
    "LLaDA, 32 blocks": (seen, arguments(1024, *LLADA)),
    "LLaDA, 32 blocks, drawn": (drawn, arguments(1024, *LLADA)),
    "odd sizes": (drawn, arguments(301, 192, 960)),
}
FAST = ("Dream, a block", "LLaDA, 32 blocks")


@pytest.mark.parametrize("case", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES])
def test_the_kernel_compiles(case):
    """As one kernel, with hardly any memory beside arguments and results."""
    function, shapes = CASES[case]
    with jax.set_mesh(mesh("h100")):
        program = compiled(function, *shapes)
    assert kernels(program.as_text()) == ["vocab_statistics"]
    n, vocab = shapes[0].shape[0], shapes[1].shape[1]
    assert program.memory_analysis().temp_size_in_bytes < max(n * vocab * 4 / 20, 4 * 2**20)


@pytest.mark.parametrize("board", ["a100", "b200"])
def test_other_boards_use_xla(board):
    shapes = arguments(32, 128, 1024)
    with jax.set_mesh(mesh(board)):
        with pytest.raises(InputError, match=r"needs Hopper's wgmma, which the NVIDIA \S+ has not; allowed: 'xla'"):
            jax.eval_shape(seen, *shapes)
        program = compiled(lambda *shapes: seen(*shapes, implementation=None), *shapes)
    assert not kernels(program.as_text())


def test_losses_use_xla():
    hidden, head = arguments(32, 128, 1024)
    with jax.set_mesh(mesh("h100")):
        program = compiled(linear_nll, hidden, head, Shape((32,), jnp.int32), Shape((32,), jnp.float32))
    assert not kernels(program.as_text())


@pytest.mark.slow
@pytest.mark.parametrize("config", [MeshConfig(fsdp=2, tensor=2), MeshConfig(fsdp=4)], ids=str)
def test_the_kernel_on_a_mesh(config):
    """By default, since the devices are H100s; no device ever holds a whole head: that would be an all-gather of it."""
    d, vocab = DREAM
    devices = mesh("h100", config)
    with jax.set_mesh(devices):

        def placed(shape, *axes):
            return Shape(shape, jnp.bfloat16, sharding=jax.NamedSharding(devices, sharding.spec(*axes)))

        program = compiled(
            lambda *shapes: seen(*shapes, implementation=None),
            placed((64, 32, d), "rows"),
            placed(DREAM, "embed", "vocab"),
        )
    text = program.as_text()
    assert "vocab_statistics" in kernels(text)
    assert f"bf16[{d},{vocab // config.tensor}]" not in text
