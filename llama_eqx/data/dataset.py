"""Makes the rows to train and to evaluate on from a config, and the order in which they are drawn."""

import contextlib
import glob
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_eqx.data.corpus import DataConfig, SourceConfig
from llama_eqx.data.encoding import tokenize
from llama_eqx.data.mixture import shares
from llama_eqx.data.order import Order
from llama_eqx.data.packing import pack_index
from llama_eqx.data.prepared import PreparedConfig
from llama_eqx.data.rows import Documents, Joined, Packed, Rows, Shifted, Windows
from llama_eqx.data.sft import SftConfig, encode_conversations
from llama_eqx.data.shards import HOLD_OUT, OWN, Split, TokenData
from llama_eqx.data.sliding import Sliding
from llama_eqx.data.tokenizer import Tokenizer
from llama_eqx.errors import DataError

LOOKED_AT, SELDOM = 256, 1e-3  # rows that are searched for unknown text, and the share that is not told


class Dataset(NamedTuple):
    """`fingerprint` is a sha256 of the rows of all sources. `names` are the names of the sources of `order`, "" if the data is no mixture.

    `notes` are what the user should know about the data.
    """

    train: Rows
    val: Rows
    order: Order
    names: list[str]
    fingerprint: str
    notes: list[str]

    def epochs(self, samples: int) -> dict[str, float]:
        """For each source, as `data/epoch`: how many times its rows have been seen in the first `samples` samples."""
        found = self.order.epochs(samples)
        return {f"data/epoch/{name}".rstrip("/"): epochs for name, epochs in zip(self.names, found, strict=True)}


def open_data(config: DataConfig, tokenizer: Tokenizer, *, seq_len: int, seed: int, distinct_rows: int | None = None) -> Dataset:
    """Encodes and packs what is not in the cache yet. With `distinct_rows` only that many samples, the first, are drawn, again and again.

    Raises `DataError` for data that cannot be used, naming the source; `StorageError` when the cache cannot be written.
    """
    train, val, fingerprints, notes, weights = [], [], [], [], []
    for name, (weight, source) in config.sources().items():
        with _named("data", name):
            found = _open(source, tokenizer)
            rows = [_rows(source, found, split, seq_len) for split in (found.data.train, found.data.val)]
        train.append(rows[0])
        val.append(rows[1])
        fingerprints.append(_fingerprint(source, found, seq_len))
        notes += found.notes + _lost(rows[1], tokenizer)
        weights.append(weight)
    together = _together(fingerprints)
    order = Order([len(rows) for rows in train], shares(weights), seed, distinct_rows)
    train, val = (_joined(rows, config.position_offset) for rows in (train, val))
    return Dataset(train, val, order, list(config.sources()), together, notes)


def held_out(config: DataConfig, tokenizer: Tokenizer, *, seq_len: int, key: str) -> tuple[Rows, str]:
    """Returns only the rows to evaluate on, and the fingerprint, as `open_data` does. There need be none to train on.

    Raises `DataError`, which names the `key` of the data in the config, and `StorageError`.
    """
    rows, fingerprints = [], []
    for name, (_, source) in config.sources().items():
        with _named(key, name):
            found = _open(source, tokenizer)
            rows.append(_rows(source, found, found.data.val, seq_len))
        fingerprints.append(_fingerprint(source, found, seq_len))
    return _joined(rows, config.position_offset), _together(fingerprints)


def sliding(source: SourceConfig, tokenizer: Tokenizer, *, seq_len: int, stride: int) -> Sliding:
    """Returns the held-out text of a source in sliding windows. They cross document boundaries if the source's `rows` is `windows`.

    Raises `DataError`, `StorageError`.
    """
    found = _open(source, tokenizer)
    split = found.data.val
    _check_not_empty(source, split)
    return Sliding(split, found.learned.get(split.name), seq_len, stride, whole=source.rows == "windows")


