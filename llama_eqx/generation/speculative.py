"""Speculative decoding: a small model drafts; the large one reads several tokens at the price of one and keeps those it accepts."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from llama_eqx.errors import ConfigError
from llama_eqx.generation.constraints import constrained
from llama_eqx.generation.decode import Generation, prefilled, require_numbers, slots_for, while_growing
from llama_eqx.generation.request import Prompts, Rows, Rule, number, prepared
from llama_eqx.generation.sampling import Sampling, draw
from llama_eqx.model.cache import tokens_in, with_length
from llama_eqx.model.llama import Llama
from llama_eqx.processes import on_host


class Speculation(NamedTuple):
    """What was generated, and the tokens of the longest row per reading of the large model. Its first token, which the prompt gives, does
    not count.
    """

    generation: Generation
    tokens_per_round: float


def generate_speculatively(
    model: Llama,
    draft: Llama,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008
    *,
    drafted: int = 4,
    **settings: Any,
) -> Speculation:
    """Returns tokens distributed as those of `generate_tokens`, and equal to them when greedy (Leviathan et al., 2023, arXiv 2211.17192).

    `draft` proposes `drafted` tokens at a time. Rows advance in step: each round keeps as many tokens as the row that keeps the fewest, so
    draws depend on which rows are together. `settings` are those of `generate_tokens`, with samples 1 and top_logprobs 0.

    Raises `ConfigError` as `generate_tokens` does, for penalties, and for models with different vocabularies.
    """
    if draft.config.dims.vocab != model.config.dims.vocab:
        sizes = f"{draft.config.dims.vocab} ids, the model {model.config.dims.vocab}"
        raise ConfigError(f"the draft model has {sizes}", where="draft", next="a draft model with the same tokenizer")
    if sampling.penalties:
        raise ConfigError(
            "penalties change with every token, but drafts are judged all at once", where="draft", next="leave out the penalties"
        )
    number("drafted", drafted, 1)
    for name, only in {"samples": 1, "top_logprobs": 0}.items():
        if settings.get(name, only) != only:
            raise ConfigError(f"with a draft model, {name} must be {only}", where=name, next=f"{name}={only}")
    rows, rule = prepared(model, prompts, max_new_tokens, sampling, **settings)
    state = on_host(_speculate(model, draft, rows, rule, drafted))
    require_numbers(state.logprobs)
    cut = lambda array: [row[:length].tolist() for row, length in zip(array, state.lengths, strict=True)]  # noqa: E731
    tokens = cut(state.new)
    new = Generation(tokens=tokens, logprobs=cut(state.logprobs), top=[[[]] * len(row) for row in tokens])
    return Speculation(new, (int(state.lengths.max()) - 1) / max(int(state.rounds), 1))


class Drafts(eqx.Module):
    """Rows with `t` new tokens, of up to `limits`. The last is in neither cache. `cache` has the model's cache and the draft model's."""

    cache: tuple[Any, Any]
    limits: Int[Array, " batch"]
    new: Int[Array, "batch room"]
    logprobs: Float[Array, "batch room"]
    lengths: Int[Array, " batch"]
    stopped: Bool[Array, " batch"]
    t: Int[Array, ""]
    rounds: Int[Array, ""]


@eqx.filter_jit
def _speculate(model: Llama, draft: Llama, rows: Rows, rule: Rule, drafted: int) -> Drafts:
    (batch, width), new = rows.tokens.shape, rule.max_new_tokens
    slots = slots_for(width + drafted, width + drafted + new - 1)
    (hidden, cache), (_, draft_cache) = prefilled(model, rows, rule, slots), prefilled(draft, rows, rule, slots)
    keys = None if rows.keys is None else _folded(rows.keys, 0)
    logits = model.head(hidden[:, None])[:, 0]
    token = draw(constrained(rule.known(logits), rule.constraints, None), keys)
    room = jnp.zeros((batch, new + drafted), jnp.int32)
    state = Drafts(
        cache=(cache, draft_cache),
        limits=rows.limits,
        new=room.at[:, 0].set(token),
        logprobs=room.astype(jnp.float32).at[:, 0].set(_logprob(logits, token)),
        lengths=jnp.ones(batch, jnp.int32),
        stopped=jnp.isin(token, rule.stop) | (rows.limits == 1),
        t=jnp.ones((), jnp.int32),
        rounds=jnp.zeros((), jnp.int32),
    )
    start = rows.real.sum(axis=1)

    def run(state: Drafts, until: int) -> Drafts:
        def going(state: Drafts) -> Bool[Array, ""]:
            return (state.t < min(until, new)) & ~jnp.all(state.stopped)

        return jax.lax.while_loop(going, lambda state: _round(model, draft, state, rows.keys, start, rule, drafted), state)

    return eqx.tree_at(lambda s: s.cache, while_growing(state, run, width + drafted, new), None)


def _round(
    model: Llama, draft: Llama, state: Drafts, keys: Key[Array, " batch"] | None, start: Int[Array, " batch"], rule: Rule, drafted: int
) -> Drafts:
    cache, draft_cache = state.cache
    filled, t = tokens_in(cache), state.t
    position = (start + t - 1)[:, None]  # of the last token
    round_keys = None if keys is None else _folded(keys, t)

    def propose(carry: tuple, i: Array) -> tuple:
        token, cache = carry
        hidden, cache = draft.hidden(token[:, None], positions=position + i, cache=cache)
        logits = constrained(rule.known(draft.head(hidden)[:, 0]), rule.constraints, None)
        token = draw(logits, None if round_keys is None else _folded(round_keys, i))
        return (token, cache), (token, jax.nn.softmax(logits, axis=-1))

    last = jax.lax.dynamic_index_in_dim(state.new, t - 1, axis=1, keepdims=False)
    # One step more than there are proposals, so that the draft model's cache has the last proposal too.
    (_, draft_cache), (proposed, q) = jax.lax.scan(propose, (last, draft_cache), jnp.arange(drafted + 1))
    proposed, q = proposed[:drafted].T, q[:drafted].swapaxes(0, 1)
    read = jnp.concatenate([last[:, None], proposed], axis=1)
    hidden, cache = model.hidden(read, positions=position + jnp.arange(drafted + 1), cache=cache)
    logits = model.head(hidden)
    allowed = jax.vmap(lambda x: constrained(rule.known(x), rule.constraints, None), in_axes=1, out_axes=1)(logits)

    if round_keys is None:
        own = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
        accepted = proposed == own[:, :drafted]
    else:
        p = jax.nn.softmax(allowed, axis=-1)
        of_proposed = lambda x: jnp.take_along_axis(x, proposed[:, :, None], axis=-1)[:, :, 0]  # noqa: E731
        luck = jax.vmap(lambda key: jax.random.uniform(key, (drafted,)))(_folded(round_keys, drafted + 1))
        accepted = luck * of_proposed(q) < of_proposed(p[:, :drafted])
        # After a rejection, the next token is drawn from the excess of p over q; if all drafts are accepted, from p.
        rest = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0)
        own = jax.vmap(draw, in_axes=(1, None), out_axes=1)(jnp.log(rest), _folded(round_keys, drafted + 2))
    count = jnp.cumprod(accepted, axis=1).sum(axis=1, dtype=jnp.int32)
    kept = jnp.min(jnp.where(state.stopped, drafted, count))
    # Each row takes its first `kept` proposals and one more token. For a row that would have kept more, that is its next proposal.
    further = jnp.concatenate([jnp.where(accepted, proposed, own[:, :drafted]), own[:, drafted:]], axis=1)
    tokens = jnp.where(jnp.arange(drafted + 1) < kept, jnp.pad(proposed, ((0, 0), (0, 1))), further)
    counts = jnp.arange(drafted + 1) <= kept
    ends = jnp.isin(tokens, rule.stop) & counts
    added = jnp.where(ends.any(axis=1), jax.lax.argmax(ends, 1, jnp.int32) + 1, kept + 1)
    put = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, t, axis=1)  # noqa: E731
    lengths = jnp.minimum(state.lengths + jnp.where(state.stopped, 0, added), state.limits)
    return Drafts(
        cache=(with_length(cache, filled + kept + 1), with_length(draft_cache, filled + kept + 1)),
        new=put(state.new, tokens),
        logprobs=put(state.logprobs, jax.vmap(_logprob, in_axes=1, out_axes=1)(logits, tokens)),
        limits=state.limits,
        lengths=lengths,
        stopped=state.stopped | ends.any(axis=1) | (lengths == state.limits),
        t=t + kept + 1,
        rounds=state.rounds + 1,
    )


def _folded(keys: Key[Array, " batch"], data: Any) -> Key[Array, " batch"]:
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def _logprob(logits: Float[Array, "batch vocab"], token: Int[Array, " batch"]) -> Float[Array, " batch"]:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
