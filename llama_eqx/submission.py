"""How a job of a sweep gets a process, of this machine or of SLURM, and how it ended."""

import contextlib
import datetime
import hashlib
import io
import os
import pathlib
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import submitit
from submitit.core.core import InfoWatcher
from submitit.core.utils import FailedJobError, FailedSubmissionError, environment_variables

from llama_eqx.config import nearest
from llama_eqx.errors import ConfigError, first_line

ASKED = "asked.txt"  # beside submitit's files of a job: its command and parameters


class Job(NamedTuple):
    """Job `number` of a sweep: `label` tells it from the others, `command` runs it, and its output goes to `console` in its run directory.
    `diverged` is the record of a job that ended without finite numbers, and so is over.
    """

    number: int
    label: str
    command: list[str]
    console: pathlib.Path
    diverged: pathlib.Path | None = None


# Environment variables of a job on this machine; None unsets one. On a cluster there are none: the scheduler chooses GPUs and cores.
Share = Mapping[str, str | None]


class Queue(InfoWatcher):
    """The states of SLURM's jobs, from `squeue`; GONE if it has forgotten a job. Submitit's own watcher asks `sacct`: without accounting, a
    job that was killed would never be over, and it does not say why one is not started. `failed` is what `squeue` says if it fails.
    """

    over = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT", "GONE")
    usual = ("None", "Priority", "Resources", "BeginTime", "Dependency", "Prolog", "")  # reasons of a job that only waits for its turn
    failed = ""

    def update(self) -> None:
        command = ["squeue", f"--user={os.getuid()}", "--states=all", "--noheader", "--format=%i %T %r"]
        asked = subprocess.run(command, capture_output=True, text=True)
        self._last_status_check = time.time()
        self.failed = (asked.stderr.strip() or "squeue failed") if asked.returncode else ""
        if not self.failed:
            listed = dict(line.split(maxsplit=1) for line in asked.stdout.splitlines())
            self._info_dict = {job: {"said": listed.get(job, "GONE")} for job in self._registered}

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        return self.get_info(job_id, mode).get("said", "UNKNOWN").partition(" ")[0]

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        return self.get_state(job_id, mode) in self.over

    def held(self, job_id: str) -> str:
        """Why SLURM does not start a job, if it does more than wait for its turn; else empty."""
        state, _, reason = self.get_info(job_id, "cache").get("said", "").partition(" ")
        return reason if state == "PENDING" and reason not in self.usual else ""


def watcher() -> Queue:
    """The watcher of all of SLURM's jobs, in the place of submitit's own."""
    submitit.SlurmJob.watcher = queue = Queue(delay_s=60)  # pyright: ignore[reportAttributeAccessIssue]
    return queue


