"""What makes arms comparable: sizes that match, values that are the same at step 0, and data that is."""

import contextlib
import dataclasses
import gzip
import itertools
import json
import os
import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from llama_eqx import load_config
from llama_eqx.config import dump
from llama_eqx.data.order import Order
from llama_eqx.errors import DataError
from llama_eqx.model.llama import Llama
from llama_eqx.model.rotary import PlainRotary
from llama_eqx.studies.matching import cost, matched, residual
from llama_eqx.studies.pairing import STUDY, diverged, in_the_way, is_kept, keep, kept_at, position_codes, record_start, tensor_hashes
from llama_eqx.studies.registration import load_registration
from llama_eqx.studies.runs import read_kept
from llama_eqx.training.identity import finished, write_config
from llama_eqx.training.meters import dead_updates
from llama_eqx.training.run import RunConfig

ROOT = pathlib.Path(__file__).parents[2]
QUESTIONS = sorted(path.parent.name for path in ROOT.glob("experiments/*/prereg.yaml"))


def experiment(question, arm, *overrides) -> RunConfig:
    settings = ["stage=tune", "model.dims.vocab=64", *overrides]
    return load_config(f"experiment={question}", f"experiment/{question}={arm}", *settings)


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_registered_arm_is_an_option_of_its_name(question):
    registration = load_registration(question)
    for arm in registration.arms:
        assert yaml.safe_load((ROOT / f"conf/experiment/{question}/{arm}.yaml").read_text())["study"]["arm"] == arm
    _, own, arm, *_ = yaml.safe_load((ROOT / f"conf/experiment/{question}.yaml").read_text())["defaults"]
    assert (own, list(arm)) == ("_self_", [f"/experiment/{question}"])  # what all share does not cancel what an arm says
    study = experiment(question, registration.arms[-1]).study
    assert study is not None
    assert (study.arm, study.question, study.registration) == (registration.arms[-1], question, registration.hash())


@pytest.mark.parametrize(("kind", "option"), [("parameters", "plain"), ("flops", "gated")])
def test_matching_finds_the_width(kind, option):
    """Two projections of 576 are three of 384."""
    config = matched(experiment("ffn", "relu", f"model/feed_forward={option}", f"study.match={kind}", "model.dims.mlp=7"))
    assert config.model.dims.mlp == {"plain": 576, "gated": 384}[option]
    assert residual(config) == 0


def test_what_cannot_be_matched_exactly_leaves_a_residual():
    """Multi-query attention has fewer parameters, which go into the feed-forward as nearly as whole widths allow."""
    config = matched(experiment("attention", "multi_query"))
    left = residual(config)
    assert left is not None
    assert config.model.dims.mlp > 384
    assert 0 < abs(left) < 3 * 128 / 2 * 4 / cost(config.model, "parameters", 128)
    assert residual(experiment("rotary_precision", "table_0")) is None


@pytest.fixture(scope="module")
def models(tiny):
    def build(*overrides: str) -> Llama:
        return eqx.filter_jit(tiny(*overrides).build)(key=jax.random.key(0))

    return build


def test_arms_share_the_values_of_the_tensors_that_they_share(models):
    gated, plain = tensor_hashes(models()), tensor_hashes(models("model/feed_forward=plain"))
    assert gated.keys() - plain.keys() == {"blocks.feed_forward.gate_proj"}
    assert all(gated[name] == plain[name] for name in plain)


def test_a_hash_sees_every_bit_and_place(models):
    model = models()
    before = tensor_hashes(model)

    def changed(edit):
        after = tensor_hashes(eqx.tree_at(lambda m: m.embed, model, edit(model.embed)))
        return [name for name in before if before[name] != after[name]]

    assert changed(lambda x: x) == []
    assert changed(lambda x: x.at[3, 4].set(jnp.nextafter(x[3, 4], jnp.inf))) == ["embed"]
    assert changed(lambda x: x[::-1]) == ["embed"]
    assert changed(lambda x: x.at[0, :2].set(x[0, 1::-1][:2])) == ["embed"]


@pytest.mark.parametrize(
    ("round_at", "offset", "length", "codes"),
    [
        ("none", 7936, 128, 128),
        ("table", 7936, 128, 128),
        ("inv_freq", 7936, 128, 128),
        # Integers up to 256 are exact in bfloat16, and then go in steps of 2, 4, 8, …: 257 + 128 log2(length / 256) of them.
        ("position", 0, 128, 128),
        ("position", 0, 4096, 769),
        ("position", 7936, 128, 5),
        ("position", 65536, 128, 1),
    ],
)
def test_distinct_position_codes(round_at, offset, length, codes):
    rotary = PlainRotary(theta=5e5, head_dim=32, round_at=round_at)
    assert position_codes(rotary, offset + jnp.arange(length)) == codes


def test_repeated_rows_are_the_first_of_those_drawn_once():
    """An arm of 16 epochs sees a sixteenth of what an arm of one sees, each row as often as any other, in new orders."""
    once, again = Order([1000], [1], 3), Order([1000], [1], 3, distinct=50)
    rows = again(np.arange(150)).reshape(3, 50)
    assert all(sorted(epoch) == sorted(once(np.arange(50)).tolist()) for epoch in rows.tolist())
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 3
    assert (again.epochs(25), again.epochs(50), again.epochs(150)) == ([0.025], [0.05], [0.15])


