"""Two models side by side: the residual after each part of each layer, and the reasons for the first difference."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int
from tqdm import tqdm

from llama_eqx.diagnosis.reference import transformers_parts
from llama_eqx.diagnosis.report import Finding, Report
from llama_eqx.diagnosis.settings import rotary_differences, said_phase_error
from llama_eqx.errors import ConfigError, columns
from llama_eqx.interop.pretrained import open_pretrained
from llama_eqx.interop.table import halves_to_pairs, pairs_to_halves
from llama_eqx.interop.weights import Weights, abstract
from llama_eqx.model.llama import LlamaConfig
from llama_eqx.sharding import parameter_names

TRANSFORMERS = "transformers"
LENGTH, FAR = 512, 20_000
# Both rows hold the same tokens. Attention sees only differences of positions, so the second row has a gap: a row that merely
# began at 20,000 would repeat the first one.
NEAR_POSITIONS = np.arange(LENGTH, dtype=np.int32)
POSITIONS = np.stack([NEAR_POSITIONS, NEAR_POSITIONS + np.where(NEAR_POSITIONS < LENGTH // 2, 0, FAR).astype(np.int32)])
ROWS = (f"0-{LENGTH - 1}", f"{FAR:,}")
HEAD = {True: "embed", False: "lm_head"}  # the parameter that makes the logits, if tied and if not

Residual = Float32[Array, "batch seq embed"]
Parts = Iterator[tuple[str, Any]]  # the name of a part and its output, [batch, seq, ...], on the host or a device


class Row(NamedTuple):
    """A part of the model: the root mean square of its output, and the largest difference in each row of positions."""

    part: str
    scale: float
    apart: tuple[float, ...]


def compare(path: str, against: str, tolerance: float) -> Report:
    """Compares the model at `path` with `against` on the same random tokens at positions 0–511 and near 20,000, in float32, layer by layer.

    `against` may be "transformers", which then reads the same folder. The report names the first part of a layer that differs by more than
    `tolerance` times the root mean square of its activations, and what differs in it. One layer of each folder is in memory at a time;
    transformers keeps its whole model there.

    Raises `CheckpointError` when a model cannot be read, `ConfigError` when transformers is asked for and not installed.
    """
    title, ours = f"{path} against {against}", open_pretrained(path)
    if against != TRANSFORMERS:
        facts, findings = compare_weights(ours, open_pretrained(against), tolerance)
        return Report(title, tuple(facts), tuple(findings))
    vocab = ours.config.dims.vocab or 0
    parts, facts, findings = transformers_parts(path, ours.config, _tokens(vocab), POSITIONS)
    said, wrong, _ = _compared(ours, iter(parts), vocab, tolerance)
    return Report(title, (*facts, *said), (*findings, *wrong))


def compare_weights(ours: Weights, theirs: Weights, tolerance: float) -> tuple[list[str], list[Finding]]:
    """Facts and findings about two models, as in `compare`."""
    if sizes := _sizes(ours.config, theirs.config):
        return [], [Finding("error", "sizes", what, "two models of the same sizes") for what in sizes]
    vocab = min(ours.config.dims.vocab or 0, theirs.config.dims.vocab or 0)
    facts, findings, first = _compared(ours, model_parts(theirs, _tokens(vocab)), vocab, tolerance)
    return facts, findings if first is None else [*findings, *_reasons(ours, theirs, first)]


def _tokens(vocab: int) -> Int[np.ndarray, "batch seq"]:
    return np.random.default_rng(0).integers(0, vocab, (1, LENGTH)).astype(np.int32).repeat(2, axis=0)


def model_parts(weights: Weights, tokens: Int[np.ndarray, "batch seq"]) -> Parts:
    """Yields the residual after the embedding and each half of each layer, and the logits, as this package computes them in float32.

    Raises `ConfigError` for a class of model other than `LlamaConfig`.
    """
    config = weights.config
    if type(config) is not LlamaConfig:
        raise ConfigError(
            f"only plain Llama models can be compared part by part, not a {type(config).__name__}",
            where="model",
            next="load it with llama_eqx.load_pretrained, and compare its logits on your own tokens",
        )
    model = abstract(config)
    rotation = config.rotary.build(config.dims)(jnp.asarray(POSITIONS))

    def read(part: Any, name: str, layer: int | None = None) -> Any:
        """A part of the model with its weights."""
        names = [f"{name}.{rest}".rstrip(".") for rest in parameter_names(part)]
        return jax.tree.structure(part).unflatten([jnp.asarray(weights.tensors[each, layer].whole(), jnp.float32) for each in names])

    x = jnp.asarray(weights.tensors["embed", None].whole()[tokens], jnp.float32)
    yield "embedding", x
    for layer in range(config.dims.layers):
        between, x = _layer(read(model.blocks, "blocks", layer), x, rotation.in_layer(jnp.asarray(layer)))
        yield f"layer {layer} attention", between
        yield f"layer {layer} feed-forward", x
    model = eqx.tree_at(lambda m: m.final_norm, model, read(model.final_norm, "final_norm"))
    outside = HEAD[config.tied]
    model = eqx.tree_at(lambda m: getattr(m, outside), model, read(getattr(model, outside), outside))
    yield "logits", _logits(model, x)


class _Silent(eqx.Module):
    """Replaces a feed-forward, to leave the residual as attention made it."""

    def __call__(self, x: Residual) -> Residual:
        return jnp.zeros_like(x)


@eqx.filter_jit
def _layer(block: Any, x: Array, rotation: Any) -> tuple[Array, Array]:
    """The residual after attention, and after the whole layer."""
    between, _ = eqx.tree_at(lambda b: b.feed_forward, block, _Silent())(x, rotation, None, None, None)
    return between, block(x, rotation, None, None, None)[0]


@eqx.filter_jit
def _logits(model: Any, x: Array) -> Array:
    return model.head(model.final_norm(x))


def _compared(ours: Weights, theirs: Parts, vocab: int, tolerance: float) -> tuple[list[str], list[Finding], str | None]:
    """Facts, findings, and the first part that differs."""
    rows, total = [], 2 * ours.config.dims.layers + 2
    pairs = zip(model_parts(ours, _tokens(vocab)), theirs, strict=True)
    for (name, x), (_, y) in tqdm(pairs, total=total, desc="comparing", unit=" parts", disable=None):
        x, y = (np.asarray(z)[..., :vocab] if name == "logits" else np.asarray(z) for z in (x, y))
        rows.append(Row(name, math.sqrt(np.mean(np.square(x))), tuple(np.abs(x - y).max(axis=(1, 2)).tolist())))
    first = next((row for row in rows if not all(apart <= tolerance * row.scale for apart in row.apart)), None)  # NaN is apart too
    if first is None:
        return [f"no part differs by more than {tolerance:g} of its activations", *_table(rows)], [], None
    where = [said for said, apart in zip(ROWS, first.apart, strict=True) if not apart <= tolerance * first.scale]
    what = f"the first part that differs: by up to {np.max(first.apart):.2g} at positions {' and '.join(where)}"
    return _table(rows), [Finding("error", first.part, what)], first.part


def _table(rows: list[Row]) -> list[str]:
    head = ["part", "activations", *(f"apart at {row}" for row in ROWS)]
    cells = [[row.part, f"{row.scale:.3g}", *(f"{apart:.2g}" for apart in row.apart)] for row in rows]
    return columns([head, *cells])


def _sizes(a: LlamaConfig, b: LlamaConfig) -> list[str]:
    """The differences in size that rule out a comparison. The vocabulary may differ: ids that both have are used."""
    pairs = [(field.name, getattr(a.dims, field.name), getattr(b.dims, field.name)) for field in dataclasses.fields(a.dims)]
    return [f"{name} is {here:,} and {there:,}" for name, here, there in pairs if here != there and name in ("layers", "embed")]


def _reasons(ours: Weights, theirs: Weights, part: str) -> list[Finding]:
    """What differs in a part of the model: settings, weights, or the order of their rows."""
    a, b = ours.config, theirs.config
    findings = []
    if a.norm != b.norm and part != "embedding":
        findings.append(Finding("error", "norm", f"{a.norm} and {b.norm}: every position is affected", "the same norm and eps"))
    rotary = rotary_differences(a.rotary, b.rotary) if part.endswith("attention") else []
    for name, here, there in rotary:
        findings.append(Finding("error", f"rotary {name}", f"{here} and {there}: {said_phase_error(a, b)}", "the same rotary settings"))
    if part.endswith("attention") and not rotary and a.rotary != b.rotary:
        findings.append(Finding("error", "rotary", "rounding differs (round_at)", "the same rotary settings"))
    if part.endswith("feed-forward") and a.feed_forward != b.feed_forward:
        findings.append(Finding("error", "feed_forward", f"{a.feed_forward} and {b.feed_forward}", "the same feed-forward"))
    words = part.split()
    layer = int(words[1]) if words[0] == "layer" else None
    inside = {"attention": ("blocks.att",), "feed-forward": ("blocks.f",), "embedding": ("embed",), "logits": ("final_norm", HEAD[a.tied])}
    for (name, at), tensor in ours.tensors.items():
        if at == layer and name.startswith(inside[words[-1]]) and (name, at) in theirs.tensors:
            what = _apart(tensor.whole(), theirs.tensors[name, at].whole())
            if what:
                findings.append(Finding("error", name if layer is None else f"{name}, layer {layer}", what))
    if part == "logits" and a.tied != b.tied:
        findings.append(Finding("error", "tie", "the head is tied to the embedding in only one of the models"))
    return findings


def _apart(a: np.ndarray, b: np.ndarray) -> str | None:
    """How two arrays of weights differ, in words."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    if a.shape != b.shape:
        return f"the weights are {a.shape} and {b.shape}"
    if np.array_equal(a, b):
        return None
    near = 1e-2 * float(np.abs(b).max())  # below it, a rounding to bfloat16, not an exchange of rows
    if a.ndim == 3:
        beside, apart = "side by side", "half a head apart"
        for move, here, there in ((pairs_to_halves, beside, apart), (halves_to_pairs, apart, beside)):
            if np.abs(move(a) - b).max() < near <= np.abs(a - b).max():
                return (
                    f"the same rows in another order: as if rotary pairs were {here} in the first model and {there} in the second. "
                    "One of them was converted without permuting, or twice"
                )
    if a.ndim > 1 and np.abs(a - b).max() >= near:
        rows = (np.sort(np.linalg.norm(x.reshape(len(x), -1), axis=0)) for x in (a, b))
        if np.allclose(*rows, rtol=1e-3):
            return "the same columns in another order: a permutation with the wrong number of heads?"
    return f"the weights are up to {np.abs(a - b).max():.2g} apart, and as large as {np.abs(b).max():.2g}"
