"""cuDNN's fused attention on NVIDIA GPUs, through JAX's own interface to it."""

from typing import Any

from jaxtyping import Array

from llama_eqx.model.kernel.plain import Window, plain


def cudnn(q: Array, k: Array, v: Array, start: Array | int, segment_ids: tuple[Array, Array] | None, window: Window | None = None) -> Array:
    """Like `attend`. A row of one segment needs no memory for scores; several segments, a start, or a window need a mask of seq × slots.

    JAX cannot name the residuals of its primitive; `llama_eqx.remat` identifies them by that primitive.
    """
    return plain(q, k, v, start, segment_ids, window, "cudnn")


def unfit_for_cudnn(dtype: Any, seq: int, slots: int, head_dim: int) -> str:
    """Why cuDNN cannot compute the attention; empty if it can."""
    if dtype.itemsize != 2:
        return f"it takes 16-bit numbers and not {dtype.name} (precision=mixed)"
    if head_dim > 128 or head_dim % 8:
        return f"head_dim={head_dim} is not a multiple of 8 up to 128"
    return f"{seq} queries and {slots} keys: both numbers must be even" if seq % 2 or slots % 2 else ""
