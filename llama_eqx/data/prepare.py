"""Turns files of text into a dataset of token shards.

The files are cut into units of work, in order. Each unit is encoded by itself and kept in `OUTPUT/partial`. Then groups of units are put
together into shards. A unit or a shard depends on the files and settings alone, and appears under its name once it is whole. So the result
does not depend on who does which when, and work that was done before an interruption is not done again.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from llama_eqx.config import Config
from llama_eqx.data.assembly import plan, run_shards
from llama_eqx.data.corpus import DataConfig, Document, Part
from llama_eqx.data.engine import EngineConfig
from llama_eqx.data.shards import COUNTS, FORMAT, open_dataset, write_index
from llama_eqx.data.sources import TEXT, Source, find, kind_of, pieces, plain, records
from llama_eqx.data.tokenizer import TokenizerConfig
from llama_eqx.data.units import Task, cut_units, hashes, held_out, keep_loaded, run_unit, saved
from llama_eqx.errors import ConfigError, DataError, StorageError
from llama_eqx.files import MALFORMED, reading, write_json
from llama_eqx.writer import lock

MODIFIED = "modified.json"
DROPPED = ("duplicates", "empty", "refused")  # what an index counts of records without tokens
LOCK = ".writer"  # in the folder of unfinished work, and deleted with it


class PrepareConfig(Config):
    """`input` is a file, a glob or a folder; `output` a folder; `field` the key in .jsonl and the column in .parquet that holds the text.

    Each document is put between BOS and EOS, if `bos` and `eos` are set and the tokenizer has them. `validation_fraction` of the documents
    is held out, by a hash of the text. `dedup` drops a text that came before. `on_error` is `refuse`, which ends the command at a record
    that cannot be read, or `skip`, which counts and names it. A shard is closed once it has `shard_tokens`. A unit of work has about
    `unit_bytes` of the files: less if they are few, more where a file cannot be cut.
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
    """The same text, to train a tokenizer on. Records that cannot be read are left out here and reported when they are encoded."""

    path: str
    field: str
    on_error: Literal["refuse", "skip"]
    validation_fraction: float

    def documents(self) -> Iterator[Document]:
        for number, source in enumerate(_sources(self.path)):
            for piece in pieces(number, source, None, self.field):
                for record in records(piece, self.field, skip=self.on_error == "skip"):
                    if record.text:
                        yield Document(f"{source.name}:{record.number}", record.text)

    def parts(self) -> Iterator[Part]:
        for document in self.documents():
            apart = held_out(hashes([document.text.encode()]), self.validation_fraction)[0]
            yield Part("val" if apart else "train", document)

    def identity(self) -> str:
        texts = b"".join(hashes([document.text.encode()]).tobytes() for document in self.documents())
        return hashlib.sha256(texts + repr(self.validation_fraction).encode()).hexdigest()


class Prepared(NamedTuple):
    """The result. `refused` is the number of records that could not be read, and `named` are some of them. `read` is the number of bytes of
    files that were encoded in these `seconds`, without those of earlier calls. `touched` are files that were written to or copied since and
    still have the same size.
    """

    folder: Path
    counts: dict[str, dict[str, int]]
    shards: int
    duplicates: int
    empty: int
    refused: int
    named: list[str]
    touched: list[str]
    read: int
    seconds: float


def prepare(config: PrepareConfig) -> Prepared:
    """Does all work that is not done yet.

    Raises `ConfigError`, `DataError` naming file and record, and `StorageError`. Finished work is kept.
    """
    assert config.input is not None
    assert config.output is not None
    began, output = time.monotonic(), Path(config.output).expanduser()
    sources = _sources(config.input)
    trained_on = InputConfig(
        prompt="",
        position_offset=0,
        path=config.input,
        field=config.field,
        on_error=config.on_error,
        validation_fraction=config.validation_fraction,
    )
    tokenizer = config.tokenizer.build(trained_on)
    encoding = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        **{name: getattr(config, name) for name in ("field", "bos", "eos", "on_error", "unit_bytes")},
        "sources": [{"name": source.name, "size": source.size} | _read_as(source) for source in sources],
    }
    assembly = {name: getattr(config, name) for name in ("validation_fraction", "dedup", "shard_tokens")}
    if (output / "index.json").exists():
        return _finished(output, encoding | assembly, sources)

    partial, modified = output / "partial", _modified(sources)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _alone(partial / LOCK):
            if (output / "index.json").exists():  # another process has finished it since
                return _finished(output, encoding | assembly, sources)
            with _claimed(partial, {**encoding, "modified": modified}):
                tokenizer.save(output / "tokenizer")
                keep_loaded(tokenizer)
                skip = config.on_error == "skip"
                task = Task(partial, tokenizer.fingerprint, config.field, config.bos, config.eos, skip, config.validation_fraction)
                units = cut_units(sources, config.unit_bytes, config.field)
                with config.prepare.open() as pool:
                    todo = [unit for unit in units if not task.path(unit.number, "json").exists()]
                    weights = [sum(piece.weight for piece in unit.pieces) for unit in units]
                    read = sum(weights[unit.number] for unit in todo)
                    with _bar("tokenizing", "B", sum(weights), sum(weights) - read) as bar:
                        for i in pool(run_unit, [(task, unit) for unit in todo]):
                            bar.update(weights[todo[i].number])
                    groups, dropped = plan(task, units, config.dedup, config.shard_tokens)
                    _claim(partial / "shards.json", assembly)
                    todo = [group for group in groups if not (partial / f"group-{group.number:05}.json").exists()]
                    with _bar("writing", " shards", len(groups), len(groups) - len(todo)) as bar:
                        for _ in pool(run_shards, [(task, group, tokenizer.vocab, config.dedup) for group in todo]):
                            bar.update()
            shards = [entry for group in groups for entry in saved(partial / f"group-{group.number:05}.json", _entries)]
            settings = {name: value for name, value in (encoding | assembly).items() if name not in ("format", "tokenizer", "sources")}
            write_json(output / MODIFIED, modified)  # not in the index, so that the same data has the same fingerprint
            write_index(output, tokenizer, shards, encoding["sources"], settings=settings, dropped=dropped)
    except OSError as error:
        raise StorageError(
            f"cannot write: {error}", where=str(output), kept=f"the work in {partial}", next="the same command continues"
        ) from error
    return _finished(output, encoding | assembly, sources, verify=False)._replace(read=read, seconds=time.monotonic() - began)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds the lock in a file, alone on this machine. The lock ends with its process. Unlike in `writer` there is no heartbeat: with
    another thread, workers could not be forked.

    Raises `ConfigError` naming the holder.
    """
    with path.open("a+") as file:
        try:
            lock(file)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{file.read() or 'another process'} is writing here",
                where=str(path.parent.parent),
                kept="its work is untouched",
                next="wait for its end, or output=ANOTHER",
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _read_as(source: Source) -> dict[str, str]:
    """The kind of a file that was read as text when only lower-case `.jsonl` and `.parquet` were not, so that older work on it does not
    match.
    """
    kind = kind_of(source)
    old = source.name.removesuffix(".gz").removesuffix(".zst")
    return {} if kind == TEXT or old.endswith(kind) else {"kind": kind}


def _modified(sources: list[Source]) -> list[int]:
    """When each file was last written to, in nanoseconds; 0 for a file that is gone."""
    return [os.stat(source.path).st_mtime_ns if os.path.exists(source.path) else 0 for source in sources]


def _then(path: Path, count: int) -> list[int] | None:
    """The saved times of `count` files; None if they are missing, as in older datasets, or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, *MALFORMED):
        return None
    return found if isinstance(found, list) and len(found) == count else None


