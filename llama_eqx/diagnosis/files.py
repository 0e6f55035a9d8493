"""Files that are not what their names say, and files that are no longer as they were written."""

import pathlib
from typing import Any

from llama_eqx.checkpoint import restore
from llama_eqx.checkpoint.manifest import MANIFEST, find_damage
from llama_eqx.diagnosis.report import Finding, finding_of
from llama_eqx.errors import CheckpointError
from llama_eqx.files import json_object, mistaken
from llama_eqx.interop.files import inside

SUFFIXES = {".json", ".safetensors", ".model", ".pth", ".npy"}


def check_files(folder: pathlib.Path) -> list[Finding]:
    """Finds Git LFS pointers, web pages and empty files in the place of a model's own."""
    findings = []
    for file in sorted(folder.iterdir()):
        if file.suffix in SUFFIXES and not file.is_dir() and (what := mistaken(file, "")):
            hint = "git lfs pull" if "LFS" in what else "download it again"
            findings.append(Finding("error", file.name, what, hint))
    return findings


def check_manifest(folder: pathlib.Path, above: pathlib.Path) -> list[Finding]:
    """Finds damaged, missing and unlisted files by the SHA-256s of the folder's manifest, if it has one. Names are relative to `above`."""
    if not (folder / MANIFEST).is_file():
        return []
    try:
        damage = find_damage(folder)
    except CheckpointError as error:
        return [finding_of(error, folder, MANIFEST)]
    hint, within = "copy or convert it again, or if the change is yours see docs/convert.md", folder.relative_to(above)
    saved = restore.steps(folder.parent) if folder != above else []  # of a run
    if before := [step for step in saved if step < int(folder.name)]:
        hint = f"the same train command falls back to step {before[-1]}; if this is a copy of the run, copy it again"
    changed = [Finding("error", str(within / name), f"damaged: its SHA-256 is not that of {MANIFEST}", hint) for name in damage.damaged]
    missing = [Finding("error", str(within / name), f"missing, and listed in {MANIFEST}", hint) for name in damage.missing]
    return [*changed, *missing, *(Finding("note", str(within / name), f"not listed in {MANIFEST}") for name in damage.extra)]


def read_json(folder: pathlib.Path, name: str, findings: list[Finding]) -> dict[str, Any] | None:
    """The object in a file, or None. A file that cannot be read is added to `findings`, unless `check_files` reports it."""
    file = folder / name
    if not file.is_file() or mistaken(file, ""):
        return None
    try:
        return json_object(inside(folder, name), CheckpointError)
    except CheckpointError as error:
        findings.append(Finding("error", name, error.what, error.next))
        return None
