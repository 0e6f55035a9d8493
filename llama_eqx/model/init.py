"""Parameter initialisation. It is a config group because the ranking of two ideas can depend on it."""

import abc
import math
import typing
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from llama_eqx.config import Config
from llama_eqx.dims import Dims


def named(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """The key of the part called `name`.

    Keys depend on names, not on the order of drawing, so two models share the values of every tensor they have in common.
    """
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


class InitConfig(Config):
    """Draws matrices from a normal distribution; the variants differ in its standard deviation."""

    @abc.abstractmethod
    def std(self, fan_in: int) -> float: ...

    def matrix(self, module: type, field: str, dims: Dims, *, fan_in: str, key: PRNGKeyArray, **own: int) -> Array:
        """Draws a value for `module.field`, whose shape is read from its annotation.

        `fan_in` names the axes that are summed over; `own` are the sizes of axes that are not in `dims`, such as `rank=16`.
        """
        scale = self.std(math.prod(dims.of(fan_in, **own)))
        return scale * jax.random.normal(named(key, field), dims.of(annotation(module, field), **own), jnp.float32)


class FanInInitConfig(InitConfig):
    """Standard deviation gain / sqrt(fan-in), which keeps the variance of activations at every width (LeCun et al., 1998)."""

    gain: float

    def std(self, fan_in: int) -> float:
        return self.gain / math.sqrt(fan_in)


class FixedInitConfig(InitConfig):
    """The same standard deviation for every matrix, as GPT-2's 0.02 (Radford et al., 2019), without its scaling of residual projections."""

    value: float

    def std(self, fan_in: int) -> float:
        return self.value


def annotation(module: type, field: str) -> str:
    """The axis names of a field: "embed mlp" for `Float[Array, "embed mlp"] | None`."""
    hint = typing.get_type_hints(module)[field]
    return next(h.dim_str for h in (hint, *typing.get_args(hint)) if hasattr(h, "dim_str"))
