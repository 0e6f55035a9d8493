"""The trace of a run on CPU, and its summary."""

import re

import pytest
from test_loop import config

from llama_eqx.compose import compose, quoted
from llama_eqx.errors import ConfigError
from llama_eqx.training.loop import train


def said(capsys, *overrides):
    train(config(*overrides, "train.steps=4", "train.eval_every=100", "train.sample_tokens=0", "model.dropout=0"))
    return [line for line in capsys.readouterr().err.splitlines() if "profile" in line]


def test_a_trace_is_summarised(tmp_path, capsys):
    lines = said(capsys, tmp_path / "run", "profile.steps=[2,3]")
    assert re.match(r"profile: steps 2 to 3, [\d.]+ s each; [\d.]+ s of compilation in all", lines[0])
    shares = [float(found[1]) for line in lines if (found := re.match(r"profile: +([\d.]+)%", line))]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.5
    (trace,) = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
    assert str(trace) in lines[-1]


def test_steps_that_are_not_reached_are_mentioned(tmp_path, capsys):
    (line,) = said(capsys, tmp_path / "run", "profile.steps=[4,9]")
    assert line == "warning: no profile, as the run did not go through steps 4 to 9"


def test_how_it_is_asked_for():
    assert compose("train", [quoted("profile=true"), quoted("profile.steps=[2,3]")]).profile.steps == [2, 3]
    assert compose("train", [quoted("profile=true")]).profile.steps == [10, 13]
    assert compose("train", [quoted("profile=false")]).profile.steps is None


def test_steps_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="are not steps to trace"):
        config(tmp_path, "profile.steps=[3,2]")
