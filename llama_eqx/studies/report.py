"""The two reports: of an experiment, and of any runs side by side."""

import math
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from llama_eqx.config import Config
from llama_eqx.errors import ConfigError, DataError
from llama_eqx.studies import plots
from llama_eqx.studies.page import Page
from llama_eqx.studies.registration import Registration, folder, load_registration, write_tuned
from llama_eqx.studies.runs import Run, arm_differences, asked_for, check, complete, config_differences, kept, named, read_run
from llama_eqx.studies.statistics import interval
from llama_eqx.studies.verdict import Finding, best_rates, equivalence_in_words, findings, in_words
from llama_eqx.tracking.starts import changes


class ReportConfig(Config):
    """Reports on an `experiment` at a `stage` and `rung`, or on run directories. `output` None is the experiment's folder, or `report`."""

    experiment: str | None
    stage: Literal["tune", "final"]
    rung: str
    runs: tuple[str, ...]
    output: str | None

    def check(self) -> None:
        if (self.experiment is None) == (not self.runs):
            raise ConfigError("a report is of an experiment or of runs", next="experiment=NAME, or runs=[FOLDER,FOLDER]")


class Report(NamedTuple):
    """The files written, and the words for the terminal."""

    files: list[pathlib.Path]
    words: str


def report(config: ReportConfig) -> Report:
    """Writes the report. Raises `ConfigError`, `DataError` or `StorageError`."""
    if config.experiment is None:
        return of_runs(config)
    return tuning(config, config.experiment) if config.stage == "tune" else final(config, config.experiment)


def tuning(config: ReportConfig, question: str) -> Report:
    """Writes the best learning rates to tuned.yaml, and a page with the curves of the loss over them."""
    registration = load_registration(question)
    runs, others = _registered(kept(question, "tune", config.rung), registration)
    check(runs, registration)
    best, losses, remarks = best_rates(runs, registration)
    remarks += others
    page = Page(f"{question}: learning rates at {config.rung}")
    page.text(f"Mean {registration.metric} on the tuning text, {len(registration.tune_seeds)} seeds a rate.")
    rates = sorted({rate for of in losses.values() for rate in of})
    rows = [
        [arm, *(f"{statistics.fmean(of[rate]):.4f}" if rate in of else "" for rate in rates), best.get(arm, "")]
        for arm, of in losses.items()
    ]
    page.table(["arm", *(f"{rate:g}" for rate in rates), "chosen"], rows)
    page.figure("sensitivity", plots.sensitivity(losses), "loss over the peak learning rate")
    for remark in remarks:
        page.text(f"Note: {remark}.")
    files = page.write(_output(config, folder(question)), f"tuning_{config.rung}")
    if best:
        files.append(write_tuned(question, config.rung, best))
    return Report(files, "\n".join([*(f"{arm}: {rate:g}" for arm, rate in best.items()), *remarks]))