@contextlib.contextmanager
def _named(key: str, component: str) -> Iterator[None]:
    """Names the data at `key` of the config, and the component of a mixture, in a `DataError` and the overrides that it advises."""
    try:
        yield
    except DataError as error:
        what = f"{key}: " * (key != "data") + f"the component {component}: " * bool(component) + error.what
        key += f".components.{component}" * bool(component)
        advice = re.sub(r"(?<![\w./])data\.(?=\w+=)", lambda _: f"{key}.", error.next)
        if error.next == OWN and key != "data":  # the tokenizer is that of other data
            advice = "python -m llama_eqx.prepare again, with the tokenizer of the other data: prepared data have it in tokenizer/; "
            advice += f"or {OWN}"
        raise DataError(what, where=error.where, kept=error.kept, next=advice) from error


class _Opened(NamedTuple):
    """`learned` is as in `encode_conversations`, by the name of the split; empty if everything is learned."""

    data: TokenData
    learned: dict[str, Split]
    notes: list[str]


def _open(source: SourceConfig, tokenizer: Tokenizer) -> _Opened:
    try:
        if isinstance(source, SftConfig):
            data, learned = encode_conversations(source, tokenizer)
        else:
            data, learned = tokenize(source, tokenizer), {}
    except DataError as error:
        if not (path := _not_here(source)):
            raise
        there = f"{path} is relative, and not in {Path.cwd()}: if the run was started in a folder that has it, type this there"
        raise DataError(error.what, where=error.where, kept=error.kept, next=f"{there}\nelse {error.next}") from error
    skipped = source.skipped()
    notes = [f"{len(skipped):,} records or files cannot be read and are skipped, the first at {skipped[0]}"] if skipped else []
    return _Opened(data, learned, notes)


def _not_here(source: SourceConfig) -> str | None:
    """The path of a source if it is relative and matches nothing in the working directory, else None."""
    path = getattr(source, "path", None)
    if not path or Path(path).expanduser().is_absolute() or Path(path).exists() or glob.glob(path, recursive=True):
        return None
    return path


def _check_not_empty(source: SourceConfig, split: Split) -> None:
    """Raises `DataError` when a prepared split is empty. Other data is checked when it is encoded."""
    if isinstance(source, PreparedConfig) and not split.tokens:
        raise DataError(f"the {split.name} split is empty", where=str(source.folder), next=HOLD_OUT)


def _rows(source: SourceConfig, opened: _Opened, split: Split, seq_len: int) -> Rows:
    _check_not_empty(source, split)
    if source.rows == "windows":
        return Windows(split, seq_len)
    if source.rows == "documents":
        return Documents(split, seq_len)
    marks = opened.learned.get(split.name)
    index = pack_index(split, marks, opened.data.fingerprint, seq_len, source.rows, source.long_documents)
    return Packed(split, marks, index, seq_len)


def _lost(rows: Rows, tokenizer: Tokenizer) -> list[str]:
    """A note if the tokenizer could not write some of the text in the first of these rows."""
    if tokenizer.unknown is None or not len(rows):
        return []
    batch = rows.read(np.arange(min(len(rows), LOOKED_AT)))
    counted = batch.targets[batch.loss_mask > 0]
    share = np.sum(counted == tokenizer.unknown) / max(1, counted.size)
    what = f"{share:.2%} of the held-out tokens are id {tokenizer.unknown}, which stands for any text that the tokenizer does not know"
    return [f"{what}: it is lost, and bits per byte are too low"] if share > SELDOM else []


def _fingerprint(source: SourceConfig, opened: _Opened, seq_len: int) -> str:
    return f"{opened.data.fingerprint} {source.rows} {source.long_documents} {seq_len}"


def _together(fingerprints: list[str]) -> str:
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()


def _joined(rows: list[Rows], position_offset: int) -> Rows:
    together = rows[0] if len(rows) == 1 else Joined(rows)
    return Shifted(together, position_offset) if position_offset else together
