"""A request to generate: checked on the host, then turned into arrays."""

import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llama_eqx.errors import ConfigError
from llama_eqx.generation.constraints import Constraint
from llama_eqx.generation.sampling import Sampling
from llama_eqx.model.llama import Llama
from llama_eqx.precision import stored

SHORTEST = 16  # prompts are padded to a power of two, at least this, so that few lengths are compiled
LAST_SEED = 2**32 - 1  # of a larger one, JAX's keys have only the last 32 bits
TEXT = "tokenizer.encode(text) gives the ids of a text, python -m llama_eqx.generate takes text"
EXAMPLES = {"prompts": f"prompts=[[1, 2, 3], [4]]; {TEXT}", "stop": f"stop=[2]; {TEXT}"}

Prompts = Sequence[Sequence[int]] | Int[np.ndarray, "prompts seq"] | Int[Array, "prompts seq"]


class Rows(eqx.Module):
    """Prompts padded on the left to one width, the new tokens that each may get, the keys of their rows, and the ids in each prompt."""

    tokens: Int[Array, "prompts seq"]
    real: Bool[Array, "prompts seq"]
    limits: Int[Array, " prompts"]
    keys: Key[Array, " batch"] | None
    present: Bool[Array, "prompts vocab"] | None


class Rule(eqx.Module):
    """How rows are continued. None gets more than `max_new_tokens`."""

    constraints: tuple[Constraint, ...]
    stop: Int[Array, " stop"]
    samples: int = eqx.field(static=True)
    max_new_tokens: int = eqx.field(static=True)
    top_logprobs: int = eqx.field(static=True)
    cache_dtype: str | None = eqx.field(static=True)
    prefill_chunk: int | None = eqx.field(static=True)
    vocab: int = eqx.field(static=True)

    def known(self, logits: Float[Array, "*rows vocab"]) -> Float[Array, "*rows vocab"]:
        """The logits with the ids that the tokenizer does not have at -inf."""
        size = logits.shape[-1]
        return logits if self.vocab == size else jnp.where(jnp.arange(size) < self.vocab, logits, -jnp.inf)


def prepared(
    model: Llama,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    samples: int = 1,
    stop: Sequence[int] = (),
    top_logprobs: int = 0,
    seed: int = 0,
    first_row: int = 0,
    cache_dtype: DTypeLike | None = None,
    prefill_chunk: int | None = None,
    shift: bool = False,
    vocab: int | None = None,
) -> tuple[Rows, Rule]:
    """The arguments of `generate_tokens` as arrays.

    Raises `ConfigError` as it does.
    """
    if not isinstance(sampling, Sampling):
        example = "Sampling(temperature=0.8), from llama_eqx.generation.sampling"
        raise ConfigError(f"{sampling!r} is not a Sampling", where="sampling", next=example)
    (size,), context = model.config.dims.of("vocab"), model.config.context
    known = size if vocab is None else min(number("vocab", vocab, 1), size)
    max_new_tokens = min(number("max_new_tokens", max_new_tokens, 1), context - 1)
    samples, top_logprobs = number("samples", samples, 1), number("top_logprobs", top_logprobs, 0, known)
    prefill_chunk = None if prefill_chunk is None else number("prefill_chunk", prefill_chunk, 1)
    seed, first_row = number("seed", seed, 0, LAST_SEED), number("first_row", first_row, 0, 2**31 - 1)
    require_stop(stop := whole("stop", stop, 1), size)
    prompts = fitting(model, whole("prompts", prompts, 2), max_new_tokens, shift)
    limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    width = max(SHORTEST, 1 << (max(map(len, prompts)) - 1).bit_length())
    tokens, real = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
    present = np.zeros((len(prompts), size), bool) if sampling.penalties else None
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :], real[row, width - len(prompt) :] = prompt, True
        if present is not None:
            present[row, list(prompt)] = True
    keys = None
    if sampling.temperature > 0:
        numbers = jnp.arange(len(prompts) * samples)
        rows_and_samples = jnp.stack([first_row + numbers // samples, numbers % samples], axis=1)
        keys = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), pair[0]), pair[1]))(rows_and_samples)
    rule = Rule(
        constraints=sampling.constraints,
        stop=jnp.asarray(stop, jnp.int32),
        samples=samples,
        max_new_tokens=min(max_new_tokens, 1 << (max(limits) - 1).bit_length()),  # so that few are compiled
        top_logprobs=top_logprobs,
        cache_dtype=None if cache_dtype is None else stored(cache_dtype, "cache_dtype").name,
        prefill_chunk=prefill_chunk and 1 << (prefill_chunk.bit_length() - 1),  # so that it divides the prompts' width
        vocab=known,
    )
    as_array = lambda x: None if x is None else jnp.asarray(x)  # noqa: E731
    limits = jnp.asarray(limits, jnp.int32)
    return Rows(tokens=jnp.asarray(tokens), real=jnp.asarray(real), limits=limits, keys=keys, present=as_array(present)), rule


