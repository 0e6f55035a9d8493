"""The verdicts of an experiment whose outcome is known, and those that the documents tell of the experiments that were run."""

import dataclasses
import pathlib
import re
import statistics

import numpy as np
import pytest
from scipy import stats

from llama_eqx import load_config
from llama_eqx.studies.registration import load_registration
from llama_eqx.studies.report import report
from llama_eqx.studies.runs import Run, check, complete, kept
from llama_eqx.studies.statistics import interval
from llama_eqx.studies.verdict import best_rates, findings, in_words

ROOT = pathlib.Path(__file__).parents[2]


def the(*overrides):
    return report(load_config("experiment=known", *overrides, name="report"))


def test_the_verdict(experiment):
    found = {finding.name: finding for finding in findings(kept("known", "final", "1m"), load_registration("known"))}
    assert {name: finding.verdict for name, finding in found.items()} == {
        "first": "worse", "second": "no effect", "third": "undecided", "again": "no effect", "less data": "worse",
    }  # fmt: skip
    losses = {arm: [run.last("val/loss") for run in kept("known", "final", "1m") if run.arm == arm] for arm in ("worse", "base")}
    pairs = [a - b for a, b in zip(losses["worse"], losses["base"], strict=True)]
    assert found["first"].interval == pytest.approx(interval(pairs))
    assert statistics.stdev(losses["base"]) > 20 * statistics.stdev(pairs)  # pairing is what shows it
    assert found["first"].p == pytest.approx(3 * stats.ttest_1samp(pairs, 0).pvalue)  # the least of three
    assert found["first"].sign_flip_p == 1 / 128  # the least that 8 signs can give


def test_a_difference_within_the_margin_is_no_effect_however_sure(experiment):
    _, add = experiment
    for seed in range(8):
        add("base", seed, 3.0)
        add("worse", seed, 3.001 + 1e-6 * seed)
    registration = load_registration("known")
    found, *_ = findings(kept("known", "final", "1m"), registration)
    assert max(found.p, found.sign_flip_p) < registration.alpha
    assert found.verdict == "no effect"


def test_arms_that_compute_the_same_are_told_from_arms_that_hardly_differ(experiment):
    _, add = experiment
    for seed in range(8):
        add("base", seed, 3.0 + seed / 10)
        add("worse", seed, 3.0 + seed / 10)  # its setting may have changed nothing
    assert "First: no effect, every one of 8 differences is exactly 0, so these arms may compute the same." in the().words


def test_the_words_follow_from_the_numbers(experiment):
    words = the().words
    assert "First: worse, +0.05" in words
    assert "Second: no effect, that is less than 0.01 nats per token either way" in words
    assert re.search(r"Third: undecided, neither an effect .* takes some [\d,]+ seeds", words)
    assert "pairs, p = 0.008 by the sign-flip test.\nSecond" in words  # 2 of 2^8, where the t test has less
    assert "The positive control (less data) came out as it had to" in words


def test_diverged_runs_count_and_no_size_is_made_up_for_them(experiment):
    _, add = experiment
    add("same", 0, 3.0, steps=60)  # it ended before its time, and so counts as worse than any other
    add("noisy", 1, float("nan"))
    written = the()
    found = {finding.name: finding for finding in findings(kept("known", "final", "1m"), load_registration("known"))}
    assert {name for name, finding in found.items() if finding.interval is None} == {"second", "third", "again"}
    assert (found["first"].verdict, found["second"].verdict) == ("worse", "undecided")
    assert re.search(r"Second: undecided, no effect is shown \(p = \d.\d+ by the sign test after Holm's adjustment\)", written.words)
    assert "Ended without finite numbers, which counts as worse than any loss: noisy (seed 1), same (seed 0)." in written.words
    assert re.search(r"\| second \| 8 \|  \|  \| \d.\d+ \(signs\) \|  \|", written.files[0].read_text())


def test_an_arm_that_always_diverges_is_worse(experiment):
    _, add = experiment
    for seed in range(8):
        add("worse", seed, 3.0, steps=60)
    words = the().words
    assert "First: worse, 8 of 8 pairs are worse and 0 better, p = 0.02 by the sign test after Holm's adjustment.\nSecond" in words
    add("base", 0, 3.0, steps=60)  # neither of two such runs is the worse one
    assert "First: worse, 7 of 8 pairs are worse and 0 better" in the().words


