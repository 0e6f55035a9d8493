#!/usr/bin/env python
"""Runs one training run as N processes on this machine. They share 8 virtual devices unless mesh= says otherwise.

    python scripts/launch_local.py 2 model=llama3_1m train.steps=20

Each line starts with the number of its process. When one process fails, the others are ended, and the script exits with its code.
If a signal ended it, the script says what to type to start all of them again.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

GRACE = 10.0  # seconds that the others have to say why they end
RUN_DIR: list[str] = []  # the override that a process printed


def main() -> int:
    if len(sys.argv) < 2 or not sys.argv[1].isdecimal() or not int(sys.argv[1]):
        print(__doc__, file=sys.stderr)
        return 2
    n, overrides = int(sys.argv[1]), sys.argv[2:]
    if not any(override.startswith("mesh=") for override in overrides):
        overrides = ["mesh=cpu-8", f"mesh.hosts={n}", *overrides]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-u", "-m", "llama_eqx.train", *overrides]
    children, readers = [], []
    for i in range(n):
        environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(n), "JAX_PROCESS_ID": str(i)}
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
        children.append(child)
        for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            readers.append(threading.Thread(target=copy, args=(i, source, target)))
            readers[-1].start()
    signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in children])
    try:
        code = wait(children)
    except KeyboardInterrupt:  # the terminal has sent the signal to them too
        code = wait(children)
    for reader in readers:
        reader.join()
    if code < 0:
        given = any(override.startswith("run_dir=") for override in overrides)
        again = [*sys.argv, *([] if given else RUN_DIR[:1])]
        print(f"{signal.Signals(-code).name} ended a process\nnext: {shlex.join(['python', *again])}", file=sys.stderr)
    return code if code >= 0 else 128 - code


def copy(i: int, source: IO[str], target: IO[str]) -> None:
    for line in source:
        if "peer ranks" in line:  # printed on every connection by the library that CPUs communicate with
            continue
        if line.startswith("run_dir="):
            RUN_DIR.append(line.strip())
        target.write(f"[{i}] {line}")
        target.flush()


def wait(children: list[subprocess.Popen[str]]) -> int:
    """The exit code of the first process that fails, negative if a signal ended it, or 0 when none does."""
    failed: tuple[int, float] | None = None
    while running := [child for child in children if child.poll() is None]:
        failed = failed or min(((child.returncode, time.monotonic()) for child in children if child.returncode), default=None)
        if failed and time.monotonic() > failed[1] + GRACE:
            for child in running:
                child.kill()
        time.sleep(0.1)
    return failed[0] if failed else min((child.returncode for child in children if child.returncode), default=0)


if __name__ == "__main__":
    sys.exit(main())
