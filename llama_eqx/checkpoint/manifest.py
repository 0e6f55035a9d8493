"""Folders that are whole or absent, with a list of what they hold."""

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from llama_eqx.checkpoint.store import MANIFEST, Place, checksums, content, put
from llama_eqx.crash import crash_point
from llama_eqx.errors import CheckpointError, StorageError
from llama_eqx.files import reading, sync
from llama_eqx.writer import lock


class Damage(NamedTuple):
    """Files that differ from the manifest, by name relative to the folder. `damaged` says how each differs."""

    damaged: dict[str, str]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    def lines(self) -> list[str]:
        return [f"{name}: {differs}" for name, differs in self.damaged.items()] + [f"{name}: missing" for name in self.missing]


@contextlib.contextmanager
def appearing(path: pathlib.Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
    """Yields a folder to fill. It becomes `path` in one move if the block ends without an error; otherwise nothing of it stays.

    A killed process leaves `.NAME.unfinished` and `.NAME.lock` beside it, which the next attempt removes.

    Raises `StorageError` when something is at `path` (an empty folder does not count) and may not be replaced, when another process fills a
    folder for the same `path`, or when the disk fails.
    """
    path = pathlib.Path(os.path.abspath(os.path.expanduser(path)))
    unfinished, old = path.with_name(f".{path.name}.unfinished"), path.with_name(f".{path.name}.old")
    try:
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(parents=True)
        with _alone(path):
            if os.path.lexists(path) and not replace and (not path.is_dir() or any(path.iterdir())):
                raise StorageError(
                    "it exists already", where=str(path), kept="what is in it", next="name another folder, or remove this one"
                )
            try:
                for rest in (unfinished, old):
                    shutil.rmtree(rest, ignore_errors=True)
                unfinished.mkdir()
                yield unfinished
                if replace and path.exists():
                    path.rename(old)
                unfinished.replace(path)
                sync(path.parent)
            finally:
                for rest in (unfinished, old):
                    shutil.rmtree(rest, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"it could not be saved: {error.strerror or error}",
            where=str(path),
            kept="nothing of it",
            next="free some space or mend the permissions there, or name another folder",
        ) from error


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Excludes other writers of `path`, where the file system has locks. The lock of a killed process is free."""
    beside = path.with_name(f".{path.name}.lock")
    with beside.open("w") as stream:
        try:
            lock(stream)
            if os.fstat(stream.fileno()).st_nlink == 0:  # its holder removed it after it was opened here; the next holder makes a new one
                raise BlockingIOError
        except BlockingIOError:
            kept, advice = "what it has written", "wait until it has ended, or name another folder"
            raise StorageError("another process is writing there", where=str(path), kept=kept, next=advice) from None
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)


class Digest:
    """The SHA-256 of a file as far as it was read, or its MD5, as in a store. `read` continues where it stopped, until `stop` is set."""

    def __init__(self, kind: Literal["sha256", "md5"] = "sha256") -> None:
        self.kind, self.hash, self.size = kind, hashlib.new(kind, usedforsecurity=False), 0

    def read(self, file: pathlib.Path, stop: threading.Event, *, advance: Callable[[int], object] = lambda size: None) -> dict[str, Any]:
        """Returns size and hash, as in a manifest."""
        block = bytearray(2**18)  # stays in the processor's cache: new memory costs as much as the hash
        with file.open("rb", buffering=0) as stream:
            stream.seek(self.size)
            while not stop.is_set() and (read := stream.readinto(block)):
                self.hash.update(memoryview(block)[:read])
                self.size += read
                advance(read)
        return {"size": self.size, self.kind: self.hash.hexdigest()}


@contextlib.contextmanager
def hashed_meanwhile(files: Callable[[], Mapping[str, pathlib.Path]]) -> Iterator[dict[str, Digest]]:
    """Hashes the files that `files` finds while they grow: the processor is free while the disk writes. For `write_manifest`.

    The files grow only at their ends, and this machine writes them. On a network file system, another machine's bytes may come in any
    order.
    """
    found, over = collections.defaultdict[str, Digest](Digest), threading.Event()

    def follow() -> None:
        with contextlib.suppress(OSError):  # the folder was renamed: all is written
            while not over.wait(0.02):
                grown = [(name, file) for name, file in files().items() if file.stat().st_size > found[name].size]
                _map(lambda each: found[each[0]].read(each[1], over), grown, over)

    thread = threading.Thread(target=follow, name="sha256", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def write_manifest(
    folder: Place, tree: Mapping[str, Any], *, hashed: Mapping[str, Digest] | None = None, show: bool = True, **facts: Any
) -> dict[str, Any]:
    """Writes `manifest.json`, the last file of a folder: size and SHA-256 of all others, and shape and dtype of the arrays in `tree`.

    By then every file is on the disk and not only in its cache. `facts` are further entries, in plain JSON. The last entry is the SHA-256
    of all the others. `hashed` is what `hashed_meanwhile` has hashed already. `show` shows a progress bar on a terminal. In a store, the
    manifest lists the store's own checksums. Returns what was written.
    """
    arrays = {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in tree.items()}
    said = {
        **facts,
        "tree": arrays,
        "files": _written(folder, hashed or {}, show) if isinstance(folder, pathlib.Path) else checksums(folder),
    }
    said["sha256"] = _own_digest(said)
    text = json.dumps(said, indent=1) + "\n"
    if isinstance(folder, pathlib.Path):
        _name_manifest(folder, text)
    else:
        crash_point("manifest")
        put(folder, {MANIFEST: text.encode()})
    return said


def _written(folder: pathlib.Path, begun: Mapping[str, Digest], show: bool) -> dict[str, dict[str, Any]]:
    """Flushes every file to the disk and hashes it."""
    names, stop = _files(folder), threading.Event()
    size, quiet = sum((folder / name).stat().st_size for name in names), None if show else True
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="sha256", disable=quiet)
    with bar, concurrent.futures.ThreadPoolExecutor(4) as disk:
        synced = [disk.submit(sync, folder / name) for name in names]  # the disk writes while the processor hashes
        found = _map(lambda name: begun.get(name, Digest()).read(folder / name, stop, advance=bar.update), names, stop)
        for each in synced:
            each.result()
    for directory in sorted({folder, *((folder / name).parent for name in names)}):
        sync(directory)
    return dict(zip(names, found, strict=True))


def _name_manifest(folder: pathlib.Path, text: str) -> None:
    unfinished = folder / f".{MANIFEST}.unfinished"
    with unfinished.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    crash_point("manifest")
    unfinished.replace(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Place) -> dict[str, Any]:
    """Returns the manifest. Raises `CheckpointError` when it is missing, damaged, or not a manifest."""
    with reading(folder / MANIFEST, CheckpointError, "the manifest cannot be read"):
        found = json.loads(content(folder, MANIFEST))
        if found["sha256"] != _own_digest({name: value for name, value in found.items() if name != "sha256"}):
            raise ValueError("its content does not match its own SHA-256")
        for name, entry in found["files"].items():
            if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts:
                raise ValueError(f"{name} lies outside of the folder")
            _ = int(entry["size"]), str(entry.get("sha256") or entry["md5"])
    return found


def find_damage(folder: Place, part: tuple[int, int] = (0, 1), stop: threading.Event | None = None, without: str | None = None) -> Damage:
    """Returns what in a folder differs from its manifest. `part` (i, n) checks every n-th file from the i-th on, to share the work. The
    folder `without` inside it is not checked.

    Files are hashed in parallel, at about 1.3 GB/s per core, until `stop` is set. Objects of a store are not read: it knows their
    checksums.
    """
    stop = threading.Event() if stop is None else stop
    listed = read_manifest(folder)["files"]
    listed = {name: entry for name, entry in listed.items() if pathlib.PurePath(name).parts[0] != without}
    names = sorted(listed)[part[0] :: part[1]]
    if isinstance(folder, pathlib.Path):
        present = [name for name in names if os.path.isfile(folder / name)]  # also False for what cannot be a name
        differ = _map(lambda name: _differs(folder / name, listed[name], stop), present, stop)
        there = _files(folder)
    else:
        stored = checksums(folder)
        present = [name for name in names if name in stored]
        differ = [_difference(stored[name], listed[name]) for name in present]
        there = [name for name in stored if name != MANIFEST]
    damaged = {name: differs for name, differs in zip(present, differ, strict=True) if differs}
    extra = {name for name in there if pathlib.PurePath(name).parts[0] != without} - {*listed}
    return Damage(damaged, tuple(sorted({*names} - {*present})), tuple(sorted(extra)))


def verify(
    folder: pathlib.Path, part: tuple[int, int] = (0, 1), stop: threading.Event | None = None, without: str | None = None
) -> tuple[str, ...]:
    """Returns the names of files that the manifest does not list.

    Raises `CheckpointError` naming every file that is damaged or missing.
    """
    found = find_damage(folder, part, stop, without)
    if found.damaged or found.missing:
        lines = [f"damaged: {name} ({differs})" for name, differs in found.damaged.items()] + [f"missing: {name}" for name in found.missing]
        lines += [f"not in the manifest: {name}" for name in found.extra]
        advice = "copy these files again, or convert again"
        edited = not found.missing and all(name.endswith((".json", ".jinja")) for name in found.damaged)  # perhaps by the user
        if edited and read_manifest(folder).get("format") in ("hf", "meta"):  # a run and a native folder need it
            advice += f"; if you changed them: {shlex.join(['rm', str(folder / MANIFEST)])}, and nothing is checked from then on"
        raise CheckpointError("files are not as they were written\n" + "\n".join(lines), where=str(folder), next=advice)
    return found.extra


def _files(folder: pathlib.Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, f".{MANIFEST}.unfinished"))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _differs(file: pathlib.Path, entry: Mapping[str, Any], stop: threading.Event) -> str:
    """How a file differs from its entry, for the user; empty if it does not."""
    try:
        if (size := file.stat().st_size) != entry["size"]:
            return _difference({"size": size}, entry)
        return _difference(Digest("md5" if "md5" in entry else "sha256").read(file, stop), entry)
    except OSError as error:  # such as a bad sector
        return f"cannot be read: {error.strerror or error}"


def _difference(found: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    if found["size"] != entry["size"]:
        return f"{found['size']:,} bytes, {entry['size']:,} expected"
    kind = "md5" if "md5" in entry else "sha256"  # md5: in a store, or in a copy of one
    return "" if found[kind] == entry[kind] else f"{kind} {found[kind][:8]}…, {entry[kind][:8]}… expected"


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _map(function: Callable[[Any], Any], names: list[Any], stop: threading.Event) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            return list(pool.map(function, names))
        except BaseException:  # such as an interruption: leaving the pool would wait for all that is under way
            stop.set()
            raise
