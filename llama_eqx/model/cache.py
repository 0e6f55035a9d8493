"""The key-value cache of attention during generation."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from llama_eqx.errors import ConfigError


class KVCache(eqx.Module):
    """Keys and values of the tokens seen so far, in slots 0 … length - 1 of a fixed number.

    Slots past `length` are never seen. Appending past the last slot would silently overwrite earlier tokens: see `require_room`.
    If `length` is a Python int, it is known at trace time, and attention reads no slot past it: see `emptied`.
    """

    keys: Float[Array, "batch slots kv_heads head_dim"]
    values: Float[Array, "batch slots kv_heads head_dim"]
    segment_ids: Int[Array, "batch slots"]
    length: Int[Array, ""] | int

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
        keys, values = (jnp.zeros((batch, slots, kv_heads, head_dim), dtype) for _ in range(2))  # two buffers, each to be donated
        return KVCache(keys=keys, values=values, segment_ids=jnp.zeros((batch, slots), jnp.int32), length=jnp.zeros((), jnp.int32))


# `caches` are those of all layers, stacked or in a tuple.


def slots_of(caches: Any) -> int:
    return jax.tree.leaves(caches, is_leaf=lambda node: isinstance(node, KVCache))[0].keys.shape[-3]


def tokens_in(caches: Any) -> Int[Array, ""] | int:
    length = jax.tree.leaves(caches, is_leaf=lambda node: isinstance(node, KVCache))[0].length
    return length if isinstance(length, int) else length.reshape(-1)[0]


def require_room(caches: Any, tokens: int) -> None:
    """Raises `ConfigError` when the caches have no room for `tokens` more.

    Where the number of tokens already there is traced, only those of this call are counted.
    """
    slots, filled = slots_of(caches), tokens_in(caches)
    there = 0 if isinstance(filled, Tracer) else int(filled)
    if there + tokens > slots:
        raise ConfigError(
            f"{f'{there} and ' if there else ''}{tokens} tokens do not fit into a cache of {slots} slots",
            where="cache",
            next="model.init_cache(batch, slots) with as many slots as there will be tokens",
        )


def with_slots(caches: Any, slots: int) -> Any:
    """The caches with `slots` slots: the old ones first, then empty ones."""
    grow = lambda x, axis: jnp.pad(x, [(0, slots - x.shape[axis] if i == x.ndim + axis else 0) for i in range(x.ndim)])  # noqa: E731
    return _each(caches, keys=lambda x: grow(x, -3), values=lambda x: grow(x, -3), segment_ids=lambda x: grow(x, -1))


def with_rows(caches: Any, rows: Int[Array, " rows"]) -> Any:
    """The caches of these rows of the batch, in this order."""
    take = lambda x: jnp.take(x, rows, axis=-4)  # noqa: E731
    return _each(caches, keys=take, values=take, segment_ids=lambda x: jnp.take(x, rows, axis=-2))


def with_length(caches: Any, length: Int[Array, ""] | int) -> Any:
    """The caches with their first `length` tokens only."""
    return _each(caches, length=lambda x: jnp.full(jnp.shape(x), length, jnp.int32))


def emptied(caches: Any) -> Any:
    """The caches without tokens. Their length is then known at trace time, unless they are stacked for a scan over layers."""
    return _each(caches, length=lambda x: 0) if isinstance(caches, tuple) else with_length(caches, 0)


def is_empty(caches: Any) -> bool:
    """Whether the caches are known to be empty at trace time: see `emptied`."""
    length = tokens_in(caches)
    return isinstance(length, int) and length == 0


def with_segments(caches: Any, segment_ids: Int[Array, "batch seq"]) -> Any:
    """The caches with these segment ids for the first tokens of each row."""
    return _each(caches, segment_ids=lambda x: x.at[..., : segment_ids.shape[1]].set(segment_ids))


def _each(caches: Any, **changes: Any) -> Any:
    def changed(cache: KVCache) -> KVCache:
        where = lambda c: [getattr(c, name) for name in changes]  # noqa: E731
        return eqx.tree_at(where, cache, [change(getattr(cache, name)) for name, change in changes.items()])

    return jax.tree.map(changed, caches, is_leaf=lambda node: isinstance(node, KVCache))
