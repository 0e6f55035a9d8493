"""Searches settings that make a run fast on its mesh: drops those that cannot fit or look slow, compiles the rest, files the best."""

import dataclasses
import importlib.metadata
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from llama_eqx.errors import ConfigError, StorageError, UserError
from llama_eqx.planning.chips import GIB, HOST_LINK, Torus
from llama_eqx.planning.compile import build_mesh
from llama_eqx.planning.estimate import collective_seconds
from llama_eqx.planning.memory import Trace, memory_by_part, rows_of_device, trace
from llama_eqx.planning.plan import Plan, make_plan
from llama_eqx.sharding import MESH_AXES, Layout
from llama_eqx.training.program import Program, make_program
from llama_eqx.training.run import RunConfig

MOST = 10  # candidates to compile
MARGIN = 0.98  # of the compiler's memory: what a candidate may take by the formula
HOPELESS = 1.1  # times the best prediction: slower candidates are not compiled
PRODUCTS = 0.8  # of the peak, in matrix products
LENGTH = 8192  # tokens of a row where the user says nothing, or the model's context if that is shorter
BASE = ("precision=mixed", "kernel.fused_backward=true", "kernel.q_block=1024", "kernel.kv_block=1024")
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of a microbatch on a device
# The keys that a plan may have. Other overrides of a search are the user's own: a seed, places, numbers of steps.
FILED = (
    "mesh",
    "sharding",
    "remat",
    "kernel",
    "precision",
    "loss.chunk",
    "train.seq_len",
    "train.batch_size",
    "train.microbatch_size",
    "train.unroll",
)

Variant = Callable[..., RunConfig]


class Candidate(NamedTuple):
    """A config, the overrides that make it, and what the formulas say of it: `bytes` per device, `seconds` per token and device."""

    config: RunConfig
    overrides: tuple[str, ...]
    bytes: int
    seconds: float


def candidates(variant: Variant, remats: Sequence[str], fixed: Sequence[str]) -> list[Candidate]:
    """Every combination of mesh shape, remat and rows at a time that fits by the formula, the fastest first.

    `variant(*overrides)` is the config with overrides, `remats` are options of the group, and keys in `fixed` are not changed.

    Raises `UserError` when none fits, `ConfigError` when fixed sizes divide over no shape of the mesh.
    """
    first = variant()
    if first.mesh.topology is None:
        raise UserError("only TPU slices can be searched: only TPU compilers say how long a step takes", where="mesh", next="mesh=v4-32")
    whole = build_mesh(first.mesh)
    devices, torus = list(whole.devices.flat), Torus.of(whole.devices.flat)
    found, smallest, refused = [], math.inf, None
    changes = [Change((), {})] if _fixed(fixed, "mesh", "sharding") else list(mesh_shapes(variant, len(devices)))
    options = [()] if _fixed(fixed, "remat") else [(f"remat={name}",) for name in remats]
    remat = {option: variant(*option).remat for option in options}
    whole_layout = Layout(whole, first.sharding)
    bar = tqdm(options, desc="tracing", unit="remat", disable=None, leave=False)
    traced = {option: trace(dataclasses.replace(first, remat=remat[option]), whole_layout) for option in bar}
    for shape in changes:
        shaped = dataclasses.replace(first, **shape.parts)
        layout = Layout(shaped.mesh.build(devices), shaped.sharding)
        sizes = list(batches(shaped, layout.mesh.shape["data"] * layout.mesh.shape["fsdp"], fixed))
        try:
            program = make_program(dataclasses.replace(shaped, **sizes[0].parts), layout)
        except ConfigError as error:
            refused = error  # sizes that do not divide over this shape
            continue
        for option, rows in itertools.product(options, sizes):
            settings = dataclasses.replace(shaped, **rows.parts, remat=remat[option])
            memory = memory_by_part(settings, program, layout, traced[option]).total
            smallest = min(smallest, memory)
            host = rows_of_device(settings, layout) * traced[option].host
            if memory < MARGIN * torus.chip.memory and host < MARGIN * torus.chip.host:
                seconds = predicted_seconds(settings, program, layout, torus, traced[option])
                found.append(Candidate(settings, shape.overrides + option + rows.overrides, memory, seconds))
    if refused and smallest == math.inf:
        raise refused
    if not found:
        raise UserError(
            f"nothing fits into the {torus.chip.memory / GIB:.1f} GiB of a device: the smallest setting takes {smallest / GIB:.1f}",
            where="mesh",
            next="more devices",
        )
    return sorted(found, key=lambda candidate: candidate.seconds)


class Change(NamedTuple):
    """Overrides, and the parts of a config that they change."""

    overrides: tuple[str, ...]
    parts: dict[str, Any]


