"""Measures of a step that are not free, and so are recorded only when `train.meters` names them; the default is `update_norm`."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, PyTree

Meter = Callable[[PyTree, PyTree, PyTree], Float32[Array, ""] | Mapping[str, Float32[Array, ""]]]


def update_norm(model: PyTree, gradient: PyTree, update: PyTree) -> Float32[Array, ""]:
    """The norm of the update over all parameters.

    For it, XLA for GPUs writes the update to memory and reads update and parameters once more: 12 bytes per parameter on top of 26.
    """
    return optax.tree.norm(update)


def dead_updates(model: PyTree, gradient: PyTree, update: PyTree) -> Float32[Array, ""]:
    """The share of parameters that, rounded to bfloat16, would be the same before and after the update."""

    def dead(p: Array, u: Array) -> Array:
        before = jax.lax.reduce_precision(p.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
        after = jax.lax.reduce_precision(before + u.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
        return jnp.sum(after == before, dtype=jnp.float32)

    counts = jax.tree.leaves(jax.tree.map(dead, model, update))
    return jnp.stack(counts).sum() / float(sum(leaf.size for leaf in jax.tree.leaves(model)))  # more than an int32 can count


# Functions of the model before the step, the gradient before clipping, and what is added to the model. Each is recorded as the metric
# `optim/<name>`, or as `optim/<name>/<part>` if it returns several by name.
METERS: dict[str, Meter] = {"update_norm": update_norm, "dead_updates": dead_updates}
