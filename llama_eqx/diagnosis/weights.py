"""Tensors in files against those that a config asks for: names, shapes, and every number."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from tqdm import tqdm

from llama_eqx.diagnosis.report import Finding
from llama_eqx.interop.table import TABLE, torch_shape
from llama_eqx.model.llama import LlamaConfig
from llama_eqx.sharding import axis_names, parameter_names

EMBED, HEAD = TABLE["embed"].huggingface, TABLE["lm_head"].huggingface
READABLE = ("F32", "BF16", "F16")
CONFIG_KEYS = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "heads head_dim": "num_attention_heads x head_dim",
    "kv_heads head_dim": "num_key_value_heads x head_dim",
    "mlp": "intermediate_size",
}


class Filed(NamedTuple):
    """A tensor in a file: `rows()` reads it some rows at a time."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[], Iterator[np.ndarray]]


class Wanted(NamedTuple):
    """A tensor that a config asks for. `sides` are the axes of our array that each axis of the file's is made of."""

    shape: tuple[int, ...]
    sides: tuple[str, ...]


def wanted_tensors(config: LlamaConfig) -> dict[str, Wanted]:
    """By Hugging Face's name, every tensor of the model."""
    model = eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0))
    wanted = {}
    for parameter, axes, leaf in zip(parameter_names(model), axis_names(model), jax.tree.leaves(model), strict=True):
        inputs, name = TABLE[parameter]
        layered = axes[0] == "layers"
        axes, shape = axes[layered:], leaf.shape[layered:]
        sides = (" ".join(axes[inputs:]), " ".join(axes[:inputs])) if inputs else axes
        for layer in range(config.dims.layers) if layered else [0]:
            wanted[name.format(layer=layer)] = Wanted(torch_shape(shape, inputs), sides)
    return wanted


def check_names(config: LlamaConfig, tensors: Mapping[str, Filed], where: str) -> list[Finding]:
    """Tensors that are missing, too many, of another shape or of a dtype that is not read; a wrong size is said once, by its key."""
    wanted = wanted_tensors(config)
    findings, sizes = [], defaultdict(list)
    for name in wanted.keys() & tensors.keys():
        found = tensors[name]
        if len(found.shape) != len(wanted[name].shape):
            findings.append(Finding("error", found.file, f"{name} is {found.shape}, wanted {wanted[name].shape}"))
            continue
        for side, here, there in zip(wanted[name].sides, wanted[name].shape, found.shape, strict=True):
            if here != there:
                sizes[side, here, there].append(name)
    for (side, here, there), names in sizes.items():
        what = f"{CONFIG_KEYS[side]} is {here:,}, and by the weights it is {there:,}: {condensed(names)}"
        findings.append(Finding("error", where, what, f"set {CONFIG_KEYS[side]} to {there}, or find the weights of this config"))
    if missing := [name for name in wanted if name not in tensors]:
        hint = '"tie_word_embeddings": true, if the head is the embedding' if missing == [HEAD] else "download or convert them again"
        findings.append(Finding("error", where, f"{len(missing)} tensors are missing: {condensed(missing)}", hint))
    # Old files hold the rotary frequencies, and a second copy of a tied table.
    expected = {HEAD} if config.tied else set()
    extra = [name for name in tensors if name not in wanted and not name.endswith("rotary_emb.inv_freq") and name not in expected]
    if extra:
        hint = "num_hidden_layers may be too small" if any(name.startswith("model.layers.") for name in extra) else "another architecture?"
        findings.append(Finding("error", where, f"{len(extra)} tensors are not part of this model: {condensed(extra)}", hint))
    dtypes = defaultdict(list)
    for name, tensor in tensors.items():
        dtypes[tensor.dtype].append(name)
    for dtype, names in dtypes.items():
        if dtype not in READABLE:
            what = f"{len(names)} tensors are {dtype}: {condensed(names)}"
            findings.append(Finding("error", where, what, f"readable are {', '.join(READABLE)}: use weights that are not quantised"))
    if len(mixed := [dtype for dtype in dtypes if dtype in READABLE]) > 1:
        rare = min(mixed, key=lambda dtype: len(dtypes[dtype]))
        findings.append(Finding("note", where, f"the dtypes are mixed: {condensed(dtypes[rare])} in {rare}, others in {' and '.join(sorted({*mixed} - {rare}))}"))
    return findings


def check_numbers(tied: bool, tensors: Mapping[str, Filed], where: str) -> tuple[float | None, list[Finding]]:
    """Reads every number, some rows of one tensor at a time: NaN, infinity, tensors of zeros, and a tied table that was stored twice.

    Also gives the mean square of the embedding, which the first norm divides by.
    """
    findings, squares = [], None
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.dtype in READABLE}
    total = sum(math.prod(tensor.shape) for tensor in tensors.values())
    with tqdm(total=total, desc="reading", unit=" numbers", unit_scale=True, disable=None) as progress:
        for name, tensor in tensors.items():
            nan = infinite = size = first = 0
            some, square = False, 0.0
            for rows in tensor.rows():
                values = rows.astype(np.float32)
                bad = ~np.isfinite(values)
                if not (nan or infinite) and bad.any():
                    first = size + int(bad.ravel().argmax())
                nan, infinite = nan + int(np.isnan(values).sum()), infinite + int(np.isinf(values).sum())
                some = some or bool(values.any())
                square += float(np.vdot(values, values)) if name == EMBED else 0.0
                size += values.size
                progress.update(values.size)
            if nan or infinite:
                at = tuple(int(i) for i in np.unravel_index(first, tensor.shape))
                what = f"{name} has {nan:,} NaN and {infinite:,} infinite of {size:,} numbers, the first at {at}"
                findings.append(Finding("error", tensor.file, what, "an earlier checkpoint, or download it again"))
            elif size and not some:
                findings.append(Finding("warning", tensor.file, f"{name} is all zeros", "download or convert it again"))
            if name == EMBED and size and not (nan or infinite):
                squares = square / size
    if EMBED in tensors and HEAD in tensors and tensors[EMBED].shape == tensors[HEAD].shape:
        findings += _check_tie(tied, tensors[EMBED], tensors[HEAD], where)
    return squares, findings


def condensed(names: list[str]) -> str:
    """Names with the numbers of their layers gathered: `model.layers.{0-2,5}.mlp.up_proj.weight`."""
    layers = defaultdict(list)
    for name in names:
        number = re.search(r"(?<=layers\.)\d+", name)
        layers[re.sub(r"(?<=layers\.)\d+", "{}", name)].append(int(number[0]) if number else None)
    return ", ".join(name.replace("{}", _ranges(found)) if "{}" in name else name for name, found in layers.items())


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    said = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return said if said.isdecimal() else f"{{{said}}}"


def _check_tie(tied: bool, embed: Filed, head: Filed, where: str) -> list[Finding]:
    apart = 0.0
    for a, b in zip(embed.rows(), head.rows(), strict=False):
        size = min(len(a), len(b))
        apart = max(apart, float(np.abs(a[:size].astype(np.float32) - b[:size].astype(np.float32)).max()))
    if tied and not apart == 0:
        what = f"tied, yet stored twice and different: {HEAD} and {EMBED} are up to {apart:.3g} apart"
        hint = '"tie_word_embeddings": false if the head was trained apart, else delete the head'
        return [Finding("error", where, f"{what}, which shows in the logits of every position", hint)]
    if not tied and apart == 0:
        what = f"not tied, yet {HEAD} is a copy of {EMBED}: two parameters from the first training step on"
        return [Finding("note", where, what, '"tie_word_embeddings": true, if they are meant to be one')]
    return []
