"""The seam by which a policy reaches into every block without the math knowing of it."""

import dataclasses
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


def outside(model: Any) -> dict[str, Any]:
    """What a policy on the blocks does not reach, by name: embedding, last norm, head, and parts of a model of one's own. Not the rotary
    embedding, which has no weights.
    """
    names = [field.name for field in dataclasses.fields(model) if not field.metadata.get("static")]
    return {name: getattr(model, name) for name in names if name not in ("blocks", "rotary")}
