"""What a training step reads: batches of problems, or of stored trajectories shuffled alike in every process."""

from collections.abc import Sequence

import grain
import numpy as np

from cdlm_jax.config import InputError
from cdlm_jax.mesh.distributed import own_rows
from cdlm_jax.tasks.mixture import ProblemMixture
from cdlm_jax.text.encoder import Encoder
from cdlm_jax.trajectories.store import Trajectories

FIELDS = ("prompt", "prompt_length", "tokens", "order", "hidden", "answer")  # those that the losses read


def trajectory_batches(
    stores: Sequence[Trajectories], batch_size: int, seed: int, *, weights: Sequence[float] = ()
) -> grain.IterDataset:
    """Endless batches of this process's rows of `batch_size`: {field: [own rows, ...]}, for `sharding.place`.

    Only numbers of records are shuffled, mixed (by `weights`, equal ones if empty) and batched, alike in every process;
    each then reads the records of its own rows. So the batches do not depend on how many processes there are, nor does
    the iterator's state. InputError for unusable weights, or fewer records than a batch has.
    """
    if (total := sum(map(len, stores))) < batch_size:
        folders = ", ".join(str(store.folder) for store in stores)
        raise InputError(f"batch_size {batch_size} exceeds the {total} records of {folders}")
    weights = weights or [1.0] * len(stores)
    if not all(0 < weight < np.inf for weight in weights):
        raise InputError(f"store_weights must be positive and finite, got {tuple(weights)}")
    mine = own_rows(batch_size)

    def numbers(place: int) -> grain.MapDataset:
        """[store, record] of every record of a store, endlessly, in an order of each epoch's own."""
        dataset = grain.MapDataset.range(len(stores[place])).seed(seed + place).shuffle().repeat()
        return dataset.map(lambda record: np.array([place, record]))

    def read(batch: np.ndarray) -> dict[str, np.ndarray]:
        records = [stores[place][record] for place, record in batch[mine].tolist()]
        return {name: np.stack([record[name] for record in records]) for name in FIELDS}

    places = [numbers(place) for place in range(len(stores))]
    mixed = places[0] if len(places) == 1 else grain.MapDataset.mix(places, weights)
    batches = mixed.batch(batch_size, drop_remainder=True).map(read)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def problem_batches(mixture: ProblemMixture, encoder: Encoder, batch_size: int) -> grain.IterDataset:
    """Batches {prompt [own rows, P_max], prompt_length [own rows], answer [own rows, L]} of this process's rows of
    `batch_size`, in the mixture's order; the iterator's state can be saved."""
    mine = own_rows(batch_size)

    def encode(indices: np.ndarray) -> dict[str, np.ndarray]:
        problems = [mixture[index][1] for index in indices[mine]]
        prompt, prompt_length = encoder.prompts([problem.prompt for problem in problems])
        answer = np.stack([encoder.answer(problem.answer) for problem in problems])
        return {"prompt": prompt, "prompt_length": prompt_length, "answer": answer}

    batches = grain.MapDataset.range(len(mixture)).batch(batch_size, drop_remainder=True).map(encode)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
