"""Attention over the residual."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llama_eqx.config import Config
from llama_eqx.dims import Dims
from llama_eqx.model.cache import KVCache
from llama_eqx.model.init import InitConfig
from llama_eqx.model.kernel import Window, attend
from llama_eqx.model.kernel.tokenwise import tokenwise
from llama_eqx.model.rotary import Rotation
from llama_eqx.tag import tag


class Attention(eqx.Module):
    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        rotation: Rotation,
        segment_ids: Int[Array, "batch seq"] | None,
        cache: KVCache | None,
    ) -> tuple[Float[Array, "batch seq embed"], KVCache | None]:
        """Each token's attention output over itself and earlier tokens, and the cache with this call's tokens appended."""

    @abc.abstractmethod
    def init_cache(self, batch: int, slots: int, dtype: jnp.dtype | None) -> KVCache: ...

    def window(self, layer: Int[Array, ""] | int | None) -> Window | None:
        """How far back a token sees in a layer; None is to the first token of its segment. FLOPs are counted by it too."""
        return None


class AttentionConfig(Config):
    @abc.abstractmethod
    def build(self, dims: Dims, init: InitConfig, *, key: PRNGKeyArray) -> Attention: ...


QKV = tuple[Float[Array, "*tokens heads head_dim"], Float[Array, "*tokens kv_heads head_dim"], Float[Array, "*tokens kv_heads head_dim"]]


class RotaryAttention(Attention):
    """Softmax attention of rotated queries and keys, for weights in any layout."""

    @abc.abstractmethod
    def qkv(self, x: Float[Array, "*tokens embed"]) -> QKV:
        """Queries, keys and values of each token, not yet rotated."""

    @abc.abstractmethod
    def out(self, y: Float[Array, "batch seq heads head_dim"]) -> Float[Array, "batch seq embed"]: ...

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        rotation: Rotation,
        segment_ids: Int[Array, "batch seq"] | None,
        cache: KVCache | None,
    ) -> tuple[Float[Array, "batch seq embed"], KVCache | None]:
        y, cache = self.heads(x, rotation, segment_ids, cache)
        return tag(self.out(y), "attention_out"), cache

    def heads(
        self,
        x: Float[Array, "batch seq embed"],
        rotation: Rotation,
        segment_ids: Int[Array, "batch seq"] | None,
        cache: KVCache | None,
    ) -> tuple[Float[Array, "batch seq heads head_dim"], KVCache | None]:
        """What each head makes of the values, and the cache with this call's tokens appended."""
        q, k, v = self.qkv(x)
        q, k, v = tag(rotation(q), "q"), tag(rotation(k), "k"), tag(v, "v")
        if cache is None:
            return self.attend(q, k, v, rotation, 0, None if segment_ids is None else (segment_ids, segment_ids)), None
        own = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        start, cache = cache.length, cache.append(k, v, own)
        filled = cache.length if isinstance(start, int) else cache.keys.shape[1]
        k, v = cache.keys[:, :filled].astype(k.dtype), cache.values[:, :filled].astype(v.dtype)
        one_segment = segment_ids is None and filled == q.shape[1]
        return self.attend(q, k, v, rotation, start, None if one_segment else (own, cache.segment_ids[:, :filled])), cache

    def attend(
        self,
        q: Float[Array, "batch seq heads head_dim"],
        k: Float[Array, "batch slots kv_heads head_dim"],
        v: Float[Array, "batch slots kv_heads head_dim"],
        rotation: Rotation,
        start: Int[Array, ""] | int,
        segment_ids: tuple[Int[Array, "batch seq"], Int[Array, "batch slots"]] | None,
    ) -> Float[Array, "batch seq heads head_dim"]:
        """`kernel.attend`. A variant that attends otherwise overrides this; `rotation.layer` says in which layer."""
        return attend(q, k, v, start=start, segment_ids=segment_ids, window=self.window(rotation.layer))


class GroupedQueryAttention(RotaryAttention):
    """Heads in groups that share keys and values (Ainslie et al., 2023, arXiv 2305.13245).

    kv_heads = heads is multi-head attention, kv_heads = 1 is multi-query attention.
    """

    q_proj: Float[Array, "embed heads head_dim"]
    k_proj: Float[Array, "embed kv_heads head_dim"]
    v_proj: Float[Array, "embed kv_heads head_dim"]
    o_proj: Float[Array, "heads head_dim embed"]

    @tokenwise
    def qkv(self, x: Float[Array, "*tokens embed"]) -> QKV:
        q, k, v = (jnp.einsum("...d,dnh->...nh", x, weight) for weight in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    @tokenwise
    def out(self, y: Float[Array, "*tokens heads head_dim"]) -> Float[Array, "*tokens embed"]:
        return jnp.einsum("...nh,nhd->...d", y, self.o_proj)

    def init_cache(self, batch: int, slots: int, dtype: jnp.dtype | None) -> KVCache:
        _, kv_heads, head_dim = self.k_proj.shape
        return KVCache.empty(batch, slots, kv_heads, head_dim, self.k_proj.dtype if dtype is None else dtype)


class GroupedQueryAttentionConfig(AttentionConfig):
    def build(self, dims: Dims, init: InitConfig, *, key: PRNGKeyArray) -> GroupedQueryAttention:
        return GroupedQueryAttention(
            q_proj=init.matrix(GroupedQueryAttention, "q_proj", dims, fan_in="embed", key=key),
            k_proj=init.matrix(GroupedQueryAttention, "k_proj", dims, fan_in="embed", key=key),
            v_proj=init.matrix(GroupedQueryAttention, "v_proj", dims, fan_in="embed", key=key),
            o_proj=init.matrix(GroupedQueryAttention, "o_proj", dims, fan_in="heads head_dim", key=key),
        )
