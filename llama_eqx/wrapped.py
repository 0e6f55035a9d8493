"""The seam by which a policy reaches into every block without the math knowing of it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx


class Wrapped(eqx.Module):
    """A block seen through a policy: `wrap` turns `f(block, x, *rest) -> (x, cache)` into another of the same signature.

    Put on `model.blocks` inside the loss, so the structure of the gradient is the model's own. `unroll` blocks make one turn of the loop.
    """

    block: eqx.Module
    wrap: Callable[[Callable], Callable] = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __call__(self, *args: Any) -> Any:
        return self.wrap(lambda block, *args: block(*args))(self.block, *args)
