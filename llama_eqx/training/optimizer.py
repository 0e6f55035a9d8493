"""From gradients to directions. The step multiplies a direction by the learning rate, so that no optimizer holds a schedule of its own."""

import abc
from typing import Any

import jax
import optax

from llama_eqx.config import Config
from llama_eqx.sharding import axis_names


class OptimizerConfig(Config):
    """Gradients are clipped to a global norm of `clip_norm` before the variant sees them."""

    clip_norm: float

    @abc.abstractmethod
    def direction(self) -> optax.GradientTransformation: ...

    def build(self) -> optax.GradientTransformation:
        """A transformation whose updates are to be multiplied by minus the learning rate."""
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), self.direction())


class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter, 2017, arXiv 1711.05101), decaying matrices only."""

    b1: float
    b2: float
    eps: float
    weight_decay: float

    def direction(self) -> optax.GradientTransformation:
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return optax.chain(adam, optax.add_decayed_weights(self.weight_decay, mask=matrices))


def matrices(model: Any) -> Any:
    """True for every parameter whose annotation has two axes or more. A stacked norm has two, but its annotation has one."""
    own = [[axis for axis in axes if axis != "layers"] for axes in axis_names(model)]
    return jax.tree.unflatten(jax.tree.structure(model), [len(axes) > 1 for axes in own])
