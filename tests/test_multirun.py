"""A sweep whose jobs raise, die and run out of time: the others finish, the table says which, and the same command skips what is done."""

import gzip
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time

import pytest

from llama_eqx import compose, load_config, multirun, submission
from llama_eqx.checkpoint.native import write_config
from llama_eqx.config import dump
from llama_eqx.errors import ConfigError, StorageError
from llama_eqx.multirun import Job, MultirunError, labels, run_jobs
from llama_eqx.studies.pairing import kept_at
from llama_eqx.training import loop

LATE = """
import signal, sys, time
from llama_eqx.writer import held
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(75)))
with held(sys.argv[1]):
    print("began", flush=True)
    time.sleep(100)
"""
TEXT = pathlib.Path(__file__).parent / "golden" / "text.md"
JOBS = {
    "fine": "print('done')",
    "raises": "raise SystemExit(5)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "preempted": "raise SystemExit(75)",
    "fine too": "import os; print(*map(os.environ.get, ('CUDA_VISIBLE_DEVICES', 'NPROC', 'XLA_PYTHON_CLIENT_PREALLOCATE')))",
}


def run(folder, names, skipped=()):
    jobs = [
        Job(i, name, [sys.executable, "-c", JOBS.get(name, LATE), str(folder / name)], folder / name / "console.txt")
        for i, name in enumerate(names)
    ]
    before = [Job(9, name, [], folder, folder / "record" if name == "diverged" else None) for name in skipped]
    run_jobs(jobs, before, folder=folder / "submitit", cluster="local", at_once=3, parameters={"timeout_min": 1}, say=print)


@pytest.mark.faults
def test_a_result_of_an_earlier_sweep_with_the_same_process_ids_is_not_taken(tmp_path, monkeypatch):
    """In a container, ids repeat from start to start."""
    monkeypatch.setitem(JOBS, "lost", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)")
    (tmp_path / "submitit").mkdir()
    for number in range(os.getpid(), os.getpid() + 2000):
        (tmp_path / "submitit" / f"{number}_0_result.pkl").write_bytes(pickle.dumps(("success", 0)))
    with pytest.raises(MultirunError, match="job 0: lost"):
        run(tmp_path, ["lost"])


def test_jobs_that_fail_leave_the_others_to_finish(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    with pytest.raises(MultirunError) as found:
        run(tmp_path, JOBS, skipped=["before", "diverged"])
    assert found.value.code == 1
    assert str(found.value).splitlines()[0] == (
        "error: 3 ok, 1 without finite numbers, 4 failed (job 1: exit code 5, its numbers were not finite; job 2: SIGKILL, out of memory?; "
        "job 3: SIGSEGV; job 4: exit code 75, preempted)"
    )
    assert f"job 9 ended without finite numbers: diverged (to make it again remove {tmp_path / 'record'})" in capsys.readouterr().out
    assert "done" in (tmp_path / "fine" / "console.txt").read_text()
    assert "\n3 1 false\n" in (tmp_path / "fine too" / "console.txt").read_text()  # one of five cores, and of a GPU what it needs


LISTED = "".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i}-a)\n  MIG 1g.10gb Device 0: (UUID: MIG-{i})\n" for i in range(5))


@pytest.mark.parametrize(
    ("visible", "at_once", "shares", "preallocate"),
    [
        (None, 1, [None], None),
        (None, 2, ["GPU-0-a,GPU-1-a", "GPU-2-a,GPU-3-a"], None),  # as many each, so that all jobs have the same mesh
        (None, 5, [f"GPU-{i}-a" for i in range(5)], None),
        ("1,3", 2, ["1", "3"], None),
        ("1,3", 3, ["1", "3", "1"], "false"),
        ("", 2, ["", ""], "false"),
        ("none listed", 2, [None, None], "false"),
    ],
)
def test_jobs_at_a_time_have_gpus_of_their_own(visible, at_once, shares, preallocate, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<END\n{'' if visible == 'none listed' else LISTED}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible in ("", "1,3"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = submission.shares_of(at_once)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in found] == shares
    assert {share["XLA_PYTHON_CLIENT_PREALLOCATE"] for share in found} == {preallocate}


@pytest.mark.parametrize(("second", "said"), [("no room", " (runs)"), ("elsewhere", ""), ("other", None), ("killed", None)])
def test_one_reason_for_all_that_failed_is_told_with_what_comes_next(second, said, tmp_path, monkeypatch, capsys):
    for what in ("no room", "other"):
        error = StorageError(f"{what}\non the disk", where="runs", next="free some\nof it")
        monkeypatch.setitem(JOBS, what, f"print('a line', flush=True); raise SystemExit({str(error)!r})")
    elsewhere = str(StorageError("no room\non the disk", where="elsewhere", next="free more"))
    monkeypatch.setitem(JOBS, "elsewhere", f"print({elsewhere!r}); raise SystemExit(6)")
    monkeypatch.setitem(JOBS, "second", JOBS[second])
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "console.txt").write_text(
        "$ an earlier start\nerror: no room\n       on the disk\nnext: free some\n       of it\n"
    )
    with pytest.raises(MultirunError) as found:
        run(tmp_path, ["no room", "second", "fine"])
    told = capsys.readouterr().out
    if said is None:
        assert "; the reason" not in found.value.what
        assert f"job 0: no room\njob 1: {'other' if second == 'other' else 'it printed no error'}\n" in told
        assert found.value.next == "the same command again runs what is missing and skips what is there"
    else:
        assert found.value.what.endswith(f"; the reason: no room\non the disk{said}")
        assert found.value.next == "free some\nof it"
        assert "job 0: " not in told


