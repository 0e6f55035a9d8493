"""Llama 3's tokenizer, from its tiktoken file."""

import binascii
import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from llama_eqx.data.cores import threads
from llama_eqx.data.corpus import DataConfig
from llama_eqx.data.tokenizer.base import Tokenizer, TokenizerConfig, utf8
from llama_eqx.data.tokenizer.files import described, read
from llama_eqx.errors import ConfigError, DataError

# How Llama 3 cuts text before it merges bytes (meta-llama/llama3, llama/tokenizer.py).
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
N_SPECIAL = 256  # ids after the last rank
BASIC = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
NAMED = {"llama3": BASIC, "llama3_1": {**BASIC, 4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}}
# The library's regular expressions give up on about a million characters of white space; such a run is cut.
LONGEST_BLANK = 500_000


class TiktokenTokenizer(Tokenizer):
    """Llama 3's BPE of bytes (2024, arXiv 2407.21783, section 3.2), from the bytes of a file of ranks.

    `chat` is "llama3" or, from Llama 3.1 on, "llama3_1": the 256 special ids are the same, but some have other names.

    Raises `DataError` when the bytes are not such a file.
    """

    kind, file = "tiktoken", "tokenizer.model"

    def __init__(self, definition: bytes, *, chat: str = "llama3_1"):
        import tiktoken

        self.ranks, self.chat = definition, chat
        self.byte_ranks = _parsed(definition)
        self.special = special_tokens(chat, len(self.byte_ranks))
        self.encoding = tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=self.byte_ranks, special_tokens=dict(self.special))
        self.vocab = len(self.byte_ranks) + N_SPECIAL
        self.bos, self.eos = self.special["<|begin_of_text|>"], self.special["<|end_of_text|>"]
        self.pad = self.special.get("<|finetune_right_pad_id|>")
        self.stop = (self.eos, *turn_ends(self.special))

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            utf8(text)
        if (count := min(len(texts), threads())) < 2:
            return [self._ids(text) for text in texts]
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(self._ids, texts))

    def _ids(self, text: str) -> np.ndarray:
        parts = list(_cut(text)) if len(text) > LONGEST_BLANK else [text]
        ids = [self.encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
        return np.concatenate(ids).astype(np.int32)

    def _decode(self, ids: list[int]) -> str:
        return self.encoding.decode_bytes(ids).decode(errors="replace")

    def _definition(self) -> bytes:
        return self.ranks

    def _settings(self) -> dict[str, Any]:
        return {"chat": self.chat}


class TiktokenTokenizerConfig(TokenizerConfig):
    """The file at `path`."""

    path: str | None
    chat: Literal["llama3", "llama3_1"]

    def check(self) -> None:
        if self.path is None:
            raise ConfigError("tokenizer=tiktoken needs a file", where="path", next="tokenizer.path=FILE, Llama 3's tokenizer.model")

    def build(self, data: DataConfig) -> TiktokenTokenizer:
        assert self.path is not None
        content = read(self.path, "Llama 3's tokenizer.model", "tiktoken")
        try:
            return TiktokenTokenizer(content, chat=self.chat)
        except DataError as error:
            raise DataError(error.what, where=self.path, next=error.next.replace("FILE", self.path)) from None


def special_tokens(chat: str, first: int) -> dict[str, int]:
    """The names of the 256 special tokens and their ids, from `first` on. Unused ones are numbered."""
    unused = itertools.count()
    names = [NAMED[chat].get(i) or f"reserved_special_token_{next(unused)}" for i in range(N_SPECIAL)]
    return {f"<|{name}|>": first + i for i, name in enumerate(names)}


def turn_ends(special: Any) -> tuple[int, ...]:
    """The ids that end a message or a turn in Llama 3's chats, if there are any."""
    return tuple(special[name] for name in ("<|eom_id|>", "<|eot_id|>") if name in special)


def _parsed(definition: bytes) -> dict[bytes, int]:
    wanted, fields = "a tiktoken file", definition.split()
    try:
        pairs = zip(fields[::2], fields[1::2], strict=True)
        ranks = {binascii.a2b_base64(token, strict_mode=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error):
        raise described(definition, wanted) from None
    if sorted(ranks.values()) != list(range(len(fields) // 2)):
        raise DataError(f"not {wanted}: its ranks are not 0, 1, 2 … to the number of its lines", next="download it again")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"not {wanted}: {len(missing)} of the 256 bytes have no rank", next="download it again")
    return ranks


def _cut(text: str) -> Iterator[str]:
    begin = 0
    for blank in re.finditer(rf"\s{{{LONGEST_BLANK}}}", text):
        yield text[begin : blank.end()]
        begin = blank.end()
    yield text[begin:]
