"""Runs the jobs of a sweep. Each is the command one would type for it alone, in a process of its own, here or on a cluster."""

import contextlib
import math
import pathlib
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_eqx.errors import ConfigError, UserError, columns
from llama_eqx.submission import Job, Share, code_of, executor_for, left_by, sent_before, shares_of, stop_all, submitted, watcher
from llama_eqx.writer import occupant

EVERY = 0.2  # seconds between two looks at the jobs
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
    queue = watcher()
    shares = shares_of(at_once) if cluster == "local" else list[Share]([{}] * at_once)
    executors = {job.number: executor_for(folder, job, cluster, parameters) for job in jobs}
    given = [f"{name}={value}" for name, value in parameters.items() if value is not None]
    asked = {job.number: [*job.command, *given] for job in jobs}
    tasks = (parameters.get("nodes") or 1) * (parameters.get("tasks_per_node") or 1)
    sent = sent_before(executors, asked, tasks) if cluster == "slurm" else {}
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
                    handle = sent.pop(job.number, None) or submitted(executors[job.number], job, shares[0], cluster, asked[job.number])
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
                code = code_of(handle)
                ended[job.number] = job if isinstance(code, int) else job._replace(console=left_by(job, handle)), code
                left = f"{len(ended) + len(skipped)} of {len(jobs) + len(skipped)} over"
                say(f"job {job.number} {_said(code)} after {time.monotonic() - begun:,.0f} s: {left}")
                if isinstance(code, str) and cluster == "slurm":
                    say(f"job {job.number} as SLURM saw it: sacct -j {handle.job_id}, or soon: scontrol show job {handle.job_id}")
    except (KeyboardInterrupt, SystemExit) as stop:
        does = "waits for what runs to save itself" if cluster == "local" else "cancels what runs, which saves itself"
        say(f"told to stop: {does} ({_listed([job for job, *_ in running.values()]) or 'nothing'})")
        stop_all([*running, *sent.values()], cluster)
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
