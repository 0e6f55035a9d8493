"""The training step of this package as its loop runs it: compiled from a config, with donated state."""

from benchmarks.task import Task

task = Task.given()

import jax
import numpy as np

from llama_eqx import load_config
from llama_eqx.batch import Batch
from llama_eqx.model.init import named
from llama_eqx.sharding import Layout
from llama_eqx.training.program import jitted_step, make_program

config = load_config(*task.options["overrides"])
layout = Layout(config.mesh.build(), config.sharding)
program = make_program(config, layout)
key = jax.random.key(0)
state = jax.jit(program.initial, out_shardings=program.shardings)(named(key, "init"))
step_fn = jitted_step(program, config)
sharding = layout.sharding(("batch", "seq"), (task.batch, task.seq))
batches = [
    jax.device_put(
        Batch(array[:, :-1].astype(np.int32), array[:, 1:].astype(np.int32), np.ones((task.batch, task.seq), np.float32)), sharding
    )
    for array in task.rows()
]


def step(i: int) -> jax.Array:
    global state
    state, metrics = step_fn((batches[i % 8], key), state)
    return metrics["train/loss"]


task.measure(step, jax=jax.__version__, device_kind=jax.devices()[0].device_kind)
