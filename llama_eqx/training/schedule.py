"""The learning rate over the steps of a run."""

import abc
import math

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float32, Int

from llama_eqx.config import Config
from llama_eqx.errors import ConfigError


class ScheduleConfig(Config):
    """A linear rise over `warmup_steps`, the last of which is at the peak, then the variant's course to the end of the last step."""

    peak: float
    warmup_steps: int

    @abc.abstractmethod
    def after_warmup(self, steps: int) -> optax.Schedule: ...

    def rate(self, step: Int[Array, ""], steps: int) -> Float32[Array, ""]:
        """The learning rate of update number `step` (from 0) of `steps`. The first is not 0: that step would be lost."""
        warmup = jnp.minimum((step + 1) / max(self.warmup_steps, 1), 1)
        course = self.after_warmup(max(steps - self.warmup_steps, 1))
        return jnp.asarray(warmup * course(jnp.maximum(step - self.warmup_steps, 0)), jnp.float32)

    def check(self) -> None:
        self.within(0, math.inf, "peak", "final_fraction")
        if self.warmup_steps < 0:
            raise ConfigError(f"{self.warmup_steps} is not a number of steps", where="warmup_steps")


class CosineConfig(ScheduleConfig):
    """Half a cosine from the peak to `final_fraction` of it (Loshchilov and Hutter, 2016, arXiv 1608.03983)."""

    final_fraction: float

    def after_warmup(self, steps: int) -> optax.Schedule:
        return optax.cosine_decay_schedule(self.peak, steps, self.final_fraction)


class LinearConfig(ScheduleConfig):
    """A straight line from the peak to `final_fraction` of it."""

    final_fraction: float

    def after_warmup(self, steps: int) -> optax.Schedule:
        return optax.linear_schedule(self.peak, self.peak * self.final_fraction, steps)


class InverseSqrtConfig(ScheduleConfig):
    """The peak times sqrt(warmup_steps / step), which has no end (Vaswani et al., 2017, arXiv 1706.03762, equation 3)."""

    def after_warmup(self, steps: int) -> optax.Schedule:
        warmup = max(self.warmup_steps, 1)
        return lambda step: self.peak * jnp.sqrt(warmup / (warmup + step))


class WSDConfig(ScheduleConfig):
    """Warm-up, the peak, then a fall to `final_fraction` of the peak over the last `decay_fraction` of the steps after warm-up.

    The name is from MiniCPM (Hu et al., 2024, arXiv 2404.06395), the fall as 1 - sqrt from Hägele et al. (2024, arXiv 2405.18392).
    A run at the peak can be extended, and the fall can begin at any of its checkpoints.
    """

    decay_fraction: float
    final_fraction: float

    def after_warmup(self, steps: int) -> optax.Schedule:
        decay = max(round(steps * self.decay_fraction), 1)

        def course(step: ArrayLike) -> Array:
            done = jnp.clip((jnp.asarray(step) - (steps - decay)) / decay, 0, 1)
            return self.peak * (1 - (1 - self.final_fraction) * jnp.sqrt(done))

        return course

    def check(self) -> None:
        super().check()
        if not 0 <= self.decay_fraction <= 1:
            raise ConfigError(f"{self.decay_fraction} is not a fraction", where="decay_fraction")


class ConstantConfig(ScheduleConfig):
    """The peak to the end."""

    def after_warmup(self, steps: int) -> optax.Schedule:
        return optax.constant_schedule(self.peak)
