"""Weights from and to every format, told apart by what lies in the folder."""

import pathlib
from typing import Literal

from llama_eqx.checkpoint.native import CHECKPOINTS, CONFIG, load_native, save_native
from llama_eqx.errors import CheckpointError, ConfigError
from llama_eqx.interop.huggingface import load_huggingface, save_huggingface
from llama_eqx.model.llama import Llama


def load_pretrained(path: str | pathlib.Path, dtype: str | None = None) -> Llama:
    """The model in a run directory (its newest step), a `checkpoints/<step>` of one, a folder by `save_pretrained` or of Hugging Face.

    Weights are as filed unless `dtype` is given. Raises `CheckpointError` when there is none, or it is damaged or of another kind.
    """
    folder, step = located(path)
    if (folder / "config.json").is_file():
        return load_huggingface(folder, dtype=dtype)
    if (folder / CONFIG).is_file():
        return load_native(folder, dtype=dtype, step=step)
    raise CheckpointError(
        f"no model here: neither {CONFIG} (a run directory) nor config.json (a Hugging Face folder)",
        where=str(path),
        next="the run_dir of a run" if folder.is_dir() else "the folder does not exist: check the path",
    )


def located(path: str | pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """The folder that `path` means, and the step if it is `RUN_DIR/checkpoints/<step>`."""
    path = pathlib.Path(path)
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        return path.parents[1], int(path.name)
    return path, None


def save_pretrained(model: Llama, path: str | pathlib.Path, *, format: Literal["hf", "native"]) -> None:
    """Writes `model` as a folder that `load_pretrained` reads; "hf" loads in `transformers` as it is.

    Raises `CheckpointError` when the format cannot express the model, `ConfigError` for a format that is not known.
    """
    if format not in ("hf", "native"):
        raise ConfigError(f"no such format: {format}", where="format", next="one of: hf, native")
    (save_huggingface if format == "hf" else save_native)(model, pathlib.Path(path))
