"""A small random model, and the same one in transformers."""

import jax
import pytest
import torch
import transformers

from llama_eqx.interop.conversion import save_pretrained
from llama_eqx.interop.huggingface import config_from_huggingface

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def model():
    config = config_from_huggingface(
        {
            "model_type": "llama",
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
    )
    return jax.jit(lambda key: config.build(key=key))(jax.random.key(3))


@pytest.fixture(scope="session")
def reference(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode") / "hf"
    save_pretrained(model, folder, format="hf")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
