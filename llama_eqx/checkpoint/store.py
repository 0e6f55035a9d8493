"""Object stores: `gs://BUCKET/FOLDER` in place of a folder on a disk.

A store has no atomic rename and no fsync, but an object is there in whole or not at all. So what is written last says that the rest is
there. A store knows the checksum of every object, so none is read to be verified.
"""

import base64
import contextlib
import importlib.util
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from llama_eqx.errors import ConfigError, StorageError, UserError, first_line
from llama_eqx.files import write

Place = pathlib.Path | epath.Path
SCHEME = "gs://"
MANIFEST = "manifest.json"
RECORDS = ("config.yaml", "study.json", "provenance.jsonl", "metrics.jsonl")  # of a run directory, needed to continue elsewhere


def place(path: str | os.PathLike[str]) -> Place:
    """Returns a folder on a disk or in a store. Raises `ConfigError` when the library for the store is missing."""
    if not os.fspath(path).startswith(SCHEME):
        return pathlib.Path(path).resolve()
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError("Google's object store needs gcsfs", where=os.fspath(path), next="pip install 'llama_eqx[gcs]'")
    return epath.Path(path)


def is_remote(folder: Place) -> bool:
    return not isinstance(folder, pathlib.Path)


@contextlib.contextmanager
def asked(folder: Place) -> Iterator[Any]:
    """Yields a store with its cache cleared. Raises `StorageError` for its errors, so that none is taken for a missing file."""
    import fsspec

    store = fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath uses, and so Orbax
    store.invalidate_cache()
    try:
        yield store
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:  # each library has its own
        raise StorageError(
            f"the object store says: {first_line(error)}",
            where=str(folder),
            next="look at the bucket's name and your rights (gcloud auth application-default login)",
        ) from error


def children(folder: Place) -> list[str]:
    """The names in a folder; empty if there is no such folder."""
    if isinstance(folder, pathlib.Path):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return os.listdir(folder)
        return []
    with asked(folder) as store, contextlib.suppress(FileNotFoundError):
        return [name.rstrip("/").rpartition("/")[2] for name in store.ls(str(folder), detail=False)]
    return []


def checksums(folder: Place) -> dict[str, dict[str, Any]]:
    """Size and MD5 of every object in a folder of a store, by its name there, as the store knows them."""
    with asked(folder) as store:
        root = store._strip_protocol(str(folder))
        found = store.find(root, detail=True)
    if missing := [name for name, info in found.items() if "md5Hash" not in info]:
        raise StorageError(f"the store has no MD5 of {missing[0]}: it was assembled from parts", where=str(folder))
    digests = {name: base64.b64decode(info["md5Hash"]).hex() for name, info in found.items()}
    return {name.removeprefix(f"{root}/"): {"size": info["size"], "md5": digests[name]} for name, info in found.items()}


def remove(folder: Place) -> None:
    """Removes a folder as far as possible; in a store, the manifest that says it is whole goes first."""
    if isinstance(folder, pathlib.Path):
        return shutil.rmtree(folder, ignore_errors=True)
    for path in (folder / MANIFEST, folder):
        with contextlib.suppress(FileNotFoundError), asked(folder) as store:
            store.rm(str(path), recursive=True)


def move(folder: Place, to: Place) -> None:
    """Renames a folder, replacing what was at `to`. In a store it is copied."""
    remove(to)
    if isinstance(folder, pathlib.Path):
        folder.rename(to)
        return
    with asked(folder) as store:
        store.copy(str(folder), str(to), recursive=True)
    remove(folder)


def content(folder: Place, name: str) -> bytes:
    """The content of a file. Raises `FileNotFoundError` when there is none."""
    if isinstance(folder, pathlib.Path):
        return (folder / name).read_bytes()
    with asked(folder) as store:
        return store.cat_file(f"{folder}/{name}")


def put(folder: Place, files: Mapping[str, bytes]) -> None:
    """Puts files into a folder of a store, one after another, each in whole or not at all."""
    with asked(folder) as store:
        try:
            for name, file in files.items():
                store.pipe_file(f"{folder}/{name}", file)
        except FileNotFoundError as error:
            raise OSError(f"there is no bucket {str(folder).removeprefix(SCHEME).partition('/')[0]}") from error


def records(run_dir: pathlib.Path) -> dict[str, bytes]:
    """The records of a run, as they are now."""
    return {name: (run_dir / name).read_bytes() for name in RECORDS if (run_dir / name).is_file()}


def bring(folder: Place, run_dir: pathlib.Path) -> None:
    """Copies the records that a run left in a store into its run directory. They are those of the checkpoints there, wherever made."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in {*RECORDS} & {*children(folder)}:
        write(run_dir / name, content(folder, name))
