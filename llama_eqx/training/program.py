"""What a run computes on its devices: the loop executes it, and it can be compiled ahead of time for devices that are not here."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from llama_eqx.batch import Batch
from llama_eqx.sharding import Layout, check_shapes
from llama_eqx.training.loss import Loss, policy_view
from llama_eqx.training.run import RunConfig
from llama_eqx.training.state import TrainState, init_state
from llama_eqx.training.step import Metrics, make_step


class Program(NamedTuple):
    """Pure functions, not yet jitted: `initial(key)`, `step((batch, key), state)` and the `loss` that the step minimises.

    `shapes` is the abstract state, `shardings` says where each of its leaves lives.
    """

    initial: Callable[[PRNGKeyArray], TrainState]
    step: Callable[[tuple[Batch, PRNGKeyArray], TrainState], tuple[TrainState, Metrics]]
    loss: Loss
    shapes: TrainState
    shardings: TrainState


def make_program(config: RunConfig, layout: Layout) -> Program:
    """Allocates nothing. `config.model.dims.vocab` must be known.

    Raises `ConfigError` when a size does not divide over the mesh.
    """
    optimizer = config.optimizer.build()

    def initial(key: PRNGKeyArray) -> TrainState:
        return init_state(config.model, optimizer, config.precision, key)

    shapes = eqx.filter_eval_shape(initial, jax.random.key(0))
    check_shapes(shapes.model, config.model.dims)
    view = policy_view(config.precision, config.remat, layout, config.kernel, config.train.unroll)
    loss = config.loss.build(view, layout)
    rate = lambda step: config.schedule.rate(step, config.train.steps)  # noqa: E731
    step = make_step(optimizer, rate, loss, layout, config.train.microbatch_size)
    return Program(initial, step, loss, shapes, layout.shardings(shapes))
