"""Meta's Llama folders: `params.json` and a `consolidated.NN.pth` for each part of the model. Needs torch."""

import dataclasses
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_eqx.errors import CheckpointError
from llama_eqx.files import json_object, mistaken, write_json
from llama_eqx.interop.files import carried, inside, refuse_code
from llama_eqx.interop.huggingface import GENERATION
from llama_eqx.interop.params import PARAMS, check_vocab, config_from_meta, config_to_meta, losses, rotary_from_meta
from llama_eqx.interop.table import TABLE, from_torch, halves_to_pairs, pairs_to_halves, torch_shape
from llama_eqx.interop.weights import Index, Key, Tensor, Weights, pieces, require_tensors, rows_of, tensor_axes, tensor_shapes
from llama_eqx.model.llama import LlamaConfig

EMBED, HEAD = TABLE["embed"].meta, TABLE["lm_head"].meta
# The number of files into which Meta splits a model of this width and depth; others are one file.
SHARDS = {(5120, 40): 2, (6656, 60): 4, (8192, 48): 4, (8192, 80): 8, (16384, 126): 8}
SAFE_TORCH = (2, 10)  # before it, `weights_only=True` could be bypassed (CVE-2025-32434, CVE-2026-24747)

Shard = Mapping[str, np.ndarray]


def read_meta(folder: pathlib.Path) -> Weights:
    """The Llama in a folder of Meta's, in one file or several. Tensors are mapped, not read.

    Files are unpickled with `weights_only=True`, which calls nothing that they name. Key and value heads repeated in several files, as in
    the 405B's sixteen, are recognised by being equal, and so is a tied table.

    Raises `CheckpointError` when the folder is not a complete Llama that this package can express; all differences are listed.
    """
    refuse_code(folder)
    params = json_object(inside(folder, PARAMS), CheckpointError)
    shards = [_load(file) for file in _files(folder)]
    copies = _copies(shards, params.get("n_kv_heads"))
    files, generation, unread = carried(folder), {}, []
    if GENERATION in files:
        try:
            generation = json_object(files[GENERATION], CheckpointError)
        except CheckpointError as error:
            unread = [f"{GENERATION} was left behind: {error.what}"]
            del files[GENERATION]
    config, notes = config_from_meta(params, _vocab(shards, params), copies, generation)
    if copies > 1:
        notes.append(f"each key and value head stands in {copies} files: the model has {config.dims.kv_heads}, not {params['n_kv_heads']}")
    embed_axis = "vocab" if _rows_are_split(shards, config.dims.embed) else "embed"
    tensors = _tensors(config, shards, embed_axis, copies, where=str(folder))
    notes += check_vocab(params, config.dims.vocab or 0)
    if _is_tied(tensors):
        if tensors.pop(("lm_head", None), None) is not None:
            notes.append(f"{HEAD} equals {EMBED}, so one tied table is taken")
        config = dataclasses.replace(config, tied=True)
    rotary, said = rotary_from_meta(params, config)
    return Weights(dataclasses.replace(config, rotary=rotary), tensors, files, (*unread, *notes, *said))


def write_meta(
    weights: Weights,
    folder: pathlib.Path,
    dtype: np.dtype | None,
    shards: int | None = None,
    advance: Callable[[int], object] = lambda size: None,
) -> list[str]:
    """Writes `params.json` and `consolidated.NN.pth` into an empty folder: by default, as many as Meta's model of that size has.

    While a file is written, it takes twice its size on the disk. `advance` is called with the bytes of each piece written. Returns notes
    on what the format cannot say.

    Raises `CheckpointError` naming the slot when Meta's Llama has no such model, or the sizes that do not divide over the files.
    """
    config, torch = weights.config, _torch()
    count = default_shards(config) if shards is None else shards
    write_json(folder / PARAMS, config_to_meta(config, count), indent=2)
    tensors = dict(weights.tensors)
    if config.tied:  # Meta's code has no tied table: it reads both
        embed = tensors["embed", None]
        tensors["lm_head", None] = Tensor(embed.shape[::-1], embed.dtype, lambda index: embed.read(index[::-1]).T)
    axes = tensor_axes(dataclasses.replace(config, tied=False))
    for rank in range(count):
        state, begin = {}, 0
        with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as scratch:
            file = pathlib.Path(scratch, "weights")
            with file.open("wb") as stream:
                for key, tensor in tensors.items():
                    entry, kind = TABLE[key[0]], tensor.dtype if dtype is None else dtype
                    part = _part(tensor, axes[key], _split(key[0], config), rank, count)
                    if entry.pairs:
                        part = _mapped(part, halves_to_pairs)
                    for rows in rows_of(part, entry.inputs, kind):
                        stream.write(rows.data)
                        advance(rows.nbytes)
                    state[entry.meta.format(layer=key[1])] = (kind, torch_shape(part.shape, entry.inputs), begin)
                    begin = stream.tell()
            filed = {name: np.memmap(file, kind, "c", offset, shape) for name, (kind, shape, offset) in state.items()}
            torch.save({name: _as_torch(x) for name, x in filed.items()}, folder / f"consolidated.{rank:02d}.pth")
            del filed
    return losses(config)


