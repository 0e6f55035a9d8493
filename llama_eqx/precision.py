"""The dtypes in which numbers are kept and used to compute: a policy on the tree, unknown to the model."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama_eqx.config import Config, nearest
from llama_eqx.errors import ConfigError
from llama_eqx.wrapped import outside

Dtype = Literal["float32", "bfloat16"]
STORED = ("float32", "bfloat16", "float16")  # dtypes of weights in files and of caches


def stored(dtype: DTypeLike, where: str = "dtype") -> jnp.dtype:
    """The dtype, which is one of `STORED`. Raises `ConfigError` for any other."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in STORED:
        raise ConfigError(f"neither weights nor caches are kept in {name}", where=where, next=nearest(name, STORED))
    return jnp.dtype(name)


class PrecisionConfig(Config):
    """`params` is the dtype in which parameters and optimizer state are kept (Adafactor's is always float32), `compute` that of weights and
    activations inside the loss. The optimizer computes in float32.
    """

    params: Dtype
    compute: Dtype

    def apply(self, model: Any) -> Any:
        """The model with the parts outside its blocks as the loss sees them. `block` casts the blocks, one layer at a time."""
        if self.params == self.compute == "float32":
            return model
        seen = [Lookup(part, self.compute) if name == "embed" else cast(part, self.compute) for name, part in outside(model).items()]
        return eqx.tree_at(lambda m: [*outside(m).values()], model, seen, is_leaf=lambda x: x is None)

    def block(self, block: Callable) -> Callable:
        """Wraps a block so that its weights are cast inside the scan: one layer's copy exists at a time."""
        if self.params == self.compute:
            return block
        return lambda module, *rest: block(cast(module, self.compute), *rest)


class Lookup(eqx.Module):
    """An embedding table that is read in another dtype. The cast follows a lookup in float32, so gradients add up in float32: in bfloat16
    a sum would stop growing at some 256 times what is added, and a frequent token is added more often.
    """

    table: Float[Array, "vocab embed"]
    dtype: str = eqx.field(static=True)

    def __getitem__(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        return self.table.astype(jnp.float32)[tokens].astype(self.dtype)

    @property
    def T(self) -> Float[Array, "embed vocab"]:
        return self.table.T.astype(self.dtype)


def cast(tree: Any, dtype: str) -> Any:
    """The tree with every floating-point leaf in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
