"""Any runs beside each other, whether or not they belong to an experiment."""

import math
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence

from llama_eqx.errors import DataError
from llama_eqx.studies import plots
from llama_eqx.studies.page import Page
from llama_eqx.studies.runs import Run, config_differences, read_run
from llama_eqx.studies.statistics import interval
from llama_eqx.tracking.starts import changes


def side_by_side(asked: Sequence[str], output: pathlib.Path) -> tuple[list[pathlib.Path], str]:
    """Writes a page of runs, or of folders of runs, to `output`. Returns its files and the words for the terminal.

    Raises `DataError` for a folder without a record, and for runs that have no step in common.
    """
    paths, lacking = _members(asked)
    runs = _by_name({path: read_run(pathlib.Path(path)) for path in paths})
    page = Page(" and ".join(runs) if len(runs) < 5 else f"{len(runs)} runs")
    said = [f"{name}: {_ends(run)}" for name, run in runs.items()]
    for path in lacking:
        page.text(remark := f"Nothing was recorded in {path}: its console.txt says why.")
        said.append(remark)
    sizes = ["parameters", "tokens", "FLOPs", "tokens/s"]
    page.table(["run", "settings other than those of the first", "came to", *sizes], _overview(runs))
    for name, run in runs.items():
        if found := changes(run.provenance, max((record["step"] for record in run.metrics), default=0)):
            page.text(remark := f"The starts of {name} differ: {', '.join(found)}.")
            said.append(remark)
    said += (paired := paired_by_seed(runs))
    if paired:
        page.heading("Paired by seed")
        for line in paired:
            page.text(line)
    first, *others = runs
    for name in others:
        beside = next(other for other in runs if runs[other].seed == runs[name].seed)
        beside = first if beside == name else beside
        page.heading(f"{beside} → {name}")
        lines = config_differences(runs[beside], runs[name])
        page.verbatim("\n".join(lines) or "no setting differs")
        comparison = compared(runs[beside], runs[name])
        page.text(comparison)
        said += [f"{beside} -> {name}: {_count(lines)}. {comparison}"]
    page.heading("Curves")
    shared = set.intersection(*({name for record in run.metrics for name in record} for run in runs.values()))
    usual = {"optim/grad_norm", "optim/lr", "optim/dead_updates", "optim/withheld"}
    for name, metric, label in (
        ("loss", "train/loss", "training loss (nats per token)"),
        ("validation", "val/loss", "validation loss (nats per token)"),
        ("gradient", "optim/grad_norm", "norm of the gradient"),
        ("lr", "optim/lr", "learning rate"),
        ("speed", "perf/tokens_per_second", "tokens per second"),
        ("dead_updates", "optim/dead_updates", "share of updates that bfloat16 would lose"),
        *((metric.removeprefix("optim/"), metric, metric) for metric in sorted(shared - usual) if metric.startswith("optim/")),
    ):
        page.figure(name, plots.curves(runs, metric, label, log=metric == "optim/grad_norm"), label)
    for name, path in zip(runs, paths, strict=True):
        if (sample := pathlib.Path(path, "sample.txt")).is_file():
            page.heading(f"Sample of {name}")
            page.verbatim(sample.read_text(encoding="utf-8", errors="replace").strip())
    return page.write(output, "report"), "\n".join(said)


def paired_by_seed(runs: Mapping[str, Run]) -> list[str]:
    """A line for each group of runs that differ in their seed alone: their validation loss minus that of the first group, seed by seed.

    Two runs are a pair if they have read the same batches. A group with fewer than two pairs has no line.
    """
    groups: list[dict[int, str]] = []
    for name, run in runs.items():
        for group in groups:
            of_group = runs[next(iter(group.values()))]
            if all(line.startswith("seed: ") for line in config_differences(of_group, run)):
                group.setdefault(run.seed, name)
                break
        else:
            groups.append({run.seed: name})
    said = []
    for group in groups[1:]:
        pairs = [(runs[groups[0][seed]], runs[name]) for seed, name in group.items() if seed in groups[0]]
        paired = [(a, b) for a, b in pairs if a.series("data/ledger")[1][-1:] == b.series("data/ledger")[1][-1:]]
        found = [difference for a, b in paired if math.isfinite(difference := b.last("val/loss") - a.last("val/loss"))]
        if len(found) > 1:
            mean, low, high = interval(found)
            each = ", ".join(f"{difference:+.4f}" for difference in found)
            left = len(pairs) - len(found)  # a mean without the pairs that diverged is too good for one of the two
            question = (runs[next(iter(group.values()))].settings.get("study") or {}).get("question")
            verdict = f"python -m llama_eqx.report experiment={question} gives the verdict, when all registered runs are there"
            said.append(
                f"{_in_common(group)} minus {_in_common(groups[0])}, validation loss by seed: {each}; mean {mean:+.4f} nats per token, 95% "
                f"interval {low:+.4f} to {high:+.4f} over {len(found)} pairs"
                + f", without {left} that diverged, is not finished or read other batches" * bool(left)
                + f". This is a hint and no verdict: {verdict if question else 'nothing was registered'}."
            )
    return said


def _in_common(group: Mapping[int, str]) -> str:
    """The words that all names of a group have, without its seeds; else the names."""
    first, *others = (name.split() for name in group.values())
    return " ".join(word for word in first if all(word in name for name in others)) or " and ".join(group.values())


