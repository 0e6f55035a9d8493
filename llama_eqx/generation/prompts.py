"""Prompts as people give them: one, or a file of them."""

import json
import os
import pathlib
from typing import Any, NamedTuple

from llama_eqx.data.chat import chat_format
from llama_eqx.data.tokenizer import Tokenizer
from llama_eqx.errors import DataError
from llama_eqx.generation.text import prompt_tokens


class Asked(NamedTuple):
    """A prompt as it was given (the output repeats it), its tokens, and where it stands."""

    given: dict[str, Any]
    tokens: list[int]
    where: str


def read_prompts(prompt: str | None, file: str | None, tokenizer: Tokenizer) -> list[Asked]:
    """Reads `prompt`, or `file`: a prompt per line or, if its name ends with .jsonl or .ndjson, an object with `prompt` or `messages`.

    Raises `DataError` naming the line: for invalid JSON, an empty prompt, raw text among conversations, and what the tokenizer does not
    know.
    """
    if file is None:
        assert prompt is not None
        given = {"prompt": prompt}
        return [Asked(given, _tokens(given, tokenizer, "prompt"), "prompt")]
    try:
        lines = pathlib.Path(os.path.expanduser(file)).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the prompts: {reason(error)}", where=file, next="prompts=FILE, .jsonl or one prompt per line"
        ) from None
    plain = not file.lower().endswith((".jsonl", ".ndjson"))
    asked, kinds = [], {}
    for number, line in enumerate(lines, 1):
        where = f"{file}:{number}"
        if not line.strip():
            if plain and any(rest.strip() for rest in lines[number:]):
                raise DataError("an empty prompt: there is nothing to continue", where=where, next="take the line out")
            continue
        given = {"prompt": line} if plain else _parsed(line, where)
        kinds.setdefault("prompt" if "prompt" in given else "messages", number)
        if len(kinds) == 2:
            raise DataError(
                f"raw text in line {kinds['prompt']} and a conversation in line {kinds['messages']}: one file may hold only one kind",
                where=file,
                next="a file for each kind",
            )
        asked.append(Asked(given, _tokens(given, tokenizer, where), where))
    if not asked:
        raise DataError("no prompts in this file", where=file, next='one prompt per line or, in .jsonl, {"prompt": "…"}')
    return asked


def reason(error: OSError | UnicodeDecodeError) -> str:
    return str(error.strerror if isinstance(error, OSError) else error)


def _tokens(given: dict[str, Any], tokenizer: Tokenizer, where: str) -> list[int]:
    try:
        if "prompt" in given:
            return prompt_tokens(tokenizer, given["prompt"])
        return chat_format(tokenizer).encode(given["messages"], tokenizer, generate=True)[0]
    except DataError as error:
        raise DataError(error.what, where=": ".join(filter(None, (where, error.where))), next=error.next) from None


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=where, next='{"prompt": "…"} or {"messages": […]}, one object per line') from None
    if not isinstance(given, dict) or ("prompt" in given) == ("messages" in given):
        raise DataError("a line needs either a prompt or messages", where=where, next='{"prompt": "…"} or {"messages": […]}')
    if "prompt" in given and not (isinstance(given["prompt"], str) and given["prompt"]):
        raise DataError("an empty prompt, or one that is not text", where=where, next="take the line out")
    return given
