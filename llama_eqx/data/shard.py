"""One shard of a dataset: its mapped files, and where its documents begin. `shards` describes what is in them."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from llama_eqx.errors import DataError
from llama_eqx.files import reading

AGAIN = "restore the folder, or write another with python -m llama_eqx.prepare"


def token_dtype(vocab: int) -> np.dtype:
    """The dtype on disk of ids below `vocab`."""
    return np.dtype("<u2" if vocab <= 2**16 else "<u4")


@dataclass(frozen=True)
class Shard:
    """`path` is that of its files without their endings. `bytes` is the size of the text in UTF-8. `tokens` includes BOS and EOS.

    Files are mapped when they are first read. A shard holds no map itself, so it can be pickled.
    """

    path: Path
    tokens: int
    documents: int
    bytes: int
    vocab: int

    def ids(self) -> np.ndarray:
        """[tokens], mapped. Raises `DataError` when the file is not what the index says, as do `offsets` and `origins`."""
        return _mapped(self.file("ids"), *self.content["ids"])

    def offsets(self) -> np.ndarray:
        """[documents + 1] int64, mapped: document i has the ids from offset i up to offset i + 1."""
        return _mapped(self.file("offsets"), *self.content["offsets"])

    def origins(self) -> np.ndarray:
        """[documents, 2] int64, mapped: the number of each document's source, and of its record there."""
        return _mapped(self.file("origins"), *self.content["origins"])

    def file(self, kind: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{kind}.npy")

    @property
    def content(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each file."""
        offset = np.dtype("<i8")
        return {
            "ids": ((self.tokens,), token_dtype(self.vocab)),
            "offsets": ((self.documents + 1,), offset),
            "origins": ((self.documents, 2), offset),
        }


class Edges:
    """Where the documents of a shard begin and end among its ids.

    Each offset is checked when it is looked up, so no pass over all of them is needed. Every method raises `DataError` naming shard and
    document where offsets do not rise from 0 to the number of ids.
    """

    def __init__(self, shard: Shard):
        self._shard, self._offsets = shard, shard.offsets()

    def of(self, documents: Int[np.ndarray, " count"]) -> tuple[Int[np.ndarray, " count"], Int[np.ndarray, " count"]]:
        """The index of each document's first id, and the one after its last."""
        begins, ends = self._offsets[documents], self._offsets[documents + 1]
        last, tokens = self._shard.documents - 1, self._shard.tokens
        # Only the first document begins at 0, and only the last ends with the ids. So the signs agree, and no offset lies outside.
        wrong = (begins >= ends) | (np.sign(begins) != np.sign(documents)) | (np.sign(tokens - ends) != np.sign(last - documents))
        if wrong.any():
            at = int(wrong.argmax())
            raise DataError(
                f"a document from id {begins[at]} to {ends[at]} of {tokens}: the offsets are out of order or of another shard",
                where=f"{self._shard.file('offsets')}, document {documents[at]}",
                next=AGAIN,
            )
        return begins, ends

    def before(self, ids: Int[np.ndarray, " count"]) -> Int[np.ndarray, " count"]:
        """How many documents begin before each of the given ids."""
        found = self._offsets.searchsorted(ids)
        self._test_around(found, found)
        return found

    def within(self, starts: Int[np.ndarray, " count"], stops: Int[np.ndarray, " count"]) -> list[np.ndarray]:
        """For each range from its start up to its stop, the ids that begin a document."""
        first, last = self._offsets.searchsorted(starts), self._offsets.searchsorted(stops)
        self._test_around(first, last)
        return [self._offsets[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True)]

    def _test_around(self, first: np.ndarray, last: np.ndarray) -> None:
        """Checks the documents that searches found, and both neighbours: an offset out of order misleads a search to a place beside it."""
        begin = np.maximum(np.minimum(first, last) - 2, 0)
        end = np.minimum(np.maximum(first, last) + 1, self._shard.documents)
        counts = end - begin
        self.of(np.repeat(begin - np.cumsum(counts) + counts, counts) + np.arange(counts.sum()))


def _mapped(file: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    with reading(file, DataError, "damaged token shard", next=AGAIN):
        now = file.stat()
        array = _loaded(file, now.st_ino, now.st_mtime_ns)
    if (array.shape, array.dtype) != (shape, dtype):
        what = f"{array.dtype} {list(array.shape)} in this file, but the index says {dtype} {list(shape)}"
        raise DataError(what, where=str(file), next=AGAIN)
    return array


@functools.lru_cache(maxsize=400)  # each map holds a file descriptor, and a process often has no more than 1024
def _loaded(file: Path, inode: int, written: int) -> np.ndarray:
    return np.load(file, mmap_mode="r").view(np.ndarray)  # a plain array: slices of np.memmap are slow
