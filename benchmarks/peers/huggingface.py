"""transformers' LlamaForCausalLM in a plain loop with fused AdamW; `compile` and `checkpointing` as options."""

from benchmarks.task import Task

task = Task.given()

import torch
import transformers

device = "cuda" if task.device == "gpu" else "cpu"
torch.set_num_threads(task.threads)
torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
torch.manual_seed(0)
dims = task.dims
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
    use_cache=False,
    attn_implementation="sdpa",
)
model = transformers.LlamaForCausalLM(config).to(device).train()
if task.precision == "bfloat16":
    model = model.to(torch.bfloat16)
if task.options.get("checkpointing"):
    model.gradient_checkpointing_enable()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
forward = torch.compile(model) if task.options.get("compile") else model
rows = [torch.from_numpy(array[:, :-1]).to(device) for array in task.rows()]


def step(i):
    with torch.autocast(device, torch.bfloat16, enabled=task.precision == "mixed"):
        loss = forward(input_ids=rows[i % 8], labels=rows[i % 8]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


task.measure(step, torch=torch.__version__, transformers=transformers.__version__)
