"""Where arrays live: axis names are read from the annotations and mapped to the axes of a mesh."""

import contextlib
import dataclasses
import itertools
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_eqx.config import Config
from llama_eqx.dims import Dims
from llama_eqx.errors import ConfigError
from llama_eqx.wrapped import outside

Axes = tuple[str, ...]
MESH_AXES = ("data", "fsdp", "sequence", "tensor")


class MeshConfig(Config):
    """Devices in a grid with the axes `data fsdp sequence tensor`. One size may be -1: what the others leave.

    `devices` is how many the grid needs and `hosts` how many machines hold them; None takes what is there. `topology` is the TPU
    compiler's name for a slice, "v4:2x2x4". `virtual` splits the CPUs of the hosts into that many devices.
    `compiler_options` are XLA's for the training step on that chip.
    """

    platform: Literal["cpu", "gpu", "tpu"] | None
    topology: str | None
    devices: int | None
    hosts: int | None
    virtual: bool
    data: int
    fsdp: int
    sequence: int
    tensor: int
    compiler_options: dict[str, bool | int | float | str]

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """A mesh of `devices`, such as those of a topology to compile for, or of all devices here.

        Raises `ConfigError` when they do not match the config.
        """
        if self.virtual and devices is None:
            _split_cpu((self.devices or 1) // (self.hosts or 1))
        found = jax.devices() if devices is None else devices
        kind = found[0].device_kind
        if self.platform not in (None, found[0].platform) or self.devices not in (None, len(found)):
            spread = f" on {self.hosts} hosts, each of which runs this command" if (self.hosts or 1) > 1 else ""
            raise ConfigError(
                f"this mesh needs {self.devices} {self.platform} devices{spread}; there are {len(found)} here ({kind})",
                where="mesh",
                next="python -m llama_eqx.plan compiles for them; " * bool(self.topology)
                + "mesh=local uses the devices that are here; mesh=cpu-8 tries eight virtual ones",
            )
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        rest, unused = divmod(len(found), math.prod(size for size in sizes.values() if size != -1))
        grid = {axis: rest if size == -1 else size for axis, size in sizes.items()}
        if unused or math.prod(grid.values()) != len(found):
            wanted = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise ConfigError(f"{wanted} does not make {len(found)} devices", where="mesh", next=_nearest_grid(sizes, len(found)))
        # An axis may be part of a side of the torus, such as tensor=2 of 8 x 8 chips: jax.make_mesh allows that only on v5e.
        places = create_device_mesh(tuple(grid.values()), found, allow_split_physical_axes=True)
        return Mesh(places, MESH_AXES, axis_types=(AxisType.Auto,) * len(grid))

    def check(self) -> None:
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ConfigError("axis sizes must be at least 1, and at most one may be -1", where="/".join(MESH_AXES))
        if self.devices is not None and self.devices % (self.hosts or 1):
            raise ConfigError(
                f"{self.devices} devices do not divide over {self.hosts} hosts",
                where="hosts",
                next=f"mesh.devices={self.devices + -self.devices % (self.hosts or 1)}, or other mesh.hosts",
            )


class Rules(Config):
    """Maps the name of an axis to the mesh axes that split it; an axis that is not named is not split."""

    axes: dict[str, Axes]

    def check(self) -> None:
        for axis, split in self.axes.items():
            for name in split:
                if name not in MESH_AXES:
                    raise ConfigError(f"{name} is not an axis of a mesh", where=f"axes.{axis}", next=f"one of: {', '.join(MESH_AXES)}")
            if len(set(split)) < len(split):
                raise ConfigError(f"a mesh axis is used twice: {', '.join(split)}", where=f"axes.{axis}", next="name it once")

    def without(self, *mesh_axes: str) -> "Rules":
        return Rules(axes={axis: tuple(name for name in split if name not in mesh_axes) for axis, split in self.axes.items()})


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that map axis names to it."""

    mesh: Mesh
    rules: Rules

    def check(self, sizes: Mapping[str, int]) -> list[str]:
        """Checks the sizes of axes, by name, against the mesh. Returns remarks on what is replicated because it does not divide.

        Raises `ConfigError` listing every axis that does not divide and every mesh axis that splits nothing, with the nearest mesh
        of as many devices that fits.
        """
        used = {name for axis in sizes for name in self.rules.axes.get(axis, ())}

        def ways(axis: str, grid: Mapping[str, int]) -> int:
            return math.prod(grid[name] for name in self.rules.axes.get(axis, ()))

        def wrong(grid: Mapping[str, int]) -> list[str]:
            rest = [axis for axis, size in sizes.items() if axis != "kv_heads" and size % ways(axis, grid)]
            said = [f"{axis}={sizes[axis]} does not divide by {' x '.join(self.rules.axes[axis])} = {ways(axis, grid)}" for axis in rest]
            return said + [f"{name}={grid[name]} splits nothing under these rules" for name in grid if name not in used and grid[name] > 1]

        grid = self.mesh.shape
        if found := wrong(grid):
            hint = _nearest_grid(grid, self.mesh.size, lambda other: not wrong(other))
            if any("splits nothing" in line for line in found):
                every = "sharding=sequence, whose rules use every axis of a mesh"
                hint = f"{every}; or {hint}" if hint.startswith("mesh") else every
            elif found[0].startswith("batch") and len(found) == 1:
                size = f"train.batch_size={-(-sizes['batch'] // ways('batch', grid)) * ways('batch', grid)}"
                hint = f"{size}; as a mesh, {hint}" if hint.startswith("mesh") else size
            raise ConfigError("\n".join(found), where="mesh, sharding", next=hint)
        heads, split = sizes.get("kv_heads", 0), ways("kv_heads", grid)
        return [f"kv_heads={heads} does not divide by {split}: each of those devices holds all keys and values"] if heads % split else []

    def spec(self, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        """The mesh axes that split each axis of an array. A mesh axis splits an array once: the first axis that asks for it gets it.

        `kv_heads` that do not divide are replicated, as is usual with more devices than key heads.

        Raises `ConfigError` for any other axis that does not divide.
        """
        free, parts = set(self.mesh.axis_names), []
        for axis, size in zip(axes, shape, strict=True):
            split = tuple(name for name in self.rules.axes.get(axis, ()) if name in free and self.mesh.shape[name] > 1)
            ways = math.prod(self.mesh.shape[name] for name in split)
            if size % ways:
                if axis != "kv_heads":
                    raise ConfigError(
                        f"{axis}={size} does not divide by {' x '.join(split)} = {ways}",
                        where="sharding",
                        next=f"{'train.batch_size' if axis == 'batch' else axis} as a multiple of {ways}, or another mesh.{split[-1]}",
                    )
                split = ()
            free -= set(split)
            parts.append(split or None)
        return PartitionSpec(*parts)

    def sharding(self, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def shardings(self, tree: Any) -> Any:
        """The sharding of every leaf of a tree of (possibly abstract) arrays.

        Raises `ConfigError` listing every axis that does not divide, and every array with two axes that the rules split by one mesh axis.
        """
        leaves, structure = jax.tree.flatten(tree)
        found, wrong = [], {}
        for axes, leaf in zip(axis_names(tree), leaves, strict=True):
            asked = [(name, axis) for axis in axes for name in self.rules.axes.get(axis, ())]
            for (name, axis), (other, second) in itertools.combinations(asked, 2):
                if name == other and axis != second:
                    wrong[f"{name} is used twice, for {axis} and {second} of one array ({' '.join(axes)})"] = None
            try:
                found.append(self.sharding(axes, leaf.shape))
            except ConfigError as error:
                wrong[error.what] = None
        if wrong:
            raise ConfigError("\n".join(wrong), where="sharding", next="change the sizes, the axes of the mesh, or sharding.axes")
        return structure.unflatten(found)

    def place(self, tree: Any) -> Any:
        """`tree` with every leaf constrained to its sharding; for use under jit."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def gathered(self, model: Any) -> Any:
        """`model` with the weights outside of its blocks gathered along the mesh axes that split batch or seq, as the loss sees it.

        Otherwise the partitioner would compute with slices of them, and reduce activations instead of gathering weights.
        """
        parts = lambda m: [*outside(m).values()]  # noqa: E731
        tokens = (name for axis in ("batch", "seq") for name in self.rules.axes.get(axis, ()))
        whole = Layout(self.mesh, self.rules.without(*tokens)).shardings(model)
        return eqx.tree_at(parts, model, jax.lax.with_sharding_constraint(parts(model), parts(whole)), is_leaf=lambda x: x is None)

    def constrain_residual(self, block: Callable) -> Callable:
        """Wraps a block so that its residual is split by batch (and sequence) only, where it enters and leaves.

        Rules for `residual` also split its width, for less memory under tensor parallelism. Korthikanti et al. (2022, arXiv 2205.05198)
        split the row instead.
        """

        def edge(x: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(x, self.sharding(("batch", "seq", "residual"), x.shape))

        def wrapped(module: Any, x: jax.Array, *rest: Any) -> Any:
            y, cache = block(module, edge(x), *rest)
            return edge(y), cache

        return wrapped


def mesh_axes(part: Any) -> tuple[str, ...]:
    """The mesh axes in one part of a PartitionSpec."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def axis_names(tree: Any) -> list[Axes]:
    """The axis names of every leaf of a tree of modules in the order of `jax.tree.leaves`.

    They are read from the annotations of the fields: `Float[Array, "embed mlp"]` names two, `Annotated[Block, "layers"]` puts one
    before the names of everything within. Names are empty for arrays without annotations, and for an optimizer's arrays whose shape is
    not that of their parameter.

    Raises `TypeError` when the rank of a model's array is not that of its annotation.
    """
    return list(_axis_names(tree, None, (), sizes={}, strict=True))


class Matrix(NamedTuple):
    """Which axes of a parameter are the rows (its inputs) and the columns (its outputs) of a matrix; a vector has no columns.

    All other axes count independent matrices, such as those of the layers.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]


def matrix(axes: tuple[str, ...]) -> Matrix:
    """The `Matrix` of a parameter's axis names. Heads and their dimension are one axis: "embed heads head_dim" is embed × rest."""
    groups: list[tuple[int, ...]] = []
    for i, axis in enumerate(axes):
        if axis == "head_dim" and groups:
            groups[-1] += (i,)
        elif axis != "layers":
            groups.append((i,))
    return Matrix(*groups[-2:]) if len(groups) > 1 else Matrix(groups[0] if groups else (), ())


def parameter_names(tree: Any) -> list[str]:
    """The dotted path of every leaf, `blocks.attention.q_proj`, in the order of `jax.tree.leaves`."""
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)]


