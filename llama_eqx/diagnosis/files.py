"""Files that are not what their names say, and JSON that may be damaged."""

import json
import pathlib
from typing import Any

from llama_eqx.diagnosis.report import Finding

READ = {".json", ".jinja", ".safetensors", ".model", ".pth", ".npy", ".yaml"}


def check_files(folder: pathlib.Path) -> list[Finding]:
    """Git LFS pointers, web pages and empty files in the place of a model's own."""
    findings = []
    for file in sorted(folder.iterdir()):
        if file.suffix not in READ or file.is_dir():
            continue
        if not file.exists():
            findings.append(Finding("error", file.name, "a link to a file that is not there", "download it again"))
        elif what := mistaken(file):
            findings.append(Finding("error", file.name, what, "git lfs pull" if "LFS" in what else "download it again"))
    return findings


def mistaken(file: pathlib.Path) -> str | None:
    """What a file is that should have been data, None if it may be that."""
    with file.open("rb") as stream:
        start = stream.read(512)
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer ({file.stat().st_size} bytes): the file itself was not downloaded"
    if start.lstrip().startswith(b"<") and b"html" in start.lower():
        return "a web page (HTML): the download was refused or redirected"
    return None


def read_json(file: pathlib.Path, findings: list[Finding]) -> dict[str, Any] | None:
    """The object in a file; None if there is none, which is added to `findings` unless the file is absent or something else altogether."""
    if not file.is_file() or mistaken(file):
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        findings.append(Finding("error", file.name, f"not JSON: {error}", "download or write it again"))
        return None
    if not isinstance(tree, dict):
        findings.append(Finding("error", file.name, "not a JSON object", "download or write it again"))
        return None
    return tree