def test_when_all_that_is_missing_was_preempted_it_is_worth_starting_again(tmp_path):
    with pytest.raises(MultirunError) as found:
        run(tmp_path, ["fine", "preempted"])
    assert found.value.code == 75


@pytest.mark.parametrize(
    ("said", "setting"),
    [
        ("0 is no number of jobs", "hydra.launcher.at_once=0"),
        ("two is no number of jobs", "hydra.launcher.at_once=two"),
        ("did you mean slurm_partition?", "+hydra.launcher.parameters.slurm_partitoin=gpus"),
        ('"timeout_min" expected type', "hydra.launcher.parameters.timeout_min=long"),
    ],
)
def test_settings_that_cannot_be(said, setting, tmp_path, typed):
    code, _, err = typed("train", "-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}", setting)
    assert (code, said in err, "Traceback" in err) == (2, True, False)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_sweep_that_is_told_to_stop_tells_its_jobs_and_waits(tmp_path, number, code):
    """A Ctrl-C reaches all processes of a terminal. The jobs of a sweep that is killed save themselves too, and its next start waits."""
    program = f"""
import pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background has it ignored
from llama_eqx.verb import guarded
from llama_eqx.multirun import Job, run_jobs
job = Job(0, "late", [sys.executable, "-c", {LATE!r}, {str(tmp_path)!r}], pathlib.Path({str(tmp_path)!r}, "console.txt"))
settings = {{"cluster": "local", "at_once": 1, "parameters": {{"timeout_min": 9}}, "say": print}}
sys.exit(guarded(lambda: run_jobs([job, job], [], folder=job.console.parent / "submitit", **settings)))
"""
    sweep = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, stderr=subprocess.PIPE, text=True)
    console = tmp_path / "console.txt"
    while "\nbegan\n" not in (console.read_text() if console.exists() else ""):
        assert sweep.poll() is None
        time.sleep(0.1)
    if number == signal.SIGKILL:
        job = json.loads((tmp_path / ".writer").read_text())["pid"]
        os.kill(job, signal.SIGSTOP)  # it is still saving when the sweep is started again
        heard = []

        def say(line):
            if not heard:
                os.kill(job, signal.SIGCONT)
            heard.append(line)

        sweep.kill()
        sweep.wait()
        again = Job(0, "late", [sys.executable, "-c", ""], console)
        run_jobs([again], [], folder=tmp_path / "submitit", cluster="local", at_once=1, parameters={"timeout_min": 9}, say=say)
        assert re.fullmatch(rf"job 0 waits for process {job} on .*, which writes in {tmp_path}", heard[0])
        assert heard[1] == "job 0 begins: late"
    else:
        os.killpg(sweep.pid, number) if number == signal.SIGINT else sweep.terminate()
    _, said = sweep.communicate(timeout=300)
    assert sweep.returncode == code
    assert "\nsaved\n" in console.read_text()
    assert "Traceback" not in said
    assert number != signal.SIGINT or "error: interrupted: 0 of 2 jobs were over" in said


@pytest.mark.faults
def test_a_job_whose_time_is_nearly_up_is_told_to_save_itself(tmp_path):
    """By submitit, half a minute before."""
    with pytest.raises(MultirunError, match="job 0: exit code 75, preempted"):
        run(tmp_path, ["late"])


def test_what_tells_jobs_apart():
    assert labels([["a=1", "b=0"], ["a=2", "b=0"]]) == ["a=1", "a=2"]
    assert labels([["a=1", "b=0"]]) == [""]


