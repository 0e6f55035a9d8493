"""Runs the jobs of a sweep. Each is the command one would type for it alone, in a process of its own, here or on a cluster."""

import contextlib
import datetime
import hashlib
import io
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import submitit
from submitit.core.core import InfoWatcher
from submitit.core.utils import FailedJobError, FailedSubmissionError, environment_variables

from llama_eqx.config import nearest
from llama_eqx.errors import ConfigError, UserError, columns, first_line
from llama_eqx.writer import occupant

EVERY = 0.2  # seconds between two looks at the jobs
ASKED = "asked.txt"  # beside submitit's files of a job: its command and parameters
AGAIN = 30.0  # seconds until SLURM is asked again to take a job that it has rejected
HELD = 60.0  # seconds until it is said why SLURM does not start a job: its first reasons are preliminary
CODES = {
    1: "ended by an error",
    2: "refused before it began",
    3: "its data cannot be used",
    4: "its checkpoint cannot be used",
    5: "its numbers were not finite",
    6: "it could not write",
    75: "preempted",
    130: "interrupted",
}


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


class MultirunError(UserError):
    """`code` is 75 when every job that is missing was preempted and would go on."""

    def __init__(self, codes: Sequence[int | str], what: str, **parts: str):
        super().__init__(what, **parts)
        self.code = 75 if all(code == 75 for code in codes) else 1


