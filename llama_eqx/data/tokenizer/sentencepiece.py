"""SentencePiece models, as in Llama 1 and 2, read from a file or trained on the corpus."""

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llama_eqx.data.cache import DELETE, cache_dir, publish
from llama_eqx.data.cores import threads
from llama_eqx.data.corpus import DataConfig
from llama_eqx.data.tokenizer.base import Tokenizer, TokenizerConfig, utf8
from llama_eqx.data.tokenizer.files import described, read
from llama_eqx.errors import ConfigError, DataError


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece (Kudo and Richardson, 2018, arXiv 1808.06226), from the bytes of a model file.

    With byte fallback any text decodes to itself, except U+2581, which SentencePiece writes for a space.
    """

    kind, file, chat = "sentencepiece", "tokenizer.model", "llama2"

    def __init__(self, definition: bytes):
        from sentencepiece import SentencePieceProcessor

        self.model = definition
        self.pieces = SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(definition)
        except RuntimeError as error:
            raise described(definition, "a SentencePiece model") from error
        self.vocab = self.pieces.vocab_size()
        ids = (self.pieces.bos_id(), self.pieces.eos_id(), self.pieces.pad_id())
        self.bos, self.eos, self.pad = (None if i < 0 else i for i in ids)
        self.stop = () if self.eos is None else (self.eos,)
        self.unknown = None if any(map(self.pieces.is_byte, range(self.vocab))) else self.pieces.unk_id()
        self.special = {self.pieces.id_to_piece(i): i for i in range(self.vocab) if self.pieces.is_control(i)}

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.pieces.encode([utf8(text) for text in texts], return_type="numpy", num_threads=max(1, min(len(texts), threads())))

    def _decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)

    def _definition(self) -> bytes:
        return self.model


class SentencePieceTokenizerConfig(TokenizerConfig):
    """BPE (Sennrich et al., 2016, arXiv 1508.07909) of `vocab` ids, trained on the training text with Llama's settings and kept in the
    cache.

    With a `path` it is that model file instead, which has its own vocabulary.
    """

    vocab: int
    path: str | None

    def check(self) -> None:
        if self.vocab < 1:
            raise ConfigError(f"{self.vocab} is not a size", where="vocab")

    def build(self, data: DataConfig) -> SentencePieceTokenizer:
        if self.path:
            content = read(self.path, "a SentencePiece model", "sentencepiece")
            try:
                return SentencePieceTokenizer(content)
            except DataError as error:
                raise DataError(error.what, where=self.path, next=error.next.replace("FILE", self.path)) from None
        key = hashlib.sha256(f"{data.identity()} {self.vocab} {LLAMA_SETTINGS}".encode()).hexdigest()
        folder = publish(cache_dir() / "tokenizers" / key, lambda folder: self._train(data, folder))
        try:
            return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes())
        except (OSError, DataError) as error:
            raise DataError(f"a damaged tokenizer in the cache: {error}", where=str(folder), next=DELETE) from error

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


# How Llama's own tokenizer was trained, as its model file says. The number of threads is written into the model, so it must not vary.
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
    """Lines of the training text. Newlines are left out, so they become bytes as in Llama. Long lines, which would be left out, are cut."""
    longest = 16384 // 4  # characters of up to 4 bytes
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
