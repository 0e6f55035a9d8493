"""Of an experiment whose outcome is known: what the report says, what it refuses, and what it writes."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import textwrap

import matplotlib.image
import pytest
import yaml
from scipy import stats

from llama_eqx import load_config
from llama_eqx.checkpoint.native import write_config
from llama_eqx.errors import ConfigError, DataError
from llama_eqx.studies.plots import VERDICTS
from llama_eqx.studies.registration import load_registration, registered, tuned
from llama_eqx.studies.report import report
from llama_eqx.studies.runs import check, complete, kept
from llama_eqx.studies.statistics import interval
from llama_eqx.studies.verdict import best_rates, findings, in_words

ROOT = pathlib.Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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


def test_the_words_follow_from_the_numbers(experiment):
    words = the().words
    assert "First: worse, +0.05" in words
    assert "Second: no effect, that is less than 0.01 nats per token either way" in words
    assert re.search(r"Third: undecided, neither an effect .* takes [\d,]+ seeds", words)
    assert "pairs, p = 0.008 by the sign-flip test. Second" in words  # 2 of 2^8, where the t test has less
    assert "The positive control (less data) came out as it had to" in words


def test_nobody_looks_before_all_runs_are_there(experiment):
    folder, _ = experiment
    (folder / "runs/final/1m/less/0.002_3.jsonl.gz").unlink()
    with pytest.raises(DataError) as found:
        the()
    assert "1 of its 40 registered runs is missing" in str(found.value)
    assert "less seed 3" in str(found.value)
    assert str(pathlib.Path("runs/final/1m")) in str(found.value)
    assert not list(folder.glob("report*"))


def test_runs_that_nobody_registered_count_for_nothing_and_are_named(experiment):
    folder, add = experiment
    before = the()
    for seed in (8, 9):
        add("worse", seed, 1.0)
        add("base", seed, 9.0)
    add("spare", 0, 1.0, registration="0000", residual=0.5)
    after = the()
    said = " Left out, as the registration does not ask for them: base (seeds 8, 9), spare (seed 0), worse (seeds 8, 9)."
    assert after.words == before.words + said
    assert said.strip() in after.files[0].read_text()
    assert "| base | 8 |" in after.files[0].read_text()
    shutil.rmtree(folder / "runs")
    add("spare", 0, 1.0)
    with pytest.raises(DataError, match="40 of its 40 registered runs are missing"):
        the()


@pytest.mark.parametrize("loss", [3.0, 4.0])
def test_of_two_records_of_a_run_neither_is_chosen(loss, experiment):
    folder, add = experiment
    other = add("worse", 3, loss)
    other = other.rename(other.with_name("zz.jsonl.gz"))
    path = add("worse", 3, 3.0)
    with pytest.raises(DataError) as found:
        the()
    told, there = (str(each.relative_to(pathlib.Path.cwd())) for each in (other, path))
    assert f"{told}: worse (seed 3) has a record already: {there}" in str(found.value)
    assert not list(folder.glob("report*"))


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
    assert "First: worse, 8 of 8 pairs are worse and 0 better, p = 0.02 by the sign test after Holm's adjustment. Second" in words
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


@pytest.mark.parametrize(
    ("stage", "next"), [("final", "llama_eqx.report experiment=known rung=1m"), ("tune", "train -m experiment=known stage=tune")]
)
def test_where_there_is_no_run_it_is_said_where_there_are(stage, next, experiment):
    with pytest.raises(DataError, match="no run of known has been kept at 10m") as refused:
        kept("known", stage, "10m")
    assert refused.value.next.endswith(next)


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
    assert " The code of llama_eqx changed between these runs, so a difference may be one of code: c1 made base (seeds 0, 1," in words
    assert words.endswith("worse (seeds 0, 1, 2, 5, 6, 7); c1 and c2 made worse (seed 3).")
    for arm in ("base", "worse", "same", "noisy", "less"):
        for seed in range(8):
            add(arm, seed, 3.0, code=["c1", "c2"])
    assert "may be one of code: c1 and c2 made base" in the().words


def test_without_controls_nothing_is_claimed_of_them(experiment):
    registration = load_registration("known")
    assert "There is no positive control:" in in_words([], registration)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"registration": "0000"}, "another registration"),
        ({"tensors": "float32[4] cc"}, "began with other values than base of seed 3: embed"),
        ({"ledger": 8.0}, "saw other data than base of seed 3"),
        ({"ledger": None}, "no data/ledger says whether it saw the data of base of seed 3"),
        ({"residual": 0.02}, "not matched: +2.00% of the reference's parameters"),
        ({"residual": float("nan")}, "not matched: +nan% of the reference's parameters"),
        ({"residual": None}, "what is left of the reference's parameters was not recorded"),
        ({"settings": {"model": {"dims": {"mlp": 9, "kv_heads": 2}}}}, "other settings than"),
        ({"settings": {"schedule": {"peak": 0.5}}}, "schedule.peak: 0.002 -> 0.5"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(options, said, experiment):
    _, add = experiment
    path = add("worse", 3, 3.0, **options)
    with pytest.raises(DataError) as found:
        the()
    assert said in str(found.value)
    assert str(path.relative_to(pathlib.Path.cwd())) in str(found.value)


@pytest.mark.parametrize(("arm", "match", "refused"), [("worse", "none", True), ("base", "flops", True), ("less", "none", False)])
def test_arms_of_a_contrast_are_matched_alike_and_a_control_may_be_of_another_size(arm, match, refused, experiment):
    _, add = experiment
    for seed in range(8):
        add(arm, seed, 3.0 + seed / 10, match=match, residual=None if match == "none" else 0.0)
    said = rf"worse/.*: study\.match is {'none' if arm == 'worse' else 'parameters'}, and "
    with pytest.raises(DataError, match=said) if refused else contextlib.nullcontext():
        the()


def test_runs_without_a_ledger_are_told_from_those_logged_at_other_steps(experiment):
    """Which run of a group comes first does not matter, and of data that no run recorded nothing is said."""
    _, add = experiment
    path = add("base", 3, 3.0, ledger=None)
    with pytest.raises(DataError, match=rf"base/{path.name}: no data/ledger says whether it saw the data of worse of seed 3") as found:
        the()
    assert str(found.value).count("data/ledger") == 1
    for arm in ("worse", "same", "noisy", "less"):
        add(arm, 3, 3.0, ledger=None)
    the()
    for arm in ("base", "same", "noisy", "less"):
        add(arm, 3, 3.0)
    add("worse", 3, 3.0, ledger=8.0, logged=40)
    the()


@pytest.mark.parametrize(
    ("of", "options", "refused"),
    [("worse", {"tensors": "float32[4] cc"}, True), ("worse", {"ledger": 8.0}, False), ("same", {"ledger": 8.0}, True)],
)
def test_arms_of_other_data_begin_with_the_same_values_all_the_same(of, options, refused, experiment):
    """Groups are of data: a contrast over two of them still has the values at step 0 in common."""
    folder, add = experiment
    known = yaml.safe_load((folder / "prereg.yaml").read_text())
    (folder / "prereg.yaml").write_text(yaml.safe_dump({**known, "same_data": [["worse"], ["base", "same", "noisy", "less"]]}))
    shutil.rmtree(folder / "runs")
    for arm in known["arms"]:
        changed = options if arm == of else {}
        for seed in range(8):
            add(arm, seed, 3 + seed / 10, **{"registration": load_registration("known").hash(), **changed})
    with pytest.raises(DataError, match="these runs do not belong together") if refused else contextlib.nullcontext():
        the()


def test_other_data_may_come_of_a_file_with_another_name(experiment):
    _, add = experiment
    add("base", 3, 3.0, settings={"data_fingerprint": "f"})
    for fingerprint, said in (("f", "\n"), ("g", "; the text, the names of its files or the tokenizer differ\n")):
        path = add("worse", 3, 3.0, ledger=8.0, settings={"data_fingerprint": fingerprint})
        with pytest.raises(DataError, match=rf"{path.name}: saw other data than base of seed 3, from step 50 on or before{said}"):
            the()


def test_arms_that_differ_in_how_they_begin_share_their_data_alone(experiment):
    _, add = experiment
    model = {"dims": {"mlp": 8, "kv_heads": 2}, "init": {"std": 0.02}}
    for seed in range(8):
        path = add("noisy", seed, 3.0, tensors="float32[4] cc", settings={"model": model})
    the()
    add("noisy", 7, 3.0, tensors="float32[4] cc", ledger=8.0, settings={"model": model})
    with pytest.raises(DataError, match=re.escape(f"{path.name}: saw other data than base of seed 7, from step 50")):
        the()


def test_an_arm_whose_settings_are_not_those_of_the_others(experiment):
    """A learning rate that was not found by tuning is refused, even if all runs of the arm have it; what else differs is on the page."""
    _, add = experiment
    settings = {"train": {"steps": 200}, "optimizer": {"weight_decay": 9}}
    for seed in range(8):
        add("worse", seed, 3.0 + seed / 10, steps=200, settings=settings)
    page = the().files[0].read_text()
    assert "| worse | train.steps: 100 -> 200; optimizer: None -> {'weight_decay': 9} |\n| same |  |" in page
    for seed in range(8):
        path = add("worse", seed, 3.0 + seed / 10, settings={"schedule": {"peak": 0.0005}})
    with pytest.raises(DataError, match=f"{path.name}: its learning rate is 0.0005, and 0.002 was found for its arm"):
        the()


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        ([0], [0]),  # the first is no measure
        ([5, 7], [5, 7]),
        ([0, 1, 2, 3], range(8)),
    ],
)
def test_of_an_arm_those_are_named_that_are_not_as_most_are(odd, named, experiment):
    _, add = experiment
    for seed in odd:
        add("worse", seed, 3.0 + seed / 10, settings={"model": {"dims": {"mlp": 9, "kv_heads": 2}}})
    with pytest.raises(DataError, match="other settings than") as found:
        the()
    lines = [line for line in str(found.value).splitlines() if "other settings" in line]
    assert [re.findall(r"_(\d)\.jsonl.*model\.dims\.mlp: (.*)", line)[0] for line in lines] == [
        (str(seed), "8 -> 9" if seed in odd else "9 -> 8") for seed in named
    ]


def test_data_and_tokenizer_of_an_arm_may_lie_elsewhere_if_a_fingerprint_says_that_they_are_the_same(experiment):
    _, add = experiment

    def settings(place, **data):
        components = {"a": {"path": f"{place}/a", "verify": None}}
        return {"data": {"path": place, "components": components}, "tokenizer": {"path": f"{place}/tokenizer"}, **data}

    for seed in range(8):
        add("worse", seed, 3.0 + seed / 10, settings=settings("there" if seed > 4 else "here", data_fingerprint="f"))
    the()
    add("worse", 7, 3.7, settings=settings("here", data_fingerprint="g"))
    with pytest.raises(DataError, match=r"other settings than most .*: data_fingerprint: f -> g"):
        the()
    for seed in range(8):
        add("worse", seed, 3.0 + seed / 10, settings=settings("there" if seed > 4 else "here"))
    with pytest.raises(DataError, match=r"data\.path: here -> there; data\.components\.a\.path: here/a -> .*; tokenizer\.path"):
        the()


def test_what_changes_nothing_that_is_computed_may_differ_in_an_arm(experiment):
    _, add = experiment

    def settings(meters=(), microbatch_size=None, max_withheld=3, dropout=0.0):
        train = {"steps": 100, "meters": list(meters), "microbatch_size": microbatch_size}
        model = {"dims": {"mlp": 8, "kv_heads": 2}, "dropout": dropout}
        return {"train": train, "guard": {"max_withheld": max_withheld}, "model": model}

    for seed in range(8):
        add("worse", seed, 3.05 + seed / 10, settings=settings())
        add("noisy", seed, 3.05 + seed / 10, settings=settings(dropout=0.1))
    path = add("worse", 3, 3.95, settings=settings(["update_norm"], 4, 9))
    the()
    add("noisy", 3, 3.95, settings=settings(["update_norm"], 4, 9, dropout=0.1))
    with pytest.raises(DataError, match=r"train\.microbatch_size: None -> 4\n"):  # which activations are dropped depends on it
        the()
    add("noisy", 3, 3.95, settings=settings(dropout=0.1))
    add("worse", 3, float("nan"), settings=settings(max_withheld=9))
    the()  # the others, which came through with 3, would with 9
    add("worse", 3, float("nan"), settings=settings(max_withheld=2))
    with pytest.raises(DataError, match=rf"{path.name}: .*guard\.max_withheld: 3 -> 2"):
        the()


def test_runs_of_older_code_lack_newer_settings_and_are_not_refused_for_it(experiment):
    _, add = experiment
    add("worse", 3, 3.95, settings={"train": {"steps": 100}, "new": {"setting": 1}})
    assert "First: worse" in the().words


def test_a_damaged_run_is_named(experiment):
    folder, _ = experiment
    path = folder / "runs/final/1m/base/0.002_0.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"0\.002_0"):
        the()


def test_the_files(experiment):
    """The page stands alone: no address of a script, a picture or a style."""
    folder, _ = experiment
    markdown, page = (path.read_text() for path in the().files)
    for picture in re.findall(r"\]\((.*?)\)", markdown):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert {"differences.png", "dose.png", "positions.png"} <= {path.name for path in folder.iterdir()}
    assert "| first | 8 |" in markdown
    assert "| 0, 1, 2, 3, 4 | cpu | 0123456789ab (code c1) | 3.11.7 | 0.10.2 |\n" in markdown
    assert "| 5, 6, 7 | H100 | 0123456789ab-dirty (code c2), lab fedcba987654 | 3.11.7 | 0.10.2 |\n" in markdown
    assert markdown.count("changed between these runs") == 1
    assert page.count("<svg") == 3
    assert "loss less that of base" in page  # of the picture over a dose
    assert not re.search(r"""(src|href)=["'](?!#)""", page.replace("xlink:", ""))
    used, given = set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)), re.findall(r' id="([^"]+)"', page)
    assert used <= set(given)
    assert len(given) == len(set(given))


