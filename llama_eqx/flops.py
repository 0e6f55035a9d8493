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


def flops_per_token(model: Any, seq_len: int) -> Flops:
    """6 N for the matrices, plus attention: 12 L T D for all scores (PaLM, arXiv 2204.02311, appendix B), half of that for causal ones.

    N counts the parameters in matrix products: no norms, and no input table that is only looked up. `model` may be abstract.
    """
    dims = model.config.dims
    sizes = {
        name: math.prod(leaf.shape)
        for name, axes, leaf in zip(parameter_names(model), axis_names(model), jax.tree.leaves(model), strict=True)
        if matrix(axes).columns
    }
    if model.lm_head is not None:
        sizes.pop("embed")
    attention = dims.layers * seq_len * dims.heads * dims.head_dim
    return Flops(causal=6 * sum(sizes.values()) + 6 * attention, palm=6 * sum(sizes.values()) + 12 * attention)


def mfu(tokens_per_second: float, flops_per_token: int, device_kind: str, devices: int) -> float | None:
    """The fraction of the chips' peak, or None where the peak is not known."""
    peak = PEAK_FLOPS.get(device_kind)
    return tokens_per_second * flops_per_token / (peak * devices) if peak else None
