"""Tokens on disk: shards of ids with the offsets of their documents, and an index that describes them.

A dataset is a folder with `index.json`, the tokenizer in `tokenizer/`, and three .npy files for each shard: `ids` (uint16, or uint32 if the
vocabulary needs it), `offsets` (int64, where each document begins among the shard's ids, and last the number of ids) and `origins` (int64,
for each document the number of its source in the index and of its record there, 0 if the source is the document). No document lies in two
shards, and every document has ids.
"""

import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_eqx.data.cache import DELETE
from llama_eqx.data.shard import AGAIN, Edges, Shard, token_dtype
from llama_eqx.data.tokenizer import Tokenizer
from llama_eqx.errors import DataError
from llama_eqx.files import reading, write_json

FORMAT = 2  # incremented when what is written changes; shards of another format are made anew
SPLITS = ("train", "val")
COUNTS = ("tokens", "documents", "bytes")
VERIFIED = 2**30  # bytes: a dataset of up to this size is hashed whenever it is opened
HEADER = 128  # bytes, of each .npy file
OWN = "leave out tokenizer=..., which then is the data's own"
SUMS = "sha256.json"
HOLD_OUT = "python -m llama_eqx.prepare validation_fraction=0.01 with the same input and another output"


@dataclass(frozen=True)
class Split:
    """The documents of all shards, one after another, each between BOS and EOS if the dataset has them.

    Tokens and documents are numbered from 0 through all shards.
    """

    shards: tuple[Shard, ...]
    name: str

    @functools.cached_property
    def tokens(self) -> int:
        return self._tokens[-1]

    @functools.cached_property
    def documents(self) -> int:
        return self._documents[-1]

    @functools.cached_property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the ids of tokens `start` up to `stop`, as a new array in the dtype on disk.

        Raises `IndexError` outside the split, `DataError` naming shard and offset for an id that is not in the vocabulary.
        """
        parts = []
        for shard, begin, end, _ in self._runs(start, stop):
            ids = shard.ids()[begin:end]
            if ids.max() >= shard.vocab:
                at = int((ids >= shard.vocab).argmax())
                raise DataError(
                    f"id {ids[at]} is not in the vocabulary of {shard.vocab}",
                    where=f"{shard.file('ids')}, offset {begin + at}",
                    next=AGAIN,
                )
            parts.append(ids)
        return parts[0].copy() if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.uint16)

    def starts(self, start: int, stop: int) -> np.ndarray:
        """[count] int64: the tokens in `start` up to `stop` that begin a document."""
        found = [np.empty(0, np.int64)]
        for shard, begin, end, first in self._runs(start, stop):
            found.append(Edges(shard).within(np.array([begin]), np.array([end]))[0] - begin + first)
        return np.concatenate(found)

    def documents_in(self, start: int, stop: int) -> range:
        """The numbers of the documents that have tokens in `start` up to `stop`."""
        numbers = []
        for token in (start, stop - 1) if start < stop else ():
            i, begin = self._place(self._tokens, token)
            numbers.append(self._documents[i] + int(Edges(self.shards[i]).before(np.array([begin + 1]))[0]) - 1)
        return range(numbers[0], numbers[1] + 1) if numbers else range(0)

    def bounds(self, number: int) -> tuple[int, int]:
        """The token that begins a document, and the one after its last. Raises `IndexError`."""
        i, inside = self._place(self._documents, number)
        near = np.clip([inside, inside - 1, inside + 1], 0, self.shards[i].documents - 1)  # what lies beyond an edge may prove it wrong
        begins, ends = Edges(self.shards[i]).of(near)
        return self._tokens[i] + int(begins[0]), self._tokens[i] + int(ends[0])

    def document(self, number: int) -> np.ndarray:
        """The ids of a document, with its BOS and EOS. Raises `IndexError`."""
        return self.read(*self.bounds(number))

    def source(self, number: int) -> str:
        """Where a document came from: a file, or "file:line". Raises `IndexError`."""
        i, inside = self._place(self._documents, number)
        source, record = self.shards[i].origins()[inside].tolist()
        name = _sources(self.shards[i].path.parent)[source]
        return f"{name}:{record}" if record else name

    @functools.cached_property
    def _tokens(self) -> list[int]:
        return [0, *itertools.accumulate(shard.tokens for shard in self.shards)]

    @functools.cached_property
    def _documents(self) -> list[int]:
        return [0, *itertools.accumulate(shard.documents for shard in self.shards)]

    def _place(self, firsts: list[int], number: int) -> tuple[int, int]:
        """The index of the shard, and the number within it."""
        if not 0 <= number < firsts[-1]:
            raise IndexError(f"{number} is not in 0 … {firsts[-1] - 1}")
        i = bisect.bisect_right(firsts, number) - 1
        return i, number - firsts[i]

    def _runs(self, start: int, stop: int) -> Iterator[tuple[Shard, int, int, int]]:
        """The parts of `start` up to `stop` by shard: the shard, the range within it, and the token it begins with."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        i = bisect.bisect_right(self._tokens, start) - 1
        while start < stop:
            first, end = self._tokens[i], min(stop, self._tokens[i + 1])
            if start < end:
                yield self.shards[i], start - first, end - first, start
            start, i = end, i + 1


