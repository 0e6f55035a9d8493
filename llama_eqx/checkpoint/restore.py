"""Reads arrays as they were saved, or lists everything that does not fit."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from llama_eqx.checkpoint.manifest import MANIFEST, find_damage, read_manifest
from llama_eqx.checkpoint.store import Place, children, move
from llama_eqx.crash import crash_point
from llama_eqx.errors import CheckpointError, columns, first_line
from llama_eqx.processes import any_process, of_first, once

IN_FLIGHT = 2**30  # bytes on their way from the disk to devices
NONE_LEFT = "start again from the beginning in another run_dir, or bring a copy of a checkpoint there"


class Damaged(CheckpointError):
    """A checkpoint is not as it was written."""


class Restored(NamedTuple):
    """A checkpoint in memory. `facts` is its manifest."""

    step: int
    model: Any
    training: Any
    facts: dict[str, Any]


def steps(folder: Place) -> list[int]:
    """The steps saved in full in a folder of checkpoints, oldest first. Saves that are under way or broke off are not among them.

    Each step has its own manifest, or the folder above has one for all.
    """
    above = MANIFEST in children(folder.parent)
    return [step for step in numbered(folder) if above or MANIFEST in children(folder / str(step))]


def newest(folder: Place, parts: Mapping[str, PyTree], step: int | None, say: Callable[[str], None]) -> Restored | None:
    """Returns the newest undamaged checkpoint in `folder`, or that of `step`; see `Checkpoints.restore`."""
    present = numbered(folder)
    if step is not None and step not in present:
        raise CheckpointError(
            f"step {step} is not saved", where=str(folder), next=f"saved steps: {', '.join(map(str, steps(folder))) or 'none'}"
        )
    lost: list[str] = []
    candidates = present if step is None else [step]
    for i in range(of_first(len(candidates)) - 1, -1, -1):
        path = folder / str(of_first(candidates[i] if i < len(candidates) else -1))
        facts, damage = {}, ""
        try:
            facts = manifest_of(path)
            compare(path, facts["tree"], parts)
            crash_point("restore")
            verified(path, (jax.process_index(), jax.process_count()), facts)
        except Damaged as error:
            damage = error.what
        if not any_process(bool(damage)):
            found = read(path, parts)
            once(functools.partial(set_aside, *(folder / str(later) for later in candidates[i + 1 :])))
            for line in lost:
                say(f"warning: {line}; step {path.name} is used")
            return Restored(int(path.name), found["model"], found["training"], facts)
        lost.append(f"step {path.name} is damaged: {damage or 'see the other processes'}")
    if not lost:
        return None
    raise CheckpointError("\n".join(["every checkpoint is damaged", *lost]), where=str(folder), next=NONE_LEFT)


def set_aside(*paths: Place) -> None:
    """Renames damaged checkpoints to `<step>.damaged`, so that their steps can be saved again."""
    for path in paths:
        aside = path.with_name(f"{path.name}.damaged")
        move(path, aside)


def manifest_of(path: Place) -> dict[str, Any]:
    """Returns the manifest of the checkpoint at `path`. Raises `Damaged` when none can be read."""
    try:
        return read_manifest(path)
    except CheckpointError as error:
        raise Damaged(f"{MANIFEST}: {error.what}" if MANIFEST in children(path) else f"{MANIFEST}: missing", where=str(path)) from error


def metrics_of(path: Place) -> dict[str, float]:
    """The metrics saved with the checkpoint at `path`; empty when its manifest cannot be read."""
    try:
        return manifest_of(path).get("metrics", {})
    except Damaged:
        return {}


def verified(path: Place, part: tuple[int, int] = (0, 1), facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the manifest of the checkpoint at `path`, once its files (of `part`) match it. Raises `Damaged` naming those that do not."""
    facts = manifest_of(path) if facts is None else facts
    if lines := find_damage(path, part).lines():
        raise Damaged("\n".join(lines), where=str(path))
    return facts


