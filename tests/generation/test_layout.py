"""The model laid out for decoding computes what the model does."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_eqx import build_model
from llama_eqx.errors import ConfigError
from llama_eqx.generation.decode import generate_tokens
from llama_eqx.generation.layout import Int8, PackedAttention, PackedFeedForward, for_decoding, in_int8, product, unpacked
from llama_eqx.model.cache import tokens_in
from llama_eqx.precision import cast

PROMPTS = [[5, 6, 7, 8, 9], [3], [60, 2, 33]]


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(
    scope="module", params=["model.tied=false", "model.tied=true model.dims.kv_heads=1 model/feed_forward=plain model/norm=layer"]
)
def models(request, tiny):
    model = build_model(tiny(*request.param.split()), key=jax.random.key(0))
    return model, for_decoding(model)


def test_the_same_logits(models):
    model, laid_out = models
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)
    np.testing.assert_allclose(laid_out(tokens), model(tokens), atol=1e-5)
    cache, parts = laid_out.init_cache(2, 15), []
    for piece in jnp.split(tokens, 12, axis=1):
        x, cache = eqx.filter_jit(lambda m, piece, cache: m.hidden(piece, cache=cache))(laid_out, piece, cache)
        parts.append(laid_out.head(x))
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), model(tokens), atol=1e-5)


def test_a_cache_belongs_to_a_layout(models):
    tokens = jnp.zeros((1, 3), int)
    for model, other, what in ((*models, "is laid out"), (*models[::-1], "is not laid out")):
        with pytest.raises(ConfigError, match=f"{what} for decoding, unlike the model") as error:
            model.hidden(tokens, cache=other.init_cache(1, 8))
        assert (error.value.where, "model.init_cache" in error.value.next) == ("cache", True)


def test_a_cache_can_be_donated(models):
    read = jax.jit(lambda model, tokens, cache: model.hidden(tokens, cache=cache), donate_argnums=2)
    for model in models:
        cache = model.init_cache(1, 8)
        for tokens in (jnp.zeros((1, 3), int), jnp.ones((1, 3), int)):
            _, cache = read(model, tokens, cache)
        assert tokens_in(cache) == 6


def test_the_same_logits_with_the_order_of_gpus_and_tpus(models, monkeypatch):
    seen = []

    def default_of(*args, default, **others):
        seen.append("cpu" in others)
        return default(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", default_of)
    model, laid_out = models
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (3, 7)), jnp.int32)  # shapes that nothing else has traced
    np.testing.assert_allclose(laid_out(tokens), model(tokens), atol=1e-5)
    assert any(seen)


def test_the_same_tokens(models):
    model, laid_out = models
    assert type(laid_out.blocks[0].attention) is PackedAttention
    assert (type(laid_out.blocks[0].feed_forward) is PackedFeedForward) == (type(model.blocks.feed_forward).__name__ == "GatedFeedForward")
    kinds = {type(model.blocks.attention).__name__, type(model.blocks.feed_forward).__name__}
    assert unpacked(laid_out) == sorted(kinds - {"GroupedQueryAttention", "GatedFeedForward"})
    assert generate_tokens(laid_out, PROMPTS, 12, samples=2).tokens == generate_tokens(model, PROMPTS, 12, samples=2).tokens
    assert generate_tokens(laid_out, PROMPTS[:1], 12).tokens == generate_tokens(model, PROMPTS[:1], 12).tokens
    assert for_decoding(laid_out) is laid_out


def test_bfloat16_stays_bfloat16(models):
    laid_out = cast(models[1], "bfloat16")
    with jax.numpy_dtype_promotion("standard"):
        x, cache = eqx.filter_eval_shape(lambda: laid_out.hidden(jnp.zeros((2, 3), int), cache=laid_out.init_cache(2, 12)))
    assert x.dtype == cache[0].keys.dtype == jnp.bfloat16
    assert eqx.filter_eval_shape(laid_out.head, x).dtype == jnp.float32


def test_float16_can_be_read_generated_from_and_is_near(models):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)
    for model in models:
        half = cast(model, "float16")
        logits = half(tokens)
        assert 0 < abs(logits - model(tokens)).max() < 0.02
        assert len(generate_tokens(half, PROMPTS, 4).tokens) == 3


def test_eight_bits(models):
    """Every weight within half a step of what it was, logits near, and a quarter of the memory for the products."""
    _, laid_out = models
    small = in_int8(laid_out)
    a, b = laid_out.blocks[1].attention.qkv_proj, small.blocks[1].attention.qkv_proj
    assert b.values.dtype == jnp.int8
    assert jnp.all(jnp.abs(b.values.astype(a.dtype) * b.scale[..., None] - a) <= b.scale[..., None] * 0.5001)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)
    error = jnp.abs(small(tokens) - laid_out(tokens)).max() / jnp.abs(laid_out(tokens)).max()
    assert 1e-4 < error < 0.05
    assert len(generate_tokens(small, PROMPTS, 4).tokens) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_eight_bits_of_any_weights(dtype):
    """Within half a step, also where weights have fewer digits than steps; an output without weights stays at zero."""
    weight = (0.02 * jax.random.normal(jax.random.key(0), (64, 512))).at[0].set(0).at[1].multiply(1e-4).astype(dtype)
    with jax.debug_nans(True):  # the integer that a NaN becomes is up to the device
        small = Int8.of(weight)
    steps = np.asarray(weight, np.float64)[2:] / np.asarray(small.scale, np.float64)[2:, None]
    assert np.abs(np.asarray(small.values[2:], int) - steps).max() <= 0.5001
    assert (np.abs(np.asarray(small.values, int)).max(), small.scale.dtype) == (127, dtype)
    np.testing.assert_array_equal(product(jnp.ones((1, 1, 512), dtype), small)[..., 0], 0)
