"""How the processes of one run find each other and stay in touch, so that none waits for another that is missing or gone.

JAX's own start aborts without saying whom it waited for. So each process first connects to process 0, which sees who is missing and
whether all were given the same command. The lines stay open: over them an error reaches everyone, and every few seconds a sign of life.
"""

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any, NamedTuple, NoReturn

from llama_eqx.config import differences
from llama_eqx.errors import ConfigError, UserError
from llama_eqx.files import MALFORMED

PREEMPTED = 75  # the exit code that asks for a restart, which helps when a process was lost
# What a message may hold.
MESSAGES = {"process": int, "host": str, "config": dict, "error": str, "code": int, "lost": bool, "done": bool}
LAST_WORDS = 5.0  # seconds that a failed process has to say so on its own terminal


class Place(NamedTuple):
    """The number of this process, how many there are, and the address of process 0."""

    process: int
    processes: int
    coordinator: str


def meet(place: Place, timeout: float, config: dict[str, Any], heartbeat: float) -> "Lines":
    """Waits for all processes and compares their configs.

    Raises `ConfigError` in every process that came, naming those that did not come within `timeout` seconds or whose config differs.
    """
    deadline = time.monotonic() + timeout
    take = _receive if place.process == 0 else _call
    return Lines(*take(place, deadline, timeout, config), heartbeat)


class Line:
    """A socket for messages, JSON objects of one line each. An empty one is a sign of life."""

    def __init__(self, line: socket.socket):
        self._socket, self._file, self._sending = line, line.makefile("rb"), threading.Lock()

    def wait(self, seconds: float) -> None:
        """From now on, reading raises `TimeoutError` after `seconds` without anything to read."""
        self._socket.settimeout(seconds)

    def send(self, message: dict[str, Any]) -> None:
        with self._sending:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> dict[str, Any] | None:
        """The next message, None at the end. Raises `ValueError` for a line that is no message."""
        if not (content := self._file.readline(2**24)):
            return None
        with contextlib.suppress(*MALFORMED):
            message = json.loads(content)
            if all(isinstance(part, MESSAGES[name]) for name, part in message.items()):
                return message
        raise ValueError("this is no message of a process")

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Lines:
    """The open lines between process 0 and the others. A context manager: how it ends is sent along them.

    `config` is that of process 0.
    """

    current: "Lines | None" = None

    def __init__(self, peers: dict[str, Line], config: dict[str, Any], heartbeat: float):
        """`peers` are by the names that their errors are reported under: process 0 alone, or all but process 0."""
        self.config, self._heartbeat = config, heartbeat
        self._peers, self._over, self._first = peers, threading.Event(), "process 0" not in peers
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._listen, args=each, daemon=True) for each in peers.items()]
        self._beating = threading.Thread(target=self._beat, daemon=True)
        for thread in (*self._threads, self._beating):
            thread.start()

    def __enter__(self) -> "Lines":
        Lines.current = self
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # A collective may raise a foreign error because another process is gone. Then a line soon reports that.
        foreign = error is not None and not isinstance(error, UserError | SystemExit | KeyboardInterrupt)
        if foreign and self._ending.wait(LAST_WORDS):
            threading.Event().wait()  # until the process is ended
        Lines.current = None
        self._over.set()
        code = error.code if isinstance(error, UserError | SystemExit) else 130 if isinstance(error, KeyboardInterrupt) else 1
        if error is None or not code:
            self.tell({"done": True})
            self.close()
        else:
            said = "interrupted" if code == 130 else f"error: {type(error).__name__}: {error}"
            self.tell({"error": str(error) if isinstance(error, UserError) else said, "code": code})
            self.see_off()

    def close(self) -> None:
        self._over.set()
        for line in self._peers.values():
            line.hang_up()
        for thread in (*self._threads, self._beating):
            thread.join()
        for line in self._peers.values():
            line.close()

    def tell(self, message: dict[str, Any]) -> None:
        for line in self._peers.values():
            with contextlib.suppress(OSError):
                line.send(message)

    def see_off(self) -> None:
        """Lets process 0 leave last: when it is gone, JAX aborts the others in the middle of their messages."""
        deadline = time.monotonic() + LAST_WORDS
        for thread in self._threads if self._first else []:
            if thread is not threading.current_thread():
                thread.join(max(deadline - time.monotonic(), 0))

    def _beat(self) -> None:
        while not self._over.wait(min(self._heartbeat / 4, 5)):
            self.tell({})

    def _listen(self, name: str, line: Line) -> None:
        line.wait(self._heartbeat)
        lost = "error: {}\nnext: see its output; perhaps its machine is gone"
        try:
            while (message := line.read()) == {}:
                pass
        except TimeoutError:
            message = {"error": lost.format(f"no sign of life for {self._heartbeat:g} s"), "code": PREEMPTED, "lost": True}
        except (OSError, ValueError):  # a killed process may break the line
            message = None
        if self._over.is_set() or (message and "done" in message):
            return
        if not message or not {"error", "code"} <= message.keys():
            message = {"error": lost.format("ended without saying why"), "code": PREEMPTED, "lost": True}
        if self._ending.is_set():
            return  # another line has said it
        self._ending.set()
        said = f"{name}: {message['error']}" if self._first else message["error"]
        give_up(said, message, self, line)


