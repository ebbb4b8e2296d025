"""The exact KV cache: slot j of a row holds the keys and values of that row's position j."""

import dataclasses

import jax
import jax.numpy as jnp

from cdlm_jax.config import ModelConfig
from cdlm_jax.kernels.block_attention.cache_write import sharded_cache_write, writes_in_place
from cdlm_jax.mesh import sharding

# Into [layers, rows, slots, ...] at (layer, slot) of each row. With rows as a batching dimension the write stays on the
# device that holds the row, which `.at[layer, rows, slots]` leaves open.
_BY_ROW = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3),
    inserted_window_dims=(0, 2),
    scatter_dims_to_operand_dims=(0, 2),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (rotated) and values of every layer.

    k, v: [layers, rows, slots, kv_heads, head_dim]; length: [rows] int32, the committed slots of each row. Slots at or
    past `length` are scratch: a refine writes its block there and the next forward overwrites it; the visibility
    rule keeps everybody else from reading them.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array

    @classmethod
    def create(cls, config: ModelConfig, rows: int, slots: int, dtype) -> "KVCache":
        shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_dim)
        axes = ("layers", "rows", "length", "kv_heads", None)
        empty = sharding.put(jnp.zeros(shape, dtype), *axes, kv_heads=config.num_kv_heads)
        return cls(empty, empty, sharding.by_rows(jnp.zeros(rows, jnp.int32)))

    def write(self, layer: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> "KVCache":
        """Put k, v [rows, Q, kv_heads, head_dim] of one layer at slots [rows, Q]; slots out of range are dropped."""
        if writes_in_place(self.k, slots.shape[1]):
            k, v = sharded_cache_write(self.k, self.v, k, v, layer=layer, slots=slots)
            return dataclasses.replace(self, k=k, v=v)
        at = jnp.stack([jnp.full_like(slots, layer), slots], axis=-1)  # [rows, Q, 2]
        return dataclasses.replace(
            self,
            k=jax.lax.scatter(self.k, at, k.astype(self.k.dtype), _BY_ROW, mode="drop"),
            v=jax.lax.scatter(self.v, at, v.astype(self.v.dtype), _BY_ROW, mode="drop"),
        )

    def commit(self, length: jax.Array) -> "KVCache":
        """Declare the slots before `length` [rows] final."""
        return dataclasses.replace(self, length=length.astype(jnp.int32))
