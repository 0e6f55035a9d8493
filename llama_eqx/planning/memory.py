"""What a step keeps on a device, by part and without compiling: sizes from the shapes, activations from a trace of the loss."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_eqx.model.kernel.shards import ways
from llama_eqx.planning.compile import abstract_batch
from llama_eqx.remat import RematConfig
from llama_eqx.sharding import Layout, axis_names
from llama_eqx.training.optimizer import learning
from llama_eqx.training.program import Program, make_program
from llama_eqx.training.run import RunConfig


class Memory(NamedTuple):
    """Bytes per device: `copies` of the weights in the compute dtype; `activations` that the forward pass keeps for the
    backward pass; the working set of one `block` with its gathered weights; `logits` with their gradient and the head's.
    """

    parameters: int
    optimizer: int
    gradients: int
    copies: int
    activations: int
    block: int
    logits: int

    @property
    def total(self) -> int:
        """The peak. The logits are freed before the gradients of the blocks exist."""
        lasting = self.parameters + self.optimizer + self.copies + self.activations
        return lasting + max(self.logits, self.gradients + self.block)


ROWS = 11  # of the batch in a trace: no axis of a model has this size, so an axis that has it is the batch's


class Trace(NamedTuple):
    """What a trace of the gradient shows for one row of the batch, on any mesh: bytes that the forward pass keeps for the backward pass, in
    arrays that tensor parallelism splits (`split`) or does not (`whole`); the same for one block without remat; bytes on the `host`;
    `flops` of matrix products, including those that remat repeats. `fixed` bytes do not depend on the batch: copies of weights.
    """

    whole: float
    split: float
    block_whole: float
    block_split: float
    host: float
    fixed: float
    flops: float


def memory_by_part(config: RunConfig, program: Program, layout: Layout, traced: Trace | None = None) -> Memory:
    """The parts of a step's peak. One trace serves every mesh and batch size."""
    traced = traced or trace(config, layout)
    model, dims = program.shapes.model, config.model.dims
    parameters = _held(model, program.shardings.model)
    learn = learning(config.train.only, model)
    learned = _held(eqx.filter(model, learn), eqx.filter(program.shardings.model, learn))
    tensor, sequence = layout.mesh.shape["tensor"], layout.mesh.shape["sequence"]
    residual = ways(layout.mesh, layout.spec(("residual",), dims.of("embed"))[0])
    compute = jnp.dtype(config.precision.compute).itemsize
    rows = rows_of_device(config, layout)
    part = rows / sequence
    # The compiler casts once for all layers, gathers two layers at a time, and holds the whole embedding and head and their gradients.
    whole = config.train.microbatch_size in (None, config.train.batch_size)  # otherwise gradients are accumulated
    cast = parameters * compute // 4 if config.precision.params != config.precision.compute else 0
    layer = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.blocks)) // dims.layers
    outside = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((model.embed, model.lm_head)))
    gathered = compute / tensor if layout.mesh.shape["fsdp"] > 1 else 0
    tokens = min(part * config.train.seq_len, config.loss.chunk or math.inf)
    vocab = dims.of("vocab")[0] / tensor
    return Memory(
        parameters=parameters,
        optimizer=_held(program.shapes.opt_state, program.shardings.opt_state),
        gradients=learned if whole else 2 * learned,
        copies=int(cast + traced.fixed / layout.mesh.size),
        activations=int(part * (traced.whole / residual + traced.split / tensor)),
        block=int(part * (traced.block_whole + traced.block_split / tensor) + 2 * layer * gathered),
        logits=int(tokens * vocab * (4 + compute) + 2 * outside * gathered),
    )


