"""The weights alone, in a run directory or in a folder of the same layout that holds nothing else."""

import functools
import math
import os
import pathlib
import shlex
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
import tensorstore
import yaml
from jax.typing import DTypeLike
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from llama_eqx.checkpoint import restore
from llama_eqx.checkpoint.manifest import appearing, write_manifest
from llama_eqx.checkpoint.save import uncompressed
from llama_eqx.checkpoint.store import Place, content
from llama_eqx.config import dump, load, read_yaml
from llama_eqx.errors import CheckpointError, ConfigError
from llama_eqx.files import write
from llama_eqx.model.llama import Llama, LlamaConfig
from llama_eqx.sharding import parameter_names

CONFIG, TOKENIZER, CHECKPOINTS = "config.yaml", "tokenizer", "checkpoints"
SECTIONS = ("model", "data", "train", "schedule", "guard", "tracking")  # that are read as plain containers
MEND = "bring back a copy of this file; once it is removed, the command that trains the run writes it anew"
CHUNK_BYTES = 64 * 2**20


class Array(NamedTuple):
    """An array in a checkpoint, not read yet. `read(index)` returns a part of it; `index` has one slice per axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]


def save_native(model: Llama, path: str | os.PathLike[str], tokenizer_folder: str | os.PathLike[str] | None = None) -> None:
    """Writes `config.yaml` (only its `model`), `checkpoints/0/model` and, if given, `tokenizer/`: all of it or nothing. One process only.

    Raises `CheckpointError` when the model's parameters are not those of its config, `StorageError` when `path` exists or cannot be
    written.
    """
    arrays, wanted = (dict(zip(parameter_names(m), jax.tree.leaves(m), strict=True)) for m in (model, _abstract(model.config)))
    if {name: array.shape for name, array in arrays.items()} != {name: array.shape for name, array in wanted.items()}:
        what = "the parameters are not those of the model's config: it was edited, wrapped or laid out for decoding"
        raise CheckpointError(what, where="model", next="save the model that it was made from")
    with appearing(pathlib.Path(path)) as folder:
        write = write_native(model.config, folder, arrays)
        for name, array in arrays.items():
            for i in range(array.shape[0]) if name.startswith("blocks.") else [slice(None)]:
                write(name, (i,), np.asarray(array[i]))
        if tokenizer_folder is not None:
            shutil.copytree(tokenizer_folder, folder / TOKENIZER)
        write_manifest(folder, arrays)


def write_native(config: LlamaConfig, folder: pathlib.Path, arrays: Mapping[str, Any]) -> Callable[[str, tuple, np.ndarray], None]:
    """Makes a folder that holds only a model. Returns a function `write(name, index, values)` that fills the arrays described by `arrays`,
    part by part.

    A layer is a chunk of its own, or several of about 64 MB, so it is written and read without the others.
    """
    write_config({"model": config}, folder)
    checkpoint = folder / CHECKPOINTS / "0"
    # Orbax cannot write an array part by part. It writes the frame, with arrays of one number, which full ones then replace.
    model = _abstract(config)
    frame = jax.tree.unflatten(
        jax.tree.structure(model), [np.zeros((1,) * len(arrays[name].shape), arrays[name].dtype) for name in parameter_names(model)]
    )
    with uncompressed():
        ocp.save_checkpointables(str(checkpoint), {"model": frame})
    stores = {name: _create(checkpoint, name, leaf) for name, leaf in arrays.items()}

    def write(name: str, index: tuple[int | slice, ...], values: np.ndarray) -> None:
        stores[name][index].write(values).result()

    return write


def open_native(path: str | os.PathLike[str], step: int | None = None) -> tuple[LlamaConfig, dict[str, Array]]:
    """Returns the config and, by name, the arrays of the model in a run directory or a folder by `save_native`; see `load_native`."""
    config, checkpoint, model = _opened(pathlib.Path(path).resolve(), step)
    leaves = dict(zip(parameter_names(model), jax.tree.leaves(model), strict=True))
    restore.check(checkpoint, {"model": model})
    held: dict[str, np.ndarray] = {}
    return config, {name: Array(leaf.shape, np.dtype(leaf.dtype), _reader(checkpoint, name, held)) for name, leaf in leaves.items()}


def load_native(
    path: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    step: int | None = None,
    shardings: PyTree | None = None,
) -> Llama:
    """Returns the model of a run directory or of a folder by `save_native`, at the newest step unless `step` is given.

    Weights keep the dtype they were saved in unless `dtype` is given. `shardings` is one `jax.sharding.Sharding` for all arrays, or a tree
    of them in the model's structure. Without it everything goes to the first device.

    Raises `CheckpointError` when nothing is there, it is damaged, or its weights do not fit its config.
    """
    _, checkpoint, model = _opened(pathlib.Path(path).resolve(), step)
    places = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if shardings is None else shardings
    as_filed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), model, jax.tree.broadcast(places, model)
    )
    return restore.read(checkpoint, {"model": as_filed}, dtype=dtype)["model"]


def _opened(path: pathlib.Path, step: int | None) -> tuple[LlamaConfig, pathlib.Path, Any]:
    """The config, the checkpoint, and the config's model with the checkpoint's dtypes but without its arrays."""
    config = _model_config(path)
    saved = restore.steps(path / CHECKPOINTS)
    if not saved:
        what, advice = "no checkpoint has been saved yet", "let the run reach its first save: see checkpoint.every"
        if bundles := list((path / "replay").glob("step-*.json")):  # of a run that ended because its numbers were not finite
            newest = max(bundles, key=lambda file: file.stat().st_mtime)
            advice = f"python -m llama_eqx.replay bundle={shlex.quote(str(newest))} shows where its numbers ceased to be finite"
        if found := [str(each) for each in restore.numbered(path / CHECKPOINTS)]:
            what, advice = (
                f"no manifest shows that the save of checkpoint {' or '.join(found)} was completed",
                "copy the folder again, with its manifest.json",
            )
        raise CheckpointError(what, where=str(path / CHECKPOINTS), next=advice)
    if step is not None and step not in saved:
        raise CheckpointError(f"step {step} is not saved", where=str(path), next=f"saved steps: {', '.join(map(str, saved))}")
    checkpoint = path / CHECKPOINTS / str(saved[-1] if step is None else step)
    try:
        model = _abstract(config)
    except ConfigError as error:
        raise _config_error(path, error) from error
    found = restore.filed(checkpoint, "model")
    leaves: list[Any]
    leaves, structure = jax.tree.flatten(model)
    filed = [found[name].dtype if name in found else leaf.dtype for name, leaf in zip(parameter_names(model), leaves, strict=True)]
    model = structure.unflatten([jax.ShapeDtypeStruct(leaf.shape, kind) for leaf, kind in zip(leaves, filed, strict=True)])
    return config, checkpoint, model


def _abstract(config: LlamaConfig) -> Llama:
    return eqx.filter_eval_shape(lambda key: config.build(key=key), jax.eval_shape(lambda: jax.random.key(0)))


def _spec(checkpoint: pathlib.Path, name: str) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{checkpoint}/model/"}, "path": f"{name}/"},
    }


def _create(checkpoint: pathlib.Path, name: str, leaf: Any) -> Any:
    chunk, itemsize = list(leaf.shape), np.dtype(leaf.dtype).itemsize
    for axis in range(len(chunk)):  # from the slowest axis on
        rest = math.prod(chunk[axis + 1 :]) * itemsize
        chunk[axis] = max(min(chunk[axis], CHUNK_BYTES // rest), 1) if axis or not name.startswith("blocks.") else 1
    metadata = {
        "shape": list(leaf.shape),
        "data_type": np.dtype(leaf.dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
    # TensorStore would leave out chunks of zeros, and Orbax would take them for lost.
    spec = {**_spec(checkpoint, name), "metadata": metadata, "store_data_equal_to_fill_value": True}
    return tensorstore.open(spec, create=True, delete_existing=True).result()


def _reader(checkpoint: pathlib.Path, name: str, held: dict[str, np.ndarray]) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """`held` keeps the last array read if all its layers are in one chunk, as a run saves them."""

    @functools.cache
    def store() -> Any:  # tensorstore's own annotations allow for None nearly everywhere
        return tensorstore.open(_spec(checkpoint, name), open=True).result()

    def read(index: tuple[slice, ...]) -> np.ndarray:
        try:
            if store().chunk_layout.read_chunk.shape[0] == 1 or not name.startswith("blocks."):
                return store()[index].read().result()
            if name not in held:
                held.clear()
                held[name] = store().read().result()
        except ValueError as error:
            raise restore.unreadable(checkpoint, error) from error
        return held[name][index]

    return read


def write_config(config: Any, folder: pathlib.Path) -> None:
    """Writes `config.yaml` of a run directory: a tree of configs with every value explicit, each config with its `_target_`."""
    write(folder / CONFIG, yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True).encode())


def read_config(folder: Place) -> dict[str, Any]:
    """Returns the plain tree in `config.yaml`. It is data: nothing in it is resolved or called.

    Raises `CheckpointError` when it is missing, is not YAML, or holds an interpolation, which could read the environment.
    """
    path = folder / CONFIG
    try:
        tree = read_yaml(content(folder, CONFIG).decode())
    except OSError as error:
        raise CheckpointError(
            f"this is not a run directory: it has no {CONFIG}" if folder.is_dir() else "there is no such folder",
            where=str(folder),
            next="give the directory of a run (outputs/<date>/<time>) or a folder written by `python -m llama_eqx.convert`",
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{CONFIG} is not YAML as this package writes it: {error}", where=str(path), next=MEND) from error
    if "${" in str(tree):
        raise CheckpointError(
            f"{CONFIG} holds an interpolation (${{…}}), and a checkpoint's config is never resolved",
            where=str(path),
            next="write the value itself in its place, if you trust where the folder came from",
        )
    sections = {f"{name} in {CONFIG}": tree.get(name, {}) for name in SECTIONS} if isinstance(tree, dict) else {}
    for name, section in {CONFIG: tree, **sections}.items():
        if not isinstance(section, dict):
            raise CheckpointError(f"{name} is not a mapping", where=str(path), next=MEND)
    return tree


def configured(folder: pathlib.Path, tree: Mapping[str, Any], *keys: str) -> Any:
    """The config that a `config.yaml` has at these keys. Raises `CheckpointError` naming the place at which it does not build."""
    for key in keys:
        tree = tree.get(key) or {}
    try:
        return load(tree, ".".join(keys))
    except ConfigError as error:
        raise _config_error(folder, error) from error


def _model_config(path: pathlib.Path) -> LlamaConfig:
    config = configured(path, read_config(path), "model")
    if not isinstance(config, LlamaConfig):
        raise CheckpointError(f"{CONFIG} describes no Llama under the key `model`", where=str(path / CONFIG), next=MEND)
    return config


def _config_error(path: pathlib.Path, error: ConfigError) -> CheckpointError:
    return CheckpointError(f"{CONFIG} does not build: {error.what}", where=f"{path / CONFIG}: {error.where}", next=error.next or MEND)
