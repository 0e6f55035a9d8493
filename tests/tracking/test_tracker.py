"""Who is told what; and that W&B can fail without harm."""

import io
import json
import re
import subprocess
import sys
from unittest.mock import Mock

import jax
import pytest

from llama_eqx.config import load
from llama_eqx.errors import ConfigError, StorageError
from llama_eqx.tracking.console import Console
from llama_eqx.tracking.provenance import commit, extension_commits, versions
from llama_eqx.tracking.starts import read_starts
from llama_eqx.tracking.tracker import Tracker, TrackingConfig

WANDB = {
    "mode": "disabled",
    "project": "test",
    "entity": None,
    "group": None,
    "job_type": None,
    "tags": ["a"],
    "name": None,
    "notes": None,
    "artifact": False,
}


def config(**changes) -> TrackingConfig:
    target = {"_target_": "llama_eqx.tracking.wandb.WandbConfig"}
    return TrackingConfig(wandb=load({**target, **WANDB, **changes}))


def tracker(folder, start=0, settings=None, steps=100, texts=None, **changes) -> Tracker:
    return Tracker(config(**changes), folder, settings=settings or {}, steps=steps, start=start, texts=texts)


DROPPED = {"model": {"dropout": 0.1}, "train": {"microbatch_size": 4}}


def test_disabled_wandb_leaves_nothing(tmp_path):
    with tracker(tmp_path) as told:
        told.log(1, {"train/loss": 2.0})
        told.sample(1, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "provenance.jsonl", "sample.txt"]
    assert (tmp_path / "sample.txt").read_text() == "text\n"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"mesh": {"fsdp": 1}}, {"mesh": {"fsdp": 2}}, "changed after step 3: computed.mesh.fsdp: 1 -> 2; losses agree to rounding"),
        ({"mesh": {"fsdp": 1}, "seed": 1}, {"mesh": {"fsdp": 1}, "seed": 2}, None),
        (DROPPED | {"mesh": {"fsdp": 1}}, DROPPED | {"mesh": {"fsdp": 2}}, "microbatches may have other rows, of which dropout drops"),
    ],
)
def test_a_start_tells_what_is_no_longer_as_it_was(tmp_path, capsys, before, after, said):
    tracker(tmp_path, settings=before).close()
    assert "changed after step" not in capsys.readouterr().err
    tracker(tmp_path, start=3, settings=after).close()
    err = capsys.readouterr().err
    assert (said or "\n") in err + "\n"
    assert ("changed after step" in err) is bool(said)
    assert [json.loads(line)["step"] for line in (tmp_path / "provenance.jsonl").read_text().splitlines()] == [0, 3]


@pytest.mark.parametrize("torn", [b'{"step": 2, "co', b"\0\0\0", b'{"step": "x", "eval_data": 3}\n'])
def test_a_start_that_is_torn_takes_none_with_it(tmp_path, torn):
    record = tmp_path / "provenance.jsonl"
    tracker(tmp_path).close()
    with record.open("ab") as file:
        file.write(torn)
    tracker(tmp_path, start=3).close()
    assert [start["step"] for start in read_starts(record, lenient=True)] == [0, 3]
    assert record.read_bytes().count(b"\n") == 3


def test_a_start_tells_of_other_settings_of_jax_where_they_were_recorded(tmp_path, capsys):
    tracker(tmp_path).close()
    with jax.enable_x64(True), jax.default_prng_impl("rbg"):
        tracker(tmp_path, start=3).close()
    said = "jax.enable_x64: False -> True, jax.default_prng_impl: threefry2x32 -> rbg; what follows is computed, and dropout drawn, under"
    assert f"changed after step 3: {said} other settings of JAX" in capsys.readouterr().err
    record = tmp_path / "provenance.jsonl"
    (*_, last) = read_starts(record)
    record.write_text(json.dumps({name: value for name, value in last.items() if name != "jax"}) + "\n")  # as it once was
    tracker(tmp_path, start=4).close()
    assert "changed after step" not in capsys.readouterr().err