def whole(where: str, value: Any, axes: int = 0) -> Any:
    """`value` in Python's own numbers, in lists of so many axes: lists and arrays of any kind are taken.

    Raises `ConfigError` for anything else: floats would be cut, and a text taken apart.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        if axes and not isinstance(value, str | bytes):
            return [whole(f"{where}[{i}]", each, axes - 1) for i, each in enumerate(value)]
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        wanted, name = ("a whole number", "a list of ids", "a list of lists of ids")[axes], where.partition("[")[0]
        raise ConfigError(f"{reprlib.repr(value)} is not {wanted}", where=where, next=EXAMPLES.get(name, f"{name}=16")) from None


def number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number. Raises `ConfigError` for one out of range."""
    value = whole(name, value)
    if value < least:
        raise ConfigError(f"{value} is less than {least}", where=name, next=f"{name}={least} or more")
    if most is not None and value > most:
        raise ConfigError(f"{value} is more than {most}", where=name, next=f"{name}={most} or less")
    return value


def require_stop(stop: Sequence[int], vocab: int) -> None:
    """Raises `ConfigError` for an id outside of the vocabulary."""
    for token in stop:
        if not 0 <= token < vocab:
            raise ConfigError(f"id {token} is outside of the vocabulary of {vocab}", where="stop", next=f"ids from 0 to {vocab - 1}")


def fitting(model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int, shift: bool) -> list[Sequence[int]]:
    """The prompts. With `shift`, a prompt that leaves less room in the context than `max_new_tokens` loses its beginning, or what follows
    its BOS.

    Raises `ConfigError` as `generate_tokens` does.
    """
    (vocab,), context = model.config.dims.of("vocab"), model.config.context
    if not prompts:
        raise ConfigError("no prompts", where="prompts", next=EXAMPLES["prompts"])
    found = []
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError("an empty prompt: there is nothing to continue", where=f"prompts[{row}]", next="begin it with the BOS token")
        for position, token in enumerate(prompt):
            if not 0 <= token < vocab:
                raise ConfigError(
                    f"id {token} is outside of the vocabulary of {vocab}",
                    where=f"prompts[{row}][{position}]",
                    next=f"ids from 0 to {vocab - 1}; find_tokenizer(FOLDER) is the tokenizer in the folder of a model",
                )
        if len(prompt) >= context and not shift:
            raise ConfigError(
                f"{len(prompt)} tokens and new ones pass the context of {context}",
                where=f"prompts[{row}]",
                next="shorten the prompt, or shift=True leaves out its beginning",
            )
        room = context - max_new_tokens if shift else context
        begin = prompt[:1] if prompt[0] == model.config.tokens.bos and 1 < room < len(prompt) else prompt[:0]
        found.append([*begin, *prompt[len(begin) - room :]])
    return found
