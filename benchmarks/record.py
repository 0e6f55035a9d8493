"""What every benchmark writes beside its numbers, and the check that the machine is idle."""

import json
import os
import pathlib
import platform
import sys
import time
from importlib import metadata
from typing import Any

MAX_BUSY = 0.25  # of one core: a ratio is wrong beside the threads of other work, above all PyTorch's, which spin
SECONDS = 3
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
    """Returns how many cores other processes keep busy now. The load average would still count work that ended a minute ago.

    Exits on a busy machine unless `loaded`.
    """
    busy = _seconds_busy()
    time.sleep(SECONDS)
    busy = round((_seconds_busy() - busy) / SECONDS, 2)
    if busy > MAX_BUSY and not loaded:
        sys.exit(f"others use {busy} of a core, and more than {MAX_BUSY} is too much\nnext: wait until the machine is idle")
    return busy


def _seconds_busy() -> float:
    """Returns the busy seconds of all cores since the machine was started. Linux only."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def circumstances(load: float, device: str = "cpu") -> dict[str, Any]:
    """Returns the date, the machine, the cores that others kept busy just before, and the versions of what was measured."""
    machine = {"processor": processor(), "cores": os.cpu_count(), "device": device, "busy_before": load}
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
    """Prints the table. With `out`, writes everything measured there as JSON, and the table beside it as Markdown."""
    print(table)
    if out is None:
        return
    facts = circumstances(load, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts | found, indent=1) + "\n")
    out.with_suffix(".md").write_text(f"{told(facts)}\n\n{table}\n")


def told(facts: dict[str, Any]) -> str:
    """Returns `circumstances` as one line."""
    machine = facts["machine"]
    said = f"{facts['date']}, {machine['cores']} cores of {machine['processor']}, {machine['busy_before']:.2f} of a core busy before, "
    return said + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
