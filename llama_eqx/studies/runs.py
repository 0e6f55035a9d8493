"""The runs of an experiment as they were kept, and whether they may be compared."""

import gzip
import itertools
import json
import math
import operator
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llama_eqx.config import differences, known_to_both
from llama_eqx.errors import DataError
from llama_eqx.files import json_object, reading
from llama_eqx.studies.registration import Contrast, Registration, folder, tuned
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.starts import read_starts, start_in

STUDY, LEDGER = "study.json", "data/ledger"
OF_A_RUN = ("run_dir", "seed", "study.path", "tracking", "compile_cache")  # settings of a run, and not of its arm


class Run(NamedTuple):
    """`settings` is the config in plain containers, `study` what was recorded at step 0; `metrics` are those of `metrics.jsonl`."""

    path: pathlib.Path
    settings: dict[str, Any]
    study: dict[str, Any]
    provenance: list[dict[str, Any]]
    metrics: list[dict[str, Any]]

    @property
    def arm(self) -> str:
        return self.settings["study"]["arm"]

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def peak(self) -> float:
        return self.settings["schedule"]["peak"]

    @property
    def codes(self) -> dict[str, list[str]]:
        """The hashes of the code that the run was started with, by package, where they were recorded."""
        found: dict[str, list[str]] = {}
        for origin in self.provenance:
            for package, code in origin.get("code", {}).items():
                found[package] = [*dict.fromkeys([*found.get(package, []), code])]
        return found

    def last(self, name: str) -> float:
        """The value of a metric at the last step; infinity, worse than any, when it is not finite or the run did not get there. `check`
        refuses a run that was evaluated without the metric.
        """
        steps = self.settings["train"]["steps"]
        found = [record[name] for record in self.metrics if name in record and record["step"] == steps]
        return float(found[-1]) if found and math.isfinite(found[-1]) else math.inf

    def series(self, name: str) -> tuple[list[int], list[float]]:
        found = [(record["step"], record[name]) for record in self.metrics if name in record]
        return [step for step, _ in found], [value for _, value in found]


def free(run: Run) -> list[str]:
    """Settings in which another run of its arm may differ, as they do not change what is computed and measured. The paths of data and
    tokenizer are among them if there is a fingerprint, which tells whether they are the same.
    """
    from llama_eqx.training.identity import FREE, movable  # imports JAX

    model = run.settings.get("model", {})
    fixed = {"train.steps", "eval_data"}
    if model.get("dropout") or model.get("block", {}).get("dropout"):
        fixed |= {"train.microbatch_size"}  # which activations are dropped depends on it
    if math.isinf(run.last("val/loss")):
        fixed |= {"guard.max_withheld"}  # it ended early, as its numbers were not finite, and would again
    elsewhere = movable(run.settings) if "data_fingerprint" in run.settings else []
    return [*(key for key in FREE if key not in fixed), *elsewhere]


def outdated(run: Run, registration: Registration) -> Iterator[str]:
    """Yields why a run may no longer be compared: the registration, or the rate that tuning found, has changed.

    Raises `ConfigError` when there is no rate yet.
    """
    study = run.settings["study"]
    if study["registration"] != registration.hash():
        yield f"made under another registration ({study['registration']}, now {registration.hash()})"
    if study["stage"] == "final" and run.peak != (rate := tuned(study["question"], study["rung"], run.arm)):
        yield f"its learning rate is {run.peak:g}, and {rate:g} was found for its arm"


def read_kept(path: pathlib.Path) -> Run:
    """A run that `pairing.keep` filed. Raises `DataError` when it is damaged."""
    with reading(path, DataError, "this is no run that was kept", next="remove the file and give the run again"):
        first, *lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        known = json.loads(first)
        metrics = [{k: v if k == "step" else float(v) for k, v in json.loads(line).items()} for line in lines]
        return Run(path, {**known["config"]}, {**known["study"]}, [start_in(each) for each in known["provenance"]], metrics)


def read_run(run_dir: pathlib.Path) -> Run:
    """Reads any run directory. Raises `CheckpointError` or `DataError` when it is not one."""
    from llama_eqx.checkpoint.native import CONFIG, MEND, read_config

    study = read_study(run_dir) if (run_dir / STUDY).exists() else {}
    settings, starts = read_config(run_dir), read_starts(run_dir / "provenance.jsonl")
    with reading(run_dir / CONFIG, DataError, f"this {CONFIG} is not that of a run", next=MEND):
        _ = operator.index(settings["seed"]), {**settings.get("tracking", {}).get("wandb", {})}
        _ = [operator.index(settings["train"][key]) for key in ("steps", "batch_size", "seq_len") if key in settings.get("train", {})]
    return Run(run_dir, settings, study, starts, read_metrics(run_dir / "metrics.jsonl"))


