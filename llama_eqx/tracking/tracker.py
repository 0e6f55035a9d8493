"""Reports what a run does: to the record, W&B and the console."""

import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, SupportsFloat

import jax

from llama_eqx.config import Config
from llama_eqx.errors import StorageError
from llama_eqx.tracking.console import Console
from llama_eqx.tracking.jsonl import Jsonl
from llama_eqx.tracking.provenance import computed, jax_settings, software
from llama_eqx.tracking.starts import changed, changes, read_starts
from llama_eqx.tracking.wandb import Wandb, WandbConfig


class TrackingConfig(Config):
    wandb: WandbConfig


class Tracker:
    """Writes to the record (`metrics.jsonl`), from which W&B is drawn, and to the console. Only the first of several processes writes.

    A context manager: leaving it by an exception marks the W&B run as failed.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: str | os.PathLike[str],
        *,
        settings: Mapping[str, Any],
        steps: int,
        start: int,
        texts: Mapping[str, str] | None = None,
        parameters: int | None = None,
    ):
        """`settings` is the whole run's config in plain containers, `steps` the last step, and `start` the number of steps already done.
        `texts` are the fingerprints of the named evaluation sets, `parameters` the number that the model has.

        Each start adds a line to `provenance.jsonl`, and reports what has changed in it since the last.

        Raises `StorageError` when `run_dir` cannot be written.
        """
        self._run_dir = pathlib.Path(run_dir)
        self._active = jax.process_index() == 0
        if not self._active:
            return
        origin = {
            **software(),
            "computed": computed(settings),
            "jax": jax_settings(),
            "train": {"steps": steps},  # the course of the learning rate
            "eval_data": texts or {},
            "parameters": parameters,
        }
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            record = self._run_dir / "provenance.jsonl"
            before = read_starts(record, lenient=True)
            with record.open("ab") as file:
                torn = file.tell() and not record.read_bytes().endswith(b"\n")  # by a power failure: this start is not to be lost with it
                file.write(b"\n" * bool(torn) + json.dumps({"step": start, **origin}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            where = str(error.filename or run_dir)
            what = f"the run directory cannot be written: {error.strerror or error}"
            raise StorageError(what, where=where, next="mend that, then the same command") from error
        self._starts = [*before, {"step": start, **origin}]
        self._jsonl = Jsonl(self._run_dir / "metrics.jsonl", start)
        self._console = Console(steps, start)
        self._wandb = Wandb(config.wandb, self._run_dir, {**origin, **settings}, self._console.say)
        other = [each for each in changed(before[-1], origin) if not each.within(["train"])] if start and before else []
        if other:
            meant = "losses agree to rounding with those of an uninterrupted run, but not bit by bit"
            model, spread = settings.get("model", {}), ("computed.mesh", "computed.sharding", "computed.devices")
            dropout = model.get("dropout") or model.get("block", {}).get("dropout")
            if dropout and settings["train"]["microbatch_size"] and any(each.within(spread) for each in other):
                meant = "microbatches may have other rows, of which dropout drops other activations: losses differ as between seeds"
            if any(each.within(["jax"]) for each in other):
                meant = "what follows is computed, and dropout drawn, under other settings of JAX"
            if any(each.within(["code"]) for each in other):
                meant = "from here on, the code differs from that of the steps before"
            self.say(f"warning: changed after step {start}: {', '.join(map(str, other))}; {meant}")

        seen = {name: text for each in before if start for name, text in each.get("eval_data", {}).items()}
        for name, text in (texts or {}).items():
            if seen.get(name, text) != text:
                self.say(
                    f"warning: the text of eval_data.{name}, or how it is laid out in rows, changed after step {start}: val/{name}/loss "
                    "before and after are of different texts"
                )

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Reports metrics by name, after `step` steps. Units are in the names, losses in nats per token. Raises `StorageError`."""
        if self._active:
            self._jsonl.log(step, metrics)
            self._wandb.listen()
            self._console.log(step, metrics)

    def sync(self) -> None:
        """Flushes the record to the disk. Raises `StorageError`."""
        if self._active:
            self._jsonl.sync()

    def sample(self, step: int, text: str) -> None:
        """Reports text that the model wrote. The newest is kept in `sample.txt`. Raises `StorageError`."""
        if self._active:
            path = self._run_dir / "sample.txt"
            try:
                path.write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise StorageError(f"the sample cannot be written: {error.strerror or error}", where=str(path)) from error
            self._wandb.show(step, path)

    def picture(self, step: int, name: str, figure: Any) -> None:
        """Reports a matplotlib figure. The newest of each name is kept in `pictures/NAME.png`. Raises `StorageError`."""
        if self._active:
            path = self._run_dir / "pictures" / f"{name}.png"
            try:
                path.parent.mkdir(exist_ok=True)
                with warnings.catch_warnings(action="ignore"):  # about characters that the font lacks: they become boxes
                    figure.savefig(new := path.with_suffix(".new"), format="png")
                new.replace(path)  # readers always see a whole one
            except OSError as error:
                raise StorageError(f"a picture cannot be written: {error.strerror or error}", where=str(path)) from error
            self._wandb.show(step, path)

    def checkpoint(self, folder: pathlib.Path) -> None:
        """Passes the last checkpoint on to W&B, if that is asked for."""
        if self._active:
            self._wandb.checkpoint(folder)

    def final(self, step: int, state: str) -> None:
        """Says the fingerprint of the `state` after the last `step`, and whether all starts that led to it were alike."""
        if self._active:
            found = changes(self._starts, step)
            how = f"need not reproduce it, as its starts differ: {', '.join(found)}" if found else "reproduces it"
            self.say(f"final state {state}: the same command {how}")

    def say(self, text: str) -> None:
        """Writes a line to the console alone."""
        if self._active:
            self._console.say(text)

    def close(self, *, failed: bool = False) -> None:
        if self._active:
            self._console.close()
            try:
                self._jsonl.close()
            finally:
                self._wandb.close(failed=failed)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)
