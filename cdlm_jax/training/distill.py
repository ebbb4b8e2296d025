"""The CDLM objective (section 3.3): three losses of the block-causal student on one teacher trajectory."""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cdlm_jax.config import InputError
from cdlm_jax.decoding.common import append_response, predicting_rows
from cdlm_jax.kernels.vocab import confidence
from cdlm_jax.mesh.sharding import by_rows
from cdlm_jax.models import lora
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.training import packed
from cdlm_jax.training.loop import LoopConfig
from cdlm_jax.training.losses import (
    LLADA,
    LossWeights,
    consistency_loss,
    distillation_loss,
    masked_denoising_loss,
)
from cdlm_jax.training.optimizer import OptimizerConfig
from cdlm_jax.trajectories.states import SCOPES, State, masked_response, sample_states
from cdlm_jax.visibility import row_end, visible_end


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(LoopConfig):
    """How to train a student.

    mode: `plain` trains on one state of each trajectory, as the paper does; `packed` on one of each of its blocks, in
        one longer row (`training/packed.py`, docs/packed.md).
    teacher: `offline` rebuilds the teacher's distribution from the stored hidden rows, `online` asks the frozen
        network at each state.
    lora_rank: 0 trains all parameters.
    accumulate: backward passes per update; each takes batch_size / accumulate rows.
    preset_problems: training problems of each task on which the student's threshold is chosen; 0 leaves it open.
    """

    batch_size: int = 64
    accumulate: int = 1
    mode: Literal["plain", "packed"] = "plain"
    teacher: Literal["offline", "online"] = "offline"
    consistency_scope: str = "later_blocks"
    weights: LossWeights = LLADA
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = 0.0
    lora_rank: int = 32
    lora_alpha: float = 32.0
    remat: bool = False
    preset_problems: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1 or self.accumulate < 1 or self.batch_size % self.accumulate:
            raise InputError(
                f"distill.batch_size {self.batch_size} must be a positive multiple of accumulate {self.accumulate}"
            )
        if self.teacher not in ("offline", "online"):
            raise InputError(f"distill.teacher must be offline or online, got {self.teacher!r}")
        if self.consistency_scope not in SCOPES:
            raise InputError(f"distill.consistency_scope must be {' or '.join(SCOPES)}, got {self.consistency_scope!r}")
        if self.mode not in ("plain", "packed"):
            raise InputError(f"distill.mode must be plain or packed, got {self.mode!r}")
        if self.mode == "packed" and (self.teacher, self.consistency_scope) != ("offline", "same_block"):
            raise InputError(
                "distill.mode packed needs distill.teacher offline and distill.consistency_scope same_block"
                f" (docs/packed.md says why), got {self.teacher} and {self.consistency_scope}"
            )
        if self.lora_rank < 0:
            raise InputError(f"distill.lora_rank must be 0 (train everything) or more, got {self.lora_rank}")
        if self.preset_problems < 0:
            raise InputError(f"distill.preset_problems must be 0 (no preset) or more, got {self.preset_problems}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"distill.ema_decay must be in [0, 1), got {self.ema_decay}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a distillation step reads and never changes.

    student: nnx.State of the parameters that are not trained; teacher_head: [d, V], turns stored hidden rows into the
    teacher's distribution, None where it is the student's too (LoRA leaves it alone); teacher: the frozen network when
    it is asked online, else None.
    """

    student: nnx.State
    teacher_head: jax.Array | None
    teacher: Transformer | None


class Compared(NamedTuple):
    """What the losses compare: hidden rows that predict the tokens at their place. Trajectories are [rows, L], or in
    packed form [rows * blocks, B]; the answer is [rows, L] in both."""

    tokens: jax.Array  # the trajectory's final ones
    state: State
    teacher: jax.Array
    at_y: jax.Array
    at_completed: jax.Array  # a constant
    at_noised: jax.Array  # the student at the partly masked answer


def make_student(teacher: Transformer, config: DistillConfig, key: jax.Array):
    """(graphdef, trainable, frozen): the teacher's weights with LoRA adapters, or a trainable copy of all of them."""
    if config.lora_rank:
        student = lora.attach(teacher, rank=config.lora_rank, alpha=config.lora_alpha, key=key)
        graphdef, trainable, rest = nnx.split(student, lora.LoRAParam, ...)  # type: ignore[misc]  # its stubs know no `...`
    else:
        graphdef, trainable, rest = nnx.split(teacher, nnx.Param, ...)  # type: ignore[misc]  # its stubs know no `...`
        # Float32 masters, so that small updates of bfloat16 weights are not rounded away; and copies in any case, since
        # a train step donates its state and the teacher must survive it.
        trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable)
    head = None if config.lora_rank else teacher.head
    frozen = Frozen(rest, head, teacher if config.teacher == "online" else None)
    return graphdef, trainable, frozen


