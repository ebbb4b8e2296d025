"""Trajectory collection: the teacher decodes one token per step, and each finalizing hidden row is kept."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from cdlm_jax.config import InputError
from cdlm_jax.decoding import naive
from cdlm_jax.mesh import preemption
from cdlm_jax.mesh.distributed import Agreement, agreed, barrier, is_main, row_group
from cdlm_jax.mesh.progress import progress
from cdlm_jax.mesh.sharding import check_rows, local_rows, place
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.tasks.mixture import Problems
from cdlm_jax.text.encoder import Encoder
from cdlm_jax.trajectories.store import Metadata, Record, Store, bytes_per_shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """`num_prompts` problems, one trajectory each per temperature, `batch_size` at a time (all processes together),
    `shard_size` to a file."""

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
    problems: Problems,
    config: CollectConfig,
    *,
    block_size: int,
    model_fingerprint: str,
    folder: Path,
) -> Store:
    """Fill the store in `folder`, continuing one that was interrupted. Returns the finished store.

    Record i is temperature i // num_prompts of prompt i % num_prompts; its sample depends on the seed and i only, so
    an interrupted collection ends with the same records as an uninterrupted one, whatever number of processes shares
    the work. Each group of processes (`distributed.row_group`) works on a shard of its own, which its first one writes.
    """
    check_rows(config.batch_size)
    group, groups, writes = row_group()
    size = config.batch_size // groups  # rows of a group: those on the devices of each of its processes
    metadata = Metadata(
        model_fingerprint=model_fingerprint,
        tokenizer_fingerprint=encoder.tokenizer.fingerprint(),
        prompt_length=encoder.prompt_length,
        gen_length=encoder.gen_length,
        block_size=block_size,
        hidden_size=model.config.hidden_size,
        logit_alignment=model.config.logit_alignment,
        mask_token_id=model.config.mask_id,
        eos_token_id=model.config.eos_token_id,
        temperatures=config.temperatures,
        tasks=problems.names,
        source=problems.source,
        seed=problems.seed,
        num_records=config.num_prompts * len(config.temperatures),
        shard_size=config.shard_size,
    )
    for index in range(config.num_prompts):  # a prompt that is too long is refused before anything is written
        encoder.prompt(problems[index][1].prompt)
    if is_main():
        store = Store.create_or_resume(folder, metadata)
    barrier("the store is there")
    store = Store(Path(folder), metadata)
    todo = np.isin(np.arange(metadata.num_shards), store.missing_shards())
    missing = np.flatnonzero(agreed(todo)).tolist()
    decode = partial(_decode, model, encoder, problems, config.num_prompts, block_size, size)
    stops = Agreement()
    with _shown(store, missing) as advance:
        for start in range(0, len(missing), groups):
            wave = missing[start : start + groups]
            work = [_batches(metadata.records(shard), config, size) for shard in wave]
            found: list[Record] = []
            for number, temperature in enumerate(config.temperatures):
                # All processes decode together, as often as the group with the most batches has to.
                of_group = [batches[number] for batches in work]
                for turn in range(max(map(len, of_group))):
                    turns = [batches[turn] if turn < len(batches) else [] for batches in of_group]
                    own = turns[group] if group < len(wave) else []
                    if stops(preemption.received()):
                        raise preemption.Preempted
                    found += decode(own or next(filter(None, turns)), temperature)[: len(own)]
                    advance(sum(map(len, turns)))
            if writes and group < len(wave):
                store.write_shard(wave[group], found)
        barrier("all shards are written")
    if is_main():
        store.finish()
    barrier("the store is finished")
    return store


def _batches(indices: range, config: CollectConfig, size: int) -> list[list[list[int]]]:
    """Consecutive records in batches that do not mix temperatures: [temperature][batch][record]."""
    found = []
    for number in range(len(config.temperatures)):
        of_temperature = [i for i in indices if i // config.num_prompts == number]
        found.append([of_temperature[start : start + size] for start in range(0, len(of_temperature), size)])
    return found


def _decode(
    model: Transformer,
    encoder: Encoder,
    problems: Problems,
    num_prompts: int,
    block_size: int,
    size: int,
    indices: list[int],
    temperature: float,
) -> list[Record]:
    """This group's rows of one batch, all of one temperature; filled up to `size` so that one program serves all."""
    named = [problems[index % num_prompts] for index in indices]
    prompts, lengths = encoder.prompts([problem.prompt for _, problem in named])
    rows = np.minimum(np.arange(size), len(indices) - 1)
    prompt, prompt_length, index = place((prompts[rows], lengths[rows], np.asarray(indices, np.int32)[rows]))
    found = trajectories(
        model,
        prompt,
        prompt_length,
        gen_length=encoder.gen_length,
        block_size=block_size,
        temperature=temperature,
        keys=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(problems.seed), index),
    )
    tokens, order, hidden = map(local_rows, found)
    return [
        {
            "prompt": prompts[row],
            "prompt_length": lengths[row],
            "tokens": tokens[row],
            "order": order[row],
            "hidden": hidden[row].astype(ml_dtypes.bfloat16),
            "answer": encoder.answer(problem.answer),
            "temperature": np.float32(temperature),
            "prompt_id": np.int64(index % num_prompts),
            "task": np.int32(problems.names.index(name)),
        }
        for row, (index, (name, problem)) in enumerate(zip(indices, named, strict=True))
    ]


@contextlib.contextmanager
def _shown(store: Store, missing: list[int]) -> Iterator[Callable[[int], None]]:
    """Says how much disk the rest may need, then how far it is; gives what to call with the number of records done."""
    metadata, left = store.metadata, sum(len(store.metadata.records(shard)) for shard in missing)
    if is_main() and missing:
        need = sum(bytes_per_shard(metadata, shard) for shard in missing)
        print(f"{left:,} trajectories to collect: at most {need / 2**20:,.0f} MiB of disk in {store.folder}")
    done, begin = 0, time.perf_counter()
    with progress("trajectories", metadata.num_records, done=metadata.num_records - left) as bar:

        def advance(records: int) -> None:
            nonlocal done
            done += records
            speed = done * metadata.gen_length / (time.perf_counter() - begin)
            bar.advance(records, f"{speed:,.0f} tokens/s")

        yield advance
