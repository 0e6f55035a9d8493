"""Saving: in the background, uncompressed, and never without saying that it failed."""

import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from llama_eqx.checkpoint import restore
from llama_eqx.config import Config
from llama_eqx.errors import CheckpointError, ConfigError, StorageError


class CheckpointConfig(Config):
    """A save every `every` steps (0: only the last step), of which the newest `keep` stay on disk.

    `export` is the format in which the trained model is written once more, into `export` in the run directory.
    """

    every: int
    keep: int
    export: Literal["hf", "meta", "native"] | None

    def check(self) -> None:
        if self.every < 0:
            raise ConfigError(f"{self.every} is not a number of steps", where="every", next="0 saves only the last step")
        if self.keep < 1:
            raise ConfigError(f"keep={self.keep} would delete every checkpoint", where="keep", next="keep=1 holds the newest")


class Checkpoints:
    """The checkpoints of a run, one folder a step, each in two parts: `model`, so that weights are read alone, and `training`.

    A context manager: leaving it waits for the last save. The training loop decides when to save. Every process calls every method.
    """

    def __init__(self, folder: str | os.PathLike[str], config: CheckpointConfig):
        """Makes the folder, and clears away what a killed process left half written.

        Raises `StorageError` when it cannot be written to.
        """
        self._folder = pathlib.Path(folder).resolve()
        self._config = config
        self._pending: tuple[int, ocp.AsyncResponse[bool]] | None = None
        self._checkpointer = self._open()

    @property
    def latest(self) -> int | None:
        """The newest step saved in full."""
        return max(restore.steps(self._folder), default=None)

    def save(self, step: int, model: PyTree, training: PyTree, metrics: Mapping[str, float] | None = None) -> None:
        """Begins a save and returns once the arrays may be donated. A step that is saved, or is being saved, is left as it is.

        Waits for the save before, and raises its error (`StorageError`); then nothing of this step has been written.
        """
        if step in restore.steps(self._folder) or (self._pending and step == self._pending[0]):
            return
        self._wait()
        try:
            response = self._checkpointer.save_checkpointables_async(
                step, {"model": model, "training": training}, force=True, metrics=dict(metrics) if metrics else None
            )
        except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors
            raise self._failed(step, error) from error
        assert response is not None
        self._pending = step, response

    def restore(self, step: int, model: PyTree, training: PyTree) -> tuple[Any, Any]:
        """`(model, training)` as saved at `step`, in the shardings of the abstract trees given.

        Raises `CheckpointError` when there is no such step, and listing all that differs in name, shape or dtype.
        """
        self._wait()
        if step not in (saved := restore.steps(self._folder)):
            raise CheckpointError(
                f"step {step} is not saved", where=str(self._folder), next=f"saved steps: {', '.join(map(str, saved)) or 'none'}"
            )
        parts = restore.read(self._folder / str(step), {"model": model, "training": training})
        return parts["model"], parts["training"]

    def close(self) -> None:
        """Waits for the last save. Raises `StorageError` when it failed."""
        try:
            self._wait()
        finally:
            self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> ocp.training.Checkpointer:
        # Orbax can do it too, but in a thread that only the next save waits for.
        if jax.process_index() == 0:
            for unfinished in self._folder.glob("*.orbax-checkpoint-tmp"):
                for _ in range(20):  # threads of a save that broke off in this process may write on for a moment
                    shutil.rmtree(unfinished, ignore_errors=True)
                    if not unfinished.exists():
                        break
                    time.sleep(0.05)
        try:
            return ocp.training.Checkpointer(
                str(self._folder),
                context=uncompressed(),
                preservation_policy=ocp.training.preservation_policies.LatestN(self._config.keep),  # pyright: ignore[reportArgumentType]
            )
        except (OSError, ValueError) as error:
            raise self._unwritable("checkpoints cannot be written", error) from error

    def _wait(self) -> None:
        if self._pending is None:
            return
        step, response = self._pending
        try:
            response.result()
        except Exception as error:
            raise self._failed(step, error) from error
        finally:
            self._pending = None

    def _failed(self, step: int, error: Exception) -> StorageError:
        # Orbax would raise the same error once more.
        with contextlib.suppress(Exception):
            self._checkpointer.close()
        self._checkpointer = self._open()
        return self._unwritable(f"step {step} could not be saved", error)

    def _unwritable(self, what: str, error: Exception) -> StorageError:
        saved = restore.steps(self._folder)
        return StorageError(
            f"{what}: {restore.first_line(error)}",
            where=str(self._folder),
            kept=f"the checkpoint of step {saved[-1]}" if saved else "no checkpoint yet",
            next="free some space or mend the permissions there, then give the same command again",
        )


def uncompressed() -> ocp.Context:
    """How arrays are filed: float weights hardly shrink, and without compression a local disk takes them several times faster."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context
