"""Encodes conversations as the ids that Llama's chat models are trained on."""

import abc
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_eqx.data.tokenizer.base import Tokenizer
from llama_eqx.data.tokenizer.files import settings_in
from llama_eqx.errors import ConfigError, DataError

Message = Mapping[str, str]  # {"role": …, "content": …}

# Who may speak after whom; None is the beginning.
AFTER = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool", "ipython"),
    "tool": ("assistant",),
    "ipython": ("assistant",),
}
ROLES = tuple(role for role in AFTER if role)  # of all formats together


class Piece(NamedTuple):
    """A stretch of text, or the name of a special token. `learn` marks what the assistant learns to say."""

    text: str
    special: bool = False
    learn: bool = False


class ChatFormat(abc.ABC):
    """How a conversation is written. `roles` are the roles it knows. `mark` occurs in each of its templates.

    `template` is the same format as a chat_template.jinja for `transformers`.
    """

    roles: tuple[str, ...]
    mark: str
    template: str

    def encode(self, messages: Sequence[Any], tokenizer: Tokenizer, *, generate: bool) -> tuple[list[int], list[bool]]:
        """Returns the ids of a conversation of `Message`s, BOS included, and for each id whether the assistant learns it.

        It learns what it says itself and the token that ends its turn. With `generate` the conversation ends where the assistant's next
        turn begins. What people write never becomes a special token, whatever its text.

        Raises `DataError` naming the message that is out of order, `ConfigError` when the tokenizer lacks a special token of the format.
        """
        check(messages, self.roles, generate=generate)
        pieces = self.pieces(messages, generate=generate)
        if missing := sorted({piece.text for piece in pieces if piece.special} - set(tokenizer.special)):
            other = tokenizer.chat if tokenizer.chat and FORMATS[tokenizer.chat] is not self else None
            raise ConfigError(
                f"this chat format needs {', '.join(missing)}, which the tokenizer does not have",
                where="tokenizer",
                next=f"its own format is {other}" if other else "leave out tokenizer.chat=..., or another tokenizer, such as bytes",
            )
        ids, learn = [], []
        for special, run in itertools.groupby(pieces, lambda piece: piece.special):
            for part, learned in (
                [([tokenizer.special[piece.text]], piece.learn) for piece in run] if special else _text(list(run), tokenizer)
            ):
                ids += part
                learn += [learned] * len(part)
        return ids, learn

    def wrote(self, template: str) -> bool:
        """Whether a template may be of this format. Only the marks are checked."""
        return self.mark in template

    @abc.abstractmethod
    def pieces(self, messages: Sequence[Message], *, generate: bool) -> list[Piece]:
        """Returns the pieces that `encode` encodes. The messages are in order."""


class Llama2(ChatFormat):
    """Llama 2's format (2023, arXiv 2307.09288). The system message is part of the first user message."""

    roles = ("system", "user", "assistant")
    mark = "[INST]"
    template = """\
{%- set begun = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set begun.system = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' -%}
    {%- elif message.role == 'user' -%}
        {{- '<s>[INST] ' + (begun.system + message.content) | trim + ' [/INST]' -}}
        {%- set begun.system = '' -%}
    {%- else -%}
        {{- ' ' + message.content | trim + ' </s>' -}}
    {%- endif -%}
{%- endfor -%}
"""

    def pieces(self, messages: Sequence[Message], *, generate: bool) -> list[Piece]:
        system, pieces = "", []
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "system":
                system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
            elif role == "user":
                pieces += [Piece("<s>", special=True), Piece(f"[INST] {(system + content).strip()} [/INST]")]
                system = ""
            else:
                pieces += [Piece(f" {content.strip()} ", learn=True), Piece("</s>", special=True, learn=True)]
        return pieces


class Llama3(ChatFormat):
    """Llama 3's format. Every turn begins with its role in a header."""

    roles = ("system", "user", "assistant", "tool", "ipython")
    mark = "<|start_header_id|>"
    template = """\
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

    def wrote(self, template: str) -> bool:
        return super().wrote(template) and Llama31.mark not in template

    def pieces(self, messages: Sequence[Message], *, generate: bool) -> list[Piece]:
        turns = [piece for message in messages for piece in _turn(message["role"], message["content"].strip())]
        return [Piece("<|begin_of_text|>", special=True), *turns, *(_header("assistant") if generate else [])]


class Llama31(ChatFormat):
    """The format of Llama 3.1 and 3.3. It always has a system turn, which begins with dates, and writes what tools say as JSON.

    The templates of Llama 3.2 replace the second date by the day of the call. Here it is fixed, so that the same text gives the same ids.
    """

    roles, mark = Llama3.roles, "Cutting Knowledge Date"
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    template = """\
{%- set given = messages[0].role == 'system' -%}
{{- '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' -}}
{{- (messages[0].content | trim if given else '') + '<|eot_id|>' -}}
{%- for message in messages[1 if given else 0:] -%}
    {%- if message.role in ('tool', 'ipython') -%}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' -}}
    {%- else -%}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

    def pieces(self, messages: Sequence[Message], *, generate: bool) -> list[Piece]:
        given = messages[0]["role"] == "system"
        pieces = _turn("system", self.dates + (messages[0]["content"].strip() if given else ""))
        for message in messages[given:]:
            if message["role"] in ("tool", "ipython"):
                pieces += _turn("ipython", json.dumps(message["content"], ensure_ascii=False))
            else:
                pieces += _turn(message["role"], message["content"].strip())
        return [Piece("<|begin_of_text|>", special=True), *pieces, *(_header("assistant") if generate else [])]


