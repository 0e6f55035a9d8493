"""Weights from and to every format, told apart by what lies in the folder."""

import pathlib
from typing import Literal

from llama_eqx.checkpoint.native import load_native, save_native
from llama_eqx.errors import CheckpointError, ConfigError
from llama_eqx.interop.huggingface import load_huggingface, save_huggingface
from llama_eqx.model.llama import Llama


def load_pretrained(path: str | pathlib.Path, dtype: str | None = None) -> Llama:
    """The model in a run directory, a folder by `save_pretrained`, or a Hugging Face folder; weights as filed unless `dtype` is given.

    Raises `CheckpointError` when there is none, or it is damaged or of another kind of model.
    """
    path = pathlib.Path(path)
    if (path / "config.json").is_file():
        return load_huggingface(path, dtype=dtype)
    if (path / "config.yaml").is_file():
        return load_native(path, dtype=dtype)
    raise CheckpointError(
        "no model here: neither config.yaml (a run directory) nor config.json (a Hugging Face folder)",
        where=str(path),
        next="checkpoint=FOLDER that a run printed as its run_dir" if path.is_dir() else "the folder does not exist: check the path",
    )


def save_pretrained(model: Llama, path: str | pathlib.Path, *, format: Literal["hf", "native"]) -> None:
    """Writes `model` as a folder that `load_pretrained` reads; "hf" loads in `transformers` as it is.

    Raises `CheckpointError` when the format cannot express the model, `ConfigError` for a format that is not known.
    """
    if format not in ("hf", "native"):
        raise ConfigError(f"no such format: {format}", where="format", next="one of: hf, native")
    (save_huggingface if format == "hf" else save_native)(model, pathlib.Path(path))
