"""Tokens drawn from a tempered and cut softmax, and how sure of them it is (Dream's `sample_tokens`)."""

import dataclasses

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError, is_count
from cdlm_jax.kernels.vocab import Confidence, confidence
from cdlm_jax.mesh.sharding import by_rows, pieces, whole
from cdlm_jax.models.transformer import Transformer

ROWS_AT_ONCE = 32  # hidden rows whose logits exist together


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most probable token. Then, in this order: temperature, top_p, top_k.

    top_p drops a token when the tokens ahead of it have more than top_p together; top_k keeps the k most probable.
    None, and top_p 1, cut nothing. The most probable token that may be the answer is never cut.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise InputError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k is not None and not is_count(self.top_k):
            raise InputError(f"top_k must be a positive integer, got {self.top_k}")

    def __call__(self, model: Transformer, hidden: jax.Array, keys: jax.Array | None = None) -> Confidence:
        """hidden [rows, Q, d] -> Confidence of [rows, Q] arrays, of the cut distribution.

        keys [rows] are needed at temperature > 0; the probability is then that of the token drawn. The mask token keeps
        its share of the probability but is never the answer: upstream would finalize it as a mask.
        """
        forbidden = model.config.mask_token_id
        if self.temperature == 0 and self.top_k is None and self.top_p in (None, 1):
            return confidence(hidden, model.head, forbidden=() if forbidden is None else (forbidden,))
        rows, size, _ = hidden.shape
        if self.temperature > 0:
            places = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(size)))(keys)
        else:
            places = jnp.zeros_like(hidden[..., 0])

        def one(given):
            hidden_row, key = given
            return self._answer(whole(model.unembed(hidden_row)), key, forbidden)

        # Every device goes through its own rows: [rows, size] -> [rows of a device * size, devices].
        devices = pieces(hidden, 0)
        flat = jax.tree.map(lambda x: x.reshape(rows * size, *x.shape[2:]), (hidden, places))
        own = by_rows(jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), flat))
        own = jax.tree.map(lambda x: x.swapaxes(0, 1), own)
        answers = jax.lax.map(jax.vmap(one), own, batch_size=min(ROWS_AT_ONCE, rows * size // devices))
        return by_rows(jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows * size).reshape(rows, size), answers))

    def _answer(self, logits: jax.Array, key: jax.Array, forbidden: int | None) -> Confidence:
        """logits [V] -> Confidence of scalars."""
        log_p = jax.nn.log_softmax(self.cut(logits / self.temperature if self.temperature > 0 else logits, forbidden))
        scores = without(forbidden, log_p)
        if self.temperature > 0:
            scores += gumbel_noise(key, logits.shape)
        return measure(log_p, jnp.argmax(scores), forbidden)

    def cut(self, logits: jax.Array, forbidden: int | None = None) -> jax.Array:
        """logits [V] with -inf where top_p and top_k cut."""
        left = logits
        if self.top_p is not None and self.top_p < 1:
            falling = jnp.argsort(-left, stable=True)
            p = jax.nn.softmax(left[falling])
            ahead = jnp.cumsum(p) - p
            left = left.at[falling].set(jnp.where(ahead > self.top_p, -jnp.inf, left[falling]))
        if self.top_k is not None:
            least = jax.lax.top_k(left, min(self.top_k, left.shape[-1]))[0][-1]
            left = jnp.where(left < least, -jnp.inf, left)
        best = jnp.argmax(without(forbidden, logits))
        return left.at[best].set(logits[best])


def gumbel_noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Where log p plus this is largest is a draw from p. "high" has the bits for its tail (upstream: float64)."""
    return jax.random.gumbel(key, shape, mode="high")


def measure(log_p: jax.Array, token: jax.Array, forbidden: int | None) -> Confidence:
    """How sure a distribution, log_p [..., V], is of token [...]; the margin leaves out the token that is forbidden."""
    p = jnp.exp(log_p)
    first, second = jnp.moveaxis(jax.lax.top_k(without(forbidden, log_p), 2)[0], -1, 0)
    return Confidence(
        token=token.astype(jnp.int32),
        probability=jnp.take_along_axis(p, token[..., None], axis=-1)[..., 0],
        margin=jnp.exp(first) - jnp.exp(second),
        entropy=-jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1),
    )


def without(token: int | None, scores: jax.Array) -> jax.Array:
    """scores [..., V] with -inf for a token, if there is one to leave out."""
    return scores if token is None else scores.at[..., token].set(-jnp.inf)
