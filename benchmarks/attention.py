"""Times attention, forward and backward, by kernel and row length on this machine: the best of five interleaved runs.

    python benchmarks/attention.py [tokens…]

Prints one JSON line per length: for `plain` and `blocked`, the seconds and the compiler's temporary bytes.
"""

import json
import sys
import time

import jax

from llama_eqx.model.kernel.blocked import blocked
from llama_eqx.model.kernel.plain import plain

KERNELS = {"plain": lambda q, k, v: plain(q, k, v, 0, None), "blocked": lambda q, k, v: blocked(q, k, v, 0, None, 256, 256)}


def measure(tokens: int, heads: int = 8, kv_heads: int = 2, head_dim: int = 64) -> dict:
    q, k, v = (jax.random.normal(jax.random.key(i), (1, tokens, n, head_dim)) for i, n in enumerate((heads, kv_heads, kv_heads)))
    compiled, seconds = {}, {name: [] for name in KERNELS}
    for name, kernel in KERNELS.items():
        gradient = jax.value_and_grad(lambda q, k, v, kernel=kernel: kernel(q, k, v).sum(), argnums=(0, 1, 2))
        compiled[name] = jax.jit(gradient).lower(q, k, v).compile()
        jax.block_until_ready(compiled[name](q, k, v))
    for _ in range(5):
        for name, run in compiled.items():
            begun = time.perf_counter()
            jax.block_until_ready(run(q, k, v))
            seconds[name].append(time.perf_counter() - begun)
    memory = {name: run.memory_analysis().temp_size_in_bytes for name, run in compiled.items()}
    shape = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    best = {name: round(min(times), 4) for name, times in seconds.items()}
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **shape, "seconds": best, "temporary_bytes": memory}


for tokens in map(int, sys.argv[1:] or (128, 512, 1024, 2048, 4096)):
    print(json.dumps(measure(tokens)), flush=True)
