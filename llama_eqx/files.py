"""How files are read back and written, so that a torn one is told and none is made."""

import contextlib
import json
import os
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llama_eqx.errors import UserError

# What comes of content that is torn, or of another shape than its reader expects.
MALFORMED = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError, EOFError, zlib.error)


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], error: type[UserError], what: str, *, kept: str = "", next: str = "") -> Iterator[None]:
    """A context that reads a file and takes its content apart. If it is missing, torn or malformed, raises `error` with `what` and why."""
    try:
        yield
    except (OSError, *MALFORMED) as found:
        why = found.strerror if isinstance(found, OSError) and found.strerror else f"{type(found).__name__}: {found}"
        raise error(f"{what}: {why[:500]}", where=str(path), kept=kept, next=next) from found


def json_object(file: Path, error: type[UserError], *, next: str = "download it again") -> dict[str, Any]:
    """The object in a JSON file. Raises `error` saying what is there instead."""
    try:
        tree = json.loads(file.read_bytes())
    except OSError:
        raise error("no such file", where=str(file), next=next) from None
    except (ValueError, RecursionError) as found:
        raise error(mistaken(file, f"not JSON: {found}"), where=str(file), next=next) from None
    if not isinstance(tree, dict):
        raise error("not a JSON object", where=str(file), next=next)
    return tree


def mistaken(file: Path, otherwise: str) -> str:
    """Says what a file really is that should hold weights or settings; `otherwise` if it is nothing well known."""
    if not file.is_file():
        return "no such file"
    with file.open("rb") as stream:
        return stand_in(stream.read(512)) or otherwise


def stand_in(start: bytes) -> str:
    """What a failed download has left in the place of a file that begins like this; "" if it may be the file itself."""
    start = start[:512].lstrip().lower()
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: it was not downloaded (git lfs pull)"
    if start.startswith((b"<!", b"<html", b"<head", b"<body", b"<?xml")):  # a chat template may begin with <|start|>
        return "a web page (HTML), not the file itself: the download was refused or redirected"
    return ""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that appears under its name once it is whole and on disk."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    with whole(path) as file:
        file.write(content)


def write_json(path: Path, tree: Any, *, indent: int = 1) -> None:
    write(path, json.dumps(tree, indent=indent).encode() + b"\n")


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
