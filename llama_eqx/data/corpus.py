"""Where text comes from, and what part of it is held out."""

import abc
import hashlib
import itertools
import os
import sysconfig
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal, NamedTuple

from llama_eqx.config import Config
from llama_eqx.data.cache import cache_dir, publish
from llama_eqx.data.sources import LISTED, find, pieces, read_text, records, refusal
from llama_eqx.errors import ConfigError, DataError

# If fewer documents are expected in the validation split, each document is cut instead of the corpus.
MIN_HELD_OUT = 5


@dataclass(frozen=True)
class Document:
    """`name` is relative to the corpus, so that it is the same on every machine."""

    name: str
    text: str


class Part(NamedTuple):
    split: Literal["train", "val"]
    document: Document


class DataConfig(Config):
    """What a run trains on. A sample after training starts from `prompt`.

    `position_offset` is added to every position of every row, in training and evaluation. Rotary attention depends only on differences of
    positions, so in exact arithmetic nothing changes; only rounding does.
    """

    prompt: str
    position_offset: int

    def check(self) -> None:
        if not 0 <= self.position_offset < 2**30:
            raise ConfigError(f"{self.position_offset} is not at least 0 and below 2³⁰", where="position_offset")

    @abc.abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yields every document, always in the same order.

        Raises `DataError` naming a file that cannot be read.
        """

    @abc.abstractmethod
    def parts(self) -> Iterator[Part]:
        """Yields every document with its split, in order."""

    @abc.abstractmethod
    def identity(self) -> str:
        """A sha256 of the names and texts of all documents and of how they are split."""

    def require(self, identity: str) -> None:
        """Raises `DataError` when `identity` has changed. What was read meanwhile may belong to neither text."""
        if self.identity() != identity:
            raise DataError("the files changed while they were read", where="data.path", next="the same command, once they are complete")

    @abc.abstractmethod
    def sources(self) -> "dict[str, tuple[float, SourceConfig]]":
        """The sources that are mixed, with their weights, by name."""


class SourceConfig(DataConfig):
    """Documents of one kind. `rows` says how the rows of a batch are made of them:

    windows: all documents one after another, cut wherever a row is full. Attention crosses document boundaries.
    documents: the same, but attention stays within a document, and nothing is predicted across a boundary.
    packed: whole documents, several per row. Each attends only to itself.
    single: one document per row.

    The last two leave the rest of a row empty. They `refuse` a document that is longer than a row, or `cut` it into pieces.
    """

    rows: Literal["windows", "documents", "packed", "single"]
    long_documents: Literal["refuse", "cut"]

    def skipped(self) -> list[str]:
        """The locations of records that cannot be read and are skipped as requested."""
        return []

    def sources(self) -> "dict[str, tuple[float, SourceConfig]]":
        return {"": (1.0, self)}


class CorpusConfig(SourceConfig):
    """Text. `validation_fraction` of the corpus is held out; 1 is for text that is only evaluated on.

    `holdout: tuning` instead holds out the last tenth of the training part and leaves the true validation text alone. Tune on that, and
    look at `validation` once.
    """

    validation_fraction: float
    holdout: Literal["validation", "tuning"]

    def check(self) -> None:
        super().check()
        if not 0 < self.validation_fraction <= 1:
            raise ConfigError(f"{self.validation_fraction} is not between 0 and 1", where="validation_fraction")

    def parts(self) -> Iterator[Part]:
        """Yields every document with its split, in order.

        A hash of its name gives each document a place in [0, 1), and the held-out range is cut from the end. A document stays where it is
        when other files are added or removed. Lines and rows are named by their numbers, so an inserted one moves those after it. In a
        corpus of few documents each document is cut by characters in the same proportions.
        """
        first, last = self.held_out()
        documents = self.documents()
        few = int(MIN_HELD_OUT / self.validation_fraction)
        head = list(itertools.islice(documents, few))
        if len(head) < few:
            for document in head:
                name, text = document.name, document.text
                begin, end = int(len(text) * first), int(len(text) * last)
                parts = Part("train", Document(name, text[:begin])), Part("val", Document(name, text[begin:end]))
                yield from (part for part in parts if part.document.text)
            return
        yield from self.whole(itertools.chain(head, documents))

    def whole(self, documents: Iterable[Document]) -> Iterator[Part]:
        """Yields uncut documents with their splits. Those behind the held-out range are left out."""
        first, last = self.held_out()
        for document in documents:
            place = int.from_bytes(hashlib.sha256(_bytes(document.name)).digest()[:6]) / 2**48
            if place < last:
                yield Part("train" if place < first else "val", document)

    def identity(self) -> str:
        found = hashlib.sha256(repr(self.held_out()).encode())
        for document in self.documents():
            for content in (_bytes(document.name), document.text.encode()):
                found.update(len(content).to_bytes(8))
                found.update(content)
        return found.hexdigest()

    def held_out(self) -> tuple[float, float]:
        """The range of places in [0, 1) that is held out. Places behind it are in no split."""
        end = 1 - self.validation_fraction
        return (end, 1.0) if self.holdout == "validation" else (0.9 * end, end)


class StdlibConfig(CorpusConfig):
    """The source and documentation of the running Python's standard library: about 10 MB of text that is always available.

    Tests are left out, and so are files that are longer than 2²⁰ characters or not UTF-8.
    """

    def documents(self) -> Iterator[Document]:
        root = sysconfig.get_paths()["stdlib"]
        skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
        empty = True
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(set(folders) - skipped)
            for path in (Path(folder, file) for file in sorted(files)):
                if path.suffix not in (".py", ".txt", ".rst"):
                    continue
                try:
                    text = read_text(path)
                except DataError:
                    continue
                if 0 < len(text) <= 2**20:
                    empty = False
                    yield Document(path.relative_to(root).as_posix(), text)
        if empty:
            raise DataError("this Python has no sources of its standard library", where=root, next="data=text data.path=FOLDER")


class TextConfig(CorpusConfig):
    """The user's own text: a file, a glob, or a folder with all *.txt, *.md and *.jsonl below it, also as *.gz or *.zst, and all *.parquet.

    A text file is a document. So is each line of a .jsonl file, an object whose "text" is a string, and each row of a .parquet file. What
    cannot be read ends the run with `on_error: refuse`, and is counted and left out with `skip`.
    """

    path: str | None
    on_error: Literal["refuse", "skip"]

    def documents(self) -> Iterator[Document]:
        return self._documents([])

    def skipped(self) -> list[str]:
        found: list[str] = []
        if self.on_error == "skip":
            for _ in self._documents(found):
                pass
        return found

    def _documents(self, skipped: list[str]) -> Iterator[Document]:
        if not self.path:
            raise ConfigError("data=text needs data.path=FOLDER_OR_GLOB", where="data.path")
        empty = True
        for number, source in enumerate(find(self.path, "data.path")):
            for piece in pieces(number, source, None, "text"):
                for record in records(piece, "text", skip=self.on_error == "skip"):
                    if record.problem:
                        error = refusal(piece, record, "data.path")
                        if self.on_error == "refuse":
                            raise DataError(error.what, where=error.where, next=f"{error.next}; or data.on_error=skip")
                        skipped.append(error.where)
                    elif record.text:
                        empty = False
                        yield Document(f"{source.name}:{record.number}" if record.number else source.name, record.text)
        if empty:
            raise DataError("no text here", where=self.path, next=f"data.path=FOLDER with {LISTED} files, or a glob")


class ShakespeareConfig(CorpusConfig):
    """Tiny Shakespeare (Karpathy, 2015), 1.1 MB. The last tenth is held out as in nanoGPT. It is downloaded once unless `path` is given.

    `sha256` is that of the file at `url`.
    """

    path: str | None
    url: str
    sha256: str

    def documents(self) -> Iterator[Document]:
        path = Path(self.path).expanduser() if self.path else publish(cache_dir() / "downloads" / self.sha256, self._download) / "input.txt"
        yield Document("input.txt", read_text(path))

    def _download(self, folder: Path) -> None:
        advice = f"download {self.url} yourself and pass data.path=FILE"
        try:
            with urllib.request.urlopen(self.url, timeout=30) as response:
                content = response.read()
        except (OSError, ValueError, HTTPException) as error:
            raise DataError(f"the download failed: {error}", where=self.url, next=advice) from error
        if (found := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise DataError(f"the downloaded file is not the expected one: sha256 {found}, not {self.sha256}", where=self.url, next=advice)
        (folder / "input.txt").write_bytes(content)


def _bytes(name: str) -> bytes:
    return name.encode(errors="surrogateescape")  # file names may be any bytes
