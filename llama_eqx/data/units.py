"""The units of work of `prepare`: some of the files, each unit encoded by itself."""

import contextlib
import hashlib
import json
import operator
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llama_eqx.data.encoding import CHUNK, encode
from llama_eqx.data.sources import Piece, Record, Source, pieces, records, refusal
from llama_eqx.data.tokenizer import Tokenizer, load_tokenizer
from llama_eqx.errors import DataError
from llama_eqx.files import reading, whole, write_json

# What is kept of each document of a unit: its numbers of ids and of bytes of text, a hash of the text, and its origin.
DOCUMENT = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("hash", "<u8", (2,)), ("source", "<i8"), ("record", "<i8")])
LOADED: dict[str, Tokenizer] = {}  # by fingerprint; only the last one used
NAMED = 20  # records named one by one
T = TypeVar("T")
UNITS, LEAST = 256, 2**20  # units of a small input, and the fewest bytes of each


@dataclass(frozen=True)
class Unit:
    """Consecutive pieces, at most one per source."""

    number: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Task:
    """What all units have in common. `folder` is that of unfinished work. `tokenizer` is a fingerprint."""

    folder: Path
    tokenizer: str
    field: str
    bos: bool
    eos: bool
    skip: bool
    validation_fraction: float

    def path(self, unit: int, ending: str) -> Path:
        return self.folder / f"unit-{unit:06}.{ending}"

    def summary(self, unit: int) -> tuple[list, int, int, list]:
        """(source, lines) of each source, the numbers of empty and of refused records, and (source, record, problem) of some of these."""
        return saved(self.path(unit, "json"), operator.itemgetter("lines", "empty", "refused", "named"))

    def documents(self, unit: int) -> np.ndarray:
        """[documents] `DOCUMENT`: those of a unit, in order."""
        return saved(self.path(unit, "npy"), lambda found: found[[*(DOCUMENT.names or ())]])

    def ids(self, unit: int, dtype: np.dtype, count: int) -> np.ndarray:
        """[count]: the ids of a unit's documents, mapped."""
        with damage(path := self.path(unit, "ids")):
            if len(ids := np.memmap(path, dtype, "r")) != count:
                raise ValueError(f"{len(ids)} ids, and {count} expected")
            return ids


def cut_units(sources: list[Source], most: int, field: str) -> list[Unit]:
    """Cuts all sources into units of about `most` bytes, or less if there are few bytes in all, so that there is work for all cores."""
    size = min(most, max(LEAST, sum(source.size for source in sources) // UNITS))
    units, members, weight = [], [], 0
    for number, source in enumerate(sources):
        for piece in pieces(number, source, size, field):
            members.append(piece)
            weight += piece.weight
            if weight >= size:
                units.append(Unit(len(units), tuple(members)))
                members, weight = [], 0
    return [*units, Unit(len(units), tuple(members))] if members else units


def run_unit(task: Task, unit: Unit) -> None:
    """Encodes a unit, and saves its ids, its `DOCUMENT`s and a summary.

    Raises `DataError` naming file and record, unless such records are skipped.
    """
    tokenizer, empty, refused, named = _tokenizer(task), 0, 0, []
    lines = dict.fromkeys([piece.number for piece in unit.pieces], 0)
    found = [np.empty(0, DOCUMENT)]

    def refuse(piece: Piece, record: Record) -> None:
        nonlocal refused
        error = refusal(piece, record, "input")
        if not task.skip:
            kept = "what was done before, which on_error=skip continues; if a file has changed, all of it begins anew"
            raise DataError(error.what, where=error.where, kept=kept, next=f"{error.next}; or on_error=skip")
        refused += 1
        if refused <= NAMED:
            named.append([piece.number, record.number, record.problem])

    def add(batch: list[tuple[Piece, Record, str]]) -> None:
        nonlocal empty
        try:
            ids, lengths = encode([text for _, _, text in batch], tokenizer, bos=task.bos, eos=task.eos)
        except DataError as error:
            if len(batch) > 1:
                for one in batch:  # to find the one that fails
                    add([one])
                return
            refuse(batch[0][0], batch[0][1]._replace(problem=error.what))
            return
        texts = [text.encode() for _, _, text in batch]
        documents = np.empty(len(batch), DOCUMENT)
        documents["tokens"], documents["bytes"], documents["hash"] = lengths, list(map(len, texts)), hashes(texts)
        documents["source"] = [piece.number for piece, _, _ in batch]
        documents["record"] = [record.number for _, record, _ in batch]
        empty += int((lengths == 0).sum())
        found.append(documents[lengths > 0])
        file.write(ids.data)

    with whole(task.path(unit.number, "ids")) as file:
        batch, size = [], 0
        for piece in unit.pieces:
            for record in records(piece, task.field, skip=task.skip):
                lines[piece.number] = record.number
                if record.problem:
                    refuse(piece, record)
                elif record.text == "":
                    empty += 1
                elif record.text is not None:
                    batch.append((piece, record, record.text))
                    size += len(record.text)
                if size >= CHUNK:
                    add(batch)
                    batch, size = [], 0
        if batch:
            add(batch)
    with whole(task.path(unit.number, "npy")) as file:
        np.save(file, np.concatenate(found))
    said = {"lines": list(lines.items()), "empty": empty, "refused": refused, "named": named}
    write_json(task.path(unit.number, "json"), said)  # last: with it, the unit is done


def saved(path: Path, take: Callable[[Any], T]) -> T:
    """What `take` makes of an array or of JSON in a folder of unfinished work. Raises `DataError` when the file is damaged."""
    with damage(path):
        return take(np.load(path) if path.suffix == ".npy" else json.loads(path.read_bytes()))


def damage(path: Path) -> contextlib.AbstractContextManager[None]:
    next = f"{shlex.join(['rm', '-r', str(path.parent)])}, then the same command, which begins anew"
    return reading(path, DataError, "damaged unfinished work", next=next)


def hashes(texts: list[bytes]) -> np.ndarray:
    """[documents, 2] uint64: the 128-bit BLAKE2b (RFC 7693) of each text."""
    return np.frombuffer(b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts), "<u8").reshape(-1, 2)


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """[documents] bool: whether each text is held out. It depends on that text alone, not on its place or on other texts."""
    return hashes[:, 0] / 2**64 >= 1 - fraction if fraction else np.zeros(len(hashes), bool)


def _tokenizer(task: Task) -> Tokenizer:
    if task.tokenizer not in LOADED:
        folder = task.folder.parent / "tokenizer"
        if (tokenizer := load_tokenizer(folder)).fingerprint != task.tokenizer:
            raise DataError("the tokenizer has changed", where=str(folder), next="delete the folder above it, and begin again")
        keep_loaded(tokenizer)
    return LOADED[task.tokenizer]


def keep_loaded(tokenizer: Tokenizer) -> None:
    """Makes the units of this process use it, and those of processes forked from it."""
    LOADED.clear()
    LOADED[tokenizer.fingerprint] = tokenizer
