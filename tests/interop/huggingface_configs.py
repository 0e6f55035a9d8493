"""Configs of two small models as Hugging Face writes them, a plain one and one that is tied and has Llama 3's rotary scaling, and YaRN."""

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.3, "beta_fast": 4}
SIZES = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
TIED = {**SIZES, "head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