def default_shards(config: LlamaConfig) -> int:
    return SHARDS.get((config.dims.embed, config.dims.layers), 1)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    found = sorted(path.name for path in folder.glob("consolidated*.pth"))
    wanted = [f"consolidated.{i:02d}.pth" for i in range(max(len(found), 1))]
    if found != wanted:
        lines = [f"missing: {name}" for name in wanted if name not in found] + [
            f"unexpected: {name}" for name in found if name not in wanted
        ]
        raise CheckpointError("\n".join(lines), where=str(folder), next="the files are numbered from consolidated.00.pth on, without gaps")
    return [inside(folder, name) for name in found]


def _load(file: pathlib.Path) -> Shard:
    """The tensors of a file by name, as views of it."""
    torch = _torch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's other remarks on a strange file
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has no error class for this
        raise CheckpointError(mistaken(file, _refusal(str(error))), where=str(file), kept="nothing in it was run") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"holds a {type(state).__name__}, not tensors by name", where=str(file))
    kinds = {torch.float32: None, torch.bfloat16: jnp.bfloat16, torch.float16: None}
    strange = [
        f"{name} is {x.dtype if isinstance(x, torch.Tensor) else type(x).__name__}"
        for name, x in state.items()
        if not (
            type(name) is str and isinstance(x, torch.Tensor) and x.dtype in kinds and x.layout == torch.strided and x.device.type == "cpu"
        )
    ]
    if strange:
        raise CheckpointError("\n".join(strange), where=str(file), next="readable are tensors of float32, bfloat16 and float16")
    return {
        name: x.detach().view(torch.int16).numpy().view(jnp.bfloat16) if x.dtype == torch.bfloat16 else x.detach().numpy()
        for name, x in state.items()
    }


def _refusal(error: str) -> str:
    if "mmap can only be used" in error:
        return "not a file that torch has written since its version 1.6"
    if match := re.search(
        r"(?:Unsupported global: GLOBAL|Trying to (?:load|call reduce for)[^`\w]*(?:unsupported GLOBAL)?) ?([\w.]+)", error
    ):
        return f"a pickle that would call {match[1]}: not weights alone, and refused"
    if "weights_only" in error.lower() or "WeightsUnpickler" in error:
        return "a pickle that holds more than weights, and is refused"
    return f"not a complete file of torch: {error.splitlines()[0].split('. ')[0] if error else 'it cannot be read'}"


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise CheckpointError("Meta's files need torch to be read or written", next="pip install torch") from None
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < SAFE_TORCH:
        raise CheckpointError(
            f"torch {torch.__version__} can be made to run what a file of weights holds",
            next=f"torch {'.'.join(map(str, SAFE_TORCH))} or newer",
        )
    return torch


def _as_torch(x: np.ndarray) -> Any:
    torch = _torch()
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == jnp.bfloat16 else torch.from_numpy(x)


def _rows_are_split(shards: list[Shard], embed: object) -> bool:
    """Whether the table of embeddings is split by rows, as since Llama 3, and not by columns."""
    return len(shards) > 1 and EMBED in shards[0] and shards[0][EMBED].shape[-1] == embed


def _vocab(shards: list[Shard], params: Mapping[str, Any]) -> int:
    if EMBED not in shards[0] or shards[0][EMBED].ndim != 2:
        raise CheckpointError(f"no table of embeddings: {EMBED}", where="consolidated.00.pth")
    rows = shards[0][EMBED].shape[0]
    return rows * len(shards) if _rows_are_split(shards, params.get("dim", 0)) else rows


def _copies(shards: list[Shard], kv_heads: object) -> int:
    """How many consecutive files hold the same key and value head."""
    names = [TABLE[f"blocks.attention.{name}"].meta.format(layer=0) for name in ("k_proj", "v_proj")]
    if len(shards) != kv_heads or not all(name in shard for shard in shards for name in names):
        return 1

    def equal(copies: int) -> bool:
        groups = [shards[i : i + copies] for i in range(0, len(shards), copies)]
        return all(np.array_equal(group[0][name], other[name]) for name in names for group in groups for other in group[1:])

    return next((copies for copies in range(len(shards), 1, -1) if len(shards) % copies == 0 and equal(copies)), 1)


