"""Attention proper, softmax(q k^T / sqrt(head_dim)) v: the one place that may know of a platform's kernels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attend(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    *,
    start: Int[Array, ""] | int = 0,
    segment_ids: tuple[Int[Array, "batch seq"], Int[Array, "batch slots"]] | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal attention: query i sits in slot `start + i`, and sees the slots up to its own that are of its segment.

    `segment_ids` are those of the queries and of the slots; None makes all of one segment.

    Scores and softmax are in float32. Query head n reads key head n // (heads / kv_heads) (Ainslie et al., 2023, arXiv 2305.13245).
    """
    if segment_ids is None and isinstance(start, int) and start == 0:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    mask = jnp.arange(k.shape[1])[None, :] <= start + jnp.arange(q.shape[1])[:, None]
    if segment_ids is not None:
        mask = mask & (segment_ids[0][:, :, None] == segment_ids[1][:, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=jnp.broadcast_to(mask, (q.shape[0], *mask.shape[-2:]))[:, None])
