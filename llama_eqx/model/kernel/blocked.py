"""Blockwise attention with a running softmax, in plain JAX for every platform. Memory grows with the row and not with its square."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from llama_eqx.model.kernel.plain import Window
from llama_eqx.tag import tag

MASKED = -1e30


Queries = Float[Array, "q_blocks batch kv_heads group q_block head_dim"]
Keys = Float[Array, "kv_blocks batch kv_heads kv_block head_dim"]
Segments = tuple[Int[Array, "q_blocks batch q_block"], Int[Array, "kv_blocks batch kv_block"]]


def blocked(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    start: Int[Array, ""] | int,
    segment_ids: tuple[Int[Array, "batch seq"], Int[Array, "batch slots"]] | None,
    q_block: int,
    kv_block: int,
    window: Window | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Like `attend`, but computes only the blocks that the mask leaves (FlashAttention-2, Dao, 2023, arXiv 2307.08691).

    The backward pass recomputes the scores block by block, and normalises them by the kept logarithms of the softmax's denominators.
    """
    batch, seq, heads, head_dim = q.shape
    slots, kv_heads = k.shape[1:3]
    (q_blocks, q_block), (kv_blocks, kv_block) = _blocks(seq, q_block), _blocks(slots, kv_block)

    # The padding of the last blocks comes after every real query, so no query sees it.
    q = _padded(q, q_blocks * q_block).reshape(batch, q_blocks, q_block, kv_heads, heads // kv_heads, head_dim).transpose(1, 0, 3, 4, 2, 5)
    k, v = (
        _padded(x, kv_blocks * kv_block).reshape(batch, kv_blocks, kv_block, kv_heads, head_dim).transpose(1, 0, 3, 2, 4) for x in (k, v)
    )
    if segment_ids is not None:
        q_ids, kv_ids = _padded(segment_ids[0], q_blocks * q_block), _padded(segment_ids[1], kv_blocks * kv_block)
        segment_ids = q_ids.reshape(batch, q_blocks, q_block).swapaxes(0, 1), kv_ids.reshape(batch, kv_blocks, kv_block).swapaxes(0, 1)
    out = _attention(q, k, v, jnp.asarray(start, jnp.int32), None if window is None else window.reach(slots), segment_ids)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, q_blocks * q_block, heads, head_dim)[:, :seq]


@jax.custom_vjp
def _attention(q: Queries, k: Keys, v: Keys, start: Int[Array, ""], reach: Int[Array, ""] | None, segment_ids: Segments | None) -> Queries:
    return _forward(q, k, v, start, reach, segment_ids)[0]


def _forward(
    q: Queries, k: Keys, v: Keys, start: Int[Array, ""], reach: Int[Array, ""] | None, segment_ids: Segments | None
) -> tuple[Queries, tuple]:
    def of_queries(i: Array) -> tuple[Array, Array]:
        def keys(j: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, top, total = running
            scores = _scores(q[i], k[j], i, j, start, reach, segment_ids)
            new_top = jnp.maximum(top, scores.max(-1))
            shrink, p = jnp.exp(top - new_top), jnp.exp(scores - new_top[..., None])
            out = out * shrink[..., None] + _einsum("bkgqs,bksh->bkgqh", p.astype(v.dtype), v[j])
            return out, new_top, total * shrink + p.sum(-1)

        shape = q.shape[1:-1]
        begin = jnp.zeros(q.shape[1:], jnp.float32), jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
        out, top, total = jax.lax.fori_loop(*_visible_blocks(q, k, i, start, reach), keys, begin)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, logsumexp = jax.lax.map(of_queries, jnp.arange(q.shape[0]))
    out, logsumexp = tag(out, "attention"), tag(logsumexp, "attention")
    return out, (q, k, v, start, reach, segment_ids, out, logsumexp)


def _backward(kept: tuple, d_out: Queries) -> tuple:
    q, k, v, start, reach, segment_ids, out, logsumexp = kept
    scale = 1 / math.sqrt(q.shape[-1])

    def of_queries(so_far: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        delta = jnp.sum(d_out[i].astype(jnp.float32) * out[i].astype(jnp.float32), axis=-1, keepdims=True)

        def keys(j: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = running
            p = jnp.exp(_scores(q[i], k[j], i, j, start, reach, segment_ids) - logsumexp[i][..., None])
            dp = _einsum("bkgqh,bksh->bkgqs", d_out[i], v[j])
            ds = (p * (dp - delta) * scale).astype(q.dtype)
            dv = dv.at[j].add(_einsum("bkgqs,bkgqh->bksh", p.astype(d_out.dtype), d_out[i]))
            dk = dk.at[j].add(_einsum("bkgqs,bkgqh->bksh", ds, q[i]))
            return dq + _einsum("bkgqs,bksh->bkgqh", ds, k[j]), dk, dv

        begin = jnp.zeros(q.shape[1:], jnp.float32), *so_far
        dq, dk, dv = jax.lax.fori_loop(*_visible_blocks(q, k, i, start, reach), keys, begin)
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(of_queries, (zeros, zeros), jnp.arange(q.shape[0]))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_attention.defvjp(_forward, _backward)
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(
    q: Float[Array, "batch kv_heads group q_block head_dim"],
    k: Float[Array, "batch kv_heads kv_block head_dim"],
    i: Int[Array, ""],
    j: Int[Array, ""],
    start: Int[Array, ""],
    reach: Int[Array, ""] | None,
    segment_ids: Segments | None,
) -> Float32[Array, "batch kv_heads group q_block kv_block"]:
    """Scores of query block i with key block j."""
    scores = _einsum("bkgqh,bksh->bkgqs", q, k) / math.sqrt(q.shape[-1])
    query, slot = start + i * q.shape[3] + jnp.arange(q.shape[3])[:, None], j * k.shape[2] + jnp.arange(k.shape[2])[None, :]
    seen = slot <= query
    if reach is not None:
        seen &= slot > query - reach
    if segment_ids is not None:
        seen = (seen & (segment_ids[0][i][:, :, None] == segment_ids[1][j][:, None, :]))[:, None, None]
    return jnp.where(seen, scores, MASKED)


def _visible_blocks(
    q: Queries, k: Keys, i: Int[Array, ""], start: Int[Array, ""], reach: Int[Array, ""] | None
) -> tuple[Int[Array, ""] | int, Int[Array, ""]]:
    """The first key block that a query of block i sees, at least in part, and the one after the last."""
    begin = 0 if reach is None else jnp.maximum(start + i * q.shape[4] - reach + 1, 0) // k.shape[3]
    return begin, jnp.minimum((start + (i + 1) * q.shape[4] - 1) // k.shape[3] + 1, k.shape[0])


def _blocks(length: int, largest: int) -> tuple[int, int]:
    """The number of blocks and their size: as even as possible, and a multiple of 8 if there are several."""
    count = -(-length // largest)
    return count, -(-length // count // 8) * 8 if count > 1 else length


def _padded(x: Array, length: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
