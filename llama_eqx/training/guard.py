"""Numbers that stay numbers: what is tested before a state is kept."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from llama_eqx.errors import NonFiniteError


@jax.jit
def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether every float of every array is a finite number."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]))


def require_finite(state: PyTree[Array], step: int) -> None:
    """Raises `NonFiniteError` when not every number of a state that is to be saved is finite."""
    if not all_finite(state):
        raise NonFiniteError(
            "weights or the state of the optimizer are not finite: they are not saved",
            where=f"step {step}",
            kept="the checkpoints before, all of whose numbers are finite",
            next="look at the weights that the run started from: init_from",
        )