def _tensors(config: LlamaConfig, shards: list[Shard], embed_axis: str, copies: int, where: str) -> dict[Key, Tensor]:
    """Every tensor, joined from its parts in the files. Raises `CheckpointError` listing all that is missing or does not fit."""
    tensors, lines, count = {}, [], len(shards)
    require_tensors(config, len(shards[0]), where=where)
    shapes, axes = tensor_shapes(config), tensor_axes(config)
    names = {key: TABLE[key[0]].meta.format(layer=key[1]) for key in shapes}
    if all(HEAD not in shard for shard in shards):
        del shapes["lm_head", None]  # tied, in files that somebody has made smaller
    for i, shard in enumerate(shards):
        file = f"consolidated.{i:02d}.pth"
        lines += [
            f"not part of this model: {name} in {file}" for name in shard if name not in names.values() and not name.endswith("rope.freqs")
        ]
    for key, shape in shapes.items():
        entry, split = TABLE[key[0]], embed_axis if key[0] == "embed" else TABLE[key[0]].split
        axis = axes[key].index(split) if split else None
        step = copies if split == "kv_heads" else 1
        parts = count // step if split else 1
        if axis is not None and shape[axis] % parts:
            lines.append(f"{names[key]}: {split}={shape[axis]} does not divide over {parts} files")
            continue
        own = tuple(size // parts if i == axis else size for i, size in enumerate(shape))
        wanted = torch_shape(own, entry.inputs)
        for i, shard in enumerate(shards):
            if names[key] not in shard:
                lines.append(f"missing: {names[key]} {wanted} in consolidated.{i:02d}.pth")
            elif shard[names[key]].shape != wanted:
                lines.append(f"shape: {names[key]} is {shard[names[key]].shape}, wanted {wanted}, in consolidated.{i:02d}.pth")
        if not lines:
            found = [from_torch(shard[names[key]], entry.inputs, own) for shard in (shards if split else shards[:1])]
            tensor = _joined([found[i : i + step] for i in range(0, len(found), step)], axis or 0, names[key])
            tensors[key] = _mapped(tensor, pairs_to_halves) if entry.pairs else tensor
    if lines:
        raise CheckpointError("\n".join(lines), where=where)
    return tensors


def _joined(parts: list[list[np.ndarray]], axis: int, name: str) -> Tensor:
    """One tensor, joined from its parts along an axis. Copies of a part must be equal."""
    first = parts[0][0]
    size = first.shape[axis]
    shape = tuple(n * len(parts) if i == axis else n for i, n in enumerate(first.shape))

    def read(index: Index) -> np.ndarray:
        start, stop, _ = index[axis].indices(shape[axis])
        found = []
        for i in range(start // size, -(-stop // size)):
            own = (*index[:axis], slice(max(start - i * size, 0), min(stop - i * size, size)), *index[axis + 1 :])
            found.append(parts[i][0][own])
            if any(copy[own].tobytes() != found[-1].tobytes() for copy in parts[i][1:]):
                raise CheckpointError(f"{name} stands in several files, and they do not agree", where=f"head {i}")
        return found[0] if len(found) == 1 else np.concatenate(found, axis)

    return Tensor(shape, np.dtype(jnp.result_type(*(part[0].dtype for part in parts))), read)


def _mapped(tensor: Tensor, order: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """The tensor with its last axis in another order."""
    return tensor._replace(read=lambda index: order(tensor.read((*index[:-1], slice(None))))[..., index[-1]])


def _part(tensor: Tensor, axes: tuple[str, ...], split: str, rank: int, count: int) -> Tensor:
    """The part of a tensor in file number `rank` of `count`: a slice along the axis `split`, or all of it."""
    if not split:
        return tensor
    axis = axes.index(split)
    size = max(tensor.shape[axis] // count, 1)  # a head that several files must share stands in each
    begin = rank * tensor.shape[axis] // count

    def read(index: Index) -> np.ndarray:
        start, stop, _ = index[axis].indices(size)
        return tensor.read((*index[:axis], slice(begin + start, begin + stop), *index[axis + 1 :]))

    return Tensor(tuple(size if i == axis else n for i, n in enumerate(tensor.shape)), tensor.dtype, read)


def _split(name: str, config: LlamaConfig) -> str:
    return "vocab" if name == "embed" and config.tokens.tokenizer == "tiktoken" else TABLE[name].split


def _is_tied(tensors: Mapping[Key, Tensor]) -> bool:
    embed, head = tensors["embed", None], tensors.get(("lm_head", None))
    if head is None:
        return True
    return all(np.array_equal(embed.read(index), head.read(index[::-1]).T) for index in pieces(embed.shape, embed.dtype.itemsize, axis=0))
