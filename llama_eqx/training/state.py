"""All that a step of training changes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from llama_eqx.model.llama import Llama, LlamaConfig
from llama_eqx.precision import PrecisionConfig, cast


class TrainState(eqx.Module):
    """`step` counts batches seen, updates that were withheld included. Every leaf is an array."""

    step: Int[Array, ""]
    model: Llama
    opt_state: Any


def init_state(model: LlamaConfig, optimizer: optax.GradientTransformation, precision: PrecisionConfig, key: PRNGKeyArray) -> TrainState:
    return first_state(cast(model.build(key=key), precision.params), optimizer)


def first_state(model: Llama, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(step=jnp.zeros((), jnp.int32), model=model, opt_state=optimizer.init(model))  # pyright: ignore[reportArgumentType]


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings in place of arrays."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)
