"""One update of the parameters, as a pure function on arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, PRNGKeyArray

from llama_eqx.batch import Batch
from llama_eqx.model.llama import Llama
from llama_eqx.sharding import Layout
from llama_eqx.training.loss import cross_entropy
from llama_eqx.training.state import TrainState

Metrics = dict[str, Float32[Array, ""]]


def make_step(
    optimizer: optax.GradientTransformation,
    rate: Callable[[Array], Array],
    view: Callable[[Llama], Llama],
    layout: Layout,
) -> Callable[[tuple[Batch, PRNGKeyArray], TrainState], tuple[TrainState, Metrics]]:
    """A step `((batch, key), state) -> (state, metrics)`; `state` may be donated.

    When loss, gradient or update is not finite the update is withheld on the device, and `optim/withheld` is 1.
    Metrics: `train/loss` in nats per token, `optim/lr`, `optim/grad_norm` (global, before clipping), `optim/update_norm`, `optim/withheld`.
    """

    def step(inputs: tuple[Batch, PRNGKeyArray], state: TrainState) -> tuple[TrainState, Metrics]:
        batch, key = inputs
        key = jax.random.fold_in(key, state.step)
        loss, gradient = jax.value_and_grad(lambda model: cross_entropy(view(model), batch, key))(state.model)
        gradient = layout.place(gradient)  # unconstrained, a gradient can lose an axis of its parameter's sharding
        norm = optax.tree.norm(gradient)
        lr = rate(state.step)

        direction, opt_state = optimizer.update(gradient, state.opt_state, state.model)  # pyright: ignore[reportArgumentType]
        update = jax.tree.map(lambda d: -lr * d, direction)
        update_norm = optax.tree.norm(update)
        model = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.model, update)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(update_norm)
        kept: Any = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (model, opt_state), (state.model, state.opt_state))

        new = layout.place(TrainState(state.step + 1, *kept))
        metrics = {"train/loss": loss, "optim/lr": lr, "optim/grad_norm": norm, "optim/update_norm": update_norm}
        return new, metrics | {"optim/withheld": 1.0 - finite}

    return step
