"""Weights in the form that every format is read to and written from: a tensor at a time, in our names, axes and order of rotary pairs."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from llama_eqx.errors import CheckpointError
from llama_eqx.interop.table import to_torch
from llama_eqx.model.llama import Llama, LlamaConfig
from llama_eqx.sharding import axis_names, parameter_names

Key = tuple[str, int | None]  # a parameter's name, and the layer where it has one
Index = tuple[slice, ...]

PIECE_BYTES = 64 * 2**20  # the most that is in memory at a time while a tensor goes from file to file


class Tensor(NamedTuple):
    """A tensor that has not been read yet: a whole parameter, or one layer of it.

    `read(index)` returns the part that the slices select, one for every axis, on the host. It may be a view of a file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        return self.read((slice(None),) * len(self.shape))


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a reader finds in a folder: the config, every tensor in the order of `tensor_shapes`, and the files to go with them.

    `files` are the tokenizer's and the like, by their name in another folder. `notes` say what had to be assumed.
    """

    config: LlamaConfig
    tensors: Mapping[Key, Tensor]
    files: Mapping[str, pathlib.Path]
    notes: tuple[str, ...]


def tensor_shapes(config: LlamaConfig) -> dict[Key, tuple[int, ...]]:
    """The shape of every tensor of a model, a layer at a time, in the order of its parameters.

    Raises `ConfigError` when sizes contradict each other.
    """
    return {key: shape for key, (_, shape) in _tensors(config).items()}


def tensor_axes(config: LlamaConfig) -> dict[Key, tuple[str, ...]]:
    """The names of the axes of every tensor."""
    return {key: axes for key, (axes, _) in _tensors(config).items()}


@functools.lru_cache(maxsize=8)
def _tensors(config: LlamaConfig) -> dict[Key, tuple[tuple[str, ...], tuple[int, ...]]]:
    model, tensors = abstract(config), {}
    for name, axes, leaf in zip(parameter_names(model), axis_names(model), jax.tree.leaves(model), strict=True):
        if axes[0] == "layers":
            tensors |= {(name, layer): (axes[1:], leaf.shape[1:]) for layer in range(leaf.shape[0])}
        else:
            tensors[name, None] = axes, leaf.shape
    return tensors


def parameter_shapes(model: Llama) -> dict[str, tuple[int, ...]]:
    return dict(zip(parameter_names(model), (leaf.shape for leaf in jax.tree.leaves(model)), strict=True))


@functools.lru_cache(maxsize=8)
def abstract(config: LlamaConfig) -> Llama:
    """The model's structure without its arrays."""
    return eqx.filter_eval_shape(lambda key: config.build(key=key), jax.eval_shape(lambda: jax.random.key(0)))


def require_tensors(config: LlamaConfig, found: int, *, where: str) -> None:
    """Raises `CheckpointError` for more layers than tensors: to list what is missing of a billion layers would take all memory."""
    if config.dims.layers > found:
        raise CheckpointError(f"the settings ask for {config.dims.layers:,} layers, and there are {found:,} tensors", where=where)


def compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Raises `CheckpointError` with a line for every tensor that is missing, of another shape, or not expected."""
    lines = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    lines += [f"shape: {name} is {found[name]}, wanted {shape}" for name, shape in expected.items() if found.get(name, shape) != shape]
    lines += [f"not part of this model: {name}" for name in found if name not in expected]
    if lines:
        raise CheckpointError("\n".join(lines), where=where)


def of_model(model: Llama) -> Weights:
    """The weights of a model in memory. Layers are fetched from the devices one at a time.

    Raises `CheckpointError` when the model has been edited and no longer fits its config, or is laid out for decoding.
    """
    if isinstance(model.blocks, tuple):
        what = "this model is laid out for decoding and cannot be saved"
        raise CheckpointError(what, where="model", next="save the model that it was made from")
    leaves = dict(zip(parameter_names(model), jax.tree.leaves(model), strict=True))
    compare(parameter_shapes(abstract(model.config)), parameter_shapes(model), where="a model that is no longer that of its config")

    def fetch(key: Key) -> np.ndarray:
        name, layer = key
        return np.asarray(leaves[name] if layer is None else _layer(leaves[name], layer))

    return Weights(model.config, fetched(tensor_shapes(model.config), {name: leaf.dtype for name, leaf in leaves.items()}, fetch), {}, ())


@jax.jit
def _layer(stack: Array, i: Array | int) -> Array:
    """`stack[i]`. Outside of `jit`, that makes two arrays of its size."""
    return jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)


def fetched(shapes: Mapping[Key, tuple[int, ...]], dtypes: Mapping[str, Any], fetch: Callable[[Key], np.ndarray]) -> dict[Key, Tensor]:
    """Tensors that are fetched whole, however small the part that is read. One is held at a time, until another is asked for."""
    held: dict[Key, np.ndarray] = {}

    def read(key: Key, index: Index) -> np.ndarray:
        if key not in held:
            held.clear()
            held[key] = fetch(key)
        return held[key][index]

    return {key: Tensor(shape, np.dtype(dtypes[key[0]]), functools.partial(read, key)) for key, shape in shapes.items()}


def to_model(weights: Weights, dtype: DTypeLike | None = None, shardings: PyTree[Sharding] | None = None) -> Llama:
    """The model in memory, in the dtype of the files unless one is given.

    `shardings` is one for all arrays or a tree of them in the model's structure; without it everything goes to the first device.
    Each process reads what its devices hold, a layer at a time, so the host never has a whole model.
    """
    model = abstract(weights.config)
    everywhere = SingleDeviceSharding(jax.devices()[0]) if shardings is None else shardings
    places = jax.tree.leaves(jax.tree.broadcast(everywhere, model))
    filled = []
    for name, place in zip(parameter_names(model), places, strict=True):
        tensors = [tensor for (parameter, _), tensor in weights.tensors.items() if parameter == name]
        kind = np.dtype(jnp.result_type(*(tensor.dtype for tensor in tensors)) if dtype is None else dtype)
        layered = (name, 0) in weights.tensors
        filled.append(_place_layers(tensors, kind, place) if layered else _place(tensors[0], kind, place))
    # Modules are never constructed from stacked arrays: their constructors describe a single layer.
    return jax.tree.structure(model).unflatten(filled)


def _place(tensor: Tensor, dtype: np.dtype, place: Sharding) -> jax.Array:
    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        return np.ascontiguousarray(tensor.read(index), dtype)

    return jax.make_array_from_callback(tensor.shape, place, part, dtype=dtype)


def _place_layers(layers: list[Tensor], dtype: np.dtype, place: Sharding) -> jax.Array:
    shape = (len(layers), *layers[0].shape)
    if math.prod(shape) * dtype.itemsize <= PIECE_BYTES:
        stacked = Tensor(shape, dtype, lambda index: np.stack([layer.read(index[1:]).astype(dtype) for layer in layers[index[0]]]))
        return _place(stacked, dtype, place)
    # Copy one layer after the other into the array on the devices: the host never holds more than one.
    if not isinstance(place, NamedSharding | SingleDeviceSharding):  # only these tell the sharding of a single layer
        raise TypeError(f"weights are put into a NamedSharding or a SingleDeviceSharding, not a {type(place).__name__}")
    within = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:])) if isinstance(place, NamedSharding) else place
    stack = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)()
    update = _updater(place)
    for i, layer in enumerate(layers):
        stack = update(stack, _place(layer, dtype, within), i)
    return stack


@functools.lru_cache(maxsize=64)
def _updater(place: Sharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda stack, layer, i: jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0), donate_argnums=0, out_shardings=place)


def pieces(shape: tuple[int, ...], itemsize: int, axis: int) -> Iterator[Index]:
    """Slices of an array along one axis, each of at most `PIECE_BYTES`, or of one row where that is larger."""
    row = math.prod(shape) // shape[axis] * itemsize
    step = max(PIECE_BYTES // max(row, 1), 1)
    for start in range(0, shape[axis], step):
        yield tuple(slice(start, min(start + step, shape[axis])) if i == axis else slice(None) for i in range(len(shape)))


def rows_of(tensor: Tensor, inputs: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The bytes of a tensor in the order of a file of (outputs, inputs), some rows at a time."""
    for index in pieces(tensor.shape, max(dtype.itemsize, tensor.dtype.itemsize), axis=inputs):  # the first axis of the outputs
        yield to_torch(tensor.read(index), inputs).astype(dtype, copy=False).reshape(-1).view(np.uint8)


def parameter_tree(weights: Weights, dtype: np.dtype | None) -> dict[str, Any]:
    """Shape and dtype of every parameter by name, layers stacked, as a manifest lists them. The dtype holds the values of all layers."""
    tree: dict[str, Any] = {}
    for (name, layer), tensor in weights.tensors.items():
        layers, kind = [] if layer is None else [layer + 1], tensor.dtype if dtype is None else dtype
        tree[name] = jax.ShapeDtypeStruct((*layers, *tensor.shape), jnp.promote_types(kind, tree[name].dtype) if name in tree else kind)
    return tree
