"""Greedy decoding by this package: `generate_tokens` on a model laid out for decoding or, with `stacked`, as it comes from a checkpoint."""

from benchmarks.task import Task

task = Task.given()

import jax
import jax.numpy as jnp
import numpy as np

from llama_eqx import build_model, generate_tokens, load_config
from llama_eqx.generation.layout import for_decoding
from llama_eqx.precision import cast

dims = [f"model.dims.{name}={size}" for name, size in task.dims.items()]
config = load_config(
    *dims,
    f"model.rotary.theta={task.theta}",
    f"model.tied={str(task.tied).lower()}",
    f"model.context={task.seq}",
    f"train.seq_len={task.seq}",
)
model = build_model(config.model, key=jax.random.key(0))
if task.precision == "bfloat16":
    model = cast(model, "bfloat16")
model = model if task.options.get("stacked") else for_decoding(model)
prompts = [[int(i) for i in row] for row in task.rows()[0][:, : task.options["prompt"]]]


settings = {"prefill_chunk": task.options["chunk"]} if task.options.get("chunk") else {}


def generate(n: int) -> np.ndarray:
    return np.asarray(generate_tokens(model, prompts, n, **settings).tokens)


task.measure_decoding(generate, jax=jax.__version__, device_kind=jax.devices()[0].device_kind, dtype=str(jnp.dtype(model.embed.dtype)))