def final(config: ReportConfig, question: str) -> Report:
    """Writes the verdict on an experiment."""
    registration = load_registration(question)
    there = kept(question, "final", config.rung)
    runs, others = _registered(there, registration)
    check(runs, registration)
    complete(there, registration)
    found = findings(runs, registration)
    words = "\n".join([in_words(found, registration), *(f"{remark[:1].upper()}{remark[1:]}." for remark in [*_codes(runs), *others])])
    arms = {arm: [run for run in runs if run.arm == arm] for arm in registration.arms if any(run.arm == arm for run in runs)}

    page = Page(f"{question} at {config.rung}")
    page.text(registration.question)
    page.heading("Verdict")
    for line in words.splitlines():
        page.text(line)
    if found:
        page.figure("differences", plots.forest(found, registration.margin, registration.alpha), "paired differences with 95% intervals")
        page.heading("Contrasts")
        head = ["contrast", "pairs", "difference", "95% interval", "sign-flip p", "t p", "p (Holm)", "p of equivalence", "verdict"]
        page.table(head, [_row(finding) for finding in found])
        page.text(
            f"Intervals printed and drawn are of 95%; {equivalence_in_words(found, registration.alpha)}, which must lie within the margin."
        )
    page.heading("Arms")
    page.table(
        ["arm", "seeds", registration.metric, "sd", "bits per byte", "parameters", "MFLOPs per token", "position codes", "tokens/s"],
        [_arm(arm, of, registration.metric) for arm, of in arms.items()],
    )
    first, *others = (of[0] for of in arms.values())
    page.heading("What sets the arms apart")
    page.table(["arm", f"settings other than those of {first.arm}"], [[of.arm, "; ".join(arm_differences(first, of))] for of in others])
    for name, doses in registration.doses.items():
        points = [(dose, finding) for finding in found for contrast, dose in doses.items() if contrast == finding.name]
        if len(points) > 1:
            page.heading(f"Dose and response: {name}")
            contrasts = (registration.all_contrasts()[contrast] for contrast in doses)
            against = list(dict.fromkeys(arm for contrast in contrasts for arm, weight in contrast.items() if weight < 0))
            page.figure(name.replace(" ", "_"), plots.doses(name, points, registration.margin, against), f"difference over {name}")
    if by_position := {arm: _by_position(of) for arm, of in arms.items() if _by_position(of)}:
        page.heading("Loss by position in the row")
        page.figure("positions", plots.buckets(by_position), "loss by position")
    _sensitivity(page, config, question)
    page.heading("How it was run")
    said = {"hash": registration.hash(), "margin": registration.margin, "alpha": registration.alpha, "rule": registration.rule}
    page.table(["registered", ""], list(said.items()))
    page.text(f"Stopping: {registration.stopping} Exclusion: {registration.exclusion}")
    page.table(["seeds", "on", "commit", "Python", "JAX"], _origins(runs))
    files = page.write(_output(config, folder(question)), f"report_{config.rung}")
    return Report(files, words)


