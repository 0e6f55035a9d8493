"""Llama of every generation against Hugging Face's, in float32 on random weights; and for each check, changes that it must notice."""

import contextlib
import dataclasses
import functools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama_eqx import load_pretrained, save_pretrained
from llama_eqx.compose import compose, resolve
from llama_eqx.interop import meta
from llama_eqx.interop.table import TABLE, to_torch
from llama_eqx.interop.weights import of_model
from llama_eqx.model.feed_forward import GatedFeedForwardConfig
from llama_eqx.model.llama import build_model
from llama_eqx.model.norm import RMSNorm, RMSNormConfig
from llama_eqx.model.rotary import NopeRotaryConfig, PlainRotaryConfig

transformers.utils.logging.disable_progress_bar()

# Llama 3.1's stretch begins where a pair turns less than 4 times in 8,192 positions: small heads have few such pairs, so these are wide.
PRESETS = {
    "llama1_7b": {"heads": 4, "kv_heads": 4, "head_dim": 16},
    "llama2_70b": {"heads": 8, "kv_heads": 2, "head_dim": 16},
    "llama3_8b": {"heads": 6, "kv_heads": 3, "head_dim": 32},
    "llama3_1_8b": {"heads": 4, "kv_heads": 1, "head_dim": 64},
    "llama3_2_1b": {"heads": 8, "kv_heads": 2, "head_dim": 64},
}
LOGITS = 1e-5  # largest difference; the logits are of order 1
GRADIENTS = 1e-5  # as a fraction of the largest entry of each parameter's gradient
FREQUENCIES = 4.8e-7  # relative: four units in the last place of float32
# At position 20,000 one unit in the last place of a frequency is a milliradian. transformers computes powers in float32 by another
# routine than XLA, hence this bound when each side has its own frequencies, and `LOGITS` when both have the same ones.
FAR_LOGITS = 5e-3

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 24)).astype(np.int32)
NEAR = np.tile(np.arange(24, dtype=np.int32), (2, 1))
# Attention sees differences of positions alone, so far means a gap within the row: a far but contiguous row would test nothing new.
FAR = NEAR + np.where(np.arange(24) < 12, 0, 20_000).astype(np.int32)
# A row padded on the left, and one on the right; positions count tokens.
REAL = np.stack([np.arange(24) >= 7, np.arange(24) < 15])
PADDED = np.maximum(REAL.cumsum(axis=1) - 1, 0).astype(np.int32)
FAR_PADDED = PADDED + np.where(PADDED < 9, 0, 20_000).astype(np.int32)


