"""Two models side by side: the residual after each part of each layer, and why it differs where it first does."""

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

from llama_eqx.diagnosis.report import Finding, Report
from llama_eqx.diagnosis.settings import frequencies, said_phase_error, said_rotary
from llama_eqx.errors import CheckpointError, ConfigError
from llama_eqx.interop.pretrained import open_pretrained
from llama_eqx.interop.table import halves_to_pairs, pairs_to_halves
from llama_eqx.interop.weights import Weights, abstract
from llama_eqx.model.llama import LlamaConfig
from llama_eqx.sharding import parameter_names

TRANSFORMERS = "transformers"
LENGTH, FAR = 512, 20_000
# Both rows hold the same tokens. Attention sees differences of positions alone, so the second row has a gap: a row that merely
# began at 20,000 would be the first one again.
NEAR_POSITIONS = np.arange(LENGTH, dtype=np.int32)
POSITIONS = np.stack([NEAR_POSITIONS, NEAR_POSITIONS + np.where(NEAR_POSITIONS < LENGTH // 2, 0, FAR).astype(np.int32)])
ROWS = (f"0-{LENGTH - 1}", f"{FAR:,}")
FREQUENCIES = 1e-6  # relative: PyTorch's and XLA's float32 powers differ by units in the last place

Residual = Float32[Array, "batch seq embed"]
Parts = Iterator[tuple[str, Any]]  # the name of a part and what comes out of it, [batch, seq, ...], on the host or a device


class Row(NamedTuple):
    """A part of the model: the root mean square of what comes out of it, and the largest difference in each row of positions."""

    part: str
    scale: float
    apart: tuple[float, ...]


def compare(path: str, against: str, tolerance: float) -> Report:
    """The models at `path` and `against` on the same random tokens at positions 0–511 and around 20,000, in float32, layer by layer.

    `against` may be "transformers", which then reads the same folder. The first part of a layer that differs by more than `tolerance`
    of the root mean square of its activations is named, and what differs in it. One layer of each folder is in memory at a time;
    transformers keeps its whole model there.

    Raises `CheckpointError` when a model cannot be read, `ConfigError` where transformers is asked for and not installed.
    """
    title = f"{path} against {against}"
    ours, theirs = open_pretrained(path), None if against == TRANSFORMERS else open_pretrained(against)
    vocab = ours.config.dims.vocab or 0
    if theirs is not None:
        if wrong := _sizes(ours.config, theirs.config):
            return Report(title, (), tuple(Finding("error", "sizes", what, "two models of the same sizes") for what in wrong))
        vocab = min(vocab, theirs.config.dims.vocab or 0)
    tokens = np.random.default_rng(0).integers(0, vocab, (1, LENGTH)).astype(np.int32).repeat(2, axis=0)
    facts, findings = [], []
    parts = _transformers_parts(path, ours.config, tokens, facts, findings) if theirs is None else model_parts(theirs, tokens)
    rows = list(_rows(model_parts(ours, tokens), parts, vocab, 2 * ours.config.dims.layers + 2))
    first = next((row for row in rows if not all(apart <= tolerance * row.scale for apart in row.apart)), None)  # NaN is apart too
    if first is None:
        facts.append(f"no part is more than {tolerance:g} of its activations apart")
    else:
        where = [said for said, apart in zip(ROWS, first.apart, strict=True) if not apart <= tolerance * first.scale]
        what = f"the first part that differs: by up to {np.max(first.apart):.2g} at positions {' and '.join(where)}"
        findings.append(Finding("error", first.part, what))
        if theirs is not None:
            findings += _reasons(ours, theirs, first.part)
    return Report(title, (*facts, *_table(rows)), tuple(findings))


def model_parts(weights: Weights, tokens: Int[np.ndarray, "batch seq"]) -> Parts:
    """The residual after the embedding and after each half of each layer, and the logits, as this package computes them in float32."""
    config = weights.config
    model = abstract(config)
    rotation = config.rotary.build(config.dims)(jnp.asarray(POSITIONS))

    def read(part: Any, name: str, layer: int | None = None) -> Any:
        """A part of the model with its weights."""
        names = [f"{name}.{rest}".rstrip(".") for rest in parameter_names(part)]
        return jax.tree.structure(part).unflatten([jnp.asarray(weights.tensors[each, layer].whole(), jnp.float32) for each in names])

    x = jnp.asarray(weights.tensors["embed", None].whole()[tokens], jnp.float32)
    yield "embedding", x
    for layer in range(config.dims.layers):
        between, x = _layer(read(model.blocks, "blocks", layer), x, rotation)
        yield f"layer {layer} attention", between
        yield f"layer {layer} feed-forward", x
    model = eqx.tree_at(lambda m: m.final_norm, model, read(model.final_norm, "final_norm"))
    outside = "embed" if config.tied else "lm_head"
    model = eqx.tree_at(lambda m: getattr(m, outside), model, read(getattr(model, outside), outside))
    yield "logits", _logits(model, x)


class _Silent(eqx.Module):
    """In the place of a feed-forward it leaves the residual as attention made it."""

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


def _rows(ours: Parts, theirs: Parts, vocab: int, total: int) -> Iterator[Row]:
    pairs = tqdm(zip(ours, theirs, strict=True), total=total, desc="comparing", unit=" parts", disable=None)
    for (name, x), (_, y) in pairs:
        x, y = (np.asarray(z)[..., :vocab] if name == "logits" else np.asarray(z) for z in (x, y))
        apart = np.abs(x - y).max(axis=(1, 2))
        yield Row(name, math.sqrt(np.mean(np.square(x))), tuple(apart.tolist()))


def _table(rows: list[Row]) -> list[str]:
    head = ["part", "activations", *(f"apart at {row}" for row in ROWS)]
    cells = [[row.part, f"{row.scale:.3g}", *(f"{apart:.2g}" for apart in row.apart)] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in (head, *cells)]


def _sizes(a: LlamaConfig, b: LlamaConfig) -> list[str]:
    """Sizes without which nothing can be compared. The vocabulary may differ: ids that both have are used."""
    pairs = [(field.name, getattr(a.dims, field.name), getattr(b.dims, field.name)) for field in dataclasses.fields(a.dims)]
    return [f"{name} is {here:,} and {there:,}" for name, here, there in pairs if here != there and name in ("layers", "embed")]


def _reasons(ours: Weights, theirs: Weights, part: str) -> list[Finding]:
    """What differs in a part of the model: settings, weights, or the order of their rows."""
    a, b = ours.config, theirs.config
    findings = []
    if a.norm != b.norm and part != "embedding":
        findings.append(Finding("error", "norm", f"{a.norm} and {b.norm}: it shows at every position", "the same norm and eps"))
    if part.endswith("attention") and said_rotary(a.rotary) != said_rotary(b.rotary):
        what = f"{said_rotary(a.rotary)} and {said_rotary(b.rotary)}: {said_phase_error(a, b)}"
        findings.append(Finding("error", "rotary", what, "the same rotary settings"))
    elif part.endswith("attention") and a.rotary != b.rotary:
        findings.append(Finding("error", "rotary", "rounding differs (round_at)", "the same rotary settings"))
    if part.endswith("feed-forward") and a.feed_forward != b.feed_forward:
        findings.append(Finding("error", "feed_forward", f"{a.feed_forward} and {b.feed_forward}", "the same feed-forward"))
    words = part.split()
    layer = int(words[1]) if words[0] == "layer" else None
    inside = {"attention": ("blocks.att",), "feed-forward": ("blocks.f",), "logits": ("final_norm", "lm_head", "embed"), "embedding": ("embed",)}
    for (name, at), tensor in ours.tensors.items():
        if at == layer and name.startswith(inside[words[-1]]) and (name, at) in theirs.tensors:
            what = _apart(tensor.whole(), theirs.tensors[name, at].whole())
            if what:
                findings.append(Finding("error", name if layer is None else f"{name}, layer {layer}", what))
    if part == "logits" and a.tied != b.tied:
        findings.append(Finding("error", "tie", "the head is the embedding in one of them alone"))
    return findings


def _apart(a: np.ndarray, b: np.ndarray) -> str | None:
    """How two arrays of weights differ, in words."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    if a.shape != b.shape:
        return f"the weights are {a.shape} and {b.shape}"
    if np.array_equal(a, b):
        return None
    near = 1e-2 * float(np.abs(b).max())  # a rounding to bfloat16, not an exchange of rows
    if a.ndim == 3:
        for move, here, there in ((pairs_to_halves, "side by side", "half a head apart"), (halves_to_pairs, "half a head apart", "side by side")):
            if np.abs(move(a) - b).max() < near <= np.abs(a - b).max():
                return (
                    f"the same rows in another order: as if rotary pairs were {here} in the first model and {there} in the second. "
                    "One of them was converted without permuting, or twice"
                )
    if a.ndim > 1 and np.abs(a - b).max() >= near:
        rows = (np.sort(np.linalg.norm(x.reshape(len(x), -1), axis=0)) for x in (a, b))
        if np.allclose(*rows, rtol=1e-3):
            return "the same columns in another order: a permutation with the wrong number of heads?"
    return f"the weights are up to {np.abs(a - b).max():.2g} apart, of up to {np.abs(b).max():.2g}"


def _transformers_parts(
    path: str, config: LlamaConfig, tokens: Int[np.ndarray, "batch seq"], facts: list[str], findings: list[Finding]
) -> Parts:
    """What `model_parts` gives, as `transformers` computes it from the same folder. What its reader misses is added to `findings`."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed", where="against=transformers", next="pip install torch transformers") from None
    transformers.utils.logging.disable_progress_bar()
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        what = f"transformers cannot read it: {str(error).splitlines()[0]}"
        raise CheckpointError(what, where=path, next="it reads Hugging Face folders: python -m llama_eqx.doctor path=…") from error
    findings += [Finding("error", path, f"transformers reports {name}: {what}") for name, what in loaded.items() if what]

    # Frequencies are compared by themselves. A unit in their last place is a milliradian at 20,000, so for the rest both have the same.
    held, own = model.model.rotary_emb.inv_freq, frequencies(config)
    off = float(np.abs(held.double().numpy() / own - 1).max())
    if off < FREQUENCIES:
        held.copy_(torch.tensor(own))
        facts.append(f"rotary frequencies are {off:.1g} apart, relative; transformers computed with these ones")
    else:
        drift = float(np.abs(held.double().numpy() - own).max())
        what = f"rotary frequencies differ: the error of phase passes 0.1 rad at position {math.ceil(0.1 / drift):,}"
        findings.append(Finding("error", "rotary", what, "a report of this with the config.json"))

    parts: list[tuple[str, Any]] = []

    def keep(name: str) -> Any:
        return lambda module, inputs, output: parts.append((name, (output[0] if isinstance(output, tuple) else output).numpy()))

    def keep_input(name: str) -> Any:
        return lambda module, inputs: parts.append((name, inputs[0].numpy()))

    model.model.embed_tokens.register_forward_hook(keep("embedding"))
    for i, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.register_forward_pre_hook(keep_input(f"layer {i} attention"))
        layer.register_forward_hook(keep(f"layer {i} feed-forward"))
    model.lm_head.register_forward_hook(keep("logits"))
    with torch.no_grad():
        ids = torch.tensor(tokens).long()
        # A mask keeps it from taking the gap in the positions for the edge of two packed texts.
        model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.tensor(POSITIONS).long())
    yield from parts
