"""The trace of a run on CPU, and its summary.

Each is made by a process of its own: a second trace in one process has ended it with a segmentation fault.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from test_loop import config

from llama_eqx.compose import compose, quoted
from llama_eqx.errors import ConfigError
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.training.loop import train
from llama_eqx.training.profile import Profile


def said(*overrides):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (pathlib.Path(__file__).parents[2], pathlib.Path(__file__).parent))),
    }
    command = [sys.executable, __file__, *map(str, overrides)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith(("profile", "warning: no profile"))]


def test_a_trace_is_summarised(tmp_path):
    lines = said(tmp_path / "run", "profile.steps=[2,3]", "mesh=cpu-8")
    assert re.match(r"profile: steps 2 to 3, [\d.]+ s each; [\d.]+ s of compilation in all", lines[0])
    shares = [float(found[1]) for line in lines if (found := re.match(r"profile: +([\d.]+)%", line))]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.5
    spent = [float(found[1]) for line in lines if (found := re.search(r"([\d.]+) ms a step", line))]
    assert sum(spent) < 1e3 * float(lines[0].split()[5])  # of one device
    (trace,) = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
    assert str(trace) in lines[-1]
    assert not any("include" in line for line in lines)


def test_what_is_traced_between_steps_is_said(tmp_path):
    lines = said(tmp_path / "run", "profile.steps=[2,3]", "train.eval_every=2", "checkpoint.every=2")
    assert lines[1].startswith("profile: these times include an evaluation and a save between the steps; ")


def test_a_trace_begins_when_the_step_before_is_done(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Profile, "begin", lambda self: seen.append(read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]))
    train(config(tmp_path / "run", "profile.steps=[3,3]"))
    assert seen == [2]


def test_steps_that_are_not_reached_are_mentioned(tmp_path):
    (line,) = said(tmp_path / "run", "profile.steps=[4,9]")
    assert line == "warning: no profile, as the run did not go through steps 4 to 9"


def test_how_it_is_asked_for():
    assert compose("train", [quoted("profile=true"), quoted("profile.steps=[2,3]")]).profile.steps == [2, 3]
    assert compose("train", [quoted("profile=true")]).profile.steps == [10, 13]
    assert compose("train", [quoted("profile=false")]).profile.steps is None


def test_steps_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="is not a first and a last step"):
        config(tmp_path, "profile.steps=[3,2]")


if __name__ == "__main__":
    fixed = "train.steps=4", "train.eval_every=100", "train.sample_tokens=0", "model.dropout=0"
    train(config(sys.argv[1], *fixed, *sys.argv[2:]))
