"""What is seen inside a model against what transformers says of itself."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llama_eqx import build_model, load_config, save_pretrained, trace
from llama_eqx.errors import ConfigError
from llama_eqx.generation.layout import for_decoding
from llama_eqx.model.attention import GroupedQueryAttention
from llama_eqx.model.feed_forward import GatedFeedForward
from llama_eqx.precision import PrecisionConfig
from llama_eqx.remat import NAMES, NamedRematConfig, RematConfig
from llama_eqx.sharding import Layout
from llama_eqx.tag import tag
from llama_eqx.tracing import TRACES
from llama_eqx.training.loss import policy_view

ALL = tuple(TRACES)
TOKENS = np.random.default_rng(0).integers(0, 64, (4, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def model(tiny):
    return build_model(tiny(), key=jax.random.key(0))


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traced") / "hf"
    save_pretrained(model, folder, format="hf")
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        seen = reference(torch.tensor(TOKENS).long(), output_hidden_states=True, output_attentions=True)
        # transformers has the last residual only after the last norm: it is computed from what goes in there.
        kept = []
        with torch.no_grad():
            hook = reference.model.norm.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
            reference(torch.tensor(TOKENS).long())
            hook.remove()
        residual = torch.stack([*seen.hidden_states[:-1], kept[0]])
        lens = torch.log_softmax(reference.lm_head(reference.model.norm(residual)), -1)
    return residual.numpy(), torch.stack(seen.attentions).numpy(), lens.numpy()


@pytest.fixture(scope="module")
def seen(model):
    return trace(model, TOKENS, ALL)


def test_residual_and_attention_are_those_of_transformers(seen, theirs):
    residual, attention, _ = theirs
    np.testing.assert_allclose(seen["residual"], residual, atol=1e-5)
    np.testing.assert_allclose(seen["attention_weights"], attention, atol=1e-6)
    entropy = -(attention * np.log(np.where(attention > 0, attention, 1))).sum(-1)
    np.testing.assert_allclose(seen["attention_entropy"], entropy, atol=1e-5)


def test_the_logit_lens_is_the_head_on_the_residual_of_transformers(seen, theirs):
    _, _, lens = theirs
    np.testing.assert_array_equal(seen["logit_lens"].tokens, lens.argmax(-1))
    np.testing.assert_allclose(seen["logit_lens"].logprobs, lens.max(-1), atol=1e-5)


def test_shapes(seen):
    shapes = {name: seen[name].shape for name in ALL if name != "logit_lens"}
    assert shapes == {
        "residual": (4, 4, 12, 32),
        "attention_weights": (3, 4, 4, 12, 12),
        "attention_entropy": (3, 4, 4, 12),
        "q": (3, 4, 12, 4, 8),
        "k": (3, 4, 12, 2, 8),
        "v": (3, 4, 12, 2, 8),
        "attention_out": (3, 4, 12, 32),
        "gate": (3, 4, 12, 48),
        "up": (3, 4, 12, 48),
        "down": (3, 4, 12, 32),
    }
    parts = np.asarray(seen["residual"])
    np.testing.assert_allclose(parts[1:] - parts[:-1], seen["attention_out"] + seen["down"], atol=1e-5)


def test_segments_and_padding(model):
    segments = np.array([[0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]] * 4, np.int32)
    positions = np.array([[0, 0, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]] * 4, np.int32)
    packed = trace(model, TOKENS, ("attention_weights", "residual"), positions=positions, segment_ids=segments)
    alone = trace(model, TOKENS[:, 7:], ("attention_weights", "residual"))
    np.testing.assert_allclose(packed["attention_weights"][..., 7:, 7:], alone["attention_weights"], atol=1e-6)
    np.testing.assert_allclose(packed["residual"][:, :, 7:], alone["residual"], atol=1e-5)
    assert not packed["attention_weights"][..., 7:, :7].any()


def test_over_devices(model, seen):
    config = load_config("mesh=cpu-8", "mesh.tensor=2", "sharding=fsdp_tensor")
    layout = Layout(config.mesh.build(), config.sharding)
    view = policy_view(PrecisionConfig(params="float32", compute="float32"), RematConfig(policy="none"), layout, config.kernel)

    @eqx.filter_jit
    def look(model, tokens):
        return trace(view(model), tokens, ALL)

    placed = look(jax.device_put(model, layout.shardings(model)), jax.device_put(TOKENS, layout.sharding(("batch", "seq"), TOKENS.shape)))
    for name in ALL:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), placed[name], seen[name])
    shard = placed["attention_weights"].sharding.shard_shape(placed["attention_weights"].shape)
    assert shard == (3, 1, 2, 12, 12)  # rows over four devices, heads over two
    assert placed["residual"].sharding.shard_shape(placed["residual"].shape)[1] == 1


def test_nothing_changes_where_nothing_is_asked(model, monkeypatch):
    from llama_eqx.model import llama

    found = str(jax.make_jaxpr(lambda m: m(jax.numpy.asarray(TOKENS)))(model))
    monkeypatch.setattr(llama, "scan_layers", lambda fold, carry, layers, unroll: jax.lax.scan(fold, carry, layers, unroll=unroll)[0])
    assert str(jax.make_jaxpr(lambda m: m(jax.numpy.asarray(TOKENS)))(model)) == found


def test_names_that_are_not_there(model, tiny):
    with pytest.raises(ConfigError, match="called residul") as error:
        trace(model, TOKENS, ("residul",))
    assert "did you mean residual?" in error.value.next
    with pytest.raises(ConfigError, match="called r") as error:
        trace(model, TOKENS, ("r",))
    assert error.value.next == "one of: " + ", ".join(sorted({*TRACES, *NAMES} - {"input"}))
    np.testing.assert_array_equal(trace(model, TOKENS, "down")["down"], trace(model, TOKENS, ("down",))["down"])
    with pytest.raises(ConfigError, match="laid out for decoding"):
        trace(for_decoding(model), TOKENS, ("residual",))
    plain = build_model(tiny("model/feed_forward=plain"), key=jax.random.key(0))
    with pytest.raises(ConfigError, match="this model has no activation called gate"):
        trace(plain, TOKENS, ("residual", "gate"))


def test_weights_that_attention_computes_by_itself_are_not_made_up(tiny):
    class Own(GroupedQueryAttention):
        def __call__(self, x, rotation, segment_ids, cache):
            q, k, v = self.qkv(x)
            tag(rotation(q), "q"), tag(rotation(k), "k")
            return self.out(jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)), cache

    model = build_model(tiny(), key=jax.random.key(0))
    own = eqx.tree_at(lambda m: m.blocks.attention, model, Own(**vars(model.blocks.attention)))
    assert trace(own, TOKENS, ("q", "k")).keys() == {"q", "k"}
    with pytest.raises(ConfigError, match="called attention_weights: its attention does not call"):
        trace(own, TOKENS, ("residual", "attention_weights"))


def test_a_name_of_ones_own_is_seen_and_kept(tiny, monkeypatch):
    class Own(GatedFeedForward):
        def __call__(self, x):
            return tag(super().__call__(x), "mine")

    model = build_model(tiny(), key=jax.random.key(0))
    model = eqx.tree_at(lambda m: m.blocks.feed_forward, model, Own(**vars(model.blocks.feed_forward)))
    with pytest.raises(ConfigError, match="called mine"):
        trace(model, TOKENS, ("mine",))
    with pytest.raises(ConfigError, match="called mine"):
        NamedRematConfig(names=("mine",), offloaded=())
    monkeypatch.setattr("llama_eqx.tracing.NAMES", [*NAMES, "mine"])
    monkeypatch.setattr("llama_eqx.remat.NAMES", [*NAMES, "mine"])
    seen = trace(model, TOKENS, ("mine", "down"))
    np.testing.assert_array_equal(seen["mine"], seen["down"])
    NamedRematConfig(names=("mine",), offloaded=())
