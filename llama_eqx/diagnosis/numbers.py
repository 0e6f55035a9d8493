"""Checks every number of a model, some rows at a time."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llama_eqx.diagnosis.report import Finding
from llama_eqx.interop.weights import Index, Weights, pieces


class Tensor(NamedTuple):
    """A tensor that has not been read. `read(index)` returns the part that the slices select, one for every axis."""

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    def rows(self) -> Iterator[np.ndarray]:
        """Yields some rows at a time in float32: equally many for all tensors of one shape, whatever their dtypes."""
        for index in pieces(self.shape, 4, axis=0) if self.shape else [()]:
            yield self.read(index).astype(np.float32)


def tensors_of(weights: Weights, file: str) -> dict[str, Tensor]:
    """The tensors that a reader found, by this package's names."""
    return {
        name if layer is None else f"{name} of layer {layer}": Tensor(file, tensor.shape, tensor.dtype, tensor.read)
        for (name, layer), tensor in weights.tensors.items()
    }


def said_size(tensors: Mapping[str, Tensor], weights: bool) -> str:
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    dtypes = " and ".join(sorted({tensor.dtype.name for tensor in tensors.values()}))
    return f"{count:,} numbers in {len(tensors)} tensors, {dtypes}" + ("" if weights else ", not read")


def check_numbers(tensors: Mapping[str, Tensor], embed: str) -> tuple[float | None, list[Finding]]:
    """Finds NaN, infinity and tensors of zeros. Also returns the mean square of the tensor `embed`, which the first norm divides by."""
    findings, mean_square = [], None
    total = sum(math.prod(tensor.shape) for tensor in tensors.values())
    with tqdm(total=total, desc="reading", unit=" numbers", unit_scale=True, disable=None) as progress:
        for name, tensor in tensors.items():
            nan = infinite = size = first = 0
            some, square = False, 0.0
            for values in tensor.rows():
                bad = ~np.isfinite(values)
                if not (nan or infinite) and bad.any():
                    first = size + int(bad.ravel().argmax())
                nan, infinite = nan + int(np.isnan(values).sum()), infinite + int(np.isinf(values).sum())
                some = some or bool(values.any())
                square += float(np.vdot(values, values)) if name == embed else 0.0
                size += values.size
                progress.update(values.size)
            if nan or infinite:
                at = tuple(int(i) for i in np.unravel_index(first, tensor.shape))
                what = f"{name} has {nan:,} NaN and {infinite:,} infinite of {size:,} numbers, the first at {at}"
                findings.append(Finding("error", tensor.file, what, "an earlier checkpoint, or download or convert it again"))
            elif size and not some:
                findings.append(Finding("warning", tensor.file, f"{name} is all zeros", "download or convert it again"))
            elif name == embed and size:
                mean_square = square / size
    return mean_square, findings


def condensed(names: list[str]) -> str:
    """Names with the numbers of their layers gathered: `model.layers.{0-2,5}.mlp.up_proj.weight`."""
    layers = defaultdict(list)
    for name in names:
        number = re.search(r"(?<=layers\.)\d+", name)
        layers[re.sub(r"(?<=layers\.)\d+", "{}", name)].append(int(number[0]) if number else 0)
    return ", ".join(name.replace("{}", _ranges(found)) for name, found in layers.items())


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    said = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return said if said.isdecimal() else f"{{{said}}}"
