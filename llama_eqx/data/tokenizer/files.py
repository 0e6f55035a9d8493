"""Reads the files of a tokenizer, and recognises what they are."""

import re
from pathlib import Path
from typing import Any

from llama_eqx.config import read_yaml
from llama_eqx.errors import DataError
from llama_eqx.files import json_object, stand_in


def read(path: str, wanted: str, option: str) -> bytes:
    """Returns the bytes of a tokenizer's file.

    Raises `DataError` when there is none, or something else is in its place.
    """
    advice = f"tokenizer={option} tokenizer.path=FILE, {wanted}"
    file = Path(path).expanduser()
    try:
        content = file.read_bytes()
    except IsADirectoryError:
        inside = next((name for name in ("tokenizer.model", "tokenizer.json") if (file / name).is_file()), None)
        if inside == "tokenizer.model":
            advice = f"tokenizer.path={file / inside}"
        elif inside:
            advice = f"tokenizer=hf tokenizer.path={file}"
        raise DataError("a folder, not a file", where=path, next=advice) from None
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", where=path, next=advice) from error
    refuse_stand_in(content, path)
    return content


def refuse_stand_in(content: bytes, where: str) -> None:
    """Raises `DataError` for what failed downloads leave behind."""
    if what := stand_in(content):
        raise DataError(what, where=where, next="download it again")


def settings_in(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is none. Raises `DataError` when it is damaged."""
    return json_object(file, DataError) if file.is_file() else {}


def native_model(folder: Path) -> dict[str, Any]:
    """The model in a `config.yaml`; empty when it has none. Errors in it are found when the model is opened."""
    try:
        model = read_yaml((folder / "config.yaml").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return model if isinstance(model, dict) else {}


def is_sentencepiece(content: bytes) -> bool:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor().LoadFromSerializedProto(content)
    except RuntimeError:
        return False


def is_tiktoken(content: bytes) -> bool:
    """Whether it begins like a list of tokens in base 64 and their ranks."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content[:1000]) is not None


def described(content: bytes, wanted: str) -> DataError:
    """Why `content` is not the `wanted` file, and which option reads it."""
    if is_tiktoken(content):
        return DataError(f"a tiktoken file, as Llama 3 has, not {wanted}", next="tokenizer=tiktoken tokenizer.path=FILE")
    if content.lstrip()[:1] == b"{":
        return DataError(f"a JSON file, not {wanted}", next="tokenizer=hf tokenizer.path=FOLDER, if it is a tokenizer.json")
    if is_sentencepiece(content):
        return DataError(f"a SentencePiece model, as Llama 1 and 2 have, not {wanted}", next="tokenizer=sentencepiece tokenizer.path=FILE")
    return DataError(f"not {wanted}", next="another file, or download this one again")