def test_dead_updates():
    """1 has steps of 2^-7 above it in bfloat16, and of 2^-8 below: an update of a quarter is lost, one of more than half is not."""
    values = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0])
    updates = jnp.array([0.25, 0.75, -0.75, 0.0, 1e-9]) / 128
    assert float(dead_updates({"a": values}, {}, {"a": updates})) == pytest.approx(2 / 5)


def test_what_a_run_leaves_is_kept_and_read(tmp_path, monkeypatch, models):
    asked = experiment("ffn", "silu", "model.dims.layers=1", f"run_dir={tmp_path / 'run'}")
    config = matched(asked)
    assert config.model.dims.mlp != asked.model.dims.mlp
    folder = tmp_path / "experiments" / "ffn"
    folder.mkdir(parents=True)
    (folder / "prereg.yaml").write_text((ROOT / "experiments/ffn/prereg.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    record_start(config, config.model.build(key=jax.random.key(0)), 0)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2000))
    write_config(dump(longer), tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "val/loss": "NaN"}\n')
    (tmp_path / "run" / "provenance.jsonl").write_text('{"step": 0}\n{"st')
    with pytest.raises(DataError, match=r"run/provenance\.jsonl:2\nnext: remove the line"):
        keep(config)
    (tmp_path / "run" / "provenance.jsonl").write_text(json.dumps({"step": 0, "commit": "abc"}) + "\n")
    assert keep(config) == f"filed in {kept_at(config)}"
    run = read_kept(folder / "runs/tune/1m/silu" / kept_at(config).name)
    assert np.isnan(run.metrics[0]["val/loss"])
    assert run.study == json.loads((tmp_path / "run" / STUDY).read_text())
    assert run.study["residual"] is not None
    assert not finished(config)
    assert not is_kept(config)  # it was to be longer

    write_config(dump(config), tmp_path / "run")
    half = kept_at(config).read_bytes()
    assert in_the_way(config) == kept_at(config)
    assert re.match(f"not filed: {kept_at(config)} has other settings.*{tmp_path / 'run'}", keep(config))
    assert [path.read_bytes() for path in kept_at(config).parent.iterdir()] == [half]
    kept_at(config).unlink()
    assert keep(config) == f"filed in {kept_at(config)}"
    assert is_kept(config)  # it ended as its numbers were not finite, and would again
    assert diverged(config) == kept_at(config)
    filed = kept_at(config).read_bytes()
    assert not is_kept(dataclasses.replace(config, guard=dataclasses.replace(config.guard, max_withheld=99)))
    assert not is_kept(longer)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1000, "val/loss": 3.0}\n')
    assert re.match(f"not filed: {kept_at(config)} has the same settings.*{tmp_path / 'run'}", keep(config))
    assert kept_at(config).read_bytes() == filed
    kept_at(config).unlink()
    keep(config)
    assert is_kept(config)
    assert in_the_way(config) is None
    assert not is_kept(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1)))  # it was longer
    assert diverged(config) is None
    assert is_kept(dataclasses.replace(config, guard=dataclasses.replace(config.guard, max_withheld=99)))
    assert is_kept(asked)  # whose width is yet to be matched
    assert str(tmp_path) not in gzip.decompress(kept_at(config).read_bytes()).decode()
    tokens = dataclasses.replace(config.model.tokens, bos=1, eos=(2,))
    write_config(dump(dataclasses.replace(config, model=dataclasses.replace(config.model, tokens=tokens))), tmp_path / "run")
    kept_at(config).unlink()
    keep(config)
    assert is_kept(config)  # those of the tokenizer, once it is read
    for other in ({"init_from": "weights"}, {"train": dataclasses.replace(config.train, distinct_rows=7)}):
        write_config(dump(dataclasses.replace(config, **other)), tmp_path / "run")
        kept_at(config).unlink()
        keep(config)
        assert not is_kept(config)
    write_config(dump(config), tmp_path / "run")
    kept_at(config).unlink()
    keep(config)
    assert not is_kept(dataclasses.replace(config, seed=9))
    assert not is_kept(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.2)))


