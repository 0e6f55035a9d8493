"""Splash attention, JAX's fused TPU kernel with blockwise masks. Its module is slow to import: only the functions that use it do."""

import math
from typing import Any

import jax
from jaxtyping import Array

LANES = 128  # rows and blocks are multiples of a vector register


def make_splash(
    heads: int, seq: int, slots: int, shards: int, q_block: int, kv_block: int, fused_backward: bool, interpret: bool, window: int | None
) -> Any:
    """The kernel as a tree of arrays that say which blocks the mask leaves, for queries split over `shards` devices as `dealt` says.

    The mask is computed in the kernel and not stored.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    q, kv = _largest(seq // shards, q_block), _largest(slots, kv_block)
    sizes = splash_attention.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        use_fused_bwd_kernel=fused_backward,
        block_q_dq=None if fused_backward else q,
        block_kv_dq=None if fused_backward else kv,
    )
    causal, local = splash_attention.CausalMask, splash_attention.LocalMask
    mask = causal((seq, slots)) if window is None else local((seq, slots), (window - 1, 0), 0)
    mask.q_sequence = mask.q_sequence.reshape(2 * shards, -1)[dealt(shards)].ravel()
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


def dealt(shards: int) -> list[int]:
    """The parts of a row that is cut into `2 * shards`, two for each device in turn: one from the front and one from the end.

    Later tokens see more. So all devices have as much to do.
    """
    return [half for i in range(shards) for half in (i, 2 * shards - 1 - i)]


def splash(kernel: Any, q: Array, k: Array, v: Array, segment_ids: tuple[Array, Array] | None) -> Array:
    """Like `attend` with `start=0`, by a kernel made for these shapes.

    Queries are scaled in their own dtype. This rounds 16-bit queries once more unless sqrt(head_dim) is a power of two.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    q = q * (1 / math.sqrt(q.shape[-1]))  # the kernel does not scale
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    ids = None if segment_ids is None else splash_attention.SegmentIds(*segment_ids)
    return (_of_16_bits if q.dtype.itemsize == 2 else _rows)(kernel, q, k, v, ids).swapaxes(1, 2)


def _rows(kernel: Any, q: Array, k: Array, v: Array, ids: Any) -> Array:
    return jax.vmap(kernel)(q, k, v) if ids is None else jax.vmap(kernel)(q, k, v, ids)


@jax.custom_vjp
def _of_16_bits(kernel: Any, q: Array, k: Array, v: Array, ids: Any) -> Array:
    """`_rows` at the default matmul precision: with a higher one set for 32-bit products, the TPU kernel compiler rejects 16-bit ones."""
    with jax.default_matmul_precision("default"):
        return _rows(kernel, q, k, v, ids)


def _forward(kernel: Any, q: Array, k: Array, v: Array, ids: Any) -> tuple[Array, Any]:
    with jax.default_matmul_precision("default"):
        return jax.vjp(lambda q, k, v: _rows(kernel, q, k, v, ids), q, k, v)


def _backward(pull: Any, cotangent: Array) -> tuple[Any, ...]:
    with jax.default_matmul_precision("default"):
        return None, *pull(cotangent), None


_of_16_bits.defvjp(_forward, _backward)


def unfit_for_splash(seq: int, slots: int, start: Any) -> str:
    """Why splash cannot compute the attention of `seq` queries on each device; empty if it can."""
    if not (isinstance(start, int) and start == 0):
        return "its queries must begin in slot 0"
    return f"{seq} queries on a device and {slots} keys are not both multiples of {LANES}" if seq % LANES or slots % LANES else ""


def _largest(length: int, limit: int) -> int:
    """The largest multiple of a register up to `limit` that divides `length`."""
    return max(size for size in range(LANES, max(min(length, limit), LANES) + 1, LANES) if length % size == 0)
