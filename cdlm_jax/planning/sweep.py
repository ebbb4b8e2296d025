"""Other meshes and batches for the same stage."""

import dataclasses
from collections.abc import Iterator

import jax

from cdlm_jax.config import InputError
from cdlm_jax.mesh.sharding import MeshConfig
from cdlm_jax.models.hf import abstract
from cdlm_jax.planning.report import Plan, plan
from cdlm_jax.planning.topology import Topology
from cdlm_jax.recipes.recipe import Recipe

TENSOR = (1, 2, 4, 8)
DATA = (1, 2, 4, 8, 16, 32, 64)
ROWS = {"distill": (1, 2, 4, 8), "collect": (1, 4, 16), "generate": (1, 4, 16)}  # of a forward pass, per device


def candidates(recipe: Recipe, topology: Topology, stage: str) -> Iterator[Recipe]:
    """The recipe on every mesh whose share of the weights leaves room, and with several batches.

    A training step keeps its number of rows: they are taken in more or fewer parts (`accumulate`).
    """
    assert recipe.architecture is not None, "`stage` refuses a recipe without one"
    count = len(topology.devices)
    model = abstract(recipe.architecture, recipe.dtype or "float32")
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))
    for tensor in TENSOR:
        for data in (size for size in DATA if count % (size * tensor) == 0):
            mesh = MeshConfig(data=data, fsdp=count // (data * tensor), tensor=tensor)
            if weights / (mesh.fsdp * tensor) > topology.chip.hbm_bytes:
                continue
            for rows in ROWS[stage]:
                batch = rows * data * mesh.fsdp
                if stage != "distill":
                    yield dataclasses.replace(
                        recipe, mesh=mesh, collect=dataclasses.replace(recipe.collect, batch_size=batch)
                    )
                elif recipe.distill.batch_size % batch == 0:
                    accumulate = recipe.distill.batch_size // batch
                    distill = dataclasses.replace(recipe.distill, accumulate=accumulate)
                    yield dataclasses.replace(recipe, mesh=mesh, distill=distill)


def sweep(recipe: Recipe, topology: Topology, stage: str) -> Iterator[Plan]:
    """The plans of all candidates whose mesh suits the model, each as soon as it is compiled."""
    for candidate in candidates(recipe, topology, stage):
        try:
            yield plan(candidate, topology, stage)
        except InputError:  # sizes that this mesh does not divide
            continue
