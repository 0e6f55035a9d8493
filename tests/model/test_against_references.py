"""Each slot against somebody else's implementation of it, or a published figure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llama_eqx.errors import ConfigError
from llama_eqx.model.dropout import dropout
from llama_eqx.model.feed_forward import ACTIVATIONS, GatedFeedForwardConfig
from llama_eqx.model.init import FanInInitConfig, FixedInitConfig
from llama_eqx.model.kernel import attend
from llama_eqx.model.norm import LayerNormConfig, RMSNormConfig
from llama_eqx.model.rotary import Llama3RotaryConfig, PlainRotaryConfig

KEY = jax.random.key(0)
TORCH = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "squared_relu": lambda x: torch.relu(x) ** 2,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = draw(100)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), TORCH[name](torch.tensor(x)), atol=1e-6)


def test_the_gate_is_activated_and_not_the_product(tiny):
    """Row "SwiGLU" of Shazeer's table, written out: down(silu(gate x) * (up x))."""
    module = GatedFeedForwardConfig(activation="silu").build(tiny().dims, FixedInitConfig(value=0.3), key=KEY)
    x = draw(2, 3, 32)
    gate, up, down = (torch.tensor(np.asarray(w)) for w in (module.gate_proj, module.up_proj, module.down_proj))
    expected = (torch.nn.functional.silu(torch.tensor(x) @ gate) * (torch.tensor(x) @ up)) @ down
    np.testing.assert_allclose(module(jnp.asarray(x)), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_has_the_casts_of_transformers(dtype, tiny):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    weight, x = torch.tensor(1 + 0.1 * draw(32)), torch.tensor(draw(2, 3, 32))
    theirs = LlamaRMSNorm(32, eps=1e-5).to(dtype)
    theirs.weight.data = weight.to(dtype)
    expected = theirs(x.to(dtype)).detach().float().numpy()

    name = str(dtype).removeprefix("torch.")
    ours = RMSNormConfig(eps=1e-5).build(tiny().dims)
    ours = jax.tree.map(lambda _: jnp.asarray(weight.numpy()).astype(name), ours)
    np.testing.assert_allclose(ours(jnp.asarray(x.numpy()).astype(name)).astype("float32"), expected, atol=1e-6)


def test_layer_norm(tiny):
    x = draw(2, 3, 32)
    expected = torch.nn.functional.layer_norm(torch.tensor(x), (32,), eps=1e-5)
    np.testing.assert_allclose(LayerNormConfig(eps=1e-5).build(tiny().dims)(jnp.asarray(x)), expected, atol=1e-5)


@pytest.mark.parametrize("config", [RMSNormConfig, LayerNormConfig])
def test_a_row_of_zeros_is_a_number_by_any_eps_that_is_taken(config, tiny):
    """As the embedding of an id may be that has never occurred."""
    for eps in (-1e-5, 0.0, 1e-21):
        with pytest.raises(ConfigError, match="is not at least 1e-20"):
            config(eps=eps)
    norm, zeros = config(eps=1e-20).build(tiny().dims), jnp.zeros((1, 1, 32))
    for found in jax.value_and_grad(lambda x: (norm(x) * jnp.arange(32.0)).sum())(zeros):
        assert jnp.isfinite(found).all()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("segmented", [False, True])
def test_attention(kv_heads, segmented):
    """PyTorch's kernel with the mask written out."""
    q, k, v = draw(2, 6, 4, 8), draw(2, 6, kv_heads, 8)[..., ::-1].copy(), draw(2, 6, kv_heads, 8)
    segments = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1]])
    mask = np.tril(np.ones((6, 6), bool))[None] & (~np.array(segmented) | (segments[:, :, None] == segments[:, None, :]))
    heads_first = (torch.tensor(x).transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=torch.tensor(mask)[:, None], enable_gqa=True)
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    ids = jnp.asarray(segments) if segmented else None
    found = attend(q, k, v, segment_ids=None if ids is None else (ids, ids))
    np.testing.assert_allclose(found, expected.transpose(1, 2), atol=1e-6)
    last = attend(q[:, 4:], k, v, start=4, segment_ids=None if ids is None else (ids[:, 4:], ids))
    np.testing.assert_allclose(last, found[:, 4:], atol=1e-6)


# Rotary: where the rounding is decides how wrong the table gets. Largest |error of cos| against float64, head_dim 128.


