"""One writer for a run directory: a second one is refused, and told who the first is.

The operating system's lock tells at once whether a writer on this machine is alive. The lock of a writer on another machine may not reach
here over a network file system; such a writer is known by its heartbeat: it touches the lock file every `BEAT` seconds.
"""

import contextlib
import datetime
import errno
import fcntl
import functools
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from llama_eqx.errors import ConfigError, StorageError
from llama_eqx.files import MALFORMED

T = TypeVar("T")

LOCK = ".writer"
BEAT = 2.0  # seconds between signs of life
SILENT = 30.0  # seconds without one after which a writer on another machine is taken for dead
UNREAD = {"host": "another machine"}  # what is known of a holder that was just being written, or whose file is damaged
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # from file systems without locks


def sole_writer(job: Callable[..., T]) -> Callable[..., T]:
    """Runs `job(config, …)` as the only writer in `config.run_dir`. Of several processes of one run the first holds the lock for all."""

    @functools.wraps(job)
    def alone(config: Any, *rest: Any) -> T:
        from llama_eqx.processes import is_first

        with held(config.run_dir) if is_first() else contextlib.nullcontext():
            return job(config, *rest)

    return alone


@contextlib.contextmanager
def held(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """A context for all writing in `run_dir`, which is created if need be.

    Takes over the lock of a dead holder: at once if it was on this machine, else after `SILENT` seconds without a sign of life.

    Raises `ConfigError` naming the holder if it lives: at once on this machine, at its next heartbeat on another; and as `refuse_links`
    does. Raises `StorageError` when nothing can be written there.
    """
    folder, over = pathlib.Path(run_dir), threading.Event()
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_links(folder)
            file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            stack.callback(os.close, file)
            try:
                locked, before = _locked(file), _read(file)
            except BlockingIOError:
                raise _refusal(folder, _read(file)) from None
            if before and (not locked or before.get("machine") != machine()) and not _silent(folder, file):
                raise _refusal(folder, before)
            own = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid(), "since": time.time()}
            _write(file, own)
        except OSError as error:
            where, advice = str(error.filename or folder), "free some space or mend the permissions there, or another place: run_dir=FOLDER"
            raise StorageError(f"cannot write: {error.strerror}", where=where, next=advice) from None
        beating = threading.Thread(target=_beat, args=(folder, own, over), daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()
            with contextlib.suppress(OSError):  # a disk that is full or gone: the lock is free all the same
                _write(file, {})


def refuse_links(folder: pathlib.Path) -> None:
    """Raises `ConfigError` for a link in a run directory to a file elsewhere, which a run that writes here would overwrite. A link to a
    folder or a device is a choice of whoever runs here.
    """
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        to = pathlib.Path(os.path.realpath(path))
        if path.is_symlink() and (path.is_file() or not path.exists()) and not to.is_relative_to(os.path.realpath(folder)):
            raise ConfigError(
                f"a link that leads out of the run directory, to {to}",
                where=str(path),
                kept="what it leads to was not opened",
                next="remove the link or put the file itself there, or give another run_dir",
            )


def holder(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What the lock of a run directory says of its holder, alive or killed; empty if there is none."""
    with contextlib.suppress(OSError), pathlib.Path(run_dir, LOCK).open("rb") as file:
        return _read(file.fileno())
    return {}


def occupant(run_dir: str | os.PathLike[str]) -> str:
    """Who writes in a run directory, as far as can be told without waiting; empty if nobody does."""
    with contextlib.suppress(OSError), pathlib.Path(run_dir, LOCK).open("rb") as file:
        holder = _read(file.fileno())
        try:
            known = lock(file, fcntl.LOCK_SH) and holder.get("machine") == machine()
        except BlockingIOError:
            return _described(holder)
        if holder and not known and abs(_age(pathlib.Path(run_dir), file.fileno())) < SILENT:
            return _described(holder)
    return ""


def machine() -> str:
    """An id shared by all that runs on one kernel, and so shares its locks, whatever its host names."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def lock(file: int | IO, kind: int = fcntl.LOCK_EX) -> bool:
    """Locks an open file until it is closed. Returns False if the file system has no locks.

    Raises `BlockingIOError` when another process has the lock. Several may have a `LOCK_SH`, for which NFS lets a file be open to read.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _locked(file: int) -> bool:
    """Locks as `lock` does, and tries again for a moment: `occupant` has the lock while it looks."""
    for _ in range(10):
        with contextlib.suppress(BlockingIOError):
            return lock(file)
        time.sleep(0.02)
    return lock(file)


def _silent(folder: pathlib.Path, file: int) -> bool:
    """Waits for a sign of life, and returns whether there was none for `SILENT` seconds."""
    age = max(_age(folder, file), 0)  # negative where a clock was set back
    last, deadline = _seen(folder), time.monotonic() + SILENT - age
    if age < SILENT:
        print(f"waiting up to {SILENT - age:.0f} s for a sign of life from another writer in {folder}", file=sys.stderr, flush=True)
    while time.monotonic() < deadline:
        if _seen(folder) != last:
            return False
        time.sleep(0.1)
    return True


def _age(folder: pathlib.Path, file: int) -> float:
    probe = folder / f"{LOCK}.{os.getpid()}"
    probe.touch()  # the clock of the file system, which need not be ours
    age = probe.stat().st_mtime - os.fstat(file).st_mtime
    probe.unlink()
    return age


def _seen(folder: pathlib.Path) -> tuple[float, bytes]:
    with (folder / LOCK).open("rb") as file:  # opened anew: only then does NFS ask the server
        return os.fstat(file.fileno()).st_mtime, file.read()


def _beat(folder: pathlib.Path, own: dict[str, Any], over: threading.Event) -> None:
    gone = False
    while not over.wait(BEAT):
        with contextlib.suppress(OSError):  # the disk's errors show where the run writes
            if not gone and (gone := not (folder / LOCK).exists()):
                what = f"warning: {folder} was moved or removed while this run writes there: it goes on and saves checkpoints there"
                print(f"{what}, but its metrics.jsonl is where it was moved, or lost", file=sys.stderr, flush=True)
            with (folder / LOCK).open("rb") as file:
                taken = _read(file.fileno())
            if taken not in (own, UNREAD) and not over.is_set():
                print(_refusal(folder, taken, "silent for too long; another took the run directory"), file=sys.stderr, flush=True)
                os._exit(ConfigError.code)
            os.utime(folder / LOCK)


def _read(file: int) -> dict[str, Any]:
    content = os.pread(file, 4096, 0)
    with contextlib.suppress(*MALFORMED):
        found = json.loads(content or b"{}")
        if found == {} or (isinstance(found["machine"], str) and _described(found)):
            return found
    return UNREAD


def _write(file: int, holder: dict[str, Any]) -> None:
    text = json.dumps(holder).encode() if holder else b""
    os.ftruncate(file, 0)
    os.pwrite(file, text, 0)
    os.fsync(file)


def _refusal(folder: pathlib.Path, holder: dict[str, Any], what: str = "another process is writing in this run directory") -> ConfigError:
    return ConfigError(
        f"{what}: {_described(holder)}",
        where=str(folder),
        kept="its run is untouched",
        next="wait for its end, or give another run_dir",
    )


def _described(holder: dict[str, Any]) -> str:
    known = [f"process {holder['pid']}" if "pid" in holder else "a process"]
    known += [f"on {holder['host']}"] if "host" in holder else []
    known += [f"since {datetime.datetime.fromtimestamp(holder['since']):%Y-%m-%d %H:%M:%S}"] if "since" in holder else []
    return " ".join(known)
