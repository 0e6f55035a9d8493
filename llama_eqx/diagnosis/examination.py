"""From a path to a report, whatever lies there."""

import pathlib
from collections.abc import Mapping

from llama_eqx.checkpoint.native import CHECKPOINTS, CONFIG
from llama_eqx.diagnosis.dataset import examine_dataset
from llama_eqx.diagnosis.huggingface import examine_huggingface
from llama_eqx.diagnosis.native import examine_native
from llama_eqx.diagnosis.report import Report
from llama_eqx.errors import CheckpointError
from llama_eqx.interop.pretrained import located
from llama_eqx.model.llama import LlamaConfig


def examine(path: str, presets: Mapping[str, LlamaConfig], *, weights: bool) -> Report:
    """What is wrong with the model or dataset at `path`, which is never in memory as a whole.

    `presets` are the published models to hold its settings against. Raises `CheckpointError` when there is nothing to examine.
    """
    folder, step = located(path)
    if not folder.is_dir():
        raise CheckpointError("a file, not a folder" if folder.exists() else "the folder does not exist", where=path, next="check the path")
    names = {file.name for file in folder.iterdir()}
    if {CONFIG, CHECKPOINTS} & names:
        return examine_native(folder, step, presets, weights)
    if "config.json" in names or any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return examine_huggingface(folder, presets, weights)
    if "index.json" in names:
        return examine_dataset(folder, weights)
    raise CheckpointError(
        f"neither a model nor a dataset: no config.json, {CONFIG}, params.json or index.json",
        where=path,
        next="a Hugging Face or Meta folder, the run_dir of a run, or a folder of token shards",
    )