def test_the_p_that_is_told_is_the_one_that_decided(experiment):
    """Six pairs with one of the other sign: the t test finds a difference and the sign-flip test does not."""
    _, add = experiment
    for seed, difference in enumerate((0.09, 0.11, 0.1, 0.1, 0.12, -0.005)):
        add("base", seed, 3.0)
        add("worse", seed, 3.0 + difference)
    registration = load_registration("known")
    found, *_ = findings([run for run in kept("known", "final", "1m") if run.seed < 6], registration)
    assert found.p < registration.alpha < found.sign_flip_p == 0.0625
    words = in_words([found], registration)
    assert "neither an effect (p = 0.06 by the sign-flip test) nor its absence (p = 1.00 by the equivalence test) is shown" in words


@pytest.mark.parametrize("differences", [(0.5, 0.5, 0.5), (0.0095, 0.0105), (0.0095, 0.0105, 0.0102)])
def test_few_seeds_are_not_told_to_be_enough(differences, experiment):
    """Below six, the sign-flip test finds no difference, whatever the spread; that of the first is 0."""
    _, add = experiment
    for seed, difference in enumerate(differences):
        add("base", seed, 3.0)
        add("worse", seed, 3.0 + difference)
    registration = dataclasses.replace(load_registration("known"), seeds=tuple(range(len(differences))))
    found, *_ = findings([run for run in kept("known", "final", "1m") if run.seed < len(differences)], registration)
    assert in_words([found], registration).endswith("to see 0.01 at this spread with 90% probability takes some 6 seeds.")


def test_the_words_tell_which_runs_of_a_seed_were_made_on_another_machine(experiment):
    _, add = experiment
    assert "machines" not in the().words  # each seed is of one, if not all seeds are
    add("worse", 6, 3.0, kind="cpu")
    assert the().words.endswith(
        "\nRuns of one seed were made on different machines, so a difference may be one of machines: H100 with JAX 0.10.2 made "
        "base (seed 6), less (seed 6), noisy (seed 6), same (seed 6); cpu with JAX 0.10.2 made worse (seed 6)."
    )


def test_the_words_tell_which_runs_were_made_by_other_code(experiment):
    _, add = experiment
    assert "c1 made base (seeds 0, 1, 2, 3, 4), less (seeds 0, 1, 2, 3, 4)" in (words := the().words)
    assert words.endswith(
        "; c2 made base (seeds 5, 6, 7), less (seeds 5, 6, 7), noisy (seeds 5, 6, 7), same (seeds 5, 6, 7), worse (seeds 5, 6, 7)."
    )
    for arm in ("base", "worse", "same", "noisy", "less"):
        for seed in range(8):
            add(arm, seed, 3.0, code=["c1"])
    assert "changed" not in the().words
    add("worse", 3, 3.0, code=["c1", "c2"])
    add("worse", 4, 3.0, code=[])
    words = the().words
    assert "\nThe code of llama_eqx changed between these runs, so a difference may be one of code: c1 made base (seeds 0, 1," in words
    assert words.endswith("worse (seeds 0, 1, 2, 5, 6, 7); c1 and c2 made worse (seed 3).")
    for arm in ("base", "worse", "same", "noisy", "less"):
        for seed in range(8):
            add(arm, seed, 3.0, code=["c1", "c2"])
    assert "may be one of code: c1 and c2 made base" in the().words


@pytest.mark.parametrize(("effect", "spread", "wrong"), [(0.0, 0.02, {"worse", "better"}), (0.01, 0.005, {"no effect"})])
def test_the_whole_rule_keeps_its_alpha(effect, spread, wrong, experiment):
    """Three contrasts with one arm, in experiments on noise: how many say anywhere what is not so. The margin is 0.01."""
    registration, seeds, told = load_registration("known"), range(8), 0
    noise = np.random.default_rng(0).normal(0, spread, (600, 5, len(seeds)))
    for losses in noise + effect * np.array([0, 1, 1, 1, 1])[:, None]:
        runs = [
            Run(pathlib.Path(arm), {"study": {"arm": arm}, "seed": seed, "train": {"steps": 1}}, {}, [], [{"step": 1, "val/loss": loss}])
            for arm, of in zip(registration.arms, losses.tolist(), strict=True)
            for seed, loss in zip(seeds, of, strict=True)
        ]
        told += any(finding.verdict in wrong for finding in findings(runs, registration) if finding.role == "contrast")
    assert 0.01 < told / 600 < 0.07


def test_without_controls_nothing_is_claimed_of_them(experiment):
    registration = load_registration("known")
    assert "\nThere is no positive control:" in in_words([], registration)
    few = dataclasses.replace(registration, seeds=(0, 1, 2, 3, 4), alpha=0.0625)
    assert "With 5 seeds no difference can be shown, however large: the sign-flip test has no p below 0.0625." in in_words([], few)
    assert "can be shown" not in in_words([], dataclasses.replace(registration, seeds=(*range(6),)))


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*/report_*.md")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_verdict_that_is_told_is_that_of_the_runs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    question, rung = path.parent.name, path.stem.removeprefix("report_")
    registration, runs = load_registration(question), kept(question, "final", rung)
    check(runs, registration)
    complete(runs, registration)
    words = in_words(findings(runs, registration), registration)
    assert words.replace("\n", "\n\n") in path.read_text()
    told = re.findall(r"([+-]\d\.\d{4}) (\[[+-]\d\.\d{4}, [+-]\d\.\d{4}\])", path.with_name("README.md").read_text())
    assert told
    for mean, limits in told:
        assert f"{mean} nats per token {limits}" in words