@dataclass(frozen=True)
class TokenData:
    """`fingerprint` is a sha256 of the ids, where they came from, and the tokenizer."""

    train: Split
    val: Split
    fingerprint: str


def open_dataset(folder: Path, *, remedy: str, tokenizer: Tokenizer | None = None, verify: bool | None = None) -> TokenData:
    """Opens a dataset that `write_index` completed. The sizes of all files are compared with the index, and no file is read.

    `verify` compares their SHA-256 too; None does so for up to `VERIFIED` bytes.

    Raises `DataError` when files are missing or changed, with `remedy` for what to do, and when the dataset has another `tokenizer`.
    """
    with reading(folder / "index.json", DataError, "no index of token shards", next=remedy):
        content = (folder / "index.json").read_bytes()
        index = json.loads(content)
        if index["format"] != FORMAT:
            raise DataError(f"format {index['format']}, but this version reads {FORMAT}", where=str(folder / "index.json"), next=remedy)
        splits: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        files: dict[Path, tuple[int, str]] = {}
        for record in index["shards"]:
            if record["name"] != Path(record["name"]).name or "\0" in record["name"]:
                raise ValueError(f"{record['name']} lies outside of the folder")
            shard = Shard(folder / record["name"], vocab=index["vocab"], **{count: record[count] for count in COUNTS})
            splits[record["split"]].append(shard)
            for kind, (shape, dtype) in shard.content.items():
                files[shard.file(kind)] = HEADER + int(np.prod(shape)) * dtype.itemsize, record["sha256"][kind]
        train, val = (Split(tuple(splits[name]), name) for name in SPLITS)
        if any(index["splits"][split.name] != counts(split) for split in (train, val)):
            raise ValueError("the counts of the shards do not add up")
        fingerprint = str(index["tokenizer"])
    if tokenizer is not None and tokenizer.fingerprint != fingerprint:
        raise DataError(
            f"this data was prepared with the tokenizer {fingerprint[:12]}… of {index['vocab']} ids,"
            f" but the one given is {tokenizer.fingerprint[:12]}… of {tokenizer.vocab}",
            where=str(folder),
            next=OWN,
        )
    _compare(folder, files, verify, remedy)
    return TokenData(train, val, hashlib.sha256(content).hexdigest())