def make_loss(graphdef: nnx.GraphDef, config: DistillConfig, block_size: int):
    """The `LossFn` of distillation.

    batch: {prompt [rows, P_max], prompt_length [rows], tokens [rows, L], order [rows, L], hidden [rows, L, d],
    answer [rows, L]} as in `trajectories.store`. metrics: each unweighted loss, and `agreement`, the share of the
    positions in U where the student's most probable token at y is the one the teacher finalized.
    """

    def response_hidden(model, batch, response, end):
        """Hidden rows that predict the response tokens under a visibility: [rows, L, d]."""
        lengths, size = batch["prompt_length"], response.shape[1]
        tokens = append_response(batch["prompt"], lengths, response)
        hidden = model(tokens, visible_end=end(lengths, tokens.shape[1]), remat=config.remat)
        return predicting_rows(hidden, lengths, size, model.config.logit_alignment)

    def block_causal(lengths, seq_len):
        return visible_end(lengths, seq_len, block_size)

    def plain(student, frozen, batch, noised, keys) -> Compared:
        """One state of each trajectory: a forward for y and the noised answer together, one without gradient for y*."""
        tokens, mask_id = batch["tokens"], student.config.mask_token_id
        state = sample_states(
            tokens,
            batch["order"],
            keys,
            block_size=block_size,
            mask_token_id=mask_id,
            scope=config.consistency_scope,
        )
        twice = {name: _interleaved(batch[name], batch[name]) for name in ("prompt", "prompt_length")}
        both = response_hidden(student, twice, _interleaved(state.tokens, noised), block_causal)
        pairs = by_rows(both.reshape(-1, 2, *both.shape[1:]))
        at_y, at_noised = pairs[:, 0], pairs[:, 1]
        at_completed = response_hidden(jax.lax.stop_gradient(student), batch, state.completed, block_causal)
        if frozen.teacher is None:
            teacher = batch["hidden"]
        else:
            whole = lambda lengths, seq_len: row_end(lengths, tokens.shape[1], seq_len)  # noqa: E731
            teacher = response_hidden(frozen.teacher, batch, state.tokens, whole)
        return Compared(tokens, state, teacher, at_y, at_completed, at_noised)

    def by_blocks(student, frozen, batch, noised, keys) -> Compared:
        """One state of each block: a packed forward for y, one without gradient for y*. The noised answer, in which
        every block is masked in part anyway, is that of the plain form."""
        prompt = batch["prompt"], batch["prompt_length"], batch["tokens"]
        hidden = partial(packed.block_hidden, remat=config.remat)
        state = packed.block_states(
            batch["tokens"], batch["order"], keys, block_size=block_size, mask_token_id=student.config.mask_token_id
        )
        return Compared(
            packed.split(batch["tokens"], block_size),
            state,
            teacher=packed.split(batch["hidden"], block_size),
            at_y=hidden(student, *prompt, state.tokens),
            at_completed=hidden(jax.lax.stop_gradient(student), *prompt, state.completed),
            at_noised=response_hidden(student, batch, noised, block_causal),
        )

    compare = by_blocks if config.mode == "packed" else plain

    def loss_fn(trainable, frozen: Frozen, batch, keys, step):
        if not config.lora_rank:
            assert frozen.teacher_head is not None  # kept where all weights are trained
            dtype = frozen.teacher_head.dtype
            trainable = jax.tree.map(lambda x: x.astype(dtype), trainable)
        student = nnx.merge(graphdef, trainable, frozen.student)
        head = student.head
        state_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        noised = masked_response(batch["answer"], noise_keys, mask_token_id=student.config.mask_token_id)
        tokens, state, teacher, at_y, at_completed, at_noised = compare(
            student, frozen, batch, noised.tokens, state_keys
        )
        losses = {
            "distill": distillation_loss(
                teacher.astype(at_y.dtype), at_y, head, state.newly, teacher_head=frozen.teacher_head
            ),
            "consistency": consistency_loss(at_completed, at_y, head, state.remaining),
            "dlm": masked_denoising_loss(at_noised, head, batch["answer"], noised.masked, noised.t),
        }
        loss = sum(getattr(config.weights, name) * value for name, value in losses.items())
        agrees = confidence(jax.lax.stop_gradient(at_y), jax.lax.stop_gradient(head)).token == tokens
        agreement = jnp.sum(agrees & state.newly, axis=1) / jnp.sum(state.newly, axis=1)  # U is never empty
        return loss, {**losses, "agreement": agreement.mean()}

    return loss_fn


def _interleaved(one: jax.Array, other: jax.Array) -> jax.Array:
    """[rows, ...] twice -> [2 * rows, ...], in turns: on a mesh both rows of a pair stay where they are."""
    return jnp.stack([one, other], axis=1).reshape(-1, *one.shape[1:])
