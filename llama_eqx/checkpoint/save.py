"""Saves in the background, uncompressed, and reports every failure."""

import concurrent.futures
import contextlib
import functools
import math
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from llama_eqx.checkpoint import restore
from llama_eqx.checkpoint.manifest import hashed_meanwhile, write_manifest
from llama_eqx.checkpoint.restore import Restored
from llama_eqx.checkpoint.store import SCHEME, Place, is_remote, place, put, records, remove
from llama_eqx.config import Config
from llama_eqx.crash import crash_point
from llama_eqx.errors import CheckpointError, ConfigError, DataError, StorageError, UserError, first_line
from llama_eqx.files import sync
from llama_eqx.tracking.jsonl import read_metrics

FAILURES = 2  # failed saves in a row at which a run is given up
PATIENCE = 60  # seconds that a save may keep training waiting without a word
FILE_BYTES = 64 * 2**20  # approximate; several files are hashed on several cores


class CheckpointConfig(Config):
    """A save every `every` steps (0: only the last step). What stays on disk: the newest `keep`; with `keep_every`, the steps that it
    divides; and the `keep_best` steps with the lowest metric `best_by`, of those that were both saved and evaluated.

    `store`, gs://BUCKET/FOLDER, holds the checkpoints instead of the run directory, and with them all that a run needs to continue
    elsewhere.

    A run that is told to stop has `grace` seconds to save itself. `export` is the format in which the trained model is also written, into
    `export` in the run directory.
    """

    every: int
    keep: int
    keep_every: int | None
    keep_best: int
    best_by: str
    store: str | None
    grace: float
    export: Literal["hf", "meta", "native"] | None

    def check(self) -> None:
        if self.every < 0:
            raise ConfigError(f"{self.every} is not a number of steps", where="every", next="0 saves only the last step")
        if self.keep < 1:
            raise ConfigError(f"keep={self.keep} would delete every checkpoint", where="keep", next="keep=1 holds the newest")
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError(f"{self.keep_every} is not a number of steps", where="keep_every", next="null turns this off")
        if self.keep_best < 0:
            raise ConfigError(f"{self.keep_best} is not a number of checkpoints", where="keep_best", next="0 turns this off")
        if self.store is not None and not re.fullmatch(rf"{SCHEME}[\w.-]+(/[^/]+)*", self.store):
            raise ConfigError(f"{self.store} is not a folder in an object store", where="store", next=f"{SCHEME}BUCKET/FOLDER, or null")
        if self.grace <= 0:
            raise ConfigError(f"{self.grace} s are not enough to save anything", where="grace")

    def ranked(self, saved: Mapping[int, Mapping[str, float]]) -> list[tuple[float, int]]:
        """(value of `best_by`, step) for each saved step that has one, the lowest first. NaN, which has no order, counts as none."""
        found = ((metrics.get(self.best_by, math.nan), step) for step, metrics in saved.items())
        return sorted((value, step) for value, step in found if not math.isnan(value))

    def kept(self, saved: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The saved steps to keep, given the metrics of each."""
        best = [step for _, step in self.ranked(saved)[: self.keep_best]]
        return {*sorted(saved)[-self.keep :], *best, *(step for step in saved if self.keep_every and step % self.keep_every == 0)}


class Checkpoints:
    """The checkpoints of a run, one folder per step, each in two parts: `model`, so that weights can be read alone, and `training`.

    A step is saved once its folder has its name, which it gets after its manifest is written. A context manager: leaving it waits for the
    save under way. The training loop decides when to save. Every process calls every method. `say` is told what happened.

    In a store a step has its name from the beginning, and is saved once its manifest is there; the run's records are put there before.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: CheckpointConfig,
        say: Callable[[str], None] = print,
        run_dir: pathlib.Path | None = None,
    ):
        """Makes the folder, and removes what a killed process left half written. `run_dir` has the records: they go into a store, and have
        the metrics of steps that were evaluated after they were saved.

        Raises `StorageError` when the folder cannot be written to.
        """
        self._folder, self._run_dir = place(folder), run_dir
        self._config, self.say = config, say
        self._pending: tuple[int, concurrent.futures.Future[str]] | None = None
        self._begun: int | None = None  # the newest save, unless it failed
        self._failures = 0
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        try:
            if not is_remote(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self._folder).close()  # it may be another user's
        except OSError as error:
            raise self._unwritable("checkpoints cannot be written", error) from error
        self._clear()

    @property
    def latest(self) -> int | None:
        """The newest step saved in full."""
        return max(restore.steps(self._folder), default=None)

    def require_room(self, parts: PyTree) -> None:
        """Raises `StorageError` when the disk has no room for one checkpoint of these (possibly abstract) arrays."""
        if is_remote(self._folder):
            return
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts))
        if (free := shutil.disk_usage(self._folder).free) < size:
            raise self._unwritable("there is no room for a checkpoint", OSError(f"it needs {_said(size)}, and {_said(free)} are free"))

    def save(
        self,
        step: int,
        model: PyTree,
        training: PyTree,
        metrics: Mapping[str, float] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Begins a save, and returns once the arrays may be donated. A step that is saved, or being saved, is left as it is.

        `metrics` decide what is kept. `facts` go into the manifest, as plain JSON. Waits for the previous save first, and raises its errors
        as `poll` does. `poll` also raises those of this save, even if it cannot begin.
        """
        if step == self._begun:  # of several processes, some may not see yet that it is saved
            return
        self.wait()
        begun, parts = time.perf_counter(), {"model": model, "training": training}
        try:
            saved = restore.steps(self._folder)
            if step in saved:
                return
            if saved and saved[-1] > step:  # this run would have resumed from there
                raise StorageError(
                    f"another run saves here: step {saved[-1]} is there",
                    next="end the other run, or give one of them a place of its own (checkpoint.store, run_dir)",
                )
            self.require_room(parts)
            known = records(self._run_dir) if self._run_dir is not None and is_remote(self._folder) else {}
            with uncompressed():
                response = ocp.save_checkpointables_async(str(self._unfinished(step)), parts)
        except (OSError, ValueError, StorageError) as error:  # TensorStore's errors are ValueErrors
            failed: concurrent.futures.Future[str] = concurrent.futures.Future()
            failed.set_exception(error)
            self._pending = step, failed
            return
        crash_point("save")
        said = {"step": step, "metrics": dict(metrics or {}), **(facts or {})}
        self._begun = step
        self._pending = step, self._thread.submit(self._commit, step, response.result, restore.described(parts), said, known, begun)

    def poll(self) -> None:
        """Reports when a save is over. Call it often.

        Raises `StorageError` when this save and the one before it failed; its `kept` says what there is. With one process, a single failure
        is only reported.
        """
        if self._pending and self._pending[1].done():
            self.wait()

    def wait(self, *, last: bool = False) -> None:
        """Waits for the save under way. Errors are as in `poll`; with `last`, a single failure raises too."""
        if self._pending is None:
            return
        step, commit = self._pending
        if concurrent.futures.wait([commit], PATIENCE).not_done:
            self.say(f"waiting for the save of step {step} to {self._folder}")
        try:
            said = commit.result()
        except Exception as error:
            self._failed(step, error, last=last)
        else:
            self._failures = 0
            if said:
                self.say(said)
        finally:
            self._pending = None

    def finish(self, step: int) -> None:
        """Waits for the last save, that of `step`, and reads it back from the disk. Raises `StorageError` when it is not there in full."""
        self.wait(last=True)
        if jax.process_index() == 0:
            try:
                files = len(restore.verified(self._folder / str(step))["files"])
            except CheckpointError as error:
                raise self._unwritable(f"step {step} is not on the disk as it was written", error) from error
            self.say(f"final checkpoint verified: step {step}, {files} files")
            if self._config.keep_best and (ranked := self._config.ranked(self._saved())):
                value, best = ranked[0]
                self.say(f"lowest {self._config.best_by}: {value:.4f} at step {best}, {self._folder / str(best)}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("last checkpoint")

    def restore(self, model: PyTree, training: PyTree, step: int | None = None) -> Restored | None:
        """Returns the newest undamaged checkpoint, or that of `step`, in the shardings of the given abstract trees.

        None when nothing is saved yet. A damaged checkpoint is named and set aside as `<step>.damaged`, and the one before it is tried.

        Raises `CheckpointError` when no good one is left, when there is no such step, or listing all that differs in name, shape or dtype.
        """
        self.wait()
        return restore.newest(self._folder, {"model": model, "training": training}, step, self.say)

    def close(self) -> None:
        """Waits for the save under way. Raises `StorageError` when it failed."""
        try:
            self.wait(last=True)
        finally:
            self._thread.shutdown()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _commit(
        self,
        step: int,
        written: Callable[[], None],
        tree: Mapping[str, Any],
        facts: dict[str, Any],
        known: Mapping[str, bytes],
        begun: float,
    ) -> str:
        """The background part of a save: once all processes have written theirs, process 0 hashes everything and names the folder."""
        if jax.process_index() > 0:
            written()
            return ""
        unfinished, folder, above = self._unfinished(step), self._folder / str(step), self._folder
        if not isinstance(above, pathlib.Path):
            written()
            crash_point("finalise")
            put(above.parent, known)
            files = write_manifest(folder, tree, **facts)["files"]
        else:
            own = f"{unfinished.name}*/*/ocdbt.process_0/d/*"
            with hashed_meanwhile(lambda: {"/".join(path.parts[-4:]): path for path in above.glob(own)}) as hashed:
                written()
            crash_point("finalise")
            files = write_manifest(unfinished, tree, hashed=hashed, show=False, **facts)["files"]
            crash_point("rename")
            if folder.exists():  # it has no manifest
                restore.set_aside(folder)
            unfinished.rename(folder)
            sync(above)
        size, seconds = sum(entry["size"] for entry in files.values()), time.perf_counter() - begun
        said = f"saved step {step}: {len(files)} files, {_said(size)} in {seconds:.1f} s"
        try:
            self._remove_others()
        except (OSError, UserError) as error:  # the step itself is saved
            said += f"\nwarning: older steps could not be removed: {_words(error)}"
        return said

    def _remove_others(self) -> None:
        """Removes all steps but those to keep. Then raises `StorageError` naming those that could not be removed."""
        saved, failed = self._saved(), []
        for other in sorted({*saved} - self._config.kept(saved)):
            removed = self._folder / str(other)
            try:
                if not is_remote(removed):
                    removed = removed.rename(self._folder / f"{other}.removed")
                crash_point("remove")
                remove(removed)
            except (OSError, UserError) as error:
                failed.append(f"{other}: {_words(error)}")
        if failed:
            raise StorageError("; ".join(failed))

    def _saved(self) -> dict[int, dict[str, float]]:
        """The metrics of every saved step. A run stopped during an evaluation makes up for it later; then the record has its metrics."""
        saved = {step: restore.metrics_of(self._folder / str(step)) for step in restore.steps(self._folder)}
        best_by = self._config.best_by
        for step, metrics in saved.items() if self._config.keep_best else ():
            if best_by not in metrics and step in self._recorded:
                metrics[best_by] = self._recorded[step]
        return saved

    @functools.cached_property
    def _recorded(self) -> dict[int, float]:
        """`best_by` of every step in the record. Read once: a missed evaluation is made up for before the first save of a start."""
        if self._run_dir is None:
            return {}
        with contextlib.suppress(DataError):  # damaged: the manifests must suffice, and the next start says so
            records = read_metrics(self._run_dir / "metrics.jsonl")
            return {int(record["step"]): record[self._config.best_by] for record in records if self._config.best_by in record}
        return {}

    def _clear(self) -> None:
        if jax.process_index() > 0:
            return
        if not isinstance(self._folder, pathlib.Path):
            for step in {*restore.numbered(self._folder)} - {*restore.steps(self._folder)}:
                remove(self._folder / str(step))
            return
        for unfinished in [path for mark in ("unfinished*", "removed") for path in self._folder.glob(f"*.{mark}")]:
            for _ in range(20):  # threads of a save that broke off in this process may write on for a moment
                shutil.rmtree(unfinished, ignore_errors=True)
                if not unfinished.exists():
                    break
                time.sleep(0.05)

    def _unfinished(self, step: int) -> Place:
        return self._folder / (f"{step}" if is_remote(self._folder) else f"{step}.unfinished")

    def _failed(self, step: int, error: Exception, *, last: bool = False) -> None:
        with contextlib.suppress(OSError, StorageError):  # the same trouble as the save's: the next start tries again
            self._clear()
        self._begun = None
        self._failures += 1
        told = self._unwritable(f"step {step} could not be saved", error)
        if last or self._failures >= FAILURES or jax.process_count() > 1:
            raise told from error
        self.say(f"warning: {told.what}; saved so far: {told.kept}. Training goes on, and stops if the next save fails too")

    def _unwritable(self, what: str, error: Exception) -> StorageError:
        try:
            saved = restore.steps(self._folder)
            kept = f"the checkpoint of step {saved[-1]}" if saved else "no checkpoint yet"
        except (OSError, StorageError):
            kept = "whatever was saved before"
        return StorageError(
            f"{what}: {_words(error)}",
            where=str(self._folder),
            kept=kept,
            next=getattr(error, "next", "") or "free some space or mend the permissions there, then give the same command again",
        )


def uncompressed() -> ocp.Context:
    """How arrays are saved. Float weights hardly compress, and a local disk takes them several times faster without compression."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.ocdbt_target_data_file_size = FILE_BYTES
    return context


def _words(error: Exception) -> str:
    return error.what if isinstance(error, UserError) else first_line(error)


def _said(size: int) -> str:
    unit = next(unit for unit in (1, 1e3, 1e6, 1e9) if size < 1000 * unit or unit == 1e9)
    return f"{size / unit:.3g} {dict(zip((1, 1e3, 1e6, 1e9), ('B', 'kB', 'MB', 'GB'), strict=True))[unit]}"
