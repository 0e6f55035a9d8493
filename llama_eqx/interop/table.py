"""The name of each parameter in other formats, and the order of its axes there: the one table of every conversion."""

import math
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """A parameter of `Llama` in other formats.

    `inputs` is how many of its axes a product sums over; they come first. 0 means that the array is not a matrix to multiply with,
    and is the same everywhere. A name with `{layer}` stands for one tensor per layer. `split` is the axis along which Meta splits a
    parameter over the files of a model, "" for one that each file holds whole. `pairs` says that rotary embedding rotates the rows.
    """

    inputs: int
    huggingface: str
    meta: str
    split: str
    pairs: bool = False


# The table of embeddings is split along `vocab` from Llama 3 on: see `llama_eqx.interop.meta`.
TABLE = {
    "embed": Entry(0, "model.embed_tokens.weight", "tok_embeddings.weight", "embed"),
    "blocks.attn_norm.weight": Entry(0, "model.layers.{layer}.input_layernorm.weight", "layers.{layer}.attention_norm.weight", ""),
    "blocks.attention.q_proj": Entry(
        1, "model.layers.{layer}.self_attn.q_proj.weight", "layers.{layer}.attention.wq.weight", "heads", pairs=True
    ),
    "blocks.attention.k_proj": Entry(
        1, "model.layers.{layer}.self_attn.k_proj.weight", "layers.{layer}.attention.wk.weight", "kv_heads", pairs=True
    ),
    "blocks.attention.v_proj": Entry(1, "model.layers.{layer}.self_attn.v_proj.weight", "layers.{layer}.attention.wv.weight", "kv_heads"),
    "blocks.attention.o_proj": Entry(2, "model.layers.{layer}.self_attn.o_proj.weight", "layers.{layer}.attention.wo.weight", "heads"),
    "blocks.ffn_norm.weight": Entry(0, "model.layers.{layer}.post_attention_layernorm.weight", "layers.{layer}.ffn_norm.weight", ""),
    "blocks.feed_forward.gate_proj": Entry(1, "model.layers.{layer}.mlp.gate_proj.weight", "layers.{layer}.feed_forward.w1.weight", "mlp"),
    "blocks.feed_forward.up_proj": Entry(1, "model.layers.{layer}.mlp.up_proj.weight", "layers.{layer}.feed_forward.w3.weight", "mlp"),
    "blocks.feed_forward.down_proj": Entry(1, "model.layers.{layer}.mlp.down_proj.weight", "layers.{layer}.feed_forward.w2.weight", "mlp"),
    "final_norm.weight": Entry(0, "model.norm.weight", "norm.weight", ""),
    "lm_head": Entry(1, "lm_head.weight", "output.weight", "vocab"),
}


def torch_shape(shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    """(outputs, inputs) of one of our arrays, as `torch.nn.Linear` keeps it."""
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else shape


def to_torch(x: np.ndarray, inputs: int) -> np.ndarray:
    """`embed heads head_dim` to `(heads head_dim) embed`, without a copy where `x` came from `from_torch`."""
    return np.ascontiguousarray(x.reshape(torch_shape(x.shape, inputs)[::-1]).T) if inputs else np.ascontiguousarray(x)


def from_torch(y: np.ndarray, inputs: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_torch`, a view; `shape` is ours."""
    return y.T.reshape(shape) if inputs else y


def halves_to_pairs(x: np.ndarray) -> np.ndarray:
    """Reorders the last axis, head_dim, from rotary pairs half a head apart to Meta's order, in which they are neighbours."""
    return x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2).swapaxes(-1, -2).reshape(x.shape)


def pairs_to_halves(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).swapaxes(-1, -2).reshape(x.shape)
