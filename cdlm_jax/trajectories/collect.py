"""Trajectory collection: the teacher decodes one token per step, and each finalizing hidden row is kept."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cdlm_jax.config import InputError
from cdlm_jax.data import Encoder, ProblemMixture
from cdlm_jax.decoding import naive
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.trajectories.store import Metadata, Record, Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """`num_prompts` problems, one trajectory each per temperature, `batch_size` at a time, `shard_size` to a file."""

    num_prompts: int
    temperatures: tuple[float, ...] = (0.0, 0.5)
    batch_size: int = 64
    shard_size: int = 256

    def __post_init__(self):
        for name in ("num_prompts", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise InputError(f"collect.{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperatures or not all(0 <= t < math.inf for t in self.temperatures):
            raise InputError(f"collect.temperatures must be a list of numbers >= 0, got {self.temperatures}")


def trajectories(
    model: Transformer,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    *,
    gen_length: int,
    block_size: int,
    temperature: float,
    keys: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decode a batch under full attention, exactly one token per step, blocks left to right (CDLM section 3.1).

    The position finalized is the one of the current block with the most probable token. prompts [rows, P_max],
    prompt_lengths [rows], keys [rows] (used at temperature > 0) -> tokens [rows, L] int32, order [rows, L] int32 (the
    step that finalized each position), hidden [rows, L, d] (the final normed row that produced each token's logits at
    that step; one row before the position for `shifted` models). Tokens after the first EOS are kept as decoded.
    """
    config = naive.Config(gen_length=gen_length, block_size=block_size, temperature=temperature)
    progress, hidden = naive.decode(model, prompts, prompt_lengths, keys, config, keep_hidden=True)
    return progress.response, progress.finalized_at, hidden


def collect(
    model: Transformer,
    encoder: Encoder,
    problems: ProblemMixture,
    config: CollectConfig,
    *,
    block_size: int,
    model_fingerprint: str,
    folder: Path,
) -> Store:
    """Fill the store in `folder`, continuing one that was interrupted. Returns the finished store.

    Record i is temperature i // num_prompts of prompt i % num_prompts; its sample depends on the seed and i only, so
    an interrupted collection ends with the same records as an uninterrupted one.
    """
    names = tuple(problems.weights)
    metadata = Metadata(
        model_fingerprint=model_fingerprint,
        tokenizer_fingerprint=encoder.tokenizer.fingerprint(),
        prompt_length=encoder.prompt_length,
        gen_length=encoder.gen_length,
        block_size=block_size,
        hidden_size=model.config.hidden_size,
        logit_alignment=model.config.logit_alignment,
        mask_token_id=model.config.mask_token_id,
        eos_token_id=model.config.eos_token_id,
        temperatures=config.temperatures,
        tasks=names,
        source=" ".join(f"{name}:{weight:g}" for name, weight in problems.weights.items()) + f" ({problems.split})",
        seed=problems.seed,
        num_records=config.num_prompts * len(config.temperatures),
        shard_size=config.shard_size,
    )
    for index in range(config.num_prompts):  # a prompt that is too long is refused before anything is written
        encoder.prompt(problems[index][1].prompt)
    store = Store.create_or_resume(folder, metadata)

    def records(indices: list[int], temperature: float) -> list[Record]:
        """The records of one batch, all of one temperature; padded to full size so that one program serves all."""
        named = [problems[index % config.num_prompts] for index in indices]
        padded = indices + indices[-1:] * (config.batch_size - len(indices))
        prompts, lengths = encoder.prompts([problem.prompt for _, problem in named])
        rows = np.minimum(np.arange(config.batch_size), len(indices) - 1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(problems.seed), jnp.asarray(padded))
        tokens, order, hidden = jax.device_get(
            trajectories(
                model,
                jnp.asarray(prompts[rows]),
                jnp.asarray(lengths[rows]),
                gen_length=encoder.gen_length,
                block_size=block_size,
                temperature=temperature,
                keys=keys,
            )
        )
        return [
            {
                "prompt": prompts[row],
                "prompt_length": lengths[row],
                "tokens": tokens[row],
                "order": order[row],
                "hidden": hidden[row].astype(ml_dtypes.bfloat16),
                "answer": encoder.answer(problem.answer),
                "temperature": np.float32(temperature),
                "prompt_id": np.int64(index % config.num_prompts),
                "task": np.int32(names.index(name)),
            }
            for row, (index, (name, problem)) in enumerate(zip(indices, named, strict=True))
        ]

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    missing = store.missing_shards()
    finished = metadata.num_records - sum(len(metadata.records(shard)) for shard in missing)
    with Progress(*columns) as progress:
        bar = progress.add_task("trajectories", total=metadata.num_records, completed=finished)
        for shard in missing:
            shard_records: list[Record] = []
            for indices, temperature in _batches(metadata.records(shard), config):
                shard_records += records(indices, temperature)
                progress.advance(bar, len(indices))
            store.write_shard(shard, shard_records)
    store.finish()
    return store


def _batches(indices: range, config: CollectConfig) -> list[tuple[list[int], float]]:
    """Consecutive records in batches that do not mix temperatures."""
    batches = []
    for place, temperature in enumerate(config.temperatures):
        of_temperature = [i for i in indices if i // config.num_prompts == place]
        for start in range(0, len(of_temperature), config.batch_size):
            batches.append((of_temperature[start : start + config.batch_size], temperature))
    return batches
