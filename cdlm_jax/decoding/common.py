"""What the decoders share: where the response lies in a row, which hidden row predicts what, and what is refused."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cdlm_jax.config import InputError, LogitAlignment, ModelConfig, is_count
from cdlm_jax.decoding.progress import Progress, take_rows
from cdlm_jax.decoding.sampling import measure
from cdlm_jax.decoding.unmask import Unmask
from cdlm_jax.kernels.vocab import Confidence, confidence
from cdlm_jax.kernels.vocab.noise import gumbel, row_seeds
from cdlm_jax.kernels.vocab.ops import per_row
from cdlm_jax.mesh.sharding import by_rows, check_model, check_rows, local_rows, whole
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.visibility import row_end

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


def predicting_rows(hidden: jax.Array, start: jax.Array, length: int, alignment: LogitAlignment) -> jax.Array:
    """The hidden rows whose logits predict the tokens start[row] .. start[row] + length - 1.

    hidden [rows, S, d] of a whole sequence -> [rows, length, d]. `shifted` models (Dream) predict a token one row
    before its place.
    """
    return take_rows(hidden, start - (alignment == "shifted"), length)


def full_forward(
    model: Transformer, prompts: jax.Array, prompt_lengths: jax.Array, progress: Progress, size: int
) -> jax.Array:
    """The whole sequence under full attention: the hidden rows that predict the current block, [rows, size, d]."""
    gen_length = progress.response.shape[1]
    tokens = append_response(prompts, prompt_lengths, progress.response)
    hidden = model(tokens, visible_end=row_end(prompt_lengths, gen_length, tokens.shape[1]))
    return predicting_rows(hidden, prompt_lengths + progress.block * size, size, model.config.logit_alignment)


# ---- predictions ---------------------------------------------------------------------------------------------------


def step_keys(key: jax.Array | None, progress: Progress) -> jax.Array:
    """The random keys of a forward, [rows]: functions of the row's key, its block, and its forwards on that block.

    `key` is one key per row, or a single key from which each row's is derived by its place in the batch. Give [rows]
    keys where a sample must not depend on that place.
    """
    assert key is not None, "a request at temperature > 0 without a key is refused"
    rows = progress.block.shape[0]
    fold = jax.vmap(jax.random.fold_in)
    keys = by_rows(key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows)))
    return fold(fold(keys, progress.block), progress.step)


def predict(
    model: Transformer,
    hidden: jax.Array,
    keys: jax.Array | None = None,
    temperature: float = 0.0,
    *,
    banned: tuple[int, ...] = (),
    unsure: tuple[int, ...] = (),
) -> Confidence:
    """A token for every hidden row and how sure the model is of it: hidden [rows, B, d] -> arrays [rows, B].

    At temperature > 0 (which needs keys [rows]) the token is drawn from softmax(logits / temperature) and its
    probability is that of the plain softmax (LLaDA `generate`). The mask token keeps its share of the probability but
    is never the prediction: upstream would finalize it as a mask. Tokens `banned` have logits of -inf; those `unsure`
    may be predicted but take no part in the probabilities, so theirs is 0.
    """
    mask_id = model.config.mask_id
    if not banned and not unsure:
        return confidence(hidden, model.head, temperature=temperature, key=keys, forbidden=(mask_id,))
    logits = scores = whole(model.unembed(hidden))
    if temperature > 0:  # the noise of `confidence`
        scores = logits / temperature + gumbel(per_row(row_seeds(keys, hidden)), jnp.arange(logits.shape[-1]))
    token = jnp.argmax(scores.at[..., [mask_id, *banned]].set(-jnp.inf), axis=-1)
    return measure(jax.nn.log_softmax(logits.at[..., [*banned, *unsure]].set(-jnp.inf)), token, mask_id)


def decide(
    model: Transformer, key: jax.Array | None, unmask: Unmask, temperature: float, progress: Progress, hidden: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What most decoders finalize: hidden [rows, B, d] -> tokens [rows, B] and which of them, bool [rows, B]."""
    keys = step_keys(key, progress) if temperature > 0 else None
    candidates = predict(model, hidden, keys, temperature)
    return candidates.token, unmask(candidates, progress.masked(hidden.shape[1]), progress.step)


# ---- requests ------------------------------------------------------------------------------------------------------


def check_blocks(gen_length: int, block_size: int) -> None:
    if not (is_count(block_size) and is_count(gen_length)) or gen_length % block_size:
        raise InputError(f"gen_length {gen_length} must be a positive multiple of block_size {block_size}")


def check_steps(steps: int | None, gen_length: int, block_size: int) -> None:
    """`steps` forwards are spread evenly over the blocks; None is one token per forward."""
    blocks = gen_length // block_size
    if steps is not None and not (is_count(steps) and steps <= gen_length and steps % blocks == 0):
        raise InputError(f"steps must be a multiple of the {blocks} blocks and at most {gen_length}, got {steps}")


def steps_per_block(steps: int | None, gen_length: int, block_size: int) -> int | None:
    """Of `steps` that have been checked."""
    return None if steps is None else steps // (gen_length // block_size)


def check_policy(unmask) -> None:
    if not callable(unmask):
        raise InputError(f"unmask must be a policy such as Threshold(0.9), got {unmask!r}")


def check_request(model: ModelConfig, prompts, prompt_lengths, gen_length: int, temperature: float, key) -> None:
    """Refuse what cannot be decoded by filling masks."""
    if model.causal:
        raise InputError(f"{model.family} is autoregressive: decode it with decoding.autoregressive")
    check_prompts(model, prompts, prompt_lengths, gen_length, temperature, key)


def check_prompts(model: ModelConfig, prompts, prompt_lengths, gen_length: int, temperature: float, key) -> None:
    """Refuse what no decoder can use. Under a caller's own jit only shapes can be checked, not values."""
    if prompts.ndim != 2 or prompt_lengths.shape != prompts.shape[:1]:
        raise InputError(
            f"prompts must be [rows, P_max] and prompt_lengths [rows], got {prompts.shape} and {prompt_lengths.shape}"
        )
    if not prompts.shape[0]:
        raise InputError("there are no prompts: prompts has 0 rows")
    check_model(model)
    check_rows(prompts.shape[0])
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
    tokens, lengths = local_rows(prompts), local_rows(prompt_lengths)
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise InputError(f"prompt lengths must be in 1..{tokens.shape[1]}, got {lengths.min()}..{lengths.max()}")
    for row, length in enumerate(lengths):
        check_ids(model, row, tokens[row, :length])


def check_ids(model: ModelConfig, number: int, ids: Sequence[int] | np.ndarray) -> None:
    """Refuse a prompt whose tokens no decoder can use; `number` says which it is."""
    ids = np.asarray(ids)
    if not ids.size:
        raise InputError(f"prompt {number} is empty")
    if (outside := (ids < 0) | (ids >= model.vocab_size)).any():
        token, allowed = ids[outside][0], f"the vocabulary 0..{model.vocab_size - 1}"
        raise InputError(f"prompt {number} holds token {token}, outside {allowed}")
    if not model.causal and (masks := ids == model.mask_token_id).any():
        raise InputError(f"prompt {number} holds the mask token {model.mask_token_id} at position {masks.argmax()}")
