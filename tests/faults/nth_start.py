"""python nth_start.py SOCKET FAULTS LOG MODULE ARGUMENT…: a process of server.py, as it is to whoever starts this one: it passes signals
on, and ends as that does.

At its nth start the process meets the nth of the faults, "save:2;restore;". Its number is added to LOG, a line a start.
"""

import json
import os
import pathlib
import signal
import socket
import sys

path, faults, log, *command = sys.argv[1:]
starts = len(pathlib.Path(log).read_text().splitlines()) if os.path.exists(log) else 0
fault = (faults.split(";") + [""] * (starts + 1))[starts]
line = socket.socket(socket.AF_UNIX)
line.connect(path)
message = {"command": command, "environment": {"LLAMA_EQX_CRASH_AT": fault} if fault else {}}
socket.send_fds(line, [json.dumps(message).encode()], [1, 2])
answers = line.makefile()
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.kill(pid, number))
with open(log, "a") as file:
    file.write(f"{pid}\n")
status = int(answers.readline())
if os.WIFSIGNALED(status):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
sys.exit(os.WEXITSTATUS(status))