def ending_in(name: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that are `name` or end with it, compared part by part: "q_proj" stands for every "….q_proj"."""
    return [each for each in names if f".{each}".endswith(f".{name}")]


def check_shapes(model: Any, dims: Dims) -> None:
    """Raises `ValueError` unless the axes of every array of `model` have the sizes in `dims`. A variant's own axes may have any size.

    jaxtyping checks only constructors, and only where its hook is installed; this also sees models that were stacked, restored or edited.
    """
    known = {field.name: getattr(dims, field.name) for field in dataclasses.fields(dims)}
    for name, axes, leaf in zip(parameter_names(model), axis_names(model), jax.tree.leaves(model), strict=True):
        wrong = [
            f"{axis} is {known[axis]}, not {size}" for axis, size in zip(axes, leaf.shape, strict=True) if known.get(axis, size) != size
        ]
        if wrong:
            raise ValueError(f"{name} ({' '.join(axes)}): {', '.join(wrong)}")


def _axis_names(tree: Any, hint: Any, lead: Axes, *, sizes: Mapping[str, int], strict: bool) -> Iterator[Axes]:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        hint, lead, arguments = arguments[0], (*lead, *arguments[1:]), ()
    if isinstance(tree, eqx.Module):
        if dims := getattr(getattr(tree, "config", None), "dims", None):
            sizes = vars(dims)
        hints = typing.get_type_hints(type(tree), include_extras=True)
        for field in dataclasses.fields(tree):  # pyright: ignore[reportArgumentType]
            if not field.metadata.get("static"):
                yield from _axis_names(getattr(tree, field.name), hints[field.name], lead, sizes=sizes, strict=strict)
    elif hasattr(tree, "shape"):
        own = next((h.dim_str.split() for h in (hint, *arguments) if hasattr(h, "dim_str")), [])
        axes = (*lead, *own)
        if strict and len(axes) != len(tree.shape):
            raise TypeError(f"{hint} names the axes {axes} of an array of shape {tree.shape}")
        fits = len(axes) == len(tree.shape) and all(sizes.get(axis, size) == size for axis, size in zip(axes, tree.shape, strict=True))
        yield axes if strict or fits else ("",) * len(tree.shape)
    else:  # a tuple, a named tuple, a dict or None: an optimizer's own containers
        for child in jax.tree.leaves(tree, is_leaf=lambda x: x is not tree):
            yield from _axis_names(child, None, lead, sizes=sizes, strict=False)


def _split_cpu(devices: int) -> None:
    with contextlib.suppress(RuntimeError):  # a backend is up already: the caller counts its devices
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)


def _nearest_grid(wanted: Mapping[str, int], devices: int, fits: Callable[[Mapping[str, int]], bool] = lambda grid: True) -> str:
    """The overrides that give the grid nearest to `wanted` among the fitting grids of that many devices."""

    def grids(count: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (count,)
        else:
            yield from ((n, *rest) for n in range(1, count + 1) if count % n == 0 for rest in grids(count // n, axes - 1))

    def distance(grid: Mapping[str, int]) -> float:
        return sum(abs(math.log(grid[axis] / size)) for axis, size in wanted.items() if size != -1)

    fitting = [grid for sizes in grids(devices, len(MESH_AXES)) if fits(grid := dict(zip(MESH_AXES, sizes, strict=True)))]
    if not fitting:
        return f"no grid of {devices} devices fits: other sizes, or another number of devices"
    best = min(fitting, key=lambda grid: (round(distance(grid), 6), grid["tensor"], grid["sequence"], grid["data"]))
    return " ".join(f"mesh.{axis}={size}" for axis, size in best.items()) + " is the nearest that does"
