"""The memory of attention while it generates."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class KVCache(eqx.Module):
    """Keys and values of the tokens seen so far, in slots 0 … length - 1 of a fixed number.

    Slots past `length` hold zeros. Appending past the last slot would overwrite it silently: callers check the length.
    """

    keys: Float[Array, "batch cache kv_heads head_dim"]
    values: Float[Array, "batch cache kv_heads head_dim"]
    segment_ids: Int[Array, "batch cache"]
    length: Int[Array, ""]

    def append(
        self,
        keys: Float[Array, "batch seq kv_heads head_dim"],
        values: Float[Array, "batch seq kv_heads head_dim"],
        segment_ids: Int[Array, "batch seq"],
    ) -> "KVCache":
        def put(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), self.length, axis=1)

        return KVCache(
            keys=put(self.keys, keys),
            values=put(self.values, values),
            segment_ids=put(self.segment_ids, segment_ids),
            length=self.length + keys.shape[1],
        )

    @staticmethod
    def empty(batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> "KVCache":
        zeros = jnp.zeros((batch, slots, kv_heads, head_dim), dtype)
        return KVCache(keys=zeros, values=zeros, segment_ids=jnp.zeros((batch, slots), jnp.int32), length=jnp.zeros((), jnp.int32))
