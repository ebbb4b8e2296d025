"""dLLM-Cache (arXiv 2506.06295): LLaDA's decoding with features of every layer kept from one forward to the next.

Kept per layer and position: key, value, what the attention added to the stream, and what the feed-forward added.
The prompt's are computed anew every `prompt_interval` forwards, the response's every `response_interval`; in between
only of the response positions whose values changed most. The first layer is always computed (upstream
`cache_hook_feature`, of which this is the block-wise decoder; Dream is decoded by the same rule).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError, is_count
from cdlm_jax.decoding.common import (
    append_response,
    check_blocks,
    check_request,
    check_steps,
    decide,
    predicting_rows,
    steps_per_block,
)
from cdlm_jax.decoding.progress import DecodeResult, Progress, block_step, take_at, until_done
from cdlm_jax.decoding.unmask import Quota
from cdlm_jax.kernels.block_attention import block_attention
from cdlm_jax.mesh import sharding
from cdlm_jax.mesh.sharding import by_rows
from cdlm_jax.models.transformer import Layer, Transformer, rotary
from cdlm_jax.visibility import row_end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """steps: forwards in all, spread evenly over the blocks; None is one token per forward.

    prompt_interval, response_interval: K_p and K_r, forwards between two refreshes.
    update_ratio: the share of response positions computed in between (rounded down); 0 computes nothing.
    """

    gen_length: int
    block_size: int
    steps: int | None = None
    prompt_interval: int
    response_interval: int
    update_ratio: float = 0.25

    def __post_init__(self):
        check_blocks(self.gen_length, self.block_size)
        check_steps(self.steps, self.gen_length, self.block_size)
        for name in ("prompt_interval", "response_interval"):
            if not is_count(getattr(self, name)):
                raise InputError(f"{name} must be a positive integer, got {getattr(self, name)}")
        if not 0 <= self.update_ratio <= 1:
            raise InputError(f"update_ratio must be in [0, 1], got {self.update_ratio}")

    @property
    def policy(self) -> Quota:
        return Quota(steps_per_block(self.steps, self.gen_length, self.block_size))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """Of all layers (a leading axis), or of one. k (rotated), v: [rows, S, K, D]; attention, mlp: [rows, S, d]."""

    k: jax.Array
    v: jax.Array
    attention: jax.Array
    mlp: jax.Array

    def put(self, at: jax.Array, **features: jax.Array) -> "Features":
        """New features of one layer at positions at [rows, Q]; those past the end are dropped."""
        put = jax.vmap(lambda old, at, new: old.at[at].set(new, mode="drop"))
        return dataclasses.replace(self, **{name: put(getattr(self, name), at, new) for name, new in features.items()})


def generate(
    model: Transformer, prompts: jax.Array, prompt_lengths: jax.Array, config: Config, key: jax.Array | None = None
) -> DecodeResult:
    """Decode a batch: prompts [rows, P_max] int32 right-padded, prompt_lengths [rows] -> DecodeResult.

    The same contract as `cdlm.generate`. `forwards` counts every forward as one, however little of it is computed.
    """
    check_request(model.config, prompts, prompt_lengths, config.gen_length, 0.0, key)
    return _generate(model, prompts, prompt_lengths, config)


@partial(jax.jit, static_argnames="config")
def _generate(model, prompts, prompt_lengths, config: Config) -> DecodeResult:
    prompts, prompt_lengths = by_rows((prompts, prompt_lengths))
    rows, width = prompts.shape[0], prompts.shape[1] + config.gen_length
    shape, dtype = (model.config.num_layers, rows, width), model.embed[...].dtype
    axes, kv_heads = ("layers", "rows", "length", "kv_heads"), model.config.num_kv_heads
    heads = sharding.put(jnp.zeros((*shape, kv_heads, model.config.head_dim), dtype), *axes, kv_heads=kv_heads)
    stream = sharding.put(jnp.zeros((*shape, model.config.hidden_size), dtype), *axes[:3])
    progress = Progress.start(rows, config.gen_length, model.config.mask_id)
    step = partial(
        block_step,
        forward=partial(cached_forward, model, prompts, prompt_lengths, config),
        decide=partial(decide, model, None, config.policy, 0.0),
        size=config.block_size,
    )
    progress, _ = until_done(step, (progress, Features(heads, heads, stream, stream)))
    return progress.result(model.config.eos_token_id)


def cached_forward(model, prompts, prompt_lengths, config: Config, progress: Progress, features: Features):
    """(hidden rows that predict the current block [rows, B, d], features of all layers)."""
    number = progress.forwards.max()  # all rows take their steps together: the schedule is the same for each
    refresh_prompt = number % config.prompt_interval == 0
    refresh_response = number % config.response_interval == 0
    tokens = append_response(prompts, prompt_lengths, progress.response)
    branches = [
        partial(_forward, model, prompt_lengths, prompts.shape[1], config, bool(kind & 1), bool(kind & 2))
        for kind in range(4)
    ]
    hidden, features = jax.lax.switch(refresh_prompt + 2 * refresh_response, branches, tokens, features)
    start = prompt_lengths + progress.block * config.block_size
    return predicting_rows(hidden, start, config.block_size, model.config.logit_alignment), features


def _forward(model, prompt_lengths, prompt_size: int, config: Config, prompt: bool, response: bool, tokens, features):
    """A forward that computes the prompt and the response anew, or not: hidden [rows, S, d], features."""
    run = partial(_layer, model, prompt_lengths, prompt_size, config)
    first, rest = (jax.tree.map(lambda x, part=part: x[part], (model.layers, features)) for part in (0, slice(1, None)))
    x, kept_first = run(True, True, model.embed_tokens(tokens), first)
    x, kept_rest = jax.lax.scan(partial(run, prompt, response), x, rest)
    kept = jax.tree.map(lambda one, others: jnp.concatenate([one[None], others]), kept_first, kept_rest)
    return model.final_norm(x), kept


def _layer(model, prompt_lengths, prompt_size: int, config: Config, prompt: bool, response: bool, x, layer_and_kept):
    """One layer: x [rows, S, d] -> (x, its features), computing only the positions due."""
    layer, kept = layer_and_kept
    size = x.shape[1]
    in_response = prompt_lengths[:, None] + jnp.arange(config.gen_length)  # [rows, L]
    due = []  # [rows, Q] positions each; out of range where a row has fewer
    if prompt:
        in_prompt = jnp.arange(prompt_size)
        due.append(jnp.where(in_prompt < prompt_lengths[:, None], in_prompt, size))
    if response:
        due.append(in_response)
    elif config.update_ratio > 0:
        count = int(config.gen_length * config.update_ratio)
        kept, changed = _most_changed(layer, take_at(x, in_response), kept, in_response, count)
        if count:
            due.append(changed)
    if due:
        at = jnp.concatenate(due, axis=1)
        angles = rotary(at, model.config.head_dim, model.config.rope_theta)
        q, k, v = layer.project(take_at(x, at), angles)
        kept = kept.put(at, k=k, v=v)
        end = row_end(prompt_lengths, config.gen_length, at.shape[1])
        attended = block_attention(q, kept.k, kept.v, visible_end=end)
        kept = kept.put(at, attention=layer.attention_out(attended))
        kept = kept.put(at, mlp=layer.mlp(take_at(x + kept.attention, at)))
    return x + kept.attention + kept.mlp, kept


def _most_changed(layer: Layer, x: jax.Array, kept: Features, at: jax.Array, count: int) -> tuple[Features, jax.Array]:
    """The `count` response positions whose value vectors are least like the kept ones, [rows, count].

    x [rows, L, d] at positions at [rows, L]. All new values are kept, also those of the positions left alone.
    """
    heads = kept.v.shape[-2:]
    v = layer.v(layer.attention_norm(x))  # [rows, L, K * D]
    # In float32: likenesses close to 1 are told apart in no other way.
    new, old = (y.astype(jnp.float32) for y in (v, take_at(kept.v, at).reshape(v.shape)))
    norms = jnp.linalg.norm(new, axis=-1) * jnp.linalg.norm(old, axis=-1)
    likeness = jnp.sum(new * old, axis=-1) / jnp.maximum(norms, 1e-8)
    _, places = jax.lax.top_k(-likeness, count)
    return kept.put(at, v=v.reshape(*v.shape[:-1], *heads)), jnp.take_along_axis(at, places, axis=1)
