"""What is wrong with a folder of Hugging Face."""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from llama_eqx.diagnosis.files import check_files, mistaken, read_json
from llama_eqx.diagnosis.report import Finding, Report
from llama_eqx.diagnosis.settings import check_settings
from llama_eqx.diagnosis.vocabulary import check_ends, check_vocabulary, read_vocabulary
from llama_eqx.diagnosis.weights import Filed, check_names, check_numbers
from llama_eqx.errors import CheckpointError
from llama_eqx.interop.huggingface import INDEX, SINGLE, config_from_huggingface
from llama_eqx.model.llama import LlamaConfig

CONFIG = "config.json"
ROWS = 2**24  # numbers that are read at once
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
BITS = {"F32": 23, "F16": 10, "BF16": 7}  # of the fraction
BYTES = {"F32": 4, "BF16": 2, "F16": 2}


def examine_huggingface(folder: pathlib.Path, presets: Mapping[str, LlamaConfig], weights: bool) -> Report:
    findings = check_files(folder)
    facts = []
    tree = read_json(folder / CONFIG, findings)
    config = None
    if tree is None:
        if not (folder / CONFIG).exists():
            findings.append(Finding("error", CONFIG, "there is none: the model's sizes are not known", "download it again"))
    else:
        config = _config(tree, findings)
    tensors = _tensors(folder, findings)
    mean_square = None
    if weights:
        mean_square, wrong = check_numbers(config is not None and config.tied, tensors, CONFIG)
        findings += wrong
    if tensors:
        dtypes = sorted({tensor.dtype for tensor in tensors.values()})
        count = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
        facts.append(f"{count:,} numbers in {len(tensors)} tensors, {' and '.join(dtypes)}" + ("" if weights else ", not read"))
    if tree is not None and config is not None:
        if tensors:
            findings += check_names(config, tensors, CONFIG)
            findings += _check_dtype(tree, tensors)
        said, wrong = check_settings(config, presets, where=CONFIG, mean_square=mean_square)
        facts += said
        findings += wrong
        vocabulary = read_vocabulary(folder, findings)
        size = config.dims.vocab or 0
        facts.append(f"tokenizer: {vocabulary.file}, {vocabulary.size:,} ids" if vocabulary else "no tokenizer beside the weights")
        findings += check_vocabulary(size, vocabulary) if vocabulary else []
        findings += check_ends(folder, tree, size, vocabulary, findings)
    facts.append("the order of rotary pairs cannot be told without a reference: against=OTHER")
    return Report(f"{folder}: a Hugging Face folder", tuple(facts), tuple(findings))


def _config(tree: dict[str, Any], findings: list[Finding]) -> LlamaConfig | None:
    """The config, if it can be read; where it contradicts itself is added to `findings`."""
    old, new = tree.get("rope_scaling"), tree.get("rope_parameters")
    old, new = old if isinstance(old, dict) else {}, new if isinstance(new, dict) else {}
    if "rope_theta" in tree:
        old = {"rope_theta": tree["rope_theta"], **old}
    if new:
        for key in sorted(old.keys() & new.keys()):
            if old[key] != new[key]:
                what = f"{key} is {old[key]!r} by the older keys and {new[key]!r} in rope_parameters: readers differ in which they take"
                findings.append(Finding("error", CONFIG, what, "leave one of them out"))
    if "auto_map" in tree:
        findings.append(Finding("warning", CONFIG, "auto_map names code of its own, which is never run here", "remove auto_map if it is a Llama"))
    try:
        return config_from_huggingface(tree)
    except CheckpointError as error:
        findings += [Finding("error", CONFIG, line) for line in error.what.splitlines()]
    return None


