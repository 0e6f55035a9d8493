"""A sweep whose jobs go to SLURM, against programs that take its place."""

import os
import re
import sys
import threading

import pytest

from llama_eqx.errors import ConfigError
from llama_eqx.multirun import Job, MultirunError, run_jobs

FINE = {"fine": "print('done')"}


def run(folder, programs, say=print, **parameters):
    jobs = [
        Job(i, name, [sys.executable, "-c", program], folder / name / "console.txt") for i, (name, program) in enumerate(programs.items())
    ]
    run_jobs(jobs, [], folder=folder / "submitit", cluster="slurm", at_once=3, parameters={"timeout_min": 1, **parameters}, say=say)


SBATCH = """#!/bin/bash
[ -e $QUEUE/limit ] && [ "$(find $QUEUE -name '???' -empty)" ] && { echo sbatch: error: one job for each user >&2; exit 1; }
number=$((100 + $(ls $QUEUE/??? | wc -l))); touch $QUEUE/$number; cp "${@: -1}" $QUEUE/script
[ -e $QUEUE/pending ] && cp $QUEUE/pending $QUEUE/$number
export SLURM_JOB_ID=$number SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_JOB_NODELIST=here
(while [ -e $QUEUE/pending ]; do sleep 0.1; done
bash "${@: -1}" > $QUEUE/$number.out 2>&1 && echo COMPLETED > $QUEUE/$number || echo FAILED > $QUEUE/$number) > /dev/null 2>&1 &
echo Submitted batch job $number
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do
    [[ $1 == --error ]] && error=$(sed "s/%j/$SLURM_JOB_ID/; s/%t/0/" <<< $2)
    [[ $1 == --output || $1 == --error ]] && shift; shift
done
[ -e $QUEUE/broken ] && { cat $QUEUE/broken > $error; exit 1; }
exec "$@"
"""
SQUEUE = """#!/bin/bash
[ -e $QUEUE/down ] && { echo no controller >&2; exit 1; }
for job in $QUEUE/???; do echo "$(basename $job) $(grep . $job || echo RUNNING)"; done
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Programs that take SLURM's place, and the folder in which they keep its queue."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "queue").mkdir()
    for name, content in (("sbatch", SBATCH), ("srun", SRUN), ("squeue", SQUEUE)):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    return tmp_path / "queue"


def test_jobs_go_to_slurm(queue, tmp_path):
    """What is asked for reaches its script, and exit codes come back."""
    parameters = {"timeout_min": 90, "cpus_per_task": 3, "gpus_per_node": None, "slurm_partition": "gpus"}
    with pytest.raises(MultirunError, match=r"1 ok, 1 failed \(job 1: exit code 5"):
        run(tmp_path, {**FINE, "raises": "raise SystemExit(5)"}, **parameters)
    asked = (queue / "script").read_text()
    assert "#SBATCH --partition=gpus" in asked
    assert "#SBATCH --time=90" in asked
    assert "#SBATCH --cpus-per-task=3" in asked
    assert "gpus-per-node" not in asked


def test_what_slurm_rejects_is_an_error_that_says_what_to_type(queue, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\nprintf 'sbatch: error: invalid partition\nsbatch: error: failed\n' >&2; exit 1")
    with pytest.raises(ConfigError) as found:
        run(tmp_path, FINE)
    assert found.value.what == "sbatch: error: invalid partition; failed"
    assert found.value.next.startswith("sinfo ")
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\necho Welcome")
    with pytest.raises(ConfigError, match="Welcome"):
        run(tmp_path, FINE)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("PATH", str(queue))
    with pytest.raises(ConfigError, match="not part of a SLURM cluster"):
        run(tmp_path, FINE)


def test_a_sweep_goes_on_with_the_jobs_that_it_sent_to_slurm_before_it_was_killed(queue, tmp_path):
    go, said = tmp_path / "go", []
    pends = {"pends": f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.1)"}

    def killed(line):
        raise ProcessLookupError(line)

    def again(line):
        said.append(line)
        go.touch()

    with pytest.raises(ProcessLookupError, match="job 0 is in SLURM's queue as 100: pends"):
        run(tmp_path, pends, say=killed)
    for program, minutes, then, now in ((pends["pends"], 2, "timeout_min=1", "timeout_min=2"), ("pass", 1, "import pathlib", "pass")):
        with pytest.raises(ConfigError) as found:
            run(tmp_path, {"pends": program}, say=again, timeout_min=minutes)
        assert re.search(rf"still at SLURM, with {then}[^Z]* where this command has {now}$", found.value.what)
        assert found.value.next.startswith("scancel 100, and the same command again")
    run(tmp_path, {**FINE, **pends}, say=again)
    assert said[:2] == ["job 1 is in SLURM's queue since an earlier start as 100: pends", "job 0 is in SLURM's queue as 101: fine"]
    assert said[-1].startswith("2 ok")
    assert sorted(path.name for path in queue.glob("???")) == ["100", "101"]


def test_a_job_at_slurm_imports_nothing_from_the_folder_where_it_was_sent(queue, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("import pathlib\npathlib.Path('canary').touch()\n")
    run(tmp_path, FINE)
    assert not (tmp_path / "canary").exists()


def test_a_queue_that_does_not_answer_is_told_once_and_asked_again(queue, tmp_path, capfd):
    (queue / "down").touch()
    run(tmp_path, {"slow": "import time; time.sleep(3)"})
    said = capfd.readouterr()
    assert said.out.count("no controller: it is asked again every minute") == 1
    assert said.err == ""


def test_a_limit_of_slurm_makes_the_others_wait(queue, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llama_eqx.multirun.AGAIN", 0.5)
    (queue / "limit").touch()
    run(tmp_path, {**FINE, "fine too": "print(2)"})
    assert "job 1 waits until SLURM takes it: sbatch: error: one job for each user\njob 0 ok" in capsys.readouterr().out


def test_a_job_that_slurm_has_lost_is_over(queue, tmp_path, monkeypatch):
    """Without accounting, as here."""
    monkeypatch.setattr("submitit.SlurmJob._results_timeout_s", 0)
    with pytest.raises(MultirunError, match=r"1 failed \(job 1: lost: FAILED\)"):
        run(tmp_path, {**FINE, "gone": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"})


@pytest.mark.parametrize(("printed", "place"), [("", "nothing"), ("node lost", "100_0_log.err")])
def test_a_job_that_is_lost_before_it_begins_is_not_taken_for_an_earlier_start(printed, place, queue, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("submitit.SlurmJob._results_timeout_s", 0)
    (queue / "broken").write_text(printed)
    (tmp_path / "fine").mkdir()
    (tmp_path / "fine" / "console.txt").write_text("$ an earlier start\nerror: no room\n")
    os.utime(tmp_path / "fine" / "console.txt", (0, 0))
    with pytest.raises(MultirunError) as found:
        run(tmp_path, FINE)
    said = capsys.readouterr().out
    assert "no room" not in str(found.value)
    assert "job 0 as SLURM saw it: sacct -j 100" in said
    assert said.rstrip().endswith(place)


@pytest.mark.parametrize(("reason", "times"), [("PartitionDown", 1), ("Priority", 0)])
def test_why_slurm_does_not_start_jobs_is_said_once(reason, times, queue, tmp_path, monkeypatch):
    monkeypatch.setattr("llama_eqx.multirun.HELD", 1.0)
    (queue / "pending").write_text(f"PENDING {reason}\n")
    said = []
    threading.Timer(4, (queue / "pending").unlink).start()
    run(tmp_path, {**FINE, "fine too": "print(2)"}, say=said.append)
    assert [line for line in said if line.startswith(f"SLURM does not start job 0: {reason}.")] == said[2 : 2 + times]
