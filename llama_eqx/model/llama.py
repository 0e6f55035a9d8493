"""The whole model: an embedding, a stack of blocks, a norm and a head."""

from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from llama_eqx.config import Config
from llama_eqx.dims import Dims
from llama_eqx.errors import ConfigError
from llama_eqx.model.attention import AttentionConfig
from llama_eqx.model.block import Block, BlockConfig
from llama_eqx.model.cache import KVCache, require_room, tokens_in
from llama_eqx.model.dropout import dropout
from llama_eqx.model.feed_forward import FeedForwardConfig
from llama_eqx.model.init import InitConfig, named
from llama_eqx.model.norm import Norm, NormConfig
from llama_eqx.model.rotary import Rotary, RotaryConfig
from llama_eqx.tag import scan_layers, tag


class Llama(eqx.Module):
    """A decoder-only language model (Touvron et al., 2023, arXiv 2302.13971 and 2307.09288; Llama 3, 2024, arXiv 2407.21783).

    `blocks` is one block whose arrays have a leading axis "layers". A scan folds over it, so a deep model compiles as fast as a shallow
    one. `lm_head` is None when the embedding table also serves as the head.

    Policies and decoding replace these fields, and the same forward pass runs with the replacements. In the loss, `embed` is a
    `precision.Lookup` and `blocks` a `wrapped.Wrapped`; in decoding, `blocks` is a tuple and `lm_head` a `generation.layout.Head`.
    """

    embed: Float[Array, "vocab embed"]
    blocks: Annotated[Block, "layers"]
    final_norm: Norm
    lm_head: Float[Array, "embed vocab"] | None
    rotary: Rotary
    config: "LlamaConfig" = eqx.field(static=True)

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float32[Array, "batch seq vocab"]:
        """Logits of the token that follows each token. See `hidden` for the arguments and errors."""
        x, _ = self.hidden(tokens, positions=positions, segment_ids=segment_ids, key=key)
        return self.head(x)

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        cache: Annotated[KVCache, "layers"] | tuple[KVCache, ...] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Annotated[KVCache, "layers"] | tuple[KVCache, ...] | None]:
        """The normalised residual after the last block, and the cache with these tokens appended.

        This is the only forward pass: it trains without a cache, and prefills or decodes with one. Tokens attend only within their
        segment; segment 0 is padding. `positions` default to 0, 1, 2 … (with a cache, starting at its length). No key, no dropout.
        Ids are not checked: JAX takes one beyond the vocabulary for its last id, and counts a negative one from the end.

        Raises `ConfigError` for tokens that are not an array of two axes, and when the cache has too few slots, as far as this is known at
        trace time, or is of the other layout.
        """
        require_tokens(tokens)
        if cache is not None:
            if isinstance(cache, tuple) != isinstance(self.blocks, tuple):  # one is laid out for decoding
                what = f"this cache is {'' if isinstance(cache, tuple) else 'not '}laid out for decoding, unlike the model"
                raise ConfigError(what, where="cache", next="model.init_cache(batch, slots) of this model")
            require_room(cache, tokens.shape[1])
        if positions is None:
            start = 0 if cache is None else tokens_in(cache)
            positions = start + jnp.arange(tokens.shape[1])[None]
        rate = self.config.dropout
        x = tag(dropout(self.embed[tokens], rate, None if key is None else named(key, "embed")), "residual")
        block_keys = None if key is None else named(key, "blocks")
        rotation = self.rotary(positions)

        def fold(carry, each):
            # The stacked cache is carried and indexed by layer: as an input and output of the scan it would be copied whole.
            (x, caches), (block, layer) = carry, each
            cache = jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, layer, keepdims=False), caches)
            layer_key = None if block_keys is None else jax.random.fold_in(block_keys, layer)
            x, cache = block(x, rotation.in_layer(layer), segment_ids, cache, layer_key)
            caches = jax.tree.map(lambda c, new: jax.lax.dynamic_update_index_in_dim(c, new, layer, axis=0), caches, cache)
            return (x, caches), None

        blocks: Any = self.blocks
        if isinstance(blocks, tuple):  # laid out for decoding: the caches are in a tuple too
            caches: list[KVCache] = []
            given: Any = (None,) * len(blocks) if cache is None else cache
            for layer, (block, held) in enumerate(zip(blocks, given, strict=True)):
                layer_key = None if block_keys is None else jax.random.fold_in(block_keys, layer)
                x, held = block(x, rotation.in_layer(layer), segment_ids, held, layer_key)
                caches.append(held)
            return self.final_norm(x), None if cache is None else tuple(caches)
        unroll = getattr(self.blocks, "unroll", 1)  # set on blocks that a policy has wrapped
        x, cache = scan_layers(fold, (x, cache), (self.blocks, jnp.arange(self.config.dims.layers)), unroll)
        return self.final_norm(x), cache

    def head(self, x: Float[Array, "batch seq embed"]) -> Float32[Array, "batch seq vocab"]:
        """Logits of `hidden`'s residual, in float32 whatever the dtype of the weights."""
        if callable(self.lm_head):  # laid out for decoding
            return self.logits(self.lm_head(x))
        return self.logits(jnp.einsum("bsd,dv->bsv", x, self.unembed, preferred_element_type=jnp.float32))

    def logits(self, products: Float32[Array, "*tokens vocab"]) -> Float32[Array, "*tokens vocab"]:
        """What the products of `hidden`'s residual with `unembed` are as logits: unchanged.

        A derived class may map each product by itself, without parameters, such as Gemma 2's 30 tanh(product / 30). Losses and scores do
        not call `head`, but this, on some tokens and a part of the vocabulary at a time.
        """
        return products

    @property
    def unembed(self) -> Float[Array, "embed vocab"]:
        """The matrix that `head` multiplies by."""
        return self.embed.T if self.lm_head is None else self.lm_head

    def init_cache(self, batch: int, slots: int, dtype: jnp.dtype | None = None) -> Annotated[KVCache, "layers"] | tuple[KVCache, ...]:
        """An empty cache of `slots` tokens per row, in the dtype of the weights unless another is given."""
        if isinstance(self.blocks, tuple):
            return tuple(block.attention.init_cache(batch, slots, dtype) for block in self.blocks)
        return eqx.filter_vmap(lambda block: block.attention.init_cache(batch, slots, dtype))(self.blocks)


