"""The folder where downloads, trained tokenizers and token shards are kept between runs."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_eqx.errors import StorageError
from llama_eqx.files import sync

DELETE = "delete this folder; it is made anew"


def cache_dir() -> Path:
    """Returns $LLAMA_EQX_CACHE, else $XDG_CACHE_HOME/llama_eqx, else ~/.cache/llama_eqx; a temporary folder if none is writable."""
    candidates = cache_candidates()
    wanted = next(candidates)
    for folder in (wanted, *candidates):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            if folder == _for_all() and not _private(folder):
                continue
        except OSError:
            continue
        if folder != wanted:
            logging.getLogger("llama_eqx").warning("cannot write %s: caching in %s instead", wanted, folder)
        return folder
    return Path(tempfile.mkdtemp(prefix="llama_eqx-"))


def publish(folder: Path, write: Callable[[Path], None]) -> Path:
    """Returns `folder`, filled by `write(temporary)` if it did not exist. It appears whole or not at all, even if other processes do the
    same.

    Raises `StorageError` when it cannot be written.
    """
    if folder.is_dir():
        return folder
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        write(temporary)
        for path in temporary.rglob("*"):  # it is whole after a power failure too, or not there
            sync(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
    except OSError as error:
        raise StorageError(f"cannot write: {error}", where=str(folder), next="free some space, or set LLAMA_EQX_CACHE=FOLDER") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def cache_candidates() -> Iterator[Path]:
    """Yields the folders that may hold the cache, the preferred one first."""
    if chosen := os.environ.get("LLAMA_EQX_CACHE"):
        yield Path(chosen).absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        yield Path(xdg).absolute() / "llama_eqx"
    with contextlib.suppress(RuntimeError):  # no home
        yield Path.home() / ".cache" / "llama_eqx"
    yield _for_all()


def _for_all() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    return Path(tempfile.gettempdir()) / f"llama_eqx-{user}"


def _private(folder: Path) -> bool:
    """Whether only this user can write there. In a place for all, somebody else may have made the folder first, and filled it."""
    found = folder.lstat()
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