def trace(config: RunConfig, layout: Layout) -> Trace:
    """Traces the loss as one device would see it. Nothing is computed."""
    device = layout.mesh.devices.flat[:1].reshape(1, 1, 1, 1)
    alone = Layout(Mesh(device, layout.mesh.axis_names, axis_types=layout.mesh.axis_types), layout.rules)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=ROWS, microbatch_size=None))
    bare = dataclasses.replace(config, remat=RematConfig(policy="none"))
    kept, block = _kept(config, alone), _kept(bare, alone)
    program, batch = make_program(config, alone), abstract_batch(alone, ROWS, config.train.seq_len)
    traced = jax.make_jaxpr(jax.grad(lambda model, batch: program.loss(model, batch, None)[0]))(program.shapes.model, batch)
    layers = config.model.dims.layers
    return Trace(
        whole=kept["whole"] / ROWS,
        split=kept["split"] / ROWS,
        block_whole=block["whole"] / ROWS / layers,
        block_split=block["split"] / ROWS / layers,
        host=kept["host"] / ROWS,
        fixed=kept["fixed"],
        flops=_products(getattr(traced, "jaxpr", traced)) / ROWS,
    )


def _products(jaxpr: Any) -> float:
    """FLOPs of the matrix products in a jaxpr and those within it. Of a kernel's blocks, half count: those that a causal mask leaves."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            continue
        inner = [_products(getattr(part, "jaxpr", part)) for part in _jaxprs(params)]
        if name == "scan":
            total += params["length"] * sum(inner)
        elif name == "shard_map":
            total += params["mesh"].size * sum(inner)
        elif name == "pallas_call":
            total += math.prod(params["grid_mapping"].grid) * sum(inner) / 2
        else:
            total += max(inner, default=0.0) if name == "cond" else sum(inner)
    return total


def _jaxprs(params: dict[str, Any]) -> Iterable[Any]:
    for value in params.values():
        yield from (
            part for part in (value if isinstance(value, tuple | list) else (value,)) if hasattr(getattr(part, "jaxpr", part), "eqns")
        )


def _kept(config: RunConfig, layout: Layout) -> dict[str, float]:
    """The bytes that the loss's forward pass keeps for its backward pass, without parameters and logits."""
    program, dims = make_program(config, layout), config.model.dims
    model = program.shapes.model

    def residuals(model: Any, batch: Any) -> list:  # of arrays, some of them NumPy's: what a kernel knows of its mask
        _, backward, _ = jax.vjp(lambda model: program.loss(model, batch, None), model, has_aux=True)
        return jax.tree.leaves(backward)

    traced = jax.make_jaxpr(residuals)(model, abstract_batch(layout, ROWS, config.train.seq_len))
    jaxpr = getattr(traced, "jaxpr", traced)
    found: dict[str, float] = dict.fromkeys(("whole", "split", "host", "fixed"), 0.0)
    split = {dims.heads, dims.kv_heads, dims.mlp}
    for axes, leaf in zip(axis_names(model), jax.tree.leaves(model), strict=True):  # a variant may have axes of its own
        split |= {size for axis, size in zip(axes, leaf.shape, strict=True) if "tensor" in layout.rules.axes.get(axis, ())} - {dims.embed}
    rows = {ROWS, ROWS * config.train.seq_len}  # on a CPU, batch and sequence are one axis in what is tokenwise
    # What is held by train.only is no copy either: these are the parameters themselves.
    ours = {*jaxpr.invars}.union(*(equation.outvars for equation in jaxpr.eqns if equation.primitive.name == "stop_gradient"))
    for var in dict.fromkeys(var for var in jaxpr.outvars if not hasattr(var, "val") and var not in ours):
        shape = var.aval.shape
        if "host" in str(getattr(var.aval, "memory_space", "")).lower():
            kind = "host"
        elif not rows & {*shape}:
            kind = "fixed"
        else:  # by the axes that are not the batch, the sequence, or the layers (the first)
            kind = "split" if split & ({*shape[1:]} - rows - {config.train.seq_len}) else "whole"
        if dims.vocab not in shape[-1:]:
            found[kind] += math.prod(shape) * var.aval.dtype.itemsize
    return found


def rows_of_device(config: RunConfig, layout: Layout) -> float:
    """Rows of a microbatch on each device."""
    ways = math.prod(layout.mesh.shape[axis] for axis in layout.rules.axes.get("batch", ()))
    return (config.train.microbatch_size or config.train.batch_size) / ways


def _held(tree: Any, shardings: Any) -> int:
    """Bytes of a tree of abstract arrays on each device."""
    pairs: Iterable = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in pairs)
