"""The loop from text to checkpoint: what it leaves behind, and that an interrupted run is the run uninterrupted."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from llama_eqx import generate_tokens, load_config, load_pretrained
from llama_eqx.checkpoint.save import Checkpoints
from llama_eqx.errors import CheckpointError, NonFiniteError, StorageError
from llama_eqx.flops import flops_per_token
from llama_eqx.tracking import tracker
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.starts import read_starts
from llama_eqx.training.loop import train

TEXT = pathlib.Path(__file__).parents[1] / "golden" / "text.md"


def config(run_dir, *overrides):
    sizes = {"layers": 2, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}
    return load_config(
        *(f"model.dims.{axis}={size}" for axis, size in sizes.items()),
        *("data=text", f"data.path={TEXT}", "tokenizer=bytes", "tracking.wandb.mode=disabled", f"run_dir={run_dir}"),
        *("train.steps=8", "train.batch_size=8", "train.seq_len=32", "train.log_every=1", "train.eval_every=4"),
        *("train.sample_tokens=8", "checkpoint.every=3", "schedule.warmup_steps=2", "model.dropout=0.1"),
        *overrides,
    )


def records(run_dir):
    timed = ("perf/", "data/starved")
    return [{k: v for k, v in record.items() if not k.startswith(timed)} for record in read_metrics(run_dir / "metrics.jsonl")]


def leaves(run_dir):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_pretrained(run_dir))]


@pytest.fixture(scope="module")
def samples():
    """The step and the text of each sample of the run that is `finished`."""
    return []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, samples):
    def sample(self, step, text):
        samples.append((step, text))
        kept(self, step, text)

    run_dir, kept = tmp_path_factory.mktemp("run") / "a", tracker.Tracker.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker.Tracker, "sample", sample)
        return train(config(run_dir))


def test_a_sample_is_written_at_every_evaluation(finished, samples):
    assert [step for step, _ in samples] == [4, 8]
    assert samples[1][1] == finished.sample == (finished.run_dir / "sample.txt").read_text()[:-1]


def test_everything_is_in_the_run_directory(finished):
    assert {"config.yaml", "tokenizer", "metrics.jsonl", "loss.png", "checkpoints"} <= {path.name for path in finished.run_dir.iterdir()}
    assert finished.checkpoint.is_dir()
    losses = [record["train/loss"] for record in records(finished.run_dir) if "train/loss" in record]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    evaluated = [record for record in records(finished.run_dir) if "val/loss" in record]
    assert [(record["step"], record["tokens"]) for record in evaluated] == [(4, 4 * 256), (8, 8 * 256)]  # W&B draws them over tokens
    model = load_pretrained(finished.checkpoint)
    per_token = flops_per_token(model, 32).causal
    assert {record["flops"] / record["tokens"] for record in records(finished.run_dir)} == {per_token}
    assert read_starts(finished.run_dir / "provenance.jsonl")[0]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(model))
    assert finished.evaluation.loss == evaluated[-1]["val/loss"]
    bits = finished.evaluation.loss / np.log(2)  # bytes are tokens here, but for BOS and EOS
    assert finished.evaluation.bits_per_byte == pytest.approx(bits, rel=0.02)


def test_the_checkpoint_generates(finished):
    model = load_pretrained(finished.checkpoint)
    generation = generate_tokens(model, [[256, 65], [256]], max_new_tokens=4)
    assert [len(row) for row in generation.tokens] == [4, 4]


def test_an_interrupted_run_ends_the_same(finished, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "b"
    log = tracker.Tracker.log

    def interrupted(self, step, metrics):
        if step == 8:
            raise KeyboardInterrupt
        log(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(tracker.Tracker, "log", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config(run_dir))
    assert records(run_dir)[-1]["step"] == 7
    (run_dir / "checkpoints/6/model/manifest.ocdbt").write_bytes(b"not what was written")
    train(config(run_dir))
    said = capsys.readouterr().err
    assert "warning: step 6 is damaged: model/manifest.ocdbt: " in said
    assert "; step 3 is used\nresumed from step 3 of 8" in said
    assert ": the same command reproduces it" in said
    assert records(run_dir) == records(finished.run_dir)
    for a, b in zip(leaves(run_dir), leaves(finished.run_dir), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_only_reports(finished, capsys):
    again = train(config(finished.run_dir))
    assert again.evaluation == finished.evaluation
    assert again.sample == finished.sample
    assert "is lost" not in capsys.readouterr().err
    before = (finished.run_dir / "config.yaml").read_text()
    assert train(config(finished.run_dir, "train.steps=2")).checkpoint == finished.checkpoint
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")] == [
        "warning: train.steps=2 changes nothing: this run is trained to step 8 already, with train.steps=8"
    ]
    assert (finished.run_dir / "config.yaml").read_text() == before


def test_records_that_a_checkpoint_outlived_are_said_to_be_lost(finished, tmp_path, capsys):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    record = tmp_path / "run" / "metrics.jsonl"
    record.write_text("".join(line for line in record.read_text().splitlines(keepends=True) if json.loads(line)["step"] < 6))
    train(config(tmp_path / "run"))
    said = (
        "metrics.jsonl ends at step 5: what was recorded from there to step 8 is lost, unless it is where this checkpoint was copied from"
    )
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("change", ["seed=1", "train.seq_len=16", "optimizer.b2=0.9", "model.dims.mlp=64", "data.holdout=tuning"])
def test_another_run_is_refused(finished, change, tmp_path):
    with pytest.raises(CheckpointError, match="another run"):
        train(config(finished.run_dir, change))
    shutil.copytree(finished.run_dir / "checkpoints", tmp_path / "checkpoints")  # and nothing else
    with pytest.raises(CheckpointError, match="another run") as error:
        train(config(tmp_path, change))
    assert f"{change.partition('=')[0]}: " in error.value.what
    assert error.value.where == str(tmp_path / "checkpoints/8/manifest.json")


def test_numbers_that_are_not_finite_end_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match="3 steps in a row") as error:
        train(config(tmp_path / "run", "schedule.peak=1e38", "optimizer.clip_norm=1e30"))
    assert "another run_dir" in error.value.next  # this one keeps to its schedule.peak


def test_a_last_save_that_fails_ends_the_run(tmp_path, monkeypatch):
    """The disk fills up during training. The record comes to the disk before a checkpoint of what it tells."""
    happened = []

    def room(self, parts):
        happened.append("room")
        if len(happened) > 1:  # the first time is before the run
            raise StorageError("there is no room for a checkpoint")

    monkeypatch.setattr(Checkpoints, "require_room", room)
    monkeypatch.setattr(tracker.Tracker, "sync", lambda self: happened.append(records(tmp_path / "run")[-1]["step"]))
    with pytest.raises(StorageError, match="step 1 could not be saved: there is no room for a checkpoint") as error:
        train(config(tmp_path / "run", "train.steps=1"))
    assert error.value.kept == "no checkpoint yet"
    assert happened == ["room", 1, "room"]


def test_an_offset_of_positions_changes_losses_by_rounding_only(finished, tmp_path):
    train(config(tmp_path / "run", "data.position_offset=100_000"))
    for name in ("train/loss", "val/loss"):
        plain, shifted = ([record[name] for record in records(run) if name in record] for run in (finished.run_dir, tmp_path / "run"))
        assert shifted != plain
        assert shifted == pytest.approx(plain, abs=2e-4)
    ledgers = [[r["data/ledger"] for r in records(run) if "data/ledger" in r] for run in (finished.run_dir, tmp_path / "run")]
    assert ledgers[0] == ledgers[1]
