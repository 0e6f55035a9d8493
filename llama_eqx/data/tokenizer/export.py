"""Writes tokenizers of other file formats as a `tokenizer.json`, which `transformers` reads by itself."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from llama_eqx.data.tokenizer.base import Tokenizer
from llama_eqx.data.tokenizer.plain import BytesTokenizer
from llama_eqx.data.tokenizer.sentencepiece import SentencePieceTokenizer
from llama_eqx.data.tokenizer.tiktoken import PATTERN, TiktokenTokenizer

Token = TypeVar("Token", str, bytes)

SPACE = "\u2581"  # how SentencePiece writes a space
# Text of every kind. Both readers of a tokenizer must agree on it before one is written for the other.
PROBE = "  Don't stop: 3.14159 + 2718\n\n\tna\u00efve \u4f60\u597d  x\u2581y \ufb01 \u2126 \U0001f600 aaaa ---- \r\n  "


def tokenizer_json(tokenizer: Tokenizer) -> str | None:
    """Returns the content of a `tokenizer.json` with the ids of `tokenizer`, and BOS before every text; None if its ids would differ."""
    from tokenizers import Tokenizer as Library

    match tokenizer:
        case TiktokenTokenizer():
            parts = _of_bytes(tokenizer.byte_ranks, tokenizer.special)
        case BytesTokenizer():
            parts = _of_bytes({bytes([byte]): byte for byte in range(256)}, tokenizer.special)
        case SentencePieceTokenizer():
            parts = _of_sentencepiece(tokenizer)
        case _:
            return None
    library = Library.from_str(json.dumps({"version": "1.0", "truncation": None, "padding": None, **parts, **_bos(tokenizer)}))
    library.encode_special_tokens = True
    probe = PROBE + (_of_all_pieces(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else "")
    if library.encode(probe, add_special_tokens=False).ids != tokenizer.encode(probe):
        return None
    return library.to_str()


def _of_bytes(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> dict[str, Any]:
    """BPE of bytes written as characters, cut by Llama 3's pattern. A part that is a token is taken whole, as in tiktoken."""
    names = {token: "".join(map(CHARACTERS.__getitem__, token)) for token in ranks}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    as_characters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_characters]},
        "decoder": as_characters,
        "added_tokens": [_added(i, name) for name, i in special.items()],
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {names[token]: rank for token, rank in ranks.items()},
            "merges": [(names[left], names[right]) for left, right in _merges(ranks)],
        },
    }


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The pieces of a SentencePiece model, merged in the order of their scores."""
    pieces, ids, text = tokenizer.pieces, range(tokenizer.vocab), _text_pieces(tokenizer)
    unknown = pieces.unk_id()
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, space]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
        },
        "added_tokens": [_added(i, pieces.id_to_piece(i)) for i in ids if pieces.is_control(i) or i == unknown],
        "model": {
            "type": "BPE",
            "unk_token": pieces.id_to_piece(unknown),
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {pieces.id_to_piece(i): i for i in ids},
            "merges": list(_merges({pieces.id_to_piece(i): -pieces.get_score(i) for i in text})),
        },
    }


def _of_all_pieces(tokenizer: SentencePieceTokenizer) -> str:
    """A text with every piece. A unigram model does not merge it into pieces, and pieces that a user defined are never cut."""
    return "".join(map(tokenizer.pieces.id_to_piece, _text_pieces(tokenizer))).replace(SPACE, " ")


def _text_pieces(tokenizer: SentencePieceTokenizer) -> list[int]:
    pieces = tokenizer.pieces
    return [i for i in range(tokenizer.vocab) if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))]


def _merges(ranks: Mapping[Token, int | float]) -> list[tuple[Token, Token]]:
    """Every pair of tokens that makes a third, in the order of the third's rank.

    Of pairs with one rank, the longer left side comes first. SentencePiece takes the leftmost pair, so runs of spaces, which all have the
    last rank in Llama 2, grow from the left.
    """
    pairs = [
        (rank, -i, token[:i], token[i:])
        for token, rank in ranks.items()
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    return [(left, right) for *_, left, right in sorted(pairs)]


def _added(i: int, name: str) -> dict[str, Any]:
    return {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _bos(tokenizer: Tokenizer) -> dict[str, Any]:
    """The post-processor that puts BOS before a text, and before each text of a pair."""
    name = next((name for name, i in tokenizer.special.items() if i == tokenizer.bos), None)
    if name is None:
        return {"post_processor": None}

    def text(which: str, kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": name, "type_id": kind}}, {"Sequence": {"id": which, "type_id": kind}}]

    tokens = {name: {"id": name, "ids": [tokenizer.bos], "tokens": [name]}}
    template = {"single": text("A", 0), "pair": [*text("A", 0), *text("B", 1)], "special_tokens": tokens}
    return {"post_processor": {"type": "TemplateProcessing", **template}}


def _characters() -> dict[int, str]:
    """The characters by which GPT-2 writes bytes: visible ones as themselves, others from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = (byte for byte in range(256) if byte not in seen)
    return {byte: chr(byte) for byte in seen} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}


CHARACTERS = _characters()
