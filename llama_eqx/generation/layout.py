"""A model laid out for decoding, where each token reads all weights once: a policy on the tree.

Blocks are a tuple: XLA copies a slice of stacked weights before it multiplies with it. Queries, keys and values share one product, gate and
up another. Every weight has the axis that is summed over last, which is how processors like to read it for few tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Integer

from llama_eqx.model.attention import QKV, GroupedQueryAttention, RotaryAttention
from llama_eqx.model.cache import KVCache
from llama_eqx.model.feed_forward import FeedForward, GatedFeedForward
from llama_eqx.model.llama import Llama


def for_decoding(model: Llama) -> Llama:
    """The same function of the same arguments, laid out for decoding. Slots of unknown kinds stay as they are, unstacked.

    The result holds a copy of all weights: drop `model` where memory is short.
    """
    return model if isinstance(model.blocks, tuple) else _laid_out(model)


@eqx.filter_jit
def _laid_out(model: Llama) -> Llama:
    layers = range(model.config.dims.layers)
    blocks = tuple(_packed(jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks)) for i in layers)
    head = Head(table=model.unembed.T)
    return eqx.tree_at(lambda m: (m.blocks, m.lm_head), model, (blocks, head), is_leaf=lambda x: x is None)


def in_int8(model: Llama) -> Llama:
    """The laid-out model with its products and its head in 8 bits; the embedding and the norms stay as they are."""
    weights = (PackedAttention, ("qkv_proj", "o_proj")), (PackedFeedForward, ("gate_up_proj", "down_proj")), (Head, ("table",))

    def quantised(node: Any) -> Any:
        names = next(names for kind, names in weights if isinstance(node, kind))
        return eqx.tree_at(lambda n: [getattr(n, name) for name in names], node, [Int8.of(getattr(node, name)) for name in names])

    kinds = tuple(kind for kind, _ in weights)
    return jax.tree.map(lambda n: quantised(n) if isinstance(n, kinds) else n, model, is_leaf=lambda n: isinstance(n, kinds))


def unpacked(model: Llama) -> list[str]:
    """The classes in the blocks of a laid-out model that this module does not know: `in_int8` too leaves them as they are."""
    parts = [getattr(block, slot, None) for block in model.blocks for slot in ("attention", "feed_forward")]  # pyright: ignore
    return sorted({type(part).__name__ for part in parts if part and not isinstance(part, PackedAttention | PackedFeedForward)})


def _packed(block: eqx.Module) -> eqx.Module:
    attention, feed_forward = getattr(block, "attention", None), getattr(block, "feed_forward", None)
    if type(attention) is GroupedQueryAttention:
        block = eqx.tree_at(lambda b: b.attention, block, PackedAttention.of(attention))
    if type(feed_forward) is GatedFeedForward:
        block = eqx.tree_at(lambda b: b.feed_forward, block, PackedFeedForward.of(feed_forward))
    return block


class Int8(eqx.Module):
    """A weight in 8 bits, with one factor per row of its last axis: absmax quantisation (Dettmers et al., 2022, arXiv 2208.07339)."""

    values: Integer[Array, "*out last"]
    scale: Float[Array, "*out"]

    @staticmethod
    def of(weight: Float[Array, "*out last"]) -> "Int8":
        """Steps are counted in float32: of 127 and a half, 16-bit numbers may make 128."""
        scale = jnp.max(jnp.abs(weight), axis=-1) / 127
        steps = weight.astype(jnp.float32) / jnp.maximum(scale.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)[..., None]
        return Int8(values=jnp.clip(jnp.round(steps), -127, 127).astype(jnp.int8), scale=scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of what it is multiplied with."""
        return self.scale.dtype


def product(x: Float[Array, "batch seq last"], weight: Any, dtype: DTypeLike | None = None) -> Array:
    """Sums over the last axis of both; the result is "batch seq *out".

    On CPUs the weight is the left factor for several tokens: the other order is up to twice as slow there. Elsewhere it is the right one,
    so that the outputs of a token are beside each other in memory, where the kernels after it read them. The weight is always reshaped to
    a matrix, since XLA copies one of more axes before it multiplies with it.
    """
    if isinstance(weight, Int8):
        y = product(x, weight.values.astype(x.dtype), dtype)
        return y * weight.scale.astype(y.dtype)
    y = _sums(x, weight.reshape(-1, weight.shape[-1]), dtype)
    return y.reshape(*x.shape[:2], *weight.shape[:-1])


@functools.partial(jax.jit, static_argnames="dtype", inline=True)  # traced once for all layers
def _sums(x: Float[Array, "batch seq last"], matrix: Float[Array, "out last"], dtype: DTypeLike | None) -> Float[Array, "batch seq out"]:
    times = functools.partial(jnp.tensordot, axes=(-1, -1), preferred_element_type=dtype)
    if x.shape[0] * x.shape[1] == 1:
        return times(x, matrix)
    return jax.lax.platform_dependent(x, matrix, cpu=lambda x, matrix: jnp.moveaxis(times(matrix, x), 0, -1), default=times)


class PackedAttention(RotaryAttention):
    """`GroupedQueryAttention` with one product, for the queries, key and value of every key head, in that order."""

    qkv_proj: Float[Array, "kv_heads packed head_dim embed"]
    o_proj: Float[Array, "embed joined"]  # heads and head_dim in one

    @staticmethod
    def of(attention: GroupedQueryAttention) -> "PackedAttention":
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
        packed = jnp.concatenate([q, k[:, :, None], v[:, :, None]], axis=2)
        return PackedAttention(qkv_proj=packed.transpose(1, 2, 3, 0), o_proj=attention.o_proj.reshape(-1, q.shape[0]).T)

    def qkv(self, x: Float[Array, "batch seq embed"]) -> QKV:
        qkv = product(x, self.qkv_proj)
        return qkv[..., :-2, :].reshape(*x.shape[:2], -1, qkv.shape[-1]), qkv[..., -2, :], qkv[..., -1, :]

    def out(self, y: Float[Array, "batch seq heads head_dim"]) -> Float[Array, "batch seq embed"]:
        return product(y.reshape(*y.shape[:2], -1), self.o_proj)

    def init_cache(self, batch: int, slots: int, dtype: jnp.dtype | None) -> KVCache:
        kv_heads, _, head_dim, _ = self.qkv_proj.shape
        return KVCache.empty(batch, slots, kv_heads, head_dim, self.qkv_proj.dtype if dtype is None else dtype)


class PackedFeedForward(FeedForward):
    """`GatedFeedForward` with one product for gate and up."""

    gate_up_proj: Float[Array, "mlp 2 embed"]  # so that a device with a part of mlp has both of a row
    down_proj: Float[Array, "embed mlp"]
    activation: Callable[[Array], Array] = eqx.field(static=True)

    @staticmethod
    def of(feed_forward: GatedFeedForward) -> "PackedFeedForward":
        gate_up = jnp.stack([feed_forward.gate_proj.T, feed_forward.up_proj.T], axis=1)
        return PackedFeedForward(gate_up_proj=gate_up, down_proj=feed_forward.down_proj.T, activation=feed_forward.activation)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        gate_up = product(x, self.gate_up_proj)
        return product(self.activation(gate_up[..., 0]) * gate_up[..., 1], self.down_proj)


class Head(eqx.Module):
    """Logits in float32, from a table with the axis order of the embedding."""

    table: Float[Array, "vocab embed"]

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float32[Array, "batch seq vocab"]:
        return product(x, self.table, jnp.float32)