def _sources(where: str) -> list[Source]:
    sources = find(where, "input")
    if unclear := [source.name for source in sources if plain(source).endswith(".json")]:
        raise DataError(
            "a .json file could be anything", where=", ".join(unclear[:5]), next="name it .jsonl if each of its lines is an object"
        )
    return sources


@contextlib.contextmanager
def _claimed(partial: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Claims the folder of unfinished work. Work that a `DataError` ended would end so again, so other work may then take its place.

    Raises `DataError` as `_claim` does.
    """
    units, ended = partial / "units.json", partial / "ended"
    old = saved(units, dict) if units.exists() else settings
    if settings in (old, {**old, "on_error": "skip"}):  # the units of a command that refuses have left nothing out
        write_json(units, settings)
    elif ended.exists():
        for left in sorted(partial.iterdir(), key=lambda path: path == units):  # while there are units, there is a claim
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    _claim(units, settings)
    ended.unlink(missing_ok=True)
    try:
        yield
    except DataError:
        ended.touch()
        raise


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Saves the settings of unfinished work. Raises `DataError` when unfinished work with other settings is there."""
    if path.exists():
        _compare(saved(path, dict), settings, path.parent.parent, "unfinished work")
    else:
        write_json(path, settings)


def _entries(group: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(str(split), dict(entry)) for split, entry in group]


def _compare(old: dict[str, Any], new: dict[str, Any], folder: Path, what: str) -> None:
    lines = []
    for name in (name for name in new if old.get(name) != new[name]):
        if isinstance(new[name], list) and isinstance(before := old.get(name), list):
            files = [source["name"] for source in new["sources"]]
            changed = [file for file, was, now in zip(files, before, new[name], strict=False) if was != now]
            lines.append(f"{name}: {len(before)} -> {len(new[name])} files, {len(changed)} of them others or changed: {changed[:3]}")
        else:
            lines.append(f"{name}: {old.get(name)} -> {new[name]}")
    if lines:
        raise DataError(
            f"there is {what} here, and not this one:\n" + "\n".join(lines), where=str(folder), next="output=ANOTHER, or delete this folder"
        )


def _finished(folder: Path, settings: dict[str, Any], sources: list[Source], *, verify: bool | None = None) -> Prepared:
    """Opens the finished dataset in `folder`. `verify` is as in `open_dataset`.

    Raises `DataError` when the dataset is another or damaged.
    """
    remedy = "delete this folder, and the same command makes it anew"
    data = open_dataset(folder, remedy=remedy, verify=verify)
    shutil.rmtree(folder / "partial", ignore_errors=True)
    with reading(folder / "index.json", DataError, "no index of prepared data", next=remedy):
        index = json.loads((folder / "index.json").read_bytes())
        old = {name: index[name] for name in ("format", "tokenizer", "sources")} | index["settings"]
        named, dropped = list(index["dropped"].get("named", [])), {name: int(index["dropped"].get(name, 0)) for name in DROPPED}
    _compare(old, settings, folder, "a dataset")
    now = _modified(sources)
    then = _then(folder / MODIFIED, len(sources)) or now
    touched = [source.name for source, a, b in zip(sources, then, now, strict=True) if a != b]
    counts = {split.name: {count: getattr(split, count) for count in COUNTS} for split in (data.train, data.val)}
    return Prepared(folder, counts, len(index["shards"]), named=named, touched=touched, read=0, seconds=0.0, **dropped)


def _bar(what: str, unit: str, total: int, done: int) -> tqdm:
    return tqdm(desc=what, unit=unit, unit_scale=unit == "B", total=total, initial=done, disable=None)
