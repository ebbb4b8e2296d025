"""The exact KV cache: slot j of a row holds the keys and values of that row's position j."""

import dataclasses

import jax
import jax.numpy as jnp

from cdlm_jax.config import ModelConfig


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
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(rows, jnp.int32))

    def write(self, layer: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> "KVCache":
        """Put k, v [rows, Q, kv_heads, head_dim] of one layer at slots [rows, Q]; slots out of range are dropped."""
        at = (layer, jnp.arange(slots.shape[0])[:, None], slots)
        return dataclasses.replace(
            self,
            k=self.k.at[at].set(k.astype(self.k.dtype), mode="drop"),
            v=self.v.at[at].set(v.astype(self.v.dtype), mode="drop"),
        )

    def commit(self, length: jax.Array) -> "KVCache":
        """Declare the slots before `length` [rows] final."""
        return dataclasses.replace(self, length=length.astype(jnp.int32))
