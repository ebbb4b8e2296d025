"""Autoregressive decoding of a causal model with a KV cache: the yardstick for speed at equal size."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError, is_count
from cdlm_jax.decoding.common import append_response, check_prompts, step_keys
from cdlm_jax.decoding.progress import DecodeResult, Progress, block_step, take_rows, until_done
from cdlm_jax.decoding.sampling import Sampling
from cdlm_jax.mesh.sharding import by_rows
from cdlm_jax.models.cache import KVCache
from cdlm_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """temperature 0 is greedy; top_p and top_k cut the distribution that tokens are drawn from."""

    gen_length: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self):
        if not is_count(self.gen_length):
            raise InputError(f"gen_length must be a positive integer, got {self.gen_length}")
        Sampling(self.temperature, self.top_p, self.top_k)


def generate(
    model: Transformer, prompts: jax.Array, prompt_lengths: jax.Array, config: Config, key: jax.Array | None = None
) -> DecodeResult:
    """Decode a batch: prompts [rows, P_max] int32 right-padded, prompt_lengths [rows] -> DecodeResult.

    The same contract as `cdlm.generate`, for a causal model (`mask_token_id` None). A row ends with its first EOS;
    `forwards` are its tokens, EOS included.
    """
    if not model.config.causal:
        raise InputError(f"autoregressive decoding needs a causal model (qwen2, llama), got {model.config.family}")
    check_prompts(model.config, prompts, prompt_lengths, config.gen_length, config.temperature, key)
    return _generate(model, prompts, prompt_lengths, key, config)


@partial(jax.jit, static_argnames="config")
def _generate(model, prompts, prompt_lengths, key, config: Config) -> DecodeResult:
    prompts, prompt_lengths = by_rows((prompts, prompt_lengths))
    rows, prompt_size = prompts.shape
    eos = model.config.eos_token_id
    cache = KVCache.create(model.config, rows, prompt_size + config.gen_length, model.embed[...].dtype)
    causal = jnp.broadcast_to(jnp.arange(1, prompt_size + 1), prompts.shape)
    with jax.named_scope("prefill"):
        _, cache = model.extend(prompts, cache, start=jnp.zeros_like(prompt_lengths), visible_end=causal)

    def forward(progress, cache):
        """The token before the next one; at first that is the prompt's last, which is simply run once more."""
        last = prompt_lengths + progress.block - 1
        token = take_rows(append_response(prompts, prompt_lengths, progress.response), last, 1)
        return model.extend(token, cache, start=last, visible_end=last[:, None] + 1)

    def decide(progress, hidden):
        keys = step_keys(key, progress) if config.temperature > 0 else None
        token = Sampling(config.temperature, config.top_p, config.top_k)(model, hidden, keys).token
        return token, progress.masked(1)

    # A token is a block of one: it is final at once, and the row ends with the block that is EOS.
    step = partial(block_step, forward=forward, decide=decide, size=1, stop_token_id=eos)
    progress, _ = until_done(step, (Progress.start(rows, config.gen_length, eos), cache))
    return progress.result(eos)
