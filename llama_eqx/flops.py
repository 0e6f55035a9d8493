"""Floating-point operations by formula, and the peaks to compare them with."""

import math
from typing import Any, NamedTuple

import jax

from llama_eqx.sharding import axis_names, matrix, parameter_names

# Dense bfloat16 FLOP/s of one chip by JAX's device_kind, from the vendors' datasheets; kinds that are not here have no MFU.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class Flops(NamedTuple):
    """FLOPs of a training step per token, forward and backward, in the two conventions that published MFUs use."""

    causal: int
    palm: int


def flops_per_token(model: Any, seq_len: int, learn: Any = None) -> Flops:
    """6 N for the matrices, plus attention: 12 L T D for all scores (PaLM, arXiv 2204.02311, appendix B), half of that for causal ones.

    In a layer whose window W is below T, a token has W scores in place of T, and W - W² / 2T causal ones.

    N counts the parameters in matrix products: no norms, and no input table that is only looked up. `model` may be abstract.

    `learn` says of every parameter whether it learns; None means that all do. A third of these FLOPs is the forward pass, a third are the
    gradients of what enters a product, and a third are those of matrices, which only matrices that learn have. Where nothing learns but the
    last norm and the head, the blocks have the forward pass alone.
    """
    dims, names = model.config.dims, parameter_names(model)
    sizes = {
        name: math.prod(leaf.shape)
        for name, axes, leaf in zip(names, axis_names(model), jax.tree.leaves(model), strict=True)
        if matrix(axes).columns
    }
    if model.lm_head is not None:
        sizes.pop("embed")
    learned = {*names} if learn is None else {name for name, learns in zip(names, jax.tree.leaves(learn), strict=True) if learns}
    head = "embed" if model.lm_head is None else "lm_head"
    deep = any(name.partition(".")[0] not in ("final_norm", "lm_head") for name in learned)
    entered = {name for name in sizes if deep or (name == head and learned != {head})}
    products = 2 * sum(size * (1 + (name in entered) + (name in learned)) for name, size in sizes.items())
    windows = [model.blocks.attention.window(layer) for layer in range(dims.layers)]
    scores = [min(window.size, seq_len) if window and window.applies else seq_len for window in windows]
    score = (12 if deep else 4) * dims.heads * dims.head_dim
    return Flops(
        causal=products + round(score * sum(scores) - score * sum(n**2 for n in scores) / (2 * seq_len)),
        palm=products + score * sum(scores),
    )


def mfu(tokens_per_second: float, flops_per_token: int, device_kind: str, devices: int) -> float | None:
    """The fraction of the chips' peak, or None where the peak is not known."""
    peak = PEAK_FLOPS.get(device_kind)
    return tokens_per_second * flops_per_token / (peak * devices) if peak else None
