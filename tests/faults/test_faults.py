"""Killed at any moment and started again, a run ends as if nothing had happened.

`pytest -m faults tests/faults -n 0` makes 300 trials of killing and 50 of telling to stop, and goes on where it was stopped: results are
added to FAULTS_LOG, faults.jsonl unless set, a line each. `python tests/faults/table.py FAULTS_LOG` sums them up.
"""

import json
import os
import pathlib

import pytest
from harness import EVERY, KILLED, STOPPED, Reference, Trial, attempt, leftovers, outcome, reference, run, served


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("cache")) as path:
        yield path


@pytest.fixture(scope="module")
def against(tmp_path_factory, server) -> Reference:
    return reference(tmp_path_factory.mktemp("reference"), server)


@pytest.mark.parametrize(
    ("trial", "ended"),
    [
        pytest.param(Trial("", 0.01, when_saving=True), ["SIGKILL"], id="while Orbax writes"),
        pytest.param(Trial("finalise:2;restore"), ["SIGKILL", "SIGKILL"], id="before the manifest, then while it restores"),
        pytest.param(Trial("evaluate:1:SIGTERM"), ["exit code 75"], id="told to stop while it evaluates"),
    ],
)
def test_it_ends_the_same(tmp_path, against, trial, ended):
    done = run(tmp_path / "run", against.server, trial)
    assert (done["code"], done["ended"]) == (0, ended), done["said"]
    assert outcome(tmp_path / "run") == against.outcome
    assert leftovers(tmp_path / "run") == []
    if "SIGTERM" in trial.faults:
        assert done["resumed"] == [4]  # the step that was evaluated, which no save was due for
    assert f"final checkpoint verified: step {against.outcome.progress['step']}, " in done["said"]


@pytest.mark.faults
def test_many_trials(tmp_path_factory, server):
    log = pathlib.Path(os.environ.get("FAULTS_LOG", "faults.jsonl"))
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    made = {result["trial"] for result in known}
    against = None
    for number in range(KILLED + STOPPED):
        if number in made:
            continue
        against = against or reference(tmp_path_factory.mktemp("reference"), server)
        result = attempt(number, against)
        with log.open("a") as file:
            file.write(json.dumps(result) + "\n")
        known.append(result)
    assert [result for result in known if not result["identical"] or result["leftovers"]] == []
    for result in known:  # work that was lost: at most what lies between two saves
        if result["trial"] < KILLED:
            assert all(step % EVERY == 0 for step in result["resumed"]), result
        else:
            assert result["ended"] == ["exit code 75"], result
