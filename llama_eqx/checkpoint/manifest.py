"""Folders that are whole or not there, with a list of what they hold."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

from llama_eqx.errors import CheckpointError, StorageError

MANIFEST = "manifest.json"


class Damage(NamedTuple):
    """Files that are not as the manifest lists them, each with what is wrong; names relative to the folder."""

    damaged: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


@contextlib.contextmanager
def appearing(path: pathlib.Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
    """A folder to fill, which becomes `path` in one move when the block ends well; else nothing of it stays.

    A process that is killed leaves `.NAME.unfinished` beside it, which the next attempt clears away.

    Raises `StorageError` when there is something at `path` (an empty folder is nothing) unless it may be replaced, or the disk fails.
    """
    path = pathlib.Path(os.path.abspath(path))
    unfinished, old = path.with_name(f".{path.name}.unfinished"), path.with_name(f".{path.name}.old")
    try:
        if os.path.lexists(path) and not replace and (not path.is_dir() or any(path.iterdir())):
            raise StorageError("it exists already", where=str(path), kept="what is in it", next="name another folder, or remove this one")
        for rest in (unfinished, old):
            shutil.rmtree(rest, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        if replace and path.exists():
            path.rename(old)
        unfinished.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise StorageError(
            f"it could not be saved: {error.strerror or error}",
            where=str(path),
            kept="nothing of it",
            next="free some space or mend the permissions there, or name another folder",
        ) from error
    finally:
        for rest in (unfinished, old):
            shutil.rmtree(rest, ignore_errors=True)


def write_manifest(folder: pathlib.Path, tree: Mapping[str, Any], **facts: Any) -> None:
    """`manifest.json`, the last file of a folder: size and SHA-256 of all others, and shape and dtype of the arrays in `tree`.

    By then every file is on the disk and not only in its cache. `facts` are further entries, plain JSON.
    """
    names, stop = _files(folder), threading.Event()
    with tqdm(total=sum((folder / name).stat().st_size for name in names), unit="B", unit_scale=True, desc="sha256", disable=None) as bar:
        found = _map(lambda name: _digest(folder / name, stop, sync=True, advance=bar.update), names, stop)
    entries = dict(zip(names, found, strict=True))
    arrays = {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in tree.items()}
    content = json.dumps({**facts, "tree": arrays, "files": entries}, indent=1) + "\n"
    unfinished = folder / f".{MANIFEST}.unfinished"
    with unfinished.open("w", encoding="utf-8") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(folder / MANIFEST)
    for directory in sorted({folder, *((folder / name).parent for name in names)}):
        _sync(directory)


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Raises `CheckpointError` when there is none, or it is not a manifest."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in found["files"].items():
            if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts:
                raise ValueError(f"{name} lies outside of the folder")
            _ = int(entry["size"]), str(entry["sha256"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"no manifest can be read: {type(error).__name__}: {error}", where=str(folder / MANIFEST)) from error
    return found


def find_damage(folder: pathlib.Path, part: tuple[int, int] = (0, 1), stop: threading.Event | None = None) -> Damage:
    """What in a folder is not as its manifest says. `part`: (i, n) looks at every n-th file from the i-th on, to share the work.

    Files are hashed side by side, at some 1.3 GB/s a core, until `stop` is set.
    """
    stop = threading.Event() if stop is None else stop
    listed = read_manifest(folder)["files"]
    names = sorted(listed)[part[0] :: part[1]]
    present = [name for name in names if os.path.isfile(folder / name)]  # False, too, for what cannot be a name
    differ = _map(lambda name: _differs(folder / name, listed[name], stop), present, stop)
    damaged = [name for name, differs in zip(present, differ, strict=True) if differs]
    return Damage(tuple(damaged), tuple(sorted({*names} - {*present})), tuple(sorted({*_files(folder)} - {*listed})))


def verify(folder: pathlib.Path, part: tuple[int, int] = (0, 1), stop: threading.Event | None = None) -> tuple[str, ...]:
    """The names of files that the manifest does not list.

    Raises `CheckpointError` naming every file that is damaged or missing.
    """
    found = find_damage(folder, part, stop)
    if found.damaged or found.missing:
        lines = [f"damaged: {name}" for name in found.damaged] + [f"missing: {name}" for name in found.missing]
        lines += [f"not in the manifest: {name}" for name in found.extra]
        raise CheckpointError(
            "files are not as they were written\n" + "\n".join(lines), where=str(folder), next="copy these files again, or convert again"
        )
    return found.extra


def _files(folder: pathlib.Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, f".{MANIFEST}.unfinished"))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _differs(file: pathlib.Path, entry: Mapping[str, Any], stop: threading.Event) -> bool:
    return file.stat().st_size != entry["size"] or _digest(file, stop)["sha256"] != entry["sha256"]


def _digest(
    file: pathlib.Path, stop: threading.Event, *, sync: bool = False, advance: Callable[[int], object] = lambda size: None
) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while (block := stream.read(2**22)) and not stop.is_set():
            digest.update(block)
            size += len(block)
            advance(len(block))
        if sync:
            os.fsync(stream.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _map(function: Callable[[str], Any], names: list[str], stop: threading.Event) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            return list(pool.map(function, names))
        except BaseException:  # an interruption, for one: leaving the pool would wait for all that is under way
            stop.set()
            raise


def _sync(directory: pathlib.Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
