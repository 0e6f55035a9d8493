"""The weights alone: from a run directory, or from a folder of the same shape that holds nothing else."""

import os
import pathlib
import shutil
from typing import Any

import equinox as eqx
import jax
import yaml
from jax.typing import DTypeLike
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from llama_eqx.checkpoint import restore
from llama_eqx.checkpoint.save import uncompressed
from llama_eqx.config import dump, load
from llama_eqx.errors import CheckpointError, ConfigError, StorageError
from llama_eqx.model.llama import Llama, LlamaConfig

CONFIG, TOKENIZER, CHECKPOINTS = "config.yaml", "tokenizer", "checkpoints"


def save_native(model: Llama, path: str | os.PathLike[str], tokenizer_folder: str | os.PathLike[str] | None = None) -> None:
    """Writes `config.yaml` (its `model` alone), `checkpoints/0/model` and, if given, `tokenizer/`: all of it or nothing. One process only.

    Raises `StorageError` when `path` exists or cannot be written.
    """
    path = pathlib.Path(path).resolve()
    if path.exists():
        raise StorageError(
            "the folder exists already", where=str(path), kept="what is in it", next="name another folder, or remove this one"
        )
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_config({"model": model.config}, unfinished)
        if tokenizer_folder is not None:
            shutil.copytree(tokenizer_folder, unfinished / TOKENIZER)
        with uncompressed():
            ocp.save_checkpointables(str(unfinished / CHECKPOINTS / "0"), {"model": model})
        unfinished.rename(path)
    except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors
        shutil.rmtree(unfinished, ignore_errors=True)
        raise StorageError(
            f"the model could not be saved: {restore.first_line(error)}",
            where=str(path),
            kept="nothing of it",
            next="free some space or mend the permissions there, or name another folder",
        ) from error


def load_native(
    path: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    step: int | None = None,
    shardings: PyTree | None = None,
) -> Llama:
    """The model of a run directory or of a folder by `save_native`; of the newest step unless `step` names one.

    Weights have the dtype they were filed in unless `dtype` is given. `shardings` is one `jax.sharding.Sharding` for all arrays, or a
    tree of them in the model's structure; without it everything goes to the first device.

    Raises `CheckpointError` when nothing is there, it is damaged, or its weights do not fit its config.
    """
    path = pathlib.Path(path).resolve()
    config = _model_config(path)
    saved = restore.steps(path / CHECKPOINTS)
    if not saved:
        raise CheckpointError(
            "no checkpoint has been saved yet", where=str(path / CHECKPOINTS), next="let the run reach its first save: see checkpoint.every"
        )
    if step is not None and step not in saved:
        raise CheckpointError(f"step {step} is not saved", where=str(path), next=f"saved steps: {', '.join(map(str, saved))}")
    checkpoint = path / CHECKPOINTS / str(saved[-1] if step is None else step)

    try:
        model = eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0))
    except ConfigError as error:
        raise _config_error(path, error) from error
    found = restore.filed(checkpoint, "model")
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def abstract(place: Any, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        there = found.get(jax.tree_util.keystr(place, simple=True, separator="."), leaf)
        return jax.ShapeDtypeStruct(leaf.shape, there.dtype, sharding=sharding)

    as_filed = jax.tree_util.tree_map_with_path(abstract, model, jax.tree.broadcast(shardings, model))
    return restore.read(checkpoint, {"model": as_filed}, dtype=dtype)["model"]


def write_config(config: Any, folder: pathlib.Path) -> None:
    """`config.yaml` of a run directory: a tree of configs with every value said, each with its `_target_`."""
    unfinished = folder / f".{CONFIG}.unfinished"
    unfinished.write_text(yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    unfinished.replace(folder / CONFIG)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The plain tree in `config.yaml`: data, of which nothing is resolved or called.

    Raises `CheckpointError` when it is missing, is no YAML, or holds an interpolation, which could read the environment.
    """
    path = folder / CONFIG
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"this is no run directory: it has no {CONFIG}" if folder.is_dir() else "there is no such folder",
            where=str(folder),
            next="give the directory of a run (outputs/<date>/<time>) or a folder written by `python -m llama_eqx.convert`",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{CONFIG} is not YAML: {restore.first_line(error)}", where=str(path)) from error
    if "${" in str(tree):
        raise CheckpointError(
            f"{CONFIG} holds an interpolation (${{…}}), and a checkpoint's config is never resolved",
            where=str(path),
            next="write the value itself in its place, if you trust where the folder came from",
        )
    if not isinstance(tree, dict):
        raise CheckpointError(f"{CONFIG} is not a mapping", where=str(path))
    return tree


def _model_config(path: pathlib.Path) -> LlamaConfig:
    tree = read_config(path)
    try:
        config = load(tree.get("model"), "model")
    except ConfigError as error:
        raise _config_error(path, error) from error
    if not isinstance(config, LlamaConfig):
        raise CheckpointError(f"{CONFIG} describes no Llama under the key `model`", where=str(path))
    return config


def _config_error(path: pathlib.Path, error: ConfigError) -> CheckpointError:
    return CheckpointError(f"{CONFIG} does not build: {error.what}", where=f"{path / CONFIG}: {error.where}", next=error.next)