def give_up(said: str, message: dict[str, Any], lines: Lines | None, line: Line | None = None) -> None:
    """Says why, here and along the lines, and ends this process. If a process is lost or stuck, adds the stacks of all threads here.

    `line` is the one that brought the message.
    """
    message = {**message, "error": said}
    print(said, file=sys.stderr, flush=True)
    logging.getLogger("llama_eqx").info("ended by %s", said)
    if message.get("lost"):
        logs = [handler.baseFilename for handler in logging.getLogger("llama_eqx").handlers if isinstance(handler, logging.FileHandler)]
        print(f"stacks: {logs[0]}" if logs else _stacks(), file=sys.stderr, flush=True)
        logging.getLogger("llama_eqx").info("%s", _stacks())
    if lines is not None:
        lines.tell(message)
        if line is not None and not message.get("lost"):
            with contextlib.suppress(OSError, ValueError):
                line.wait(LAST_WORDS)
                line.read()  # nothing more will come but its end
        lines.see_off()
    end(int(message["code"]))


def _stacks() -> str:
    """The stack of every thread, the main one first: `faulthandler` would leave it out beside a hundred others."""
    frames, said = sys._current_frames(), []
    for thread in sorted(threading.enumerate(), key=lambda thread: thread is not threading.main_thread()):
        if thread.ident in frames:
            said.append(f"thread {thread.name}, most recent call last:\n{''.join(traceback.format_stack(frames[thread.ident]))}")
    return "\n".join(said)


def _receive(place: Place, deadline: float, timeout: float, config: dict[str, Any]) -> tuple[dict[str, Line], dict[str, Any]]:
    port = int(place.coordinator.rpartition(":")[2])
    lines: dict[int, Line] = {}
    hosts, problems = {}, []
    both = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        advice = "another port; or, if two processes have the number 0, another number for one of them"
        raise ConfigError(f"cannot listen at port {port}: {error.strerror}", where="distributed.coordinator", next=advice) from None
    with server:
        while len(lines) < place.processes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                accepted, _ = server.accept()
            except OSError:
                continue
            line = Line(accepted)
            try:
                line.wait(min(left, 10))
                hello = line.read() or {}
                process, host, theirs = hello["process"], hello["host"], hello["config"]
            except (OSError, ValueError, KeyError):  # not a process of a run
                line.close()
                continue
            problems += [
                f"process {process} on {host} has a different config from process 0, {difference}"
                for difference in _disagreements(config, theirs)
            ]
            if process in lines or not 0 < process < place.processes:
                problems.append(f"process {process} on {host} has a number that is taken or out of range")
                line.close()
            else:
                lines[process], hosts[process] = line, host
    missing = [process for process in range(1, place.processes) if process not in lines]
    if missing:
        problems.insert(0, f"of {place.processes} processes, {_listed(missing)} did not reach {place.coordinator} within {timeout:g} s")
    answer: dict[str, Any] = {"error": "\n".join(problems)} if problems else {"config": config}
    for line in lines.values():
        with contextlib.suppress(OSError):
            line.send(answer)
    if problems:
        for line in lines.values():
            line.close()
        raise _refusal(answer["error"])
    return {f"process {process} on {hosts[process]}": line for process, line in lines.items()}, config


def _call(place: Place, deadline: float, timeout: float, config: dict[str, Any]) -> tuple[dict[str, Line], dict[str, Any]]:
    host, _, port = place.coordinator.rpartition(":")
    hello, last = {"process": place.process, "host": socket.gethostname(), "config": config}, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection((host.strip("[]"), int(port)), left))
        except OSError as error:  # it is not there yet
            last = f" ({error.strerror or error})"
            time.sleep(min(0.2, left))
            continue
        line.wait(left + 10)  # process 0 may have begun to wait later
        answer = None
        with contextlib.suppress(OSError, ValueError):
            line.send(hello)
            answer = line.read()
        if answer and "config" in answer:
            return {"process 0": line}, answer["config"]
        line.close()
        if answer and "error" in answer:
            raise _refusal(answer["error"])
        time.sleep(min(0.2, left))
    raise _refusal(f"process 0 of {place.processes} did not answer at {place.coordinator} within {timeout:g} s{last}")


def _refusal(text: str) -> ConfigError:
    return ConfigError(text, where="distributed", next="the same command on every machine; distributed.timeout=SECONDS waits longer")


def _disagreements(config: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    own = ("run_dir", "distributed")
    return [str(each) for each in differences({**config, **dict.fromkeys(own)}, {**theirs, **dict.fromkeys(own)})]


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"number{'s' * (len(numbers) > 1)} {shown}{' and others' * (len(numbers) > 8)}"


def end(code: int) -> NoReturn:
    """Ends this process now, whatever its threads are doing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    logging.shutdown()
    os._exit(code)
