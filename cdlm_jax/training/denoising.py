"""Masked-denoising pre-training of a bidirectional diffusion model: the teacher of the tiny recipe."""

import jax
import jax.numpy as jnp
from flax import nnx

from cdlm_jax.decoding.common import append_response, predicting_rows
from cdlm_jax.mesh import sharding
from cdlm_jax.training.losses import answer_share, masked_denoising_loss
from cdlm_jax.training.pretrain import PretrainConfig
from cdlm_jax.visibility import row_end


def make_loss(graphdef: nnx.GraphDef, config: PretrainConfig):
    """The `LossFn`: E_t[sum over masked of share * -log p(answer) / divisor(t)] under full attention.

    t and divisor are those of `config.noise`; the shares of a row sum to 1 (`losses.answer_share`).

    batch: {prompt [rows, P_max], prompt_length [rows], answer [rows, L]}.
    """

    def loss_fn(trainable, frozen, batch, keys, step):
        model = nnx.merge(graphdef, trainable, frozen)
        answer, prompt_lengths = batch["answer"], batch["prompt_length"]
        rows, length = answer.shape
        t_key, mask_key = jax.random.split(sharding.put(keys)[0])
        t = config.noise.ratios(t_key, rows, step / config.steps)
        masked = jax.random.uniform(mask_key, answer.shape) < t[:, None]
        y = jnp.where(masked, model.config.mask_token_id, answer)
        tokens = append_response(batch["prompt"], prompt_lengths, y)
        hidden = model(tokens, visible_end=row_end(prompt_lengths, length, tokens.shape[1]))
        hidden = predicting_rows(hidden, prompt_lengths, length, model.config.logit_alignment)
        share = answer_share(answer, model.config.eos_token_id, config.filler_weight)
        return masked_denoising_loss(hidden, model.head, answer, masked, config.noise.divisor(t), share=share), {}

    return loss_fn
