"""Under what conditions something was measured: what belongs beside every figure of time."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
from typing import Any


def conditions(*packages: str) -> dict[str, Any]:
    """The day, the machine, the load of its last minute, and the versions of Python and of `packages`."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if pathlib.Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {"python": platform.python_version(), **{package: importlib.metadata.version(package) for package in packages}}
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions,
    }
