"""From text to ids and back."""

import abc
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llama_eqx.config import Config
from llama_eqx.data.cache import cache_dir, publish
from llama_eqx.data.corpus import DataConfig
from llama_eqx.errors import ConfigError, DataError


class Tokenizer(abc.ABC):
    """Ids are 0 … `vocab` - 1; `bos` and `eos` are those that begin and end a document, None where there is none.

    Text is never parsed for special ids: "<s>" in it is three characters.
    """

    kind: ClassVar[str]
    file: ClassVar[str]
    vocab: int
    bos: int | None
    eos: int | None

    @property
    def fingerprint(self) -> str:
        """A sha256 of what defines the tokenizer."""
        return _fingerprint(self.kind, self._definition())

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS or EOS.

        Raises `DataError` when there are none for it.
        """
        return self.encode_all([text])[0].tolist()

    @abc.abstractmethod
    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, as integer arrays: faster than one by one."""

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of ids, which may be an integer array; BOS and EOS have none, and bytes that are not UTF-8 become U+FFFD.

        Raises `DataError` for an id that is not in the vocabulary.
        """
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab]:
            raise DataError(f"id {wrong[0]} is not in this tokenizer's vocabulary of {self.vocab}")
        return self._decode(ids)

    def save(self, folder: Path) -> None:
        """Writes into `folder` what `load_tokenizer` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.file).write_bytes(self._definition())
        (folder / "tokenizer_kind.json").write_text(json.dumps({"kind": self.kind, "fingerprint": self.fingerprint}) + "\n")

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def _definition(self) -> bytes:
        """All that the constructor needs."""


class TokenizerConfig(Config):
    @abc.abstractmethod
    def build(self, data: DataConfig) -> Tokenizer:
        """Raises `DataError` when the corpus does not suffice for it."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """What `Tokenizer.save` wrote.

    Raises `DataError` when it is not there, or is not what was written.
    """
    try:
        said = json.loads((folder / "tokenizer_kind.json").read_text())
        kind = {kind.kind: kind for kind in (SentencePieceTokenizer, BytesTokenizer, CharsTokenizer)}[said["kind"]]
        definition = (folder / kind.file).read_bytes()
        if _fingerprint(kind.kind, definition) == said["fingerprint"]:
            return kind(definition)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"no tokenizer here: {type(error).__name__}: {error}", where=str(folder), next="a run directory has one") from error
    raise DataError("not the file that was saved here: its sha256 differs", where=str(folder / kind.file))


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece (Kudo and Richardson, 2018, arXiv 1808.06226), from the bytes of a model file.

    With byte fallback any text comes back as it was, but for U+2581, which SentencePiece writes for a space.
    """

    kind, file = "sentencepiece", "tokenizer.model"

    def __init__(self, definition: bytes):
        from sentencepiece import SentencePieceProcessor

        self.model = definition
        self.pieces = SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(definition)
        except RuntimeError as error:
            raise DataError("not a SentencePiece model") from error
        self.vocab = self.pieces.vocab_size()
        self.bos, self.eos = (None if i < 0 else i for i in (self.pieces.bos_id(), self.pieces.eos_id()))

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = self.pieces.encode([_utf8(text) for text in texts], out_type=int, num_threads=max(1, min(len(texts), os.cpu_count() or 1)))
        return [np.array(row, np.int32) for row in ids]

    def _decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)

    def _definition(self) -> bytes:
        return self.model