def seal(folder: Path, files: Iterable[Path]) -> None:
    """Flushes files of a folder to disk, and saves their sizes and SHA-256 in `SUMS` for `check_sealed`."""
    sums = {}
    for path in files:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            sums[path.name] = [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    write_json(folder / SUMS, sums)


def check_sealed(folder: Path) -> None:
    """Raises `DataError` when files have changed since `seal`: by their SHA-256 up to `VERIFIED` bytes, else by size."""
    with reading(folder, DataError, f"{SUMS} cannot be read", next=DELETE):
        files = {folder / name: (int(size), str(sha256)) for name, (size, sha256) in json.loads((folder / SUMS).read_bytes()).items()}
    _compare(folder, files, None, DELETE)


class ShardWriter:
    """Writes the files of one shard, in a `with` statement. `path` is as in `Shard`."""

    def __init__(self, path: Path, vocab: int):
        self.path, self.vocab = path, vocab
        self.tokens = self.documents = self.bytes = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "ShardWriter":
        shard = self._shard()
        self._files = {kind: self._stack.enter_context(shard.file(kind).open("w+b")) for kind in shard.content}
        for kind in self._files:
            self._header(kind)
        self._files["offsets"].write(np.zeros(1, "<i8").tobytes())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, ids: np.ndarray, lengths: np.ndarray, n_bytes: int, origins: np.ndarray) -> None:
        """Adds documents: their ids one after another, the number of ids of each (at least 1), the bytes of all, and [documents, 2]
        origins.
        """
        self._files["ids"].write(ids.data)
        self._files["offsets"].write((self.tokens + np.cumsum(lengths, dtype="<i8")).data)
        self._files["origins"].write(np.ascontiguousarray(origins, "<i8").data)
        self.tokens, self.documents, self.bytes = self.tokens + len(ids), self.documents + len(lengths), self.bytes + n_bytes

    def finish(self) -> dict[str, Any]:
        """Completes the shard's files on disk. Returns its entry in the index."""
        hashes = {}
        for kind, file in self._files.items():
            self._header(kind)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            hashes[kind] = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": self.path.name, **counts(self), "sha256": hashes}

    def _shard(self) -> Shard:
        return Shard(self.path, self.tokens, self.documents, self.bytes, self.vocab)

    def _header(self, kind: str) -> None:
        """Writes a file's header. numpy leaves room for its first axis to grow, so the length can be filled in once it is known."""
        shape, dtype = self._shard().content[kind]
        file = self._files[kind]
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
        assert file.tell() == HEADER


def counts(what: Shard | Split | ShardWriter) -> dict[str, int]:
    return {count: getattr(what, count) for count in COUNTS}


def write_index(
    folder: Path, tokenizer: Tokenizer, shards: Iterable[tuple[str, dict[str, Any]]], sources: list[dict[str, Any]], **more: Any
) -> None:
    """Completes a dataset. `shards` are splits with what `ShardWriter.finish` returned. `sources` have a "name". `more` is kept as is."""
    tokenizer.save(folder / "tokenizer")
    records = [{"split": split, **record} for split, record in shards]
    of = {split: [record for record in records if record["split"] == split] for split in SPLITS}
    index = {
        "format": FORMAT,
        "dtype": token_dtype(tokenizer.vocab).name,
        "vocab": tokenizer.vocab,
        "tokenizer": tokenizer.fingerprint,
        **more,
        "splits": {split: {count: sum(record[count] for record in of[split]) for count in COUNTS} for split in SPLITS},
        "shards": records,
        "sources": sources,
    }
    write_json(folder / "index.json", index)


def _compare(folder: Path, files: dict[Path, tuple[int, str]], verify: bool | None, remedy: str) -> None:
    """Raises `DataError` naming files whose size or SHA-256 differs. `verify` is as in `open_dataset`."""
    if verify is None:
        verify = sum(size for size, _ in files.values()) <= VERIFIED
    if damage := [f"{file.name}: {what}" for file in files if (what := _damage(file, *files[file], verify))]:
        few = damage[:10] + [f"and {len(damage) - 10} more"] * (len(damage) > 10)
        raise DataError("damaged files:\n" + "\n".join(few), where=str(folder), next=remedy)


def _damage(file: Path, size: int, sha256: str, verify: bool) -> str | None:
    """What is wrong with a file that should have this size and hash."""
    try:
        if (found := file.stat().st_size) != size:
            return f"{found} bytes instead of {size}"
        if verify:
            with file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != sha256:
                    return "changed: its sha256 is not that of the index"
    except OSError as error:
        return str(error.strerror)
    return None


@functools.lru_cache(maxsize=4)
def _sources(folder: Path) -> list[str]:
    return [source["name"] for source in json.loads((folder / "index.json").read_bytes())["sources"]]
