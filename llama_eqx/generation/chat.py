"""A conversation whose cache is kept between its turns."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama_eqx.data.chat import chat_format
from llama_eqx.data.tokenizer import Tokenizer
from llama_eqx.errors import ConfigError
from llama_eqx.generation.decode import first, prefill, slots_for
from llama_eqx.generation.request import SHORTEST, Rows, prepared
from llama_eqx.generation.sampling import Sampling
from llama_eqx.generation.stream import streamed
from llama_eqx.generation.text import following, stops_at, up_to, without_end
from llama_eqx.model.cache import slots_of, with_length, with_slots
from llama_eqx.model.llama import Llama


class Chat:
    """The messages so far, and a cache of their ids. `reused` is the number of ids that the last turn found in the cache.

    A turn reads only what the cache does not hold: the cache is rewound to where the ids of the conversation begin to differ from it.

    Raises `ConfigError` when the tokenizer has no chat format.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, sampling: Sampling, max_new_tokens: int, *, system: str | None = None, **settings: Any
    ):
        self.model, self.tokenizer, self.sampling, self.max_new_tokens = model, tokenizer, sampling, max_new_tokens
        self.stop_strings: Sequence[str] = settings.pop("stop_strings", ())
        self.settings = {**settings, "stop": (*tokenizer.stop, *settings.get("stop", ())), "vocab": tokenizer.vocab}
        self.format = chat_format(tokenizer)
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.turn, self.reused = 0, 0
        self._cache, self._ids = None, []

    def say(self, text: str) -> Iterator[str]:
        """Yields the answer to `text` as it comes. An answer that is broken off does not become part of the conversation.

        When the conversation fills the context, its oldest turns are forgotten.

        Raises `ConfigError` when `text` alone fills it, `DataError` when the tokenizer does not know `text`; then nothing is forgotten.
        """
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            for part in self._answer(self._fitting()):
                answer += part
                yield part
            self.messages.append({"role": "assistant", "content": answer})
        finally:
            if self.messages[-1]["role"] == "user":
                self.messages.pop()

    def _fitting(self) -> list[int]:
        """The ids of the conversation, with the latest turns that leave room for the lesser of `max_new_tokens` and context / 4."""
        context, kept = self.model.config.context, list(self.messages)
        room = min(self.max_new_tokens, context // 4)
        first_turn = 1 if kept[0]["role"] == "system" else 0
        while True:
            ids, _ = self.format.encode(kept, self.tokenizer, generate=True)
            if len(ids) + room <= context or len(kept) < first_turn + 3:
                break
            del kept[first_turn : first_turn + 2]
        if len(ids) >= context:
            what = f"the {len(ids)} tokens of this message{' and the system message' * first_turn} fill the context of {context}"
            raise ConfigError(what, where="chat", next="say it in fewer words; the conversation is as it was before")
        for _ in range(len(kept), len(self.messages), 2):
            print("(the oldest turn is forgotten: the conversation fills the context)", file=sys.stderr)
        self.messages = kept
        return ids

    def _answer(self, ids: list[int]) -> Iterator[str]:
        n = min(self.max_new_tokens, self.model.config.context - len(ids))
        rows, rule = prepared(self.model, [ids], n, self.sampling, first_row=self.turn, **self.settings)
        same = next((i for i, (a, b) in enumerate(zip(ids[:-1], self._ids, strict=False)) if a != b), min(len(ids) - 1, len(self._ids)))
        width = max(SHORTEST, 1 << (len(ids) - same - 1).bit_length())
        slots = slots_for(max(same + width, len(ids) + 1), max(same + width, len(ids) + n))
        cache, self._cache, self._ids = self._cache, None, []  # lost if the answer is broken off
        if cache is None:
            dtype = None if rule.cache_dtype is None else jnp.dtype(rule.cache_dtype)
            cache = self.model.init_cache(1, slots, dtype)
        elif slots_of(cache) < slots:
            cache = with_slots(cache, slots)
        tokens, real = np.zeros((1, width), np.int32), np.zeros((1, width), bool)
        tokens[0, : len(ids) - same], real[0, : len(ids) - same] = ids[same:], True
        hidden, cache = _read(self.model, cache, jnp.asarray(tokens), jnp.asarray(real), jnp.asarray(same), rule.prefill_chunk)
        state = _first(self.model, hidden, with_length(cache, len(ids)), rows, rule)
        self.turn, self.reused = self.turn + 1, same

        ended = stops_at(self.tokenizer, [ids], self.stop_strings) if self.stop_strings else None
        drawn: list[int] = []

        def arriving() -> Iterator[int]:
            new, self._cache = yield from _flat(streamed(self.model, state, rule, len(ids), 8, ended))
            drawn.extend(new.tokens[0])

        yield from up_to(self.stop_strings, following(self.tokenizer, ids, without_end(source := arriving(), self.settings["stop"])))
        for _ in source:  # what was drawn past the end
            pass
        self._ids = [*ids, *drawn[:-1]]


def _flat(stream: Any) -> Any:
    while True:
        try:
            part = next(stream)
        except StopIteration as end:
            return end.value
        yield from part[0]


@eqx.filter_jit
def _read(
    model: Llama, cache: Any, tokens: Int[Array, "1 seq"], real: Bool[Array, "1 seq"], start: Int[Array, ""], chunk: int | None
) -> tuple[Float[Array, "1 embed"], Any]:
    return prefill(model, with_length(cache, start), tokens, real, chunk, start)


@eqx.filter_jit
def _first(model: Llama, hidden: Float[Array, "1 embed"], cache: Any, rows: Rows, rule: Any) -> Any:
    return first(model, hidden, cache, rows, rule)
