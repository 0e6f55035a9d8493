"""python nth_start.py FAULTS LOG COMMAND…: becomes COMMAND, which at its nth start meets the nth of the faults, "save:2;restore;".

A line with the process's number is added to LOG at every start.
"""

import os
import pathlib
import sys

faults, log, *command = sys.argv[1:]
with open(log, "a") as file:
    file.write(f"{os.getpid()}\n")
starts = len(pathlib.Path(log).read_text().splitlines())
fault = (faults.split(";") + [""] * starts)[starts - 1]
os.environ.pop("LLAMA_EQX_CRASH_AT", None)
if fault:
    os.environ["LLAMA_EQX_CRASH_AT"] = fault
os.execvp(command[0], command)
