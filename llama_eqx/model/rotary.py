"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864), with pairs half a head apart as Hugging Face stores them."""

import abc
import dataclasses
import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from llama_eqx.config import Config
from llama_eqx.dims import Dims
from llama_eqx.errors import ConfigError
from llama_eqx.model.kernel.tokenwise import PLATFORM

RoundAt = Literal["none", "inv_freq", "position", "angle", "table", "rotation"]


def round_bfloat16(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The nearest bfloat16 values, kept in float32. A round trip through bfloat16 would not do: XLA may remove it."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


class Rotation(eqx.Module):
    """Rotates every pair of a head by its own angle, in float32 whatever the dtype of the input.

    `positions` are those of the tokens, and `layer` is the number of the layer, counted from 0. Nothing here reads them: they tell a
    variant which tokens it gets, and where it is.
    """

    positions: Int[Array, "#batch seq"]
    layer: Int[Array, ""] | int | None  # None outside of the layers
    cos: Float32[Array, "#batch seq 1 half"]
    sin: Float32[Array, "#batch seq 1 half"]
    rounded: bool = eqx.field(static=True)  # every product and sum is rounded to bfloat16

    def __call__(self, x: Float[Array, "batch seq n head_dim"]) -> Float[Array, "batch seq n head_dim"]:
        if not self.rounded:
            if (platform := PLATFORM.get()) is None:
                return jax.lax.platform_dependent(x, self.cos, self.sin, tpu=turn_by_product, default=turn)
            return (turn_by_product if platform == "tpu" else turn)(x, self.cos, self.sin)
        r = round_bfloat16
        a, b = jnp.split(r(x.astype(jnp.float32)), 2, axis=-1)
        cos, sin = r(self.cos), r(self.sin)
        turned = jnp.concatenate([r(r(a * cos) - r(b * sin)), r(r(b * cos) + r(a * sin))], axis=-1)
        return turned.astype(x.dtype)

    def in_layer(self, layer: Int[Array, ""] | int) -> "Rotation":
        """The rotation of a layer. In Llama's models it turns alike in all layers."""
        return dataclasses.replace(self, layer=layer)


def turn(
    x: Float[Array, "batch seq n head_dim"], cos: Float32[Array, "#batch seq 1 half"], sin: Float32[Array, "#batch seq 1 half"]
) -> Float[Array, "batch seq n head_dim"]:
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def turn_by_product(
    x: Float[Array, "batch seq n head_dim"], cos: Float32[Array, "#batch seq 1 half"], sin: Float32[Array, "#batch seq 1 half"]
) -> Float[Array, "batch seq n head_dim"]:
    """`turn`, with the halves of a head swapped by an exact product with ones and zeros. Angles have no gradient.

    A TPU's vector registers have 128 lanes, the width of a head: taking half of one is much slower than a small matrix product.
    """
    exchange = jnp.roll(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape[-1] // 2, axis=0)
    other = jnp.matmul(x, exchange, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    turned = x.astype(jnp.float32) * jnp.concatenate([cos, cos], axis=-1) + other * jnp.concatenate([-sin, sin], axis=-1)
    return turned.astype(x.dtype)


turn_by_product.defvjp(
    lambda x, cos, sin: (turn_by_product(x, cos, sin), (cos, sin)),
    lambda angles, d: (turn_by_product(d, angles[0], -angles[1]), jnp.zeros_like(angles[0]), jnp.zeros_like(angles[1])),  # rotated back
)


class Rotary(eqx.Module):
    """Maps positions to the rotation of queries and keys. Frequencies are computed in the call: as leaves they would be trained."""

    head_dim: eqx.AbstractVar[int]
    round_at: eqx.AbstractVar[RoundAt]

    @abc.abstractmethod
    def frequencies(self) -> Float32[Array, " half"]:
        """Radians per position of each pair."""

    def __call__(self, positions: Int[Array, "#batch seq"]) -> Rotation:
        """`round_at` names the one quantity that is rounded to bfloat16; with "none" all are float32."""

        def rounded(x: Array, name: RoundAt) -> Array:
            return round_bfloat16(x) if self.round_at == name else x

        frequency = rounded(self.frequencies(), "inv_freq")
        position = rounded(positions[:, :, None, None].astype(jnp.float32), "position")
        angle = rounded(position * frequency, "angle")
        return Rotation(
            positions=positions,
            layer=None,
            cos=rounded(jnp.cos(angle), "table"),
            sin=rounded(jnp.sin(angle), "table"),
            rounded=self.round_at == "rotation",
        )


class RotaryConfig(Config):
    def check(self) -> None:
        self.within(1, float("inf"), "theta", "factor", "original_context")
        self.within(0, float("inf"), "low_freq_factor", "high_freq_factor")

    @abc.abstractmethod
    def build(self, dims: Dims) -> Rotary: ...


class PlainRotary(Rotary):
    """theta^(-2i / head_dim) radians per position for pair i: Llama 1, 2 and 3.0."""

    theta: float = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    round_at: RoundAt = eqx.field(static=True)

    def frequencies(self) -> Float32[Array, " half"]:
        return inverse_frequencies(self.theta, self.head_dim)


class PlainRotaryConfig(RotaryConfig):
    theta: float
    round_at: RoundAt

    def build(self, dims: Dims) -> PlainRotary:
        return PlainRotary(theta=self.theta, head_dim=dims.head_dim, round_at=self.round_at)


class NopeRotation(Rotation):
    every: int = eqx.field(static=True)

    def in_layer(self, layer: Int[Array, ""] | int) -> Rotation:
        turns = (layer + 1) % self.every > 0
        cos, sin = jnp.where(turns, self.cos, 1), jnp.where(turns, self.sin, 0)
        return Rotation(positions=self.positions, layer=layer, cos=cos, sin=sin, rounded=self.rounded)


class NopeRotary(PlainRotary):
    """No rotation in every `every`-th layer, whose attention sees no positions (Yang et al., 2025, arXiv 2501.18795).

    With 1, no layer has a rotation (Kazemnejad et al., 2023, arXiv 2305.19466).
    """

    every: int = eqx.field(static=True)

    def __call__(self, positions: Int[Array, "#batch seq"]) -> NopeRotation:
        return NopeRotation(**vars(super().__call__(positions)), every=self.every)


class NopeRotaryConfig(RotaryConfig):
    theta: float
    every: int
    round_at: RoundAt

    def check(self) -> None:
        super().check()
        self.within(1, float("inf"), "every")

    def build(self, dims: Dims) -> NopeRotary:
        return NopeRotary(theta=self.theta, head_dim=dims.head_dim, round_at=self.round_at, every=self.every)


class Llama3Rotary(Rotary):
    """Llama 3.1's stretch of the low frequencies for a longer context (Llama 3 paper, arXiv 2407.21783, and Meta's `llama-models`).

    A pair that turns at least `high_freq_factor` times within the original context keeps its frequency. One that turns at most
    `low_freq_factor` times is slowed by `factor`. In between, the two are interpolated linearly in the number of turns.
    """

    theta: float = eqx.field(static=True)
    factor: float = eqx.field(static=True)
    low_freq_factor: float = eqx.field(static=True)
    high_freq_factor: float = eqx.field(static=True)
    original_context: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    round_at: RoundAt = eqx.field(static=True)

    def frequencies(self) -> Float32[Array, " half"]:
        frequency = inverse_frequencies(self.theta, self.head_dim)
        turns = self.original_context * frequency / (2 * jnp.pi)
        kept = jnp.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return kept * frequency + (1 - kept) * frequency / self.factor


class Llama3RotaryConfig(RotaryConfig):
    theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int
    round_at: RoundAt

    def check(self) -> None:
        super().check()
        if self.low_freq_factor >= self.high_freq_factor:
            what = f"low_freq_factor={self.low_freq_factor:g} is not below high_freq_factor={self.high_freq_factor:g}"
            raise ConfigError(what, where="low_freq_factor", next="low_freq_factor=1 high_freq_factor=4, as in Llama 3.1")

    def build(self, dims: Dims) -> Llama3Rotary:
        return Llama3Rotary(
            theta=self.theta,
            factor=self.factor,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
            original_context=self.original_context,
            head_dim=dims.head_dim,
            round_at=self.round_at,
        )


class LinearRotary(PlainRotary):
    """Position interpolation for a longer context: all frequencies are slowed by `factor` (Chen et al., 2023, arXiv 2306.15595)."""

    factor: float = eqx.field(static=True)

    def frequencies(self) -> Float32[Array, " half"]:
        return super().frequencies() / self.factor


class LinearRotaryConfig(RotaryConfig):
    theta: float
    factor: float
    round_at: RoundAt

    def build(self, dims: Dims) -> LinearRotary:
        return LinearRotary(theta=self.theta, factor=self.factor, head_dim=dims.head_dim, round_at=self.round_at)


class YarnRotary(PlainRotary):
    """YaRN (Peng et al., 2023, arXiv 2309.00071): low frequencies are slowed by `factor`, and all queries and keys scaled.

    A pair that turns at least `beta_fast` times within the original context keeps its frequency. One that turns at most `beta_slow` times
    is slowed by `factor`. In between, the two are interpolated linearly in the number of the pair, where `Llama3Rotary` does so in the
    number of turns.
    """

    factor: float = eqx.field(static=True)
    beta_fast: float = eqx.field(static=True)
    beta_slow: float = eqx.field(static=True)
    original_context: int = eqx.field(static=True)
    attention_factor: float = eqx.field(static=True)

    def frequencies(self) -> Float32[Array, " half"]:
        frequency = super().frequencies()
        kept, slowed = (self._pair(turns) for turns in (self.beta_fast, self.beta_slow))
        first, last = max(math.floor(kept), 0), min(math.ceil(slowed), self.head_dim - 1)
        slow = jnp.clip((jnp.arange(len(frequency), dtype=jnp.float32) - first) / max(last - first, 1e-3), 0, 1)
        return (1 - slow) * frequency + slow * frequency / self.factor

    def _pair(self, turns: float) -> float:
        """The number, with a fraction, of the pair that turns so often within the original context."""
        return self.head_dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    def __call__(self, positions: Int[Array, "#batch seq"]) -> Rotation:
        turned = super().__call__(positions)
        return dataclasses.replace(turned, cos=self.attention_factor * turned.cos, sin=self.attention_factor * turned.sin)


class YarnRotaryConfig(RotaryConfig):
    """`attention_factor` scales queries and keys; None is YaRN's 0.1 ln(factor) + 1."""

    theta: float
    factor: float
    beta_fast: float
    beta_slow: float
    original_context: int
    attention_factor: float | None
    round_at: RoundAt

    def check(self) -> None:
        super().check()
        self.within(1e-3, float("inf"), "beta_slow", *([] if self.attention_factor is None else ["attention_factor"]))
        self.within(1.001, float("inf"), "theta")  # the number of turns decides nothing where all pairs turn alike
        if self.beta_slow >= self.beta_fast:
            what = f"beta_slow={self.beta_slow:g} is not below beta_fast={self.beta_fast:g}"
            raise ConfigError(what, where="beta_slow", next="beta_slow=1 beta_fast=32, as in the paper")

    def build(self, dims: Dims) -> YarnRotary:
        scale = 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor
        return YarnRotary(
            theta=self.theta,
            factor=self.factor,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            original_context=self.original_context,
            attention_factor=scale,
            head_dim=dims.head_dim,
            round_at=self.round_at,
        )


def inverse_frequencies(theta: float, head_dim: int) -> Float32[Array, " half"]:
    return theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
