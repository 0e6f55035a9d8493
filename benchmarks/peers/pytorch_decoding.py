"""A plain PyTorch Llama with a static cache, in the manner of gpt-fast: one token per call, `compile` as an option."""

from benchmarks.task import Task

task = Task.given()

import torch
import torch.nn.functional as F
from torch import nn

dims, prompt = task.dims, task.options["prompt"]
HEADS, KV, HEAD = dims["heads"], dims["kv_heads"], dims["head_dim"]
WIDTHS = [HEADS * HEAD, KV * HEAD, KV * HEAD]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        embed = dims["embed"]
        self.qkv = nn.Linear(embed, sum(WIDTHS), bias=False)
        self.out = nn.Linear(WIDTHS[0], embed, bias=False)
        self.gate_up = nn.Linear(embed, 2 * dims["mlp"], bias=False)
        self.down = nn.Linear(dims["mlp"], embed, bias=False)
        self.attn_norm, self.ffn_norm = nn.RMSNorm(embed, eps=1e-5), nn.RMSNorm(embed, eps=1e-5)

    def forward(self, x, cos, sin, cache, position, mask):
        rows, length, _ = x.shape
        parts = self.qkv(self.attn_norm(x)).split(WIDTHS, -1)
        q, k, v = (part.view(rows, length, -1, HEAD).transpose(1, 2) for part in parts)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        keys, values = cache
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=HEADS != KV)
        x = x + self.out(y.transpose(1, 2).reshape(rows, length, -1))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(dims["vocab"], dims["embed"])
        self.blocks = nn.ModuleList(Block() for _ in range(dims["layers"]))
        self.norm = nn.RMSNorm(dims["embed"], eps=1e-5)
        self.head = nn.Linear(dims["embed"], dims["vocab"], bias=False)
        if task.tied:
            self.head.weight = self.embed.weight
        for matrix in (p for p in self.parameters() if p.ndim == 2):
            nn.init.normal_(matrix, 0, 0.02)
        angles = torch.outer(torch.arange(task.seq).float(), task.theta ** (-torch.arange(0, HEAD, 2).float() / HEAD))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens, position, caches):
        x = self.embed(tokens)
        mask = (torch.arange(task.seq, device=x.device)[None] <= position[:, None])[None, None]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, self.cos[position], self.sin[position], cache, position, mask)
        return self.head(self.norm(x[:, -1:])).argmax(-1)


def rotated(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


device = "cuda" if task.device == "gpu" else "cpu"
dtype = torch.bfloat16 if task.precision == "bfloat16" else torch.float32
torch.set_num_threads(task.threads)
torch.manual_seed(0)
with torch.device(device):
    model = Llama()
cos, sin = model.cos, model.sin
model = model.to(dtype).eval()
model.cos, model.sin = cos, sin
caches = [tuple(torch.zeros(task.batch, KV, task.seq, HEAD, device=device, dtype=dtype) for _ in range(2)) for _ in range(dims["layers"])]
for array in (array for cache in caches for array in cache):
    torch._dynamo.mark_static_address(array)  # without it a graph of CUDA, which may not write into its arguments, is given up
tokens = torch.from_numpy(task.rows()[0][:, :prompt]).to(device)
positions = torch.arange(task.seq, device=device)
one = torch.compile(model, mode="reduce-overhead" if device == "cuda" else None, fullgraph=True) if task.options.get("compile") else model


@torch.no_grad()
def generate(n):
    token = model(tokens, positions[:prompt], caches)
    found = [token]
    for i in range(n - 1):
        token = one(token.clone(), positions[prompt + i].clone()[None], caches)
        found.append(token.clone())
    return torch.cat(found, 1).cpu().numpy()


task.measure_decoding(generate, torch=torch.__version__)