def mesh_shapes(variant: Variant, devices: int) -> Iterable[Change]:
    """All of the devices in fsdp, or some of them in tensor, or in data."""
    first, split = variant(), variant("sharding=fsdp_tensor").sharding
    yield Change((), {})
    for size in (2, 4, 8):
        if devices % size == 0 and first.model.dims.heads % size == 0:
            mesh = dataclasses.replace(first.mesh, tensor=size)
            yield Change(("sharding=fsdp_tensor", f"mesh.tensor={size}"), {"mesh": mesh, "sharding": split})
        if devices % size == 0 and devices > size:
            yield Change((f"mesh.data={size}",), {"mesh": dataclasses.replace(first.mesh, data=size)})


def batches(config: RunConfig, ways: int, fixed: Sequence[str]) -> Iterable[Change]:
    """The numbers of rows at a time. The batch is one microbatch until a run with these settings sets its size."""
    train, whole, part = config.train, _fixed(fixed, "train.batch_size"), _fixed(fixed, "train.microbatch_size")
    sizes = [n * ways for n in ROWS]
    if part and (whole or train.microbatch_size):
        sizes = [train.microbatch_size]
    elif whole:
        sizes = [size for size in sizes if train.batch_size % size == 0] or [train.microbatch_size]
    for size in sizes:
        parts = {name: size for name, free in (("batch_size", not whole), ("microbatch_size", not part)) if free}
        yield Change(tuple(f"train.{name}={size}" for name in parts), {"train": dataclasses.replace(train, **parts)})


def _fixed(keys: Sequence[str], *names: str) -> bool:
    """Whether any of the keys is one of the names, or within it. The choice of a mesh leaves its shape open."""
    return any(_within(key, *names) and not key.startswith("mesh.compiler_options") for key in keys if key != "mesh")


def _within(key: str, *names: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def predicted_seconds(config: RunConfig, program: Program, layout: Layout, torus: Torus, traced: Trace) -> float:
    """A guess, per token and device, good enough to choose what to compile."""
    chip, shape = torus.chip, layout.mesh.shape
    dims = config.model.dims
    rows = rows_of_device(config, layout)
    tokens = rows * config.train.seq_len / shape["sequence"]
    compute = rows * traced.flops / (shape["tensor"] * shape["sequence"]) / (PRODUCTS * chip.peak)
    host = rows * traced.host / HOST_LINK  # each way: once beside the forward pass, a third of the compute, and once beside the rest

    def seconds(kind: str, size: float, axis: str) -> float:
        places = np.arange(layout.mesh.size).reshape(tuple(shape.values()))
        group = places.swapaxes(MESH_AXES.index(axis), 0)[:, 0, 0, 0]
        bandwidth, hops = torus.bandwidth(group), torus.hops(group)
        return collective_seconds(kind, int(size), len(group), bandwidth, chip.link, hops) if len(group) > 1 else 0.0

    model = program.shapes.model
    weights = 2 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.blocks)) / shape["tensor"]
    gathers, waits = 2 * seconds("all-gather", weights, "fsdp"), 0.0
    if not chip.overlaps:
        gathers, waits = 0.0, gathers
    if shape["fsdp"] == layout.mesh.size and torus.closed:  # a gather over the whole torus is compiled to a reduction, which waits
        gathers, waits = 0.0, 2 * seconds("all-reduce", weights, "fsdp")
    reductions = waits + seconds("reduce-scatter", weights, "fsdp") + seconds("all-reduce", weights / shape["fsdp"], "data")
    activations = 4 * dims.layers * seconds("all-reduce", 2 * tokens * dims.embed, "tensor")
    passes = max(compute / 3, gathers / 2, host) + max(2 * compute / 3, gathers / 2, host)
    return (passes + reductions + activations) * shape["tensor"] / tokens


class Found(NamedTuple):
    """The best plan of a search, the overrides that make it, and all that was compiled."""

    plan: Plan
    overrides: tuple[str, ...]
    tried: tuple[tuple[Candidate, Plan], ...]


