"""Errors meant for people. A verb prints one as a block and exits with its code; a library user catches it as an exception."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any


class UserError(Exception):
    """What happened, where, what was kept, and what to type next.

    `code` is the exit code of a verb: 1 unexpected, 2 config, 3 data, 4 checkpoint unusable, 5 non-finite numbers, 6 storage,
    75 and 130 stopped by a signal, 141 the reader of the output has left.
    """

    code = 1

    def __init__(self, what: str, *, where: str = "", kept: str = "", next: str = ""):
        super().__init__(what, where, kept, next)
        self.what, self.where, self.kept, self.next = what, where, kept, next

    def __reduce__(self) -> Any:  # between processes, an exception is sent as its arguments
        return functools.partial(type(self), where=self.where, kept=self.kept, next=self.next), (self.what,)

    def __str__(self) -> str:
        rows = {"error": self.what, "where": self.where, "kept": self.kept, "next": self.next}
        return "\n".join(f"{name}: {text.replace(chr(10), chr(10) + '       ')}" for name, text in rows.items() if text)


class ConfigError(UserError):
    code = 2


class DataError(UserError):
    code = 3


class CheckpointError(UserError):
    code = 4


class NonFiniteError(UserError):
    code = 5


class StorageError(UserError):
    code = 6


class Stopped(UserError):
    """A signal ended a run, whose last finished step is saved. Exit code 75 asks to be started again; 130 is for Ctrl-C."""

    def __init__(self, what: str, *, code: int, next: str = ""):
        super().__init__(what, next=next)
        self.code = code

    def __reduce__(self) -> Any:
        return functools.partial(type(self), code=self.code, next=self.next), (self.what,)

    def __str__(self) -> str:
        again = " (start me again)" if self.code == 75 else ""
        return f"{self.what}; exit code {self.code}{again}" + f"\nnext: {self.next}" * bool(self.next)


def first_line(error: Exception) -> str:
    """The first line of what a library says, which may be hundreds long or nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """The rows of a table as lines, with columns of equal width."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def unknown_option(error: Exception) -> ConfigError | None:
    """What to say of an exception of XLA's about a compiler option that it does not know; None for any other."""
    found = re.search(r"No such compile option: '?(\w+)|Unknown flag[^\w]*(\w+)", str(error))
    name = found and (found[1] or found[2])
    next = f"~mesh.compiler_options.{name} leaves it out"
    return ConfigError(f"the compiler has no option {name}", where="mesh.compiler_options", next=next) if name else None


def hub_download(path: str, kind: str = "model") -> str:
    """What to type if `path`, which does not exist, is the name of a repository of Hugging Face's; empty if it cannot be one.

    The files then lie at `path`, so that the command that named it works.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        return ""
    options = "--exclude 'original/*'" if kind == "model" else f"--repo-type {kind} --include '*.parquet'"
    return f"; if it is on the Hugging Face Hub, get it first: hf download {path} {options} --local-dir {path}"