def test_from_the_command_line(tmp_path, typed):
    """A sweep of two runs of which one finds no data, twice: the second time one is skipped. A changed setting is not."""
    small = ["data=text", "tokenizer=bytes", "model.dims.layers=1", "model.dims.embed=32", "model.dims.mlp=32", "train.batch_size=2"]
    small += ["train.steps=2", "train.seq_len=32", "train.sample_tokens=0", "tracking.wandb.mode=disabled", "mesh=local"]

    def sweep(*overrides):
        code, _, err = typed("train", "-m", f"data.path={TEXT},nowhere", *small, f"hydra.sweep.dir={tmp_path}", *overrides)
        return code, err

    code, said = sweep()
    assert code == 1
    assert "1 ok, 1 failed (job 1: exit code 3, its data cannot be used); the reason: nothing matches (nowhere)" in said
    assert str(tmp_path / "1" / "console.txt") in said
    assert "nothing matches" in (tmp_path / "1" / "console.txt").read_text()
    (tmp_path / "1").rename(tmp_path / "gone")
    code, said = sweep("hydra.launcher.at_once=2")
    assert "finished before: job 0" in said
    assert "job 0 begins" not in said
    assert "job 1 begins" in said
    settings = dump(load_config(*small, "data.path=nowhere"))
    write_config(settings, tmp_path / "1")
    (tmp_path / "1" / "replay").mkdir()
    (tmp_path / "1" / "replay" / "step-1.json").touch()
    code, said = sweep()
    assert code == 0
    assert f"job 1 ended without finite numbers: data.path=nowhere (to make it again remove {tmp_path / '1' / 'replay'})" in said


def test_each_job_takes_the_plan_of_its_own_mesh(tmp_path, monkeypatch, typed):
    """And whether it has finished is asked of the settings that it runs with. Names of options that look like bools are options."""
    (tmp_path / "llama3_1m_cpu-8.yaml").write_text("overrides: [precision=mixed, train.batch_size=16, train.microbatch_size=16]")
    found, place = {}, compose.plan_file
    monkeypatch.setattr(compose, "plan_file", lambda overrides: tmp_path / place(overrides).name)
    monkeypatch.setattr("llama_eqx.training.identity.finished", lambda config: found.setdefault("settings", []).append(config))
    monkeypatch.setattr(multirun, "run_jobs", lambda jobs, skipped, **_: found.update(jobs=jobs))
    code, _, err = typed("train", "-m", "mesh=local,cpu-8", "profile=false,true", f"hydra.sweep.dir={tmp_path}")
    assert (code, err) == (0, f"compare     python -m llama_eqx.report 'runs=[{tmp_path}]'\n")
    assert [settings.precision.compute for settings in found["settings"]] == ["float32", "float32", "bfloat16", "bfloat16"]
    assert [bool(settings.profile.steps) for settings in found["settings"]] == [False, True, False, True]
    for job, settings in zip(found["jobs"], found["settings"], strict=True):
        assert load_config(*job.command[4:]) == settings
    names = {(settings.tracking.wandb.group, settings.tracking.wandb.name) for settings in found["settings"]}
    assert len(names) == 4
    assert (tmp_path.name, 'mesh=cpu-8 profile="false"') in names
    assert sorted(path.name for path in tmp_path.glob("*")) == ["llama3_1m_cpu-8.yaml", "multirun.yaml"]


def test_a_run_of_a_study_is_over_when_it_is_filed(tmp_path, monkeypatch, typed):
    """One that was told to stop after its last checkpoint has finished, and is yet to be filed: by a start that ends at once."""
    found = {}
    monkeypatch.setattr("llama_eqx.training.identity.finished", lambda config: True)
    monkeypatch.setattr("llama_eqx.studies.pairing.is_kept", lambda config: config.seed == 1001)
    monkeypatch.setattr("llama_eqx.studies.pairing.diverged", lambda config: tmp_path / "record")
    monkeypatch.setattr(multirun, "run_jobs", lambda jobs, skipped, **_: found.update(jobs=jobs, skipped=skipped))
    study = ["experiment=norm", "experiment/norm=rms", "stage=tune", "schedule.peak=0.004"]
    code, _, err = typed("train", "-m", *study, "seed=1000,1001", f"hydra.sweep.dir={tmp_path}")
    assert (code, err) == (0, "report      python -m llama_eqx.report experiment=norm stage=tune rung=1m\n")
    assert [[job.number for job in found[name]] for name in ("jobs", "skipped")] == [[0], [1]]
    assert [found[name][0].diverged for name in ("jobs", "skipped")] == [None, tmp_path / "record"]
    assert not any("tracking" in word for word in found["jobs"][0].command)  # the study names its runs itself


