"""From prompts to continuations in one compiled call: prefill, then a loop over tokens that runs until every row has ended."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llama_eqx.errors import NonFiniteError
from llama_eqx.generation.constraints import History, constrained
from llama_eqx.generation.request import Prompts, Rows, Rule, prepared
from llama_eqx.generation.sampling import Sampling, draw
from llama_eqx.model import kernel
from llama_eqx.model.attention import RotaryAttention
from llama_eqx.model.cache import emptied, is_empty, with_length, with_rows, with_segments, with_slots
from llama_eqx.model.llama import Llama
from llama_eqx.processes import on_host

AT_ONCE = 32768  # tokens of all prompts: their activations in one layer of an 8B model are 2 GB in bfloat16
LINE = 64  # slots: if a cache is not a whole number of lines, XLA for GPUs makes a padded copy of it at every token
FEWEST = 128  # slots of the smallest cache; it doubles when it is full, and a token reads no more slots than it has


class Generation(NamedTuple):
    """The new tokens of each row, up to and including its first stop token, and their log-probabilities.

    Log-probabilities are natural logarithms under the model itself, before any constraint. For every token, `top` holds the most probable
    ids at its position with their log-probabilities, as many as were asked for.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    top: list[list[list[tuple[int, float]]]]


def generate_tokens(
    model: Llama,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008
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
) -> Generation:
    """Continues every prompt by up to `max_new_tokens`, or until it draws a token of `stop` or fills the context.

    Prompts are ids, in lists or in an array. Each yields `samples` rows, side by side. The key for token t of sample s of prompt r depends
    on (seed, first_row + r, s, t) alone: prompts split over several calls, each with its `first_row`, draw the same tokens. `cache_dtype`
    defaults to the dtype of the weights. Prompts go through the model `prefill_chunk` tokens at a time, rounded down to a power of two; the
    default is 512, or all at once where cuDNN computes attention and they are not too many. With `shift`, a prompt that leaves less room in
    the context than `max_new_tokens` loses its beginning, but not the model's BOS. With `vocab`, only ids below it are drawn: a model may
    have more ids than its tokenizer.

    Raises `ConfigError` before anything is compiled: for prompts that are not ids, an empty prompt, an id outside of the vocabulary, a
    prompt that fills the context or a setting out of range. Raises `NonFiniteError` if a logit is NaN.
    """
    rows, rule = prepared(
        model,
        prompts,
        max_new_tokens,
        sampling,
        samples=samples,
        stop=stop,
        top_logprobs=top_logprobs,
        seed=seed,
        first_row=first_row,
        cache_dtype=cache_dtype,
        prefill_chunk=prefill_chunk,
        shift=shift,
        vocab=vocab,
    )
    return found(on_host(_generate(model, rows, rule)))


def found(state: "State") -> Generation:
    """The generation of a state that is on the host. Raises `NonFiniteError` as `require_numbers` does."""
    require_numbers(state.logprobs)
    cut = lambda array: [row[:length].tolist() for row, length in zip(array, state.lengths, strict=True)]  # noqa: E731
    pairs = zip(cut(state.top_ids), cut(state.top_logprobs), strict=True)
    top = [[list(zip(*each, strict=True)) for each in zip(*row, strict=True)] for row in pairs]
    return Generation(tokens=cut(state.new), logprobs=cut(state.logprobs), top=top)


def require_numbers(logprobs: Float[Array | np.ndarray, "..."]) -> None:
    """Raises `NonFiniteError` if a log-probability is NaN: the logits were, and the tokens are none that the model has chosen."""
    if np.isnan(logprobs).any():
        raise NonFiniteError("the model's logits are not finite, so it chose no tokens", next="python -m llama_eqx.doctor path=CHECKPOINT")


class State(eqx.Module):
    """Rows with `t` new tokens each, of up to `limits`. The last of them is not in the cache yet; it stands at `position` in its row."""

    cache: Any
    keys: Key[Array, " batch"] | None
    history: History | None
    position: Int[Array, " batch"]
    limits: Int[Array, " batch"]
    new: Int[Array, "batch new"]
    logprobs: Float[Array, "batch new"]
    top_ids: Int[Array, "batch new top"]
    top_logprobs: Float[Array, "batch new top"]
    lengths: Int[Array, " batch"]
    stopped: Bool[Array, " batch"]
    t: Int[Array, ""]