class SentencePieceTokenizerConfig(TokenizerConfig):
    """BPE (Sennrich et al., 2016, arXiv 1508.07909) of `vocab` ids, trained on the training text with Llama's settings; kept in the cache.

    With a `path` it is that model file instead, which has its own vocabulary.
    """

    vocab: int
    path: str | None

    def check(self) -> None:
        if self.vocab < 1:
            raise ConfigError(f"{self.vocab} is not a size", where="vocab")

    def build(self, data: DataConfig) -> SentencePieceTokenizer:
        if self.path:
            path = Path(self.path).expanduser()
        else:
            key = hashlib.sha256(f"{data.identity()} {self.vocab} {LLAMA_SETTINGS}".encode()).hexdigest()
            path = publish(cache_dir() / "tokenizers" / key, lambda folder: self._train(data, folder)) / "tokenizer.model"
        try:
            return SentencePieceTokenizer(path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror}", where=str(path), next="tokenizer.path=FILE, a SentencePiece model") from error
        except DataError as error:
            raise DataError(error.what, where=str(path), next="tokenizer.path=FILE, a SentencePiece model") from error

    def _train(self, data: DataConfig, folder: Path) -> None:
        from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(sentence_iterator=_lines(data), model_writer=model, vocab_size=self.vocab, **LLAMA_SETTINGS)
        except RuntimeError as error:
            raise DataError(
                f"no SentencePiece model of {self.vocab} pieces can be trained on this text",
                where="tokenizer.vocab",
                next=_advice(str(error)),
            ) from error
        (folder / "tokenizer.model").write_bytes(model.getvalue())


# How Llama's own tokenizer was trained, as its model file says. The number of threads is written into the model: it must not vary.
LLAMA_SETTINGS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.99995,
    "max_sentence_length": 16384,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "unk_surface": " \u2047 ",
    "num_threads": 2,
    "minloglevel": 2,
}


def _lines(data: DataConfig) -> Iterator[str]:
    """Lines of the training text. Newlines stay out, and so become bytes as in Llama; long lines are cut, as they would be left out."""
    longest = 16384 // 4  # bytes of a character
    for split, document in data.parts():
        if split == "train":
            for line in document.text.split("\n"):
                yield from (line[i : i + longest] for i in range(0, len(line), longest))


def _advice(error: str) -> str:
    """What to type, from the limit that SentencePiece's message names."""
    if match := re.search(r"value <= (\d+)", error):
        return f"tokenizer.vocab={match[1]} or less, more text, or tokenizer=bytes"
    if match := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return f"tokenizer.vocab={match[1]} or more, or tokenizer=bytes"
    return f"more text, another tokenizer.vocab, or tokenizer=bytes ({error.strip()})"


class BytesTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, BOS and EOS."""

    kind, file = "bytes", "tokenizer.bytes"
    vocab, bos, eos = 258, 256, 257

    def __init__(self, definition: bytes = b""):
        pass

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(_utf8(text), np.uint8) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def _definition(self) -> bytes:
        return b""


class BytesTokenizerConfig(TokenizerConfig):
    def build(self, data: DataConfig) -> BytesTokenizer:
        return BytesTokenizer()


class CharsTokenizer(Tokenizer):
    """One id for each of the given characters, in the order of their code points, without BOS and EOS."""

    kind, file = "chars", "tokenizer.chars"
    bos, eos = None, None

    def __init__(self, definition: bytes):
        self.characters = "".join(sorted(set(definition.decode())))
        self.codes = _codes(self.characters)
        self.vocab = len(self.characters)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._ids(_codes(text)) for text in texts]

    def _ids(self, codes: np.ndarray) -> np.ndarray:
        ids = np.searchsorted(self.codes, codes)
        known = np.append(self.codes, 2**32 - 1)[ids] == codes
        if not known.all():
            character = chr(codes[~known][0])
            raise DataError(
                f"the character {character!r} (U+{ord(character):04X}) is not in the corpus, and so not among the tokenizer's {self.vocab}",
                next="leave it out, or train with tokenizer=bytes",
            )
        return ids

    def _decode(self, ids: list[int]) -> str:
        return "".join(self.characters[i] for i in ids)

    def _definition(self) -> bytes:
        return self.characters.encode()


class CharsTokenizerConfig(TokenizerConfig):
    """The characters of the whole corpus, held-out text included."""

    def build(self, data: DataConfig) -> CharsTokenizer:
        found = set()
        for document in data.documents():
            found.update(document.text)
        return CharsTokenizer("".join(found).encode())


def _fingerprint(kind: str, definition: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"\n" + definition).hexdigest()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"not valid Unicode: {text[error.start : error.start + 20]!r}") from error


def _codes(text: str) -> np.ndarray:
    _utf8(text)
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