@pytest.mark.parametrize("change", ["registration", "registration, and no rate yet", "rate", "damage"])
def test_a_record_that_may_not_be_compared_any_more_makes_room(change, tmp_path, monkeypatch):
    folder, run_dir = tmp_path / "experiments" / "ffn", tmp_path / "run"
    folder.mkdir(parents=True)
    for name in ("prereg.yaml", "tuned.yaml"):
        (folder / name).write_bytes((ROOT / "experiments/ffn" / name).read_bytes())
    monkeypatch.chdir(tmp_path)

    def given() -> RunConfig:
        rate = ["schedule.peak=0.004"] if "no rate" in change else []
        config = experiment("ffn", "silu", "stage=final", f"run_dir={run_dir}", *rate)
        write_config(dump(config), run_dir)
        return config

    run_dir.mkdir()
    for name, text in ((STUDY, "{}"), ("provenance.jsonl", ""), ("metrics.jsonl", '{"step": 1000, "val/loss": 3.0}\n')):
        (run_dir / name).write_text(text)
    path = kept_at(given())
    assert keep(given()) == f"filed in {path}"
    old = path.read_bytes()
    if "registration" in change:
        if "no rate" in change:
            (folder / "tuned.yaml").unlink()
        (folder / "prereg.yaml").write_text((folder / "prereg.yaml").read_text().replace("alpha: 0.05", "alpha: 0.01"))
    elif change == "rate":
        (folder / "tuned.yaml").write_text("1m: {swiglu: 0.5, silu: 0.5}")
    else:
        path.write_bytes(old := old[:-9])
    assert not is_kept(given())
    assert in_the_way(given()) is None
    assert keep(given()) == f"filed in {path}; what was there, and cannot be compared any more, is {path.name}.old1 now"
    assert path.with_name(f"{path.name}.old1").read_bytes() == old
    assert is_kept(given())


def test_a_run_is_kept_wherever_its_data_and_tokenizer_lie(tmp_path, monkeypatch):
    folder, run_dir = tmp_path / "experiments" / "ffn", tmp_path / "run"
    folder.mkdir(parents=True)
    run_dir.mkdir()
    (folder / "prereg.yaml").write_bytes((ROOT / "experiments/ffn/prereg.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)

    def given(place: str, fingerprint: str = "f") -> RunConfig:
        where = ["data=text", f"data.path={place}", "tokenizer=hf", f"tokenizer.path={place}"]
        config = experiment("ffn", "silu", *where, f"run_dir={run_dir}")
        write_config({**dump(config), "data_fingerprint": fingerprint}, run_dir)
        return config

    for name, text in ((STUDY, "{}"), ("provenance.jsonl", ""), ("metrics.jsonl", '{"step": 1000, "val/loss": 3.0}\n')):
        (run_dir / name).write_text(text)
    keep(given("here"))
    assert is_kept(given("there"))
    assert "has the same settings, and stays" in keep(given("there"))
    assert "has the same settings, but other data, and stays" in keep(given("there", "g"))


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("before", ["", "damaged"])
def test_of_two_that_file_at_once_one_stays(before, links, tmp_path, monkeypatch):
    """The other files between what this one looks at and what it writes."""
    folder, run_dir = tmp_path / "experiments" / "ffn", tmp_path / "run"
    folder.mkdir(parents=True)
    run_dir.mkdir()
    for name in ("prereg.yaml", "tuned.yaml"):
        (folder / name).write_bytes((ROOT / "experiments/ffn" / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    config = experiment("ffn", "silu", "stage=final", f"run_dir={run_dir}")
    write_config(dump(config), run_dir)
    for name, text in ((STUDY, "{}"), ("provenance.jsonl", ""), ("metrics.jsonl", '{"step": 1000, "val/loss": 3.0}\n')):
        (run_dir / name).write_text(text)
    path = kept_at(config)
    assert keep(config) == f"filed in {path}"
    theirs = path.read_bytes()
    path.unlink()
    if before:
        path.write_bytes(b"damaged")
    looked = []

    def look(config: RunConfig) -> pathlib.Path | None:
        found = in_the_way(config)
        if not looked:
            if before:
                path.rename(path.with_name(f"{path.name}.old1"))
            path.write_bytes(theirs)
        looked.append(found)
        return found

    monkeypatch.setattr("llama_eqx.studies.pairing.in_the_way", look)
    if not links:
        monkeypatch.setattr(os, "link", lambda old, new: os.stat(old / "no"))
    (run_dir / "metrics.jsonl").write_text('{"step": 1000, "val/loss": 4.0}\n')
    assert re.match(f"not filed: {path} has the same settings", keep(config))
    assert path.read_bytes() == theirs
    assert [file.read_bytes() for file in path.parent.iterdir() if file != path] == [b"damaged"] * bool(before)

    path.unlink()
    path.symlink_to("gone")
    assert re.match(f"not filed: {path} is a link", keep(config))
    path.unlink()
    assert keep(config) == f"filed in {path}"


def test_whatever_is_damaged_in_a_record_is_told_from_one(tmp_path):
    path = tmp_path / "seed_0.jsonl.gz"
    whole = gzip.compress(b'{"config": {"seed": 0}, "study": {}, "provenance": []}\n{"step": 1, "val/loss": 3.0}\n', mtime=0)
    path.write_bytes(whole)
    run = read_kept(path)
    for place, bit in itertools.product(range(len(whole)), range(8)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        with contextlib.suppress(DataError):
            assert read_kept(path) == run  # some bits say when and where it was compressed
    first = b'{"config": {}, "study": {}, "provenance": []}\n'
    for lines in (b"[]", b"{}", first + b"[]", first + b'{"a": null}'):
        path.write_bytes(gzip.compress(lines))
        with pytest.raises(DataError, match="no run that was kept"):
            read_kept(path)
