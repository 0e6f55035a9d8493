"""A look inside a model: activations and what can be computed from them, in one compiled forward pass."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from llama_eqx.config import nearest
from llama_eqx.errors import ConfigError
from llama_eqx.model.kernel.plain import visible
from llama_eqx.model.llama import Llama, require_tokens
from llama_eqx.remat import NAMES
from llama_eqx.tag import Probe, Seen, probing

# The tags of a block that each trace is computed from. Weights are those of what `attend` was given: an attention may not call it.
TRACES = {
    "residual": ("residual",),
    "logit_lens": ("residual",),
    "attention_weights": ("attending", "attended", "reach"),
    "attention_entropy": ("attending", "attended", "reach"),
    **{name: (name,) for name in ("q", "k", "v", "attention_out", "gate", "up", "down")},
}


class Lens(NamedTuple):
    """The most probable next token if the model ended at a layer, and the logarithm of its probability."""

    tokens: Int[Array, "*depth batch seq"]
    logprobs: Float32[Array, "*depth batch seq"]


@eqx.filter_jit
def trace(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    names: Sequence[str],
    *,
    positions: Int[Array, "batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> dict[str, Any]:
    """Traces of `model` on these tokens, by name, each stacked over layers:

    residual: the embedding, then the output of each layer, [layers + 1, batch, seq, embed].
    logit_lens: `Lens` of each of these, by the last norm and the head (nostalgebraist, 2020, "interpreting GPT: the logit lens").
    attention_weights: the weight of each token on every token, [layers, batch, heads, seq, seq], in float32.
    attention_entropy: the entropy of these weights in nats, [layers, batch, heads, seq]; the weights are computed layer by layer.
    q k v attention_out gate up down, and the rest of `remat.NAMES` but input: unchanged, q and k after their rotation, [layers, batch,
    seq, …].

    Arrays are split over devices as the model and the tokens are. A model under policies is seen as `policy_view` shows it, but not under
    rematerialisation, whose activations do not leave a block.

    Raises `ConfigError` for a name that the model has nothing of, for a model that is laid out for decoding, and as `Llama.hidden` does.
    """
    if isinstance(model.blocks, tuple):
        raise ConfigError("this model is laid out for decoding and cannot be traced", where="model", next="trace its original")
    require_tokens(tokens)
    names = (names,) if isinstance(names, str) else names
    sources = {name: TRACES.get(name, (name,)) for name in names}
    for name in names:
        if name not in (known := {*TRACES, *NAMES} - {"input"}):  # which only rematerialisation tags
            raise ConfigError(f"nothing to trace is called {name}", where="names", next=nearest(name, known))

    def weights(q: Array, k: Array, reach: Array) -> Array:
        ids = None if segment_ids is None else (segment_ids, segment_ids)
        return attention_weights(q, k, visible(0, q.shape[1], q.shape[1], ids, reach))

    def lens(x: Float[Array, "batch seq embed"]) -> Lens:
        logits = model.head(model.final_norm(x))
        return Lens(logits.argmax(-1).astype(jnp.int32), logits.max(-1) - jax.nn.logsumexp(logits, axis=-1))

    compute: dict[str, Callable[..., Any]] = {
        "residual": lambda x: x,
        "logit_lens": lens,
        "attention_weights": weights,
        "attention_entropy": lambda q, k, reach: jax.scipy.special.entr(weights(q, k, reach)).sum(-1),
    }

    def of_layer(seen: Seen) -> dict[str, Any]:
        if missing := [name for name in names if not all(seen[source] for source in sources[name])]:
            own = ": its attention does not call `attend`" if any("attended" in sources[name] for name in missing) else ""
            what = f"this model has no activation called {', '.join(missing)}{own}"
            raise ConfigError(what, where="names", next="a variant may tag others")
        return {name: compute.get(name, lambda x: x)(*(seen[source][-1] for source in sources[name])) for name in names}

    probe = Probe({source for name in names for source in sources[name]}, of_layer)
    with probing(probe):
        model.hidden(tokens, positions=positions, segment_ids=segment_ids)
    for name in {"residual", "logit_lens"} & set(names):
        embedding = compute[name](probe.outside["residual"][0])
        probe.layers[name] = jax.tree.map(lambda x, layers: jnp.concatenate([x[None], layers]), embedding, probe.layers[name])
    return probe.layers


def attention_weights(
    q: Float[Array, "batch seq heads head_dim"], k: Float[Array, "batch seq kv_heads head_dim"], visible: Array
) -> Float32[Array, "batch heads seq seq"]:
    """softmax(q k^T / sqrt(head_dim)) as the kernels compute it, without their optimisations. `visible` as in `kernel.plain`."""
    batch, seq, heads, head_dim = q.shape
    grouped = q.reshape(batch, seq, k.shape[2], -1, head_dim)
    scores = jnp.einsum("bskgh,btkh->bkgst", grouped, k, preferred_element_type=jnp.float32).reshape(batch, heads, seq, seq)
    visible = visible if visible.ndim == 2 else visible[:, None]
    return jax.nn.softmax(jnp.where(visible, scores * head_dim**-0.5, -jnp.inf), axis=-1)