def of_runs(config: ReportConfig) -> Report:
    """Writes a page of runs side by side."""
    paths, lacking = _members(config.runs)
    runs = _by_name({path: read_run(pathlib.Path(path)) for path in paths})
    page = Page(" and ".join(runs) if len(runs) < 5 else f"{len(runs)} runs")
    said = [f"{name}: {_ends(run)}" for name, run in runs.items()]
    for path in lacking:
        page.text(remark := f"Nothing was recorded in {path}: its console.txt says why.")
        said.append(remark)
    page.table(["run", "settings other than those of the first", "came to", "tokens/s"], _overview(runs))
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
        if (sample := pathlib.Path(path, "sample.txt")).exists():
            page.heading(f"Sample of {name}")
            page.verbatim(sample.read_text(encoding="utf-8").strip())
    return Report(page.write(_output(config, pathlib.Path("report")), "report"), "\n".join(said))


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
            said.append(
                f"{_in_common(group)} minus {_in_common(groups[0])}, validation loss by seed: {each}; mean {mean:+.4f} nats per token, 95% "
                f"interval {low:+.4f} to {high:+.4f} over {len(found)} pairs"
                + f", without {left} that diverged or read other batches" * bool(left)
                + ". Nothing was registered, so this is a hint and no verdict."
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
    first = next(iter(runs.values()))
    speeds = [_speed(run) for run in runs.values()]
    return [
        [name, "; ".join(config_differences(first, run)), _ends(run), f"{speed:,.0f}" if math.isfinite(speed) else ""]
        for (name, run), speed in zip(runs.items(), speeds, strict=True)
    ]


def _speed(run: Run) -> float:
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


def _row(finding: Finding) -> list[str]:
    name = finding.name if finding.role == "contrast" else f"{finding.name} ({finding.role})"
    pairs, verdict = str(len(finding.differences)), finding.verdict
    if finding.interval is None:
        return [name, pairs, "", "", f"{finding.sign_flip_p:.4f} (signs)", "", f"{finding.p:.4f}", "", verdict]
    mean, low, high = finding.interval
    numbers = [f"{p:.4f}" for p in (finding.sign_flip_p, finding.t_p, finding.p, finding.equivalence_p)]
    return [name, pairs, f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}", *numbers, verdict]


def _origins(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each device, commit and versions that runs were made with, with the seeds of those runs."""
    found: dict[tuple[str, ...], set[int]] = {}
    for run in runs:
        for origin in run.provenance:
            versions = origin.get("versions", {})
            commit = _short(origin.get("commit")) + (f" (code {' '.join(origin['code'].values())})" if "code" in origin else "")
            commit += "".join(f", {name} {_short(of)}" for name, of in origin.get("extensions", {}).items())
            key = origin.get("computed", {}).get("kind"), commit, versions.get("python"), versions.get("jax")
            found.setdefault(tuple(map(str, key)), set()).add(run.seed)
    return [[", ".join(map(str, sorted(seeds))), *key] for key, seeds in sorted(found.items(), key=lambda item: sorted(item[1]))]


def _codes(runs: Sequence[Run]) -> list[str]:
    """A remark on each package that was changed between runs, or during one, naming the runs of each version of it."""
    remarks = []
    for package in dict.fromkeys(package for run in runs for package in run.codes):
        found: dict[str, list[Run]] = {}
        for run in runs:
            found.setdefault(" and ".join(run.codes.get(package, [])), []).append(run)
        if len({code for run in runs for code in run.codes.get(package, [])}) > 1:
            made = "; ".join(f"{code} made {named(of)}" for code, of in found.items() if code)  # older runs do not say
            remarks.append(f"the code of {package} changed between these runs, so a difference may be one of code: {made}")
    return remarks


def _short(commit: str | None) -> str:
    head, dash, changed = str(commit).partition("-")  # for changed code it ends with "-dirty"
    return head[:12] + dash + changed


def _arm(arm: str, runs: Sequence[Run], metric: str) -> list[str]:
    losses = [run.last(metric) for run in runs]
    study, speeds = runs[0].study, [_speed(run) for run in runs]
    bytes_ = statistics.fmean(run.last("val/bits_per_byte") for run in runs)
    spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 and all(map(math.isfinite, losses)) else ""
    size = f"{study['parameters']:,}" + (f" ({study['residual']:+.3%})" if study["residual"] is not None else "")
    codes, flops = str(study["position_codes"]), f"{study['flops_per_token'] / 1e6:.3f}"
    return [
        arm,
        str(len(runs)),
        f"{statistics.fmean(losses):.4f}",
        spread,
        f"{bytes_:.4f}",
        size,
        flops,
        codes,
        f"{statistics.median(speeds):,.0f}",
    ]


def _by_position(runs: Sequence[Run]) -> Mapping[int, float]:
    prefix = "val/loss_at_"
    names = {name for run in runs for record in run.metrics for name in record if name.startswith(prefix)}
    return {int(name.removeprefix(prefix)): statistics.fmean(run.last(name) for run in runs) for name in names}


def _sensitivity(page: Page, config: ReportConfig, question: str) -> None:
    registration = load_registration(question)
    try:
        tuned, _ = _registered(kept(question, "tune", config.rung), registration)
    except DataError:
        return
    _, losses, remarks = best_rates(tuned, registration)
    page.heading("Sensitivity to the learning rate")
    page.figure("sensitivity", plots.sensitivity(losses), "loss over the peak learning rate")
    for remark in remarks:
        page.text(f"Note: {remark}.")


def _registered(runs: Sequence[Run], registration: Registration) -> tuple[list[Run], list[str]]:
    """The runs that the registration asks for, and remarks on those that ended without finite numbers and on the other runs, if any."""
    others, asked = ([run for run in runs if asked_for(run, registration) is wanted] for wanted in (False, True))
    ended = [run for run in asked if not math.isfinite(run.last(registration.metric))]
    remarks = {
        "ended without finite numbers, which counts as worse than any loss": ended,
        "left out, as the registration does not ask for them": others,
    }
    return asked, [f"{remark}: {named(of)}" for remark, of in remarks.items() if of]


def _output(config: ReportConfig, default: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.output) if config.output else default
