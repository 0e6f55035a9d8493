"""Tokenizers without a file: bytes and characters."""

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np

from llama_eqx.data.corpus import DataConfig
from llama_eqx.data.tokenizer.base import Tokenizer, TokenizerConfig, utf8
from llama_eqx.errors import DataError


class BytesTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, BOS and EOS."""

    kind, file = "bytes", "tokenizer.bytes"
    vocab, bos, eos, stop, pad = 258, 256, 257, (257,), None
    special, chat = MappingProxyType({"<s>": 256, "</s>": 257}), "llama2"

    def __init__(self, definition: bytes = b""):
        pass

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(utf8(text), np.uint8) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def _definition(self) -> bytes:
        return b""


class BytesTokenizerConfig(TokenizerConfig):
    def build(self, data: DataConfig) -> BytesTokenizer:
        return BytesTokenizer()


class CharsTokenizer(Tokenizer):
    """One id for each of the given characters, in the order of their code points, without special ids."""

    kind, file = "chars", "tokenizer.chars"
    bos, eos, stop, pad = None, None, (), None
    special, chat = MappingProxyType({}), None

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


def _codes(text: str) -> np.ndarray:
    utf8(text)
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
