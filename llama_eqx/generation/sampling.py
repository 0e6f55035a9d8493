"""The choice of the next token from its logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def sample(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    *,
    temperature: Float[Array, ""] | float,
    top_k: int | None = None,
    top_p: Float[Array, ""] | float | None = None,
) -> Int[Array, " batch"]:
    """One token per row, drawn from `restricted` logits with the row's own key. Temperature 0 is the argmax."""
    cold = jnp.asarray(temperature) == 0
    warm = restricted(logits, temperature=jnp.where(cold, 1, temperature), top_k=top_k, top_p=top_p)
    drawn = jax.vmap(jax.random.categorical)(keys, warm)
    return jnp.where(cold, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)


def restricted(
    logits: Float[Array, "batch vocab"],
    *,
    temperature: Float[Array, ""] | float,
    top_k: int | None = None,
    top_p: Float[Array, ""] | float | None = None,
) -> Float[Array, "batch vocab"]:
    """Logits divided by a positive `temperature`, then cut to `top_k`, then to the nucleus `top_p`: the order of `transformers`."""
    x = logits / temperature
    x = x if top_k is None else keep_top_k(x, top_k)
    return x if top_p is None else keep_top_p(x, top_p)


def keep_top_k(logits: Float[Array, "batch vocab"], k: int) -> Float[Array, "batch vocab"]:
    """The k largest logits and whatever equals the smallest of them; the others at -inf (Fan et al., 2018, arXiv 1805.04833)."""
    largest, _ = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.where(logits < largest[:, -1:], -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "batch vocab"], p: Float[Array, ""] | float) -> Float[Array, "batch vocab"]:
    """The nucleus: the fewest most probable tokens whose probabilities reach p (Holtzman et al., 2020, arXiv 1904.09751).

    The others are at -inf. What equals the least probable token of the nucleus stays too.
    """
    ascending = jnp.sort(logits, axis=-1)
    # Summed from the small end, where float32 still tells the probabilities of the tail apart.
    below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    kept = (below > 1 - p).at[:, -1].set(True)
    least = jnp.min(ascending, axis=-1, where=kept, initial=jnp.inf, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)
