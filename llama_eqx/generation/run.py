"""What `python -m llama_eqx.generate` does: a checkpoint, prompts, and where the texts go."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, Literal

import tqdm

from llama_eqx.config import Config
from llama_eqx.data.chat import chat_format
from llama_eqx.data.tokenizer import Tokenizer, find_tokenizer
from llama_eqx.errors import ConfigError, DataError, StorageError
from llama_eqx.generation.sampling import Sampling
from llama_eqx.generation.text import Continuation, generate_texts, prompt_tokens, stream_text
from llama_eqx.interop.pretrained import format_of, load_pretrained, located, open_pretrained
from llama_eqx.interop.weights import abstract
from llama_eqx.model.llama import Llama
from llama_eqx.sharding import Layout, MeshConfig, Rules


class GenerateConfig(Config):
    """One prompt, or those of a file, or a conversation; and `generate_tokens`' settings, with text for tokens.

    `max_new_tokens` is cut to what the context leaves. A file of prompts has a prompt a line or, if it ends with .jsonl, an object a line
    with a `prompt` or the `messages` of a conversation; `batch` of them are continued at once.
    """

    checkpoint: str | None
    dtype: Literal["float32", "bfloat16"] | None
    mesh: MeshConfig | None
    sharding: Rules
    prompt: str | None
    prompts: str | None
    output: str | None
    batch: int
    samples: int
    max_new_tokens: int
    temperature: float
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
    prefill_chunk: int
    seed: int

    def check(self) -> None:
        if self.checkpoint is None:
            raise ConfigError("checkpoint is not given", where="checkpoint", next="checkpoint=RUN_DIR")
        if self.prompt is None and self.prompts is None:
            raise ConfigError("prompt is not given", where="prompt", next="prompt='Once upon a time', or prompts=FILE")
        if self.prompt is not None and self.prompts is not None:
            raise ConfigError("one prompt and a file of prompts", where="prompt/prompts", next="one of the two")
        if self.batch < 1:
            raise ConfigError(f"{self.batch} prompts at a time", where="batch", next="batch=1 or more")
        self.sampling()  # for its errors

    def sampling(self) -> Sampling:
        return Sampling(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)})

    def settings(self) -> dict[str, Any]:
        names = ("samples", "stop", "stop_strings", "top_logprobs", "cache_dtype", "prefill_chunk", "shift", "seed")
        return {name: getattr(self, name) for name in names}


def generate(config: GenerateConfig) -> None:
    """Prints the prompt and its continuation as it comes or, of a file, several samples or with `output`, a JSON object a line.

    Raises `CheckpointError` for a checkpoint that cannot be read, `DataError` for prompts that cannot, `ConfigError` for settings out of
    range.
    """
    assert config.checkpoint is not None
    format_of(config.checkpoint)  # for its error
    tokenizer = find_tokenizer(located(config.checkpoint)[0])
    asked = read_prompts(config, tokenizer)  # before weights are loaded
    model = load_sharded(config)
    length = fitted_length(model, config, [tokens for _, tokens in asked])
    if config.prompts is None and config.output is None and config.samples == 1 and not config.top_logprobs:
        print(tokenizer.decode(asked[0][1]), end="", flush=True)
        settings = {key: value for key, value in config.settings().items() if key != "samples"}
        for part in stream_text(model, tokenizer, asked[0][1], length, config.sampling(), **settings):
            print(part, end="", flush=True)
        print()
        return
    try:
        file = sys.stdout if config.output is None else open(config.output, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror}", where=str(config.output), next="another place: output=FILE") from None
    with file if config.output else tqdm.tqdm(total=0, disable=True):
        for line in _lines(model, tokenizer, config, asked, length):
            print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
    if config.output:
        print(f"{len(asked) * config.samples} texts in {config.output}", file=sys.stderr)


def _lines(model: Llama, tokenizer: Tokenizer, config: GenerateConfig, asked: list, length: int) -> Iterator[dict[str, Any]]:
    """What is written of each sample of each prompt. Progress goes to the terminal."""
    with tqdm.tqdm(total=len(asked), unit="prompt", disable=len(asked) == 1) as bar:
        for first in range(0, len(asked), config.batch):
            part = asked[first : first + config.batch]
            prompts = [tokens for _, tokens in part]
            found = generate_texts(model, tokenizer, prompts, length, config.sampling(), first_row=first, **config.settings())
            for i, continuation in enumerate(found):
                yield {**part[i // config.samples][0], **_said(tokenizer, continuation, i % config.samples)}
            bar.update(len(part))


def _said(tokenizer: Tokenizer, continuation: Continuation, sample: int) -> dict[str, Any]:
    said = {"sample": sample, **continuation._asdict()}
    top = said.pop("top")
    if top and top[0]:
        said["top_logprobs"] = [[[tokenizer.decode([i]), i, logprob] for i, logprob in place] for place in top]
    return said


def load_sharded(config: GenerateConfig) -> Llama:
    """The model on the first device, or on those of `mesh`, each of which reads its own part.

    Raises `ConfigError` when its sizes do not divide.
    """
    assert config.checkpoint is not None
    if config.mesh is None:
        return load_pretrained(config.checkpoint, dtype=config.dtype)
    layout = Layout(config.mesh.build(), config.sharding)
    shardings = layout.shardings(abstract(open_pretrained(config.checkpoint).config))
    return load_pretrained(config.checkpoint, dtype=config.dtype, shardings=shardings)


def read_prompts(config: GenerateConfig, tokenizer: Tokenizer) -> list[tuple[dict[str, Any], list[int]]]:
    """What was asked, as it is repeated in the output, and its tokens.

    Raises `DataError` naming the line: for JSON that is none, an empty prompt, and raw text among conversations.
    """
    if config.prompts is None:
        assert config.prompt is not None
        return [({"prompt": config.prompt}, prompt_tokens(tokenizer, config.prompt))]
    try:
        lines = pathlib.Path(config.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the prompts: {error}", where=config.prompts, next="prompts=FILE, .jsonl or a prompt a line") from None
    plain = not config.prompts.endswith(".jsonl")
    asked, kinds = [], {}
    for number, line in enumerate(lines, 1):
        where = f"{config.prompts}:{number}"
        if not line.strip():
            if plain and any(rest.strip() for rest in lines[number:]):
                raise DataError("an empty prompt: there is nothing to continue", where=where, next="take the line out")
            continue
        given = {"prompt": line} if plain else _parsed(line, where)
        kinds.setdefault("prompt" if "prompt" in given else "messages", number)
        if len(kinds) == 2:
            raise DataError(
                f"raw text in line {kinds['prompt']} and a conversation in line {kinds['messages']}: they are continued differently",
                where=config.prompts,
                next="a file for each",
            )
        if "prompt" in given:
            tokens = prompt_tokens(tokenizer, given["prompt"])
        else:
            try:
                tokens, _ = chat_format(tokenizer).encode(given["messages"], tokenizer, generate=True)
            except DataError as error:
                raise DataError(error.what, where=f"{where}: {error.where}", next=error.next) from None
        asked.append((given, tokens))
    if not asked:
        raise DataError("no prompts in this file", where=config.prompts, next='a prompt a line or, in .jsonl, {"prompt": "…"}')
    return asked


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error}", where=where, next='{"prompt": "…"} or {"messages": […]}, an object a line') from None
    if not isinstance(given, dict) or ("prompt" in given) == ("messages" in given):
        raise DataError("neither a prompt nor messages, or both", where=where, next='{"prompt": "…"} or {"messages": […]}')
    if "prompt" in given and not (isinstance(given["prompt"], str) and given["prompt"]):
        raise DataError("an empty prompt, or one that is no text", where=where, next="take the line out")
    return given


def fitted_length(model: Llama, config: GenerateConfig, prompts: list[list[int]]) -> int:
    """`max_new_tokens`, or fewer where the context leaves fewer; this is said."""
    room = model.config.context - max(map(len, prompts))
    if config.shift or not 0 < room < config.max_new_tokens:
        return config.max_new_tokens
    print(f"{room} new tokens fill the context of {model.config.context}", file=sys.stderr)
    return room
