"""Reading: arrays as they were filed, or a list of all that does not fit."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from llama_eqx.errors import CheckpointError


def steps(folder: pathlib.Path) -> list[int]:
    """The steps saved in full in a folder of checkpoints, oldest first; a save that is under way or broke off is not among them."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def filed(path: pathlib.Path, part: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array in one part of the checkpoint at `path`, by name ("blocks.attention.q_proj").

    Raises `CheckpointError` when there is no such part, or it cannot be read.
    """
    try:
        tree = ocp.checkpointables_metadata(str(path)).metadata.get(part)
    except Exception as error:
        raise unreadable(path, error) from error
    if tree is None:
        raise unreadable(path, FileNotFoundError(f"its part {part!r} is missing or damaged"))
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _named(tree).items()}


def read(path: pathlib.Path, parts: Mapping[str, PyTree], *, dtype: DTypeLike | None = None) -> dict[str, Any]:
    """The parts of the checkpoint at `path`, bit for bit, in the structure and shardings of the abstract trees given.

    With `dtype`, every array is cast to it while it is read, so that memory never holds both.

    Raises `CheckpointError` listing every array that is missing, left over, or of another shape or dtype.
    """
    check(path, parts)
    if dtype is not None:
        parts = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), dict(parts))
    try:
        return ocp.load_checkpointables(str(path), dict(parts))
    except Exception as error:
        raise unreadable(path, error) from error


def check(path: pathlib.Path, parts: Mapping[str, PyTree]) -> None:
    """Raises `CheckpointError` listing every array in the checkpoint that is missing, left over, or of another shape or dtype."""
    # Orbax would cast a dtype that differs without a word.
    rows = [row for part, tree in parts.items() for row in _differences(part, _named(tree), filed(path, part))]
    if rows:
        raise CheckpointError(
            "the checkpoint is of another model or optimizer\n" + _table([("name", "expected", "found"), *rows]),
            where=str(path),
            kept="the checkpoint is untouched",
            next="use the config.yaml beside the checkpoints, or start a new run directory",
        )


def read_each(path: pathlib.Path, part: str) -> Iterator[tuple[str, jax.Array]]:
    """Every array in one part of the checkpoint at `path`, by name, one in memory at a time.

    Raises `CheckpointError` when there is no such part, or it cannot be read.
    """
    filed(path, part)
    leaves, structure = jax.tree.flatten(ocp.checkpointables_metadata(str(path)).metadata[part])
    names = list(_named(structure.unflatten(leaves)))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for i, name in enumerate(names):
        wanted: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
        wanted[i] = jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype, sharding=sharding)
        try:
            yield name, _named(ocp.load_checkpointables(str(path), {part: structure.unflatten(wanted)})[part])[name]
        except Exception as error:
            raise _unreadable(path, error) from error


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unreadable(path: pathlib.Path, error: Exception) -> CheckpointError:
    """Orbax says hundreds of lines; the first one is for people."""
    others = [step for step in steps(path.parent) if str(step) != path.name]
    return CheckpointError(
        f"the checkpoint cannot be read: {first_line(error)}",
        where=str(path),
        next=f"other steps there: {', '.join(map(str, others))}" if others else "no other step is saved there: use another checkpoint",
    )


def _named(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _differences(part: str, wanted: dict[str, Any], found: dict[str, jax.ShapeDtypeStruct]) -> list[tuple[str, str, str]]:
    rows = []
    for name in sorted(wanted.keys() | found.keys()):
        here, there = (_said(leaves[name]) if name in leaves else "nothing" for leaves in (wanted, found))
        if here != there:
            rows.append((f"{part}.{name}", here, there))
    return rows


def _said(leaf: Any) -> str:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # as which a key is filed
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _table(rows: list[tuple[str, str, str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