def test_a_sweep_of_a_study_says_what_is_wrong_with_its_registration_and_which_run_will_not_be_filed(tmp_path, monkeypatch, typed):
    folder, found = tmp_path / "experiments" / "ffn", {}
    folder.mkdir(parents=True)
    text = (TEXT.parents[2] / "experiments" / "ffn" / "prereg.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(multirun, "run_jobs", lambda jobs, skipped, **_: found.update(jobs=jobs, skipped=skipped))
    arm = ["experiment=ffn", "stage=tune", "experiment/ffn=swiglu", "schedule.peak=0.004"]

    def sweep(*more):
        code, _, err = typed("train", "-m", *arm, "seed=1000,1001", *more)
        return code, err

    (folder / "prereg.yaml").write_text(text.replace("rates:", "rates: [0.1] #"))
    assert sweep() == (
        2,
        "error: tuning wants three rates or more, rising, so that the best can lie between others\n"
        "where: experiments/ffn/prereg.yaml: rates\n",
    )
    (folder / "prereg.yaml").write_text(text.replace("val/loss ", "val/cod/loss "))
    code = ["+data@eval_data.code=test", "eval_data.code.path=code.txt"]
    assert sweep(*code) == (
        2,
        "error: no evaluation of swiglu gives val/cod/loss\nwhere: experiments/ffn/prereg.yaml\nnext: did you mean val/code/loss?\n",
    )
    with pytest.raises(ConfigError, match="no evaluation of swiglu gives val/cod/loss"):
        loop.train(load_config(*arm, *code))  # no sweep
    for metric in ("val/code/loss ", "val/loss_at_64 "):
        (folder / "prereg.yaml").write_text(text.replace("val/loss ", metric))
        assert sweep(*code)[0] == 0
    assert sweep("train.seq_len=64")[0] == 2  # whose last position is 63
    (folder / "prereg.yaml").write_text(text)
    (folder / "tuned.yaml").write_text("1m: {swiglu: 0.004}")
    final = ["stage=final", "schedule.peak=0.005"]
    assert sweep(*final)[0] == 0  # of seeds that are not registered
    code, said = sweep(*final, "seed=0")
    assert code == 2
    assert said.startswith("error: no report would take swiglu at 0.005, since its rate is 0.004\nwhere: schedule.peak\nnext: leave it out")
    assert sweep("stage=final", "seed=0")[0] == 0

    run_dir = "outputs/ffn/final/1m/swiglu/seed_0"  # a run from before a change
    pathlib.Path(run_dir).mkdir(parents=True)
    write_config(dump(load_config(*arm, "stage=final", "seed=0", f"run_dir={run_dir}")), pathlib.Path(run_dir))
    assert sweep("stage=final", "seed=0")[0] == 0
    for name, old, new, why in (
        ("prereg.yaml", text, text.replace("alpha: 0.05", "alpha: 0.01"), "another registration"),
        ("tuned.yaml", "1m: {swiglu: 0.004}", "1m: {swiglu: 0.005}", "another rate (0.004)"),
    ):
        (folder / name).write_text(new)
        code, said = sweep("stage=final", "schedule.peak=0.005" if "tuned" in name else "schedule.peak=0.004", "seed=0")
        assert (code, said.count("\n")) == (4, 4)
        assert said.startswith(f"error: this run directory holds a run of {why}, which reports no longer take\n")
        assert f"\nwhere: {run_dir}\nkept: the run there, as it is\nnext: rm -r outputs/ffn/final, then the same" in said
        (folder / name).write_text(old)
    short = load_config(*arm, "seed=1001", "train.steps=5")
    path = kept_at(short)
    path.parent.mkdir(parents=True)
    first = {"config": dump(short), "study": {}, "provenance": []}
    path.write_bytes(gzip.compress(json.dumps(first).encode() + b'\n{"step": 5, "val/loss": 3.0}\n'))
    assert sweep()[0] == 0
    assert [job.label for job in found["jobs"]] == ["seed=1000", f"seed=1001 (will not be filed: {path} has other settings)"]


OWN = """# @package _global_
defaults:
  - _study
  - _self_
  - override /data: prepared
study: {question: own, arm: rms}
data: {path: shards}
"""


def test_a_study_of_ones_own_may_tune_nothing_and_run_on_prepared_data(tmp_path, monkeypatch, typed):
    found = {}
    text = (TEXT.parents[2] / "experiments" / "norm" / "prereg.yaml").read_text()
    for name, new in (("tune_arms", "[]"), ("tune_seeds", "[]"), ("rates", "[0.004]"), ("seeds", "[3, 4, 5]")):
        text = re.sub(rf"^{name}:.*", f"{name}: {new}", text, flags=re.MULTILINE)
    for name, content in (("experiments/own/prereg.yaml", text), ("conf/experiment/own.yaml", OWN)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(multirun, "run_jobs", lambda jobs, skipped, **_: found.update(jobs=jobs))
    for more, code, said in (([], 0, ""), (["stage=tune"], 2, "error: no tune_seeds are registered\n")):
        found_code, _, err = typed("train", "-m", "experiment=own", *more, "--config-dir", tmp_path / "conf")
        assert (found_code, err.startswith(said)) == (code, True)
    assert [job.label for job in found["jobs"]] == ["seed=3", "seed=4", "seed=5"]
