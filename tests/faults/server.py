"""python server.py SOCKET: forks a process for every command that comes. JAX is imported and a config composed already, as takes most of a
start."""

import json
import os
import pathlib
import runpy
import signal
import socket
import sys


def main(path: str) -> None:
    import grain  # noqa: F401

    import llama_eqx.compose
    import llama_eqx.tracking.plot
    import llama_eqx.training.loop

    llama_eqx.compose.load_config("data=text", "tokenizer=bytes")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    pathlib.Path(f"{path}.ready").touch()
    while True:
        line, _ = server.accept()
        message, files, _, _ = socket.recv_fds(line, 2**16, 2)
        if os.fork():
            line.close()
            for file in files:
                os.close(file)
        else:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            watch(line, json.loads(message), files)
            os._exit(0)


def watch(line: socket.socket, asked: dict, files: list[int]) -> None:
    """Tells the number of the process that runs the command, and in the end its status."""
    pid = os.fork()
    if pid:
        line.sendall(f"{pid}\n".encode())
        line.sendall(f"{os.waitpid(pid, 0)[1]}\n".encode())
        return
    line.close()
    os.setpgid(0, 0)
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
    os.environ.pop("LLAMA_EQX_CRASH_AT", None)
    os.environ.update(asked["environment"])
    module, *sys.argv = asked["command"]
    sys.argv.insert(0, module)
    runpy.run_module(module, run_name="__main__", alter_sys=True)  # which exits


if __name__ == "__main__":
    main(sys.argv[1])
