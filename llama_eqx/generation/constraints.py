"""Constraints on the next token: pure functions from the logits of a row, and its history, to new logits.

A token at -inf is never drawn. Constraints form a tuple and act in its order. `Partial(keep_top_k, k=5)` is one, with the `Partial` of
`jax.tree_util`.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class History(eqx.Module):
    """Which ids a row contains, its prompt included, and how often it generated each of them."""

    present: Bool[Array, "batch vocab"]
    generated: Int[Array, "batch vocab"]

    def extended(self, tokens: Int[Array, " batch"]) -> "History":
        rows = jnp.arange(len(tokens))
        return History(present=self.present.at[rows, tokens].set(True), generated=self.generated.at[rows, tokens].add(1))


Logits = Float[Array, "batch vocab"]
Constraint = Callable[[Logits, History | None], Logits]


def constrained(logits: Logits, constraints: tuple[Constraint, ...], history: History | None) -> Logits:
    for constraint in constraints:
        logits = constraint(logits, history)
    return logits


def penalise_repetition(logits: Logits, history: History | None, *, penalty: Float[Array, ""] | float) -> Logits:
    """Divides the positive logits of ids that the row contains by `penalty`, and multiplies the negative ones (CTRL, arXiv 1909.05858).

    The paper divides all of them; `transformers` and others multiply the negative ones.
    """
    assert history is not None
    return jnp.where(history.present, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalise_presence(logits: Logits, history: History | None, *, penalty: Float[Array, ""] | float) -> Logits:
    """Subtracts `penalty` from the logit of every generated id (OpenAI's API reference, "Frequency and presence penalties")."""
    assert history is not None
    return logits - jnp.where(history.generated > 0, penalty, 0.0)


def penalise_frequency(logits: Logits, history: History | None, *, penalty: Float[Array, ""] | float) -> Logits:
    """Subtracts `penalty` from the logit of an id once for each time it was generated (OpenAI's API reference, as above)."""
    assert history is not None
    return logits - penalty * history.generated.astype(logits.dtype)


def heat(logits: Logits, history: History | None = None, *, temperature: Float[Array, ""] | float) -> Logits:
    """Divides by `temperature`: below 1, probable tokens become more probable (Ackley et al., 1985, Cognitive Science 9)."""
    return logits / temperature


def keep_top_k(logits: Logits, history: History | None = None, *, k: int) -> Logits:
    """Keeps the k largest logits and all that equal the smallest of them (Fan et al., 2018, arXiv 1805.04833)."""
    largest, _ = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.where(logits < largest[:, -1:], -jnp.inf, logits)


def keep_top_p(logits: Logits, history: History | None = None, *, p: Float[Array, ""] | float) -> Logits:
    """Keeps the nucleus: the fewest most probable tokens whose probabilities sum to p or more (Holtzman et al., 2020, arXiv 1904.09751).

    Tokens as probable as the least probable one of the nucleus stay too.
    """
    ascending = jnp.sort(logits, axis=-1)
    # Sum from the small end, where float32 still resolves the probabilities of the tail.
    below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    kept = (below > 1 - p).at[:, -1].set(True)
    least = jnp.min(ascending, axis=-1, where=kept, initial=jnp.inf, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_min_p(logits: Logits, history: History | None = None, *, p: Float[Array, ""] | float) -> Logits:
    """Keeps the tokens at least p times as probable as the most probable one (Nguyen et al., 2024, arXiv 2407.01082)."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jnp.where(probabilities < p * probabilities.max(-1, keepdims=True), -jnp.inf, logits)
