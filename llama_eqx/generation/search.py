"""Beam search: the most probable continuations instead of drawn ones."""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_eqx.errors import ConfigError
from llama_eqx.generation.decode import prefilled, require_numbers, slots_for, while_growing
from llama_eqx.generation.request import Prompts, Rows, Rule, number, prepared
from llama_eqx.generation.sampling import Sampling
from llama_eqx.model.cache import with_rows
from llama_eqx.model.llama import Llama
from llama_eqx.processes import on_host

NEVER = -1e9  # added to the score of what must not be chosen


class Hypothesis(NamedTuple):
    """New tokens, up to and including a stop token, and their log-probability divided by their number ** length penalty."""

    tokens: list[int]
    score: float


def search_beams(
    model: Llama,
    prompts: Prompts,
    max_new_tokens: int,
    beams: int,
    *,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    **settings: Any,
) -> list[list[Hypothesis]]:
    """The `beams` best continuations of each prompt, best first. Algorithm and tokens are those of `transformers` 5.

    Scores are log-probabilities over length ** `length_penalty`. A prompt is done when no running beam can pass the worst finished one.
    A beam is judged at its present length or, with `early_stopping="never"`, at the best score it could reach. With True, a prompt is done
    when it has `beams` finished ones. `settings` are those of `generate_tokens` that do not concern draws: stop, cache_dtype,
    prefill_chunk, shift, vocab.

    Raises `ConfigError` as `generate_tokens` does, for settings of draws, and for a number of beams that the vocabulary has too few tokens
    for.
    """
    if draws := sorted(settings.keys() & {"sampling", "samples", "seed", "first_row", "top_logprobs"}):
        raise ConfigError(f"beams are not drawn: {', '.join(draws)} would change nothing", where=draws[0], next="leave it out")
    rows, rule = prepared(model, prompts, max_new_tokens, Sampling(), **settings)
    least = max(2, 1 + len(rule.stop)) * number("beams", beams, 1)
    if least > rule.vocab:
        raise ConfigError(f"{beams} beams need {least} tokens, and the vocabulary has {rule.vocab}", where="beams", next="beams=4")
    state = on_host(_search(model, rows, rule, beams, length_penalty, early_stopping))
    require_numbers(state.scores)
    cut = lambda tokens, length: tokens[:length].tolist()  # noqa: E731
    return [
        [Hypothesis(cut(*each[:2]), float(each[2])) for each in zip(*prompt, strict=True)]
        for prompt in zip(state.done, state.lengths, state.scores, strict=True)
    ]


class Beams(eqx.Module):
    """Running beams with `t` tokens each, of up to `limits`, and their log-probabilities, and the best finished ones."""

    cache: Any
    position: Int[Array, " beam"]
    limits: Int[Array, "prompts 1"]
    running: Int[Array, "prompts beams new"]
    running_scores: Float[Array, "prompts beams"]
    done: Int[Array, "prompts beams new"]
    scores: Float[Array, "prompts beams"]
    lengths: Int[Array, "prompts beams"]
    finished: Bool[Array, "prompts beams"]
    improvable: Bool[Array, " prompts"]
    t: Int[Array, ""]


