"""What the decoders share: where the response lies in a row, which hidden row predicts what, and block bookkeeping."""

import dataclasses
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from cdlm_jax.config import InputError, LogitAlignment, ModelConfig, is_count
from cdlm_jax.kernels.vocab import Confidence, confidence
from cdlm_jax.models.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """A decoded batch.

    tokens: [rows, gen_length] int32; everything after the first EOS is EOS.
    lengths: [rows] int32, tokens before the first EOS.
    forwards: [rows] int32, forward passes of that row after the prefill: a refine or a merged pass counts one, a
        separate commit one. The prefill of the prompt is not counted.
    finalized_at: [rows, gen_length] int32, the row's own forward (from 0) that finalized the position; -1 where
        nothing did because decoding stopped early.
    """

    tokens: jax.Array
    lengths: jax.Array
    forwards: jax.Array
    finalized_at: jax.Array


# ---- rows ----------------------------------------------------------------------------------------------------------


def append_response(prompts: jax.Array, prompt_lengths: jax.Array, response: jax.Array) -> jax.Array:
    """[rows, P_max], [rows], [rows, L] -> [rows, P_max + L]: each response begins right at its own prompt's end.

    What is left at the end of a row repeats its last response token: callers hide it by `visible_end`.
    """
    prompt_size, length = prompts.shape[1], response.shape[1]
    at = jnp.arange(prompt_size + length) - prompt_lengths[:, None]  # place inside the response, negative in the prompt
    placed = jnp.take_along_axis(response, jnp.clip(at, 0, length - 1), axis=1)
    padded = jnp.pad(prompts, ((0, 0), (0, length)))
    return jnp.where(at < 0, padded, placed)


