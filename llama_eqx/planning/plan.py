"""What a run would take on devices that need not be here: whether it fits, and an estimate of how fast it would be."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from llama_eqx.errors import ConfigError, StorageError
from llama_eqx.flops import Flops, flops_per_token, mfu
from llama_eqx.planning.chips import CHIPS, GIB, Torus
from llama_eqx.planning.compile import Compiled, TooBig, build_mesh, compile_step
from llama_eqx.planning.estimate import Estimate, estimate
from llama_eqx.planning.memory import Memory, memory_by_part
from llama_eqx.sharding import MESH_AXES, Layout
from llama_eqx.training.optimizer import learning
from llama_eqx.training.program import make_program
from llama_eqx.training.run import RunConfig, with_vocab

FORMULA = 1.1  # the factor by which the memory by formula may be off


class PlanConfig(RunConfig):
    """A run, and whether to `search` for settings that make it fast on its mesh; a number ends the search when so many fit."""

    search: bool | int


@dataclasses.dataclass(frozen=True)
class Plan:
    """`needs` is the bytes per device that the compiler found necessary, `may` what it has; either is None where it does not say.

    `remarks` are what a run with these settings would say too. `compiled` is None when the compiler refused the step for its memory,
    `estimate` when there is no model of the device's time.
    """

    config: RunConfig
    devices: int
    device_kind: str
    axes: dict[str, int]
    flops: Flops
    memory: Memory
    remarks: tuple[str, ...]
    needs: int | None
    may: int | None
    compiled: Compiled | None
    estimate: Estimate | None

    @property
    def fits(self) -> bool:
        return self.compiled is not None and not (self.needs and self.may and self.needs > self.may) and self.host_excess == 0

    @property
    def host_excess(self) -> float:
        """Bytes per device that the step puts into its host's memory beyond what is there."""
        if self.compiled is None or self.device_kind not in CHIPS:
            return 0.0
        return max(0.0, self.compiled.host - CHIPS[self.device_kind].host)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.train.batch_size * self.config.train.seq_len

    def mfu(self, flops: int) -> float | None:
        return mfu(self.tokens / self.estimate.step, flops, self.device_kind, self.devices) if self.estimate else None


def make_plan(config: RunConfig) -> Plan:
    """Compiles the step of a run for its mesh.

    Raises `ConfigError` when the sizes do not fit the mesh, `UserError` when the TPU compiler is not installed.
    """
    if config.model.dims.vocab is None:
        config = with_vocab(config, config.tokenizer.build(config.data))
    layout = Layout(build_mesh(config.mesh), config.sharding)
    program = make_program(config, layout)
    kind = layout.mesh.devices.flat[0].device_kind
    compiled, needs, may = None, None, _memory_of(layout)
    try:
        compiled = compile_step(config, program, layout)
        needs = compiled.peak
    except TooBig as error:
        needs, may = error.needs, error.may or may
    timed = compiled is not None and config.mesh.topology is not None and kind in CHIPS
    return Plan(
        config=config,
        devices=layout.mesh.size,
        device_kind=kind,
        axes={axis: layout.mesh.shape[axis] for axis in MESH_AXES},
        flops=flops_per_token(program.shapes.model, config.train.seq_len, learning(config.train.only, program.shapes.model)),
        memory=memory_by_part(config, program, layout),
        remarks=tuple(program.remarks),
        needs=needs,
        may=may,
        compiled=compiled,
        estimate=estimate(compiled.text, Torus.of(layout.mesh.devices.flat)) if compiled and timed else None,
    )


def figures(plan: Plan) -> dict[str, Any]:
    """The content of `plan.json`: bytes are per device, what ends in `_estimate` was not measured."""
    seconds = plan.estimate
    return {
        "fits": plan.fits,
        "peak_bytes_per_device": plan.needs,
        "memory_bytes_per_device": plan.may,
        "tokens_per_device": plan.tokens / plan.devices,
        "step_seconds_estimate": seconds and seconds.step,
        "mfu_causal_estimate": plan.mfu(plan.flops.causal),
        "mfu_palm_estimate": plan.mfu(plan.flops.palm),
        "tokens_per_second_estimate": seconds and plan.tokens / seconds.step,
        "compute_seconds_estimate": seconds and seconds.compute,
        "exposed_seconds_estimate": seconds and seconds.exposed,
        "flops_per_token": plan.flops._asdict(),
        "memory_by_formula": plan.memory._asdict(),
        "compiler": plan.compiled and {name: value for name, value in plan.compiled._asdict().items() if name != "text"},
        "collectives": seconds
        and [
            {"kind": kind, "asynchronous": asynchronous, "count": t.count, "bytes": t.bytes, "seconds_estimate": t.seconds}
            for (kind, asynchronous), t in sorted(seconds.traffic.items())
        ],
        "remarks": list(plan.remarks),
        "doubts": list(seconds.doubts) if seconds else [],
        "devices": plan.devices,
        "device_kind": plan.device_kind,
        "axes": plan.axes,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu") if importlib.util.find_spec(name)},
    }


