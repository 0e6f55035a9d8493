import jax
import pytest

from llama_eqx.config import load
from llama_eqx.model.llama import Llama, LlamaConfig

SLOTS = "llama_eqx.model."
CONFIG = {
    "_target_": SLOTS + "llama.LlamaConfig",
    "dims": {
        "_target_": "llama_eqx.dims.Dims",
        "vocab": 64,
        "layers": 2,
        "embed": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "mlp": 64,
    },
    "attention": {"_target_": SLOTS + "attention.GroupedQueryAttentionConfig"},
    "feed_forward": {"_target_": SLOTS + "feed_forward.GatedFeedForwardConfig", "activation": "silu"},
    "norm": {"_target_": SLOTS + "norm.RMSNormConfig", "eps": 1e-5},
    "rotary": {"_target_": SLOTS + "rotary.PlainRotaryConfig", "theta": 1e4, "round_at": "none"},
    "block": {"_target_": SLOTS + "block.PreNormBlockConfig", "dropout": 0.0},
    "init": {"_target_": SLOTS + "init.FanInInitConfig", "gain": 1.0},
    "dropout": 0.0,
    "tied": False,
    "context": 64,
    "tokens": {"_target_": SLOTS + "llama.SpecialTokens", "tokenizer": None, "bos": None, "eos": [], "pad": None},
}


@pytest.fixture(scope="session")
def model() -> Llama:
    config = load(CONFIG)
    assert isinstance(config, LlamaConfig)
    return config.build(key=jax.random.key(0))