def require_tokens(tokens: Any) -> None:
    """Raises `ConfigError` for anything but an array of two axes."""
    if getattr(tokens, "ndim", None) != 2:
        found = f"an array of shape {tokens.shape}" if hasattr(tokens, "shape") else type(tokens).__name__
        raise ConfigError(f"tokens are an array [batch, seq], and not {found}", where="tokens", next="jnp.asarray([[1, 2, 3]])")


class SpecialTokens(Config):
    """BOS, EOS and padding ids and the tokenizer family. A run fills in those that are left empty, from its tokenizer; `build` does not.

    The forward pass never reads them; they are exported with the model.
    """

    tokenizer: Literal["sentencepiece", "tiktoken"] | None
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None


class LlamaConfig(Config):
    """A model: its sizes and the component in each slot. `context` is the length it was (or is to be) trained for."""

    dims: Dims
    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    norm: NormConfig
    rotary: RotaryConfig
    block: BlockConfig
    init: InitConfig
    dropout: float
    tied: bool
    context: int
    tokens: SpecialTokens

    def check(self) -> None:
        self.within(1, 2**31, "context")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{self.dropout} is not at least 0 and below 1", where="dropout")

    def build(self, *, key: PRNGKeyArray) -> Llama:
        """A model with fresh float32 parameters. Under `eqx.filter_eval_shape` it allocates nothing, whatever its size."""

        def block(layer: Int[Array, ""]) -> Block:
            return self.block.build(
                self.dims,
                self.init,
                self.attention,
                self.feed_forward,
                self.norm,
                key=jax.random.fold_in(named(key, "blocks"), layer),
            )

        return Llama(
            embed=self.init.matrix(Llama, "embed", self.dims, fan_in="embed", key=key),
            blocks=eqx.filter_vmap(block)(jnp.arange(self.dims.layers)),
            final_norm=self.norm.build(self.dims),
            lm_head=None if self.tied else self.init.matrix(Llama, "lm_head", self.dims, fan_in="embed", key=key),
            rotary=self.rotary.build(self.dims),
            config=self,
        )


def build_model(config: LlamaConfig, *, key: PRNGKeyArray) -> Llama:
    """`config.build` compiled: a model with fresh float32 parameters on the default device.

    Raises `ConfigError` for the config of a run, which has that of a model.
    """
    if isinstance(getattr(config, "model", None), LlamaConfig):
        raise ConfigError("this is the config of a run", where="config", next="build_model(config.model, key=jax.random.key(0))")
    return _built(config, key)


@eqx.filter_jit
def _built(config: LlamaConfig, key: PRNGKeyArray) -> Llama:
    return config.build(key=key)
