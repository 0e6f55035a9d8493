"""Weights & Biases: a picture of the record, which may fail at any time without harm to the run."""

import html
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Literal, SupportsFloat

from llama_eqx.config import Config


class WandbConfig(Config):
    """`mode` "offline" needs no account and no network; `wandb sync` uploads the run later."""

    mode: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None
    group: str | None
    job_type: str | None
    tags: tuple[str, ...]
    name: str | None


class Wandb:
    """A W&B run in `run_dir/wandb`, continued when the directory is resumed. Any failure is told once through `say`, and then it is off."""

    def __init__(self, config: WandbConfig, run_dir: pathlib.Path, settings: Mapping[str, Any], say: Callable[[str], None]):
        self._say = say
        self._run: Any = None
        if config.mode != "disabled":
            self._attempt("start", lambda: self._start(config, run_dir, settings))

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        if self._run:
            self._attempt("log", lambda: self._run.log({name: float(value) for name, value in metrics.items()}, step=step))

    def sample(self, step: int, text: str) -> None:
        def log() -> None:
            import wandb

            self._run.log({"sample": wandb.Html(f"<pre style='white-space: pre-wrap'>{html.escape(text)}</pre>")}, step=step)

        if self._run:
            self._attempt("log", log)

    def close(self, *, failed: bool = False) -> None:
        if self._run:
            self._attempt("finish", lambda: self._run.finish(exit_code=int(failed)))
            self._run = None

    def _start(self, config: WandbConfig, run_dir: pathlib.Path, settings: Mapping[str, Any]) -> None:
        import wandb  # a second, which a disabled run need not spend

        lean = wandb.Settings(
            console="off",
            x_disable_stats=True,
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,
            silent=config.mode == "offline",
            init_timeout=20,
            login_timeout=20,
            finish_timeout=60,
        )
        self._run = wandb.init(
            mode=config.mode,
            project=config.project,
            entity=config.entity,
            group=config.group,
            job_type=config.job_type,
            tags=config.tags,
            name=config.name,
            id=_id(run_dir / "wandb_id"),
            resume="allow",
            reinit="finish_previous",  # the runs of a sweep may share a process
            dir=os.fspath(run_dir),
            config=dict(settings),
            settings=lean,
        )

    def _attempt(self, verb: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            first = next(iter(str(error).splitlines()), "")
            self._say(f"warning: W&B could not {verb} ({type(error).__name__}: {first}); metrics.jsonl has everything")


def _id(path: pathlib.Path) -> str:
    """The id of this directory's W&B run, made on its first start."""
    known = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not known:
        known = secrets.token_hex(4)
        path.write_text(known + "\n", encoding="utf-8")
    return known
