"""Arms of equal size: otherwise a comparison of two kinds of layer is one of their sizes."""

import dataclasses
import math

import equinox as eqx
import jax

from llama_eqx.flops import flops_per_token
from llama_eqx.model.llama import LlamaConfig
from llama_eqx.training.run import RunConfig


def cost(model: LlamaConfig, kind: str, seq_len: int) -> int:
    """The number of parameters, or FLOPs per token of training."""
    shapes = eqx.filter_eval_shape(model.build, key=jax.random.key(0))
    if kind == "flops":
        return flops_per_token(shapes, seq_len).causal
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def residual(config: RunConfig) -> float | None:
    """The fraction by which the model costs more than the reference that it is matched to; None when it is not matched."""
    if config.study is None or config.study.match == "none":
        return None
    target = cost(_reference(config), config.study.match, config.train.seq_len)
    return cost(config.model, config.study.match, config.train.seq_len) / target - 1


def matched(config: RunConfig) -> RunConfig:
    """`config` with the feed-forward width that brings the model's cost as close as possible to its reference's.

    The cost is linear in the width. The vocabulary must be known.
    """
    if config.study is None or config.study.match == "none":
        return config
    kind, seq_len = config.study.match, config.train.seq_len

    def of_width(width: int) -> int:
        return cost(_with_width(config.model, width), kind, seq_len)

    one = of_width(1)
    width = 1 + round((cost(_reference(config), kind, seq_len) - one) / (of_width(2) - one))
    return dataclasses.replace(config, model=_with_width(config.model, max(width, 1)))


def _with_width(model: LlamaConfig, width: int) -> LlamaConfig:
    return dataclasses.replace(model, dims=dataclasses.replace(model.dims, mlp=width))


def _reference(config: RunConfig) -> LlamaConfig:
    assert config.study is not None
    reference = config.study.reference
    return dataclasses.replace(reference, dims=dataclasses.replace(reference.dims, vocab=config.model.dims.vocab))
