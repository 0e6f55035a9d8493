"""Tokens as they come: a few per call, with the cache handed from one call to the next."""

from collections.abc import Callable, Generator
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llama_eqx.generation.decode import Generation, State, advance, begin, found, slots_for, told
from llama_eqx.generation.request import Prompts, Rule, prepared
from llama_eqx.generation.sampling import Sampling
from llama_eqx.model.cache import slots_of, with_slots
from llama_eqx.model.llama import Llama
from llama_eqx.processes import on_host

Ended = Callable[[list[list[int]]], list[bool]]


def stream_tokens(
    model: Llama,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008
    *,
    every: int = 8,
    ended: Ended | None = None,
    **settings: Any,
) -> Generator[list[list[int]], None, Generation]:
    """Yields what `generate_tokens` draws, as it comes: each row's next tokens, the first alone, then `every` at a time. Returns the whole.

    `ended` gets all new tokens of every row so far, and says which rows draw no more.

    Raises `ConfigError` as `generate_tokens` does, when the first tokens are asked for.
    """
    rows, rule = prepared(model, prompts, max_new_tokens, sampling, **settings)
    new, _ = yield from streamed(model, _begin(model, rows, rule), rule, rows.tokens.shape[1], every, ended)
    return new


def streamed(
    model: Llama, state: State, rule: Rule, filled: int, every: int, ended: Ended | None
) -> Generator[list[list[int]], None, tuple[Generation, Any]]:
    """Like `stream_tokens`, from a state with its first token, which goes to slot `filled` of the cache. Returns the cache too."""
    said = 0
    while True:
        so_far = on_host(told(state))  # before the state is donated
        new = found(so_far)
        if ended is not None:
            stopped = np.asarray(so_far.stopped) | np.asarray(ended(new.tokens))
            state, so_far = (eqx.tree_at(lambda s: s.stopped, s, x) for s, x in ((state, jnp.asarray(stopped)), (so_far, stopped)))
        yield [row[said:] for row in new.tokens]
        said = int(so_far.t)
        if said == rule.max_new_tokens or so_far.stopped.all():
            return new, state.cache
        until = min(said + every, rule.max_new_tokens)
        if slots_of(state.cache) < filled + until - 1:
            slots = slots_for(filled + until - 1, filled + rule.max_new_tokens - 1)
            state = eqx.tree_at(lambda s: s.cache, state, with_slots(state.cache, slots))
        state = _advance((model, rule, jnp.asarray(until)), state)


_begin = eqx.filter_jit(begin)


@eqx.filter_jit(donate="all-except-first")
def _advance(kept: tuple[Llama, Rule, Array], state: State) -> State:
    """`advance` in the buffers of the state, which is donated."""
    model, rule, until = kept
    return advance(model, state, rule, until)
