"""The two reports: of an experiment, and of any runs side by side."""

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from llama_eqx.config import Config
from llama_eqx.errors import ConfigError, DataError
from llama_eqx.studies import plots
from llama_eqx.studies.page import Page
from llama_eqx.studies.registration import Registration, folder, load_registration, write_tuned
from llama_eqx.studies.runs import Run, arm_differences, asked_for, check, complete, kept, named
from llama_eqx.studies.side_by_side import median_speed, side_by_side
from llama_eqx.studies.verdict import Finding, best_rates, equivalence_in_words, findings, in_words


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
        return Report(*side_by_side(config.runs, _output(config, pathlib.Path("report"))))
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
    remarks = [*_codes(runs), *_machines(runs), *others]
    words = "\n".join([in_words(found, registration), *(f"{remark[:1].upper()}{remark[1:]}." for remark in remarks)])
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
            page.figure(name, plots.doses(name, points, registration.margin, against), f"difference over {name}")
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


def _row(finding: Finding) -> list[str]:
    name = finding.name if finding.role == "contrast" else f"{finding.name} ({finding.role})"
    pairs, verdict = str(len(finding.differences)), finding.verdict
    if finding.interval is None:
        return [name, pairs, "", "", f"{_p(finding.sign_flip_p)} (signs)", "", _p(finding.p), "", verdict]
    mean, low, high = finding.interval
    numbers = map(_p, (finding.sign_flip_p, finding.t_p, finding.p, finding.equivalence_p))
    return [name, pairs, f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}", *numbers, verdict]


def _p(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


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


def _machines(runs: Sequence[Run]) -> list[str]:
    """A remark if the runs of a seed, which make its pairs, were not all made on one kind of device by one JAX; it names those runs."""
    found: dict[int, dict[str, list[Run]]] = {}
    for run in runs:
        kinds = (f"{each.get('computed', {}).get('kind')} with JAX {each.get('versions', {}).get('jax')}" for each in run.provenance)
        found.setdefault(run.seed, {}).setdefault(" and ".join(dict.fromkeys(kinds)), []).append(run)
    apart: dict[str, list[Run]] = {}
    for made in found.values():
        if len(made.keys() - {""}) > 1:
            for machine, of in made.items():
                apart.setdefault(machine, []).extend(of)
    made_on = "; ".join(f"{machine} made {named(of)}" for machine, of in sorted(apart.items()) if machine)
    return [f"runs of one seed were made on different machines, so a difference may be one of machines: {made_on}"] if apart else []


def _short(commit: str | None) -> str:
    head, dash, changed = str(commit).partition("-")  # for changed code it ends with "-dirty"
    return head[:12] + dash + changed


def _arm(arm: str, runs: Sequence[Run], metric: str) -> list[str]:
    losses = [run.last(metric) for run in runs]
    study, speeds = runs[0].study, [median_speed(run) for run in runs]
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
        f"{float(f'{statistics.median(speeds):.3g}'):,.0f}",  # a fourth digit is noise
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
