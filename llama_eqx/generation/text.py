"""From text to text: a checkpoint with its tokenizer."""

import sys

from llama_eqx.config import Config
from llama_eqx.data.tokenizer import Tokenizer, find_tokenizer
from llama_eqx.errors import ConfigError
from llama_eqx.generation.decode import generate_tokens
from llama_eqx.interop.pretrained import load_pretrained, located
from llama_eqx.model.llama import Llama


class GenerateConfig(Config):
    """What `generate_tokens` takes, with text for tokens. `max_new_tokens` is cut to what the model's context leaves."""

    checkpoint: str | None
    prompt: str | None
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int

    def check(self) -> None:
        for name, example in {"checkpoint": "RUN_DIR", "prompt": "'Once upon a time'"}.items():
            if getattr(self, name) is None:
                raise ConfigError(f"{name} is not given", where=name, next=f"{name}={example}")


def generate(config: GenerateConfig) -> str:
    """The prompt and its continuation.

    Raises `CheckpointError` for a checkpoint that cannot be read, `DataError` for text that the tokenizer does not know.
    """
    assert config.checkpoint is not None
    assert config.prompt is not None
    model = load_pretrained(config.checkpoint)
    tokenizer = find_tokenizer(located(config.checkpoint)[0])
    prompt = prompt_tokens(tokenizer, config.prompt)
    if 0 < model.config.context - len(prompt) < config.max_new_tokens:
        print(f"{model.config.context - len(prompt)} new tokens fill the context of {model.config.context}", file=sys.stderr)
    return continued(
        model,
        tokenizer,
        prompt,
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """BOS, if the tokenizer has one, and the prompt. Raises `DataError` for text that the tokenizer does not know."""
    return tokenizer.encode(prompt) if tokenizer.bos is None else [tokenizer.bos, *tokenizer.encode(prompt)]


def continued(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """The text of `prompt` and of up to `max_new_tokens` tokens more, to the end of the text or as far as the context reaches.

    Raises `ConfigError` for an empty prompt, one that fills the context, and settings out of range.
    """
    room = model.config.context - len(prompt)
    new = generate_tokens(
        model,
        [prompt],
        min(max_new_tokens, room) if room > 0 else max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=tokenizer.stop,
        seed=seed,
    )
    return tokenizer.decode([*prompt, *new.tokens[0]])