def read_study(run_dir: pathlib.Path) -> dict[str, Any]:
    """What was recorded at step 0. Raises `DataError` when it is missing or damaged."""
    return json_object(run_dir / STUDY, DataError, next="remove the file")


def kept(question: str, stage: str, rung: str) -> list[Run]:
    """The kept runs of a stage at a rung. Raises `DataError` when there is none."""
    where = folder(question) / "runs" / stage / rung
    if runs := [read_kept(path) for path in sorted(where.rglob("*.jsonl.gz"))]:
        return runs
    others = sorted(path.parent.parent.name for path in where.parent.glob("*/*/*.jsonl.gz"))
    command = (
        f"python -m llama_eqx.report experiment={question} rung={others[0]}"
        if others
        else f"python -m llama_eqx.train -m experiment={question}"
    )
    raise DataError(f"no run of {question} has been kept at {rung}", where=str(where), next=command + " stage=tune" * (stage == "tune"))


def asked_for(run: Run, registration: Registration) -> bool:
    """Whether the registration names the run's arm, seed and, while tuning, rate. Other runs do not count: whoever adds runs until they
    please finds more than alpha allows.
    """
    if run.settings["study"]["stage"] == "tune":
        return run.arm in registration.tune_arms and run.peak in registration.rates and run.seed in registration.tune_seeds
    return run.arm in registration.arms and run.seed in registration.seeds


def named(runs: Sequence[Run]) -> str:
    """Names the runs by arm and, while tuning, by rate: "base (seeds 0, 1), worse at 0.004 (seed 3)"."""
    found: dict[str, list[int]] = {}
    for run in runs:
        rate = f" at {run.peak:g}" * (run.settings["study"]["stage"] == "tune")
        found.setdefault(run.arm + rate, []).append(run.seed)
    return ", ".join(f"{arm} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))})" for arm, seeds in found.items())


def check(runs: Sequence[Run], registration: Registration) -> None:
    """Raises `DataError` naming every run that may not be compared with the others, and why."""
    if found := list(_faults(runs, registration)):
        raise DataError(
            "these runs do not belong together:\n" + "\n".join(f"{run.path}: {why}" for run, why in found),
            kept="all of them, as they are",
            next="remove those that are wrong and give the command of the experiment again",
        )


def complete(runs: Sequence[Run], registration: Registration) -> None:
    """Raises `DataError` when a registered run of the final stage is missing: whoever looks before the last one, and may stop there, finds
    more than alpha allows.
    """
    have = {(run.arm, run.seed) for run in runs}
    lacking = [f"{arm} seed {seed}" for arm in registration.arms for seed in registration.seeds if (arm, seed) not in have]
    if lacking:
        n, few = len(lacking), 8
        raise DataError(
            f"{n} of its {len(registration.arms) * len(registration.seeds)} registered runs {'is' if n == 1 else 'are'} missing: "
            + ", ".join(lacking[:few])
            + ", …" * (n > few),
            where=str(runs[0].path.parents[1]),
            kept="those that are there; no difference is shown before all are",
            next="the command of the experiment again: it runs what is missing",
        )