def search(variant: Variant, overrides: Sequence[str], remats: Sequence[str], enough: int = MOST) -> Found:
    """Compiles the candidates that look fastest; the one with the best estimate wins.

    The search ends when `enough` of them fit. The best is then also compiled with attention's other backward pass. Which one is faster
    depends on the chip and the heads, by up to a tenth of the step, and no formula here predicts it.

    Raises `UserError` when none fits.
    """
    said = {override.partition("=")[0].lstrip("+~"): override for override in overrides}
    fixed = [key for key in said if key not in ("model", "mesh", "search", "run_dir")]
    length = min(variant().model.context, LENGTH)
    base = [o for o in (*BASE, f"train.seq_len={length}") if not _fixed(fixed, o.partition("=")[0])]
    ranked = candidates(lambda *more: variant(*base, *more), remats, fixed)
    tried: list[tuple[Candidate, Plan]] = []
    backward = () if _fixed(fixed, "kernel.fused_backward") else ("kernel.fused_backward=false",)
    with tqdm(ranked[: MOST - len(backward)], desc="compiling", unit="candidate", disable=None, leave=False) as bar:
        for candidate in bar:
            fitting = [entry.seconds for entry, plan in tried if plan.estimate and plan.fits]
            if len(fitting) >= enough or candidate.seconds > HOPELESS * min(fitting, default=math.inf):
                break
            bar.set_postfix_str(" ".join(candidate.overrides))
            tried.append((candidate, make_plan(candidate.config)))
        if not any(plan.estimate and plan.fits for _, plan in tried):
            raise UserError(f"none of the {len(tried)} settings that were compiled fits", where="mesh", next="more devices")
        if backward:
            best, _ = fastest(tried)
            changed = (*best.overrides, *backward)
            bar.set_postfix_str(" ".join(changed))
            other = best._replace(config=variant(*base, *changed), overrides=changed)
            tried.append((other, make_plan(other.config)))
    best, plan = fastest(tried)
    mine = {override.partition("=")[0] for override in best.overrides}
    kept = [*(o for o in base if o.partition("=")[0] not in mine), *(said[key] for key in fixed if _within(key, *FILED))]
    return Found(plan, (*kept, *best.overrides), tuple(tried))


def fastest(tried: Sequence[tuple[Candidate, Plan]]) -> tuple[Candidate, Plan]:
    """The one of those that fit with the lowest estimated time per token."""
    timed = [(plan.estimate.step / plan.tokens, candidate, plan) for candidate, plan in tried if plan.estimate and plan.fits]
    return min(timed, key=lambda each: each[0])[1:]


def check_writable(path: pathlib.Path) -> None:
    """Checks that a plan can be written to `path`, before the hours that a search may take.

    Raises `StorageError` when it cannot.
    """
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error.strerror) from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _unwritable(path, "no permission")


def _unwritable(path: pathlib.Path, why: str | None) -> StorageError:
    return StorageError(f"cannot write: {why}", where=str(path), next="search in your own checkout")


def file_plan(path: pathlib.Path, found: Found, asked: str, before: Callable[[], RunConfig]) -> str:
    """Writes what was found to `path`, with the figures of all that was tried; train takes it from there for this model on this mesh.

    A plan that is already there is compiled like the others, and stays unless it is beaten, no longer compiles or no longer fits. `asked`
    is the override that began the search, `before()` the config by the plan that is there. Returns what was done, as text.

    Raises `StorageError` when it cannot be written.
    """
    old, was = None, ""
    if path.is_file():
        try:
            old = make_plan(before())
            was = f"with {_line(old)}"
        except ConfigError as error:
            was = f"that cannot be compiled any more ({error.what.splitlines()[0]})"
    if old and old.fits and (_share(old) or 0) >= (_share(found.plan) or 0):
        return f"kept, as nothing better was found: {_line(old)}; delete it to write what was found"
    libtpu = importlib.metadata.version("libtpu")
    lines = [
        f"# {_line(found.plan)}, of {(found.plan.may or 0) / GIB:.2f} GiB",
        f"# Found by {asked} with jax {jax.__version__} and libtpu {libtpu}.",
        *([f"# In place of a plan {was}."] if was else []),
        "# Tried:",
        *(f"#   {' '.join(candidate.overrides)}: {_line(other)}" for candidate, other in found.tried),
        "overrides:",
        *(f"  - {override}" for override in found.overrides),
    ]
    try:
        path.write_text("\n".join(lines) + "\n")
    except OSError as error:
        raise _unwritable(path, error.strerror) from error
    return f"written{f', in place of a plan {was}' if was else ''}: train takes it for this model on this mesh"


def _share(plan: Plan) -> float | None:
    """The fraction of the peak, whatever the tokens of a row."""
    return plan.mfu(plan.flops.causal)


def _line(plan: Plan) -> str:
    if plan.estimate is None or not plan.fits:
        return "does not fit"
    host = plan.compiled.host / GIB if plan.compiled else 0
    memory = f"{(plan.needs or 0) / GIB:.2f} GiB" + (f" and {host:.2f} on the host" if host else "")
    return f"{memory}, {plan.tokens / plan.devices:,.0f} tokens per device, MFU {_share(plan) or 0:.1%} causal (estimate)"
