"""The position-wise half of a block: every variant in table 1 of "GLU Variants Improve Transformer" (Shazeer, 2020, arXiv 2002.05202)."""

import abc
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llama_eqx.config import Config
from llama_eqx.dims import Dims
from llama_eqx.model.init import InitConfig
from llama_eqx.model.kernel.tokenwise import tokenwise
from llama_eqx.tag import tag

Activation = Literal["silu", "gelu", "relu", "squared_relu", "sigmoid", "identity"]


class FeedForward(eqx.Module):
    @abc.abstractmethod
    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]: ...


class FeedForwardConfig(Config):
    @abc.abstractmethod
    def build(self, dims: Dims, init: InitConfig, *, key: PRNGKeyArray) -> FeedForward: ...


class GatedFeedForward(FeedForward):
    """Three projections, down(activation(gate(x)) * up(x)): SwiGLU with silu, GEGLU with gelu, ReGLU with relu, GLU with sigmoid."""

    gate_proj: Float[Array, "embed mlp"]
    up_proj: Float[Array, "embed mlp"]
    down_proj: Float[Array, "mlp embed"]
    activation: Callable[[Array], Array] = eqx.field(static=True)

    @tokenwise
    def __call__(self, x: Float[Array, "*tokens embed"]) -> Float[Array, "*tokens embed"]:
        gate, up = tag(x @ self.gate_proj, "gate"), tag(x @ self.up_proj, "up")
        return tag((self.activation(gate) * up) @ self.down_proj, "down")


class GatedFeedForwardConfig(FeedForwardConfig):
    activation: Activation

    def build(self, dims: Dims, init: InitConfig, *, key: PRNGKeyArray) -> GatedFeedForward:
        return GatedFeedForward(
            gate_proj=init.matrix(GatedFeedForward, "gate_proj", dims, fan_in="embed", key=key),
            up_proj=init.matrix(GatedFeedForward, "up_proj", dims, fan_in="embed", key=key),
            down_proj=init.matrix(GatedFeedForward, "down_proj", dims, fan_in="mlp", key=key),
            activation=ACTIVATIONS[self.activation],
        )


class PlainFeedForward(FeedForward):
    """Two projections, down(activation(up(x))), as in the original transformer (Vaswani et al., 2017, arXiv 1706.03762)."""

    up_proj: Float[Array, "embed mlp"]
    down_proj: Float[Array, "mlp embed"]
    activation: Callable[[Array], Array] = eqx.field(static=True)

    @tokenwise
    def __call__(self, x: Float[Array, "*tokens embed"]) -> Float[Array, "*tokens embed"]:
        return tag(self.activation(tag(x @ self.up_proj, "up")) @ self.down_proj, "down")


class PlainFeedForwardConfig(FeedForwardConfig):
    activation: Activation

    def build(self, dims: Dims, init: InitConfig, *, key: PRNGKeyArray) -> PlainFeedForward:
        return PlainFeedForward(
            up_proj=init.matrix(PlainFeedForward, "up_proj", dims, fan_in="embed", key=key),
            down_proj=init.matrix(PlainFeedForward, "down_proj", dims, fan_in="mlp", key=key),
            activation=ACTIVATIONS[self.activation],
        )


def gelu(x: Array) -> Array:
    """x Φ(x), exact rather than the tanh approximation (Hendrycks and Gimpel, 2016, arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


def squared_relu(x: Array) -> Array:
    """max(x, 0)² (So et al., 2021, "Primer", arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": gelu,
    "relu": jax.nn.relu,
    "squared_relu": squared_relu,
    "sigmoid": jax.nn.sigmoid,
    "identity": jax.nn.identity,
}
