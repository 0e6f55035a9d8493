"""Packs whole documents into rows. Which document goes into which row is decided once for a dataset, and kept."""

import hashlib
import json
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from llama_eqx.data.cache import cache_dir, publish
from llama_eqx.data.shard import Edges
from llama_eqx.data.shards import DELETE, Split, check_sealed, seal
from llama_eqx.errors import DataError
from llama_eqx.files import reading

FORMAT = 2  # incremented when what is written changes; an index of another format is rebuilt

Fill = Literal["packed", "single"]
Long = Literal["refuse", "cut"]


class PackIndex(NamedTuple):
    """Row r holds the pieces `firsts[r]` up to `firsts[r + 1]`. Piece p has the `lengths[p]` tokens of a split from `begins[p]` on.

    A piece takes one place less than it has tokens, because its last token is only a target. `counted` is the number of targets in each row
    that the loss counts. All are mapped from disk.
    """

    firsts: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    counted: np.ndarray


def pack_index(split: Split, learned: Split | None, fingerprint: str, seq_len: int, fill: Fill, long_documents: Long) -> PackIndex:
    """Returns the index of a split, from the cache if it was built before.

    `learned` has the offsets of `split`, and an id of 1 for each token to learn. `packed` puts documents into rows by best fit, longest
    first (Ding et al., 2024, arXiv 2404.10830); `single` puts each into a row of its own. A document of more than `seq_len` + 1 tokens is
    cut into pieces that share the token where they meet. Pieces without a counted target are left out.

    Raises `DataError` when a long document must not be cut, when no row is left, and when the index in the cache is damaged; `StorageError`
    when the cache cannot be written.
    """
    settings = [FORMAT, fingerprint, split.name, seq_len, fill, long_documents]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def write(folder: Path) -> None:
        for name, array in _index(split, learned, seq_len, fill, long_documents)._asdict().items():
            np.save(folder / f"{name}.npy", array)
        seal(folder, [folder / f"{name}.npy" for name in PackIndex._fields])

    folder = publish(cache_dir() / "packed" / key, write)
    check_sealed(folder)
    with reading(folder, DataError, "damaged index of rows", next=DELETE):
        index = PackIndex(*(np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in PackIndex._fields))
        if not (len(index.firsts) == len(index.counted) + 1 and len(index.begins) == len(index.lengths) == index.firsts[-1]):
            raise ValueError("the files do not belong together")
    return index


def pack(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """[pieces] int64: the row of each piece of `sizes[i]` ≤ `capacity` places, by best fit, largest first.

    Pieces of one size are placed together, so the time grows with the number of sizes, not of pieces.
    """
    rows, opened = np.empty(len(sizes), np.int64), 0
    room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # open rows by their free places
    some = bytearray(capacity + 1)  # 1 where there are any

    def fill(pieces: np.ndarray, size: int, found: np.ndarray, free: int) -> np.ndarray:
        """Puts pieces of one size into the rows `found`. Returns the pieces that are left."""
        each = free // size  # the best-fitting row remains the best fit while another piece fits
        placed = min(len(pieces), len(found) * each)
        rows[pieces[:placed]] = np.repeat(found, each)[:placed]
        full, rest = divmod(placed, each)
        for taken, left in ((found[:full], free - each * size), (found[full : full + 1], free - rest * size), (found[full + 1 :], free)):
            if len(taken):
                room[left].append(taken)
                some[left] = 1
        return pieces[placed:]

    order = np.argsort(-sizes, kind="stable")
    for pieces in np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1) if len(order) else ():
        size = int(sizes[pieces[0]])
        while len(pieces) and (free := some.find(1, size)) >= 0:
            found = room[free].pop()
            some[free] = bool(room[free])
            pieces = fill(pieces, size, found, free)
        if len(pieces):
            new = np.arange(opened, opened - (-len(pieces) // (capacity // size)))
            opened += len(new)
            fill(pieces, size, new, capacity)
    return rows


def _index(split: Split, learned: Split | None, seq_len: int, fill: Fill, long_documents: Long) -> PackIndex:
    begins, lengths = document_bounds(split)
    places = lengths - 1
    if (long := places > seq_len).any():
        if long_documents == "refuse":
            longest = int(lengths.argmax())
            anywhere = "data.rows=documents lets rows begin anywhere, " if learned is None else ""  # rows of conversations do not
            raise DataError(
                f"{long.sum()} of {len(lengths)} documents of {split.name} are longer than the {seq_len + 1} tokens of a row,"
                f" the longest with {lengths[longest]}",
                where=split.source(longest),
                next=f"data.long_documents=cut cuts them, {anywhere}train.seq_len={lengths[longest] - 1} makes rows long enough",
            )
        pieces = -(-np.maximum(places, 1) // seq_len)
        number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # the number of a piece in its document
        begins, places = np.repeat(begins, pieces) + number * seq_len, np.repeat(places, pieces) - number * seq_len
        lengths = np.minimum(places, seq_len) + 1
    counted = lengths - 1 if learned is None else learned_sums(learned, begins + 1, begins + lengths)
    used = counted > 0
    begins, lengths, counted = begins[used], lengths[used], counted[used]
    if not len(begins):
        raise DataError(f"{split.name} has no document with a token to learn", where=str(split.shards[0].path.parent), next="more text")
    rows = pack(lengths - 1, seq_len) if fill == "packed" else np.arange(len(begins))
    order = np.argsort(rows, kind="stable")
    firsts = np.concatenate([[0], np.cumsum(np.bincount(rows))])
    sums = np.add.reduceat(counted[order], firsts[:-1])
    return PackIndex(firsts, begins[order], lengths[order].astype(np.int32), sums.astype(np.int32))


def document_bounds(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """[documents] int64 each: where the documents of a split begin, and their numbers of tokens. Raises `DataError` as `Edges` does."""
    first, begins, lengths = 0, [], []
    for shard in split.shards:
        some, ends = Edges(shard).of(np.arange(shard.documents))
        begins.append(some + first)
        lengths.append(ends - some)
        first += shard.tokens
    return np.concatenate(begins), np.concatenate(lengths)


def learned_sums(split: Split, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[count] int64: the sums of ids from each of `begins` up to `ends`. These ranges are in order and cross no shard boundary."""
    first, sums = 0, []
    for shard in split.shards:
        last = first + shard.tokens
        mine = (begins - 1 >= first) & (begins - 1 < last)
        edges = np.stack([begins[mine], ends[mine]], 1).ravel() - first
        ids = np.append(shard.ids(), np.uint16(0))  # an edge may lie at the end
        sums.append(np.where(begins[mine] < ends[mine], np.add.reduceat(ids, edges, dtype=np.int64)[::2] if len(edges) else 0, 0))
        first = last
    return np.concatenate(sums)
