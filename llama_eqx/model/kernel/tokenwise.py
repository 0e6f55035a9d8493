"""Layers that act on each token independently, and how they are computed."""

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from llama_eqx.tag import probed

# JAX's name for the platform a block is compiled for, where it is known at trace time: a trace for every platform takes longer.
PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
ONE_ROW: contextvars.ContextVar[bool] = contextvars.ContextVar("one_row", default=False)


def tokenwise(method: Callable) -> Callable:
    """Wraps a method of an array with axes batch and seq whose result at a token depends on that token only.

    For the gradient of a weight, XLA for CPUs copies the operands unless both are matrices, so there the batch is reshaped to one row.
    """

    @functools.wraps(method)
    def wrapped(self: Any, x: Array) -> Any:
        if not ONE_ROW.get() or probed():  # a probe must see batch and seq
            return method(self, x)
        batch, seq, *rest = x.shape
        results = method(self, x.reshape(batch * seq, *rest))
        return jax.tree.map(lambda y: y.reshape(batch, seq, *y.shape[1:]), results)

    return wrapped