def take_rows(values: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """values [rows, S, ...] from start[row] on: [rows, length, ...]; indices are clipped to the row."""
    at = jnp.clip(start[:, None] + jnp.arange(length), 0, values.shape[1] - 1)
    return jnp.take_along_axis(values, at.reshape(at.shape + (1,) * (values.ndim - 2)), axis=1)


def predicting_rows(hidden: jax.Array, start: jax.Array, length: int, alignment: LogitAlignment) -> jax.Array:
    """The hidden rows whose logits predict the tokens start[row] .. start[row] + length - 1.

    hidden [rows, S, d] of a whole sequence -> [rows, length, d]. `shifted` models (Dream) predict a token one row
    before its place.
    """
    return take_rows(hidden, start - (alignment == "shifted"), length)


def response_lengths(tokens: jax.Array, eos_token_id: int) -> jax.Array:
    """Tokens before the first EOS: [rows, L] -> [rows] int32."""
    is_eos = tokens == eos_token_id
    return jnp.where(is_eos.any(axis=1), jnp.argmax(is_eos, axis=1), tokens.shape[1]).astype(jnp.int32)


# ---- predictions ---------------------------------------------------------------------------------------------------


def step_keys(key: jax.Array, progress: "Progress") -> jax.Array:
    """The random keys of a forward, [rows]: functions of the row's key, its block, and its forwards on that block.

    `key` is one key per row, or a single key from which each row's is derived by its place in the batch. Give [rows]
    keys where a sample must not depend on that place.
    """
    rows = progress.block.shape[0]
    fold = jax.vmap(jax.random.fold_in)
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    return fold(fold(keys, progress.block), progress.step)


def predict(model: Transformer, hidden: jax.Array, keys: jax.Array | None, temperature: float) -> Confidence:
    """A token for every hidden row and how sure the model is of it: hidden [rows, B, d] -> arrays [rows, B].

    At temperature > 0 (which needs keys [rows]) the token is drawn from softmax(logits / temperature) and its
    probability is that of the plain softmax (LLaDA `generate`). The mask token keeps its share of the probability but
    is never the prediction: upstream would finalize it as a mask.
    """
    mask_id = model.config.mask_token_id
    candidates = confidence(hidden, model.head, forbidden=mask_id)
    if temperature == 0:
        return candidates
    logits = model.unembed(hidden)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    noised = jnp.where(jnp.arange(logits.shape[-1]) == mask_id, -jnp.inf, logits / temperature + noise)
    token = jnp.argmax(noised, axis=-1)
    drawn = jnp.take_along_axis(jax.nn.softmax(logits), token[..., None], axis=-1)[..., 0]
    return candidates._replace(token=token.astype(jnp.int32), probability=drawn)


# ---- block bookkeeping ---------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """Where every row of a batch stands. Rows are independent: each has its own block, and its own count of forwards.

    response, finalized_at: [rows, L] as in DecodeResult, with the mask token and -1 where nothing is finalized yet;
    block: [rows] the current block; step: [rows] forwards spent on it; forwards: [rows]; done: bool [rows].
    """

    response: jax.Array
    finalized_at: jax.Array
    block: jax.Array
    step: jax.Array
    forwards: jax.Array
    done: jax.Array

    @classmethod
    def start(cls, rows: int, gen_length: int, mask_token_id: int) -> "Progress":
        zeros = jnp.zeros(rows, jnp.int32)
        unset = jnp.full((rows, gen_length), -1, jnp.int32)
        return cls(jnp.full_like(unset, mask_token_id), unset, zeros, zeros, zeros, jnp.zeros(rows, bool))

    def block_tokens(self, size: int, offset: int = 0) -> jax.Array:
        """Tokens of the block `offset` after the current one: [rows, size]."""
        return take_rows(self.response, (self.block + offset) * size, size)

    def masked(self, size: int) -> jax.Array:
        """True where the current block has nothing finalized yet: bool [rows, size]."""
        return take_rows(self.finalized_at, self.block * size, size) < 0

    def finalize(self, tokens: jax.Array, select: jax.Array) -> "Progress":
        """Count one forward of the rows not done, and set the selected tokens [rows, B] of their current block."""
        size = tokens.shape[1]
        at = jnp.arange(self.response.shape[1]) - (self.block * size)[:, None]  # [rows, L] place inside the block
        inside = jnp.clip(at, 0, size - 1)
        chosen = (at == inside) & jnp.take_along_axis(select, inside, axis=1)
        active = ~self.done
        return replace(
            self,
            response=jnp.where(chosen, jnp.take_along_axis(tokens, inside, axis=1), self.response),
            finalized_at=jnp.where(chosen, self.forwards[:, None], self.finalized_at),
            forwards=self.forwards + active,
            step=self.step + active,
        )

    def advance(self, ready: jax.Array, size: int, stop_token_id: int | None) -> "Progress":
        """Send the rows in `ready` [rows] on to their next block, and mark those done that have none.

        With a `stop_token_id` (EOS), a row is also done after the first block that holds it.
        """
        complete = ~self.masked(size).any(axis=1)
        stop = self.block == self.response.shape[1] // size - 1
        if stop_token_id is not None:
            stop |= (self.block_tokens(size) == stop_token_id).any(axis=1)
        done = self.done | (complete & stop)
        onward = ready & ~done
        return replace(self, done=done, block=self.block + onward, step=jnp.where(onward, 0, self.step))

    def result(self, eos_token_id: int) -> DecodeResult:
        lengths = response_lengths(self.response, eos_token_id)
        after = jnp.arange(self.response.shape[1]) > lengths[:, None]
        tokens = jnp.where(after, eos_token_id, self.response)
        return DecodeResult(tokens, lengths, self.forwards, self.finalized_at)


# ---- requests ------------------------------------------------------------------------------------------------------


def check_blocks(gen_length: int, block_size: int) -> None:
    if not (is_count(block_size) and is_count(gen_length)) or gen_length % block_size:
        raise InputError(f"gen_length {gen_length} must be a positive multiple of block_size {block_size}")


def check_policy(unmask) -> None:
    if not callable(unmask):
        raise InputError(f"unmask must be a policy such as Threshold(0.9), got {unmask!r}")


def check_request(model: ModelConfig, prompts, prompt_lengths, gen_length: int, temperature: float, key) -> None:
    """Refuse what cannot be decoded. Under a caller's own jit only shapes can be checked, not values."""
    if prompts.ndim != 2 or prompt_lengths.shape != prompts.shape[:1]:
        raise InputError(
            f"prompts must be [rows, P_max] and prompt_lengths [rows], got {prompts.shape} and {prompt_lengths.shape}"
        )
    if not prompts.shape[0]:
        raise InputError("there are no prompts: prompts has 0 rows")
    if prompts.shape[1] + gen_length > model.max_length:
        raise InputError(
            f"prompt {prompts.shape[1]} + gen_length {gen_length} exceeds the model's {model.max_length} positions"
        )
    if not temperature >= 0:
        raise InputError(f"temperature must be 0 or more, got {temperature}")
    if temperature > 0 and key is None:
        raise InputError(f"temperature {temperature} needs a random key, got none")
    if key is not None and not (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape in ((), prompts.shape[:1])
    ):
        raise InputError(f"key must be one jax.random.key, or one per row, got {key.dtype} {key.shape}")
    if isinstance(prompts, jax.core.Tracer) or isinstance(prompt_lengths, jax.core.Tracer):
        return
    tokens, lengths = np.asarray(prompts), np.asarray(prompt_lengths)
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise InputError(f"prompt lengths must be in 1..{tokens.shape[1]}, got {lengths.min()}..{lengths.max()}")
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    for row, place in np.argwhere(real & ((tokens < 0) | (tokens >= model.vocab_size)))[:1]:
        raise InputError(
            f"prompt {row} holds token {tokens[row, place]}, outside the vocabulary 0..{model.vocab_size - 1}"
        )
    for row, place in np.argwhere(real & (tokens == model.mask_token_id))[:1]:
        raise InputError(f"prompt {row} holds the mask token {model.mask_token_id} at position {place}")
