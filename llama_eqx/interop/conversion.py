"""From any format to any other, a tensor at a time."""

import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from llama_eqx.checkpoint.manifest import MANIFEST, appearing, write_manifest
from llama_eqx.checkpoint.native import CONFIG, read_config, write_native
from llama_eqx.config import Config
from llama_eqx.data.chat import template_in
from llama_eqx.data.tokenizer import find_tokenizer
from llama_eqx.data.tokenizer.export import tokenizer_json
from llama_eqx.data.tokenizer.files import is_tiktoken
from llama_eqx.errors import CheckpointError, ConfigError, DataError, StorageError
from llama_eqx.files import json_object, mistaken, write_json
from llama_eqx.interop import huggingface, meta
from llama_eqx.interop.files import CARRIED, ORIGINAL, OWN, TOKENIZER
from llama_eqx.interop.params import config_to_meta
from llama_eqx.interop.pretrained import MARKS, Format, located, manifested, open_pretrained, verified
from llama_eqx.interop.weights import Weights, of_model, parameter_tree, pieces
from llama_eqx.model.llama import Llama, LlamaConfig
from llama_eqx.precision import stored


class ConvertConfig(Config):
    """The folders, and how the new one is written. Without `dtype` the weights stay as they are, bit for bit.

    `shards` is the number of Meta's files; by default, as many as Meta's own model of that size has.
    """

    from_: str | None
    to: str | None
    format: Format | None
    dtype: str | None
    shards: int | None

    def check(self) -> None:
        for key, value, example in (("from", self.from_, "FOLDER"), ("to", self.to, "FOLDER"), ("format", self.format, "hf|meta|native")):
            if value is None:
                raise ConfigError(f"{key} is not given", where=key, next=f"{key}={example}")
        if self.dtype is not None:
            stored(self.dtype)
        if self.shards is not None and self.format != "meta":
            raise ConfigError(f"format={self.format} has no shards to be chosen", where="shards", next="format=meta, or leave shards out")


def convert(config: ConvertConfig, *, replace: bool = False) -> list[str]:
    """Writes the model in the folder `from` as a new folder `to`, and returns a line for each thing that had to be assumed.

    The source is checked against its manifest meanwhile.

    Raises `CheckpointError` for a source that cannot be used or a format that cannot express it, `StorageError` when writing fails; then
    there is nothing at `to`.
    """
    assert config.from_ is not None
    assert config.to is not None
    assert config.format is not None
    dtype = None if config.dtype is None else stored(config.dtype)
    with appearing(pathlib.Path(config.to), replace=replace) as target, verified(config.from_):
        weights = open_pretrained(config.from_)
        notes = [*weights.notes, *_write(weights, target, config.format, dtype, config.shards)]
    if manifested(config.from_) is None:
        notes.append(f"no {MANIFEST} beside the source: had its numbers been damaged, nobody would know")
    if config.format == "hf" and _learned_to_chat(located(config.from_)[0]) and template_in(pathlib.Path(config.to)) is None:
        notes.append(
            "it was trained on conversations, and no chat template came along, without which apply_chat_template fails: copy the "
            f"chat_template.jinja of its first model into {config.to}"
        )
    return notes


def save_pretrained(
    model: Llama, path: str | pathlib.Path, *, format: Format, dtype: DTypeLike | None = None, shards: int | None = None
) -> None:
    """Writes `model` as a folder that `load_pretrained` reads. "hf" loads in `transformers` as it is, "meta" in Meta's own code.

    Raises `CheckpointError` when the format cannot express the model, `ConfigError` for a format or a dtype that is not known,
    `StorageError` when there is something at `path` or it cannot be written.
    """
    if format not in MARKS:
        raise ConfigError(f"no such format: {format}", where="format", next=f"one of: {', '.join(MARKS)}")
    dtype = None if dtype is None else stored(dtype)
    with appearing(pathlib.Path(path)) as folder:
        _write(of_model(model), folder, format, dtype, shards)


def require_expressible(config: LlamaConfig, format: Format) -> None:
    """Raises `CheckpointError` naming the slot when the format cannot express the model."""
    try:
        match format:
            case "hf":
                huggingface.config_to_huggingface(config)
            case "meta":
                config_to_meta(config, meta.default_shards(config))
    except CheckpointError as error:
        raise CheckpointError(error.what, where=error.where, next=error.next or "format=native, which has every model") from None


