"""A plain PyTorch Llama: fused projections, scaled_dot_product_attention, fused AdamW; `compile` as an option."""

from benchmarks.task import Task

task = Task.given()

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = dims["heads"], dims["kv_heads"], dims["head_dim"]
        widths = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        self.widths, embed = widths, dims["embed"]
        self.qkv = nn.Linear(embed, sum(widths), bias=False)
        self.out = nn.Linear(widths[0], embed, bias=False)
        self.gate_up = nn.Linear(embed, 2 * dims["mlp"], bias=False)
        self.down = nn.Linear(dims["mlp"], embed, bias=False)
        self.attn_norm, self.ffn_norm = nn.RMSNorm(embed, eps=1e-5), nn.RMSNorm(embed, eps=1e-5)

    def forward(self, x, cos, sin):
        rows, length, _ = x.shape
        parts = self.qkv(self.attn_norm(x)).split(self.widths, -1)
        q, k, v = (part.view(rows, length, -1, self.head_dim).transpose(1, 2) for part in parts)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.out(y.transpose(1, 2).reshape(rows, length, -1))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, task):
        super().__init__()
        dims = task.dims
        self.embed = nn.Embedding(dims["vocab"], dims["embed"])
        self.blocks = nn.ModuleList(Block(dims) for _ in range(dims["layers"]))
        self.norm = nn.RMSNorm(dims["embed"], eps=1e-5)
        self.head = nn.Linear(dims["embed"], dims["vocab"], bias=False)
        if task.tied:
            self.head.weight = self.embed.weight
        for matrix in (p for p in self.parameters() if p.ndim == 2):
            nn.init.normal_(matrix, 0, 0.02)
        frequencies = task.theta ** (-torch.arange(0, dims["head_dim"], 2).float() / dims["head_dim"])
        angles = torch.outer(torch.arange(task.seq).float(), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens, targets):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def rotated(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


device = "cuda" if task.device == "gpu" else "cpu"
torch.set_num_threads(task.threads)
torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
torch.manual_seed(0)
with torch.device(device):
    model = Llama(task)
if task.precision == "bfloat16":
    cos, sin = model.cos, model.sin
    model = model.to(torch.bfloat16)
    model.cos, model.sin = cos, sin
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
forward = torch.compile(model) if task.options.get("compile") else model
rows = [torch.from_numpy(array).to(device) for array in task.rows()]


def step(i):
    with torch.autocast(device, torch.bfloat16, enabled=task.precision == "mixed"):
        loss = forward(rows[i % 8][:, :-1], rows[i % 8][:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


task.measure(step, torch=torch.__version__)
