"""Two models side by side: the first part that differs is named, and why."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_eqx import save_pretrained
from llama_eqx.diagnosis import comparison
from llama_eqx.diagnosis.comparison import FAR, LENGTH, POSITIONS, compare, compare_weights, model_parts
from llama_eqx.errors import CheckpointError, ConfigError
from llama_eqx.interop.pretrained import open_pretrained
from llama_eqx.interop.weights import of_model
from llama_eqx.model.llama import LlamaConfig, build_model
from llama_eqx.model.norm import RMSNormConfig

# Random weights are alike in all layers: to be seen, an exchange of rows needs no more.
SIZES = {"layers": 3, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp": 48}


@pytest.fixture(scope="module")
def model(tiny):
    sizes = [f"model.dims.{name}={size}" for name, size in SIZES.items()]
    return build_model(tiny("model/rotary=llama3_2", "model.tied=false", *sizes), key=jax.random.key(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model):
    """The same model in two formats."""
    root = tmp_path_factory.mktemp("compared")
    for format in ("hf", "native"):
        save_pretrained(model, root / format, format=format)
    return root


def with_config(model, **changes):
    config = dataclasses.replace(model.config, **changes)
    structure = jax.tree.structure(eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0)))
    return structure.unflatten(jax.tree.leaves(model))


def edited(where, change):
    return lambda model: eqx.tree_at(lambda m: where(m), model, change(where(model)))


def side_by_side(x):
    """Rotary pairs as Meta files them."""
    return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)


def permuted_for_four_heads(x):
    """Two key heads, permuted as if they were four."""
    flat = x.reshape(x.shape[0], 4, 2, -1).swapaxes(-1, -2)
    return flat.reshape(x.shape)


def q(m):
    return m.blocks.attention.q_proj


def k(m):
    return m.blocks.attention.k_proj


# What is done to the second model, the first part that differs, where it shows, and what is said about it.
NEAR_AND_FAR, ONLY_FAR = f"0-{LENGTH - 1} and {FAR:,}", f"at positions {FAR:,}"
DIFFERENT = {
    "factor": (
        lambda m: with_config(m, rotary=dataclasses.replace(m.config.rotary, factor=8.0)),
        "layer 0 attention",
        NEAR_AND_FAR,
        "0.1 rad at position 1,050 and 1 rad at position 10,495",
    ),
    "eps": (
        lambda m: with_config(m, norm=RMSNormConfig(eps=1e-3)),
        "layer 0 attention",
        NEAR_AND_FAR,
        "RMSNormConfig(eps=1e-05) and RMSNormConfig(eps=0.001)",
    ),
    "pairs": (
        edited(q, lambda x: x.at[1].set(side_by_side(x[1]))),
        "layer 1 attention",
        NEAR_AND_FAR,
        "as if rotary pairs were half a head apart in the first model and side by side in the second",
    ),
    "heads": (
        edited(k, lambda x: x.at[2].set(permuted_for_four_heads(x[2]))),
        "layer 2 attention",
        NEAR_AND_FAR,
        "blocks.attention.k_proj, layer 2: the same columns in another order",
    ),
    "feed-forward": (
        edited(lambda m: m.blocks.feed_forward.up_proj, lambda x: x.at[1].mul(1.01)),
        "layer 1 feed-forward",
        NEAR_AND_FAR,
        "blocks.feed_forward.up_proj, layer 1: the weights are up to",
    ),
    "norm": (
        edited(lambda m: m.blocks.ffn_norm.weight, lambda x: x.at[0].mul(1.01)),
        "layer 0 feed-forward",
        NEAR_AND_FAR,
        "blocks.ffn_norm.weight, layer 0",
    ),
    "embedding": (edited(lambda m: m.embed, lambda x: x + 0.01), "embedding", NEAR_AND_FAR, "embed: the weights are up to 0.01 apart"),
    "head": (edited(lambda m: m.lm_head, lambda x: x * 1.01), "logits", NEAR_AND_FAR, "lm_head: the weights are up to"),
    "last norm": (
        edited(lambda m: m.final_norm.weight, lambda x: x * 1.01),
        "logits",
        NEAR_AND_FAR,
        "final_norm.weight: the weights are up to",
    ),
    "bfloat16": (lambda m: jax.tree.map(lambda x: x.astype(jnp.bfloat16), m), "embedding", NEAR_AND_FAR, "embed: the weights are up to"),
    "NaN": (
        edited(lambda m: m.blocks.attention.o_proj, lambda x: x.at[0, 0].set(jnp.nan)),
        "layer 0 attention",
        NEAR_AND_FAR,
        "blocks.attention.o_proj, layer 0",
    ),
}


def test_one_model_in_two_formats_is_equal_everywhere(folders):
    report = compare(str(folders / "hf"), str(folders / "native"), 1e-9)
    assert not report.wrong
    assert len([fact for fact in report.facts if fact.endswith("0               0")]) == 2 * SIZES["layers"] + 2


@pytest.mark.parametrize("difference", DIFFERENT)
def test_the_first_difference_is_named(model, difference):
    change, part, where, why = DIFFERENT[difference]
    _, (first, *reasons) = compare_weights(of_model(model), of_model(change(model)), 1e-4)
    assert first.where == part
    assert first.what.endswith(where)
    assert any(why in str(reason) for reason in reasons), "\n".join(map(str, reasons))


def test_a_difference_that_only_far_positions_show(model):
    """A prompt of 512 tokens at a tolerance of a hundredth does not tell a factor of 31 from one of 32."""
    near = with_config(model, rotary=dataclasses.replace(model.config.rotary, factor=31.0))
    _, (first, *_) = compare_weights(of_model(model), of_model(near), 1e-2)
    assert first.what.endswith(ONLY_FAR)


def test_parts_are_those_of_the_one_forward(model):
    tokens = np.random.default_rng(0).integers(0, 64, (2, LENGTH)).astype(np.int32)
    parts = dict(model_parts(of_model(model), tokens))
    logits = eqx.filter_jit(lambda m: m(jnp.asarray(tokens), positions=jnp.asarray(POSITIONS)))(model)
    assert np.abs(np.asarray(parts["logits"]) - np.asarray(logits)).max() < 1e-5
    assert list(parts)[:3] == ["embedding", "layer 0 attention", "layer 0 feed-forward"]


def test_transformers_agrees(folders):
    report = compare(str(folders / "hf"), "transformers", 1e-4)
    assert report.findings == (), str(report)
    assert len(report.facts) == 2 + 1 + 2 * SIZES["layers"] + 2


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"norm": RMSNormConfig(eps=1e-3)}, "layer 0 attention"),
        ({"rotary": {"factor": 8.0}}, "rotary"),
    ],
)
def test_transformers_does_not_agree_with_what_is_broken(folders, monkeypatch, changes, where):
    def broken(path):
        weights = open_pretrained(path)
        fields = {
            key: dataclasses.replace(getattr(weights.config, key), **new) if isinstance(new, dict) else new for key, new in changes.items()
        }
        return dataclasses.replace(weights, config=dataclasses.replace(weights.config, **fields))

    monkeypatch.setattr(comparison, "open_pretrained", broken)
    report = compare(str(folders / "hf"), "transformers", 1e-4)
    assert where in [finding.where for finding in report.findings]
    assert report.wrong


def test_what_cannot_be_compared(folders, model, tiny):
    other = build_model(tiny("model.dims.layers=2"), key=jax.random.key(0))
    _, findings = compare_weights(of_model(model), of_model(other), 1e-4)
    assert [finding.what for finding in findings] == ["layers is 3 and 2"]
    own = type("Own", (LlamaConfig,), {})(**vars(model.config))
    with pytest.raises(ConfigError, match="not a Own"):
        compare_weights(of_model(own.build(key=jax.random.key(0))), of_model(model), 1e-4)
    with pytest.raises(CheckpointError, match="transformers cannot read it") as error:
        compare(str(folders / "native"), "transformers", 1e-4)
    assert f"convert from={folders / 'native'} to=FOLDER format=hf" in error.value.next


def test_vocabularies_may_differ(model):
    """Ids that only one has do not count. A product of 70 columns is summed in another order than one of 64: logits are not bit for bit."""
    dims, pad = dataclasses.replace(model.config.dims, vocab=70), functools.partial(jnp.pad, constant_values=5)
    larger = eqx.tree_at(lambda m: (m.embed, m.lm_head), model, (pad(model.embed, ((0, 6), (0, 0))), pad(model.lm_head, ((0, 0), (0, 6)))))
    larger = with_config(larger, dims=dims)
    facts, findings = compare_weights(of_model(model), of_model(larger), 1e-5)
    assert findings == []
    assert len([fact for fact in facts if fact.endswith("0               0")]) == 2 * SIZES["layers"] + 1  # all but the logits
    _, (first, *_) = compare_weights(of_model(model), of_model(edited(lambda m: m.lm_head, lambda x: x.at[0, 63].add(1e-3))(larger)), 1e-5)
    assert first.where == "logits"
