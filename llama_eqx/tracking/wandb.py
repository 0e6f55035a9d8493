"""Weights & Biases: a picture of the record, drawn by a process of its own. Training waits neither for it nor for the network."""

import contextlib
import json
import os
import pathlib
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

from llama_eqx.config import Config, dump
from llama_eqx.files import write

FOLDER, ABOUT = "wandb", "about.json"
PATIENCE = {"online": 5.0, "offline": 4.0}  # seconds that the end of a run waits for W&B, and then for what is to be uploaded later
UPLOAD = 3600.0  # seconds that it waits for the upload of a checkpoint, if there is one


class WandbConfig(Config):
    """`mode` "offline" needs no account and no network; `wandb sync` uploads the run later.

    With `artifact` the last checkpoint of a finished run goes along with it.
    """

    mode: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None
    group: str | None
    job_type: str | None
    tags: tuple[str, ...]
    name: str | None
    notes: str | None
    artifact: bool


class Wandb:
    """The process that draws `metrics.jsonl` into a W&B run in `run_dir/wandb`, which continues when the directory is resumed.

    It reads the record as it grows. If it fails, `say` is given a warning. What it has not uploaded by the end of the run goes into an
    offline run instead, and `say` is given the command that uploads it.
    """

    def __init__(self, config: WandbConfig, run_dir: pathlib.Path, settings: Mapping[str, Any], say: Callable[[str], None]):
        """`settings` are shown with the run. The record must be open, and records of steps to be made again dropped."""
        self._config, self._run_dir, self._say = config, run_dir, say
        self._process: subprocess.Popen[bytes] | None = None
        self._reason, self._folder, self._pending, self._checkpoint = "", "", b"", ""
        self._shown: dict[str, int] = {}
        if config.mode == "disabled":
            return
        try:
            (run_dir / FOLDER).mkdir(exist_ok=True)
            about = {"id": _id(run_dir / "wandb_id"), "settings": settings, **dump(config)}
            (run_dir / FOLDER / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        except OSError as error:
            return self._say(f"warning: no W&B: {error.filename} cannot be written ({error.strerror})")
        self._start(config.mode)

    def show(self, step: int, path: pathlib.Path) -> None:
        """Announces something new in a file of the run directory: text in a .txt or a picture in a .png, named after the file."""
        self._shown[file := os.fspath(path.relative_to(self._run_dir))] = step
        self._tell({"show": {file: step}})

    def checkpoint(self, folder: pathlib.Path) -> None:
        """Announces the last checkpoint of a finished run: a folder in the run directory that no longer changes."""
        if self._config.artifact:
            self._checkpoint = os.fspath(folder.relative_to(self._run_dir))
            self._tell({"checkpoint": self._checkpoint})

    def listen(self) -> None:
        """Passes on what the process has to say, if anything. Never waits."""
        if self._process is None:
            return
        self._hear(self._process)
        if self._process.poll() is not None:
            self._hang_up(self._process)
            self._process, self._reason = None, self._reason or f"its process ended ({self._process.returncode})"
            self._say(f"warning: W&B does not work: {self._reason}; the run goes on, and metrics.jsonl has everything")

    def close(self, *, failed: bool = False) -> None:
        """Ends the W&B run within the sum of `PATIENCE`, or `UPLOAD` if a checkpoint is uploaded. A failed run is not waited for, as it is
        likely to be started again.
        """
        if self._config.mode == "disabled" or not (self._process or self._reason):
            return
        if self._process is not None:
            patience = UPLOAD if self._checkpoint and self._config.mode == "online" else PATIENCE[self._config.mode]
            ended = self._ended(failed, 0.0 if failed else patience)
            if ended or failed:
                return
            if self._config.mode == "offline":
                if self._process.returncode:  # otherwise it continues by itself to the end of the record
                    self._say(f"warning: W&B does not work: {self._reason}; metrics.jsonl has everything")
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._reason = self._reason or f"not everything was uploaded within {patience:g} s of the end"
        if failed:
            return
        self._start("offline")
        if self._process is not None:
            self._tell({"show": self._shown})
            if self._checkpoint:
                self._tell({"checkpoint": self._checkpoint})
            self._ended(failed, PATIENCE["offline"])
            if not self._folder and self._process.returncode is None:  # it has yet to make one
                self._folder = os.fspath(self._run_dir / FOLDER / "offline-run-*")
        later = f"later: wandb sync {self._folder}" if self._folder else "metrics.jsonl has everything"
        self._say(f"warning: W&B: {self._reason}; {later}")

    def _start(self, mode: str) -> None:
        self._folder = ""
        command = [sys.executable, "-m", "llama_eqx.tracking.wandb_process", os.fspath(self._run_dir), mode]
        try:
            with (self._run_dir / FOLDER / "messages.txt").open("ab") as messages:
                # A session of its own, because what is typed at the terminal is for the run.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, start_new_session=True
                )
        except OSError as error:
            self._process, self._reason = None, f"its process cannot be started ({error.strerror})"
            return
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)

    def _tell(self, message: dict[str, Any]) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it is gone, or stuck with its pipe full
                os.write(self._process.stdin.fileno(), json.dumps(message).encode() + b"\n")

    def _ended(self, failed: bool, patience: float) -> bool:
        """Tells the process that this is the end. Returns whether it ended well within `patience` seconds."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        self._tell({"end": int(failed)})
        process.stdin.close()
        threading.Thread(target=process.wait, daemon=True).start()  # for a process left to itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        self._hear(process)
        self._hang_up(process)
        if process.returncode:
            self._reason = self._reason or f"its process ended ({process.returncode})"
        return process.returncode == 0

    def _hang_up(self, process: subprocess.Popen[bytes]) -> None:
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()

    def _hear(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with contextlib.suppress(BlockingIOError):
            while part := os.read(process.stdout.fileno(), 2**16):
                self._pending += part
        *lines, self._pending = self._pending.split(b"\n")
        for line in lines:
            kind, _, text = line.decode(errors="replace").partition(" ")
            if kind == "folder":
                self._folder = text
            elif kind == "failed":
                self._reason = text
            elif kind == "url":
                self._say(f"W&B: {text}")


def _id(path: pathlib.Path) -> str:
    """The id of this directory's W&B run, made on its first start."""
    known = path.read_bytes().decode(errors="replace").strip() if path.exists() else ""
    if not re.fullmatch(r"[\w-]+", known):  # it becomes part of a folder's name
        known = secrets.token_hex(4)
        write(path, known.encode() + b"\n")
    return known