def test_a_start_tells_of_other_code_and_not_of_another_commit_with_the_same(tmp_path, capsys, monkeypatch):
    package = tmp_path / "llama_eqx"
    package.mkdir()
    (package / "model.py").write_text("1")
    monkeypatch.setattr("llama_eqx.tracking.provenance.PACKAGE", package)
    monkeypatch.setattr("llama_eqx.tracking.provenance.commit", iter(["a", "b", "b", "b-dirty", "b-dirty"]).__next__)
    monkeypatch.setattr("llama_eqx.tracking.provenance.extension_commits", iter([{"lab": commit} for commit in "abcde"]).__next__)
    tracker(tmp_path / "run").close()
    tracker(tmp_path / "run", start=3).close()
    assert "changed after step" not in capsys.readouterr().err
    (tmp_path / "lab").mkdir()
    monkeypatch.setattr("llama_eqx.tracking.provenance.folders", lambda: [tmp_path / "lab"])  # of which the run has nothing
    tracker(tmp_path / "run", start=3).close()
    assert "changed after step" not in capsys.readouterr().err
    (package / "model.py").write_text("2")
    (package / ".#model.py").symlink_to("an.editor@host.1")  # its lock
    tracker(tmp_path / "run", start=4).close()
    old, same, _, new = (json.loads(line)["code"]["llama_eqx"] for line in (tmp_path / "run" / "provenance.jsonl").read_text().splitlines())
    assert old == same != new
    assert f"code.llama_eqx: {old} -> {new}; from here on, the code differs" in capsys.readouterr().err
    (package / "model.py").rename(package / "other.py")
    tracker(tmp_path / "run", start=5).close()
    assert f"code.llama_eqx: {new} -> " in capsys.readouterr().err


def test_the_end_tells_of_every_start_that_led_to_it_with_other_settings(tmp_path, capsys):
    def end(begin, steps, **settings):
        with tracker(tmp_path, begin, settings=settings, steps=steps) as told:
            told.final(max(begin, steps), "abc")
        return capsys.readouterr().err.splitlines()[-1]

    alike = "final state abc: the same command reproduces it"
    assert end(0, 10, mesh={"fsdp": 1}) == alike
    assert end(0, 20, train={"unroll": 1}) == alike  # nothing is left of the first
    with (tmp_path / "provenance.jsonl").open("a") as file:
        file.write('{"st\n')
    assert end(5, 20, train={"unroll": 1}) == alike
    assert end(20, 20, mesh={"fsdp": 2}, train={"unroll": 2}) == alike  # it trained nothing
    other = "final state abc: the same command need not reproduce it, as its starts differ: train.steps: 20 -> 24 after step 20"
    assert end(20, 24, train={"unroll": 1}) == other
    assert end(22, 24, train={"unroll": 1}) == other
    assert end(23, 24, train={"unroll": 2}) == f"{other}, computed.train.unroll: 1 -> 2 after step 23"
    assert end(24, 9, train={"unroll": 1}) == f"{other}, computed.train.unroll: 1 -> 2 after step 23"


def test_a_start_tells_of_other_texts_to_evaluate_on(tmp_path, capsys):
    for start, texts, said in (
        (0, {"a": "1", "b": "1"}, []),
        (0, {"a": "2", "b": "1"}, []),  # nothing is left of the first
        (3, {"b": "2", "c": "1"}, ["b"]),
        (6, {"a": "2", "b": "2"}, []),
        (9, {"a": "3", "b": "2"}, ["a"]),
    ):
        tracker(tmp_path, start, texts=texts).close()
        told = re.findall(rf"warning: the text of eval_data\.(\w), .* after step {start}: val/\1/loss", capsys.readouterr().err)
        assert told == said, start


