"""Training checkpoints with Orbax: the train state, the data iterator's place, and the settings they belong to."""

import json
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from cdlm_jax.config import InputError, difference
from cdlm_jax.files import check_tree
from cdlm_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run, in `folder`. A half-written one is never read (Orbax renames into place).

    `settings` is whatever must be equal for a continuation to make sense (JSON-able); a folder of another run is
    refused by the names of the fields that differ. The last `keep` are kept, and those whose step is a multiple of
    `keep_every` (0: no others). In a cluster every process calls every method, with its own pieces of the same arrays.
    InputError if the folder holds what is no regular file: Orbax would wait for a pipe.
    """

    def __init__(self, folder: Path, settings: dict, *, keep: int = 2, keep_every: int = 0):
        self._settings = json.loads(json.dumps(settings))  # as they will be read back: tuples become lists
        check_tree(folder)
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        self._checkpointer = ocp.training.Checkpointer(
            Path(folder).absolute(),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """Of the latest whole checkpoint; waits for one that is being written."""
        self._checkpointer.wait()
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, iterator_state: dict) -> None:
        """Starts an asynchronous save; the arrays are copied before this returns.

        The iterator's state (JSON-able) is that of the first process: it must be equal in all.
        """
        place = {"settings": self._settings, "iterator": iterator_state}
        self._checkpointer.wait()  # while a save is under way, Orbax would skip the next one
        self._checkpointer.save_async(int(state.step), _tree(state), custom_metadata=place, overwrite=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict] | None:
        """The latest state, placed like `like`, and the data iterator's state; None where there is no checkpoint.

        The mesh of `like` may have another shape than the one that it was saved from. Its arrays give up their memory
        to those that are read. InputError for the checkpoint of another run, and for one that is damaged.
        """
        latest = self._checkpointer.latest
        if latest is None:
            return None
        try:
            place = self._checkpointer.metadata(latest.step).custom_metadata
            self._refuse_another_run(place["settings"])
            return self._read(latest.step, like), place["iterator"]
        except InputError:
            raise
        except Exception as error:  # of many kinds, whose messages are pages long
            path = self._checkpointer.directory / str(latest.step)
            found = f"the checkpoint {path} cannot be read ({type(error).__name__})"
            raise InputError(f"{found}; if it is damaged, remove it to continue from the one before") from error

    def _refuse_another_run(self, settings: dict) -> None:
        if different := difference(settings, self._settings):
            raise InputError(
                f"{self._checkpointer.directory} holds checkpoints of another run: {different}; "
                "use another work folder or remove this one"
            )

    def _read(self, step: int, like: TrainState) -> TrainState:
        names = _tree(like)  # in the state's own order, which the stored dict does not keep
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in names.items()}
        for array in names.values():
            array.delete()
        stored = self._checkpointer.load(step, shapes)
        return jax.tree.unflatten(jax.tree.structure(like), [stored[name] for name in names])

    def close(self) -> None:
        self._checkpointer.close()


def _tree(state: TrainState) -> dict[str, jax.Array]:
    """The state as a flat dict of arrays: what is stored does not depend on the classes of a library version."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(state)}