def compared(a: Run, b: Run) -> str:
    """Says where two runs diverge, and by how much the second is worse."""
    mine, other = (dict(zip(*run.series("train/loss"), strict=True)) for run in (a, b))
    steps = sorted(mine.keys() & other.keys())
    if not steps:
        raise DataError("the runs have no step in common", where=str(b.path))
    parted = next((step for step in steps if mine[step] != other[step]), None)
    said = [
        "Their training losses are equal to the last bit." if parted is None else f"Their training losses differ from step {parted} on."
    ]
    first, second = (run.settings.get("train", {}).get("steps") for run in (a, b))
    if first != second:
        said.append(f"Their schedules are of {first} and {second} steps: at the same step, one is nearer to its end.")
    for package in a.codes.keys() & b.codes.keys():
        if a.codes[package] != b.codes[package]:
            said.append(f"They were made by other code of {package} ({', '.join(a.codes[package])} and {', '.join(b.codes[package])}).")
    of_data = [dict(zip(*run.series("data/ledger"), strict=True)) for run in (a, b)]
    ended = [which for which, run in (("first", a), ("second", b)) if _not_finite_at(run)]
    said += [f"The {which} ended without finite numbers, which counts as worse than any loss." for which in ended]
    if wrong := next((step for step in sorted(of_data[0].keys() & of_data[1].keys()) if of_data[0][step] != of_data[1][step]), None):
        said.append(f"They saw different data by step {wrong}, so steps are not paired.")
    elif parted is not None and not ended:
        late = steps[-max(len(steps) // 4, 1) :]
        mean = statistics.fmean(other[step] - mine[step] for step in late)
        said.append(f"On the same batches the second is {_signed(mean)} over the last {len(late)} of {len(steps)} records.")
    ends = [dict(zip(*run.series("val/loss"), strict=True)) for run in (a, b)]
    if not ended and (both := sorted(ends[0].keys() & ends[1].keys())):
        last = both[-1]
        said.append(f"Validation at step {last}: the second is {_signed(ends[1][last] - ends[0][last])}. One pair says nothing of seeds.")
    return " ".join(said)


def _count(lines: Sequence[str]) -> str:
    return "1 setting differs" if len(lines) == 1 else f"{len(lines)} settings differ"


def _signed(difference: float) -> str:
    if not math.isfinite(difference):
        return "not comparable (a loss is not finite)"
    return f"{abs(difference):.4f} nats per token {'worse' if difference > 0 else 'better'}" if difference else "equal"


def _ends(run: Run) -> str:
    """The last validation loss, and whether the run came to its end."""
    steps, losses = run.series("val/loss")
    said = f"validation loss {losses[-1]:.4f} at step {steps[-1]}" if losses else "not evaluated yet"
    if step := _not_finite_at(run):
        return f"ended at step {step}, as its numbers were not finite; {said}"
    reached, wanted = max((record["step"] for record in run.metrics), default=0), run.settings.get("train", {}).get("steps", 0)
    return f"{said}; its record goes to step {reached} of {wanted}" if reached < wanted else said


def _not_finite_at(run: Run) -> int:
    """The step after which a run ended because its numbers were not finite, by the bundle that it left; 0 if it did not, or went on."""
    bundles = (int(path.stem.removeprefix("step-")) for path in (run.path / "replay").glob("step-*.json"))
    last = max(bundles, default=0)
    return last if last >= max((record["step"] for record in run.metrics), default=0) else 0


def _members(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """The run directories, of a folder of runs (such as that of a sweep) all in it; and those of its jobs that recorded nothing."""
    found, lacking = [], []
    for path in paths:
        folder = pathlib.Path(path)
        below = [] if (folder / "config.yaml").exists() else [file.parent for file in folder.rglob("metrics.jsonl")]
        found += map(str, sorted(below, key=_in_order)) if below else [path]
        lacking += sorted({str(file.parent) for file in folder.rglob("console.txt")} - {*map(str, below)}) if below else []
    return found, lacking


def _in_order(path: pathlib.Path) -> list[tuple[int, str]]:
    """Sorts 10 after 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _overview(runs: Mapping[str, Run]) -> list[list[str]]:
    first, rows = next(iter(runs.values())), list[list[str]]()
    for name, run in runs.items():
        parameters = next((start["parameters"] for start in reversed(run.provenance) if start.get("parameters")), math.nan)
        tokens, flops = (max(run.series(spent)[1], default=math.nan) for spent in ("tokens", "flops"))  # older records lack some
        sizes = (f"{parameters:,.0f}", f"{tokens:,.0f}", f"{flops:.3g}", f"{median_speed(run):,.0f}")
        rows.append([name, "; ".join(config_differences(first, run)), _ends(run), *("" if size == "nan" else size for size in sizes)])
    return rows


def median_speed(run: Run) -> float:
    """The median of the records' tokens/s, without the first step, which compiles."""
    speeds = zip(*run.series("perf/tokens_per_second"), strict=True)
    return statistics.median([speed for step, speed in speeds if step > 1] or [math.nan])


def _by_name(runs: Mapping[str, Run]) -> dict[str, Run]:
    """Runs by the names that a sweep, or the user, gave them if these tell them apart; else by the ends of their paths."""
    names = [(run.settings.get("tracking") or {}).get("wandb", {}).get("name") for run in runs.values()]
    if not all(names) or len({*names}) < len(names):
        names = [_name(path, [*runs]) for path in runs]
    return dict(zip(names, runs.values(), strict=True))


def _name(path: str, all_paths: Sequence[str]) -> str:
    """The shortest end of `path` that tells the runs apart."""
    parts = pathlib.Path(path).parts
    for n in range(1, len(parts) + 1):
        short = str(pathlib.Path(*parts[-n:]))
        if sum(str(pathlib.Path(*pathlib.Path(other).parts[-n:])) == short for other in all_paths) == 1:
            return short
    return path