def test_wandb_is_shown_the_settings_and_the_record_of_the_start(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("llama_eqx.tracking.tracker.Wandb", lambda config, run_dir, settings, say: shown.append(settings) or Mock())
    settings = {"train": {"steps": 100, "unroll": 1}, "eval_data": {"a": {"path": "a.txt"}}}
    tracker(tmp_path, settings=settings, texts={"a": "1"}).close()
    assert settings.items() <= shown[0].items()
    assert "versions" in shown[0]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        tracker(tmp_path / "file" / "run")


def test_the_keys_of_the_command_line_and_the_variables_of_wandb(monkeypatch):
    from llama_eqx import compose, load_config

    for name in ("MODE", "PROJECT", "ENTITY", "RUN_GROUP", "JOB_TYPE", "NAME", "NOTES"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    told = load_config("tracking.wandb.tags=[a,b]", compose.quoted("tracking.wandb.notes=it's, {new}")).tracking.wandb
    assert (told.mode, told.project, told.group, told.tags, told.notes) == ("offline", "llama_eqx", None, ("a", "b"), "it's, {new}")
    for name, value in {"MODE": "disabled", "PROJECT": "p", "RUN_GROUP": "g", "NAME": "n", "NOTES": "2"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    told = load_config("tracking.wandb.project=mine").tracking.wandb
    assert (told.mode, told.project, told.group, told.name, told.notes) == ("disabled", "mine", "g", "n", "2")
    assert load_config("tracking.wandb.mode=online").tracking.wandb.mode == "online"
    with pytest.raises(ConfigError, match="did you mean online"):
        config(mode="onlin")


def test_plain_lines(capsys):
    console = Console(total=1000, start=0)
    console.say("hello")
    console.log(10, {"train/loss": 2.34567, "optim/lr": 3e-4, "perf/tokens_per_second": 12345.6, "perf/mfu": 0.4})
    console.log(20, {"train/loss": 2.0})
    console.log(20, {"val/loss": 1.5})
    console.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "hello"
    assert lines[1] == "step   10/1000  loss 2.3457  lr 3.00e-04  12,346 tokens/s  ETA ?"
    assert re.fullmatch(r"step   20/1000  loss 2\.0000  ETA \d+:\d\d:\d\d", lines[2])
    assert lines[3] == "step   20/1000  validation loss 1.5000"


def test_eta_leaves_out_what_came_before_the_first_report(monkeypatch, capsys):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("llama_eqx.tracking.console.time.monotonic", lambda: next(clock))
    console = Console(total=100, start=40)
    console.log(50, {"train/loss": 1.0})
    console.log(60, {"train/loss": 1.0})
    assert capsys.readouterr().err.splitlines()[-1].endswith("ETA 0:00:40")


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console(total=10, start=4)
    console.log(5, {"train/loss": 2.5, "optim/lr": 1e-3})
    console.say("above")
    console.log(6, {"val/loss": 1.25})
    console.close()
    text = terminal.getvalue()
    assert " 4/10" in text
    assert " 5/10" in text
    assert "loss 2.5000, lr 1.00e-03" in text
    assert "\nabove\n" in text.replace("\r", "\n")
    assert "step 6  validation loss 1.2500" in text


def test_versions():
    found = versions()
    assert found["python"] == sys.version.split()[0]
    assert {"jax", "equinox", "optax", "grain", "orbax-checkpoint", "numpy"} <= found.keys()


def test_commit_says_when_the_code_was_changed(monkeypatch, tmp_path):
    package = tmp_path / "llama_eqx"
    package.mkdir()
    monkeypatch.setattr("llama_eqx.tracking.provenance.PACKAGE", package)
    assert commit() is None

    def git(*arguments: str) -> str:
        options = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *options, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (package / "config.py").write_text("1")
    (tmp_path / "README.md").write_text("1")
    git("add", "README.md")
    git("commit", "-m", "another's repository")
    assert commit() is None
    git("add", ".")
    git("commit", "-m", "ours")
    head = git("rev-parse", "HEAD")
    (tmp_path / "outputs.txt").write_text("not code")
    assert commit() == head
    (package / "config.py").write_text("2")
    assert commit() == head + "-dirty"
    git("checkout", ".")
    assert commit() == head
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "variant.yaml").write_text("new")
    assert commit() == head + "-dirty"

    extension = tmp_path / "lab"
    (extension / "__pycache__").mkdir(parents=True)
    (extension / "__pycache__" / "norms.pyc").write_text("compiled")
    (extension / "__init__.py").write_text("1")
    monkeypatch.setattr("llama_eqx.tracking.provenance.folders", lambda: [extension])
    assert extension_commits() == {"lab": None}
    git("add", "lab/__init__.py")
    git("commit", "-m", "an extension")
    head = git("rev-parse", "HEAD")
    assert extension_commits() == {"lab": head}  # whatever is beside it
    (extension / "norms.py").write_text("new")
    assert extension_commits() == {"lab": head + "-dirty"}
