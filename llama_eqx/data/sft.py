"""Supervised data: conversations in which the assistant's own words are learned."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from llama_eqx.data.cache import cache_dir, publish
from llama_eqx.data.chat import ROLES, chat_format, check
from llama_eqx.data.corpus import CorpusConfig, Document, Part
from llama_eqx.data.shard import Shard, token_dtype
from llama_eqx.data.shards import (
    DELETE,
    FORMAT,
    ShardWriter,
    Split,
    TokenData,
    check_sealed,
    open_dataset,
    seal,
    write_index,
)
from llama_eqx.data.sources import LINES, Record, Source, find, kind_of, lines, remedy, strings_in
from llama_eqx.data.tokenizer import Tokenizer
from llama_eqx.errors import ConfigError, DataError

MARKS = 3  # incremented when what is written beside the shards changes


@dataclass(frozen=True)
class Conversation(Document):
    """`messages` have a role and a content each, and come from line `record` of `source`. `text` is what they say."""

    messages: tuple[dict[str, str], ...]
    source: Source
    record: int


class SftConfig(CorpusConfig):
    """Lines of JSON, in a file, a glob, or all *.jsonl in a folder. Each line is an object with a list of "messages", each with a "role"
    and a "content", or with two strings, the second of which answers the first. `prompt_key` and `response_key` name the two strings.

    The tokenizer's chat format turns them into ids. Only what the assistant says is learned. Whole conversations are held out. Lines that
    are no such objects, or whose messages are out of order, end the run or are counted, as `on_error` says. A role that the chat format
    does not know ends the run in any case.
    """

    rows: Literal["packed", "single"]
    path: str | None
    prompt_key: str
    response_key: str
    on_error: Literal["refuse", "skip"]

    def documents(self) -> Iterator[Document]:
        yield from self.conversations([])

    def parts(self) -> Iterator[Part]:
        return self.whole(self.documents())

    def identity(self) -> str:
        found = hashlib.sha256(repr(self.held_out()).encode())
        for conversation in self.conversations([]):
            found.update(json.dumps([conversation.name, conversation.messages]).encode())
        return found.hexdigest()

    def skipped(self) -> list[str]:
        found: list[str] = []
        if self.on_error == "skip":
            for _ in self.conversations(found):
                pass
        return found

    def conversations(self, skipped: list[str]) -> Iterator[Conversation]:
        """Yields every conversation, in order. The locations of skipped lines are added to `skipped`.

        Raises `DataError` naming file and line.
        """
        if not self.path:
            raise ConfigError("data=sft needs data.path=FILE.jsonl", where="data.path")
        empty, found = True, find(self.path, "data.path")
        if Path(self.path).expanduser().is_dir():
            found = [source for source in found if kind_of(source) == LINES]
        for source in found:
            for line in lines(source, skip=self.on_error == "skip"):
                where = f"{source.path}:{line.number}" if line.number else source.path
                try:
                    messages = self._messages(line)
                except ValueError as error:
                    if self.on_error == "refuse":
                        raise DataError(str(error), where=where, next=f"{remedy(line)}, or data.on_error=skip") from error
                    skipped.append(where)
                    continue
                empty = False
                text = "\n".join(message["content"] for message in messages)
                yield Conversation(f"{source.name}:{line.number}", text, messages, source, line.number)
        if empty:
            raise DataError("no conversation here", where=self.path, next="data.path=FILE.jsonl, a folder of such files, or a glob")

    def _messages(self, line: Record) -> tuple[dict[str, str], ...]:
        """The messages of a line. Raises `ValueError` saying what is wrong."""
        if line.text is None:
            raise ValueError(line.problem)
        try:
            example: Any = json.loads(line.text)
            json.dumps(example, ensure_ascii=False).encode()  # no lone surrogates
        except (ValueError, RecursionError) as error:
            raise ValueError("not JSON") from error
        if not isinstance(example, dict):
            raise ValueError("not a JSON object")
        if "messages" not in example:
            pair = [example.get(key) for key in (self.prompt_key, self.response_key)]
            if not all(isinstance(text, str) for text in pair):
                keys = ", ".join(strings_in(example))
                advice = f"; data.prompt_key=KEY data.response_key=KEY name two of {keys}" if "," in keys else ""
                raise ValueError(f'neither "messages" nor strings "{self.prompt_key}" and "{self.response_key}"{advice}')
            return tuple({"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True))
        messages = example["messages"]
        if not isinstance(messages, list):
            raise ValueError('"messages" is not a list')
        try:
            check(messages, ROLES, generate=False)
        except DataError as error:
            raise ValueError(f"{error.where}: {error.what}") from error
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError("the assistant says nothing: there is nothing to learn")
        return tuple(messages)


def encode_conversations(data: SftConfig, tokenizer: Tokenizer) -> tuple[TokenData, dict[str, Split]]:
    """Returns the conversations as ids, from the cache if the same were encoded before, and for each split another with the same offsets
    and a 1 in place of each id to learn.

    The `bytes` of the splits are those of what the assistant says, without the white space around it, which no format writes.

    Raises `DataError` when a split is empty, the lines change meanwhile, one does not fit the chat format, or the cached files are damaged;
    `StorageError` when the cache cannot be written.
    """
    corpus = data.identity()
    identity = [FORMAT, f"conversations {MARKS}", corpus, tokenizer.fingerprint, tokenizer.chat]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    folder = publish(cache_dir() / "tokens" / key, lambda folder: _encode(folder, data, tokenizer, corpus))
    encoded, learned = open_dataset(folder, remedy=DELETE), {}
    check_sealed(folder)
    for split in (encoded.train, encoded.val):
        (shard,) = split.shards
        marks = Shard(folder / f"{split.name}-learned", shard.tokens, shard.documents, shard.bytes, vocab=2)
        learned[split.name] = Split((marks,), split.name)
    return encoded, learned


def _encode(folder: Path, data: SftConfig, tokenizer: Tokenizer, corpus: str) -> None:
    form, names = chat_format(tokenizer, "tokenizer=bytes, or one of Llama"), {}
    with ExitStack() as stack:
        writers = {
            (split, kind): stack.enter_context(ShardWriter(folder / f"{split}-{kind}", vocab))
            for split in ("train", "val")
            for kind, vocab in (("00000", tokenizer.vocab), ("learned", 2))
        }
        for split, conversation in tqdm(data.whole(data.documents()), desc="encoding conversations", unit="", disable=None):
            assert isinstance(conversation, Conversation)
            try:
                ids, learn = form.encode(conversation.messages, tokenizer, generate=False)
            except DataError as error:
                where = f"{conversation.source.path}:{conversation.record}, {error.where}"
                raise DataError(error.what, where=where, next=error.next or "mend the line, or take it out") from error
            said = sum(len(message["content"].strip().encode()) for message in conversation.messages if message["role"] == "assistant")
            origin = np.array([[names.setdefault(conversation.source.name, len(names)), conversation.record]])
            for kind, row, dtype in (("00000", ids, token_dtype(tokenizer.vocab)), ("learned", learn, token_dtype(2))):
                writers[split, kind].add(np.array(row, dtype), np.array([len(row)]), said, origin)
        for split in ("train", "val"):
            if not writers[split, "00000"].documents and not (split == "train" and data.validation_fraction == 1):
                raise DataError(
                    f"no conversation fell into the {split} split",
                    where="data.validation_fraction",
                    next="more conversations, or another data.validation_fraction",
                )
        data.require(corpus)
        shards = {key: writer.finish() for key, writer in writers.items()}
        seal(folder, sorted(folder.glob("*-learned.*.npy")))
    kept = [(split, record) for (split, kind), record in shards.items() if kind == "00000"]
    write_index(folder, tokenizer, kept, [{"name": name} for name in names])
