"""What a run computes on its devices. The loop executes it; it can also be compiled ahead of time for devices that are not here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray

from llama_eqx.batch import Batch
from llama_eqx.data.cache import cache_dir
from llama_eqx.model.kernel.shards import ways
from llama_eqx.model.llama import Llama
from llama_eqx.sharding import Layout, axis_names, check_shapes
from llama_eqx.training.evaluation import Score, make_score
from llama_eqx.training.loss import Loss, LossSums, policy_view
from llama_eqx.training.optimizer import learning, transformation
from llama_eqx.training.run import RunConfig
from llama_eqx.training.state import TrainState, init_state
from llama_eqx.training.step import Metrics, make_step, microbatches


class Program(NamedTuple):
    """Pure functions, not yet jitted: `initial(key)`, `step((batch, key), state)`, the `loss` that the step minimises and the `score` of a
    held-out batch.

    `shapes` is the abstract state, and `shardings` says where each of its leaves lives. `remarks` are what a user may not expect from the
    settings on that platform.
    """

    initial: Callable[[PRNGKeyArray], TrainState]
    step: Callable[[tuple[Batch, PRNGKeyArray], TrainState], tuple[TrainState, Metrics]]
    loss: Loss
    score: Score
    shapes: TrainState
    shardings: TrainState
    remarks: list[str]


def make_program(config: RunConfig, layout: Layout) -> Program:
    """Builds the program and allocates nothing. `config.model.dims.vocab` must be known.

    Raises `ConfigError` when a size does not divide over the mesh, or a kernel is not available there.
    """
    train, platform = config.train, layout.mesh.devices.flat[0].platform
    remarks = layout.check({"batch": train.batch_size, "seq": train.seq_len, **vars(config.model.dims)})
    microbatches(train.batch_size, train.microbatch_size or train.batch_size, layout)
    kernel = config.kernel.choose(
        platform,
        dtype=config.precision.compute,
        seq=train.seq_len,
        slots=train.seq_len,
        head_dim=config.model.dims.head_dim,
        shards=ways(layout.mesh, layout.spec(("batch", "seq"), (train.batch_size, train.seq_len))[1]),
    )
    if kernel.reason:
        remarks.append(f"attention is computed by {kernel.name}, {kernel.reason}")
    if platform == "cpu" and getattr(config.remat, "offloaded", ()):
        remarks.append("a CPU has only one memory: what remat would offload stays in it")
    if kernel.name == "cudnn" and "attention" in getattr(config.remat, "offloaded", ()):
        remarks.append("cuDNN's attention cannot be offloaded, as what it keeps has no names: it is computed again in the backward pass")
    optimizer = transformation(config.optimizer, train.only)

    def initial(key: PRNGKeyArray) -> TrainState:
        return init_state(config.model, optimizer, config.precision, config.guard, key)

    shapes = eqx.filter_eval_shape(initial, jax.random.key(0))
    check_shapes(shapes.model, config.model.dims)
    known = {"batch", "seq", "residual", *vars(config.model.dims)}.union(*axis_names(shapes.model))
    remarks += [f"sharding.axes.{axis} splits nothing: no array has such an axis" for axis in layout.rules.axes if axis not in known]
    view = policy_view(config.precision, config.remat, layout, config.kernel, train.unroll)
    loss = config.loss.build(view, layout)
    loss = loss if train.only is None else _held(loss, train.only)
    rate = lambda step: config.schedule.rate(step, train.steps)  # noqa: E731
    step = make_step(optimizer, rate, loss, layout, train.microbatch_size, config.guard, train.meters, train.only)
    score = make_score(view, layout, config.loss.chunk)
    return Program(initial, step, loss, score, shapes, layout.shardings(shapes), remarks)


def _held(loss: Loss, only: tuple[str, ...]) -> Loss:
    """The loss as a function of `only` these parameters: no gradient of the others is computed."""

    def held(model: Llama, batch: Batch, key: PRNGKeyArray | None) -> tuple[Array, LossSums]:
        hold = lambda leaf, learns: leaf if learns else jax.lax.stop_gradient(leaf)  # noqa: E731
        return loss(jax.tree.map(hold, model, learning(only, model)), batch, key)

    return held


def jitted_step(program: Program, config: RunConfig) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step as a run executes it, with the compiler options of its mesh. The state is donated.

    A call returns before the device is done. `eqx.filter_jit` would wait for the device at the end of each call, to report errors that
    the program itself raises, and the device would then idle until the host's next call.
    """
    options: Any = {"compiler_options": config.mesh.compiler_options}
    return jax.jit(program.step, donate_argnums=1, **options)


def keep_compiled() -> None:
    """Keeps all but the smallest compiled programs in the cache folder for the next start, unless JAX has another folder for them."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