def _faults(runs: Sequence[Run], registration: Registration) -> Iterator[tuple[Run, str]]:
    groups = registration.same_data or (registration.arms,)
    compared = _pairs(registration.all_contrasts(), registration)
    alike_in_size = _pairs(registration.contrasts, registration)  # a control may be of another size
    by_seed: dict[tuple[int, float], dict[str, Run]] = {}
    alike: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        yield from ((run, why) for why in outdated(run, registration))
        measured = dict.fromkeys(name for record in run.metrics for name in record if name.startswith("val/"))
        if measured and registration.metric not in measured:
            yield run, f"{registration.metric} was not evaluated, only {', '.join(measured)}"
        left, match = run.study.get("residual"), _match(run)
        if left is None and match != "none":
            yield run, f"not known to be matched: what is left of the reference's {match} was not recorded"
        elif left is not None and not abs(left) <= 0.001:  # NaN too
            yield run, f"not matched: {left:+.2%} of the reference's {match}"
        rate = run.peak if run.settings["study"]["stage"] == "tune" else 0.0
        alike.setdefault((run.arm, rate), []).append(run)
        first = by_seed.setdefault((run.seed, rate), {}).setdefault(run.arm, run)
        if first is not run:
            yield run, f"{named([run])} has a record already: {first.path}"
    for group in alike.values():
        yield from _odd(group)
    for arms in by_seed.values():
        for a, b in compared:
            if a in arms and b in arms and (wrong := _other_values(arms[a], arms[b])):
                yield arms[b], f"began with other values than {a} of seed {arms[a].seed}: {', '.join(wrong)}"
        for a, b in alike_in_size:
            if a in arms and b in arms and _match(arms[a]) != _match(arms[b]):
                yield arms[b], f"study.match is {_match(arms[b])}, and {_match(arms[a])} for {a} of seed {arms[a].seed}"
        for group in groups:
            together = [arms[arm] for arm in group if arm in arms]
            recorded = [run for run in together if run.series(LEDGER)[0]]
            for first, run in itertools.product(recorded[:1], together):
                if not run.series(LEDGER)[0]:
                    yield run, f"no {LEDGER} says whether it saw the data of {first.arm} of seed {run.seed}"
                elif wrong := _other_data(first, run):
                    old, new = (each.settings.get("data_fingerprint") for each in (first, run))
                    cause = "; the text, the names of its files or the tokenizer differ" * (None not in (old, new) and old != new)
                    yield run, f"saw other data than {first.arm} of seed {run.seed}, from step {wrong[0]} on or before{cause}"


def _pairs(contrasts: Mapping[str, Contrast], registration: Registration) -> list[tuple[str, str]]:
    """Pairs of arms in the same contrast, each pair once and in the order of the registration."""
    in_order = (sorted(contrast, key=registration.arms.index) for contrast in contrasts.values())
    return [*dict.fromkeys(pair for arms in in_order for pair in itertools.combinations(arms, 2))]


def _match(run: Run) -> str:
    return run.settings["study"]["match"]


def _odd(runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
    """Yields the runs of an arm whose settings differ from those of most of its runs or, without such a majority, from any other's."""
    others = [[like for like in runs if _other_settings(like, run)] for run in runs]
    few, usual = min(zip(map(len, others), runs, strict=True), key=lambda each: each[0])
    most = 2 * few < len(runs)
    for run, found in zip(runs, others, strict=True):
        for like in [usual] * (usual in found) if most else found[:1]:
            share = "most of its arm, such as" if most else "half of its arm or more, such as"
            yield run, f"other settings than {share} {like.path.name}: {'; '.join(_other_settings(like, run))}"


def _other_settings(a: Run, b: Run) -> list[str]:
    """A line for every setting that changes what is computed."""
    old, new = known_to_both(a.settings, b.settings), known_to_both(b.settings, a.settings)
    allowed = {"seed", "study.path"} | ({*free(a)} & {*free(b)})
    sooner = min(a, b, key=lambda run: run.settings.get("guard", {}).get("max_withheld", 0))
    allowed |= {*free(sooner)} & {"guard.max_withheld"}  # a run that came through with less patience would with more
    return [str(each) for each in differences(old, new) if not each.within(allowed)]


def _other_values(a: Run, b: Run) -> list[str]:
    """Names of the tensors of equal shape that began with other values; none if `model.init` differs, as then they should."""
    if a.settings["model"].get("init") != b.settings["model"].get("init"):
        return []
    mine, theirs = ({name: tensor.split() for name, tensor in run.study["tensors"].items()} for run in (a, b))
    shared = [name for name in sorted(mine.keys() & theirs.keys()) if mine[name][0] == theirs[name][0]]  # others have another shape
    return [name for name in shared if mine[name] != theirs[name]]


def _other_data(a: Run, b: Run) -> list[int]:
    """Steps by which the two runs had seen different data."""
    ledgers: Mapping[int, float] = dict(zip(*a.series(LEDGER), strict=True))
    return [step for step, ledger in zip(*b.series(LEDGER), strict=True) if ledgers.get(step, ledger) != ledger]


def arm_differences(a: Run, b: Run) -> list[str]:
    """A line for every setting in which an arm differs from another, meant or not."""
    return [str(each) for each in differences(a.settings, b.settings) if not each.within((*OF_A_RUN, "study.arm"))]


def config_differences(a: Run, b: Run) -> list[str]:
    """A line for every setting that differs, except for where a run lies."""
    return [str(each) for each in differences(a.settings, b.settings) if not each.within(("run_dir", "tracking", "study.path"))]