@jax.jit
def jitter(model):
    """Norm weights other than one, so that no two of them could be exchanged unseen."""
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([x * jax.random.uniform(key, x.shape, minval=0.7, maxval=1.3) for x, key in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our model of a preset, and what transformers reads from the folder that we write."""

    @functools.cache
    def make(preset, *slots, **others):
        sizes = {"vocab": 97, "layers": 2, "embed": 96, "mlp": 112, **PRESETS[preset], **others}
        sizes = [f"model.dims.{name}={size}" for name, size in sizes.items()]
        none = [f"model.tokens.{name}=null" for name in ("tokenizer", "bos", "pad")] + ["model.tokens.eos=[]"]  # of so small a vocabulary
        config = resolve(compose(f"model/{preset}", [*slots, *sizes, *none]))["model"]
        model = jitter(build_model(config, key=jax.random.key(0)))
        folder = tmp_path_factory.mktemp("parity") / "hf"
        save_pretrained(model, folder, format="hf")
        reference = read(folder)
        assert (reference.lm_head.weight is reference.model.embed_tokens.weight) == config.tied
        return model, reference

    return make


def read(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(model) is transformers.LlamaForCausalLM
    assert not any(info.values()), info
    return model


@eqx.filter_jit
def our_logits(model, tokens, positions, segment_ids):
    return model(tokens, positions=positions, segment_ids=segment_ids)


def their_logits(reference, tokens, positions, mask=None):
    mask = None if mask is None else torch.tensor(mask).long()
    return reference(torch.tensor(tokens).long(), position_ids=torch.tensor(positions).long(), attention_mask=mask).logits


def logits_difference(model, reference, positions, real=None):
    """The largest over tokens that are not padding."""
    with torch.no_grad():
        theirs = their_logits(reference, TOKENS, positions, real).numpy()
    ours = np.asarray(our_logits(model, TOKENS, positions, None if real is None else real.astype(np.int32)))
    return np.abs(ours - theirs)[... if real is None else real].max()


def check_near(model, reference):
    assert logits_difference(model, reference, NEAR) < LOGITS


def check_frequencies(model, reference):
    theirs = reference.model.rotary_emb.inv_freq.numpy()
    assert np.abs(np.asarray(model.rotary.frequencies()) / theirs - 1).max() < FREQUENCIES


def check_far(model, reference):
    assert logits_difference(model, reference, FAR) < FAR_LOGITS


@contextlib.contextmanager
def given_frequencies(model, reference):
    frequencies = reference.model.rotary_emb.inv_freq
    own = frequencies.clone()
    try:
        frequencies.copy_(torch.tensor(np.asarray(model.rotary.frequencies())))
        yield
    finally:
        frequencies.copy_(own)


def check_far_given_frequencies(model, reference):
    with given_frequencies(model, reference):
        assert logits_difference(model, reference, FAR) < LOGITS


def check_padded(model, reference):
    assert logits_difference(model, reference, PADDED, REAL) < LOGITS
    with given_frequencies(model, reference):
        assert logits_difference(model, reference, FAR_PADDED, REAL) < LOGITS


@eqx.filter_jit
def our_gradients(model, tokens, positions):
    def loss(model):
        logprobs = jax.nn.log_softmax(model(tokens, positions=positions)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))

    return jax.grad(loss)(model)


def check_gradients(model, reference):
    logits = their_logits(reference, TOKENS, NEAR)[:, :-1]
    reference.zero_grad()
    torch.nn.functional.cross_entropy(logits.reshape(-1, 97), torch.tensor(TOKENS[:, 1:]).long().reshape(-1)).backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    gradients = of_model(our_gradients(model, TOKENS, NEAR)).tensors
    ours = {TABLE[name].huggingface.format(layer=i): to_torch(x.whole(), TABLE[name].inputs) for (name, i), x in gradients.items()}
    assert ours.keys() == theirs.keys()
    worst = {name: np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max() for name in theirs}
    assert max(worst.values()) < GRADIENTS, worst


CHECKS = [check_near, check_frequencies, check_far, check_far_given_frequencies, check_padded, check_gradients]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("preset", PRESETS)
def test_agrees(pair, preset, check):
    check(*pair(preset))


@pytest.mark.parametrize("check", [check_near, check_frequencies, check_far_given_frequencies, check_gradients])
@pytest.mark.parametrize("option", ["model/rotary=linear", "model/rotary=yarn"])
def test_a_longer_context_agrees(pair, option, check):
    check(*pair("llama2_70b", option))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("preset", PRESETS)
def test_agrees_with_every_number_of_key_heads(pair, preset, kv_heads, check):
    check(*pair(preset, heads=6, kv_heads=kv_heads))


def with_config(model, *more, **changes):
    """The same arrays, and those given at the end, under another config."""
    config = dataclasses.replace(model.config, **changes)
    structure = jax.tree.structure(eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0)))
    return structure.unflatten([*jax.tree.leaves(model), *more])


def with_rotary(model, **changes):
    return with_config(model, rotary=dataclasses.replace(model.config.rotary, **changes))


def edited(where, change):
    """A mutation that applies `change` to the parameters `where` picks from the blocks."""
    return lambda model: eqx.tree_at(lambda m: where(m.blocks), model, change(where(model.blocks)))


def adjacent_pairs(x):
    """Rotary pairs side by side, as Meta files them, in the place of pairs half a head apart."""
    return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)


MUTATIONS = {
    "eps of Llama 1": lambda m: with_config(m, norm=RMSNormConfig(eps=1e-6)),
    "no eps": lambda m: with_config(m, norm=RMSNormConfig(eps=1e-20)),
    "theta": lambda m: with_rotary(m, theta=1e4),
    "gelu": lambda m: with_config(m, feed_forward=GatedFeedForwardConfig(activation="gelu")),
    "key heads exchanged": edited(lambda b: b.attention.k_proj, lambda k: k[..., ::-1, :]),
    "rotary pairs adjacent": edited(lambda b: (b.attention.q_proj, b.attention.k_proj), lambda qk: jax.tree.map(adjacent_pairs, qk)),
    "gate and up exchanged": edited(lambda b: (b.feed_forward.gate_proj, b.feed_forward.up_proj), lambda x: x[::-1]),
    "norms exchanged": edited(lambda b: (b.attn_norm.weight, b.ffn_norm.weight), lambda x: x[::-1]),
    "layers exchanged": edited(lambda b: b, lambda b: jax.tree.map(lambda x: x[::-1], b)),
    "heads before head_dim": edited(lambda b: b.attention.o_proj, lambda o: o.swapaxes(1, 2).reshape(o.shape)),
    "scores by sqrt(embed)": edited(lambda b: b.attention.q_proj, lambda q: q * (q.shape[-1] / q.shape[1]) ** 0.5),
}


@pytest.mark.parametrize("check", [check_near, pytest.param(check_gradients, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_change_is_noticed(pair, mutation, check):
    model, reference = pair("llama3_2_1b")
    with pytest.raises(AssertionError):
        check(MUTATIONS[mutation](model), reference)


FAR_MUTATIONS = {
    "factor 8": lambda m: with_rotary(m, factor=8.0),
    "no scaling": lambda m: with_config(m, rotary=PlainRotaryConfig(theta=m.config.rotary.theta, round_at="none")),
    "original context": lambda m: with_rotary(m, original_context=m.config.context),
    "bfloat16 angles": lambda m: with_rotary(m, round_at="angle"),
}


@pytest.mark.parametrize("mutation", FAR_MUTATIONS)
def test_change_of_scaling_is_noticed(pair, mutation):
    model, reference = pair("llama3_2_1b")
    with pytest.raises(AssertionError):
        check_far(FAR_MUTATIONS[mutation](model), reference)
    if mutation != "bfloat16 angles":
        with pytest.raises(AssertionError):
            check_frequencies(FAR_MUTATIONS[mutation](model), reference)


def test_far_change_is_noticed_given_frequencies(pair):
    model, reference = pair("llama3_2_1b")
    with pytest.raises(AssertionError):
        check_far_given_frequencies(FAR_MUTATIONS["bfloat16 angles"](model), reference)


def write_meta(reference, folder):
    """Meta's files of a model that transformers holds: rotary pairs side by side, row by row."""
    state, config = reference.state_dict(), reference.config
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv"}
    names |= {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2"}
    names |= {"mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"embed_tokens": "tok_embeddings", "lm_head": "output", "model.": ""}
    written = {}
    for name, x in state.items():
        if "q_proj" in name or "k_proj" in name:
            half = config.head_dim // 2
            heads = x.reshape(-1, config.head_dim, x.shape[1])
            x = torch.stack([row for head in heads for i in range(half) for row in (head[i], head[i + half])])
        for theirs, metas in names.items():
            name = name.replace(theirs, metas)
        written[name] = x.clone()
    folder.mkdir()
    torch.save(written, folder / "consolidated.00.pth")
    sizes = {"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads}
    sizes |= {"n_kv_heads": config.num_key_value_heads, "vocab_size": config.vocab_size, "norm_eps": config.rms_norm_eps}
    sizes |= {"multiple_of": 1, "ffn_dim_multiplier": (config.intermediate_size + 0.5) / int(8 * config.hidden_size / 3)}
    (folder / "params.json").write_text(json.dumps(sizes))


def test_a_dropped_permutation_is_noticed(pair, tmp_path, monkeypatch):
    """Of Meta's files, by which llama.cpp and others were once caught out."""
    _, reference = pair("llama2_70b", heads=6, kv_heads=2)
    write_meta(reference, tmp_path / "meta")
    check_near(load_pretrained(tmp_path / "meta"), reference)
    monkeypatch.setattr(meta, "pairs_to_halves", lambda x: x)
    with pytest.raises(AssertionError):
        check_near(load_pretrained(tmp_path / "meta"), reference)


def untied(model):
    """The same values, stored twice."""
    return with_config(model, model.embed.T, tied=False)


def test_a_dropped_tie_is_noticed(pair):
    """Its logits are right until the first step of training: the gradient tells."""
    model, reference = pair("llama3_2_1b")
    check_near(untied(model), reference)
    with pytest.raises(AssertionError):
        check_gradients(untied(model), reference)


def test_padding_that_is_seen_is_noticed(pair, monkeypatch):
    model, reference = pair("llama2_70b")
    blind = jax.jit(lambda model, tokens, positions, segment_ids: model(tokens, positions=positions))
    monkeypatch.setitem(globals(), "our_logits", blind)
    with pytest.raises(AssertionError):
        check_padded(model, reference)


def bfloat16(x):
    return torch.tensor(np.asarray(x, np.float32)).to(torch.bfloat16)


class LateCastNorm(RMSNorm):
    """Multiplies by the weight in float32 and casts afterwards."""

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.weight.astype(jnp.float32)).astype(x.dtype)


@pytest.mark.parametrize(("norm", "equal"), [(RMSNorm, True), (LateCastNorm, False)])
def test_norm_casts_before_the_weight(norm, equal):
    x = jax.random.normal(jax.random.key(0), (4, 16, 64)).astype(jnp.bfloat16)
    weight = jax.random.uniform(jax.random.key(1), (64,), minval=0.5, maxval=1.5).astype(jnp.bfloat16)
    reference = LlamaRMSNorm(64, eps=1e-5)
    reference.weight.data = bfloat16(weight)
    theirs = reference(bfloat16(x)).detach().float().numpy()
    assert np.array_equal(np.asarray(norm(weight=weight, eps=1e-5)(x), np.float32), theirs) is equal


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["100KB", "1GB"])
def test_reads_what_transformers_writes(tmp_path, tied, shard):
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            initializer_range=64**-0.5,  # of the fan-in: logits of order 1, for which `LOGITS` holds
            tie_word_embeddings=tied,
            rms_norm_eps=1e-5,
            attn_implementation="eager",
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        )
    )
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.7, 1.3)
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shard == "100KB")
    model = load_pretrained(tmp_path)
    check_near(model, reference)
    check_frequencies(model, reference)
    check_gradients(model, reference)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_layers_without_positions_agree_with_smollm3(pair, every):
    model, plain = pair("llama3_8b", layers=4)
    config = {**plain.config.to_dict(), "no_rope_layer_interval": every, "use_cache": False}
    config = {key: config[key] for key in ("head_dim", *transformers.SmolLM3Config().to_dict()) if key in config}
    reference = transformers.SmolLM3ForCausalLM._from_config(transformers.SmolLM3Config(**config), attn_implementation="eager").eval()
    reference.load_state_dict(plain.state_dict())
    assert reference.config.no_rope_layers == [int((layer + 1) % every > 0) for layer in range(4)]
    rotary = NopeRotaryConfig(theta=model.config.rotary.theta, every=every, round_at="none")
    ours = eqx.tree_at(lambda m: m.rotary, model, rotary.build(model.config.dims), is_leaf=lambda x: x is model.rotary)
    assert logits_difference(ours, reference, NEAR) < LOGITS
    assert logits_difference(ours, reference, PADDED, REAL) < LOGITS
    assert logits_difference(model, reference, NEAR) > 100 * LOGITS
