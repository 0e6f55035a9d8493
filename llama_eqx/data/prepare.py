"""From files of text to a dataset of token shards.

The files are cut into units of work, in order. Each unit is encoded by itself and kept in `OUTPUT/partial`; then groups of units are put
together to shards. What a unit or a shard is depends on the files and settings alone, and each appears under its name when it is whole:
so the result does not depend on who does which when, and what is there after an interruption is not done again.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from llama_eqx.config import Config
from llama_eqx.data.corpus import DataConfig, Document, Part
from llama_eqx.data.engine import EngineConfig
from llama_eqx.data.shards import CHUNK, COUNTS, FORMAT, SPLITS, ShardWriter, encode, open_dataset, token_dtype, write_index
from llama_eqx.data.sources import Piece, Record, Source, find, pieces, records, refusal
from llama_eqx.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from llama_eqx.errors import ConfigError, DataError, StorageError

# What is kept of each document of a unit: its ids and bytes of text, a hash of the text, and where it came from.
DOCUMENT = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("hash", "<u8", (2,)), ("source", "<i8"), ("record", "<i8")])
BLOCK = 2**23  # ids that are moved at once
NAMED = 20  # records that are named one by one
UNITS, LEAST = 256, 2**20  # units of few files, and bytes of each


class PrepareConfig(Config):
    """`input` is a file, a glob or a folder; `output` a folder; `field` the key of .jsonl and the column of .parquet that has the text.

    Each document stands between BOS and EOS, if `bos` and `eos` and the tokenizer have them. `validation_fraction` of the documents is
    held out, by a hash of the text. With `dedup` a text that came before is dropped. A record that cannot be read ends all with
    `on_error: refuse`, and is counted and named with `skip`. A shard is closed when it has `shard_tokens`; a unit of work has some
    `unit_bytes` of the files, or less when they are few, and more where a file cannot be cut.
    """

    input: str | None
    output: str | None
    tokenizer: TokenizerConfig
    field: str
    bos: bool
    eos: bool
    validation_fraction: float
    dedup: bool
    on_error: Literal["refuse", "skip"]
    shard_tokens: int
    unit_bytes: int
    prepare: EngineConfig

    def check(self) -> None:
        if missing := [f"{name}={example}" for name, example in {"input": "GLOB", "output": "FOLDER"}.items() if not getattr(self, name)]:
            raise ConfigError("it is not said what to read, or where to write it", where="prepare", next=" ".join(missing))
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"{self.validation_fraction} is not at least 0 and below 1", where="validation_fraction")
        for name in ("shard_tokens", "unit_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)} is too small", where=name)


class InputConfig(DataConfig):
    """The same text for a tokenizer to be trained on. Records that cannot be read are left out: they are reported when they are encoded."""

    path: str
    field: str
    validation_fraction: float

    def documents(self) -> Iterator[Document]:
        for number, source in enumerate(_sources(self.path)):
            for piece in pieces(number, source, None, self.field):
                yield from (Document(f"{source.name}:{record.number}", record.text) for record in records(piece, self.field) if record.text)

    def parts(self) -> Iterator[Part]:
        for document in self.documents():
            held_out = _held_out(_hashes([document.text.encode()]), self.validation_fraction)[0]
            yield Part("val" if held_out else "train", document)

    def identity(self) -> str:
        texts = b"".join(_hashes([document.text.encode()]).tobytes() for document in self.documents())
        return hashlib.sha256(texts + repr(self.validation_fraction).encode()).hexdigest()


class Prepared(NamedTuple):
    """What came of it. `refused` are records that could not be read, and `named` some of them; `read` are the bytes of files that were
    encoded in these `seconds`, and not in a call before."""

    folder: Path
    counts: dict[str, dict[str, int]]
    shards: int
    duplicates: int
    empty: int
    refused: int
    named: list[str]
    read: int
    seconds: float


@dataclass(frozen=True)
class Unit:
    """Consecutive pieces, of each source no more than one."""

    number: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Task:
    """What all units have in common. `folder` is that of unfinished work, `tokenizer` a fingerprint."""

    folder: Path
    tokenizer: str
    field: str
    bos: bool
    eos: bool
    skip: bool
    validation_fraction: float

    def path(self, unit: int, ending: str) -> Path:
        return self.folder / f"unit-{unit:06}.{ending}"


@dataclass(frozen=True)
class Group:
    """Consecutive units that make up the shards of one number: the unit's number, its first document among all, and for some sources the
    records that come before the unit."""

    number: int
    units: tuple[tuple[int, int, dict[int, int]], ...]


def prepare(config: PrepareConfig) -> Prepared:
    """Does all that is not done yet.

    Raises `ConfigError`, `DataError` naming file and record, and `StorageError`; the work that is done is kept.
    """
    assert config.input is not None
    assert config.output is not None
    began, output = time.monotonic(), Path(config.output).expanduser()
    sources = _sources(config.input)
    trained_on = InputConfig(
        prompt="", position_offset=0, path=config.input, field=config.field, validation_fraction=config.validation_fraction
    )
    tokenizer = config.tokenizer.build(trained_on)
    encoding = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        **{name: getattr(config, name) for name in ("field", "bos", "eos", "on_error", "unit_bytes")},
        "sources": [{"name": source.name, "size": source.size} for source in sources],
    }
    assembly = {name: getattr(config, name) for name in ("validation_fraction", "dedup", "shard_tokens")}
    if (output / "index.json").exists():
        return _finished(output, encoding | assembly)

    partial = output / "partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _claim(partial / "units.json", {**encoding, "modified": [os.stat(source.path).st_mtime_ns for source in sources]})
        tokenizer.save(output / "tokenizer")
        task = Task(
            partial, tokenizer.fingerprint, config.field, config.bos, config.eos, config.on_error == "skip", config.validation_fraction
        )
        size = max(LEAST, sum(source.size for source in sources) // UNITS)  # so that there is work for all cores
        units = _units(sources, min(config.unit_bytes, size), config.field)
        with config.prepare.open() as pool:
            todo = [unit for unit in units if not task.path(unit.number, "json").exists()]
            weights = [sum(piece.weight for piece in unit.pieces) for unit in units]
            read = sum(weights[unit.number] for unit in todo)
            with _bar("tokenizing", "B", sum(weights), sum(weights) - read) as bar:
                for i in pool(run_unit, [(task, unit) for unit in todo]):
                    bar.update(weights[todo[i].number])
            groups, dropped = _plan(task, config, units)
            _claim(partial / "shards.json", assembly)
            todo = [group for group in groups if not (partial / f"group-{group.number:05}.json").exists()]
            with _bar("writing", " shards", len(groups), len(groups) - len(todo)) as bar:
                for _ in pool(run_shards, [(task, group, tokenizer.vocab, config.dedup) for group in todo]):
                    bar.update()
        written = [json.loads((partial / f"group-{group.number:05}.json").read_text()) for group in groups]
        shards = [(split, entry) for group in written for split, entry in group]
        settings = {name: value for name, value in (encoding | assembly).items() if name not in ("format", "tokenizer", "sources")}
        write_index(output, tokenizer, shards, encoding["sources"], settings=settings, dropped=dropped)
        shutil.rmtree(partial)
    except OSError as error:
        raise StorageError(
            f"cannot write: {error}", where=str(output), kept=f"the work in {partial}", next="the same command continues"
        ) from error
    return _finished(output, encoding | assembly)._replace(read=read, seconds=time.monotonic() - began)


def run_unit(task: Task, unit: Unit) -> None:
    """Encodes a unit, and keeps its ids, its `DOCUMENT`s and what else there is to say of it.

    Raises `DataError` naming file and record, unless they are to be skipped.
    """
    tokenizer, empty, refused, named = _tokenizer(task.folder.parent / "tokenizer", task.tokenizer), 0, 0, []
    lines = dict.fromkeys([piece.number for piece in unit.pieces], 0)
    found = [np.empty(0, DOCUMENT)]

    def refuse(piece: Piece, record: Record) -> None:
        nonlocal refused
        error = refusal(piece, record, "input")
        if not task.skip:
            raise DataError(error.what, where=error.where, kept="what was done before", next=f"{error.next}; or on_error=skip")
        refused += 1
        if refused <= NAMED:
            named.append([piece.number, record.number, record.problem])

    def add(batch: list[tuple[Piece, Record, str]]) -> None:
        nonlocal empty
        try:
            ids, lengths = encode([text for _, _, text in batch], tokenizer, bos=task.bos, eos=task.eos)
        except DataError as error:
            if len(batch) > 1:
                for one in batch:  # to find out which it is
                    add([one])
                return
            refuse(batch[0][0], batch[0][1]._replace(problem=error.what))
            return
        texts = [text.encode() for _, _, text in batch]
        documents = np.empty(len(batch), DOCUMENT)
        documents["tokens"], documents["bytes"], documents["hash"] = lengths, list(map(len, texts)), _hashes(texts)
        documents["source"] = [piece.number for piece, _, _ in batch]
        documents["record"] = [record.number for _, record, _ in batch]
        empty += int((lengths == 0).sum())
        found.append(documents[lengths > 0])
        file.write(ids.data)

    with _whole(task.path(unit.number, "ids")) as file:
        batch, size = [], 0
        for piece in unit.pieces:
            for record in records(piece, task.field):
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
    with _whole(task.path(unit.number, "npy")) as file:
        np.save(file, np.concatenate(found))
    said = {"lines": list(lines.items()), "empty": empty, "refused": refused, "named": named}
    with _whole(task.path(unit.number, "json")) as file:  # last: with it, the unit is done
        file.write(json.dumps(said).encode())


def run_shards(task: Task, group: Group, vocab: int, dedup: bool) -> None:
    """Puts the shards of a group into the dataset, and keeps their entries in its index."""
    kept = np.load(task.folder / "kept.npy", mmap_mode="r") if dedup else None
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=task.folder)))
        writers = {split: stack.enter_context(ShardWriter(folder / f"{split}-{group.number:05}", vocab)) for split in SPLITS}
        for number, first, before in group.units:
            if not len(documents := np.load(task.path(number, "npy"))):
                continue
            held_out = _held_out(documents["hash"], task.validation_fraction)
            origins = np.stack([documents["source"], documents["record"] + _before(documents, before)], 1)
            ends = np.cumsum(documents["tokens"])
            ids = np.memmap(task.path(number, "ids"), token_dtype(vocab), "r")
            cuts = np.unique([*np.searchsorted(ends, np.arange(0, ends[-1], BLOCK)), len(documents)])
            for begin, end in itertools.pairwise(cuts.tolist()):
                part = slice(begin, end)
                lengths = documents["tokens"][part]
                here = ids[ends[begin] - lengths[0] : ends[end - 1]]
                for split, chosen in (("train", ~held_out[part]), ("val", held_out[part])):
                    if kept is not None:
                        chosen &= kept[first + begin : first + end]
                    if chosen.any():
                        row = here if chosen.all() else here[np.repeat(chosen, lengths)]
                        writers[split].add(row, lengths[chosen], int(documents["bytes"][part][chosen].sum()), origins[part][chosen])
        entries = [(split, writer.finish()) for split, writer in writers.items() if writer.documents]
        for _, entry in entries:
            for kind in entry["sha256"]:
                name = f"{entry['name']}.{kind}.npy"
                os.replace(folder / name, task.folder.parent / name)
    with _whole(task.folder / f"group-{group.number:05}.json") as file:
        file.write(json.dumps(entries).encode())
    for number, _, _ in group.units:
        task.path(number, "ids").unlink(missing_ok=True)


def _plan(task: Task, config: PrepareConfig, units: list[Unit]) -> tuple[list[Group], dict[str, Any]]:
    """Which units go into which shards, and what is left out.

    Raises `DataError` when a split is empty.
    """
    said = [json.loads(task.path(unit.number, "json").read_text()) for unit in units]
    firsts = np.cumsum([0, *(len(np.load(task.path(unit.number, "npy"), mmap_mode="r")) for unit in units)]).tolist()
    kept = None
    if config.dedup:
        kept = _first_of_each(
            np.concatenate([np.empty((0, 2), "<u8"), *(np.load(task.path(unit.number, "npy"))["hash"] for unit in units)])
        )
        with _whole(task.folder / "kept.npy") as file:
            np.save(file, kept)

    groups, members, before, tokens = [], [], collections.Counter(), 0
    refused, named, documents_of = 0, [], dict.fromkeys(SPLITS, 0)
    for unit, first in zip(units, firsts, strict=False):
        documents, what = np.load(task.path(unit.number, "npy")), said[unit.number]
        held_out = _held_out(documents["hash"], config.validation_fraction)
        stays = np.ones(len(documents), bool) if kept is None else kept[first : first + len(documents)]
        documents_of["val"] += int((stays & held_out).sum())
        documents_of["train"] += int((stays & ~held_out).sum())
        cut = {piece.number: before[piece.number] for piece in unit.pieces if before[piece.number]}
        members.append((unit.number, first, cut))
        refused += what["refused"]
        for number, record, problem in what["named"][: NAMED - len(named)]:
            name = next(piece.source.name for piece in unit.pieces if piece.number == number)
            named.append(f"{name}:{record + before[number]}: {problem}" if record else f"{name}: {problem}")
        for piece, (number, lines) in zip(unit.pieces, what["lines"], strict=True):
            before[number] += lines if piece.source.name.endswith(".jsonl") else 0  # others are not cut, or know it
        tokens += int(documents["tokens"][stays & ~held_out].sum())
        if tokens >= config.shard_tokens or unit is units[-1]:
            groups.append(Group(len(groups), tuple(members)))
            members, tokens = [], 0
    empty = sum(what["empty"] for what in said)
    if not documents_of["train"] or not (documents_of["val"] or not config.validation_fraction):
        split = "val" if documents_of["train"] else "train"
        raise DataError(
            f"the {split} split is empty: {sum(documents_of.values())} documents with text, {empty} empty and {refused} refused",
            where="validation_fraction",
            kept="what is encoded",
            next="another validation_fraction (0 holds nothing out), or more text",
        )
    duplicates = 0 if kept is None else len(kept) - int(kept.sum())
    return groups, {"duplicates": duplicates, "empty": empty, "refused": refused, "named": named}


def _sources(where: str) -> list[Source]:
    sources = find(where, "input")
    if unclear := [source.name for source in sources if source.name.removesuffix(".gz").removesuffix(".zst").endswith(".json")]:
        raise DataError(
            "a .json file could be anything", where=", ".join(unclear[:5]), next="name it .jsonl if each of its lines is an object"
        )
    return sources


def _units(sources: list[Source], size: int, field: str) -> list[Unit]:
    units, members, weight = [], [], 0
    for number, source in enumerate(sources):
        for piece in pieces(number, source, size, field):
            members.append(piece)
            weight += piece.weight
            if weight >= size:
                units.append(Unit(len(units), tuple(members)))
                members, weight = [], 0
    return [*units, Unit(len(units), tuple(members))] if members else units


def _hashes(texts: list[bytes]) -> np.ndarray:
    """[documents, 2] uint64: BLAKE2b (RFC 7693) of each text, in 128 bits."""
    return np.frombuffer(b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts), "<u8").reshape(-1, 2)


def _held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """[documents] bool: a text is held out or not wherever it stands, and whatever else there is."""
    return hashes[:, 0] / 2**64 >= 1 - fraction if fraction else np.zeros(len(hashes), bool)


def _first_of_each(hashes: np.ndarray) -> np.ndarray:
    """[documents] bool: whether the hash has not come before."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable
    again = (hashes[order[1:]] == hashes[order[:-1]]).all(1)
    first = np.ones(len(hashes), bool)
    first[order[1:][again]] = False
    return first


