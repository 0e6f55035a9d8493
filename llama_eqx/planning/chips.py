"""What a TPU of each generation can do, and how its slices are wired."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Chip(NamedTuple):
    """`peak` is in dense bfloat16 FLOP/s, `clock` in Hz, `memory` the bytes that the compiler allows, `link` the bytes/s
    of one link in one direction, `ring` the least length at which an axis of a slice closes into a ring, `host` the chip's share of its
    machine's memory in bytes, `overlaps` whether the compiler runs gathers beside computation (docs/log.md).

    Peaks and speeds: "How to Scale Your Model", the chapter on TPUs (jax-ml.github.io/scaling-book). The clock is the peak over the FLOPs
    of the matrix units in a cycle. Hosts: Google Cloud's machines of four chips (ct4p, ct5p, ct5lp, ct6e).
    """

    peak: float
    clock: float
    memory: float
    link: float
    ring: int
    host: float
    overlaps: bool


GIB = 2**30
HOST_LINK = 1.6e10  # bytes/s between a chip and its host's memory

CHIPS = {
    "TPU v4": Chip(275e12, 275e12 / (8 * 128 * 128 * 2), 30.75 * GIB, 4.5e10, 4, 407e9 / 4, True),
    "TPU v5": Chip(459e12, 459e12 / (8 * 128 * 128 * 2), 95.73 * GIB, 9e10, 4, 448e9 / 4, False),
    "TPU v5 lite": Chip(197e12, 197e12 / (4 * 128 * 128 * 2), 15.75 * GIB, 4.5e10, 16, 192e9 / 4, True),
    "TPU v6 lite": Chip(918e12, 918e12 / (4 * 256 * 256 * 2), 31.24 * GIB, 9e10, 16, 720e9 / 4, False),
}


class Torus(NamedTuple):
    """A slice: where each device of the mesh sits, in the mesh's order, and which of the axes close into rings."""

    chip: Chip
    places: Int[np.ndarray, "devices axes"]
    rings: tuple[bool, ...]

    @staticmethod
    def of(devices: Iterable) -> "Torus":
        """Builds a `Torus` from the devices of a mesh, in its order."""
        devices = list(devices)
        chip, places = CHIPS[devices[0].device_kind], np.array([device.coords for device in devices])
        sizes = [len(set(axis)) for axis in places.T]
        # A three-dimensional torus is wired from cubes of 4 x 4 x 4, and a smaller slice has no rings at all.
        whole = chip.ring == 16 or all(size % 4 == 0 for size in sizes)
        return Torus(chip, places, tuple(whole and size >= chip.ring for size in sizes))

    @property
    def closed(self) -> bool:
        """Whether it is a three-dimensional torus, with a ring along every axis."""
        return len(self.rings) == 3 and all(self.rings)

    def bandwidth(self, group: Int[np.ndarray, " members"]) -> float:
        """Bytes/s that a member of a group can receive while all of them send: on each axis that the group spans, over both links of a
        ring, or over the one link at the end of a line."""
        sizes = [len(set(axis)) for axis in self.places[group].T]
        whole = [len(set(axis)) for axis in self.places.T]
        links = sum(2 if ring and size == all_ else 1 for size, all_, ring in zip(sizes, whole, self.rings, strict=True) if size > 1)
        return max(1, links) * self.chip.link

    def hops(self, group: Int[np.ndarray, " members"]) -> int:
        """Steps from one end of the group to the other."""
        axes = zip(self.places[group].T, self.rings, strict=True)
        return max(1, sum(math.ceil((len(set(axis)) - 1) / (2 if ring else 1)) for axis, ring in axes))
