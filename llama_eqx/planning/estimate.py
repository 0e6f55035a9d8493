"""How long a compiled step would take: an estimate from the compiler's own schedule, not a measurement.

The TPU compiler notes the expected cycles of every fusion. Those, times the turns of the loops that the fusions are in, are the compute.
Collectives have a model of their own (`collective_seconds`), Pallas kernels another (`kernel_seconds`). The program's text is in schedule
order, so asynchronous collectives overlap the compute between their start and their end.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

from llama_eqx.planning.chips import HOST_LINK, Torus
from llama_eqx.planning.hlo import Computation, Instruction, Module, buffers, parse, replica_groups, shapes

LINK_EFFICIENCY = 0.95  # of the links' nominal speed: all-gathers of 10 MB and more on v5e ("How to Scale Your Model", chapter on sharding)
HOP_SECONDS = 1e-6
KERNEL_EFFICIENCY = 0.55  # of the peak, in attention kernels

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # matrix products of a score's size in each kernel of splash attention


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step, or copies to and from the host: `bytes` of their full buffers on a device, `seconds` if nothing
    overlapped.
    """

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def plus(self, other: "Traffic", times: int = 1) -> "Traffic":
        return Traffic(self.count + times * other.count, self.bytes + times * other.bytes, self.seconds + times * other.seconds)


class Estimate(NamedTuple):
    """Seconds of one step: `step` = `compute` + `exposed` (waiting for collectives and the host's memory). `kernels` is the part of
    `compute` that is in Pallas kernels. `traffic` is by kind, `host-copy` among them, and whether asynchronous.

    `doubts` says what could not be read, and how it is counted.
    """

    step: float
    compute: float
    exposed: float
    kernels: float
    traffic: Mapping[tuple[str, bool], Traffic]
    doubts: tuple[str, ...]


def estimate(text: str, torus: Torus) -> Estimate:
    """Estimates the step from `compiled.as_text()` of a program for the devices of `torus`."""
    reader = _Reader(parse(text), torus)
    cost = reader.walk(reader.module.entry)
    return Estimate(cost.span, cost.compute, cost.span - cost.compute, cost.kernels, cost.traffic, tuple(dict.fromkeys(reader.doubts)))


def collective_seconds(kind: str, size: int, members: int, bandwidth: float, link: float, hops: int) -> float:
    """Time of one collective over `members` devices on a full buffer of `size` bytes per device, with all links busy.

    An all-gather receives all of the buffer but the device's own share. A reduce-scatter is its mirror image, and an all-reduce is both.
    In an all-to-all, a fourth of a gather's bytes crosses any cut of a ring. A permutation is one neighbour's buffer over one link.
    """
    share = (members - 1) / members * size
    times = {
        "all-gather": share / bandwidth,
        "reduce-scatter": share / bandwidth,
        "all-reduce": 2 * share / bandwidth,
        "all-to-all": members * share / 4 / bandwidth,
        "collective-permute": size / link,
    }
    return times[kind] / LINK_EFFICIENCY + hops * HOP_SECONDS