def run_jobs(
    jobs: Sequence[Job],
    skipped: Sequence[Job],
    *,
    folder: pathlib.Path,
    cluster: str,
    at_once: int,
    parameters: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Runs `jobs`, at most `at_once` at a time, even if some fail; `skipped` are those that need not run. A job waits while another
    process writes in its run directory.

    `cluster` is one of submitit's ("local", "slurm"), `parameters` those of its executor, and `folder` where it keeps its files.

    Raises `MultirunError` at the end when not every job has succeeded, or at an interrupt; `ConfigError` for invalid parameters.
    """
    submitit.SlurmJob.watcher = queue = Queue(delay_s=60)  # pyright: ignore[reportAttributeAccessIssue]
    shares = _shares(at_once) if cluster == "local" else list[Share]([{}] * at_once)
    executors = {job.number: _executor(folder, job, cluster, parameters) for job in jobs}
    given = [f"{name}={value}" for name, value in parameters.items() if value is not None]
    asked = {job.number: [*job.command, *given] for job in jobs}
    tasks = (parameters.get("nodes") or 1) * (parameters.get("tasks_per_node") or 1)
    sent = _sent(executors, asked, tasks) if cluster == "slurm" else {}
    waiting, running, ended = (
        sorted(jobs, key=lambda job: job.number not in sent),
        dict[Any, tuple[Job, float, Share]](),
        dict[int, tuple[Job, int | str]](),
    )
    told = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if skipped:
        say(f"finished before: {_listed(skipped)}")
    diverged = [job for job in skipped if job.diverged]
    for job in diverged:
        say(f"job {job.number} ended without finite numbers: {job.label} (to make it again remove {job.diverged})")
    told_of, retry = set[int | str](), 0.0

    def say_once(what: int | str, line: str) -> None:
        if what not in told_of:
            told_of.add(what)
            say(line)

    def may_begin(job: Job) -> bool:
        folder = job.console.parent
        if job.number in sent:
            return True
        if other := occupant(folder):
            say_once(job.number, f"job {job.number} waits for {other}, which writes in {folder}")
        return not other

    try:
        while waiting or running:
            while shares and time.monotonic() >= retry and (job := next(filter(may_begin, waiting), None)):
                job.console.parent.mkdir(parents=True, exist_ok=True)
                begins = "begins" if cluster == "local" else f"is in SLURM's queue{' since an earlier start' * (job.number in sent)}"
                try:
                    handle = sent.pop(job.number, None) or _submitted(executors[job.number], job, shares[0], cluster, asked[job.number])
                except ConfigError as error:
                    if not (running or ended):
                        raise
                    # It has taken others, so this is a limit. A job that is over, or of another sweep, may still count.
                    retry = math.inf if running else time.monotonic() + AGAIN
                    say_once(error.what, f"job {job.number} waits until SLURM takes it: {error.what}")
                    break
                waiting.remove(job)
                running[handle] = job, time.monotonic(), shares.pop(0)
                say(f"job {job.number} {begins}{f' as {handle.job_id}' * (cluster != 'local')}{': ' * bool(job.label)}{job.label}")
            time.sleep(EVERY)
            if failed := queue.failed:
                say_once("squeue", f"{failed}: it is asked again every minute, and jobs go on meanwhile")
            for handle, (job, begun, _) in running.items() if cluster == "slurm" else ():
                if time.monotonic() - begun > HELD and (why := queue.held(handle.job_id)):
                    compare = f"scontrol show job {handle.job_id}; sinfo -Nl"
                    again = "Ctrl-C, and the same command with other hydra.launcher.parameters"
                    say_once(why, f"SLURM does not start job {job.number}: {why}. Compare {compare}. To ask for something else: {again}")
            for handle in [handle for handle in running if handle.done()]:
                job, begun, share = running.pop(handle)
                shares.append(share)
                retry = 0.0
                code = _code(handle)
                ended[job.number] = job if isinstance(code, int) else job._replace(console=_left(job, handle)), code
                left = f"{len(ended) + len(skipped)} of {len(jobs) + len(skipped)} over"
                say(f"job {job.number} {_said(code)} after {time.monotonic() - begun:,.0f} s: {left}")
                if isinstance(code, str) and cluster == "slurm":
                    say(f"job {job.number} as SLURM saw it: sacct -j {handle.job_id}, or soon: scontrol show job {handle.job_id}")
    except (KeyboardInterrupt, SystemExit) as stop:
        does = "waits for what runs to save itself" if cluster == "local" else "cancels what runs, which saves itself"
        say(f"told to stop: {does} ({_listed([job for job, *_ in running.values()]) or 'nothing'})")
        _stop([*running, *sent.values()], cluster)
        if isinstance(stop, SystemExit):
            raise
        over, total = len(ended) + len(skipped), len(jobs) + len(skipped)
        error = MultirunError(
            [],
            f"interrupted: {over} of {total} jobs were over",
            where=str(folder.parent),
            kept="those, and what the others had saved",
            next="the same command again goes on",
        )
        error.code = 130
        raise error from None
    finally:
        signal.signal(signal.SIGTERM, told)

    failed = [(job, code) for _, (job, code) in sorted(ended.items()) if code != 0]
    fine = len(jobs) + len(skipped) - len(failed) - len(diverged)
    counted = f"{fine} ok" + f", {len(diverged)} without finite numbers" * bool(diverged)
    if not failed:
        return say(f"{counted}, in {folder.parent}")
    rows = [(str(j.number), j.label, _said(code), str(j.console) if j.console.exists() else "nothing") for j, code in failed]
    for row in columns([("job", "", "", "what it printed"), *rows]):
        say(row)
    reasons = [_reason(job.console) for job, _ in failed]
    (why, place, advice), alike = reasons[0], len({why for why, _, _ in reasons}) == 1
    if len({place for _, place, _ in reasons}) == 1 and place:
        why += f" ({place})" * bool(why)
    if not alike:
        for (job, code), (what, _, _) in zip(failed, reasons, strict=True):
            say(f"job {job.number}: {what.splitlines()[0] if what else code if isinstance(code, str) else 'it printed no error'}")
        why = ""
    raise MultirunError(
        [code for _, code in failed],
        f"{counted}, {len(failed)} failed ({'; '.join(f'job {job.number}: {_said(code)}' for job, code in failed)})"
        + f"; the reason: {why}" * bool(why),
        where=str(folder.parent),
        kept=f"the {fine} that succeeded" if fine else "",
        next=(why and advice) or "the same command again runs what is missing and skips what is there",
    )


def _shares(at_once: int) -> list[Share]:
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


def _executor(folder: pathlib.Path, job: Job, cluster: str, parameters: Mapping[str, Any]) -> submitit.AutoExecutor:
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


def _sent(executors: Mapping[int, submitit.AutoExecutor], asked: Mapping[int, list[str]], tasks: int) -> dict[int, Any]:
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


def _submitted(executor: submitit.AutoExecutor, job: Job, share: Share, cluster: str, asked: list[str]) -> Any:
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


def _stop(handles: list[Any], cluster: str) -> None:
    """Stops the jobs; each run saves itself and ends. On a cluster, the scheduler ends them."""
    for handle in handles if cluster != "local" else []:
        handle.cancel(check=False)  # scancel says it itself when it fails
    while cluster == "local" and (left := [handle for handle in handles if not handle.done()]):
        for handle in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(handle.job_id), signal.SIGTERM)  # a job that is just starting misses the first
        time.sleep(1)


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


def _code(handle: Any) -> int | str:
    """The worst exit code of a job's processes, or how the job was lost."""
    try:
        return max(handle.results(), key=abs)
    except Exception:
        return f"lost: {handle.state}"


def _left(job: Job, handle: Any) -> pathlib.Path:
    """The first file in which something is that a lost job printed, or that was printed of it, if there is one."""
    sent = handle.paths.submitted_pickle.stat().st_mtime  # the console may be that of an earlier start
    files = [path for path in (handle.paths.stderr, job.console) if path.exists()]
    return next((path for path in files if path.stat().st_size and path.stat().st_mtime >= sent), handle.paths.stdout)


def _said(code: int | str) -> str:
    if isinstance(code, str):
        return code
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"{name}, out of memory?" if -code == signal.SIGKILL else name
    return "ok" if code == 0 else f"exit code {code}, {CODES.get(code, 'unknown')}"


def _reason(console: pathlib.Path) -> tuple[str, str, str]:
    """What the last command of a console says went wrong, where, and what is next, as a `UserError` prints it; else empty."""
    said = {"error": "", "where": "", "next": ""}
    with contextlib.suppress(OSError):
        last = f"\n{console.read_text(encoding='utf-8', errors='replace')}".rpartition("\n$ ")[2]
        said |= re.findall(r"^(error|where|next): (.*(?:\n {7}.*)*)", last, re.MULTILINE)
    error, where, advice = (text.replace("\n" + " " * 7, "\n") for text in said.values())
    return error, where, advice


def _listed(jobs: Sequence[Job]) -> str:
    return f"{len(jobs)} jobs" if len(jobs) > 8 else f"job {', '.join(str(job.number) for job in jobs)}"


def labels(sweep: Sequence[Sequence[str]]) -> list[str]:
    """What tells each job of a sweep from the others: of a single one, nothing."""
    shared = set.intersection(*map(set, sweep))
    return [" ".join(override for override in overrides if override not in shared) for overrides in sweep]


def command(verb: str, overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> list[str]:
    """The command of a verb with overrides in Hydra's grammar: `--run` keeps them from being quoted a second time."""
    folders = [word for folder in config_dirs for word in ("--config-dir", folder)]
    return [sys.executable, "-m", f"llama_eqx.{verb}", "--run", *folders, *overrides]
