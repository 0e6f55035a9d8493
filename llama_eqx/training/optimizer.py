"""From gradients to directions. The step multiplies a direction by the learning rate, so that no optimizer holds a schedule of its own."""

import abc
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int, PyTree

from llama_eqx.config import Config, nearest
from llama_eqx.errors import ConfigError
from llama_eqx.sharding import Matrix, axis_names, ending_in, matrix, parameter_names


class OptimizerConfig(Config):
    """Gradients are clipped to a global norm of `clip_norm` before the variant sees them, unless it is None.

    Matrices decay by `weight_decay` times the learning rate times themselves (decoupled: Loshchilov and Hutter, 2017, arXiv 1711.05101).
    """

    clip_norm: float | None
    weight_decay: float

    def check(self) -> None:
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(
                f"{self.clip_norm} leaves nothing of a gradient", where="clip_norm", next="optimizer.clip_norm=null clips nothing"
            )
        self.within(0, math.inf, "weight_decay", "iterations", "min_scale")
        self.within(1e-37, math.inf, "eps", "clip")  # with 0, where a gradient is 0, an update is 0 / 0
        self.within(0, 1, "b1", "b2", "momentum")

    @abc.abstractmethod
    def direction(self) -> optax.GradientTransformation: ...

    def build(self) -> optax.GradientTransformation:
        """Returns a transformation whose updates are to be multiplied by minus the learning rate."""
        decay = optax.add_decayed_weights(self.weight_decay, mask=matrices)
        clip = optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm)
        return optax.chain(clip, optax.chain(self.direction(), decay))


def transformation(config: OptimizerConfig, only: tuple[str, ...] | None) -> optax.GradientTransformation:
    """The optimizer of a run in which `only` these parameters learn: see `learning`. The updates of the others are zero."""
    if only is None:
        return config.build()
    return optax.partition({True: config.build(), False: optax.set_to_zero()}, functools.partial(learning, only))


def learning(names: tuple[str, ...] | None, model: PyTree) -> PyTree:
    """For every parameter, whether it is one of those that `names` stands for; None stands for all.

    Raises `ConfigError` when a name stands for none.
    """
    known, learn = parameter_names(model), set()
    for name in known if names is None else names:
        if not (meant := ending_in(name, known)):
            ends = {each.rpartition(".")[2] for each in known}
            raise ConfigError(f"the model has no parameter {name}", where="train.only", next=nearest(name, {*known, *ends}))
        learn |= {*meant}
    return jax.tree.unflatten(jax.tree.structure(model), [name in learn for name in known])


class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter, 2017, arXiv 1711.05101)."""

    b1: float
    b2: float
    eps: float

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


class LionConfig(OptimizerConfig):
    """The sign of an interpolated momentum (Chen et al., 2023, arXiv 2302.06675). Its learning rate is 3 to 10 times below AdamW's."""

    b1: float
    b2: float

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)


class MuonConfig(OptimizerConfig):
    """The momentum of every weight matrix of a block, orthogonalised (Jordan et al., 2024, kellerjordan.github.io/posts/muon).

    AdamW, with `b1`, `b2` and `eps`, updates the embedding, the head and the norms. Muon's updates are scaled by 0.2 sqrt(max(in, out))
    to the size of AdamW's (Liu et al., 2025, arXiv 2502.16982), so one learning rate serves both.
    """

    momentum: float
    iterations: int
    b1: float
    b2: float
    eps: float

    def direction(self) -> optax.GradientTransformation:
        muon = optax.contrib.scale_by_muon(beta=self.momentum, ns_steps=self.iterations, weight_dimension_numbers=_muon_matrices)
        muon = optax.chain(muon, optax.stateless(_as_large_as_adam))
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return optax.partition({"muon": muon, "adam": adam}, _muon_or_adam)


class AdafactorConfig(OptimizerConfig):
    """Second moments of matrices, factored into a row times a column (Shazeer and Stern, 2018, arXiv 1804.04235), without momentum.

    Updates are scaled by the root mean square of the parameter, so the learning rate is relative to it.
    """

    decay: float
    eps: float
    min_scale: float
    clip: float

    def direction(self) -> optax.GradientTransformation:
        def init(model: Any) -> AdafactorState:
            zeros = [_means(jnp.zeros(leaf.shape, jnp.float32), axes) for leaf, axes in _with_axes(model)]
            return AdafactorState(jnp.zeros((), jnp.int32), _like(model, zeros))

        def update(gradient: Any, state: AdafactorState, model: Any) -> tuple[Any, AdafactorState]:
            steps = state.steps + 1
            new = 1 / steps.astype(jnp.float32) ** self.decay  # the weight of the newest gradient
            treedef, directions, seconds = jax.tree.structure(model), [], []
            olds = treedef.flatten_up_to(state.second)
            for (parameter, axes), g, old in zip(_with_axes(model), jax.tree.leaves(gradient), olds, strict=True):
                g, own = g.astype(jnp.float32), axes.rows + axes.columns
                second = tuple(a + new * (b - a) for a, b in zip(old, _means(g**2 + self.eps, axes), strict=True))
                rows, *columns = second
                estimate = rows / rows.mean(axes.rows, keepdims=True) * columns[0] if columns else rows
                direction = g * jax.lax.rsqrt(estimate)
                direction /= jnp.maximum(1, _rms(direction, own) / self.clip)
                directions.append(direction * jnp.maximum(self.min_scale, _rms(parameter.astype(jnp.float32), own)))
                seconds.append(second)
            return _like(model, directions), AdafactorState(steps, _like(model, seconds))

        return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


class AdafactorState(NamedTuple):
    """`second` holds for each matrix the means of squared gradients over columns and over rows, for others the squares themselves."""

    steps: Int[Array, ""]
    second: Any


def matrices(model: Any) -> Any:
    """True for every parameter that is a matrix. A stacked norm has two axes, but its annotation has one."""
    return _like(model, [bool(axes.columns) for _, axes in _with_axes(model)])


def _muon_or_adam(model: Any) -> Any:
    """Embedding and head are matrices too, but tables of vectors rather than maps between them."""
    return _like(model, ["muon" if matrix(axes).columns and "vocab" not in axes else "adam" for axes in axis_names(model)])


def _muon_matrices(updates: Any) -> Any:
    # optax would take 2-D arrays for matrices, but a stacked norm is 2-D and a stacked weight is not.
    return _like(updates, [optax.contrib.MuonDimensionNumbers(*axes) for _, axes in _with_axes(updates)])


def _as_large_as_adam(updates: Any, _: Any) -> Any:
    def scale(leaf: Array, axes: Matrix) -> float:
        return 0.2 * math.sqrt(max(math.prod(leaf.shape[i] for i in side) for side in axes))

    return _like(updates, [scale(leaf, axes) * leaf for leaf, axes in _with_axes(updates)])


def _with_axes(model: Any) -> list[tuple[Array, Matrix]]:
    return [(leaf, matrix(axes)) for leaf, axes in zip(jax.tree.leaves(model), axis_names(model), strict=True)]


def _like(model: Any, leaves: list[Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def _means(squares: Array, axes: Matrix) -> tuple[Array, ...]:
    if not axes.columns:
        return (squares,)
    return squares.mean(axes.columns, keepdims=True), squares.mean(axes.rows, keepdims=True)


def _rms(x: Array, axes: tuple[int, ...]) -> Float32[Array, "..."]:
    return jnp.sqrt(jnp.mean(x**2, axes, keepdims=True))