def _before(documents: np.ndarray, before: dict[int, int]) -> np.ndarray:
    """[documents] int64: how many records of its source come before the unit."""
    count = np.zeros(len(documents), np.int64)
    for source, lines in before.items():
        count[documents["source"] == source] = lines
    return count


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Any]:
    """A file that appears under its name when it is whole and on disk."""
    number, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    with open(number, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(name, path)


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Raises `DataError` when unfinished work with other settings is there."""
    if path.exists():
        _compare(json.loads(path.read_text()), settings, path.parent.parent, "unfinished work")
    else:
        with _whole(path) as file:
            file.write(json.dumps(settings).encode())


def _compare(old: dict[str, Any], new: dict[str, Any], folder: Path, what: str) -> None:
    lines = []
    for name in (name for name in new if old.get(name) != new[name]):
        if isinstance(new[name], list):
            files = [source["name"] for source in new["sources"]]
            changed = [file for file, was, now in zip(files, old[name], new[name], strict=False) if was != now]
            lines.append(f"{name}: {len(old[name])} -> {len(new[name])} files, {len(changed)} of them others or changed: {changed[:3]}")
        else:
            lines.append(f"{name}: {old.get(name)} -> {new[name]}")
    if lines:
        raise DataError(
            f"there is {what} here, and not this one:\n" + "\n".join(lines), where=str(folder), next="output=ANOTHER, or delete this folder"
        )


def _finished(folder: Path, settings: dict[str, Any]) -> Prepared:
    """Raises `DataError` when the dataset in `folder` is another or damaged."""
    data = open_dataset(folder, remedy="delete this folder, and the same command makes it anew")
    index = json.loads((folder / "index.json").read_text())
    old = {name: index[name] for name in ("format", "tokenizer", "sources")} | index["settings"]
    _compare(old, settings, folder, "a dataset")
    shutil.rmtree(folder / "partial", ignore_errors=True)
    dropped = {"duplicates": 0, "empty": 0, "refused": 0, "named": [], **index["dropped"]}
    counts = {split.name: {count: getattr(split, count) for count in COUNTS} for split in (data.train, data.val)}
    return Prepared(folder, counts, len(index["shards"]), read=0, seconds=0.0, **dropped)


def _bar(what: str, unit: str, total: int, done: int) -> tqdm:
    return tqdm(desc=what, unit=unit, unit_scale=unit == "B", total=total, initial=done, disable=None)


@functools.lru_cache(maxsize=2)
def _tokenizer(folder: Path, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        raise DataError("the tokenizer has changed", where=str(folder), next="delete the folder above it, and begin again")
    return tokenizer