@eqx.filter_jit
def _search(model: Llama, rows: Rows, rule: Rule, beams: int, length_penalty: float, early_stopping: bool | Literal["never"]) -> Beams:
    (prompts, width), new = rows.tokens.shape, rule.max_new_tokens
    hidden, cache = prefilled(model, rows, rule, slots_for(width, width + new - 1))
    each = jnp.arange(prompts * beams) // beams
    zeros = jnp.zeros((prompts, beams, new), jnp.int32)
    state = Beams(
        cache=with_rows(cache, each),
        position=rows.real.sum(axis=1)[each] - 1,
        limits=rows.limits[:, None],
        running=zeros,
        running_scores=jnp.full((prompts, beams), NEVER).at[:, 0].set(0),  # all beams begin alike: only one of them counts
        done=zeros,
        scores=jnp.full((prompts, beams), NEVER),
        lengths=zeros[:, :, 0],
        finished=jnp.zeros((prompts, beams), bool),
        improvable=jnp.ones(prompts, bool),
        t=jnp.zeros((), jnp.int32),
    )
    state = _chosen(model, state, rule, hidden[each][:, None], beams, length_penalty, early_stopping)

    def run(state: Beams, until: int) -> Beams:
        def going(state: Beams) -> Bool[Array, ""]:
            full = jnp.all(state.finished) if early_stopping is True else False
            return (state.t < until) & jnp.any(state.improvable) & ~jnp.asarray(full)

        def step(state: Beams) -> Beams:
            tokens = jax.lax.dynamic_index_in_dim(state.running, state.t - 1, axis=2).reshape(-1, 1)
            hidden, cache = model.hidden(tokens, positions=state.position[:, None], cache=state.cache)
            return _chosen(model, eqx.tree_at(lambda s: s.cache, state, cache), rule, hidden, beams, length_penalty, early_stopping)

        return jax.lax.while_loop(going, step, state)

    return eqx.tree_at(lambda s: s.cache, while_growing(state, run, width, new), None)


def _chosen(
    model: Llama, state: Beams, rule: Rule, hidden: Float[Array, "beam 1 embed"], beams: int, length_penalty: float, early_stopping: Any
) -> Beams:
    """The state with one more token."""
    t, prompts = state.t, len(state.running)
    logprobs = rule.known(jax.nn.log_softmax(model.head(hidden)[:, 0])).reshape(prompts, beams, -1) + state.running_scores[:, :, None]
    # Enough candidates for `beams` of them to go on even if the stop tokens of every beam are among them.
    keep = max(2, 1 + len(rule.stop)) * beams
    scores, index = jax.lax.top_k(logprobs.reshape(prompts, -1), keep)
    beam, token = jnp.divmod(index, logprobs.shape[-1])
    candidates = jnp.take_along_axis(state.running, beam[:, :, None], axis=1).at[:, :, t].set(token)
    ends = jnp.isin(token, rule.stop) | (t + 1 == state.limits)

    running_scores, go_on = jax.lax.top_k(scores + jnp.where(ends, NEVER, 0.0), beams)
    finishing = ends & (jnp.arange(keep) < beams) & state.improvable[:, None]
    if early_stopping is True:
        finishing &= ~jnp.all(state.finished, axis=1, keepdims=True)
    length = (t + 1).astype(jnp.float32)
    merged = jnp.concatenate([state.scores, scores / length**length_penalty + jnp.where(finishing, 0.0, NEVER)], axis=1)
    best_scores, best = jax.lax.top_k(merged, beams)
    pick = lambda old, new: jnp.take_along_axis(jnp.concatenate([old, new], axis=1), best, axis=1)  # noqa: E731
    finished = pick(state.finished, finishing)

    reach = rule.max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
    worst = jnp.where(finished, best_scores.min(axis=1, keepdims=True), NEVER)
    improvable = state.improvable & jnp.any(running_scores[:, :1] / reach**length_penalty > worst, axis=1)
    rows = jnp.take_along_axis(beam, go_on, axis=1) + beams * jnp.arange(prompts)[:, None]
    return Beams(
        cache=with_rows(state.cache, rows.reshape(-1)),
        position=state.position + 1,  # the beams of a prompt are equally long
        limits=state.limits,
        running=jnp.take_along_axis(candidates, go_on[:, :, None], axis=1),
        running_scores=running_scores,
        done=jnp.take_along_axis(jnp.concatenate([state.done, candidates], axis=1), best[:, :, None], axis=1),
        scores=best_scores,
        lengths=pick(state.lengths, jnp.full_like(token, t + 1)),
        finished=finished,
        improvable=improvable,
        t=t + 1,
    )
