"""What is wrong with this machine: versions, devices, memory, folders."""

import importlib.metadata
import os
import pathlib
import platform
import shutil
import tempfile
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

from llama_eqx.data.cache import cache_candidates, cache_dir
from llama_eqx.diagnosis.report import Finding, Report
from llama_eqx.errors import first_line

PYPROJECT = pathlib.Path(__file__).resolve().parents[2] / "pyproject.toml"
LOCK = pathlib.Path("/tmp/libtpu_lockfile")
ROOM = 5 * 10**9  # bytes of disk below which a run may not find room for its checkpoints
# Versions that install without complaint and still go wrong, and how.
BAD = {
    "torch<2.10": "torch.load(weights_only=True) can be made to run code (CVE-2025-32434, CVE-2026-24747)",
    "transformers<5.3,>=4.56": "the config of a model can make it run code (CVE-2026-4372)",
    "hydra-core>=1.4.0.dev0": "pre-releases bring another omegaconf, which composes differently",
}


def examine_environment() -> Report:
    findings: list[Finding] = []
    facts = [f"Python {platform.python_version()}, {platform.system()} {platform.machine()}", check_versions(requirements(), findings)]
    if check_lock(LOCK, findings):
        facts.append(_check_devices(findings))
    facts += [_memory(), *_check_folders(findings)]
    return Report("this machine", tuple(facts), tuple(findings))


def requirements() -> list[Requirement]:
    """What this package needs, according to its checkout, or else to what pip noted when it was installed."""
    if PYPROJECT.is_file():
        lines = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = importlib.metadata.requires("llama_eqx") or []
    found = [Requirement(line) for line in lines]
    return [requirement for requirement in found if requirement.marker is None]  # the others belong to extras


def check_versions(wanted: list[Requirement], findings: list[Finding]) -> str:
    """The versions that matter, in a line. Those that do not fit are added to `findings`."""
    for requirement in wanted:
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            what = f"{found or 'not installed'}, but {requirement.specifier} is needed"
            findings.append(Finding("error", requirement.name, what, f"pip install '{requirement}'"))
    for line, harm in BAD.items():
        bad = Requirement(line)
        found = _version(bad.name)
        if found is not None and bad.specifier.contains(found, prereleases=True):
            findings.append(Finding("warning", bad.name, f"{found}: {harm}", f"pip install -U {bad.name}"))
    jax = _version("jax")
    for name in ("jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt"):
        found = _version(name)
        if jax and found and Version(found).release[:3] != Version(jax).release[:3]:
            what = f"{found} with jax {jax}: they must have the same version"
            findings.append(Finding("error", name, what, f"pip install '{name}=={jax}'"))
    if os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true"):
        what = "turns what is meant to be float32 into float64: slower, and no result is as documented"
        findings.append(Finding("warning", "JAX_ENABLE_X64", what, "unset JAX_ENABLE_X64"))
    shown = ("jax", "jaxlib", "equinox", "optax", "grain", "orbax-checkpoint", "hydra-core", "libtpu", "transformers", "torch")
    return ", ".join(f"{name} {found}" for name in shown if (found := _version(name)))


def check_lock(lock: pathlib.Path, findings: list[Finding]) -> bool:
    """Whether the TPU can be opened: libtpu lets one process in, and a lock left by another user keeps everybody out."""
    if _version("libtpu") is None or not lock.exists() or os.environ.get("ALLOW_MULTIPLE_LIBTPU_LOAD"):
        return True
    if not os.access(lock, os.W_OK):
        findings.append(Finding("error", str(lock), "belongs to another user: libtpu cannot start", f"sudo rm {lock}"))
        return False
    locks, here = pathlib.Path("/proc/locks"), lock.stat()
    place = f"{os.major(here.st_dev):02x}:{os.minor(here.st_dev):02x}:{here.st_ino}"
    holders = [line.split() for line in locks.read_text().splitlines() if f" {place} " in line] if locks.is_file() else []
    if holders:
        what = f"process {holders[0][4]} holds the TPU, so its devices were not checked"
        findings.append(Finding("warning", str(lock), what, "wait for it, or JAX_PLATFORMS=cpu to work without"))
    return not holders


def _check_devices(findings: list[Finding]) -> str:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        findings.append(Finding("error", "jax", f"no device can be used: {first_line(error)}", "JAX_PLATFORMS=cpu"))
        return "devices: none"
    first = devices[0]
    if first.platform == "cpu":
        here = {"an NVIDIA GPU": "/dev/nvidia0", "a TPU": "/dev/accel0"}
        for name, extra in {"an NVIDIA GPU": "cuda", "a TPU": "tpu"}.items():
            if pathlib.Path(here[name]).exists():
                hidden = os.environ.get("JAX_PLATFORMS")
                hint = "unset JAX_PLATFORMS" if hidden else f"pip install 'llama_eqx[{extra}]'"
                findings.append(Finding("note" if hidden else "warning", "jax", f"there is {name} here, but JAX does not use it", hint))
    limit = (first.memory_stats() or {}).get("bytes_limit")
    return f"devices: {len(devices)} x {first.device_kind}" + (f" with {limit / 2**30:.1f} GiB each" if limit else "")


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = pathlib.Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    free = [f", {int(line.split()[1]) * 1024 / 2**30:.1f} GiB of it available" for line in lines if line.startswith("MemAvailable:")]
    return f"memory: {total / 2**30:.1f} GiB{''.join(free)}; {os.cpu_count()} CPU cores"


def _check_folders(findings: list[Finding]) -> list[str]:
    wanted, found = next(cache_candidates()), cache_dir()
    if found != wanted:
        what = f"cannot be written: downloads and tokens are kept in {found}, which may not last"
        findings.append(Finding("warning", str(wanted), what, "LLAMA_EQX_CACHE=FOLDER"))
    here = pathlib.Path.cwd()
    try:
        tempfile.TemporaryFile(dir=here).close()
    except OSError as error:
        what = f"cannot be written: {error.strerror}. Runs are written to outputs/ in it"
        findings.append(Finding("warning", str(here), what, "work in another folder, or run_dir=FOLDER"))
    facts = []
    for name, folder in {"cache": found, "this folder": here}.items():
        free = shutil.disk_usage(folder).free
        facts.append(f"{name}: {folder}, {free / 1e9:.1f} GB free")
        if free < ROOM:
            what = f"{free / 1e9:.1f} GB are free on its disk: checkpoints may not fit"
            findings.append(Finding("warning", str(folder), what, "free some space, or work on another disk"))
    return facts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
