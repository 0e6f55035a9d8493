"""Killed at any moment and started again, a run ends as if nothing had happened.

`pytest -m faults -n 0 tests/faults/test_faults.py` takes 50 runs through 350 faults, and goes on where it was stopped: results are added to
FAULTS_LOG, faults.jsonl unless set, a line a run, and after FAULTS_SECONDS, if set, no further run is begun.
`python tests/faults/table.py FAULTS_LOG` sums them up.
"""

import concurrent.futures
import json
import os
import pathlib
import time

import pytest
from harness import EVERY, RUNS, Reference, attempt, expected, leftovers, outcome, reference, run, served


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("cache")) as path:
        yield path


@pytest.fixture(scope="module")
def against(tmp_path_factory, server) -> Reference:
    return reference(tmp_path_factory.mktemp("reference"), server)


def test_it_ends_the_same(tmp_path, against):
    """Killed while Orbax writes, before the manifest, while it restores, and told to stop while it evaluates."""
    faults = ["saving:0.01", "finalise:2", "restore:1", "evaluate:1:SIGTERM"]
    done = run(tmp_path / "run", against.server, faults)
    assert (done["code"], done["ended"]) == (0, expected(faults)), done["said"]
    assert outcome(tmp_path / "run") == against.outcome
    assert leftovers(tmp_path / "run") == []
    assert done["resumed"][-1] % 4 == 0  # the step that was evaluated, whether or not a save was due for it
    assert f"final checkpoint verified: step {against.outcome.progress['step']}, " in done["said"]


@pytest.mark.faults
def test_many_runs(tmp_path_factory, server):
    log = pathlib.Path(os.environ.get("FAULTS_LOG", "faults.jsonl"))
    until = time.monotonic() + float(os.environ.get("FAULTS_SECONDS", "inf"))
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    missing = sorted({*range(RUNS)} - {result["run"] for result in known})
    against = reference(tmp_path_factory.mktemp("reference"), server) if missing else None
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        begun = [pool.submit(lambda number: attempt(number, against) if time.monotonic() < until else None, number) for number in missing]
        for each in concurrent.futures.as_completed(begun):
            if (result := each.result()) is not None:
                with log.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                known.append(result)
    for result in known:
        assert result["identical"], result
        assert not result["leftovers"], result
        assert result["ended"] == expected(result["faults"])[: len(result["ended"])], result
        # The work that was lost is at most what lies between two saves; one step more was saved by the run that was told to stop.
        assert len({step for step in result["resumed"] if step % EVERY}) <= 1, result
    assert sum(len(result["ended"]) for result in known) > 6 * len(known)
