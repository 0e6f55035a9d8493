"""The sizes of a model by axis name: the only place where a size is written."""

import dataclasses

from llama_eqx.config import Config, nearest
from llama_eqx.errors import ConfigError


class Dims(Config):
    """Every size of a Llama, by the name of its axis in the modules' annotations.

    `vocab` may be None in YAML: it then becomes the tokenizer's size before the model is built.
    """

    vocab: int | None
    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    def check(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not 1 <= value < 2**31:
                raise ConfigError(f"{value} is not a size", where=field.name)
        if self.heads % self.kv_heads:
            divisors = [n for n in range(1, min(self.heads, 1024) + 1) if self.heads % n == 0]
            raise ConfigError(
                f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}",
                where="kv_heads",
                next=f"kv_heads may be one of {', '.join(map(str, divisors))}",
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd, but rotary embedding rotates pairs", where="head_dim")

    def of(self, axes: str, **own: int) -> tuple[int, ...]:
        """The sizes of the axes in a string of names: `(4096, 11008)` for "embed mlp". `own` sizes a variant's own axes: `rank=16`.

        Raises `ConfigError` for an axis whose size is not known.
        """
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | own
        for axis in axes.split():
            if axis not in sizes:
                raise ConfigError(f"no axis is called {axis}", where=axes, next=nearest(axis, sizes))
            if sizes[axis] is None:
                raise ConfigError("the vocabulary's size is not known yet", where="dims.vocab", next="set it, or let a tokenizer set it")
            if sizes[axis] < 1:
                raise ConfigError(f"{sizes[axis]} is not a size", where=axis)
        return tuple(sizes[axis] for axis in axes.split())
