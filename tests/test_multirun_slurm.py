"""A sweep whose jobs go to SLURM, against programs that take its place."""

import os
import sys

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
export SLURM_JOB_ID=$number SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_JOB_NODELIST=here
(bash "${@: -1}" > $QUEUE/$number.out 2>&1 && echo COMPLETED > $QUEUE/$number || echo FAILED > $QUEUE/$number) > /dev/null 2>&1 &
echo Submitted batch job $number
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == --output || $1 == --error ]] && shift; shift; done
exec "$@"
"""
SQUEUE = """#!/bin/bash
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
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\necho sbatch: error: invalid partition >&2; exit 1")
    with pytest.raises(ConfigError, match="sbatch: error: invalid partition"):
        run(tmp_path, FINE, **parameters)


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
    run(tmp_path, {**FINE, **pends}, say=again)
    assert said[:2] == ["job 1 is in SLURM's queue since an earlier start as 100: pends", "job 0 is in SLURM's queue as 101: fine"]
    assert said[-1].startswith("2 ok")
    assert sorted(path.name for path in queue.glob("???")) == ["100", "101"]


def test_a_job_at_slurm_imports_nothing_from_the_folder_where_it_was_sent(queue, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("import pathlib\npathlib.Path('canary').touch()\n")
    run(tmp_path, FINE)
    assert not (tmp_path / "canary").exists()


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
