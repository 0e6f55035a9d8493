"""Pictures of what can be seen inside a model, as matplotlib figures: for a notebook, `savefig`, or `wandb.Image`."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Num
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from llama_eqx.tracking.plot import GREY

GROWTH, SHARE = "viridis", "Blues"


def plot_traces(seen: Mapping[str, Any], tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> dict[str, Figure]:
    """Returns, by name, a picture of each thing that `trace` saw in its first row, whose ids are `tokens`; of attention in the last layer.

    Special tokens, which `decode` leaves out, are shown by their ids.
    """

    def written(ids: Any) -> list[str]:
        return [decode([int(i)]) or f"⟨{i}⟩" for i in ids]

    words = written(tokens)
    draw: dict[str, Callable[[Any], Figure]] = {
        "residual": lambda x: plot_residual(x[:, 0], words),
        "logit_lens": lambda lens: plot_logit_lens(
            lens.tokens[:, 0], lens.logprobs[:, 0], [written(line) for line in lens.tokens[:, 0]], words
        ),
        "attention_weights": lambda x: plot_attention(x[-1, 0], words, f"attention in layer {len(x) - 1}, the last"),
        "attention_entropy": plot_attention_entropy,
    }
    return {name: draw[name](x) for name, x in seen.items() if name in draw}


def plot_residual(residual: Num[np.ndarray, "depth seq embed"], tokens: Sequence[str] = ()) -> Figure:
    """The root mean square of the residual stream after each layer, at each position of one row, on a logarithmic scale."""
    sizes = np.sqrt(np.mean(np.square(np.asarray(residual, np.float32)), axis=-1))
    figure, axes = _axes(sizes.shape, tokens)
    image = axes.imshow(np.log10(sizes), aspect="auto", cmap=GROWTH, origin="lower")
    bar = figure.colorbar(image, ax=axes, pad=0.01, format=lambda x, _: f"{10**x:.2g}")
    bar.set_label("root mean square")
    _label(axes, "residual: how large what leaves each layer is", len(sizes), tokens)
    return figure


def plot_logit_lens(
    tokens: Int[np.ndarray, "depth seq"],
    logprobs: Num[np.ndarray, "depth seq"],
    words: Sequence[Sequence[str]],
    text: Sequence[str] = (),
) -> Figure:
    """What would come next if the model ended at each layer, for one row. `words` are the texts of `tokens`; darker is more probable.

    `text` are the tokens that were read, down the page, because rows are many and words are wide.
    """
    probabilities = np.exp(np.asarray(logprobs, np.float32))
    depth, seq = probabilities.shape
    shown = [[_shown(word, 7) for word in line] for line in words]
    wide = max(0.45, 0.2 + 0.06 * max(len(word) for line in shown for word in line))
    figure = Figure(figsize=(min(22, max(7.0, wide * depth + 2)), min(22, max(2.6, 0.2 * seq + 1))), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(probabilities.T, aspect="auto", cmap=SHARE, vmin=0, vmax=1)
    for layer, line in enumerate(shown):
        for position, word in enumerate(line):
            agrees = tokens[layer, position] == tokens[-1, position]
            color = "white" if probabilities[layer, position] > 0.6 else "black"
            weight = "bold" if agrees else None
            axes.text(layer, position, word, ha="center", va="center", fontsize=8, color=color, weight=weight)
    figure.colorbar(image, ax=axes, pad=0.01).set_label("probability")
    axes.set_xticks(range(depth), ["embedding", *map(str, range(depth - 1))], fontsize=7)
    axes.set_xlabel("layer")
    if text:
        axes.set_yticks(range(seq), [_shown(token) for token in text], fontsize=8)
    axes.set_ylabel("token that was read" if text else "position")
    title = "logit lens: the most probable next token if the model ended here,\nbold where it is the last layer's"
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(length=2, colors=GREY)
    return figure


def plot_attention(weights: Num[np.ndarray, "heads seq seq"], tokens: Sequence[str] = (), title: str = "") -> Figure:
    """How much each token of one row (down) reads from each (across), head by head in one layer. Colours are by the square root."""
    heads, seq, _ = weights.shape
    columns = min(math.ceil(math.sqrt(heads)), 4)
    rows = -(-heads // columns)
    side = max(2.4, 0.1 * seq + 0.9) if tokens else 2.4  # room for one line of text per token
    figure = Figure(figsize=(side * columns + 0.6, side * rows + 0.6), dpi=130, layout="constrained")
    panels = [figure.add_subplot(rows, columns, head + 1) for head in range(heads)]
    for head, axes in enumerate(panels):
        axes.imshow(np.asarray(weights[head], np.float32), cmap=SHARE, norm=PowerNorm(0.5, 0, 1))
        axes.set_title(f"head {head}", fontsize=9)
        axes.tick_params(labelsize=6, length=2, colors=GREY)
        if tokens:
            _write(axes, tokens, 6, rotation=90)
            axes.set_yticks(range(seq), [_shown(token) for token in tokens], fontsize=6)
    bar = figure.colorbar(panels[0].images[0], ax=panels, pad=0.01, aspect=15 * rows)
    bar.set_label("share of what is read")
    figure.suptitle(title or "attention", fontsize=11)
    figure.supylabel("token that reads", fontsize=9)
    figure.supxlabel("token that is read", fontsize=9)
    return figure


def plot_attention_entropy(entropy: Num[np.ndarray, "layers batch heads seq"]) -> Figure:
    """How widely each head reads, as a fraction of the maximum: 1 where all tokens so far are read alike, 0 where only one is.

    It is the mean over rows and positions. The first position, which has no choice, is left out.
    """
    most = np.log(np.arange(2, entropy.shape[-1] + 1))
    spread = np.mean(np.asarray(entropy, np.float32)[..., 1:] / most, axis=(1, 3))
    layers, heads = spread.shape
    numbered = spread.size <= 400
    wide, high = (0.55, 0.4) if numbered else (0.25, 0.2)
    figure = Figure(figsize=(max(5.0, wide * heads + 2), max(2.4, high * layers + 1.2)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(spread, aspect="auto", cmap=GROWTH, vmin=0, vmax=1, origin="lower")
    if numbered:
        for layer, head in np.ndindex(spread.shape):
            color = "white" if spread[layer, head] < 0.6 else "black"
            axes.text(head, layer, f"{spread[layer, head]:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(0, heads, max(1, heads // 16)))
    axes.set_yticks(range(0, layers, max(1, layers // 16)))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title("attention entropy, as a share of the most there could be", loc="left", fontsize=10)
    bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0: reads one token", "0.5", "1: reads all alike"], fontsize=7)
    return figure


def _axes(shape: tuple[int, ...], tokens: Sequence[str]) -> tuple[Figure, Axes]:
    depth, seq = shape
    cell = 0.32 if tokens or seq <= 40 else 0.06
    figure = Figure(figsize=(min(22, max(5.0, cell * seq + 2)), max(2.6, 0.3 * depth + 1.4)), dpi=130, layout="constrained")
    return figure, figure.add_subplot()


def _label(axes: Axes, title: str, depth: int, tokens: Sequence[str]) -> None:
    names = ["embedding", *map(str, range(depth - 1))]
    every = max(1, depth // 17)
    axes.set_yticks(range(0, depth, every), names[::every], fontsize=7)
    axes.set_ylabel("layer")
    if tokens:
        _write(axes, tokens, 8, rotation=60)
        axes.set_xlabel("token that was read")
    else:
        axes.set_xlabel("position")
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(length=2, colors=GREY)


def _write(axes: Axes, tokens: Sequence[str], size: int, rotation: int) -> None:
    """Writes the tokens below their columns, short ones upright."""
    axes.set_xticks(range(len(tokens)), [_shown(token) for token in tokens], fontsize=size)
    for label in axes.get_xticklabels():
        if len(label.get_text()) > 2:
            label.set(rotation=rotation, ha="right", va="center" if rotation == 90 else "top", rotation_mode="anchor")


def _shown(token: str, longest: int = 12) -> str:
    """A token with visible spaces and line ends, and boxes for characters that the font lacks."""
    token = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    token = "".join(character if ord(character) in _characters() else "□" for character in token)
    return token.replace("$", r"\$") if len(token) <= longest else token[: longest - 1].replace("$", r"\$") + "…"


@functools.cache
def _characters() -> frozenset[int]:
    """The code points that matplotlib's font has."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
