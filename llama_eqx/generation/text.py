"""From text to text: prompts, continuations and where they end."""

import bisect
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from llama_eqx.data.tokenizer import Tokenizer
from llama_eqx.errors import ConfigError, NonFiniteError
from llama_eqx.generation.decode import Generation, generate_tokens
from llama_eqx.generation.sampling import Sampling
from llama_eqx.generation.stream import stream_tokens
from llama_eqx.model.llama import Llama

TAIL = 8  # last ids of a prompt that decide how its text goes on: more than the bytes of a character


class Continuation(NamedTuple):
    """The text that follows a prompt, its tokens with their log-probabilities (see `Generation`), and why it ends: stop or length.

    The stop token or stop string that ends it is not part of the text; a stop token is one of the tokens.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    end: str


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of the prompt, after BOS where the tokenizer puts one. Raises `DataError` for text that the tokenizer does not know."""
    return [*tokenizer.prefix, *tokenizer.encode(prompt)]


def continued(model: Llama, tokenizer: Tokenizer, prompt: list[int], max_new_tokens: int, sampling: Sampling, *, seed: int = 0) -> str:
    """A run's sample: `prompt` and up to `max_new_tokens` more tokens as text, until that ends or the context is full.

    A model without finite logits has none, which is said in its place: a run's guard decides whether it goes on.

    Raises `ConfigError` for an empty prompt and for one that fills the context.
    """
    try:
        new = generate_tokens(model, [prompt], max_new_tokens, sampling, stop=tokenizer.stop, seed=seed, vocab=tokenizer.vocab)
    except NonFiniteError as error:
        return f"({error.what})"
    return tokenizer.decode([*prompt, *without_end(new.tokens[0], tokenizer.stop)])


def generate_texts(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    stop_strings: Sequence[str] = (),
    generate: Callable[..., Generation] = generate_tokens,
    **settings: Any,
) -> list[Continuation]:
    """Returns continuations as text, `samples` of each prompt side by side. `settings` are those of `generate`.

    A row ends at a stop token of the tokenizer or of `stop`, or where its text first contains one of `stop_strings`.
    """
    settings |= {"stop": (stop := (*tokenizer.stop, *settings.get("stop", ()))), "vocab": tokenizer.vocab}
    if stop_strings:
        ended = stops_at(tokenizer, [prompt for prompt in prompts for _ in range(settings.get("samples", 1))], stop_strings)
        new = _last(stream_tokens(model, prompts, max_new_tokens, sampling, ended=ended, **settings))
    else:
        new = generate(model, prompts, max_new_tokens, sampling, **settings)
    samples = len(new.tokens) // len(prompts)
    return [
        _continuation(tokenizer, prompts[row // samples], stop_strings, stop, tokens, logprobs, top)
        for row, (tokens, logprobs, top) in enumerate(zip(*new, strict=True))
    ]


def stream_text(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    stop_strings: Sequence[str] = (),
    **settings: Any,
) -> Iterator[str]:
    """Yields the text of one prompt's continuation as it comes, in whole characters. It ends as in `generate_texts`."""
    settings |= {"stop": (stop := (*tokenizer.stop, *settings.get("stop", ()))), "vocab": tokenizer.vocab}
    ended = stops_at(tokenizer, [prompt], stop_strings) if stop_strings else None
    tokens = (token for part in stream_tokens(model, [prompt], max_new_tokens, sampling, ended=ended, **settings) for token in part[0])
    yield from up_to(stop_strings, following(tokenizer, prompt, without_end(tokens, stop)))


def without_end(tokens: Iterable[int], stop: Sequence[int]) -> Iterator[int]:
    """The tokens before the first of `stop`: a stop token may have a text."""
    return itertools.takewhile(lambda token: token not in stop, tokens)


def following(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of `tokens` in parts, as they come, as it reads after the prompt."""
    # A token's text depends on whether it is the first, and a byte's on the bytes before it: so the prompt's last character is needed.
    tails = ((tail := prompt[-n:], tokenizer.decode(tail)) for n in range(1, TAIL + 1))
    tail, before = next((each for each in tails if each[1] and "\ufffd" not in each[1]), (prompt[-1:], tokenizer.decode(prompt[-1:])))
    left = len(before)
    for part in tokenizer.stream(itertools.chain(tail, tokens)):
        yield part[left:]
        left = max(left - len(part), 0)


def up_to(stop_strings: Sequence[str], parts: Iterable[str]) -> Iterator[str]:
    """Yields the text before the first of `stop_strings`. What may yet become one is held back."""
    held = ""
    for part in parts:
        held += part
        if places := [held.find(string) for string in stop_strings if string in held]:
            yield held[: min(places)]
            return
        longest = max((n for string in stop_strings for n in range(1, len(string)) if held.endswith(string[:n])), default=0)
        if said := held[: len(held) - longest]:
            yield said
        held = held[len(held) - longest :]
    if held:
        yield held


def stops_at(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], strings: Sequence[str]) -> Callable[[list[list[int]]], list[bool]]:
    """Returns a function that says for each row of new tokens whether its text contains one of `strings`.

    Raises `ConfigError` for an empty string.
    """
    require_strings(strings)
    longest, read, texts, found = max(map(len, strings)), [0] * len(prompts), [""] * len(prompts), [False] * len(prompts)

    def ended(rows: list[list[int]]) -> list[bool]:
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            ids, begin = [*prompt, *row], len(prompt) + read[i]
            text = texts[i] + "".join(following(tokenizer, ids[max(begin - TAIL, 0) : begin], ids[begin:]))
            found[i] |= any(string in text for string in strings)
            if not text.endswith("\ufffd"):  # else its last character may be complete the next time
                read[i], texts[i] = len(row), text[-longest:]
        return [*found]

    return ended


def require_strings(strings: Sequence[str]) -> None:
    """Raises `ConfigError` for an empty string."""
    if "" in strings:
        raise ConfigError("an empty stop string would end every text", where="stop_strings", next="leave it out")


def _continuation(
    tokenizer: Tokenizer,
    prompt: list[int],
    strings: Sequence[str],
    stop: Sequence[int],
    tokens: list[int],
    logprobs: list[float],
    top: list[list[tuple[int, float]]],
) -> Continuation:
    text = "".join(following(tokenizer, prompt, without_end(tokens, stop)))
    cut = "".join(up_to(strings, [text]))
    if cut != text:  # more was drawn in the same call as the last token that counts
        has = lambda n: any(string in "".join(following(tokenizer, prompt, tokens[:n])) for string in strings)  # noqa: E731
        n = bisect.bisect_left(range(len(tokens)), True, key=has)
        tokens, logprobs, top = tokens[:n], logprobs[:n], top[:n]
    return Continuation(cut, tokens, logprobs, top, "stop" if cut != text or tokens[-1] in stop else "length")


def _last(stream: Generator[Any, None, Generation]) -> Generation:
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value
