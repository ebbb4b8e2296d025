"""The second gate of the vocabulary's TPU kernels: the chips' own compiler takes them (tests/test_vocab_tpu.py is the
first), and the memory of a program."""

import jax
import jax.numpy as jnp
import pytest
from aot.chips import SLICES, compiled, mesh

from cdlm_jax.kernels.vocab import confidence, linear_kl, linear_nll
from cdlm_jax.mesh import sharding
from cdlm_jax.mesh.sharding import MeshConfig

Shape = jax.ShapeDtypeStruct
DREAM, LLADA = (3584, 152064), (4096, 126464)


def seen(hidden, head):
    return confidence(hidden, head, forbidden=(7, 9), implementation="tpu")


def drawn(hidden, head):
    return confidence(hidden, head, forbidden=(7,), temperature=0.5, key=jax.random.key(0), implementation="tpu")


def kl(student, head, teacher, weights, implementation="tpu"):
    return linear_kl(teacher, student, head, weights, implementation=implementation)


def nll(hidden, head, targets, weights):
    return linear_nll(hidden, head, targets, weights, implementation="tpu")


def arguments(function, n, d, vocab, dtype="bfloat16"):
    hidden, head, weights = Shape((n, d), dtype), Shape((d, vocab), dtype), Shape((n,), jnp.float32)
    if function in (seen, drawn):
        return hidden, head
    return (hidden, head, hidden, weights) if function is kl else (hidden, head, Shape((n,), jnp.int32), weights)


CASES = {
    "Dream, a block": (seen, arguments(seen, 32, *DREAM), 1),
    "Dream, a block, drawn": (drawn, arguments(drawn, 32, *DREAM), 1),
    "LLaDA, 32 blocks": (seen, arguments(seen, 1024, *LLADA), 1),
    "LLaDA, 32 blocks, drawn": (drawn, arguments(drawn, 1024, *LLADA), 1),
    "Dream, KL": (kl, arguments(kl, 16384, *DREAM), 1),
    "Dream, gradient of KL, head frozen": (jax.grad(kl), arguments(kl, 16384, *DREAM), 2),
    "LLaDA, gradients of KL": (jax.grad(kl, (0, 1)), arguments(kl, 2000, *LLADA), 3),
    "Dream, gradients of NLL": (jax.grad(nll, (0, 1)), arguments(nll, 16384, *DREAM), 3),
    "float32, odd sizes": (drawn, arguments(drawn, 300, 60, 1001, "float32"), 1),
    "float32, odd sizes, gradients": (jax.grad(kl, (0, 1)), arguments(kl, 300, 60, 1001, "float32"), 3),
}
FAST = ("Dream, a block, drawn",)
EVERYWHERE = ("Dream, a block", "LLaDA, 32 blocks, drawn", "LLaDA, gradients of KL")  # beside v4, of the smallest VMEM


@pytest.mark.parametrize(
    ("chip", "case"),
    [
        pytest.param(chip, case, marks=() if chip == "v5e" and case in FAST else pytest.mark.slow)
        for chip in SLICES
        for case in (CASES if chip in ("v4", "v5e") else EVERYWHERE)
    ],
)
def test_the_kernels_compile(chip, case):
    """With as many kernels as walks over the vocabulary, and hardly any memory beside arguments and results."""
    function, shapes, kernels = CASES[case]
    with jax.set_mesh(mesh(chip)):
        program = compiled(function, *shapes)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == kernels
    n, vocab = shapes[0].shape[0], shapes[1].shape[1]
    assert program.memory_analysis().temp_size_in_bytes < max(n * vocab * 4 / 20, 4 * 2**20)


@pytest.mark.slow
def test_by_default_a_v4_gets_the_kernels_that_fit_it():
    """Rows of 8192 do, but not the gradient of their head."""
    hidden, head, targets, weights = arguments(nll, 32, 8192, 1024)
    with jax.set_mesh(mesh("v4")):
        assert "tpu_custom_call" in compiled(confidence, hidden, head).as_text()
        assert "tpu_custom_call" not in compiled(jax.grad(linear_nll, (0, 1)), hidden, head, targets, weights).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [(), (0,), (0, 1)])
def test_memory_without_the_kernels(gradients):
    """XLA's temporaries stay below 1/20 of one float32 [n, V], too."""

    def plain(*given):
        return kl(*given, implementation="xla")

    shapes = arguments(kl, 16384, *DREAM)
    with jax.set_mesh(mesh("v5e")):
        program = compiled(jax.value_and_grad(plain, gradients) if gradients else plain, *shapes)
    assert "tpu_custom_call" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 16384 * DREAM[1] * 4 / 20


@pytest.mark.slow
@pytest.mark.parametrize("config", [MeshConfig(fsdp=2, tensor=2), MeshConfig(fsdp=4)], ids=str)
def test_kernels_on_a_mesh(config):
    """By default, since the devices are TPUs; no device ever holds a whole head, which would be an all-gather of it."""
    d, vocab = DREAM
    devices = mesh("v5e", config)
    with jax.set_mesh(devices):

        def placed(shape, dtype, *axes):
            return Shape(shape, dtype, sharding=jax.NamedSharding(devices, sharding.spec(*axes)))

        hidden = placed((64, 256, d), "bfloat16", "rows")
        head = placed(DREAM, "bfloat16", "embed", "vocab")
        weights = placed((64, 256), "float32", "rows")

        def loss(student, head, teacher, weights):
            return linear_kl(teacher, student, head, weights)

        program = compiled(jax.value_and_grad(loss, (0, 1)), hidden, head, hidden, weights)
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 3
    assert f"bf16[{d},{vocab // config.tensor}]" not in text
