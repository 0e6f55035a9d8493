"""Everything that a training step changes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from llama_eqx.model.llama import Llama, LlamaConfig
from llama_eqx.precision import PrecisionConfig, cast
from llama_eqx.training.guard import GuardConfig, History


class TrainState(eqx.Module):
    """`step` counts batches seen, including those whose update was withheld; `history` is for finding spikes. Every leaf is an array."""

    step: Int[Array, ""]
    model: Llama
    opt_state: Any
    history: History | None = None

    @property
    def training(self) -> dict[str, Any]:
        """Everything but the model, as it is saved beside it."""
        return {"step": self.step, "opt_state": self.opt_state} | ({} if self.history is None else {"history": self.history})


def init_state(
    model: LlamaConfig, optimizer: optax.GradientTransformation, precision: PrecisionConfig, guard: GuardConfig, key: PRNGKeyArray
) -> TrainState:
    return first_state(cast(model.build(key=key), precision.params), optimizer, guard)


def first_state(model: Llama, optimizer: optax.GradientTransformation, guard: GuardConfig) -> TrainState:
    opt_state = optimizer.init(model)  # pyright: ignore[reportArgumentType]
    return TrainState(jnp.zeros((), jnp.int32), model, opt_state, guard.history())


def abstract(tree: Any, shardings: Any) -> Any:
    """The tree with shapes, dtypes and shardings in place of arrays."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)
