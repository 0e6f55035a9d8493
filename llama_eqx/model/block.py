"""One layer: attention, then feed-forward, each added to the residual."""

import abc

import equinox as eqx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llama_eqx.config import Config
from llama_eqx.dims import Dims
from llama_eqx.model.attention import Attention, AttentionConfig
from llama_eqx.model.cache import KVCache
from llama_eqx.model.dropout import dropout
from llama_eqx.model.feed_forward import FeedForward, FeedForwardConfig
from llama_eqx.model.init import InitConfig, named
from llama_eqx.model.norm import Norm, NormConfig
from llama_eqx.model.rotary import Rotation
from llama_eqx.tag import tag


class Block(eqx.Module):
    attention: eqx.AbstractVar[Attention]

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        rotation: Rotation,
        segment_ids: Int[Array, "batch seq"] | None,
        cache: KVCache | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch seq embed"], KVCache | None]: ...


class BlockConfig(Config):
    @abc.abstractmethod
    def build(
        self,
        dims: Dims,
        init: InitConfig,
        attention: AttentionConfig,
        feed_forward: FeedForwardConfig,
        norm: NormConfig,
        *,
        key: PRNGKeyArray,
    ) -> Block: ...


class PreNormBlock(Block):
    """Each part reads the normalised residual and adds to the unnormalised one (Xiong et al., 2020, arXiv 2002.04745)."""

    attn_norm: Norm
    attention: Attention
    ffn_norm: Norm
    feed_forward: FeedForward
    dropout: float = eqx.field(static=True)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        rotation: Rotation,
        segment_ids: Int[Array, "batch seq"] | None,
        cache: KVCache | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch seq embed"], KVCache | None]:
        attention_key, feed_forward_key = (None if key is None else named(key, part) for part in ("attention", "feed_forward"))
        y, cache = self.attention(self.attn_norm(x), rotation, segment_ids, cache)
        x = tag(x + dropout(y, self.dropout, attention_key), "residual")
        y = self.feed_forward(self.ffn_norm(x))
        return tag(x + dropout(y, self.dropout, feed_forward_key), "residual"), cache


class PreNormBlockConfig(BlockConfig):
    dropout: float

    def build(
        self,
        dims: Dims,
        init: InitConfig,
        attention: AttentionConfig,
        feed_forward: FeedForwardConfig,
        norm: NormConfig,
        *,
        key: PRNGKeyArray,
    ) -> PreNormBlock:
        return PreNormBlock(
            attn_norm=norm.build(dims),
            attention=attention.build(dims, init, key=named(key, "attention")),
            ffn_norm=norm.build(dims),
            feed_forward=feed_forward.build(dims, init, key=named(key, "feed_forward")),
            dropout=self.dropout,
        )
