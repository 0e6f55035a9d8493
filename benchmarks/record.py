"""What every benchmark writes beside its numbers, and when it refuses to measure."""

import json
import os
import pathlib
import platform
import sys
import time
from importlib import metadata
from typing import Any

MAX_LOAD = 0.6  # a neighbour's threads make a ratio a lie, above all PyTorch's, which spin
PACKAGES = (
    "jax",
    "jaxlib",
    "equinox",
    "optax",
    "grain",
    "orbax-checkpoint",
    "torch",
    "transformers",
    "numpy",
    "sentencepiece",
    "tiktoken",
    "tokenizers",
)


def idle(loaded: bool = False) -> float:
    """How many cores are in use, over a second. Exits on a busy machine unless it may be `loaded`."""
    load = in_use()
    if load > MAX_LOAD and not loaded:
        sys.exit(f"load {load:.2f} is above {MAX_LOAD}\nnext: wait until the machine is idle")
    return load


def in_use() -> float:
    """Cores, over a second; where the system does not say, the load of the last minute."""
    stat = pathlib.Path("/proc/stat")
    if not stat.is_file():
        return os.getloadavg()[0]

    def busy() -> float:
        ticks = list(map(int, stat.read_text().split(maxsplit=9)[1:9]))
        return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")  # without idle and waiting

    before, begun = busy(), time.perf_counter()
    time.sleep(1)
    return (busy() - before) / (time.perf_counter() - begun)


def circumstances(load: float, device: str = "cpu") -> dict[str, Any]:
    """Date, machine, the load before, and the versions of what was measured."""
    machine = {"processor": processor(), "cores": os.cpu_count(), "device": device, "load_before": load}
    return {"date": time.strftime("%Y-%m-%d"), "machine": machine, "python": platform.python_version(), "versions": versions()}


def processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(out: pathlib.Path | None, found: dict[str, Any], table: str, load: float, device: str = "cpu") -> None:
    """Prints the table; with `out`, writes it and everything measured there, as Markdown and JSON."""
    print(table)
    if out is None:
        return
    facts = circumstances(load, device)
    machine = facts["machine"]
    said = f"{facts['date']}, {machine['cores']} cores of {machine['processor']}, load before {load:.2f}, "
    said += ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts | found, indent=1) + "\n")
    out.with_suffix(".md").write_text(f"{said}\n\n{table}\n")
