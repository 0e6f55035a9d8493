"""From a path to a report, whatever lies there."""

import dataclasses
import pathlib

from llama_eqx.checkpoint.native import CHECKPOINTS, CONFIG
from llama_eqx.diagnosis.dataset import examine_dataset
from llama_eqx.diagnosis.files import check_manifest
from llama_eqx.diagnosis.huggingface import examine_huggingface
from llama_eqx.diagnosis.opened import examine_meta, examine_native
from llama_eqx.diagnosis.report import Report
from llama_eqx.diagnosis.settings import Published
from llama_eqx.errors import CheckpointError
from llama_eqx.interop.meta import PARAMS
from llama_eqx.interop.pretrained import located, manifested


def examine(path: str, published: Published, *, weights: bool) -> Report:
    """Reports what is wrong with the model or dataset at `path`, which is never in memory as a whole.

    `published` gives the models to compare its settings with.

    Raises `CheckpointError` when there is nothing to examine.
    """
    folder, _ = located(path)
    if not folder.is_dir():
        raise CheckpointError("a file, not a folder" if folder.exists() else "the folder does not exist", where=path, next="check the path")
    names = {file.name for file in folder.iterdir()}
    if {CONFIG, CHECKPOINTS} & names:
        report = examine_native(pathlib.Path(path), published, weights)
    elif "config.json" in names or any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        report = examine_huggingface(folder, published, weights)
    elif PARAMS in names or any(name.startswith("consolidated.") for name in names):
        report = examine_meta(folder, published, weights)
    elif "index.json" in names:
        return examine_dataset(folder, weights)
    else:
        raise CheckpointError(
            f"neither a model nor a dataset: no config.json, {PARAMS}, {CONFIG} or index.json",
            where=path,
            next="a folder of Hugging Face or Meta, the run_dir of a run, or a folder of token shards",
        )
    if not weights:
        return report
    listed = manifested(path) or folder  # for a run, the folder of its step
    return dataclasses.replace(report, findings=(*report.findings, *check_manifest(listed, folder)))
