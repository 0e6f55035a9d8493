"""The interface of every tokenizer."""

import abc
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llama_eqx.config import Config
from llama_eqx.data.corpus import DataConfig
from llama_eqx.errors import DataError
from llama_eqx.files import write, write_json

MARK = "tokenizer_kind.json"


class Tokenizer(abc.ABC):
    """Ids are 0 … `vocab` - 1.

    `bos` and `eos` begin and end a document, and `pad` fills a row; each is None if there is none. `stop` are all ids at which a generated
    text ends: `eos`, others that the model's files name, and the ends of a turn of a chat. `special` are the ids that stand for no text, by
    their names. `chat` names the chat format that they are made for, one of `llama_eqx.data.chat.FORMATS`. `unknown` stands for text
    that the tokenizer cannot write; None if it can write any.

    Text is not parsed for special ids unless that is asked: "<s>" in it is three characters.
    """

    kind: ClassVar[str]
    file: ClassVar[str]
    vocab: int
    bos: int | None
    eos: int | None
    stop: tuple[int, ...]
    pad: int | None
    special: Mapping[str, int]
    chat: str | None
    unknown: int | None = None

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids that begin a text that is not a document, such as a prompt."""
        return () if self.bos is None else (self.bos,)

    @property
    def fingerprint(self) -> str:
        """A sha256 of everything that determines the ids of a document."""
        return fingerprint(self.kind, self._definition(), self._settings())

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of `text`, without BOS or EOS. With `special`, the names of special ids in it become these ids.

        Raises `DataError` when it cannot be encoded.
        """
        if not special or not self.special:
            return self.encode_all([text])[0].tolist()
        names = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        parts = [part for part in re.split(f"({names})", text) if part]
        return [i for part in parts for i in ([self.special[part]] if part in self.special else self.encode(part))]

    @abc.abstractmethod
    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, as integer arrays: faster than one by one."""

    def decode(self, ids: Iterable[Any]) -> str:
        """Returns the text of `ids`, which may be an integer array. Special ids have none, and bytes that are not UTF-8 become U+FFFD.

        Raises `DataError` for an id that is not in the vocabulary.
        """
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab]:
            raise DataError(f"id {wrong[0]} is not in this tokenizer's vocabulary of {self.vocab}")
        silent = self._silent()
        return self._decode([i for i in ids if i not in silent])

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of `ids` in parts, as they come. Characters are whole: one whose bytes span several ids comes with the last of
        them.

        The parts joined are `decode` of all ids, if these encode valid text.
        """
        # The last id before with a text of its own is kept, because the text of an id depends on whether it is the first.
        window, said, silent = [], "", self._silent()
        for i in ids:
            if i in silent:
                continue
            window.append(i)
            text = self.decode(window)
            if text.endswith("\ufffd"):
                continue
            yield text[len(said) :]
            alone = self.decode([i])
            window, said = ([i], alone) if "\ufffd" not in alone else (window, text)
        if rest := self.decode(window)[len(said) :]:
            yield rest

    def save(self, folder: Path) -> None:
        """Writes into `folder` what `load_tokenizer` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / self.file, self._definition())
        write_json(folder / MARK, {"kind": self.kind, "fingerprint": self.fingerprint, "settings": self._settings()})

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def _definition(self) -> bytes:
        """The content of a file, which the constructor takes."""

    def _settings(self) -> dict[str, Any]:
        """Further arguments of the constructor, by keyword."""
        return {}

    def _silent(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        return frozenset(self.special.values())


class TokenizerConfig(Config):
    @abc.abstractmethod
    def build(self, data: DataConfig) -> Tokenizer:
        """Builds the tokenizer. Raises `DataError` when the corpus does not suffice for it, or its file cannot be read."""


def fingerprint(kind: str, definition: bytes, settings: Mapping[str, Any]) -> str:
    # BOS and EOS count too if they are not part of the definition, because documents lie between them.
    marks = {name: settings[name] for name in ("bos", "eos", "ordinary") if name in settings}
    return hashlib.sha256(kind.encode() + b"\n" + definition + (json.dumps(marks).encode() if marks else b"")).hexdigest()


def utf8(text: str) -> bytes:
    """The text in UTF-8. Raises `DataError` for half a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"not valid Unicode: {text[error.start : error.start + 20]!r}") from error
