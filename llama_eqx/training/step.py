"""One update of the parameters, as a pure function on arrays."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, PRNGKeyArray

from llama_eqx.batch import Batch
from llama_eqx.errors import ConfigError
from llama_eqx.model.llama import Llama
from llama_eqx.precision import cast
from llama_eqx.sharding import Layout, axis_names, mesh_axes
from llama_eqx.training.guard import GuardConfig
from llama_eqx.training.loss import Loss, LossSums
from llama_eqx.training.meters import METERS
from llama_eqx.training.optimizer import learning
from llama_eqx.training.state import TrainState

Metrics = dict[str, Float32[Array, ""]]


def make_gradient(
    loss: Loss, layout: Layout, microbatch_size: int | None = None, only: tuple[str, ...] | None = None
) -> Callable[[Llama, Batch, PRNGKeyArray], tuple[LossSums, Llama]]:
    """Returns a function from a model, a batch and the key of a step to the reported sums and the gradient of the minimised sum.

    With `microbatch_size`, both are accumulated over that many rows at a time: of the gradient, what is of `only` these parameters, as the
    others, which the loss holds, have none.
    """
    value_and_gradient = jax.value_and_grad(loss, has_aux=True)

    def summed(model: Llama, batch: Batch, key: PRNGKeyArray) -> tuple[LossSums, Llama]:
        if microbatch_size in (None, len(batch.tokens)):
            (_, sums), gradient = value_and_gradient(model, batch, key)
            return sums, gradient
        learns = learning(only, model)

        def add(so_far: tuple[LossSums, Llama], each: tuple[Batch, Array]) -> tuple[tuple[LossSums, Llama], None]:
            microbatch, number = each
            (_, sums), gradient = value_and_gradient(model, microbatch, jax.random.fold_in(key, number))
            # Without the barrier a TPU's compiler moves an all-reduce out of this loop, and fails if a cast comes before the sum.
            gradient = jax.tree.map(jax.lax.optimization_barrier, eqx.filter(gradient, learns))
            new = jax.tree.map(lambda total, part: total + part.astype(jnp.float32), so_far, (sums, gradient))
            return (new[0], layout.place(new[1])), None

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), model)
        parts = split(batch, microbatch_size, layout)
        _, sums = jax.eval_shape(lambda parts: loss(model, jax.tree.map(lambda rows: rows[0], parts), key), parts)
        begin = jax.tree.map(lambda each: jnp.zeros((), jnp.float32), sums), layout.place(eqx.filter(zeros, learns))
        (sums, gradient), _ = jax.lax.scan(add, begin, (parts, jnp.arange(len(parts.tokens))))
        return sums, eqx.combine(gradient, zeros)

    return summed


def make_step(
    optimizer: optax.GradientTransformation,
    rate: Callable[[Array], Array],
    loss: Loss,
    layout: Layout,
    microbatch_size: int | None = None,
    guard: GuardConfig | None = None,
    meters: tuple[str, ...] = (),
    only: tuple[str, ...] | None = None,
) -> Callable[[tuple[Batch, PRNGKeyArray], TrainState], tuple[TrainState, Metrics]]:
    """Returns a step `((batch, key), state) -> (state, metrics)`; `state` may be donated.

    The gradient is that of the mean over the batch's targets, accumulated over microbatches if there are any.
    When the loss or gradient is not finite, as for a batch in which no target counts, or the `guard` finds a spike, the update is withheld
    on the device. If only some numbers of an update are not finite, those are withheld. `optim/withheld` is then 1, in the last case only
    if `meters` has `update_norm`.
    Metrics: `train/loss` in nats per token, the terms of the loss, `optim/lr`, `optim/grad_norm` (global, before clipping),
    `optim/withheld`, the `meters` and, if the guard looks for spikes, `optim/spike`, 1 for a spike.
    """
    summed = make_gradient(loss, layout, microbatch_size, only)

    def step(inputs: tuple[Batch, PRNGKeyArray], state: TrainState) -> tuple[TrainState, Metrics]:
        batch, key = inputs
        sums, gradient = summed(state.model, batch, jax.random.fold_in(key, state.step))
        weight = sums.weight  # if no target of a batch counts, the mean over them is not a number
        mean = sums.cross_entropy / weight
        gradient = jax.tree.map(lambda leaf: (leaf / weight).astype(leaf.dtype), gradient)
        gradient = layout.place(gradient)  # unconstrained, a gradient can lose an axis of its parameter's sharding
        norm = optax.tree.norm(optax.tree.cast(gradient, jnp.float32))
        lr = rate(state.step)

        # An average in bfloat16 would add 0.01 of what is new to 0.9883 of itself, and so end at 0.85 of the mean.
        direction, opt_state = optimizer.update(*cast((gradient, state.opt_state, state.model), "float32"))
        update = jax.tree.map(lambda d: -lr * d, direction)
        model = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.model, update)
        good, history, spikes = jnp.isfinite(mean) & jnp.isfinite(norm), state.history, {}
        if guard is not None and history is not None:
            spike, history = guard.judged(mean, norm, history)
            good, spikes = good & ~spike, {"optim/spike": spike.astype(jnp.float32)}

        # Every leaf keeps the dtype it began with. `good` does not depend on measures of the update, so no update has to be written to
        # memory for it (for `update_norm` it is).
        def keep(new: Array, old: Array) -> Array:
            new = new.astype(old.dtype)
            return jnp.where(good & jnp.isfinite(new), new, old)

        kept: Any = jax.tree.map(keep, (model, opt_state), (state.model, state.opt_state))

        new = layout.place(TrainState(state.step + 1, kept[0], kept[1], history))
        measured = {f"optim/{name}": METERS[name](state.model, gradient, update) for name in meters}
        measured = {
            f"{name}/{part}".rstrip("/"): value
            for name, found in measured.items()
            for part, value in (found.items() if isinstance(found, Mapping) else [("", found)])
        }
        whole = good & jnp.isfinite(measured.get("optim/update_norm", norm))
        metrics = {"train/loss": mean, "optim/lr": lr, "optim/grad_norm": norm, "optim/withheld": 1.0 - whole}
        terms = {f"train/{name}": term / weight for name, term in sums.terms.items()}
        return new, terms | metrics | measured | spikes

    return step


def microbatches(size: int, microbatch_size: int, layout: Layout) -> tuple[int, int]:
    """The number of microbatches in a batch of `size` rows, and the number of devices that the rows of each are split over.

    Raises `ConfigError` when they do not divide.
    """
    part = layout.spec(("batch",), (size,))[0]
    ways = math.prod(layout.mesh.shape[axis] for axis in mesh_axes(part))
    if microbatch_size % ways or size % microbatch_size:
        raise ConfigError(
            f"{size} rows over {ways} devices do not divide into microbatches of {microbatch_size}",
            where="train.microbatch_size",
            next=f"one of: {', '.join(str(n) for n in range(ways, size + 1, ways) if size % n == 0)}",
        )
    return size // microbatch_size, ways


def split(batch: Batch, microbatch_size: int, layout: Layout) -> Batch:
    """Reshapes a batch's arrays to "microbatches batch seq". Every microbatch has rows of every device, so no row moves."""
    count, ways = microbatches(len(batch.tokens), microbatch_size, layout)

    def of_array(axes: tuple[str, ...], rows: Array) -> Array:
        rows = rows.reshape(ways, count, microbatch_size // ways, *rows.shape[1:]).swapaxes(0, 1)
        rows = rows.reshape(count, microbatch_size, *rows.shape[3:])
        return jax.lax.with_sharding_constraint(rows, layout.sharding(("", *axes), rows.shape))

    leaves = [of_array(axes, leaf) for axes, leaf in zip(axis_names(batch), jax.tree.leaves(batch), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(batch), leaves)
