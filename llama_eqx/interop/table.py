"""What each parameter is called elsewhere, and how its axes lie there: the one table of every conversion."""

import math
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """A parameter of `Llama` in other formats.

    `inputs` is how many of its axes a product sums over; they come first. 0 means that the array is not a matrix to multiply with,
    and is the same everywhere. A name with `{layer}` stands for one tensor per layer.
    """

    inputs: int
    huggingface: str


TABLE = {
    "embed": Entry(0, "model.embed_tokens.weight"),
    "blocks.attn_norm.weight": Entry(0, "model.layers.{layer}.input_layernorm.weight"),
    "blocks.attention.q_proj": Entry(1, "model.layers.{layer}.self_attn.q_proj.weight"),
    "blocks.attention.k_proj": Entry(1, "model.layers.{layer}.self_attn.k_proj.weight"),
    "blocks.attention.v_proj": Entry(1, "model.layers.{layer}.self_attn.v_proj.weight"),
    "blocks.attention.o_proj": Entry(2, "model.layers.{layer}.self_attn.o_proj.weight"),
    "blocks.ffn_norm.weight": Entry(0, "model.layers.{layer}.post_attention_layernorm.weight"),
    "blocks.feed_forward.gate_proj": Entry(1, "model.layers.{layer}.mlp.gate_proj.weight"),
    "blocks.feed_forward.up_proj": Entry(1, "model.layers.{layer}.mlp.up_proj.weight"),
    "blocks.feed_forward.down_proj": Entry(1, "model.layers.{layer}.mlp.down_proj.weight"),
    "final_norm.weight": Entry(0, "model.norm.weight"),
    "lm_head": Entry(1, "lm_head.weight"),
}


def torch_shape(shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    """(outputs, inputs) of one of our arrays, as `torch.nn.Linear` keeps it."""
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else shape


def to_torch(x: np.ndarray, inputs: int) -> np.ndarray:
    """`embed heads head_dim` to `(heads head_dim) embed`. Rotary pairs are half a head apart on both sides, so no row moves."""
    return np.ascontiguousarray(x.reshape(torch_shape(x.shape, inputs)[::-1]).T) if inputs else x


def from_torch(y: np.ndarray, inputs: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_torch`; `shape` is ours."""
    return y.T.reshape(shape) if inputs else y