def test_tuning_finds_the_rate_of_each_arm(experiment):
    folder, add = experiment
    for arm, best in (("base", 0.002), ("worse", 0.004)):
        for peak in (0.001, 0.002, 0.004):
            for seed in (10, 11):
                add(arm, seed, 4 + abs(peak - best) * 10, stage="tune", peak=peak)
    add("base", 10, 1.0, stage="tune", peak=0.008)  # at a rate, of a seed and an arm that nobody registered
    add("base", 12, 1.0, stage="tune", peak=0.001)
    add("noisy", 10, 1.0, stage="tune", peak=0.001)
    path = add("worse", 10, 4.0, stage="tune", peak=0.001, ledger=8.0)
    with pytest.raises(DataError, match="saw other data than base of seed 10"):
        the("stage=tune")
    add("worse", 10, 4.03, stage="tune", peak=0.001)
    again = path.with_name("zz.jsonl.gz")
    again.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=rf"worse at 0\.001 \(seed 10\) has a record already: .*/{path.name}"):
        the("stage=tune")
    again.unlink()
    words = the("stage=tune").words
    assert yaml.safe_load((folder / "tuned.yaml").read_text()) == {"1m": {"base": 0.002, "worse": 0.004}}
    assert "worse, 0.004, is the highest registered" in words
    assert "does not ask for them: base at 0.001 (seed 12), base at 0.008 (seed 10), noisy at 0.001 (seed 10)" in words
    assert (tuned("known", "1m", "worse"), tuned("known", "1m", "noisy")) == (0.004, 0.002)  # one of its own, and that of the first
    (folder / "tuned.yaml").write_text("1m: {base: 0.002, worse: 0.002}")  # that of the final runs here
    assert "worse, 0.004, is the highest registered" in the().files[0].read_text()
    next((folder / "runs/tune/1m/base").iterdir()).unlink()
    assert "no rate is chosen for it" in the("stage=tune").words
    for peak in (0.001, 0.002, 0.004):
        add("base", 10, 4.0, stage="tune", peak=peak)
        add("base", 11, 4.0, stage="tune", peak=peak, steps=60)
    assert "at every rate a run of base ended without finite numbers: no rate is chosen for it" in the("stage=tune").words


