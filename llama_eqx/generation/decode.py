"""From prompts to continuations, all tokens in one compiled call."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from llama_eqx.errors import ConfigError
from llama_eqx.generation.sampling import sample
from llama_eqx.model.llama import Llama

SHORTEST = 16  # prompts are padded to a power of two from here on, so that few lengths are compiled


class Generation(NamedTuple):
    """New tokens of each row, up to and with its first stop token, and their log-probabilities.

    These are natural logarithms under the model itself, before temperature, top-k and top-p.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]


def generate_tokens(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
    seed: int = 0,
    first_row: int = 0,
    cache_dtype: DTypeLike | None = None,
) -> Generation:
    """Continues every prompt by up to `max_new_tokens`, until it draws a token of `stop`.

    Temperature 0 is greedy. Row r draws its t-th token with a key of (seed, first_row + r, t) alone: many prompts may be split over
    calls that say where each begins, and draw the same. `cache_dtype` is that of the weights unless given.

    Raises `ConfigError` before anything is compiled: for an empty prompt, an id outside of the vocabulary, a length past the context
    and settings out of range.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, stop)
    width = max(SHORTEST, 1 << (max(map(len, prompts)) - 1).bit_length())
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    new, logprobs, lengths = jax.device_get(
        _generate(
            model,
            jnp.asarray(tokens),
            jnp.asarray([width - len(prompt) for prompt in prompts], jnp.int32),
            jax.random.key(seed),
            jnp.asarray(first_row, jnp.int32),
            jnp.asarray(temperature, jnp.float32),
            None if top_p is None else jnp.asarray(top_p, jnp.float32),
            jnp.asarray(stop, jnp.int32),
            max_new_tokens,
            top_k,
            None if cache_dtype is None else jnp.dtype(cache_dtype),
        )
    )
    return Generation(
        tokens=[row[:length].tolist() for row, length in zip(new, lengths, strict=True)],
        logprobs=[row[:length].tolist() for row, length in zip(logprobs, lengths, strict=True)],
    )


@eqx.filter_jit
def _generate(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    padding: Int[Array, " batch"],
    key: PRNGKeyArray,
    first_row: Int[Array, ""],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""] | None,
    stop: Int[Array, " stop"],
    max_new_tokens: int,
    top_k: int | None,
    cache_dtype: jnp.dtype | None,
) -> tuple[Int[Array, "batch new"], Float[Array, "batch new"], Int[Array, " batch"]]:
    """New tokens, their log-probabilities and how many of each row count. The prompts follow `padding` tokens of no meaning."""
    batch, width = tokens.shape
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(first_row + jnp.arange(batch))

    def choose(hidden: Float[Array, "batch 1 embed"], t: Int[Array, ""] | int) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
        logits = model.head(hidden)[:, 0]
        keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, t))(row_keys)
        token = sample(logits, keys, temperature=temperature, top_k=top_k, top_p=top_p)
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]

    positions = jnp.arange(width) - padding[:, None]
    real = positions >= 0
    cache = model.init_cache(batch, width + max_new_tokens - 1, cache_dtype)
    hidden, cache = model.hidden(tokens, positions=jnp.maximum(positions, 0), segment_ids=real.astype(jnp.int32), cache=cache)
    token, logprob = choose(hidden[:, -1:], 0)
    new = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(token)
    logprobs = jnp.zeros((batch, max_new_tokens), jnp.float32).at[:, 0].set(logprob)

    def going(state: tuple) -> Bool[Array, ""]:
        t, *_, stopped = state
        return (t < max_new_tokens) & ~jnp.all(stopped)

    def step(state: tuple) -> tuple:
        t, new, logprobs, cache, lengths, stopped = state
        token = jax.lax.dynamic_slice_in_dim(new, t - 1, 1, axis=1)
        hidden, cache = model.hidden(token, positions=(width - padding + t - 1)[:, None], cache=cache)
        token, logprob = choose(hidden, t)
        new, logprobs = new.at[:, t].set(token), logprobs.at[:, t].set(logprob)
        return t + 1, new, logprobs, cache, lengths + (~stopped).astype(jnp.int32), stopped | jnp.isin(token, stop)

    state = (jnp.ones((), jnp.int32), new, logprobs, cache, jnp.ones(batch, jnp.int32), jnp.isin(token, stop))
    _, new, logprobs, _, lengths, _ = jax.lax.while_loop(going, step, state)
    return new, logprobs, lengths


def _check(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop: Sequence[int],
) -> None:
    vocab, context = model.config.dims.of("vocab")[0], model.config.context
    if not prompts:
        raise ConfigError("no prompts", where="prompts")
    if max_new_tokens < 1:
        raise ConfigError(f"{max_new_tokens} new tokens are none", where="max_new_tokens")
    if not temperature >= 0 or temperature == float("inf"):
        raise ConfigError(f"{temperature} is not a temperature", where="temperature", next="0 is greedy, 1 samples the model as it is")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"{top_k} tokens cannot be drawn from", where="top_k", next="at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"{top_p} is not in (0, 1]", where="top_p")
    for token in stop:
        if not 0 <= token < vocab:
            raise ConfigError(f"id {token} is outside of the vocabulary of {vocab}", where="stop")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError("an empty prompt: there is nothing to continue", where=f"prompts[{row}]", next="begin it with the BOS token")
        for position, token in enumerate(prompt):
            if not 0 <= token < vocab:
                raise ConfigError(f"id {token} is outside of the vocabulary of {vocab}", where=f"prompts[{row}][{position}]")
        if len(prompt) + max_new_tokens > context:
            raise ConfigError(
                f"{len(prompt)} tokens and {max_new_tokens} new ones pass the context of {context}",
                where=f"prompts[{row}]",
                next=f"max_new_tokens may be up to {context - len(prompt)}" if len(prompt) < context else "shorten the prompt",
            )
