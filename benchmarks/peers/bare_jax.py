"""A Llama in JAX alone: a dict of stacked arrays, one scan, AdamW by hand, donated state. Our loss against it is the framework's cost."""

import os
import zlib

from benchmarks.task import Task

task = Task.given()
if task.device == "cpu":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

dims, options = task.dims, task.options
LAYERS, EMBED, HEADS, KV, HEAD, MLP = (dims[name] for name in ("layers", "embed", "heads", "kv_heads", "head_dim", "mlp"))
state_dtype = jnp.bfloat16 if task.precision == "bfloat16" else jnp.float32
compute = jnp.float32 if task.precision == "float32" else jnp.bfloat16
attention = options.get("attention", "xla")  # or cudnn


def initial(key):
    def normal(name, *shape):
        return (0.02 * jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), shape)).astype(state_dtype)

    blocks = {
        "qkv": normal("qkv", LAYERS, EMBED, (HEADS + 2 * KV) * HEAD),
        "out_proj": normal("out_proj", LAYERS, HEADS * HEAD, EMBED),
        "gate_up": normal("gate_up", LAYERS, EMBED, 2 * MLP),
        "down": normal("down", LAYERS, MLP, EMBED),
        "attn_norm": jnp.ones((LAYERS, EMBED), state_dtype),
        "ffn_norm": jnp.ones((LAYERS, EMBED), state_dtype),
    }
    params = {"embed": normal("embed", dims["vocab"], EMBED), "blocks": blocks, "norm": jnp.ones(EMBED, state_dtype)}
    return params if task.tied else params | {"head": normal("head", EMBED, dims["vocab"])}


def normalised(x, weight):
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)).astype(x.dtype) * weight.astype(x.dtype)


def rotated(x, cos, sin):
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def loss_of(params, rows):
    tokens, targets = rows[:, :-1], rows[:, 1:]
    angles = jnp.arange(task.seq)[:, None] * task.theta ** (-jnp.arange(0, HEAD, 2) / HEAD)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]

    def block(x, weights):
        weights = {name: weight.astype(compute) for name, weight in weights.items()}
        heads = (normalised(x, weights["attn_norm"]) @ weights["qkv"]).reshape(*x.shape[:2], HEADS + 2 * KV, HEAD)
        q, k, v = jnp.split(heads, (HEADS, HEADS + KV), 2)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attention)
        x = x + y.reshape(*x.shape[:2], -1) @ weights["out_proj"]
        gate, up = jnp.split(normalised(x, weights["ffn_norm"]) @ weights["gate_up"], 2, -1)
        return x + (jax.nn.silu(gate) * up) @ weights["down"], None

    if (remat := options.get("remat", "none")) != "none":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

        def policy(primitive, *args, **kwargs):  # also cuDNN's output and statistics: otherwise its forward pass runs twice
            return primitive.name.startswith("dot_product_attention_fwd") or dots(primitive, *args, **kwargs)

        block = jax.checkpoint(block, prevent_cse=False, policy=policy if remat == "dots" else None)
    x, _ = jax.lax.scan(block, params["embed"].astype(compute)[tokens], params["blocks"], unroll=options.get("unroll", 1))
    x = normalised(x, params["norm"])
    head = (params["embed"].T if task.tied else params["head"]).astype(compute)

    def chunk_loss(x, targets):
        logits = (x @ head).astype(jnp.float32)
        return jnp.sum(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0])

    if (chunks := options.get("chunks", 1)) == 1:
        return chunk_loss(x, targets) / targets.size
    split = lambda a: jnp.moveaxis(a.reshape(a.shape[0], chunks, -1, *a.shape[2:]), 1, 0)  # noqa: E731
    total, _ = jax.lax.scan(lambda total, each: (total + jax.checkpoint(chunk_loss)(*each), None), 0.0, (split(x), split(targets)))
    return total / targets.size


@jax.jit(donate_argnums=0)
def update(state, rows):
    params, first, second, count = state
    loss, gradient = jax.value_and_grad(loss_of)(params, rows)
    count, b1, b2 = count + 1, 0.9, 0.95
    first = jax.tree.map(lambda m, g: (b1 * m + (1 - b1) * g).astype(m.dtype), first, gradient)
    second = jax.tree.map(lambda v, g: (b2 * v + (1 - b2) * g * g).astype(v.dtype), second, gradient)

    def stepped(p, m, v):
        direction = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + 1e-8)
        return (p - 3e-4 * (direction + 0.1 * p)).astype(p.dtype)

    return (jax.tree.map(stepped, params, first, second), first, second, count), loss


params = jax.jit(initial)(jax.random.key(0))
zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
state = (params, zeros(), zeros(), jnp.zeros((), jnp.float32))
rows = [jnp.asarray(array, jnp.int32) for array in task.rows()]


def step(i):
    global state
    state, loss = update(state, rows[i % 8])
    return loss


task.measure(step, jax=jax.__version__)
