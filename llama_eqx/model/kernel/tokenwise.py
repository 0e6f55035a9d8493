"""Layers that treat every token alone, and how they are computed."""

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from llama_eqx.tag import probed

# What a block is compiled for, as JAX calls it, where that is known while it is traced: a trace for every platform takes longer.
PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
ONE_ROW: contextvars.ContextVar[bool] = contextvars.ContextVar("one_row", default=False)


def tokenwise(method: Callable) -> Callable:
    """A method of an array whose result at a token, of the axes batch and seq, depends on that token only.

    XLA for CPUs copies what it multiplies for the gradient of a weight unless the products are of matrices: a batch is one row there.
    """

    @functools.wraps(method)
    def wrapped(self: Any, x: Array) -> Any:
        if not ONE_ROW.get() or probed():  # a probe is to see batch and seq
            return method(self, x)
        batch, seq, *rest = x.shape
        results = method(self, x.reshape(batch * seq, *rest))
        return jax.tree.map(lambda y: y.reshape(batch, seq, *y.shape[1:]), results)

    return wrapped
