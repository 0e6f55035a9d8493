"""python nth_start.py SOCKET FAULTS LOG RUN_DIR MODULE ARGUMENT…: a process of server.py, as it is to whoever starts this one: it passes
signals on, and ends as that does.

At its nth start the process meets the nth of the faults, "save:2;after:0.3". Its number is added to LOG, a line a start.
"""

import contextlib
import glob
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time

path, faults, log, run_dir, *command = sys.argv[1:]
starts = len(pathlib.Path(log).read_text().splitlines()) if os.path.exists(log) else 0
fault = (faults.split(";") + [""] * (starts + 1))[starts]
kind, _, seconds = fault.partition(":")
outside = kind in ("after", "saving")


def saves() -> set[int]:
    return {os.stat(path).st_ino for path in glob.glob(f"{run_dir}/checkpoints/*.unfinished*")}


before = saves()  # that were broken off
line = socket.socket(socket.AF_UNIX)
line.connect(path)
message = {"command": command, "environment": {"LLAMA_EQX_CRASH_AT": fault} if fault and not outside else {}}
socket.send_fds(line, [json.dumps(message).encode()], [1, 2])
answers = line.makefile()
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.kill(pid, number))
with open(log, "a") as file:
    file.write(f"{pid}\n")


def kill() -> None:
    while kind == "saving":
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            if saves() - before:
                break
        time.sleep(0.0005)
    time.sleep(float(seconds))
    os.kill(pid, signal.SIGKILL)  # unless this process has ended with it


if outside:
    threading.Thread(target=kill, daemon=True).start()
status = int(answers.readline())
if os.WIFSIGNALED(status):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
sys.exit(os.WEXITSTATUS(status))