def test_a_run_whose_arm_is_not_tuned_is_told_what_comes_first(tmp_path, monkeypatch):
    (tmp_path / "experiments/norm").mkdir(parents=True)
    (tmp_path / "experiments/norm/prereg.yaml").write_text((ROOT / "experiments/norm/prereg.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as found:
        load_config("experiment=norm")
    assert str(found.value).splitlines() == [
        "error: rms has no learning rate at 1m yet",
        "where: experiments/norm/tuned.yaml",
        "next: python -m llama_eqx.train -m experiment=norm stage=tune, then python -m llama_eqx.report with the same",
    ]


def test_an_experiment_without_tuning_has_one_rate(experiment):
    folder, add = experiment
    known = yaml.safe_load((folder / "prereg.yaml").read_text())
    (folder / "prereg.yaml").write_text(yaml.safe_dump({**known, "tune_arms": [], "tune_seeds": [], "rates": [0.003]}))
    (folder / "tuned.yaml").write_text("1m: {worse: 0.001}")
    assert (tuned("known", "1m", "base"), tuned("known", "1m", "worse")) == (0.003, 0.001)
    for arm in known["arms"]:
        for seed in range(8):
            settings = {"schedule": {"peak": tuned("known", "1m", arm)}}
            add(arm, seed, 3.0 + (arm == "less"), registration=load_registration("known").hash(), settings=settings)
    assert "Second: no effect" in the().words
    with pytest.raises(ConfigError, match="no tune_arms are registered") as found:
        registered("known", "tune_arms")
    assert found.value.next == "python -m llama_eqx.train -m experiment=known, without stage=tune"
    (folder / "tuned.yaml").unlink()
    assert tuned("known", "1m", "worse") == 0.003


def test_data_that_cannot_be_held_out_for_tuning_is_told_what_can(monkeypatch):
    monkeypatch.chdir(ROOT)
    prepared = ["experiment=norm", "experiment/norm=rms", "data=prepared", "data.path=shards", "~data.validation_fraction"]
    load_config(*prepared)  # whose own validation split serves
    with pytest.raises(ConfigError, match="stage=tune holds out a part of the training text, and this data is no text") as found:
        load_config(*prepared, "stage=tune")
    assert "or '~data.holdout', and" in found.value.next
    load_config(*prepared, "stage=tune", "~data.holdout")
    with pytest.raises(ConfigError, match="no such key: holdout"):  # which is no matter of tuning
        load_config(*prepared, "+data.holdout=tuning")


def test_what_is_not_there(experiment):
    folder, _ = experiment
    (folder / "tuned.yaml").unlink()
    with pytest.raises(ConfigError, match="has no learning rate"):
        the()
    with pytest.raises(ConfigError, match="has no learning rate"):
        tuned("known", "1m", "base")
    with pytest.raises(DataError, match="stage=tune"):
        the("stage=tune")
    with pytest.raises(ConfigError, match="not registered yet"):
        registered("unknown", "arms")
    with pytest.raises(ConfigError, match="an experiment or of runs"):
        load_config(name="report")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"contrasts": {"a": {"worse": 1, "base": -0.5}}}, "sum to 0.5"),
        ({"contrasts": {"a": {"worse": 1, "bass": -1}}}, "did you mean base?"),
        ({"rates": [0.002, 0.001, 0.004]}, "rising"),
        ({"tune_arms": []}, "without tune_arms every arm takes one rate"),
        ({"same_data": [["base", "worse"], ["noisy"]]}, "same, less in no group"),
        ({"margin": "small"}, "wanted float"),
        ({"metric": "val/accuracy"}, "val/accuracy is no loss in nats per token"),
        ({"metric": "val/bits_per_byte"}, "val/bits_per_byte is no loss in nats per token"),
        ({"metric": "train/loss"}, "train/loss is no loss in nats per token"),
        ({"rule": {"equivalence": "tost", "difference": "paired_t", "confirmation": "sign_flip", "adjustment": "none"}}, "one of: holm"),
        ({"rule": {"equivalence": "tost"}}, "missing: difference, confirmation, adjustment\nwhere: experiments/known/prereg.yaml: rule"),
        ({"rule": "tost"}, "prereg.yaml: rule"),
        ({"doses": ..., "margin": ...}, "missing: margin, doses\nwhere: experiments/known/prereg.yaml\nnext: add margin: …, doses: {};"),
        ({"seed": 1}, "seed"),
    ],
)
def test_a_registration_that_contradicts_itself(change, said, experiment):
    folder, _ = experiment
    known = yaml.safe_load((folder / "prereg.yaml").read_text())
    changed = {name: value for name, value in {**known, **change}.items() if value is not ...}
    (folder / "prereg.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(ConfigError) as found:
        load_registration("known")
    assert said in str(found.value)


def test_a_metric_that_was_not_evaluated_is_no_divergence(experiment):
    folder, add = experiment
    known = yaml.safe_load((folder / "prereg.yaml").read_text())
    (folder / "prereg.yaml").write_text(yaml.safe_dump({**known, "metric": "val/code/loss"}))
    for seed in range(8):
        for arm in known["arms"]:
            path = add(arm, seed, 3.0, registration=load_registration("known").hash())
    said = rf"{path.name}: val/code/loss was not evaluated, only val/loss, val/bits_per_byte, val/loss_at_1, val/loss_at_64\n"
    with pytest.raises(DataError, match=said):
        the()
    (folder / "prereg.yaml").write_text(yaml.safe_dump({**known, "metric": "val/loss_at_64"}))
    for seed in range(8):
        for arm in known["arms"]:
            add(arm, seed, 3.0, registration=load_registration("known").hash())
    assert "Second: no effect" in the().words


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*/prereg.yaml")), ids=lambda path: path.parent.name)
def test_it_is_said_how_many_runs_are_there(path):
    found = load_registration(path.parent.name)
    registered = {"tune": len(found.tune_arms) * len(found.rates) * len(found.tune_seeds), "final": len(found.arms) * len(found.seeds)}
    there = {stage: len(list((path.parent / "runs" / stage).rglob("*.jsonl.gz"))) for stage in registered}
    said = f"{there['tune']} of {registered['tune']} | {there['final']} of {registered['final']} |"
    assert re.search(rf"\[{path.parent.name}\]\(.*?\) \| {re.escape(said)}", (ROOT / "experiments/README.md").read_text())


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*/report_*.md")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_verdict_that_is_told_is_that_of_the_runs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    question, rung = path.parent.name, path.stem.removeprefix("report_")
    registration, runs = load_registration(question), kept(question, "final", rung)
    check(runs, registration)
    complete(runs, registration)
    words = in_words(findings(runs, registration), registration)
    assert words in path.read_text()
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


def test_the_registration_in_the_guide(tmp_path, monkeypatch):
    """It is one as it stands there, and the guide says how many runs it asks for. What an arm sets comes last."""
    monkeypatch.chdir(tmp_path)
    guide = (ROOT / "docs/experiments.md").read_text()
    assert re.search(r"- _study\n +- _self_.*\n +- /experiment/low_rank: gated\n", guide)
    block = re.search(r"```yaml\n( +question: .*?)```", guide, re.S)
    assert block is not None
    (tmp_path / "experiments/low_rank").mkdir(parents=True)
    (tmp_path / "experiments/low_rank/prereg.yaml").write_text(textwrap.dedent(block[1]))
    found = load_registration("low_rank")
    assert f"# {len(found.tune_arms) * len(found.rates) * len(found.tune_seeds)} runs" in guide
    assert f"# {len(found.arms) * len(found.seeds)} runs" in guide


def test_the_hash_is_of_what_is_said_and_not_of_how_it_is_written(experiment):
    folder, _ = experiment
    before, text = load_registration("known").hash(), (folder / "prereg.yaml").read_text()
    (folder / "prereg.yaml").write_text("# a comment\n" + text)
    assert load_registration("known").hash() == before
    (folder / "prereg.yaml").write_text(text.replace("margin: 0.01", "margin: 0.02"))
    assert load_registration("known").hash() != before


def test_the_hash_covers_the_rule(experiment):
    """Code that judges in another way names it otherwise, and then the runs are no longer those of this registration."""
    registration = load_registration("known")
    before = registration.hash()
    object.__setattr__(registration.rule, "adjustment", "none")  # a word that no code knows yet
    assert registration.hash() != before


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_is_drawn_without_a_network(experiment, tmp_path):
    (_, page) = the().files
    shot, said = tmp_path / "page.png", tmp_path / "said.txt"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-breakpad", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=900,2400", f"--screenshot={shot}", page.resolve().as_uri()]
    with said.open("w") as output:  # not a pipe: helpers that outlive Chromium would keep it open, and be waited for
        browser = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = browser.wait(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
    assert code == 0, said.read_text()
    pixels = matplotlib.image.imread(shot)
    colors = {tuple(color) for color in (pixels[::2, ::2, :3].reshape(-1, 3) * 255).round().astype(int).tolist()}
    assert {tuple(bytes.fromhex(VERDICTS[verdict][1:])) for verdict in ("worse", "no effect", "undecided")} <= colors


def test_any_two_runs_side_by_side(tmp_path, monkeypatch):
    """What differs in their settings, where their losses part, and by how much the second is worse."""
    monkeypatch.chdir(tmp_path)
    for name, b2, extra in (("a", 0.95, 0.0), ("b", 0.9, 0.25), ("other", 0.95, 0.0)):
        folder = tmp_path / "outputs" / name
        folder.mkdir(parents=True)
        write_config({"seed": 0, "optimizer": {"b2": b2}, "run_dir": str(folder)}, folder)
        ledger = 5.0 if name == "other" else 4.0
        records = [{"step": step, "train/loss": 9.0 - step + extra * (step > 2), "data/ledger": ledger} for step in range(1, 9)]
        records[0] |= {"perf/tokens_per_second": 5.0, "optim/grad_norm": 1.0, "optim/lr": 0.1}
        records.append({"step": 8, "val/loss": 3.0 + extra})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "sample.txt").write_text(f"written by {name} <b>\n")
        (folder / "provenance.jsonl").write_text(json.dumps({"step": 0, "code": {"llama_eqx": "c2" if name == "b" else "c1"}}) + "\n")

    def of(*names):
        return report(load_config(f"runs=[{','.join(f'outputs/{name}' for name in names)}]", name="report"))

    written = of("a", "b")
    assert "a -> b: 1 setting differs. Their training losses differ from step 3 on." in written.words
    assert "On the same batches the second is 0.2500 nats per token worse over the last 2 of 8 records" in written.words
    assert "Validation at step 8: the second is 0.2500 nats per token worse" in written.words
    markdown, page = (path.read_text() for path in written.files)
    assert "optimizer.b2: 0.95 -> 0.9" in markdown
    assert "written by b &lt;b&gt;" in page
    assert "learning rate" in page
    assert "optim/lr" not in page
    assert "They were made by other code of llama_eqx (c1 and c2)." in written.words
    assert "other code" not in of("a", "other").words
    assert "different data by step 1" in of("a", "other").words
    assert "equal to the last bit" in of("a", "other").words
    with (tmp_path / "outputs/other/provenance.jsonl").open("a") as file:
        file.write('{"a": 1')
    with pytest.raises(DataError, match=r"no record of a start\nwhere: .*other/provenance\.jsonl:2\nnext: remove the line"):
        of("a", "other")
