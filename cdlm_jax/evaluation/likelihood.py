"""A Monte-Carlo lower bound on the log-likelihood of an answer under a masked diffusion model.

    log p(answer | prompt) >= E_n E_m [ L / n * sum over the masked i of log p(answer_i | prompt, answer masked by m) ]

n is uniform over 1..L, m a uniform set of n of the answer's L tokens (LLaDA, arXiv 2502.09992, equation 6;
`get_log_likelihood.py`). Dream's `eval.py` weights in the same way but masks every token independently with probability
t ~ U(0, 1): the same expectation with more noise, so the draw of LLaDA serves both. For an answer of one token the
bound is the log-likelihood.

Prompts [rows, P_max] and answers [rows, L_max] are right-padded int32; a row's result depends on neither padding nor
neighbours. `cfg_scale` is LLaDA's w, logits u + (w + 1)(c - u) with the prompt masked in u (Dream's
classifier_free_guidance is w + 1). `block_size` is that of a block-causal student, None a bidirectional teacher; a last
block that the answer fills in part ends with the answer.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.decoding.common import append_response, check_request, predicting_rows
from cdlm_jax.kernels.vocab import confidence, nll
from cdlm_jax.mesh.sharding import by_rows
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.visibility import row_end, visible_end


def log_likelihood(
    model: Transformer,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    answers: jax.Array,
    answer_lengths: jax.Array,
    key: jax.Array,
    *,
    samples: int = 128,
    cfg_scale: float = 0.0,
    block_size: int | None = None,
) -> jax.Array:
    """The bound for every row, float32 [rows], in nats (LLaDA `get_log_likelihood`).

    key: one key, or one per row. The samples of a row are one stratified draw (`draw_masks`): upstream's with mc_num
    and batch_size equal. They run one after another, each a forward of all rows: rows are the batch. InputError for
    prompts or answers that are empty, or hold the mask token or an id outside the vocabulary.
    """
    check_request(model.config, prompts, prompt_lengths, answers.shape[1], 0.0, key)
    _check_answers(model.config, prompts.shape[0], answers, answer_lengths)
    if samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}")
    if answers.shape[1] == 1:
        samples = 1  # there is one mask only
    return _log_likelihood(
        model, prompts, prompt_lengths, answers, answer_lengths, key, samples, float(cfg_scale), block_size
    )


@partial(jax.jit, static_argnames=("samples", "cfg_scale", "block_size"))
def _log_likelihood(
    model, prompts, prompt_lengths, answers, answer_lengths, key, samples, cfg_scale, block_size
) -> jax.Array:
    rows, length = answers.shape
    prompts, prompt_lengths, answers, answer_lengths = by_rows((prompts, prompt_lengths, answers, answer_lengths))
    keys = by_rows(key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows)))
    draws = draw_masks(keys, answer_lengths, samples, length)

    def add(total, draw):
        found = masked_nll(
            model, prompts, prompt_lengths, answers, answer_lengths, *draw, cfg_scale=cfg_scale, block_size=block_size
        )
        return total + found, None

    total, _ = jax.lax.scan(add, by_rows(jnp.zeros(rows, jnp.float32)), draws)
    return -total / samples


@partial(jax.jit, static_argnames=("samples", "length"))
def draw_masks(keys: jax.Array, answer_lengths: jax.Array, samples: int, length: int) -> tuple[jax.Array, jax.Array]:
    """LLaDA's `forward_process`: keys [rows] -> (masked bool [samples, rows, length], p_mask float32 [samples, rows]).

    The numbers of masked tokens are stratified: from a random first one they go up in steps of L / samples, rounded,
    around the circle 1..L. Which tokens are masked is uniform. p_mask is their share of the answer.

    Upstream rounds halves to even, so that every sample that falls on a half masks an even number of tokens, and the
    mean is no longer the bound. Halves are rounded up here: each number is equally likely in every sample.
    """

    def draw(key, answer_length):
        first_key, order_key = jax.random.split(key)
        first = jax.random.randint(first_key, (), 1, answer_length + 1)
        steps = (2 * jnp.arange(samples) * answer_length + samples) // (2 * samples)  # i L / samples, rounded
        counts = (first + steps - 1) % answer_length + 1  # [samples]
        # A key for each sample, so that the draws do not depend on the padded length.
        sample_keys = jax.vmap(jax.random.fold_in, (None, 0))(order_key, jnp.arange(samples))
        scores = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(sample_keys)
        scores = jnp.where(jnp.arange(length) < answer_length, scores, jnp.inf)
        ranks = jnp.argsort(jnp.argsort(scores, axis=1), axis=1)
        return ranks < counts[:, None], counts / answer_length

    return jax.vmap(draw, out_axes=1)(keys, answer_lengths)


@partial(jax.jit, static_argnames=("cfg_scale", "block_size"))
def masked_nll(
    model: Transformer,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    answers: jax.Array,
    answer_lengths: jax.Array,
    masked: jax.Array,
    p_mask: jax.Array,
    *,
    cfg_scale: float = 0.0,
    block_size: int | None = None,
) -> jax.Array:
    """1 / p_mask * sum over the masked tokens of -log p(token), float32 [rows], for given masks.

    masked: bool [rows, L_max], False beyond the answer; p_mask: float32 [rows]. The logits are never materialized.
    """
    hidden = _answer_hidden(
        model, prompts, prompt_lengths, answers, answer_lengths, masked, cfg_scale=cfg_scale, block_size=block_size
    )
    return jnp.sum(jnp.where(masked, nll(hidden, model.head, answers), 0), axis=1) / p_mask


def is_greedy(
    model: Transformer,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    answers: jax.Array,
    answer_lengths: jax.Array,
    *,
    cfg_scale: float = 0.0,
    block_size: int | None = None,
) -> jax.Array:
    """Whether greedy decoding into as many masks as the answer has tokens gives the answer, bool [rows].

    One token per forward, the most confident of all masked ones (LLaDA `suffix_greedy_prediction`), of the current
    block for a student. Errors as in `log_likelihood`.
    """
    check_request(model.config, prompts, prompt_lengths, answers.shape[1], 0.0, None)
    _check_answers(model.config, prompts.shape[0], answers, answer_lengths)
    return _is_greedy(model, prompts, prompt_lengths, answers, answer_lengths, float(cfg_scale), block_size)


@partial(jax.jit, static_argnames=("cfg_scale", "block_size"))
def _is_greedy(model, prompts, prompt_lengths, answers, answer_lengths, cfg_scale, block_size) -> jax.Array:
    prompts, prompt_lengths, answers, answer_lengths = by_rows((prompts, prompt_lengths, answers, answer_lengths))
    places = jnp.arange(answers.shape[1])
    blocks = places // (block_size or answers.shape[1])

    def undecided(carry):
        masked, right = carry
        return (right & masked.any(axis=1)).any()

    def step(carry):
        masked, right = carry
        # As long as a row is right, what it has decoded is what the answer has there.
        hidden = _answer_hidden(
            model, prompts, prompt_lengths, answers, answer_lengths, masked, cfg_scale=cfg_scale, block_size=block_size
        )
        found = confidence(hidden, model.head, forbidden=(model.config.mask_token_id,))
        current = jnp.where(masked, blocks, blocks[-1]).min(axis=1, keepdims=True)
        scores = jnp.where(masked & (blocks == current), found.probability, -1.0)
        chosen = places == jnp.argmax(scores, axis=1)[:, None]  # [rows, L]
        wrong = (chosen & masked & (found.token != answers)).any(axis=1)
        return masked & ~chosen, right & ~wrong

    masked = places < answer_lengths[:, None]
    _, right = jax.lax.while_loop(undecided, step, by_rows((masked, jnp.ones(answers.shape[0], bool))))
    return right


def _answer_hidden(model, prompts, prompt_lengths, answers, answer_lengths, masked, *, cfg_scale, block_size):
    """The hidden rows that predict the answers [rows, L, d], from the prompts and what is not masked."""
    mask_id, length = model.config.mask_token_id, answers.shape[1]
    response = jnp.where(masked, mask_id, answers)
    end = row_end(prompt_lengths, answer_lengths, prompts.shape[1] + length)
    if block_size is not None:
        end = jnp.minimum(end, visible_end(prompt_lengths, prompts.shape[1] + length, block_size))

    def predicting(prompts):
        hidden = model(append_response(prompts, prompt_lengths, response), visible_end=end)
        return predicting_rows(hidden, prompt_lengths, length, model.config.logit_alignment)

    hidden = predicting(prompts)
    if cfg_scale > 0:
        # The lm_head is linear: guiding the hidden rows is guiding the logits.
        unguided = predicting(jnp.full_like(prompts, mask_id))
        hidden = unguided + (cfg_scale + 1) * (hidden - unguided)
    return hidden


def _check_answers(model: ModelConfig, rows: int, answers, answer_lengths) -> None:
    if answers.shape[0] != rows or answer_lengths.shape != (rows,):
        raise InputError(
            f"answers must be [{rows}, L_max] and answer_lengths [{rows}], as there are prompts; "
            f"got {answers.shape} and {answer_lengths.shape}"
        )
    if isinstance(answers, jax.core.Tracer) or isinstance(answer_lengths, jax.core.Tracer):
        return
    tokens, lengths = np.asarray(answers), np.asarray(answer_lengths)
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise InputError(f"answer lengths must be in 1..{tokens.shape[1]}, got {lengths.min()}..{lengths.max()}")
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    allowed = (tokens >= 0) & (tokens < model.vocab_size) & (tokens != model.mask_token_id)
    for row, place in np.argwhere(real & ~allowed)[:1]:
        raise InputError(
            f"answer {row} holds token {tokens[row, place]} at position {place}; allowed: 0..{model.vocab_size - 1} "
            f"but the mask token {model.mask_token_id}"
        )