def _tensors(folder: pathlib.Path, findings: list[Finding]) -> dict[str, Filed]:
    """Every tensor of the files that a reader would open; what is wrong with the files is added to `findings`."""
    files = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    weight_map, total = None, None
    if (folder / SINGLE).exists():
        if (folder / INDEX).exists():
            what = f"beside {SINGLE}, which is read instead"
            findings.append(Finding("warning", INDEX, what, "delete the one that is out of date"))
        names = [SINGLE]
    elif (index := read_json(folder / INDEX, findings)) is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            findings.append(Finding("error", INDEX, "weight_map is not a map of names to files", "download it again"))
            weight_map, names = None, files
        else:
            names = sorted(set(weight_map.values()))
        metadata = index.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
    elif files:
        findings.append(Finding("error", INDEX, f"there is none, and so no reader knows of {', '.join(files)}", "download it again"))
        names = files
    else:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
        what = f"weights are pickled ({', '.join(pickles)})" if pickles else "there are no weights here"
        findings.append(Finding("error", SINGLE, what, "convert them to safetensors" if pickles else "download them"))
        return {}
    for name in files:
        if name not in names:
            findings.append(Finding("warning", name, "a shard too many: no tensor is read from it", "delete it, or download the index again"))
    tensors: dict[str, Filed] = {}
    for name in names:
        path = pathlib.Path(os.path.abspath(folder / name))
        if not path.is_relative_to(os.path.abspath(folder)):
            findings.append(Finding("error", INDEX, f"{name} lies outside of the folder", "download it again, from a source you trust"))
        elif not path.is_file():
            findings.append(Finding("error", name, "a missing shard: the index names it", "download it again"))
        elif not mistaken(path):
            tensors |= _opened(path, name, findings)
    if weight_map is not None:
        _check_index(weight_map, total, tensors, findings)
    return tensors


def _opened(path: pathlib.Path, name: str, findings: list[Finding]) -> dict[str, Filed]:
    try:
        with safe_open(path, framework="numpy") as file:
            kinds = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118
            return {
                tensor: Filed(name, tuple(kind.get_shape()), kind.get_dtype(), lambda tensor=tensor: _rows(path, tensor))
                for tensor, kind in kinds.items()
            }
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        what = f"not a complete safetensors file of {size:,} bytes: {error}"
        findings.append(Finding("error", name, what, "download it again"))
        return {}


def _rows(path: pathlib.Path, tensor: str) -> Iterator[np.ndarray]:
    with safe_open(path, framework="numpy") as file:
        kind = file.get_slice(tensor)
        shape = kind.get_shape()
        if not shape:
            yield file.get_tensor(tensor)
            return
        step = max(1, ROWS // max(1, int(np.prod(shape[1:]))))
        for start in range(0, shape[0], step):
            yield kind[start : min(start + step, shape[0])]


def _check_index(weight_map: Mapping[str, str], total: Any, tensors: Mapping[str, Filed], findings: list[Finding]) -> None:
    held = {name: tensor.file for name, tensor in tensors.items()}
    opened = set(held.values())
    lost = [name for name, file in weight_map.items() if file in opened and held.get(name) != file]
    if lost:
        what = f"{len(lost)} tensors are not in the file that it names for them: {', '.join(lost[:5])}"
        findings.append(Finding("error", INDEX, what, "download the index and the shards again, from one revision"))
    if unknown := [name for name in held if name not in weight_map]:
        what = f"{len(unknown)} tensors of the shards are not in it: {', '.join(unknown[:5])}"
        findings.append(Finding("error", INDEX, what, "download the index and the shards again, from one revision"))
    if opened == set(weight_map.values()) and isinstance(total, int):
        size = sum(int(np.prod(tensor.shape)) * BYTES[tensor.dtype] for tensor in tensors.values() if tensor.dtype in BYTES)
        if size != total:
            findings.append(Finding("note", INDEX, f"total_size is {total:,} bytes, and the shards hold {size:,}"))


def _check_dtype(tree: Mapping[str, Any], tensors: Mapping[str, Filed]) -> list[Finding]:
    """transformers reads weights in the dtype that the config names."""
    said = DTYPES.get(str(tree.get("dtype") or tree.get("torch_dtype")).removeprefix("torch."))
    filed = {tensor.dtype for tensor in tensors.values() if tensor.dtype in BITS}
    if said and (finer := [dtype for dtype in filed if BITS[dtype] > BITS[said]]):
        what = f"dtype is {said}, and the weights are {' and '.join(sorted(finer))}: transformers rounds them as it reads"
        return [Finding("warning", CONFIG, what, "name the dtype of the files")]
    return []
