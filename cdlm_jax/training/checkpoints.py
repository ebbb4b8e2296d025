"""Training checkpoints with Orbax: the train state, the data iterator's place, and the settings they belong to."""

import functools
import json
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from cdlm_jax.config import InputError
from cdlm_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run, in `folder`. A half-written one is never read (Orbax renames into place).

    `settings` is whatever must be equal for a continuation to make sense (JSON-able); a folder of another run is
    refused by the names of the fields that differ.
    """

    def __init__(self, folder: Path, settings: dict, *, keep: int = 2):
        self._settings = json.loads(json.dumps(settings))  # as they will be read back: tuples become lists
        keep_latest = ocp.training.preservation_policies.LatestN(n=keep)
        self._checkpointer = ocp.training.Checkpointer(
            Path(folder).absolute(), preservation_policy=keep_latest, cleanup_tmp_directories=True
        )

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, iterator_state: dict) -> None:
        """Starts an asynchronous save; the arrays are copied before this returns."""
        place = {"settings": self._settings, "iterator": iterator_state}
        self._checkpointer.wait()  # while a save is under way, Orbax would skip the next one
        self._checkpointer.save_async(int(state.step), _tree(state), custom_metadata=place, overwrite=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict] | None:
        """The latest state, placed like `like`, and the data iterator's state; None where there is no checkpoint."""
        latest = self._checkpointer.latest
        if latest is None:
            return None
        place = latest.custom_metadata or self._checkpointer.metadata(latest.step).custom_metadata
        theirs, ours = _flat(place["settings"]), _flat(self._settings)
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                raise InputError(
                    f"{self._checkpointer.directory} holds checkpoints of another run: {name} is {theirs.get(name)!r} "
                    f"there, {ours.get(name)!r} here; use another work folder or remove this one"
                )
        names = _tree(like)  # in the state's own order, which the stored dict does not keep
        stored = self._checkpointer.load(latest.step, names)
        return jax.tree.unflatten(jax.tree.structure(like), [stored[name] for name in names]), place["iterator"]

    def close(self) -> None:
        self._checkpointer.close()


def _flat(settings: dict) -> dict:
    """Nested settings by their dotted names."""
    path = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    leaves = jax.tree.leaves_with_path(settings, is_leaf=lambda value: not isinstance(value, dict))
    return {path(keys): value for keys, value in leaves}


def _tree(state: TrainState) -> dict[str, jax.Array]:
    """The state as a flat dict of arrays: what is stored does not depend on the classes of a library version."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(state)}
