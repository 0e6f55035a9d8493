"""How a policy reaches into every block without the math knowing of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx


class Wrapped(eqx.Module):
    """A block under a policy: `wrap` turns `f(block, x, *rest) -> (x, cache)` into a function of the same signature.

    It replaces `model.blocks` inside the loss, so the gradient has the model's own structure. A turn of the loop runs `unroll` blocks.
    """

    block: eqx.Module
    wrap: Callable[[Callable], Callable] = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __call__(self, *args: Any) -> Any:
        return self.wrap(lambda block, *args: block(*args))(self.block, *args)


def outside(model: Any) -> dict[str, Any]:
    """The parts that a policy on the blocks does not reach, by name: embedding, last norm, head, and parts of a custom model. The rotary
    embedding is left out: it has no weights.
    """
    names = [field.name for field in dataclasses.fields(model) if not field.metadata.get("static")]
    return {name: getattr(model, name) for name in names if name not in ("blocks", "rotary")}
