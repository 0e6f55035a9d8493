"""The choice of the next token from its logits."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from llama_eqx.errors import ConfigError
from llama_eqx.generation.constraints import (
    Constraint,
    heat,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_frequency,
    penalise_presence,
    penalise_repetition,
)

LEAST = 1e-30  # of what logits are divided by: their quotients with less would not be finite in float32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; by default, the most probable one. See `constraints.py` for what each setting means.

    Temperature 0 is greedy: the most probable token after the penalties. None leaves a constraint out.

    Raises `ConfigError` for a setting that is no number, or out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            value = value.item() if hasattr(value, "item") else value  # of an array
            kind, wanted, example = (int, "a whole number", 50) if name == "top_k" else (int | float, "a number", 0.5)
            if not isinstance(value, kind) and (value is not None or name == "temperature"):
                raise ConfigError(f"{value!r} is not {wanted}", where=name, next=f"{name}={example}")
            object.__setattr__(self, name, value)
        if self.temperature != 0 and not LEAST <= self.temperature < math.inf:
            raise ConfigError(
                f"{self.temperature} is not a temperature", where="temperature", next="0 is greedy, 1 samples the model as it is"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} leaves no token to draw", where="top_k", next="at least 1, or null for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"{self.top_p} is not in (0, 1]", where="top_p", next="top_p=0.95, or null for all tokens")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"{self.min_p} is not in [0, 1]", where="min_p", next="min_p=0.05, or null for all tokens")
        if self.repetition_penalty is not None and not LEAST <= self.repetition_penalty < math.inf:
            raise ConfigError(
                f"{self.repetition_penalty} is not a factor",
                where="repetition_penalty",
                next="above 1 discourages repetition, 1 changes nothing",
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name) or 0):
                raise ConfigError(f"{getattr(self, name)} is not a finite number", where=name, next=f"{name}=0.5")

    @property
    def penalties(self) -> tuple[Constraint, ...]:
        """The constraints that depend on what a row has said."""
        return _built(
            (penalise_repetition, "penalty", self.repetition_penalty),
            (penalise_presence, "penalty", self.presence_penalty),
            (penalise_frequency, "penalty", self.frequency_penalty),
        )

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """All constraints, in the order of `transformers`. Numbers other than k are arrays, so that a new value does not recompile."""
        if self.temperature == 0:
            return self.penalties
        kept = () if self.top_k is None else (Partial(keep_top_k, k=self.top_k),)
        heated = _built((heat, "temperature", self.temperature))
        return self.penalties + heated + kept + _built((keep_top_p, "p", self.top_p), (keep_min_p, "p", self.min_p))


def _built(*wanted: tuple) -> tuple[Constraint, ...]:
    return tuple(Partial(function, **{name: jnp.asarray(value, jnp.float32)}) for function, name, value in wanted if value is not None)


def draw(logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"] | None) -> Int[Array, " batch"]:
    """One token per row: drawn with the row's own key, or the argmax without keys.

    JAX's own resolution, the mode "low", hardly ever draws tokens of probabilities below 1e-7, of which there are many in a vocabulary.
    """
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(partial(jax.random.categorical, mode="high"))(keys, logits).astype(jnp.int32)