def kernel_seconds(instruction: Instruction, peak: float) -> float | None:
    """Time of a splash attention kernel by its FLOPs, from the shapes of its operands; None for another kernel.

    The first operand has an entry for every pair of query and key blocks. Under a causal mask, only those up to the diagonal are computed.
    If queries are fewer than keys, devices split a row, and each has a part from its front and one from its end.
    """
    found = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.name)
    operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", instruction.rest)
    if not (found and operands):
        return None
    arrays = shapes(operands[1])
    blocks = next(sizes for kind, sizes in arrays if kind.startswith("s"))
    query, key = [sizes for kind, sizes in arrays if kind in ("bf16", "f32") and len(sizes) >= 3][:2]
    n_queries, n_keys = blocks[-2:]
    # How many keys the last query of a block sees, on the first device.
    ends = [(i + 1) * query[-2] // n_queries for i in range(n_queries)]
    ends = [end if 2 * end <= query[-2] else key[-2] - query[-2] + end for end in ends]
    seen = sum(-(-end * n_keys // key[-2]) for end in ends) / (n_queries * n_keys)
    fused = found[1] == "dkv" and any(len(sizes) == len(query) + 1 for _, sizes in shapes(instruction.shape))
    products = PRODUCTS[found[1]] + fused  # a fused backward kernel computes the gradient of the queries too
    size = 1
    for axis in query:
        size *= axis
    return 2 * products * size * key[-2] * seen / (KERNEL_EFFICIENCY * peak)


class _Cost(NamedTuple):
    span: float
    compute: float
    kernels: float
    traffic: dict[tuple[str, bool], Traffic]


class _Reader:
    def __init__(self, module: Module, torus: Torus):
        self.module, self.torus = module, torus
        self.known: dict[str, _Cost] = {}
        self.doubts: list[str] = []

    def walk(self, name: str) -> _Cost:
        if name not in self.known:
            self.known[name] = self._timeline(self.module.computations[name])
        return self.known[name]

    def _timeline(self, computation: Computation) -> _Cost:
        """Simulates one core that does one thing after another, with one network and one host link that do so beside it."""
        chip = self.torus.chip
        now = compute = kernels = network = host = 0.0
        traffic: dict[tuple[str, bool], Traffic] = {}
        done: dict[str, float] = {}  # when the operation that an instruction began is over
        fused: list[tuple[str, float]] = []  # the same for gathers that are spread over fusions, by their result's shape

        for instruction in computation.values():
            op, name = instruction.op, instruction.name
            inner = self._inner(instruction, computation)
            kind = self._collective(instruction)
            if inner is not None:
                turns, cost = inner
                now, compute, kernels = now + turns * cost.span, compute + turns * cost.compute, kernels + turns * cost.kernels
                for key, value in cost.traffic.items():
                    traffic[key] = traffic.get(key, Traffic()).plus(value, turns)
            elif kind is not None and _ends(instruction):
                finish = done.get(instruction.operands[0]) if instruction.operands else None
                if finish is None:
                    held = next((entry for entry in fused if _plain(instruction.shape) in entry[0]), None)
                    if held:
                        fused.remove(held)
                        finish = held[1]
                now = max(now, finish or 0.0)
            elif kind is not None:
                size, seconds = self._priced(kind, instruction)
                starts = _starts(instruction)
                key = (kind, starts)
                traffic[key] = traffic.get(key, Traffic()).plus(Traffic(1, size, seconds))
                if kind == "collective-permute":  # each has the link to one neighbour to itself
                    finish = now + seconds
                else:
                    network = finish = max(now, network) + seconds
                if not starts:
                    now = finish
                elif op == "fusion":
                    fused.append((_plain(instruction.shape), finish))
                else:
                    done[name] = finish
            elif (moved := _moved_by_host(instruction)) is not None:
                seconds = moved / HOST_LINK
                traffic["host-copy", True] = traffic.get(("host-copy", True), Traffic()).plus(Traffic(1, moved, seconds))
                host = done[name] = max(now, host) + seconds
            elif op in ("copy-done", "dynamic-slice-done", "dynamic-update-slice-done"):
                now = max(now, done.get(instruction.operands[0], 0.0))
            elif (cycles := instruction.number("estimated_cycles")) is not None:
                now, compute = now + cycles / chip.clock, compute + cycles / chip.clock
            elif op == "custom-call" and "tpu_custom_call" in instruction.rest:
                seconds = kernel_seconds(instruction, chip.peak)
                if seconds is None:
                    self.doubts.append(f"kernel {name}: unknown, counted as nothing")
                    seconds = 0.0
                now, compute, kernels = now + seconds, compute + seconds, kernels + seconds
        return _Cost(now, compute, kernels, traffic)

    def _inner(self, instruction: Instruction, computation: Computation) -> tuple[int, _Cost] | None:
        """How often an instruction runs another computation, and what that costs."""
        if instruction.op == "while":
            turns = self.module.trip_count(instruction, computation)
            if turns is None:
                self.doubts.append(f"loop {instruction.name}: unknown number of turns, counted once")
            return (1 if turns is None else turns), self.walk(instruction.calls("body")[0])
        if instruction.op == "call":
            return 1, self.walk(instruction.calls("to_apply")[0])
        if instruction.op == "conditional":
            branches = instruction.calls("branch_computations") or [
                *instruction.calls("true_computation"),
                *instruction.calls("false_computation"),
            ]
            return 1, max((self.walk(branch) for branch in branches), key=lambda cost: cost.span)
        return None

    def _collective(self, instruction: Instruction) -> str | None:
        """The kind of collective that an instruction is, or wraps."""
        bare = re.sub(r"-(start|done)$", "", instruction.op)
        if bare in KINDS:
            return bare
        if instruction.op in ("fusion", "async-start", "async-done"):
            called = instruction.calls("calls")
            if called and called[0].startswith("async_collective_fusion"):
                return None  # a product with part of a gather inside it: the gather was counted where it began
            inside = [op for op in self._ops(called) if op in KINDS]
            return inside[0] if inside else None
        return None

    def _ops(self, names: list[str]) -> list[str]:
        found = []
        for name in names:
            for instruction in self.module.computations[name].values():
                found += [instruction.op, *self._ops(instruction.calls("calls"))]
        return found

    def _priced(self, kind: str, instruction: Instruction) -> tuple[int, float]:
        """The bytes and seconds of a collective."""
        inside, shape = instruction, instruction.shape
        while inside.op in ("fusion", "async-start"):  # the wrapped one says which devices take part
            body = self.module.computations[inside.calls("calls")[0]].values()
            inside = next(i for i in body if i.op in KINDS or (i.op == "fusion" and set(self._ops(i.calls("calls"))) & set(KINDS)))
            shape = inside.shape
        group = replica_groups(inside.rest, len(self.torus.places))[0]
        # The shape of an asynchronous one has its inputs and its outputs. The full buffer is the larger of the two.
        sizes = buffers(shape)
        if kind == "collective-permute":
            size = sizes[0]
        elif _starts(inside):
            size = sum(sizes) * len(group) // (len(group) + 1) if kind in ("all-gather", "reduce-scatter") else sum(sizes) // 2
        else:
            size = sum(sizes) * (len(group) if kind == "reduce-scatter" else 1)
        bandwidth, hops = self.torus.bandwidth(group), self.torus.hops(group)
        return size, collective_seconds(kind, size, len(group), bandwidth, self.torus.chip.link, hops)


def _moved_by_host(instruction: Instruction) -> int | None:
    """The bytes that an instruction begins to move between the device and its host's memory (space 5); None for another one.

    A slice is moved into or out of what all turns of a loop keep there: `((all, slice, indices…), all, …)`, `((all, indices…), slice, …)`.
    """
    if "S(5)" not in instruction.shape:
        return None
    arrays = buffers(instruction.shape)
    which = {"copy-start": 0, "dynamic-update-slice-start": 1, "dynamic-slice-start": -2}.get(instruction.op)
    return None if which is None else arrays[which]


def _starts(instruction: Instruction) -> bool:
    return instruction.op.endswith("-start") or instruction.name.startswith("async-collective-start")


def _ends(instruction: Instruction) -> bool:
    return instruction.op.endswith("-done") or instruction.name.startswith("async-collective-done")


def _plain(shape: str) -> str:
    """A shape without layouts."""
    return re.sub(r"\{[^}]*\}", "", shape)
