"""Where a run's numbers come from: the code and its commit, the versions of the libraries, and what they are computed on."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

from llama_eqx.extensions import folders

PACKAGE = pathlib.Path(__file__).resolve().parent.parent
LIBRARIES = ("llama_eqx", "jax", "jaxlib", "equinox", "optax", "grain", "orbax-checkpoint", "numpy")


def software() -> dict[str, Any]:
    """What computed a number: `code`, `commit`, the commits of the `extensions`, and the `versions` of the libraries."""
    return {"code": code(), "commit": commit(), "extensions": extension_commits(), "versions": versions()}


def versions() -> dict[str, str]:
    """Versions by name. Libraries that are not installed are left out, as is llama_eqx when it runs from a checkout."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def computed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What affects the order in which numbers are summed, and so their last bits: devices, and how work is spread over them."""
    found = jax.devices()
    chosen = {name: settings[name] for name in ("mesh", "sharding", "remat", "kernel") if name in settings}
    for group, names in {"train": ("microbatch_size", "unroll"), "loss": ("chunk",)}.items():
        chosen[group] = {name: settings[group][name] for name in names if name in settings.get(group, {})}
    return {"processes": jax.process_count(), "devices": len(found), "kind": found[0].device_kind, **chosen}


def jax_settings() -> dict[str, Any]:
    """JAX's own settings that affect numbers: what is drawn, and how precisely it is computed."""
    names = ("enable_x64", "default_prng_impl", "threefry_partitionable", "default_matmul_precision")
    return {name: getattr(jax.config, f"jax_{name}") for name in names}


def code() -> dict[str, str]:
    """By name, a hash of the source files of this package and of each extension. Commits may share it; modified checkouts may differ."""
    return {folder.name: _hash(folder) for folder in (PACKAGE, *folders())}


def _hash(folder: pathlib.Path) -> str:
    found = hashlib.sha256()
    for name in sorted(str(file.relative_to(folder)) for file in folder.rglob("*.py")):
        if not any(part.startswith(".") for part in pathlib.Path(name).parts):  # such as the lock of an editor
            found.update(f"{name}\0".encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return found.hexdigest()[:12]


def commit() -> str | None:
    """The commit that this package was checked out from, with "-dirty" if the package or `conf` beside it has changed since.

    None when it does not run from a checkout: a repository that happens to contain an installed package says nothing about it.
    """
    return _commit(PACKAGE, "config.py", "../conf")


def extension_commits() -> dict[str, str | None]:
    """By name, the commit of each extension as of `commit`. An extension's YAML is within its folder."""
    return {folder.name: _commit(folder, "__init__.py") for folder in folders()}


def _commit(folder: pathlib.Path, file: str, *beside: str) -> str | None:
    """The commit of the repository that has `file` of this folder, with "-dirty" if the folder, or what is `beside` it, has changed."""
    compiled = ":(exclude,glob)**/__pycache__/**"  # a repository may not ignore it
    try:
        _git(folder, "ls-files", "--error-unmatch", file)
        head = _git(folder, "rev-parse", "HEAD").strip()
        return head + "-dirty" * bool(_git(folder, "status", "--porcelain", "--", ".", *beside, compiled))
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: pathlib.Path, *arguments: str) -> str:
    # Reading the status may otherwise take a lock on the index, and so disturb a commit being made.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    return subprocess.run(["git", *arguments], cwd=folder, env=environment, check=True, capture_output=True, text=True, timeout=10).stdout
