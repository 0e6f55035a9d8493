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
    q_segment_ids: Int[Array, "batch seq"] | None = None,
    kv_segment_ids: Int[Array, "batch slots"] | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal attention: query i sits in slot `start + i`, and sees the slots up to its own that are of its segment.

    Scores and softmax are in float32. Query head n reads key head n // (heads / kv_heads) (Ainslie et al., 2023, arXiv 2305.13245).
    """
    if q_segment_ids is None or kv_segment_ids is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    causal = jnp.arange(k.shape[1])[None, :] <= start + jnp.arange(q.shape[1])[:, None]
    same = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=(causal & same)[:, None])
