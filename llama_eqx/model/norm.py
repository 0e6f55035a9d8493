"""Normalisation of the residual before each part of a block."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_eqx.config import Config
from llama_eqx.dims import Dims


class Norm(eqx.Module):
    @abc.abstractmethod
    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]: ...


class NormConfig(Config):
    def check(self) -> None:
        self.within(1e-20, float("inf"), "eps")  # with 0, a row of zeros becomes 0 / 0; with less than this, its gradient

    @abc.abstractmethod
    def build(self, dims: Dims) -> Norm: ...


class RMSNorm(Norm):
    """Root mean square norm (Zhang and Sennrich, 2019, arXiv 1910.07467), in Llama's order of casts.

    The mean is taken in float32, then the result returns to the dtype of `x` *before* it is multiplied by the weight.
    """

    weight: Float[Array, " embed"]
    eps: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.weight


class RMSNormConfig(NormConfig):
    eps: float

    def build(self, dims: Dims) -> RMSNorm:
        return RMSNorm(weight=jnp.ones(dims.embed, jnp.float32), eps=self.eps)


class LayerNorm(Norm):
    """Layer norm (Ba et al., 2016, arXiv 1607.06450), with the casts of `RMSNorm`."""

    weight: Float[Array, " embed"]
    bias: Float[Array, " embed"]
    eps: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.weight + self.bias


class LayerNormConfig(NormConfig):
    eps: float

    def build(self, dims: Dims) -> LayerNorm:
        return LayerNorm(weight=jnp.ones(dims.embed, jnp.float32), bias=jnp.zeros(dims.embed, jnp.float32), eps=self.eps)
