"""The pictures of a report. Each function returns a figure made with `figure`; `save` files it."""

import io
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llama_eqx.studies.runs import Run
from llama_eqx.studies.verdict import Finding, equivalence_in_words
from llama_eqx.tracking.plot import smoothed

COLORS = ("#3b76af", "#c8512f", "#4f8f4a", "#8a5fa8", "#b8892b", "#3d9aa1", "#a3476f", "#6b6b6b")
VERDICTS = {"worse": "#c8512f", "better": "#3b76af", "no effect": "#4f8f4a", "undecided": "#8a8a8a"}
GRID = "#e3e3e3"


def figure(height: float = 4.5) -> tuple[Figure, Axes]:
    made = Figure(figsize=(8, height), dpi=150, layout="constrained")
    axes = made.add_subplot()
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def save(made: Figure, path: pathlib.Path) -> str:
    """Writes a PNG at `path`, and returns the same picture as SVG. The same figure gives the same bytes."""
    made.savefig(path, format="png")
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "llama_eqx"}):  # else ids are drawn
        made.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def forest(found: Sequence[Finding], margin: float, alpha: float) -> Figure:
    """The paired differences of each finding, their mean and 95% interval, against 0 and the margin within which there is no effect."""
    made, axes = figure(1.5 + 0.45 * len(found))
    axes.axvspan(-margin, margin, color="#4f8f4a", alpha=0.1, linewidth=0, label=f"margin ±{margin:g}")
    axes.axvline(0, color="#5c5c5c", linewidth=1)
    for row, finding in enumerate(found):
        color = VERDICTS[finding.verdict]
        axes.plot(finding.differences, [row + 0.2] * len(finding.differences), "o", color=color, alpha=0.35, markersize=3.5, mew=0)
        text = f"{finding.verdict}, by signs alone"
        if finding.interval is not None:
            mean, low, high = finding.interval
            axes.plot([low, high], [row, row], color=color, linewidth=2.2, solid_capstyle="butt")
            axes.plot([mean], [row], "D", color=color, markersize=6)
            text = f"{finding.verdict}  {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
        axes.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=color)
    names = [finding.name if finding.role == "contrast" else f"{finding.name}\n({finding.role})" for finding in found]
    axes.set_yticks(range(len(found)), names, fontsize=9)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("difference in loss (nats per token), paired by seed; below 0 is better")
    title = f"paired differences, mean and 95% interval; shaded: within ±{margin:g}"
    axes.set_title(f"{title}\n{equivalence_in_words(found, alpha)}", loc="left", fontsize=10)
    return made


def sensitivity(losses: Mapping[str, Mapping[float, Sequence[float]]]) -> Figure:
    """The loss of each arm over the peak learning rate: a line through the means, a dot for each tuning seed."""
    made, axes = figure()
    for (arm, of), line in zip(losses.items(), _lines(len(losses)), strict=True):
        rates = sorted(of)
        axes.plot(rates, [statistics.fmean(of[rate]) for rate in rates], linewidth=1.8, label=arm, **line)
        for rate in rates:
            axes.plot([rate] * len(of[rate]), of[rate], "o", color=line["color"], markersize=4, alpha=0.6, mew=0)
    rates = sorted({rate for of in losses.values() for rate in of})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("loss on the tuning text (nats per token)")
    axes.legend(frameon=False, fontsize=9)
    return made


def doses(name: str, points: Sequence[tuple[float, Finding]], margin: float, against: Sequence[str]) -> Figure:
    """Contrasts with the arms `against` over a quantity, on an axis of log(1 + x). Only those with a 95% interval are drawn."""
    made, axes = figure()
    known = sorted((dose, finding.interval, VERDICTS[finding.verdict]) for dose, finding in points if finding.interval)
    places = [math.log2(1 + dose) for dose, _, _ in known]
    axes.axhspan(-margin, margin, color="#4f8f4a", alpha=0.1, linewidth=0)
    axes.axhline(0, color="#5c5c5c", linewidth=1)
    axes.plot(places, [mean for _, (mean, _, _), _ in known], color=COLORS[0], linewidth=1.2, alpha=0.5)
    for place, (_, (mean, low, high), color) in zip(places, known, strict=True):
        axes.plot([place, place], [low, high], color=color, linewidth=2.2, solid_capstyle="butt")
        axes.plot([place], [mean], "D", color=color, markersize=6)
    axes.set_xticks(places, [f"{dose:,.0f}" for dose, _, _ in known])
    axes.set_xlabel(name)
    axes.set_ylabel(f"loss above that of {' or '.join(against)}\n(nats per token)")
    axes.set_title(f"differences paired by seed, with 95% intervals; shaded: within ±{margin:g}", loc="left", fontsize=10)
    return made


def buckets(losses: Mapping[str, Mapping[int, float]]) -> Figure:
    """Mean loss of each arm by the position in the row."""
    made, axes = figure()
    for (arm, of), line in zip(losses.items(), _lines(len(losses)), strict=True):
        axes.plot(sorted(of), [of[place] for place in sorted(of)], marker="o", linewidth=1.5, markersize=4, label=arm, **line)
    axes.set_xlabel("position in the row (tokens, the first of each bucket)")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return made


def curves(runs: Mapping[str, Run], metric: str, label: str, *, log: bool = False) -> Figure | None:
    """A metric over the steps of several runs, raw and smoothed; None when no run has it.

    The axis is in tokens when the runs' steps differ in size. Speeds leave out the first record, which is compilation.
    """
    trains = [run.settings.get("train", {}) for run in runs.values()]
    sizes = [train.get("batch_size", 1) * train.get("seq_len", 1) for train in trains]
    unit = sizes if len(set(sizes)) > 1 else [1] * len(sizes)
    skipped = int(metric.startswith("perf/"))
    if not any(run.series(metric)[0][skipped:] for run in runs.values()):
        return None
    made, axes = figure()
    for (name, run), line, size in zip(runs.items(), _lines(len(runs)), unit, strict=True):
        steps, values = (series[skipped:] for series in run.series(metric))
        points = [(size * step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        radius = len(values) // 60
        if radius:
            axes.plot(steps, values, alpha=0.3, linewidth=0.7, **line)
        axes.plot(steps, smoothed(values, radius), linewidth=1.6, label=name, marker="o" if len(values) < 8 else None, **line)
    if log:
        axes.set_yscale("log")
    axes.locator_params("x", integer=True)
    for axis in (axes.xaxis, *(() if log else (axes.yaxis,))):
        axis.set_major_formatter("{x:,.5g}")
    axes.set_xlabel("step" if unit != sizes else "tokens")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=9)
    return made


def _lines(count: int) -> list[dict[str, Any]]:
    """A color for each line. When the colors repeat, lines are dashed, and then dotted."""
    return [{"color": COLORS[i % len(COLORS)], "linestyle": ("-", "--", ":")[i // len(COLORS) % 3]} for i in range(count)]
