"""Copies the model of a run from an object store to this disk."""

import functools
import hashlib
import pathlib

from llama_eqx.checkpoint.native import CHECKPOINTS, CONFIG, TOKENIZER
from llama_eqx.checkpoint.restore import numbered, steps
from llama_eqx.checkpoint.store import MANIFEST, asked, checksums, content, place
from llama_eqx.data.cache import cache_dir, publish
from llama_eqx.errors import CheckpointError


@functools.cache
def copy_of(path: str) -> pathlib.Path:
    """Returns a copy, in the cache folder, of `gs://…/RUN` with its newest step, or of `gs://…/RUN/checkpoints/STEP`, without what only
    training needs. Within a process the step stays the same.

    Raises `CheckpointError` when no step is saved there, `StorageError` when the store does not answer.
    """
    run, marker, step = path.rstrip("/").partition(f"/{CHECKPOINTS}/")
    home = place(run)
    saved = [number for number in steps(home / CHECKPOINTS) if not marker or str(number) == step]
    if not saved:
        begun = f"; begun but not completed: {numbered(home / CHECKPOINTS)}" if numbered(home / CHECKPOINTS) else ""
        raise CheckpointError(f"no checkpoint is saved there{begun}", where=path, next="gs://BUCKET/FOLDER as in checkpoint.store of a run")
    checkpoint = f"{CHECKPOINTS}/{saved[-1]}"
    manifest = content(home / checkpoint, MANIFEST)

    def write(folder: pathlib.Path) -> None:
        parts = (CONFIG, f"{TOKENIZER}/", f"{checkpoint}/")
        names = [name for name in checksums(home) if name.startswith(parts) and not name.startswith(f"{checkpoint}/training/")]
        if outside := [name for name in names if ".." in pathlib.PurePath(name).parts]:
            raise CheckpointError(f"{outside[0]} lies outside of the folder", where=path)
        with asked(home) as store:
            store.get([f"{home}/{name}" for name in names], [str(folder / name) for name in names])

    found = publish(cache_dir() / "stores" / hashlib.sha256(run.encode() + manifest).hexdigest()[:16], write)
    return found / checkpoint if marker else found