def report(plan: Plan, advice: str = "") -> str:
    """The plan as text."""
    compiled, seconds, memory = plan.compiled, plan.estimate, plan.memory
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.axes.items() if size > 1) or "one device"
    parts = "  ".join(f"{name} {_size(size)}" for name, size in memory._asdict().items())
    size, length = plan.config.train.batch_size, plan.config.train.seq_len
    rows = {
        "mesh": f"{plan.devices} x {plan.device_kind}: {axes}",
        "fits": _fits(plan),
        "by formula": f"{parts}  at the peak {_size(memory.total)}",
    }
    if compiled:
        rows["compiler"] = (
            f"arguments {_size(compiled.arguments)}  temporary {_size(compiled.temporary)}  peak {_size(compiled.peak)} per device"
            + (f"; {_size(compiled.host)} on the host" if compiled.host else "")
            + f"; {compiled.compile_seconds:.0f} s to compile"
        )
    rows["batch"] = f"{size:,} x {length:,} tokens = {plan.tokens / plan.devices:,.0f} per device"
    rows["FLOPs"] = f"{plan.flops.causal / 1e9:,.2f} G per token causal, {plan.flops.palm / 1e9:,.2f} G by PaLM's convention"
    if seconds:
        for (kind, asynchronous), traffic in sorted(seconds.traffic.items()):
            how = "asynchronous" if asynchronous else "synchronous"
            amount = f"{traffic.count:,.0f} x, {_size(traffic.bytes)}, {traffic.seconds * 1e3:,.1f} ms if alone (estimate)"
            rows[kind + (" " if asynchronous else "")] = f"{how}, {amount}"
        rate = plan.tokens / seconds.step / plan.devices
        rows["step"] = (
            f"{seconds.step:.3f} s (estimate): compute {seconds.compute:.3f} s, of it attention kernels {seconds.kernels:.3f}; "
            f"waiting for data {seconds.exposed:.3f}"
        )
        rows["speed"] = f"{rate:,.0f} tokens/s per device (estimate)"
        rows["MFU"] = f"{plan.mfu(plan.flops.causal):.1%} causal, {plan.mfu(plan.flops.palm):.1%} PaLM (estimates, see docs/plan.md)"
        rows |= {"doubt " * i: text for i, text in enumerate(seconds.doubts, 1)}
    elif compiled:
        rows["step"] = "no estimate: only TPU compilers say how long a step takes"
    rows |= {"note" + " " * i: text for i, text in enumerate(plan.remarks)}
    if advice:
        rows["next"] = advice
    return "\n".join(f"{name:<20}{text}" for name, text in rows.items())


def save(plan: Plan, run_dir: str) -> pathlib.Path:
    """Writes `plan.json`.

    Raises `StorageError` when it cannot.
    """
    path = pathlib.Path(run_dir, "plan.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures(plan), indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror}", where=str(path), next="another place: run_dir=FOLDER") from error
    return path


def shrink(plan: Plan, variant: Callable[..., RunConfig]) -> str:
    """For a plan that does not fit: which part to shrink, and the overrides that would make it fit by the formula.

    `variant(*overrides)` is the config of the plan with overrides added to it.
    """
    state = plan.memory.parameters + plan.memory.optimizer + plan.memory.gradients + plan.memory.copies
    parts = {"the state of the model": state, "activations": plan.memory.activations + plan.memory.block, "logits": plan.memory.logits}
    largest = max(parts, key=parts.__getitem__)
    said = f"{largest} {'take' if largest[-1] == 's' else 'takes'} most, {_size(parts[largest])} by formula"
    scale = plan.needs / plan.memory.total if plan.needs else 1.0
    rows = plan.config.train.microbatch_size or plan.config.train.batch_size
    smaller = [["loss.chunk=2048"]] if largest == "logits" else []
    smaller += [["remat=full"]]
    for part in (rows >> n for n in range(1, rows.bit_length()) if rows % 2**n == 0):
        smaller += [[f"train.microbatch_size={part}"], ["remat=full", f"train.microbatch_size={part}"]]
    # A device then holds a part of a row. Rows at a time are as few as there are groups of devices that share one.
    for ways in (2**n for n in range(1, plan.devices.bit_length()) if 2**n > plan.axes.get("sequence", 1)):
        part = max(plan.devices // ways // plan.axes.get("tensor", 1), 1)
        microbatch = [f"train.microbatch_size={part}"] if part < rows else []
        smaller += [["remat=full", *microbatch, "sharding=sequence", f"mesh.sequence={ways}"]]
    refused, composed = "", False
    for overrides in smaller if plan.may else []:
        try:
            config = dataclasses.replace(variant(*overrides), model=plan.config.model)  # whose vocabulary is known
            layout = Layout(build_mesh(config.mesh), config.sharding)
            memory = memory_by_part(config, make_program(config, layout), layout)
        except ConfigError as error:
            refused = refused or error.what
            continue
        composed = True
        if FORMULA * max(scale, 1.0) * memory.total < (plan.may or 0):
            return f"{said}; it would fit with {' '.join(overrides)}"
    if refused and not composed:
        return f"{said}; smaller settings could not be tried: {refused}"
    tried = "remat=full, a smaller train.microbatch_size nor sharding=sequence"
    tried = tried if plan.devices > 1 else "remat=full nor a smaller train.microbatch_size"
    return f"{said}; neither {tried} is enough: more devices"


def _fits(plan: Plan) -> str:
    if plan.compiled and plan.host_excess:
        host = plan.compiled.host
        return f"no: needs {_size(host)} of host memory per device, and the host has {_size(host - plan.host_excess)} for each"
    if plan.needs is None or plan.may is None:
        return "yes" if plan.fits else "no"
    spare = plan.may - plan.needs
    if spare >= 0:
        return f"yes: {_size(plan.needs)} of {_size(plan.may)} per device, {_size(spare)} to spare"
    return f"no: too big by {_size(-spare)}, needs {_size(plan.needs)} of {_size(plan.may)} per device"


def _memory_of(layout: Layout) -> int | None:
    """The bytes of a device's memory, None where it is unknown. A CPU's devices share the machine's."""
    device: Any = layout.mesh.devices.flat[0]
    if device.device_kind in CHIPS:
        return int(CHIPS[device.device_kind].memory)
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // layout.mesh.size * jax.process_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def _size(size: int | float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
