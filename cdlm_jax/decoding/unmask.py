"""Which masked positions of a block a forward finalizes: frozen decision objects, injected into every decoder.

Each is called as `policy(candidates, masked, step) -> select`: candidates holds [rows, B] arrays, masked is bool
[rows, B], step int32 [rows] counts the forwards that the row has already spent on this block. At least the best
masked position is selected (Quota, Timesteps, Allowance and FirstThen say what they do instead); ties go to the lowest.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from cdlm_jax.config import InputError, is_count
from cdlm_jax.kernels.vocab import Confidence


class Unmask(Protocol):
    def __call__(self, candidates: Confidence, masked: jax.Array, step: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Every position whose top probability is above `tau` (strictly: CDLM section 4; or, `inclusive`, at least `tau`:
    Fast-dLLM), and always the best."""

    tau: float = 0.9
    inclusive: bool = False

    def __post_init__(self):
        if not 0 <= self.tau <= 1:
            raise InputError(f"Threshold: tau must be in [0, 1], got {self.tau}")

    def __call__(self, candidates, masked, step):
        p = candidates.probability
        sure = p >= self.tau if self.inclusive else p > self.tau
        return masked & sure | best(p, masked)


@dataclasses.dataclass(frozen=True)
class Margin:
    """Every position whose top probability leads the second by more than `gap`, and at least the largest lead."""

    gap: float = 0.5

    def __post_init__(self):
        if not 0 <= self.gap <= 1:
            raise InputError(f"Margin: gap must be in [0, 1], got {self.gap}")

    def __call__(self, candidates, masked, step):
        return masked & (candidates.margin > self.gap) | best(candidates.margin, masked)


@dataclasses.dataclass(frozen=True)
class Factor:
    """Fast-dLLM's factor rule (`get_transfer_index_dynamic` upstream): more positions the surer the batch of them is.

    With confidences c_1 >= c_2 >= ..., c_1 passes and c_j passes where c_j >= 1 - factor / (j + 1); the leading ones
    that pass are taken. Upstream's trap is kept: when only the last of all fails, all are taken.
    """

    factor: float = 1.0

    def __post_init__(self):
        if not self.factor > 0:
            raise InputError(f"Factor: factor must be positive, got {self.factor}")

    def __call__(self, candidates, masked, step):
        rank = ranks(candidates.probability, masked)  # [rows, B], 0 for the best
        passes = (candidates.probability >= 1 - self.factor / (rank + 2)) | (rank == 0)
        first_failure = jnp.min(jnp.where(masked & ~passes, rank, rank.shape[1]), axis=1, keepdims=True)
        count = masked.sum(axis=1, keepdims=True)
        taken = jnp.where(first_failure == count - 1, count, first_failure)
        return masked & (rank < taken)


@dataclasses.dataclass(frozen=True)
class EntropyBudget:
    """The surest positions while the entropy of all but the largest of them stays within `budget` nats (EB-Sampler,
    arXiv 2505.24857): what is finalized together is then nearly independent.
    """

    budget: float = 0.1

    def __post_init__(self):
        if not self.budget >= 0:
            raise InputError(f"EntropyBudget: budget must not be negative, got {self.budget}")

    def __call__(self, candidates, masked, step):
        rank = ranks(-candidates.entropy, masked)
        ascending = jnp.sort(jnp.where(masked, candidates.entropy, jnp.inf), axis=1)
        spent = jnp.cumsum(ascending, axis=1) - ascending  # all but the largest, which is the last taken
        sure = masked & (rank < (spent <= self.budget).sum(axis=1, keepdims=True))
        return sure | best(-candidates.entropy, masked)


@dataclasses.dataclass(frozen=True)
class Quota:
    """The block's positions spread evenly over `steps` forwards, the remainder on the first ones (LLaDA
    `get_num_transfer_tokens`). `steps=None` finalizes one position a forward.
    """

    steps: int | None = None

    def __post_init__(self):
        if self.steps is not None and not is_count(self.steps):
            raise InputError(f"Quota: steps must be a positive integer, got {self.steps}")

    def __call__(self, candidates, masked, step):
        size = masked.shape[1]
        steps = size if self.steps is None else self.steps
        quota = size // steps + (step < size % steps)
        return top(candidates.probability, masked, quota)


