"""Model FLOPs, counted by hand: what the method needs, however a program comes to it.

A multiply-add is two FLOPs. Only matrix products count, as usual for model FLOPs utilization (PaLM, 2204.02311,
appendix B), and of attention only the pairs that the visibility rule lets see each other. Prompts count at full length.
"""

import dataclasses

from cdlm_jax.config import ModelConfig
from cdlm_jax.training.distill import DistillConfig
from cdlm_jax.training.pretrain import PretrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShape:
    """Slots of one row, and the (query, key) pairs that it has under each kind of attention."""

    prompt_length: int
    gen_length: int
    block_size: int

    @property
    def length(self) -> int:
        return self.prompt_length + self.gen_length

    @property
    def block_causal_pairs(self) -> int:
        """The sum of `visible_end` over the row."""
        blocks = self.gen_length // self.block_size
        return self.prompt_length * self.length + self.block_size**2 * blocks * (blocks + 1) // 2

    @property
    def packed_pairs(self) -> int:
        """Those of the clean row, and those of its noisy blocks (`visibility.packed`)."""
        blocks = self.gen_length // self.block_size
        noisy = self.prompt_length * self.gen_length + self.block_size**2 * blocks * (blocks + 1) // 2
        return self.block_causal_pairs + noisy

    @property
    def causal_pairs(self) -> int:
        return self.length * (self.length + 1) // 2

    @property
    def bidirectional_pairs(self) -> int:
        return self.length**2


def distill_flops(model: ModelConfig, config: DistillConfig, row: RowShape, *, rematerialized: bool = False) -> float:
    """Of one update on `config.batch_size` rows: three student forwards, two of them with a backward pass.

    An online teacher adds its forward. `rematerialized` adds what is computed again in the backward pass: the layers
    with `config.remat`, and the logits, which the losses do not keep.
    """

    def layers(length: int, pairs: int) -> tuple[int, int]:
        """(forward, backward) of all layers."""
        kernels = _kernels(model, length)
        adapters = 2 * length * model.num_layers * _adapter_size(model, config.lora_rank)
        forward = kernels + adapters + _attention(model, pairs)
        # The gradients of a product are two more of its size, of a frozen kernel's just one.
        again = forward if rematerialized and config.remat else 0
        return forward, 2 * forward - (kernels if config.lora_rank else 0) + again

    plain = layers(row.length, row.block_causal_pairs)
    states = layers(row.length + row.gen_length, row.packed_pairs) if config.mode == "packed" else plain
    total = 2 * states[0] + states[1] + sum(plain)  # y, y* without a backward pass, and the noised answer
    # Logits of the teacher and the student at y, of the student at y* and at the noised answer; two have gradients.
    looks = 4 + 2 * (1 if config.lora_rank else 2) + (4 if rematerialized else 0)
    total += looks * _vocabulary(model, row.gen_length)
    if config.teacher == "online":
        total += _kernels(model, row.length) + _attention(model, row.bidirectional_pairs)
    return float(config.batch_size * total)


def decode_flops(model: ModelConfig, *, queries: int, keys: int, predicted: int) -> float:
    """Of one forward of one row without gradient: `queries` positions that see `keys` each, logits of `predicted`."""
    return float(_kernels(model, queries) + _attention(model, queries * keys) + _vocabulary(model, predicted))


def pretrain_flops(model: ModelConfig, config: PretrainConfig, row: RowShape) -> float:
    """Of one update on `config.batch_size` rows: a forward and a backward pass of all parameters."""
    attention = _attention(model, row.causal_pairs if model.causal else row.bidirectional_pairs)
    forward = _kernels(model, row.length) + attention + _vocabulary(model, row.gen_length)
    return float(config.batch_size * 3 * forward)


def _kernels(model: ModelConfig, tokens: int) -> int:
    """The linear layers' products with their kernels."""
    return 2 * tokens * model.num_layers * sum(size_in * size_out for size_in, size_out in _linears(model))


def _attention(model: ModelConfig, pairs: int) -> int:
    """Scores and weighted sums."""
    return 4 * model.num_layers * model.hidden_size * pairs


def _vocabulary(model: ModelConfig, rows: int) -> int:
    """One product of hidden rows with the lm_head."""
    return 2 * rows * model.hidden_size * model.vocab_size


def _adapter_size(model: ModelConfig, rank: int) -> int:
    """Parameters of one layer's adapters."""
    return sum(rank * (size_in + size_out) for size_in, size_out in _linears(model))


def _linears(model: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of one layer's q, k, v, out, gate, up, down: all of them have adapters."""
    d, keys, mlp = model.hidden_size, model.num_kv_heads * model.head_dim, model.mlp_size
    return [(d, d), (d, keys), (d, keys), (d, d), (d, mlp), (d, mlp), (mlp, d)]
