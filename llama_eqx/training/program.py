"""What a run computes on its devices: the loop executes it, and it can be compiled ahead of time for devices that are not here."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from llama_eqx.batch import Batch
from llama_eqx.data.cache import cache_dir
from llama_eqx.model.llama import Llama
from llama_eqx.sharding import Layout, check_shapes
from llama_eqx.training.loss import policy_view
from llama_eqx.training.run import RunConfig
from llama_eqx.training.state import TrainState, init_state
from llama_eqx.training.step import Metrics, make_step


class Program(NamedTuple):
    """Pure functions, not yet jitted: `initial(key)` and `step((batch, key), state)`; `view` is the model as its loss sees it.

    `shapes` is the abstract state, `shardings` says where each of its leaves lives.
    """

    initial: Callable[[PRNGKeyArray], TrainState]
    step: Callable[[tuple[Batch, PRNGKeyArray], TrainState], tuple[TrainState, Metrics]]
    view: Callable[[Llama], Llama]
    shapes: TrainState
    shardings: TrainState


def make_program(config: RunConfig, layout: Layout) -> Program:
    """Allocates nothing. `config.model.dims.vocab` must be known.

    Raises `ConfigError` when a size does not divide over the mesh.
    """
    layout.check({"batch": config.train.batch_size, "seq": config.train.seq_len, **vars(config.model.dims)})
    optimizer = config.optimizer.build()

    def initial(key: PRNGKeyArray) -> TrainState:
        return init_state(config.model, optimizer, config.precision, key)

    shapes = eqx.filter_eval_shape(initial, jax.random.key(0))
    check_shapes(shapes.model, config.model.dims)
    view = policy_view(config.precision, config.remat, layout)
    step = make_step(optimizer, lambda step: config.schedule.rate(step, config.train.steps), view, layout)
    return Program(initial, step, view, shapes, layout.shardings(shapes))


def keep_compiled() -> None:
    """Programs that took a second to compile are kept in the cache folder for the next start, unless JAX was told another one."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
