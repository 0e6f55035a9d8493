"""Configs of Hugging Face and of this package say the same, and what one of them cannot say is named."""

import dataclasses
import json

import equinox as eqx
import jax
import pytest
from huggingface_configs import LLAMA3, SIZES, TIED, YARN

from llama_eqx.dims import Dims
from llama_eqx.errors import CheckpointError
from llama_eqx.interop.conversion import save_pretrained
from llama_eqx.interop.huggingface import config_from_huggingface, config_to_huggingface
from llama_eqx.model.feed_forward import GatedFeedForwardConfig, PlainFeedForwardConfig
from llama_eqx.model.llama import LlamaConfig
from llama_eqx.model.norm import LayerNormConfig
from llama_eqx.model.rotary import Llama3RotaryConfig, PlainRotaryConfig


def test_defaults_of_old_configs():
    config = config_from_huggingface({**{key: SIZES[key] for key in SIZES if key not in ("num_key_value_heads", "rms_norm_eps")}})
    assert config.dims.kv_heads == 4
    assert config.dims.head_dim == 8
    assert config.norm.eps == 1e-6
    assert config.rotary == PlainRotaryConfig(theta=1e4, round_at="none")
    assert not config.tied
    assert config_from_huggingface({**SIZES, "head_dim": None, "num_key_value_heads": None, "rope_scaling": None}).dims == config.dims


def test_old_and_new_rotary_keys_mean_the_same():
    rotary = Llama3RotaryConfig(theta=5e5, factor=32, low_freq_factor=1, high_freq_factor=4, original_context=64, round_at="none")
    for keys in (
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **{key: LLAMA3[key] for key in LLAMA3 if key != "rope_type"}}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    ):
        assert config_from_huggingface({**SIZES, **keys}).rotary == rotary
    plain = PlainRotaryConfig(theta=5e5, round_at="none")
    assert config_from_huggingface({**SIZES, "rope_theta": 5e5}).rotary == plain
    assert config_from_huggingface({**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}).rotary == plain


@pytest.mark.parametrize("config", [SIZES, TIED, SIZES | {"rope_scaling": {"type": "linear", "factor": 2}}, SIZES | {"rope_scaling": YARN}])
def test_config_round_trip(config):
    config = config_from_huggingface(config)
    assert config_from_huggingface(json.loads(json.dumps(config_to_huggingface(config)))) == config


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mistral"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "0.5 is not at least 1"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters.original_max_position_embeddings is missing"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate is False, which cannot be read; attention_factor can"),
        ({"rope_parameters": YARN | {"mscale": 0.7}}, "rope_parameters.mscale is 0.7"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.original_max_position_embeddings is missing"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor=4 is not below high_freq_factor=4"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', wanted an object"),
        ({"rope_parameters": [8.0]}, "rope_parameters is [8.0], wanted an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648, wanted a size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "kv_heads"),
        ({"rms_norm_eps": "1e-5"}, "eps"),
    ],
)
def test_unsupported_configs_name_the_key(changes, key):
    with pytest.raises(CheckpointError) as error:
        config_from_huggingface({**SIZES, **changes})
    assert key in error.value.what


def test_all_unsupported_keys_are_listed():
    with pytest.raises(CheckpointError) as error:
        config_from_huggingface({"model_type": "llama", "attention_bias": True, "mlp_bias": True})
    assert len(error.value.what.splitlines()) == 7


@pytest.mark.parametrize(
    ("changes", "slot"),
    [
        ({"feed_forward": PlainFeedForwardConfig(activation="silu")}, "feed_forward"),
        ({"feed_forward": GatedFeedForwardConfig(activation="squared_relu")}, "feed_forward.activation"),
        ({"norm": LayerNormConfig(eps=1e-5)}, "norm"),
        ({"feed_forward": type("Derived", (GatedFeedForwardConfig,), {})(activation="silu")}, "feed_forward"),
        ({"rotary": PlainRotaryConfig(theta=1e4, round_at="table")}, "rotary.round_at"),
        ({"dims": Dims(vocab=61, layers=1, embed=32, heads=6, kv_heads=2, head_dim=8, mlp=48)}, "dims.heads"),
    ],
)
def test_models_that_cannot_be_written_name_the_slot(tmp_path, changes, slot):
    config = dataclasses.replace(config_from_huggingface(SIZES), **changes)
    with pytest.raises(CheckpointError) as error:
        save_pretrained(eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0)), tmp_path / "hf", format="hf")
    assert error.value.where == slot
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["hf", "meta"])
def test_a_model_of_ones_own_is_not_written_as_llama(tmp_path, format):
    """With all of Llama's slots it may still compute anything."""
    config = config_from_huggingface(SIZES)
    own = type("Own", (LlamaConfig,), {})(**vars(config))
    with pytest.raises(CheckpointError, match="Llama has no Own"):
        save_pretrained(own.build(key=jax.random.key(0)), tmp_path / format, format=format)
