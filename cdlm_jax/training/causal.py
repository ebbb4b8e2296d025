"""Next-token training of a causal model: the autoregressive yardstick of the same size as the teacher."""

import jax.numpy as jnp
from flax import nnx

from cdlm_jax.decoding.common import append_response, predicting_rows
from cdlm_jax.kernels.vocab import linear_nll
from cdlm_jax.training.losses import answer_share


def make_loss(graphdef: nnx.GraphDef):
    """The `LossFn`: -log p(next token), mean over the answer's tokens up to its first EOS, then over rows.

    batch: {prompt [rows, P_max], prompt_length [rows], answer [rows, L]}.
    """

    def loss_fn(trainable, frozen, batch, keys, step):
        model = nnx.merge(graphdef, trainable, frozen)
        answer, prompt_lengths = batch["answer"], batch["prompt_length"]
        rows, length = answer.shape
        tokens = append_response(batch["prompt"], prompt_lengths, answer)
        causal = jnp.broadcast_to(jnp.arange(1, tokens.shape[1] + 1), tokens.shape)
        hidden = predicting_rows(model(tokens, visible_end=causal), prompt_lengths, length, "shifted")
        share = answer_share(answer, model.config.eos_token_id, filler_weight=0.0)
        return linear_nll(hidden, model.head, answer, share / rows), {}

    return loss_fn