FORMATS = {"llama2": Llama2(), "llama3": Llama3(), "llama3_1": Llama31()}


def chat_format(tokenizer: Tokenizer, advice: str = "prompt=TEXT, which is continued as it stands") -> ChatFormat:
    """Returns the format that a tokenizer's special tokens are made for.

    Raises `ConfigError` when it has none, with `advice` on what to type.
    """
    if tokenizer.chat is None:
        raise ConfigError("this tokenizer has no chat format: it lacks the special tokens", where="tokenizer", next=advice)
    return FORMATS[tokenizer.chat]


def foreign_template(folder: Path, tokenizer: Tokenizer) -> str | None:
    """Returns the file in `folder` with a chat template that is not of the tokenizer's format: `<s>` alone does not identify Llama 2's
    format.

    Raises `DataError` when a file is damaged.
    """
    name, text = template_in(folder) or (None, "")
    return name if name is not None and not chat_format(tokenizer).wrote(text) else None


def template_in(folder: Path) -> tuple[str, str] | None:
    """Returns the name of the file in `folder` that holds a chat template, and the template.

    Raises `DataError` when a file is damaged.
    """
    jinja = folder / "chat_template.jinja"
    texts = {jinja.name: jinja.read_text(encoding="utf-8", errors="replace") if jinja.is_file() else None}
    texts |= {name: settings_in(folder / name).get("chat_template") for name in ("chat_template.json", "tokenizer_config.json")}
    return next(((name, str(text)) for name, text in texts.items() if text), None)


def _header(role: str) -> list[Piece]:
    return [Piece("<|start_header_id|>", special=True), Piece(role), Piece("<|end_header_id|>", special=True), Piece("\n\n")]


def _turn(role: str, content: str) -> list[Piece]:
    learn = role == "assistant"
    return [*_header(role), Piece(content, learn=learn), Piece("<|eot_id|>", special=True, learn=learn)]


def _text(run: list[Piece], tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """Encodes neighbouring pieces as one text. Returns the ids of each, and whether they are learned."""
    parts, begin = [], 0
    whole = tokenizer.encode("".join(piece.text for piece in run))
    for i, piece in enumerate(run):
        end = len(whole) if i == len(run) - 1 else _common(whole, tokenizer.encode("".join(piece.text for piece in run[: i + 1])))
        parts.append((whole[begin:end], piece.learn))
        begin = end
    return parts


def _common(whole: list[int], head: list[int]) -> int:
    """The length of the common prefix. An id that spans two pieces belongs to the second."""
    return next((i for i, (a, b) in enumerate(zip(whole, head, strict=False)) if a != b), len(head))


def check(messages: Sequence[Any], roles: tuple[str, ...], *, generate: bool) -> None:
    """Raises `DataError` naming the first of `messages` that is malformed, or whose role is not in `roles` or is out of turn."""
    if not messages:
        raise DataError("no messages", where="messages", next='at least {"role": "user", "content": …}')
    before = None
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str) or not isinstance(message.get("role"), str):
            raise DataError('not a message: {"role": …, "content": …}, both strings', where=where)
        if extra := sorted(key for key, value in message.items() if key not in ("role", "content") and value is not None):
            raise DataError(f"a message has only a role and a content, not {', '.join(extra)}", where=where)
        role = message["role"]
        allowed = [known for known in AFTER[before] if known in roles]
        if role not in allowed:
            place = f"after {before}" if before else "at the beginning"
            raise DataError(f"{role!r} {place}, where {' or '.join(allowed)} is expected", where=f"{where}.role")
        before = role
    if generate and before not in ("user", "tool", "ipython"):
        raise DataError(
            f"the last message is from {before}: there is nothing for the assistant to answer", where=f"messages[{len(messages) - 1}].role"
        )
    if before == "system":
        raise DataError("there is only a system message", where="messages")