def _write(weights: Weights, folder: pathlib.Path, format: Format, dtype: np.dtype | None, shards: int | None) -> list[str]:
    """Fills an empty folder, its manifest last. Returns notes."""
    require_expressible(weights.config, format)
    tree = parameter_tree(weights, dtype)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in tree.values())
    if (free := shutil.disk_usage(folder).free) < size:
        raise StorageError(f"{size / 1e9:.1f} GB are to be written, and {free / 1e9:.1f} GB are free", where=str(folder.parent))
    notes: list[str] = []
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"to {format}", disable=None) as bar:
        match format:
            case "hf":
                huggingface.write_huggingface(weights, folder, dtype, bar.update)
            case "meta":
                notes = meta.write_meta(weights, folder, dtype, shards, bar.update)
            case "native":
                notes = _write_native(weights, folder, dtype, tree, bar.update)
    _copy_files(weights, folder, format, notes)
    write_manifest(folder, tree, format=format)
    return notes


def _write_native(
    weights: Weights, folder: pathlib.Path, dtype: np.dtype | None, tree: Mapping[str, Any], advance: Callable[[int], object]
) -> list[str]:
    write, widened = write_native(weights.config, folder, tree), {}
    for (name, layer), tensor in weights.tensors.items():
        kind = tree[name].dtype  # of all layers, which are one array here
        if dtype is None and tensor.dtype != kind:
            widened[name] = f"{name} in {kind}"
        for index in pieces(tensor.shape, max(kind.itemsize, tensor.dtype.itemsize), axis=0):
            x = np.ascontiguousarray(tensor.read(index), kind)
            write(name, index if layer is None else (layer, *index), x)
            advance(x.nbytes)
            del x  # it may be a view of the tensor, and would keep it while the next one is fetched
    return [f"layers of several dtypes are written in one that holds them all: {', '.join(widened.values())}"] if widened else []


def _copy_files(weights: Weights, folder: pathlib.Path, format: Format, notes: list[str]) -> None:
    """Copies the tokenizer's files and the like. A run keeps them in a folder of their own; others look for them beside the weights."""
    for name, file in weights.files.items():
        if file.name not in OWN and (wrong := mistaken(file, "")):  # of a run's own, tokenizer.bytes is empty
            notes.append(f"{name} was left behind: {wrong}")
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
        beside = pathlib.PurePath(name).name
        if format != "native" and beside in CARRIED and beside not in weights.files:
            shutil.copyfile(file, folder / beside)
    if format == "hf":
        _for_transformers(weights.config, folder, notes)


def _learned_to_chat(folder: pathlib.Path) -> bool:
    """Whether the folder is a run directory with conversations among its data."""
    return (folder / CONFIG).is_file() and "data.sft." in str(read_config(folder).get("data"))


def _for_transformers(config: LlamaConfig, folder: pathlib.Path, notes: list[str]) -> None:
    """Writes what `transformers` needs beside the model to read its tokenizer, where it did not come along."""
    model, definition, settings = (folder / name for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"))
    if (model.is_file() or (folder / TOKENIZER).is_dir()) and not definition.exists():
        try:
            found, wrong = tokenizer_json(find_tokenizer(folder)), "its library has none that gives the same ids"
        except DataError as error:
            found, wrong = None, error.what
        if found is None:
            notes.append(f"no tokenizer.json was written, so transformers cannot read this model's tokenizer: {wrong}")
        else:
            definition.write_text(found, encoding="utf-8")
    if definition.is_file() and not settings.exists():  # else transformers knows neither BOS nor what ends a text
        tokens, added = config.tokens, json_object(definition, CheckpointError).get("added_tokens")
        added = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        marks = {"bos_token": tokens.bos, "eos_token": next(iter(tokens.eos), None), "pad_token": tokens.pad}
        said = {mark: token.get("content") for mark, i in marks.items() for token in added if i is not None and token.get("id") == i}
        plain = {"model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context}
        write_json(settings, {**kind, **plain, **said}, indent=2)
    if model.is_file() and is_tiktoken(model.read_bytes()):
        # llama.cpp and others take any tokenizer.model for SentencePiece's. Meta's own repositories keep Llama 3's in this folder too.
        (folder / ORIGINAL).mkdir()
        model.rename(folder / ORIGINAL / model.name)