def shares_of(at_once: int) -> list[Share]:
    """Equal shares of the cores and the GPUs for the jobs that run here at a time. If there are more jobs than GPUs, jobs share one."""
    gpus = _gpus() if at_once > 1 else []
    each = len(gpus) // at_once
    own = [",".join(gpus[i * each :][:each] or gpus[i % len(gpus) :][:1]) for i in range(at_once if len(gpus) > 1 else 0)]
    # Few threads are faster than many that wait for each other's cores. The first of several jobs on a GPU would take most of its memory.
    threads = str(max(1, (os.cpu_count() or 1) // at_once)) if at_once > 1 else None
    preallocate = "false" if at_once > 1 and not each else None
    return [
        {
            "CUDA_VISIBLE_DEVICES": visible,  # said even if it is as before, since submitit's executor hides GPUs that were not requested
            "NPROC": os.environ.get("NPROC", threads),
            # A step on a CPU allocates all of its memory anew: huge pages save a tenth to a quarter of the step.
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", preallocate),
        }
        for visible in own or [os.environ.get("CUDA_VISIBLE_DEVICES")] * at_once
    ]


def _gpus() -> list[str]:
    """The GPUs that are visible, as CUDA_VISIBLE_DEVICES names them, without a process that takes memory on them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU \d+: .*\(UUID: ([\w-]+)\)", listed, re.MULTILINE)


def executor_for(folder: pathlib.Path, job: Job, cluster: str, parameters: Mapping[str, Any]) -> submitit.AutoExecutor:
    """What submits a job. At SLURM, submitit's files lie where a later start looks for those of the same run directory. Here, each start
    has its own place: the files have the names of process ids, which an earlier sweep in this folder may have had too, above all in
    containers.
    """
    same = hashlib.sha256(str(job.console.parent).encode()).hexdigest()[:16]
    place = folder / (f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S_%f}" if cluster == "local" else same)
    where, advice = "hydra.launcher.parameters", ""
    try:
        executor = submitit.AutoExecutor(place, cluster=cluster)
        executor.update_parameters(**parameters)
        return executor
    except RuntimeError:
        where, what, advice = "hydra/launcher=slurm", "no srun here: this machine is not part of a SLURM cluster", "hydra/launcher=local"
    except (NameError, AssertionError) as error:
        what = first_line(error)
        if match := re.match(r"(Unknown argument '(?P<name>\w+)' for executor '(?P<prefix>\w+)').*Valid arguments: (?P<names>.*)", what):
            names = [f"{match['prefix']}_{name}" for name in sorted(match["names"].split(", "))]
            what, advice = match[1], nearest(f"{match['prefix']}_{match['name']}", names)
    raise ConfigError(what, where=where, next=advice)


def sent_before(executors: Mapping[int, submitit.AutoExecutor], asked: Mapping[int, list[str]], tasks: int) -> dict[int, Any]:
    """The jobs, by number, that an earlier start has sent to SLURM, each with so many tasks, and that are not over.

    Raises `ConfigError` when they were sent with other settings than are asked for now.
    """
    sent, other, then, now = dict[int, Any](), list[str](), set[str](), set[str]()
    for number, executor in executors.items():
        for path in executor.folder.glob("*_submitted.pkl"):
            handle = submitit.SlurmJob(executor.folder, path.name.partition("_")[0], range(tasks))
            if handle.done():
                continue
            sent[number] = handle
            before, asks = {*shlex.split((executor.folder / ASKED).read_text())}, {*asked[number]}
            if before != asks:
                other.append(handle.job_id)
                then, now = then | before - asks, now | asks - before
    if other:
        raise ConfigError(
            f"jobs of an earlier start are still at SLURM, with {' '.join(sorted(then)) or 'nothing'} where this command has "
            f"{' '.join(sorted(now)) or 'nothing'}",
            where=f"SLURM's job {', '.join(other)}",
            kept="these jobs, as they are",
            next=f"scancel {' '.join(other)}, and the same command again; or the settings they have, to take them up",
        )
    return sent


def submitted(executor: submitit.AutoExecutor, job: Job, share: Share, cluster: str, asked: list[str]) -> Any:
    """Submits a job so that a terminal's Ctrl-C reaches none of submitit's processes, which would break off the job they watch.

    Raises `ConfigError` when the scheduler rejects the job.
    """
    executor.folder.mkdir(parents=True, exist_ok=True)
    (executor.folder / ASKED).write_text(shlex.join(asked))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Submitit's processes would look for every module in the working directory first, as this one did not: see `llama_eqx/__init__.py`.
    safe = {} if pathlib.Path.cwd().resolve() == pathlib.Path(__file__).resolve().parents[1] else {"PYTHONSAFEPATH": "1"}
    try:
        with environment_variables(**safe), contextlib.redirect_stderr(io.StringIO()):  # what sbatch says is in the error
            return executor.submit(run_command, job.command, str(job.console), share, os.getpid() if cluster == "local" else None)
    except (FailedJobError, FailedSubmissionError) as error:
        what = str(error).strip().replace("\nsbatch: error: ", "; ") or "sbatch failed"
        advice = "sinfo -o '%P %l %c %m %G' lists partitions with their time limits, cores, memory and GPUs; "
        advice += "+hydra.launcher.parameters.slurm_account=NAME names an account"
        if "Unable to contact" in what:
            advice = "the same command again, when scontrol ping finds the controller"
        raise ConfigError(what, where="hydra.launcher.parameters", next=advice) from None
    finally:
        signal.signal(signal.SIGINT, before)


def run_command(command: list[str], console: str, share: Share, sweep: int | None) -> int:
    """Runs `command` under submitit. Returns its exit code, or minus the number of the signal that ended it.

    The command is told to stop when the process `sweep` is gone: killed, it could not tell its jobs.
    """
    environment = {**os.environ, **share}
    environment = {name: value for name, value in environment.items() if value is not None}
    rank = int(os.environ.get("SLURM_PROCID", 0))  # of several processes of one job, each has a file
    with open(f"{console}.{rank}" if rank else console, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # the last two come before the time is up: a run saves itself
            signal.signal(number, lambda number, _: process.terminate())
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                if sweep is not None and not _lives(sweep):
                    process.terminate()
            return process.returncode
        except BaseException:
            process.terminate()
            raise


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def stop_all(handles: list[Any], cluster: str) -> None:
    """Stops the jobs; each run saves itself and ends. On a cluster, the scheduler ends them."""
    for handle in handles if cluster != "local" else []:
        handle.cancel(check=False)  # scancel says it itself when it fails
    while cluster == "local" and (left := [handle for handle in handles if not handle.done()]):
        for handle in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(handle.job_id), signal.SIGTERM)  # a job that is just starting misses the first
        time.sleep(1)


def code_of(handle: Any) -> int | str:
    """The worst exit code of a job's processes, or how the job was lost."""
    try:
        return max(handle.results(), key=abs)
    except Exception:
        return f"lost: {handle.state}"


def left_by(job: Job, handle: Any) -> pathlib.Path:
    """The first file in which something is that a lost job printed, or that was printed of it, if there is one."""
    sent = handle.paths.submitted_pickle.stat().st_mtime  # the console may be that of an earlier start
    files = [path for path in (handle.paths.stderr, job.console) if path.exists()]
    return next((path for path in files if path.stat().st_size and path.stat().st_mtime >= sent), handle.paths.stdout)
