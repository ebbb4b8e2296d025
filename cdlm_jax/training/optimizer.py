"""Optimizers: AdamW (the default of every published recipe) and Muon, with warm-up, cosine decay and clipping."""

import dataclasses
from typing import Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from cdlm_jax.config import InputError
from cdlm_jax.mesh.sharding import mesh_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """`learning_rate` is the peak: warm-up rises to it from 0, a cosine falls from it to 0.

    Muon takes it for the matrices of layers, the only ones that it decays; Adam takes the rest, at `adam_ratio` of it.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-5
    adam_ratio: float = 0.3
    warmup_fraction: float = 0.05
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.95
    clip: float = 1.0

    def __post_init__(self):
        if self.name not in ("adamw", "muon"):
            raise InputError(f"optimizer.name {self.name!r} is unknown, allowed: adamw, muon")
        if not self.learning_rate > 0:
            raise InputError(f"optimizer.learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.warmup_fraction < 1:
            raise InputError(f"optimizer.warmup_fraction must be in [0, 1), got {self.warmup_fraction}")


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of `steps` updates."""

    def schedule(scale: float) -> optax.Schedule:
        peak = config.learning_rate * scale
        warmup = max(1, round(config.warmup_fraction * steps))
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))

    if config.name == "muon":
        update = muon(
            schedule(1.0),
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_learning_rate=schedule(config.adam_ratio),
            muon_weight_dimension_numbers=_stacked_matrices,
        )
        update = _cut_by_the_compiler(update)
    else:
        update = optax.adamw(schedule(1.0), config.b1, config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), update)


def _stacked_matrices(params):
    """Muon orthogonalizes the matrices of stacked layers [layers, in, out]; embeddings, head, norms are Adam's."""
    return jax.tree.map(lambda x: MuonDimensionNumbers(1, 2) if x.ndim == 3 else None, params)


def _cut_by_the_compiler(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """On a mesh, the compiler chooses the shardings inside of an update; its results lie as what it was given.

    Muon multiplies matrices by their own transposes: with Explicit axes, Optax would have to name a sharding for each
    product.
    """

    def update(updates, state, params=None):
        if not mesh_sizes():
            return optimizer.update(updates, state, params)
        lie = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        return jax.sharding.auto_axes(optimizer.update, out_sharding=lie)(updates, state, params)

    return optimizer._replace(update=update)