@dataclasses.dataclass(frozen=True)
class Timesteps:
    """Dream's schedule: of m masked positions int(m (1 - s / t)) are finalized, t and s being the times before and
    after the step; at the last step all (`_sample` upstream). The surest by entropy go first.

    Where `steps` is the number of positions that makes 0, 1, ..., 1, 2 of them.
    """

    steps: int
    eps: float = 1e-3

    def __post_init__(self):
        if not is_count(self.steps):
            raise InputError(f"Timesteps: steps must be a positive integer, got {self.steps}")
        if not 0 < self.eps < 1:
            raise InputError(f"Timesteps: eps must be in (0, 1), got {self.eps}")

    def share(self, step: jax.Array) -> jax.Array:
        """1 - s / t of each row's step, float32 [rows]; 1 at the last step."""
        at = jnp.clip(step, 0, self.steps - 1)
        return jnp.asarray(self._shares()).at[at].get(out_sharding=jax.typeof(at).sharding)

    def count(self, masked: jax.Array, step: jax.Array) -> jax.Array:
        """Positions that each row finalizes at its step: int32 [rows]; truncated products in float32, as upstream."""
        return (masked.sum(axis=1).astype(jnp.float32) * self.share(step)).astype(jnp.int32)

    def _shares(self) -> np.ndarray:
        # The last bits of upstream's torch.linspace depend on its machine: it strides by the width of CPU vectors.
        times = np.linspace(1, self.eps, self.steps + 1, dtype=np.float32)
        return np.append(1 - times[1:-1] / times[:-2], np.float32(1))

    def __call__(self, candidates, masked, step):
        return top(-candidates.entropy, masked, self.count(masked, step))


@dataclasses.dataclass(frozen=True)
class Allowance:
    """Fast-dLLM's rule for Dream without a cache: the response is dealt out over `steps`; a step looks at the surest
    positions, as many as are dealt out and not yet finalized, and takes those of at least `tau` and always the best.
    """

    steps: int
    tau: float

    def __post_init__(self):
        if not is_count(self.steps):
            raise InputError(f"Allowance: steps must be a positive integer, got {self.steps}")
        if not 0 <= self.tau <= 1:
            raise InputError(f"Allowance: tau must be in [0, 1], got {self.tau}")

    def __call__(self, candidates, masked, step):
        size = masked.shape[1]
        dealt = jnp.minimum(step + 1, self.steps) * (size // self.steps)
        looked_at = dealt - (size - masked.sum(axis=1))
        return top(candidates.probability, masked, looked_at) & Threshold(self.tau, inclusive=True)(
            candidates, masked, step
        )


@dataclasses.dataclass(frozen=True)
class FirstThen:
    """The block's first position in the first forward, whatever its confidence; then as `rest` says.

    Fast-dLLM's cached decoders for Dream: a forward over the block alone has no row that predicts its first token.
    """

    rest: Unmask

    def __call__(self, candidates, masked, step):
        first = masked & (jnp.arange(masked.shape[1]) == 0)
        return jnp.where((step == 0)[:, None], first, self.rest(candidates, masked, step))


def top(score: jax.Array, masked: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` [rows] masked positions of highest score: bool [rows, B]."""
    return masked & (ranks(score, masked) < count[:, None])


def ranks(score: jax.Array, masked: jax.Array) -> jax.Array:
    """Rank of each masked position by falling score, 0 the best; the others come last: [rows, B] int32."""
    # Masked positions come first whatever their score: a NaN must not keep a decode from ending.
    places = jnp.zeros_like(masked, jnp.int32) + jnp.arange(masked.shape[1])
    *_, order = jax.lax.sort((~masked, -score, places), dimension=1, num_keys=2)
    return jnp.argsort(order, axis=1, stable=True)


def best(score: jax.Array, masked: jax.Array) -> jax.Array:
    """One-hot of the best masked position (none where nothing is masked): bool [rows, B]."""
    at = jnp.argmax(jnp.where(masked, score, -jnp.inf), axis=1)
    return masked & (jnp.arange(masked.shape[1]) == at[:, None])
