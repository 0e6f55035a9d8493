"""Dropout (Srivastava et al., 2014), on the embedding and on what each part adds to the residual."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def dropout(x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*shape"]:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate), in float32. No key, no dropout."""
    if key is None or rate == 0:
        return x
    scaled = x.astype(jnp.float32) / (1 - rate)  # in bfloat16, 0.9 is 0.8984
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), scaled, 0).astype(x.dtype)
