"""Tables and plots of `results.jsonl`: `python -m benchmarks.plan.tables` writes README.md, chips.png and context.png beside it."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.plan.run import FOLDER, GROUPS, done

GIB = 2**30
MEASURED = {"22B on v4-128": (0.567, "v4"), "16B on v5e-256": (0.611, "v5e"), "32B on v5p-128": (0.7147, "v5p")}
PREFACE = """# Plans

Made by `python -m benchmarks.plan.run` and `python -m benchmarks.plan.tables` from `results.jsonl`, which has each figure and the overrides
of each row. Nothing here ran on a TPU: memory is the compiler's own number, times and MFU are **estimates** ([how](../../docs/plan.md)).
But for the first table, v4 and v5p slices of 4 x 4 x 4 chips and more have `mesh.data=2`.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def memory(row: dict) -> str:
    needs, may = row["peak_bytes_per_device"], row["memory_bytes_per_device"]
    return f"{needs / GIB:.2f} of {may / GIB:.2f}" if needs and may else "more than there is"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def calibration(rows: Sequence[dict]) -> str:
    lines = []
    for row in rows:
        measured, _ = MEASURED[row["name"]]
        estimates = row["mfu_causal_estimate"], row["mfu_palm_estimate"]
        off = [f"{estimate / measured - 1:+.1%}" for estimate in estimates if estimate]
        lines.append([row["name"], memory(row), f"{measured:.1%}", *map(share, estimates), " / ".join(off)])
    return table(["model and slice", "GiB per chip", "MFU measured (MaxText)", "estimate, causal", "estimate, PaLM", "off by"], lines)


def presets(rows: Sequence[dict]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: row["flops_per_token"]["causal"]):
        mesh = next(override.removeprefix("mesh=") for override in row["overrides"] if override.startswith("mesh="))
        axes = " x ".join(f"{axis} {size}" for axis, size in row["axes"].items() if size > 1)
        tokens, fits = f"{row['tokens_per_device']:,.0f}", "yes" if row["fits"] else "no"
        lines.append([row["name"], mesh, axes, tokens, fits, memory(row), share(row["mfu_causal_estimate"])])
    return table(["preset", "mesh", "axes", "tokens per chip", "fits", "GiB per chip", "MFU causal (estimate)"], lines)


def series(rows: Sequence[dict], what: str) -> str:
    lines = [
        [row["name"], f"{row['tokens_per_device']:,.0f}", memory(row), share(row["mfu_causal_estimate"]), share(row["mfu_palm_estimate"])]
        for row in rows
    ]
    return table([what, "tokens per chip", "GiB per chip", "MFU causal (estimate)", "MFU PaLM (estimate)"], lines)


def depth(rows: Sequence[dict]) -> str:
    first = rows[0]["compiler"]
    lines = []
    for row in rows:
        compiler = row["compiler"]
        seconds = [compiler["lower_seconds"], compiler["compile_seconds"]]
        lines.append([row["name"], *(f"{s:.1f}" for s in seconds), f"{seconds[1] / first['compile_seconds']:.2f}"])
    return table(["depth", "seconds to lower", "seconds to compile", "of the first"], lines)


def plot(rows: Sequence[dict], what: str, path: str) -> None:
    """Plots memory and MFU side by side over the names of the rows."""
    figure = Figure(figsize=(8, 3.2), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [row["name"] for row in rows]
    left.bar(names, [(row["peak_bytes_per_device"] or 0) / GIB for row in rows], color="tab:gray")
    left.axhline(rows[0]["memory_bytes_per_device"] / GIB, color="tab:red", linestyle="--", linewidth=1)
    left.set(xlabel=what, ylabel="GiB per chip (dashed: the limit)")
    for key, label in (("mfu_causal_estimate", "causal"), ("mfu_palm_estimate", "PaLM")):
        known = [(row["name"], 100 * row[key]) for row in rows if row[key]]
        right.plot(*zip(*known, strict=True), marker="o", label=label)
    right.set(xlabel=what, ylabel="MFU, % (estimate)", ylim=(0, 100))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=45)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / path)


def main() -> None:
    groups: dict[str, list[dict]] = {}
    for row in done():
        groups.setdefault(row["group"], []).append(row)
    text = [PREFACE]
    for name, title, write in (
        ("calibration", "## The estimator held against published runs", calibration),
        ("presets", "## A mesh for every size of model", presets),
        ("chips", "## More chips: llama2_7b on v4, 8,192 tokens per chip, remat=full", lambda rows: series(rows, "slice")),
        ("context", "## Longer rows: llama3_1_8b on v5p-128, remat=full", lambda rows: series(rows, "tokens per row")),
        ("depth", "## Time to compile, by depth", depth),
    ):
        if rows := sorted(groups.get(name, []), key=lambda row: [*GROUPS[row["group"]]].index(row["name"])):
            libtpu = ", ".join(sorted({row["versions"]["libtpu"] for row in rows}))
            text += [title, f"Compiled with libtpu {libtpu}.", write(rows)]
            if name in ("chips", "context"):
                plot(rows, {"chips": "slice", "context": "tokens per row"}[name], f"{name}.png")
                text.append(f"![memory and estimated MFU]({name}.png)")
    (FOLDER / "README.md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