# What docs/findings.md says of a contrast, and the verdict that this stands for.
TOLD = {
    "rotary_precision": {
        "position at 0": ("no effect", "Rounded **positions** cost nothing below 256"),
        "position at 256": ("worse", "0.034 from there"),
        "position at 1792": ("worse", "0.091 at 1,792"),
        "position at 7936": ("worse", "0.18 at 7,936"),
        "position at 65536": ("worse", "0.31 at 65,536"),
        "table at 7936": ("no effect", "The rounded table: no effect at 7,936"),
        "table at 0": ("undecided", "undecided at 0"),
        "inv_freq at 0": ("undecided", "Rounded frequencies: undecided"),
        "inv_freq at 7936": ("undecided", "Rounded frequencies: undecided"),
    },
    "rotary_size": {
        "rounding in the large model": ("worse", "Yes, 0.167 at 7,936"),
        "rounding in the small model": ("worse", "where a million parameters lose 0.131"),
        "what size changes": ("worse", "the difference, 0.037,"),
    },
    "dropout": {
        "dropout in 1 epoch": ("worse", "Once it costs 0.10"),
        "dropout in 16 epochs": ("better", "it gains, by an amount that is not established: 0.88 here"),
    },
    "ffn": {
        "gating": ("better", "The gate: 0.084"),
        "silu for relu": ("better", "SiLU for ReLU: 0.010 (its negative control was not quite clean)"),
        "positions shifted": ("undecided", "(its negative control was not quite clean)"),
        "interaction": ("undecided", "Whether one depends on the other is undecided"),
    },
    "norm": {"layer for rms": ("undecided", "Undecided: +0.003")},
    "attention": {
        "multi-query for multi-head": ("worse", "One key head for four: 0.055"),
        "grouped for multi-head": ("undecided", "Two: undecided, +0.023"),
    },
    "activations": {
        "geglu for swiglu": ("better", "GEGLU gains 0.008"),
        "bilinear for swiglu": ("worse", "bilinear loses 0.040"),
        "gelu for swiglu": ("undecided", "GELU, squared ReLU and the initialisation are undecided"),
        "squared relu for swiglu": ("undecided", "GELU, squared ReLU and the initialisation are undecided"),
        "fixed init for fan-in": ("undecided", "GELU, squared ReLU and the initialisation are undecided"),
    },
}


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*/report_*.md")), ids=lambda path: path.parent.name)
def test_the_findings_are_those_of_the_runs(path, monkeypatch):
    """Each verdict of the first table of answers, and each figure of both."""
    monkeypatch.chdir(ROOT)
    question, rung = path.parent.name, path.stem.removeprefix("report_")
    registration = load_registration(question)
    found = {finding.name: finding for finding in findings(kept(question, "final", rung), registration)}
    answer = next(line.split("|")[2] for line in (ROOT / "docs/findings.md").read_text().splitlines() if f"`{question}`" in line)
    for contrast, (verdict, phrase) in TOLD[question].items():
        assert (found[contrast].verdict, phrase in answer) == (verdict, True)
        for figure in re.findall(r"\d\.\d+", phrase):
            assert figure == f"{abs(found[contrast].interval.mean):.{len(figure) - 2}f}"
    figures = [abs(limit) for finding in found.values() for limit in finding.interval] + list(registration.rates)
    if question == "dropout":  # what tuning saw of its size
        _, losses, _ = best_rates(kept(question, "tune", rung), registration)
        plain, dropout = ({rate: statistics.fmean(of) for rate, of in losses[arm].items()} for arm in ("plain_16", "dropout1_16"))
        gains = [plain[rate] - dropout[rate] for rate in (0.008, 0.004)]
        assert "on the tuning text the gain is {:.2f} at that rate and {:.2f} at 0.004".format(*gains) in answer
        assert "dropout gains {1:.2f} in 16 epochs".format(*gains) in path.with_name("README.md").read_text()
        figures += gains
    row = next(line for line in (ROOT / "experiments/README.md").read_text().splitlines() if line.startswith(f"| [{question}]"))
    for figure in re.findall(r"\d\.\d+", answer + row.split("|")[4]):
        assert figure in {f"{value:.{len(figure) - 2}f}" for value in figures}
