"""What `python -m llama_eqx.generate` does: loads a checkpoint, continues prompts and writes the texts."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, Literal, TextIO

import equinox as eqx
import jax
import jax.numpy as jnp
import tqdm
from jaxtyping import Array, Float, Int

from llama_eqx.config import Config
from llama_eqx.data.chat import chat_format, foreign_template
from llama_eqx.data.tokenizer import Tokenizer
from llama_eqx.errors import ConfigError, DataError, StorageError, UserError
from llama_eqx.generation.chat import Chat
from llama_eqx.generation.decode import Generation
from llama_eqx.generation.layout import for_decoding, in_int8, unpacked
from llama_eqx.generation.prompts import Asked, read_prompts, reason
from llama_eqx.generation.request import LAST_SEED, number, require_stop
from llama_eqx.generation.sampling import Sampling
from llama_eqx.generation.search import search_beams
from llama_eqx.generation.speculative import generate_speculatively
from llama_eqx.generation.text import Continuation, following, generate_texts, prompt_tokens, require_strings, stream_text, without_end
from llama_eqx.interop.pretrained import find_tokenizer, format_of, load_pretrained, located, open_pretrained
from llama_eqx.interop.weights import abstract
from llama_eqx.model.llama import Llama
from llama_eqx.processes import DistributedConfig, is_first, watched
from llama_eqx.sharding import Layout, MeshConfig, Rules

# Settings that do not go with a mode: beams are not drawn, and the tokens of a draft are judged several at a time.
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
UNFIT = {
    "chat": ("beams", "draft", "samples", "output", "top_logprobs", "shift"),
    "beams": ("draft", "top_k", "min_p", *PENALTIES, "stop_strings", "top_logprobs"),
    "draft": ("samples", *PENALTIES, "stop_strings", "top_logprobs"),
}
UNSAID = {"samples": 1, "top_logprobs": 0, "stop_strings": (), "shift": False}  # values of settings not given; the others are None
MEASURED = 2048  # tokens at most of a text that tells what 8 bits cost: their logits and scores exist all at once
DIGITS = 5  # of log-probabilities in JSON: float32 has no more that matter


class GenerateConfig(Config):
    """A prompt, a file of prompts or a conversation, and the settings of `generate_tokens` with text in place of tokens.

    `max_new_tokens` is cut to what the context leaves after each prompt. A file has a prompt per line or, if its name ends with .jsonl or
    .ndjson, an object per line with a `prompt` or the `messages` of a conversation. `batch` of them are continued at once.
    """

    checkpoint: str | None
    dtype: Literal["float32", "bfloat16"] | None
    mesh: MeshConfig | None
    sharding: Rules
    quantize: Literal["int8"] | None
    quantize_text: str | None
    draft: str | None
    drafted: int
    chat: bool
    system: str | None
    prompt: str | None
    prompts: str | None
    output: str | None
    batch: int
    samples: int
    max_new_tokens: int
    temperature: float
    beams: int | None
    length_penalty: float
    early_stopping: bool | str
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    stop: tuple[int, ...]
    stop_strings: tuple[str, ...]
    top_logprobs: int
    shift: bool
    cache_dtype: Literal["float32", "bfloat16", "float16"] | None
    prefill_chunk: int | None
    seed: int
    distributed: DistributedConfig

    def check(self) -> None:
        if self.checkpoint is None:
            raise ConfigError("checkpoint is not given", where="checkpoint", next="checkpoint=RUN_DIR")
        if self.prompt == "":
            raise ConfigError("an empty prompt: there is nothing to continue", where="prompt", next="prompt='Once upon a time'")
        given = [name for name in ("prompt", "prompts", "chat") if getattr(self, name)]
        if not given:
            raise ConfigError("prompt is not given", where="prompt", next="prompt='Once upon a time', or prompts=FILE, or chat=true")
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} do not go together", where="/".join(given), next="one of them")
        if self.system is not None and not self.chat:
            raise ConfigError("a system message is for chat=true", where="system", next="in a file of prompts it is one of the messages")
        if self.early_stopping not in (True, False, "never"):
            raise ConfigError(f"{self.early_stopping!r} is no rule for an end", where="early_stopping", next="false, true or never")
        for way, unfit in UNFIT.items():
            given = [name for name in unfit if getattr(self, name) != UNSAID.get(name)]
            if getattr(self, way) and given:
                what = f"{way} and {', '.join(given)} do not go together"
                raise ConfigError(what, where=given[0], next=f"leave out {' and '.join(given)}, or {way}")
        for name in ("batch", "samples", "beams", "drafted", "max_new_tokens", "prefill_chunk"):
            if (value := getattr(self, name)) is not None:
                number(name, value, 1)
        if self.beams is not None and self.samples > self.beams:
            raise ConfigError(f"{self.samples} samples of {self.beams} beams", where="samples", next=f"beams={self.samples}")
        number("seed", self.seed, 0, LAST_SEED)
        require_strings(self.stop_strings)
        self.sampling()  # for its errors

    def sampling(self) -> Sampling:
        return Sampling(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)})

    def settings(self) -> dict[str, Any]:
        names = ("samples", "stop", "stop_strings", "top_logprobs", "cache_dtype", "prefill_chunk", "shift", "seed")
        return {name: getattr(self, name) for name in names}


def generate(config: GenerateConfig) -> None:
    """Prints the prompt and its continuation as it comes. A file, several samples, `top_logprobs` or `output` give a JSON object per line.

    Several processes draw the same tokens, each with its part of the model; process 0 prints and writes them.

    Raises `CheckpointError` for a checkpoint that cannot be read, `DataError` for prompts that cannot, `ConfigError` for settings out of
    range.
    """
    assert config.checkpoint is not None
    if jax.distributed.is_initialized():
        _require_what_several_can(config)
    if config.mesh is not None:
        config.mesh.build()  # before a file is opened, which makes JAX fix the number of CPU devices
    format_of(config.checkpoint)  # for its error, before weights are loaded
    tokenizer = find_tokenizer(config.checkpoint)
    llama = open_pretrained(config.checkpoint).config
    require_stop(config.stop, *llama.dims.of("vocab"))
    if config.draft is not None:
        format_of(config.draft)
    asked = [] if config.chat else read_prompts(config.prompt, config.prompts, tokenizer)
    if config.chat or "messages" in asked[0].given:
        chat_format(tokenizer)
        foreign = foreign_template(located(config.checkpoint)[0], tokenizer)
        what = f"conversations in the format {tokenizer.chat!r}{f', which is not that of {foreign}' if foreign else ''}"
        say(what, file=sys.stderr)
    if config.chat:
        return converse(loaded(config, config.checkpoint, tokenizer), tokenizer, config)
    check_room(asked, config, llama.context)
    if config.beams and config.temperature > 0:
        say("beams are searched and not drawn: temperature, top_p and seed change nothing", file=sys.stderr)
    if config.output is not None and is_first():
        _open(config.output, "a").close()
    model = loaded(config, config.checkpoint, tokenizer)
    plain = config.prompts is None and config.output is None and config.samples == 1 and not config.top_logprobs
    if plain and not (config.draft or config.beams):
        settings = {key: value for key, value in config.settings().items() if key != "samples"}
        parts = stream_text(model, tokenizer, asked[0].tokens, config.max_new_tokens, config.sampling(), **settings)
        begun = next(parts, "")  # settings that do not fit the model raise before the prompt is printed
        for part in watched(itertools.chain([tokenizer.decode(asked[0].tokens), begun], parts), config.distributed.stall):
            say(part, end="", flush=True)
        say()
        return
    with contextlib.nullcontext(sys.stdout) if config.output is None else _open(config.output if is_first() else os.devnull, "w") as file:
        for line in _lines(model, tokenizer, config, asked):
            text = tokenizer.decode(asked[0].tokens) + line["text"] if plain else json.dumps(line, ensure_ascii=False)
            say(text, file=file, flush=True)
    if config.output:
        say(f"{len(asked) * config.samples} texts in {config.output}", file=sys.stderr)


def _open(output: str, mode: Literal["a", "w"]) -> TextIO:
    """Raises `StorageError` when the file cannot be opened."""
    try:
        return open(os.path.expanduser(output), mode, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror}", where=output, next="another place: output=FILE") from None


def check_room(asked: list[Asked], config: GenerateConfig, context: int) -> None:
    """Prints which prompt leaves the fewest new tokens in the context, if fewer than `max_new_tokens`, and how many prompts do so. With
    `shift`, prints what is kept of the longest prompt.

    Raises `ConfigError` naming the longest prompt when it fills the context.
    """
    longest = max(asked, key=lambda each: len(each.tokens))
    room = min(context - len(longest.tokens), config.max_new_tokens)
    if config.shift:
        room = min(context - 1, config.max_new_tokens)
        if (kept := context - room) < (count := len(longest.tokens)):
            say(f"{longest.where}: shift leaves {kept} of its {count} tokens, and room for {room} new ones", file=sys.stderr)
    if room < 1:
        what = f"{len(longest.tokens)} tokens and new ones pass the context of {context}"
        raise ConfigError(what, where=longest.where, next="shorten the prompt, or shift=true leaves out its beginning")
    if room < config.max_new_tokens:
        cut = sum(context - len(each.tokens) < config.max_new_tokens for each in asked)
        others = f"; prompts with room for fewer than {config.max_new_tokens}: {cut}" if cut > 1 else ""
        say(f"{longest.where}: {room} new tokens fill the context of {context}{others}", file=sys.stderr)


def say(*values: Any, **settings: Any) -> None:
    """Prints in process 0 only."""
    if is_first():
        print(*values, **settings)


def _require_what_several_can(config: GenerateConfig) -> None:
    """Raises `ConfigError` for settings that need a single process."""
    if config.chat:
        raise ConfigError("a chat is held by one process", where="chat", next="start a single one, or prompts=FILE.jsonl of conversations")
    if config.mesh is None:
        raise ConfigError(
            "several processes continue text together, on a mesh of all their devices", where="mesh", next="mesh=local, or a single process"
        )


def converse(model: Llama, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    """Runs a chat in the terminal until its input ends. An interrupt breaks off the answer; a second one ends the chat.

    A line that cannot be answered prints its error, and the chat goes on.
    """
    settings = {key: value for key, value in config.settings().items() if key not in ("samples", "top_logprobs", "shift")}
    chat = Chat(model, tokenizer, config.sampling(), config.max_new_tokens, system=config.system, **settings)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so the tokenizer refuses a line that is not UTF-8, not Python the whole input
    if sys.stdin.isatty():
        print("Ctrl-C breaks off an answer, Ctrl-D ends the chat.", file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not text.strip():
            continue
        try:
            for part in chat.say(text):
                print(part, end="", flush=True)
        except KeyboardInterrupt:
            print(" (broken off)", end="")
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        print()


def _lines(model: Llama, tokenizer: Tokenizer, config: GenerateConfig, asked: list[Asked]) -> Iterator[dict[str, Any]]:
    """Yields what is written for each sample of each prompt. Progress goes to the terminal."""
    draft = None if config.draft is None else loaded(config, config.draft, tokenizer)
    settings: dict[str, Any] = {**config.settings()}
    on_screen = config.output is None and sys.stdout.isatty()  # where the lines themselves show the progress
    hidden = True if len(asked) == 1 or on_screen or not is_first() else None  # None: hidden where there is no terminal
    rates: list[float] = []
    if draft is not None:

        def drafted(model: Llama, *args: Any, **rest: Any) -> Generation:
            found, rate = generate_speculatively(model, draft, *args, drafted=config.drafted, **rest)
            rates.append(rate)
            return found

        settings["generate"] = drafted
    with tqdm.tqdm(total=len(asked), unit="prompt", disable=hidden) as bar:
        for begin in watched(range(0, len(asked), config.batch), config.distributed.stall):
            part = asked[begin : begin + config.batch]
            prompts = [each.tokens for each in part]
            if config.beams is None:
                found = generate_texts(model, tokenizer, prompts, config.max_new_tokens, config.sampling(), first_row=begin, **settings)
                n = config.samples
                said = [_said(tokenizer, prompts[i // n], continuation, i % n) for i, continuation in enumerate(found)]
            else:
                said = list(_searched(model, tokenizer, prompts, config))
            for i, line in enumerate(said):
                yield {**part[i // config.samples].given, **line}
            bar.update(len(part))
    if rates:
        say(f"{sum(rates) / len(rates):.2f} tokens of each reading of the model, with {config.drafted} drafted", file=sys.stderr)


def _searched(model: Llama, tokenizer: Tokenizer, prompts: list[list[int]], config: GenerateConfig) -> Iterator[dict[str, Any]]:
    """Yields the `samples` best hypotheses of each prompt."""
    assert config.beams is not None
    stop = (*tokenizer.stop, *config.stop)
    found = search_beams(
        model,
        prompts,
        config.max_new_tokens,
        config.beams,
        length_penalty=config.length_penalty,
        early_stopping="never" if config.early_stopping == "never" else config.early_stopping is True,
        stop=stop,
        cache_dtype=config.cache_dtype,
        prefill_chunk=config.prefill_chunk,
        shift=config.shift,
        vocab=tokenizer.vocab,
    )
    for prompt, hypotheses in zip(prompts, found, strict=True):
        for i, (tokens, score) in enumerate(hypotheses[: config.samples]):
            text = "".join(following(tokenizer, prompt, without_end(tokens, stop)))
            yield {"sample": i, "text": text, "tokens": tokens, "score": round(score, DIGITS)}


def _said(tokenizer: Tokenizer, prompt: list[int], continuation: Continuation, sample: int) -> dict[str, Any]:
    said = {"sample": sample, **continuation._asdict()}
    said["logprobs"], top = [round(logprob, DIGITS) for logprob in continuation.logprobs], said.pop("top")
    if top and top[0]:
        ids = [*prompt, *continuation.tokens]
        there = lambda t, i: "".join(following(tokenizer, ids[: len(prompt) + t], [i]))  # noqa: E731  (with a space before it, if any)
        said["top_logprobs"] = [[[there(t, i), i, round(logprob, DIGITS)] for i, logprob in place] for t, place in enumerate(top)]
    return said


def loaded(config: GenerateConfig, checkpoint: str, tokenizer: Tokenizer) -> Llama:
    """Loads a model laid out for decoding, on the first device or on those of `mesh`, each of which reads its own part.

    Prints what `quantize` costs. Raises `ConfigError` when sizes do not divide over the mesh, `DataError` for a text on which the cost
    cannot be measured.
    """
    file = pathlib.Path(os.path.expanduser(config.quantize_text or argparse.__file__))
    ids = [] if config.quantize is None else _to_measure(file, tokenizer)
    if config.mesh is None:
        model = load_pretrained(checkpoint, dtype=config.dtype)
    else:
        layout = Layout(config.mesh.build(), config.sharding)
        shardings = layout.shardings(abstract(open_pretrained(checkpoint).config))
        model = load_pretrained(checkpoint, dtype=config.dtype, shardings=shardings)
    model = for_decoding(model)
    if config.quantize is None:
        return model
    quantised, ids = in_int8(model), ids[: min(model.config.context, MEASURED)]
    before, after = perplexity(model, ids), perplexity(quantised, ids)
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 2**20  # noqa: E731
    say(
        f"int8: {size(model):.0f} MiB -> {size(quantised):.0f} MiB; perplexity of the first {len(ids)} tokens of {file.name} "
        f"{before:.4f} -> {after:.4f} ({after / before - 1:+.2%})" + "".join(f"; {name} stays as it is" for name in unpacked(model)),
        file=sys.stderr,
    )
    return quantised


def _to_measure(file: pathlib.Path, tokenizer: Tokenizer) -> list[int]:
    try:
        ids = prompt_tokens(tokenizer, file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, DataError) as error:
        what = error.what if isinstance(error, DataError) else reason(error)
        raise DataError(f"cannot read a text to measure: {what}", where=str(file), next="quantize_text=FILE") from None
    if len(ids) < 2:
        raise DataError(f"nothing to measure: {len(ids)} tokens, and none to predict", where=str(file), next="quantize_text=FILE")
    return ids


@eqx.filter_jit
def _nats(model: Llama, ids: Int[Array, "1 seq"]) -> Float[Array, ""]:
    logprobs = jax.nn.log_softmax(model(ids[:, :-1]))
    return -jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1).mean()


def perplexity(model: Llama, ids: list[int]) -> float:
    """The perplexity of the ids after the first, each given those before it."""
    return math.exp(float(_nats(model, jnp.asarray([ids]))))
