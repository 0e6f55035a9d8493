"""A registration and the learning rates that are tuned for it: what it is refused for, what its hash covers, and what is told of it."""

import pathlib
import re
import textwrap

import pytest
import yaml

from llama_eqx import load_config
from llama_eqx.errors import ConfigError, DataError
from llama_eqx.studies.registration import load_registration, registered, tuned
from llama_eqx.studies.report import report

ROOT = pathlib.Path(__file__).parents[2]


def the(*overrides):
    return report(load_config("experiment=known", *overrides, name="report"))


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
        ({"contrasts": {"a": {"worse": 0, "base": 0}}}, "none with a weight of 0"),  # all its differences would be 0, and so no effect
        ({"contrasts": {"a": {}}}, "none with a weight of 0"),
        ({"contrasts": {"a": {"worse": float("nan"), "base": 1}}}, "sum to nan"),
        ({"contrasts": {"again": {"worse": 1, "base": -1}}}, "again is there twice\nwhere: experiments/known/prereg.yaml: contrasts and c"),
        ({"seeds": [0, 0, 1, 2, 3, 4, 5]}, "0 is there twice"),
        ({"arms": ["base", "worse", "same", "noisy", "less", "base"]}, "base is there twice"),
        ({"alpha": 5.0}, "alpha must lie between 0 and 0.5"),
        ({"margin": 0.0}, "the margin above 0"),
        ({"rates": [0.002, 0.001, 0.004]}, "rising"),
        ({"rates": [0.001, 0.002]}, "three rates or more"),
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


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*/prereg.yaml")), ids=lambda path: path.parent.name)
def test_it_is_said_how_many_runs_are_there(path):
    found = load_registration(path.parent.name)
    registered = {"tune": len(found.tune_arms) * len(found.rates) * len(found.tune_seeds), "final": len(found.arms) * len(found.seeds)}
    there = {stage: len(list((path.parent / "runs" / stage).rglob("*.jsonl.gz"))) for stage in registered}
    said = f"{there['tune']} of {registered['tune']} | {there['final']} of {registered['final']} |"
    assert re.search(rf"\[{path.parent.name}\]\(.*?\) \| {re.escape(said)}", (ROOT / "experiments/README.md").read_text())


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
    known = yaml.safe_load(text)
    turned = dict(reversed({**known, "contrasts": dict(reversed(known["contrasts"].items()))}.items()))
    (folder / "prereg.yaml").write_text("# a comment\n" + yaml.safe_dump(turned, sort_keys=False))
    assert load_registration("known").hash() == before
    (folder / "prereg.yaml").write_text(text.replace("margin: 0.01", "margin: 0.02"))
    assert load_registration("known").hash() != before


def test_the_hash_covers_the_rule(experiment):
    """Code that judges in another way names it otherwise, and then the runs are no longer those of this registration."""
    registration = load_registration("known")
    before = registration.hash()
    object.__setattr__(registration.rule, "adjustment", "none")  # a word that no code knows yet
    assert registration.hash() != before
