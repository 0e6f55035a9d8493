"""transformers' LlamaForCausalLM and its own `generate`: greedy, with a dynamic cache or, as an option, a static one."""

from benchmarks.task import Task

task = Task.given()

import torch
import transformers

transformers.logging.set_verbosity_error()
device = "cuda" if task.device == "gpu" else "cpu"
torch.set_num_threads(task.threads)
torch.manual_seed(0)
dims, prompt = task.dims, task.options["prompt"]
config = transformers.LlamaConfig(
    vocab_size=dims["vocab"],
    hidden_size=dims["embed"],
    intermediate_size=dims["mlp"],
    num_hidden_layers=dims["layers"],
    num_attention_heads=dims["heads"],
    num_key_value_heads=dims["kv_heads"],
    head_dim=dims["head_dim"],
    max_position_embeddings=task.seq,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": task.theta},
    tie_word_embeddings=task.tied,
    attn_implementation="sdpa",
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
dtype = torch.bfloat16 if task.precision == "bfloat16" else torch.float32
model = transformers.LlamaForCausalLM(config).to(device, dtype).eval()
settings = model.generation_config
settings.eos_token_id, settings.do_sample = None, False
if task.options.get("static"):
    settings.cache_implementation = "static"
tokens = torch.from_numpy(task.rows()[0][:, :prompt]).to(device)


@torch.no_grad()
def generate(n):
    new = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, min_new_tokens=n)[:, prompt:]
    return new.cpu().numpy()


task.measure_decoding(generate, torch=torch.__version__, transformers=transformers.__version__)