def table(round_at, *, theta=1e4, positions=4096):
    from llama_eqx.dims import Dims

    dims = Dims(vocab=1, layers=1, embed=128, heads=1, kv_heads=1, head_dim=128, mlp=1)
    rotary = PlainRotaryConfig(theta=theta, round_at=round_at).build(dims)
    return np.asarray(rotary(jnp.arange(positions)[None]).cos[0, :, 0])


@pytest.mark.parametrize(
    ("round_at", "least", "most"), [("none", 0, 3e-4), ("table", 1e-3, 3e-3), ("inv_freq", 1.9, 2), ("position", 1.9, 2), ("angle", 1.9, 2)]
)
def test_rounding_of_the_rotary_table(round_at, least, most):
    exact = np.cos(np.arange(4096)[:, None] * 1e4 ** (-np.arange(0, 128, 2) / 128))
    assert least <= np.abs(table(round_at) - exact).max() <= most


def test_rounded_positions_collide():
    """257 + 128 log2(L / 256) distinct values below L, at the fastest pair, where each position has its own angle."""
    assert len(np.unique(table("position")[:, 0])) == 769
    assert len(np.unique(table("none")[:, 0])) > 4000


def test_the_rounded_turn_is_in_bfloat16():
    x = jnp.asarray(draw(1, 4096, 1, 128))
    from llama_eqx.dims import Dims

    dims = Dims(vocab=1, layers=1, embed=128, heads=1, kv_heads=1, head_dim=128, mlp=1)
    turned = PlainRotaryConfig(theta=1e4, round_at="rotation").build(dims)(jnp.arange(4096)[None])(x)
    np.testing.assert_array_equal(turned, turned.astype(jnp.bfloat16).astype(jnp.float32))
    exact = PlainRotaryConfig(theta=1e4, round_at="none").build(dims)(jnp.arange(4096)[None])(x)
    assert 1e-3 < np.abs(turned - exact).max() < 0.1


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies_are_those_of_transformers(factor):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from llama_eqx.dims import Dims

    settings = {
        "rope_theta": 5e5,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=2048,
        num_attention_heads=32,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", **settings},
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    dims = Dims(vocab=1, layers=1, embed=64, heads=1, kv_heads=1, head_dim=64, mlp=1)
    rotary = Llama3RotaryConfig(theta=5e5, factor=factor, low_freq_factor=1, high_freq_factor=4, original_context=8192, round_at="none")
    np.testing.assert_allclose(rotary.build(dims).frequencies(), expected, rtol=1e-6)


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    x = jnp.ones((100, 100, 10))
    y = dropout(x, 0.1, KEY)
    assert abs(float((y == 0).mean()) - 0.1) < 0.005
    assert abs(float(y.mean()) - 1) < 0.005
    assert dropout(x, 0.1, None) is x


def test_dropout_scales_in_float32():
    """So that the mean is kept in bfloat16 too, in which no 0.9 is."""
    x = jax.random.normal(KEY, (1000,), jnp.bfloat16)
    y = np.asarray(dropout(x, 0.1, KEY))
    np.testing.assert_array_equal(y[y != 0], (np.asarray(x, np.float32) / np.float32(0.9)).astype(y.dtype)[y != 0])


def test_initial_spread(tiny):
    dims = tiny("model.dims.embed=256", "model.dims.mlp=1024").dims
    for init, std in ((FanInInitConfig(gain=1.0), 1 / 16), (FixedInitConfig(value=0.02), 0.02)):
        module = GatedFeedForwardConfig(activation="silu").build(dims, init, key=KEY)
        assert float(module.gate_proj.std()) == pytest.approx(std, rel=0.02)


def test_equal_names_have_equal_values(tiny):
    """Two arms of an ablation start from the same values in every tensor they share."""
    gated, plain = (tiny(f"model/feed_forward={name}").build(key=KEY) for name in ("gated", "plain"))
    np.testing.assert_array_equal(gated.blocks.feed_forward.up_proj, plain.blocks.feed_forward.up_proj)
    np.testing.assert_array_equal(gated.blocks.attention.q_proj, plain.blocks.attention.q_proj)
    deeper = tiny("model.dims.layers=5").build(key=KEY)
    np.testing.assert_array_equal(gated.blocks.attention.q_proj, deeper.blocks.attention.q_proj[:3])
    assert not np.allclose(gated.blocks.feed_forward.up_proj, gated.blocks.feed_forward.gate_proj)
