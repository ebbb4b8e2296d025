"""The packed form of distillation: every block of a trajectory at a state of its own, in one forward.

A row is [prompt | clean response | noisy response] (`visibility.packed`). Each block of the noisy response is at one of
its own states and sees the final tokens of the blocks before it: all that a state of the trajectory shows it under the
block-causal rule, to which later blocks are invisible. So a block alone is a trajectory of L = block_size, and blocks
stand where the plain form has rows: arrays are [rows * blocks, B] in place of [rows, L].
"""

import jax
import jax.numpy as jnp

from cdlm_jax.decoding.common import append_response, predicting_rows
from cdlm_jax.mesh.sharding import by_rows
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.trajectories.states import State, sample_states
from cdlm_jax.visibility import packed


def split(x: jax.Array, block_size: int) -> jax.Array:
    """[rows, L, ...] -> [rows * blocks, B, ...]: the blocks of a response become rows."""
    rows = x.shape[0]
    return x.reshape(rows, -1, block_size, *x.shape[2:]).reshape(-1, block_size, *x.shape[2:])


def joined(x: jax.Array, rows: int) -> jax.Array:
    """[rows * blocks, B] -> [rows, L]: `split` in reverse."""
    return by_rows(x.reshape(rows, -1, x.shape[1])).reshape(rows, -1)


def block_states(tokens: jax.Array, order: jax.Array, keys: jax.Array, *, block_size: int, mask_token_id: int) -> State:
    """A pair of states (y, y*) of every block, by the scope `same_block`: tokens, order [rows, L], keys [rows] ->
    [rows * blocks, B]."""
    blocks = order.shape[1] // block_size
    keys = jax.vmap(lambda key: jax.random.split(key, blocks))(keys).reshape(-1)
    return sample_states(
        split(tokens, block_size),
        split(order % block_size, block_size),
        keys,
        block_size=block_size,
        mask_token_id=mask_token_id,
        scope="same_block",
    )


def block_hidden(
    model: Transformer,
    prompt: jax.Array,
    prompt_length: jax.Array,
    clean: jax.Array,
    noisy: jax.Array,
    *,
    remat: bool = False,
) -> jax.Array:
    """Hidden rows that predict each block at its own state, the blocks before it final: [rows * blocks, B, d].

    prompt [rows, P_max], prompt_length [rows], clean [rows, L], noisy [rows * blocks, B], whose B is the block size.
    """
    (rows, length), block_size = clean.shape, noisy.shape[1]
    before = append_response(prompt, prompt_length, clean)
    tokens = jnp.concatenate([before, joined(noisy, rows)], axis=1)
    layout = packed(prompt_length, before.shape[1], length, block_size)
    hidden = model(tokens, **layout._asdict(), remat=remat)
    at = hidden[:, before.shape[1] :]
    if model.config.logit_alignment == "shifted":
        # A block's first token is predicted by the row before it, the last of a clean block or of the prompt.
        previous = jnp.roll(at, 1, axis=1)
        clean_rows = predicting_rows(hidden, prompt_length, length, "shifted")
        first = jnp.arange(length) % block_size == 0
        at = jnp.where(first[:, None], clean_rows, previous)
    return split(at, block_size)