def prefill(
    model: Llama,
    cache: Any,
    tokens: Int[Array, "batch seq"],
    real: Bool[Array, "batch seq"],
    chunk: int | None,
    start: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "batch embed"], Any]:
    """The residual of each row's last real token, and the cache with all tokens appended. The padding may be on either side.

    The cache already has `start` tokens of each row. The new tokens go through the model `chunk` at a time (default `chunk_for`), or all at
    once if that does not divide them.
    """
    (batch, width), chunk = tokens.shape, chunk or chunk_for(model, cache, tokens)
    positions = jnp.maximum(start + jnp.cumsum(real, axis=1) - 1, 0)
    last = width - 1 - jnp.argmax(real[:, ::-1], axis=1)
    if width <= chunk or width % chunk:
        if not is_empty(cache):
            hidden, cache = model.hidden(tokens, positions=positions, segment_ids=real.astype(jnp.int32), cache=cache)
            return hidden[jnp.arange(batch), last], cache
        # The real tokens come first: the padding after them needs no mask, and kernels are slow with one.
        order = jnp.argsort(~real, axis=1, stable=True)
        with kernel.prompts():
            hidden, cache = model.hidden(jnp.take_along_axis(tokens, order, axis=1), cache=cache)
        cache = with_segments(cache, jnp.take_along_axis(real, order, axis=1).astype(jnp.int32))
        return hidden[jnp.arange(batch), real.sum(axis=1) - 1], with_length(cache, width)

    def piece(i: Array, so_far: tuple) -> tuple:
        found, cache = so_far
        part, positions_, segment_ids = (
            jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for x in (tokens, positions, real.astype(jnp.int32))
        )
        hidden, cache = model.hidden(part, positions=positions_, segment_ids=segment_ids, cache=cache)
        here = (last // chunk == i)[:, None]
        return jnp.where(here, hidden[jnp.arange(batch), last % chunk], found), cache

    empty = jnp.zeros((batch, model.config.dims.embed), jax.eval_shape(lambda: model.embed[tokens[:, :1]]).dtype)
    return jax.lax.fori_loop(0, width // chunk, piece, (empty, cache))


def chunk_for(model: Llama, cache: Any, tokens: Int[Array, "batch seq"]) -> int:
    """The default chunk: all tokens of a row if attention keeps no scores of them and they are not too many, else 512."""
    (head_dim,) = model.config.dims.of("head_dim")
    blocks: Any = model.blocks  # a tuple where the cache is known to be empty
    few = is_empty(cache) and tokens.size <= AT_ONCE and kernel.keeps_no_scores(model.embed.dtype, head_dim)
    return tokens.shape[1] if few and all(isinstance(getattr(b, "attention", None), RotaryAttention) for b in blocks) else 512


def begin(model: Llama, rows: Rows, rule: Rule) -> State:
    """The state with the prompts in a cache and the first token of each row drawn."""
    width = rows.tokens.shape[1]
    return first(model, *prefilled(model, rows, rule, slots_for(width, width + rule.max_new_tokens - 1)), rows, rule)


def prefilled(model: Llama, rows: Rows, rule: Rule, slots: int) -> tuple[Float[Array, "prompts embed"], Any]:
    """The residual of each prompt's last token, and a new cache with the prompts."""
    cache = model.init_cache(len(rows.tokens), slots, None if rule.cache_dtype is None else jnp.dtype(rule.cache_dtype))
    return prefill(model, emptied(cache), rows.tokens, rows.real, rule.prefill_chunk)


def first(model: Llama, hidden: Float[Array, "prompts embed"], cache: Any, rows: Rows, rule: Rule) -> State:
    """The state with `samples` rows for each prompt in the cache, and their first tokens drawn."""
    batch, n = len(hidden) * rule.samples, rule.max_new_tokens
    each = jnp.arange(batch) // rule.samples
    if rule.samples > 1:
        cache, hidden = with_rows(cache, each), hidden[each]
    history = None
    if rows.present is not None:
        history = History(present=rows.present[each], generated=jnp.zeros((batch, rows.present.shape[1]), jnp.int32))
    state = State(
        cache=cache,
        keys=rows.keys,
        history=history,
        position=rows.real.sum(axis=1)[each] - 1,
        limits=rows.limits[each],
        new=jnp.zeros((batch, n), jnp.int32),
        logprobs=jnp.zeros((batch, n), jnp.float32),
        top_ids=jnp.zeros((batch, n, rule.top_logprobs), jnp.int32),
        top_logprobs=jnp.zeros((batch, n, rule.top_logprobs), jnp.float32),
        lengths=jnp.zeros(batch, jnp.int32),
        stopped=jnp.zeros(batch, bool),
        t=jnp.zeros((), jnp.int32),
    )
    return _drawn(model, state, rule, hidden[:, None])


def advance(model: Llama, state: State, rule: Rule, until: Int[Array, ""] | int) -> State:
    """Draws tokens until there are `until` new tokens or every row has stopped. The cache must have slots for them."""

    def going(state: State) -> Bool[Array, ""]:
        return (state.t < until) & ~jnp.all(state.stopped)

    def step(state: State) -> State:
        token = jax.lax.dynamic_slice_in_dim(state.new, state.t - 1, 1, axis=1)
        hidden, cache = model.hidden(token, positions=state.position[:, None], cache=state.cache)
        return _drawn(model, eqx.tree_at(lambda s: s.cache, state, cache), rule, hidden)

    return jax.lax.while_loop(going, step, state)


def told(state: State) -> State:
    """The state without what is of no use on the host."""
    return eqx.tree_at(lambda s: (s.cache, s.keys, s.history), state, (None,) * 3, is_leaf=lambda x: x is None)


def slots_for(tokens: int, most: int) -> int:
    """The number of slots of a cache for that many tokens: a power of two, but no more lines than `most` tokens take."""
    return min(max(FEWEST, 1 << (tokens - 1).bit_length()), -(-most // LINE) * LINE)


@eqx.filter_jit
def _generate(model: Llama, rows: Rows, rule: Rule) -> State:
    """The final state, reduced by `told`."""
    width = rows.tokens.shape[1]
    run = lambda state, until: advance(model, state, rule, until)  # noqa: E731
    return told(while_growing(begin(model, rows, rule), run, width, rule.max_new_tokens))


def while_growing(state: Any, run: Callable[[Any, int], Any], width: int, new: int) -> Any:
    """Calls `run(state, until)` until there are `new` tokens after the `width` in the cache, which grows between the calls."""
    most = width + new - 1
    slots = slots_for(width, most)
    while True:
        state = run(state, min(slots, most) - width + 1)
        if slots >= most:
            return state
        slots = slots_for(slots + 1, most)
        state = eqx.tree_at(lambda s: s.cache, state, with_slots(state.cache, slots))


def _drawn(model: Llama, state: State, rule: Rule, hidden: Float[Array, "batch 1 embed"]) -> State:
    """The state with the token after `hidden` drawn; what a stopped row draws does not count."""
    logits, t = model.head(hidden)[:, 0], state.t
    keys = None if state.keys is None else jax.vmap(lambda key: jax.random.fold_in(key, t))(state.keys)
    token = draw(constrained(rule.known(logits), rule.constraints, state.history), keys)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logprob = jnp.take_along_axis(logits, token[:, None], axis=-1) - total
    top, top_ids = jax.lax.top_k(rule.known(logits), rule.top_logprobs)
    return State(
        cache=state.cache,
        keys=state.keys,
        history=None if state.history is None else state.history.extended(token),
        position=state.position + 1,
        limits=state.limits,
        new=state.new.at[:, t].set(token),
        logprobs=state.logprobs.at[:, t].set(logprob[:, 0]),
        top_ids=state.top_ids.at[:, t].set(top_ids),
        top_logprobs=state.top_logprobs.at[:, t].set(top - total),
        lengths=state.lengths + (~state.stopped).astype(jnp.int32),
        stopped=state.stopped | jnp.isin(token, rule.stop) | (t + 1 >= state.limits),
        t=t + 1,
    )
