"""All scores at once: the reference for the other kernels, and the fastest for short rows. Memory grows with seq × slots."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_eqx.tag import tag


class Window(NamedTuple):
    """Where `applies`, a query sees the last `size` of the slots that it would see, its own among them (Beltagy et al., 2020, arXiv
    2004.05150).
    """

    size: int
    applies: Bool[Array, ""] | bool = True  # in this layer; traced in a loop over layers

    def reach(self, slots: int) -> Int[Array, ""]:
        """How many of `slots` a query sees at most."""
        return jnp.where(self.applies, self.size, slots)


def plain(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    start: Int[Array, ""] | int,
    segment_ids: tuple[Int[Array, "batch seq"], Int[Array, "batch slots"]] | None,
    window: Window | None = None,
    implementation: Literal["xla", "cudnn"] = "xla",
) -> Float[Array, "batch seq heads head_dim"]:
    """Like `attend`."""
    # On CPUs JAX has no product, with sums in float32, of numbers with a smaller range.
    if implementation == "xla" and jnp.finfo(q.dtype).maxexp < jnp.finfo(jnp.float32).maxexp:
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        return plain(wide[0], wide[1], wide[2], start, segment_ids, window).astype(q.dtype)
    if segment_ids is None and window is None and isinstance(start, int) and start == 0:
        return tag(jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation), "attention")
    seen = visible(start, q.shape[1], k.shape[1], segment_ids, None if window is None else window.reach(k.shape[1]))
    seen = jnp.broadcast_to(seen, (q.shape[0], *seen.shape[-2:]))[:, None]
    return tag(jax.nn.dot_product_attention(q, k, v, mask=seen, implementation=implementation), "attention")


def visible(
    start: Int[Array, ""] | int,
    seq: int,
    slots: int,
    segment_ids: tuple[Int[Array, "batch seq"], Int[Array, "batch slots"]] | None,
    reach: Int[Array, ""] | None = None,
) -> Bool[Array, "*batch seq slots"]:
    """True where a query sees a slot; without segments the same for every row."""
    slot, query = jnp.arange(slots)[None, :], start + jnp.arange(seq)[:, None]
    seen = slot <= query
    if segment_ids is None:
        return seen if reach is None else seen & (slot > query - reach)
    seen &= segment_ids[0][:, :, None] == segment_ids[1][:, None, :]
    if reach is None:
        return seen
    place = jnp.cumsum(seen, axis=-1)  # counted, for there may be padding between a prompt and what follows it
    return seen & (place > place[..., -1:] - reach)
