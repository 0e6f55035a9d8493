"""The loss curve of one run."""

import itertools
import math
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from llama_eqx.errors import DataError

TRAIN, VALIDATION, GREY = "#3b76af", "#c8512f", "#5c5c5c"


def plot_loss(metrics: Sequence[dict[str, int | float]], path: str | os.PathLike[str]) -> None:
    """Draws the training loss (raw and smoothed) and the validation loss of `read_metrics` over steps into a PNG of 1600 x 1000 pixels.

    A second axis above counts tokens if the records have `tokens`. Raises `DataError` when there is no finite loss to draw.
    """
    train, validation = _points(metrics, "train/loss"), _points(metrics, "val/loss")
    if not train and not validation:
        raise DataError("no record has a finite loss", where="metrics.jsonl")
    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        radius = len(losses) // 60
        if radius:
            axes.plot(steps, losses, color=TRAIN, alpha=0.35, linewidth=0.8)
        label = f"training (mean of {2 * radius + 1} records)" if radius else "training"
        axes.plot(steps, smoothed(losses, radius), color=TRAIN, linewidth=1.8, label=label)
    if validation:
        steps, losses = zip(*validation, strict=True)
        axes.plot(steps, losses, color=VALIDATION, linewidth=1.4, marker="o", markersize=4.5, label="validation", zorder=3)
        axes.set_title(f"validation loss {losses[-1]:.4f} after {steps[-1]:,} steps", loc="left", fontsize=12, pad=12)

    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.locator_params("x", integer=True)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.margins(x=0.02)
    axes.grid(color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    counted = [(record["step"], record["tokens"]) for record in metrics if record.get("tokens") and record["step"]]
    if counted:
        per_step = counted[-1][1] / counted[-1][0]
        above = axes.secondary_xaxis(
            "top", functions=(lambda step: np.multiply(step, per_step), lambda tokens: np.divide(tokens, per_step))
        )
        above.xaxis.set_major_formatter(EngFormatter(sep=""))
        above.set_xlabel("tokens", color=GREY, fontsize=9)
        above.tick_params(colors=GREY, labelsize=8, length=3)
        above.spines["top"].set_visible(False)
    figure.savefig(path, format="png")


def _points(metrics: Sequence[dict[str, int | float]], name: str) -> list[tuple[int | float, int | float]]:
    return [(record["step"], record[name]) for record in metrics if math.isfinite(record.get(name, math.nan))]


def smoothed(values: Sequence[int | float], radius: int) -> list[float]:
    """The mean of each value and up to `radius` neighbours on either side.

    It is centred while the curve is steep, so that it does not lag. At the flat end only the later neighbours are missing.
    """
    sums, smooth = [0.0, *itertools.accumulate(values)], []
    for i in range(len(values)):
        before = min(radius, i)
        after = min(before, len(values) - 1 - i)
        smooth.append((sums[i + after + 1] - sums[i - before]) / (before + after + 1))
    return smooth
