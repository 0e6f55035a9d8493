"""`python -m llama_eqx.supervise -- COMMAND…`: restarts a command for as long as that can help."""

import argparse
import datetime
import signal
import subprocess
import sys
import time
from types import FrameType

PREEMPTED = 75  # the code of a run that was told to stop and saved itself
# By 128 + n, launchers, shells and containers report that signal n ended what they started. A run also ends with 130 on Ctrl-C, and with
# 141 when nobody reads what it prints.
KILLED = {128 + number: number for number in signal.Signals if number not in (signal.SIGINT, signal.SIGPIPE)}
SHORT = 60.0  # seconds: a start that ended sooner made no progress to speak of
IMPORTED = 5.0  # seconds: a start that was told to stop sooner had not begun


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llama_eqx.supervise",
        description="Starts COMMAND again when it was preempted (exit code 75) or a signal n ended it (or code 128 + n, not 130).",
        epilog="python -m llama_eqx.supervise -- python -m llama_eqx.train model=llama2_7b mesh=v4-32",
    )
    parser.add_argument("--restarts", type=int, default=100, help="how often at most (default %(default)s)")
    parser.add_argument(
        "--short",
        type=int,
        default=3,
        help=f"give up after so many starts in a row of under {SHORT:.0f} s that a signal ended (default %(default)s; 0: never)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("no command: python -m llama_eqx.supervise -- python -m llama_eqx.train …")
    sys.exit(supervise(with_run_dir(command), restarts=arguments.restarts, short=arguments.short))


def supervise(command: list[str], *, restarts: int, short: int) -> int:
    """Runs `command` to its end, through restarts. Returns its last exit code, or 128 + n if signal n ended it.

    A signal to this process is passed on, and nothing is restarted after it.
    """
    passed: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        passed.append(number)
        if child is not None and child.poll() is None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, pass_on)

    started, in_a_row = 0, 0
    while True:
        begun = time.monotonic()
        try:
            # A process group of its own: what is typed at the terminal arrives once, from here.
            child = subprocess.Popen(command, process_group=0)
        except OSError as error:
            say(f"{command[0]} cannot be started: {error.strerror}")
            return 127
        if passed:
            child.send_signal(passed[-1])
        code = child.wait()
        started += 1
        killed = KILLED.get(code, -code if code < 0 else None)
        ended = f"exit code {code}" if killed is None else signal.Signals(killed).name
        lasted = time.monotonic() - begun
        in_a_row = in_a_row + 1 if (killed and lasted < SHORT) or (code == PREEMPTED and lasted < IMPORTED) else 0
        shown = code if code >= 0 else 128 - code
        if killed is None and code != PREEMPTED:
            if code:
                say(f"ended by {ended}: not started again, since that would not help")
            return shown
        if passed:
            say(f"ended by {ended} after {signal.Signals(passed[-1]).name}: not started again")
            return shown
        if started > restarts:
            say(f"ended by {ended}: not started again after {restarts} restarts (--restarts)")
            return shown
        if short and in_a_row >= short:
            say(f"ended by {ended}: not started again after {short} starts in a row of less than {SHORT:.0f} s (--short)")
            return shown
        say(f"ended by {ended}: restart {started} of {restarts} at most")
        time.sleep(min(2.0 ** min(in_a_row, 6) - 1, 60.0))  # at once after a preemption, later and later when it keeps dying


def with_run_dir(command: list[str]) -> list[str]:
    """The command, with a `run_dir` if it trains and names none: otherwise every start would begin a new run. Each job of
    a sweep has its own.
    """
    words = iter(command)
    trains = any(word == "llama_eqx.train" or word.endswith("launch_local.py") for word in words)
    if not trains or any(word.startswith("run_dir=") or word in ("-m", "--multirun") for word in words):
        return command
    folder = f"outputs/{datetime.datetime.now():%Y-%m-%d/%H-%M-%S-%f}"
    say(f"run_dir={folder}, for all starts")
    return [*command, f"run_dir={folder}"]


def say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
