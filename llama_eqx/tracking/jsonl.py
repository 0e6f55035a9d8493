"""`metrics.jsonl`, the record of a run: one JSON object per line, written as soon as it is known. Everything else is drawn from it."""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import SupportsFloat

from llama_eqx.errors import DataError, StorageError
from llama_eqx.files import MALFORMED


class Jsonl:
    """Appends records to the file at `path`.

    On opening, records after step `start` are dropped, because a resumed run makes them again (`start` 0 is a run from the beginning: all
    are dropped). So is a last line that a killed process left torn.

    Every method raises `StorageError` when the file cannot be written.
    """

    def __init__(self, path: pathlib.Path, start: int):
        self._path = path
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            if path.exists():
                with unfinished.open("w", encoding="utf-8") as file:
                    file.writelines(_line(record) for record in _records(path) if 0 < record["step"] <= start)
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.replace(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        try:
            self._file.write(_line({"step": step, **metrics}))
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def sync(self) -> None:
        """Flushes the records to the disk, so that they survive a failure of the machine too."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError(
            f"metrics cannot be written: {error.strerror or error}",
            where=str(self._path),
            kept="the records and checkpoints written before",
            next="free some space or mend the permissions there, then give the same command again",
        )


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, int | float]]:
    """Returns the records of a `metrics.jsonl`, oldest first. `step` is an int, all else floats. A torn last line is left out.

    Raises `DataError` when there is no such file, or when another line is not a record.
    """
    path = pathlib.Path(path)
    try:
        return list(_records(path))
    except OSError as error:
        advice = "the folder of a run, or a copy of its metrics.jsonl"
        raise DataError(f"no metrics there: {error.strerror or error}", where=str(path), next=advice) from error


def _records(path: pathlib.Path) -> Iterator[dict[str, int | float]]:
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
    for number, line in enumerate(lines, 1):
        torn = number == len(lines)
        try:
            found = json.loads(line)
            torn = torn and "step" not in found
            if type(step := found.pop("step")) is not int or step < 0:
                raise ValueError(f"step {step}")
            record = {"step": step, **{name: _number(value) for name, value in found.items()}}
        except MALFORMED as error:
            if torn:
                return
            advice = "remove the line; or move the file away, and a run goes on without it"
            raise DataError("this line is not a record of metrics", where=f"{path}:{number}", next=advice) from error
        yield record


def _line(record: Mapping[str, SupportsFloat]) -> str:
    said = {name: value if name == "step" else _jsonable(float(value)) for name, value in record.items()}
    return json.dumps(said, allow_nan=False) + "\n"


def _jsonable(value: float) -> float | str:
    """JSON has no non-finite numbers: they become the strings "NaN", "Infinity" and "-Infinity"."""
    return value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _number(value: object) -> float:
    if type(value) in (int, float) or value in ("NaN", "Infinity", "-Infinity"):
        return float(value)  # pyright: ignore[reportArgumentType]
    raise ValueError(f"{value!r} is no number")
