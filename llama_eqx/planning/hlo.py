"""A compiled program read back from its text: computations, their shapes, how often a loop turns, which devices communicate."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}


class Instruction(NamedTuple):
    """One line of a computation: `%name = shape op(operands), rest`."""

    name: str
    op: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def calls(self, attribute: str) -> list[str]:
        """The computations named by an attribute: `body=%x`, `calls=%x`, `branch_computations={%x, %y}`."""
        found = re.search(attribute + r"=(\{[^}]*\}|%[\w.\-]+)", self.rest)
        return re.findall(r"%([\w.\-]+)", found[1]) if found else []

    def number(self, attribute: str) -> int | None:
        """The integer after `attribute=` or `"attribute":`."""
        found = re.search(rf'\b{attribute}"?[=:]"?(-?\d+)', self.rest)
        return int(found[1]) if found else None


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """`computations` by name, each in the order in which its instructions are scheduled; `entry` is the one that runs."""

    computations: dict[str, Computation]
    entry: str

    def trip_count(self, loop: Instruction, caller: Computation) -> int | None:
        """How often a `while` loop turns; None if it does not count from one constant to another."""
        condition, body = (self.computations[loop.calls(part)[0]] for part in ("condition", "body"))
        bound = self._bound(condition)
        if bound is None:
            return None
        index, limit = bound
        start = self._start(loop, caller, index)
        step = self._step(body, index)
        return max(0, math.ceil((limit - start) / step)) if step else None

    def _bound(self, condition: Computation) -> tuple[int, int] | None:
        """The index in the loop's tuple of what is compared, and the constant that it is compared with."""
        root = _root(condition)
        parts = [condition[name] for name in root.operands if name in condition]
        if root.op == "compare" and "direction=LT" not in root.rest:
            return None
        limits = [limit for part in parts if (limit := _constant(part)) is not None]
        counters = [index for part in parts if part.op == "get-tuple-element" and (index := part.number("index")) is not None]
        return (counters[0], limits[0]) if limits and counters else None

    def _start(self, loop: Instruction, caller: Computation, index: int) -> int:
        inputs = caller.get(loop.operands[0])
        while inputs is not None and inputs.op in ("copy", "bitcast", "opt-barrier"):
            inputs = caller.get(inputs.operands[0])
        if inputs is None or inputs.op != "tuple":
            return 0
        first = caller.get(inputs.operands[index])
        while first is not None and first.op in ("copy", "bitcast"):
            first = caller.get(first.operands[0])
        return (_constant(first) or 0) if first is not None else 0

    def _step(self, body: Computation, index: int) -> int | None:
        """What one turn adds to the counter; 1 where the compiler has folded the addition into something else."""
        root = _root(body)
        value, step = body.get(root.operands[index]) if root.op == "tuple" else None, 0
        while value is not None and value.op in ("add", "copy", "bitcast"):
            if value.op == "add":
                added = [(name, amount) for name in value.operands if name in body and (amount := _constant(body[name])) is not None]
                if not added:
                    return None
                step += added[0][1]
                value = body.get(next((name for name in value.operands if name != added[0][0]), ""))
            else:
                value = body.get(value.operands[0])
        return step or (1 if value is not None and value.op in ("fusion", "call") else None)


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises `ValueError` when there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    for line in _joined(text):
        if header := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$", line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("not the text of a compiled program: it has no entry computation")
    return Module(computations, entry)


def buffers(shape: str) -> list[int]:
    """The bytes of every array in a shape: `[131072, 4]` for "(bf16[16,4096]{1,0}, u32[])"."""
    return [math.ceil(SIZES.get(kind, 1 if kind.startswith("f8") else 4) * math.prod(sizes)) for kind, sizes in shapes(shape)]


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The dtype and sizes of every array in a shape or a list of shapes."""
    return [(kind, tuple(_ints(sizes))) for kind, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)]


def replica_groups(rest: str, devices: int) -> Int[np.ndarray, "groups members"]:
    """The groups of devices, by place in the mesh, that take part in a collective together. Without any, all devices are one group.

    There are three notations: lists, `{{0,1},{2,3}}`; a range reshaped and transposed, `[2,4]<=[4,2]T(1,0)`; and
    axes of a mesh, `mesh['a'=4,'b'=2] {'a'}`, perhaps with `device_ids=([2,4]T(1,0))`.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return np.array([_ints(pair) for pair in re.findall(r"\{([\d,]+)", "{" + pairs[1])])
    if lists := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return np.array([_ints(group) for group in re.findall(r"\{([\d,]+)\}", lists[1])])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", rest):
        axes = dict(re.findall(r"'?([\w.\-]+)'?=(\d+)", named[1]))
        sizes, names = [int(size) for size in axes.values()], list(axes)
        order = np.arange(math.prod(sizes))
        if mapped := re.search(r"device_ids=\(?\[([\d,]+)\](?:T\(([\d,]+)\))?", named[2]):
            order = order.reshape(_ints(mapped[1]))
            order = order.transpose(_ints(mapped[2])) if mapped[2] else order
        joined = [names.index(axis) for axis in re.findall(r"'?([\w.\-]+)'?", named[3]) if axis in names]
        grid = np.moveaxis(order.reshape(sizes), joined, range(-len(joined), 0))
        return grid.reshape(-1, math.prod(sizes[axis] for axis in joined))
    if ranged := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        order = np.arange(math.prod(_ints(ranged[2]))).reshape(_ints(ranged[2]))
        return (order.transpose(_ints(ranged[3])) if ranged[3] else order).reshape(_ints(ranged[1]))
    return np.arange(devices)[None]


def _joined(text: str) -> Iterator[str]:
    """Lines, with those that only continue an instruction (attributes may contain line breaks) joined to it."""
    held = ""
    for line in text.splitlines():
        if re.match(r"\s*(ROOT )?%[\w.\-]+ = |\s*(ENTRY )?%[\w.\-]+ \(|\s*\}\s*$|HloModule|\s*$", line):
            yield held
            held = line
        else:
            held += line
    yield held


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line)
    if not head:
        return None
    after = line[head.end() :]
    end = _closing(after) + 1 if after.startswith("(") else after.find(" ")
    shape, call = after[:end], after[end:].lstrip()
    op, opening, _ = call.partition("(")
    if not opening:
        return None
    close = len(op) + _closing(call[len(op) :])
    # A constant's value stands where operands would.
    operands = tuple(re.findall(r"%([\w.\-]+)", call[len(op) : close]))
    rest = call[len(op) :] if op == "constant" else call[close + 1 :]
    return Instruction(head[2], op, shape, operands, rest, bool(head[1]))


def _closing(text: str) -> int:
    """The index at which the bracket that `text` opens with is closed."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return i
    return len(text) - 1


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def _constant(instruction: Instruction) -> int | None:
    found = re.match(r"\((-?\d+)\)", instruction.rest) if instruction.op == "constant" else None
    return int(found[1]) if found else None


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