def filed(path: Place, part: str) -> dict[str, jax.ShapeDtypeStruct]:
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


def read(path: Place, parts: Mapping[str, PyTree], *, dtype: DTypeLike | None = None) -> dict[str, Any]:
    """Returns the parts of the checkpoint at `path`, bit for bit, in the structure and shardings of the given abstract trees.

    With `dtype`, every array is cast to it while it is read, so that memory never holds both.

    Raises `CheckpointError` listing every array that is missing, left over, or of another shape or dtype.
    """
    check(path, parts)
    if dtype is not None:
        parts = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), dict(parts))
    try:
        with _few_at_a_time(path, parts):
            return ocp.load_checkpointables(str(path), dict(parts))
    except Exception as error:
        raise unreadable(path, error) from error


def _few_at_a_time(path: Place, parts: Mapping[str, PyTree]) -> ocp.Context:
    """Limits the host memory of arrays on their way from the disk to devices to `IN_FLIGHT` bytes at once, or one larger array."""
    found = ocp.checkpointables_metadata(str(path)).metadata
    sizes = [IN_FLIGHT]
    for leaf in jax.tree.leaves([found[part] for part in parts]):
        chunk = leaf.storage_metadata.chunk_shape  # whole chunks are read
        sizes.append(math.prod(-(-n // size) * size for n, size in zip(leaf.shape, chunk, strict=True)) * leaf.dtype.itemsize)
    context = ocp.Context()
    context.memory.read_concurrent_bytes = max(sizes) + 1
    return context


def check(path: Place, parts: Mapping[str, PyTree]) -> None:
    """Raises `CheckpointError` listing every array in the checkpoint that is missing, left over, or of another shape or dtype."""
    # Orbax would silently cast a different dtype.
    found = {f"{part}.{name}": _said(leaf) for part in parts for name, leaf in filed(path, part).items()}
    _compare(path, parts, found)


def compare(path: Place, tree: Mapping[str, Any], parts: Mapping[str, PyTree]) -> None:
    """The same as `check`, with the tree in a manifest."""
    _compare(path, parts, {name: f"{leaf['dtype']}[{','.join(map(str, leaf['shape']))}]" for name, leaf in tree.items()})


def described(parts: Mapping[str, PyTree]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array as it is saved, by part and name, for a manifest."""
    return {f"{part}.{name}": _filed_as(leaf) for part, tree in parts.items() for name, leaf in _named(tree).items()}


def _compare(path: Place, parts: Mapping[str, PyTree], found: Mapping[str, str]) -> None:
    wanted = {name: _said(leaf) for name, leaf in described(parts).items()}
    pairs = [(name, wanted.get(name, "nothing"), found.get(name, "nothing")) for name in sorted(wanted.keys() | found.keys())]
    if rows := [row for row in pairs if row[1] != row[2]]:
        raise CheckpointError(
            "\n".join(["the checkpoint belongs to another model or optimizer", *columns([("name", "expected", "found"), *rows])]),
            where=str(path),
            kept="the checkpoint is untouched",
            next="use the config.yaml beside the checkpoints, or start a new run directory",
        )


def unreadable(path: Place, error: Exception) -> CheckpointError:
    """An error for the user: of Orbax's hundreds of lines, only the first."""
    others = [step for step in steps(path.parent) if str(step) != path.name]
    return CheckpointError(
        f"the checkpoint cannot be read: {first_line(error)}",
        where=str(path),
        next=f"other steps there: {', '.join(map(str, others))}" if others else "no other step is saved there: use another checkpoint",
    )


def _named(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def numbered(folder: Place) -> list[int]:
    """The steps that have a folder, saved in full or not, oldest first."""
    return sorted(int(name) for name in children(folder) if name.isdecimal())


def _filed_as(leaf: Any) -> jax.ShapeDtypeStruct:
    """A key is saved as its data."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _said(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
