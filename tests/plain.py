"""A Transformer written out plainly: NumPy, float64, one row at a time, and nothing kept that the caller does not keep.

The twins of the cached decoders run on it; so do those of the others, which makes their float noise nothing.
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_decoding import ROWS, few, row_lengths, seeds

from cdlm_jax.decoding.progress import DecodeResult
from cdlm_jax.kernels.vocab import Confidence

NEAR_TIE = 1e-4  # decisions closer than this may fall either way (see test_decoding)


class PlainModel:
    """Weights of a Transformer in float64; x [Q, d] are positions of one row."""

    def __init__(self, model):
        self.config = model.config
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model)
        self.embed, self.head, self.final_norm = np.asarray(wide.embed[...]), np.asarray(wide.head), wide.final_norm
        number = range(model.config.num_layers)
        self.layers = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], wide.layers) for i in number]

    def norm(self, x, norm):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config.norm_eps) * np.asarray(norm.weight[...])

    def project(self, layer, x, positions):
        """x [Q, d] -> rotated q [Q, H, D], rotated k and plain v [Q, K, D]."""
        normed = self.norm(x, layer.attention_norm)
        q, k, v = (
            linear(normed, each).reshape(len(x), -1, self.config.head_dim) for each in (layer.q, layer.k, layer.v)
        )
        return self.rotate(q, positions), self.rotate(k, positions), v

    def rotate(self, x, positions):
        half = self.config.head_dim // 2
        angles = np.outer(positions, self.config.rope_theta ** (-np.arange(half) / half))[:, None]
        one, two = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    def attend(self, layer, q, k, v, ends):
        """Query i sees the keys before ends[i]: q [Q, H, D], k, v [S, K, D] -> what is added to the stream, [Q, d]."""
        shared = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, shared, axis=1), np.repeat(v, shared, axis=1)
        scores = np.einsum("qhd,shd->hqs", q, k) / math.sqrt(self.config.head_dim)
        scores = np.where(np.arange(len(k)) < np.reshape(ends, (-1, 1)), scores, -math.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return linear(np.einsum("hqs,shd->qhd", weights, v).reshape(len(q), -1), layer.out)

    def mlp(self, layer, x):
        normed = self.norm(x, layer.mlp_norm)
        gate = linear(normed, layer.gate)
        return linear(gate / (1 + np.exp(-gate)) * linear(normed, layer.up), layer.down)

    def nothing_kept(self, size):
        """Keys and values of every layer, for `run`: [layers, size, 2, K, D]."""
        return np.full((len(self.layers), size, 2, self.config.num_kv_heads, self.config.head_dim), np.nan)

    def run(self, tokens, *, first=0, kept=None, ends=None):
        """Logits [Q, V] of tokens at positions first, first + 1, ..., which see everything (or what is before `ends`).

        Their keys and values go to their places in `kept`, from where those of the other positions are taken.
        """
        positions = range(first, first + len(tokens))
        kept = self.nothing_kept(len(tokens)) if kept is None else kept
        ends = [kept.shape[1]] * len(tokens) if ends is None else ends
        x = self.embed[list(tokens)]
        for layer, cache in zip(self.layers, kept, strict=True):
            q, cache[positions, 0], cache[positions, 1] = self.project(layer, x, positions)
            x = x + self.attend(layer, q, cache[:, 0], cache[:, 1], ends)
            x = x + self.mlp(layer, x)
        return self.logits(x)

    def logits(self, x):
        return self.norm(x, self.final_norm) @ self.head


def linear(x, layer):
    y = x @ np.asarray(layer.kernel[...])
    return y if layer.bias is None else y + np.asarray(layer.bias[...])


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def look(logits, forbidden):
    """Logits [Q, V] -> (Confidence of each position, [Q] how far its token leads)."""
    log_p = log_softmax(logits)
    p = np.exp(log_p)
    allowed = logits.copy()
    allowed[:, forbidden] = -math.inf
    token = allowed.argmax(axis=1)
    second, first = np.sort(np.delete(p, forbidden, axis=1), axis=1)[:, -2:].T
    lead = np.diff(np.sort(allowed, axis=1)[:, -2:])[:, 0]
    return Confidence(token, first, first - second, -(p * log_p).sum(axis=1)), lead


class Twin(NamedTuple):
    """One row decoded plainly. doubt: how far its closest decision was from going the other way."""

    tokens: list[int]
    length: int
    forwards: int
    finalized_at: list[int]
    doubt: float

    @classmethod
    def of(cls, response, forwards, finalized_at, doubt, eos):
        response = [int(token) for token in response]
        length = [*response, eos].index(eos)
        return cls(response[:length] + [eos] * (len(response) - length), length, forwards, finalized_at, doubt)


def differing(result: DecodeResult, other: DecodeResult) -> list[int]:
    """The rows in which two results are not the same."""
    fields = ("tokens", "lengths", "forwards", "finalized_at")
    return [
        row
        for row in range(len(result.lengths))
        if any((getattr(result, field)[row] != getattr(other, field)[row]).any() for field in fields)
    ]


def unlike_twins(request, result: DecodeResult, decode_plainly) -> int:
    """How many rows differ from their twin decode_plainly(model, prompt, key); each must be a near tie."""
    model = PlainModel(request.model)
    rows = zip(request.prompts, request.lengths, request.keys, strict=True)
    twins = [decode_plainly(model, prompt[:length], key) for prompt, length, key in rows]
    expected = DecodeResult(*(np.array(values) for values in list(zip(*twins, strict=True))[:4]))
    differ = differing(result, expected)
    for row in differ:
        assert twins[row].doubt < NEAR_TIE, (row, twins[row], result)
    return len(differ)


def unlike_in_company(request, run, order, decode_plainly) -> int:
    """How many rows come out otherwise alone, or shuffled and with wider padding; each must be a near tie."""
    batch = run(request)
    rows = range(len(request.lengths))
    alone = [run(request.rows([row])) for row in rows]
    shuffled = run(request.rows(order, extra_columns=3))
    others = [
        jax.tree.map(lambda *values: np.concatenate(values), *alone),
        jax.tree.map(lambda values: values[np.argsort(order)], shuffled),
    ]
    count = 0
    for differ in (differing(batch, other) for other in others):
        count += len(differ)
        for row in differ:
            prompt, model = request.prompts[row, : request.lengths[row]], PlainModel(request.model)
            twin = decode_plainly(model, prompt, request.keys[row])
            assert twin.doubt < NEAR_TIE, (row, twin, batch)
    return count


# ---- what every decoder must do ------------------------------------------------------------------------------------


def check_twins(make, decode, plain):
    """Ragged batches make(seed, lengths) against each of their rows decoded plainly; few near ties are excused."""
    unlike = []

    @few
    @given(seeds, row_lengths)
    def check(seed, lengths):
        request = make(seed, lengths)
        unlike.append(unlike_twins(request, decode(request), plain))

    check()
    assert sum(unlike) <= 0.01 * ROWS * len(unlike)


def check_company(make, decode, plain):
    """Rows alone, and in another order and wider padding, against the same rows of the batch."""
    unlike = []

    @few
    @given(seeds, row_lengths, st.permutations(range(ROWS)))
    def check(seed, lengths, order):
        unlike.append(unlike_in_company(make(seed, lengths), decode, order, plain))

    check()
    assert sum(unlike) <= 0.01 * 2 * ROWS * len(unlike)
