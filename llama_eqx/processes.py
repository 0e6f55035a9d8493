"""Several processes as one run: how they find each other, and how one that fails takes the others with it.

The computing is JAX's own. But its start aborts without a word about whom it waited for, and a process that fails leaves the others
waiting for minutes. So each process first goes to process 0, which sees who is missing and whether all were given the same command,
and keeps the line to it open, over which an error reaches everyone.
"""

import contextlib
import dataclasses
import json
import logging
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from llama_eqx.config import Config, differences, dump
from llama_eqx.errors import ConfigError, DataError, UserError

T = TypeVar("T")

PREEMPTED = 75  # the exit code that asks to be started again, as it helps when a process was lost
LAST_WORDS = 5.0  # seconds that a failed process has to say so on its own terminal


class DistributedConfig(Config):
    """Process number `process`, from 0, of `processes`; `coordinator` is HOST:PORT of number 0.

    Without them they are looked for where TPU pods, SLURM, Open MPI and Kubernetes jobs name them. `timeout` is how many seconds the
    first process waits for the last.
    """

    coordinator: str | None
    processes: int | None
    process: int | None
    timeout: int

    def check(self) -> None:
        names = ("coordinator", "processes", "process")
        missing = [name for name in names if getattr(self, name) is None]
        if missing and len(missing) < len(names):
            raise ConfigError(f"not given: {', '.join(missing)}", where=missing[0], next="all three, or none for a single process")
        if self.coordinator is None or self.processes is None or self.process is None:
            return
        if not 0 <= self.process < self.processes:
            raise ConfigError(f"{self.processes} processes have no number {self.process}", where="process", next="the first is 0")
        if not self.coordinator.rpartition(":")[2].isdecimal():
            raise ConfigError(f"{self.coordinator} has no port", where="coordinator", next="HOST:PORT")


class Place(NamedTuple):
    """Which of the processes this is, and where number 0 is to be found."""

    process: int
    processes: int
    coordinator: str


@contextlib.contextmanager
def together(config: Any) -> Iterator[tuple[Any, int]]:
    """`config` with the `run_dir` of process 0, and the number of this process. A single process is left as it is.

    Whatever ends one of the processes within ends them all, with its exit code, and process 0 says what it was.

    Raises `ConfigError` when some do not come in time, or were given another config.
    """
    place, local_devices = _place(config.distributed)
    if place is None:
        yield config, 0
        return
    if jax.distributed.is_initialized():
        raise ConfigError("a sweep over several processes needs new ones for every job", where="-m", next="hydra/launcher=submitit_slurm")
    lines = meet(place, config.distributed.timeout, dump(config))
    with lines:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=config.distributed.timeout,
        )
        yield dataclasses.replace(config, run_dir=lines.config["run_dir"]), place.process


def leave(code: int) -> None:
    """Ends this process. One of several that has failed does not wait for the others, as JAX would at a regular end."""
    if code and "jax" in sys.modules and jax.distributed.is_initialized():
        end(code)
    sys.exit(code)


def once(action: Callable[[], T]) -> T | None:
    """The result of `action`, which process 0 carries out while the others wait; None in those."""
    result = action() if jax.process_index() == 0 else None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("once")
    return result


def of_first(number: int) -> int:
    """The number that process 0 gives."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def any_process(here: bool) -> bool:
    """Whether it is so in any of the processes."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(here))))


def require_same(text: str, what: str) -> None:
    """Raises `DataError` in every process when they do not all give the same `text`."""
    found = np.ravel(multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode()))))
    if others := np.flatnonzero(found != found[0]).tolist():
        raise DataError(
            f"processes {', '.join(map(str, others))} have other {what} than process 0",
            where="data",
            next="the same files and the same versions of the libraries on every machine",
        )


def meet(place: Place, timeout: float, config: dict[str, Any]) -> "Lines":
    """Waits for all processes and compares what they are to do.

    Raises `ConfigError`, in every process that came, naming those that did not within `timeout` seconds, or whose config differs.
    """
    deadline = time.monotonic() + timeout
    return _receive(place, deadline, timeout, config) if place.process == 0 else _call(place, deadline, timeout, config)


class Lines:
    """The open lines between process 0 and the others. A context manager: what ends it is sent along them.

    `config` is that of process 0.
    """

    def __init__(self, peers: dict[str, socket.socket], config: dict[str, Any]):
        """`peers` by the names under which their errors are to be told: process 0 alone, or all but process 0."""
        self.config = config
        self._peers, self._over, self._first = peers, threading.Event(), "process 0" not in peers
        self._threads = [threading.Thread(target=self._listen, args=each, daemon=True) for each in peers.items()]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._over.set()
        code = error.code if isinstance(error, UserError | SystemExit) else 130 if isinstance(error, KeyboardInterrupt) else 1
        if error is None or not code:
            self._tell({"done": True})
            self.close()
        else:
            said = "interrupted" if code == 130 else f"error: {type(error).__name__}: {error}"
            self._tell({"error": str(error) if isinstance(error, UserError) else said, "code": code})
            self._see_off()

    def close(self) -> None:
        for line in self._peers.values():
            with contextlib.suppress(OSError):  # the other end is closed
                line.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for line in self._peers.values():
            line.close()

    def _tell(self, message: dict[str, Any]) -> None:
        for line in self._peers.values():
            with contextlib.suppress(OSError):
                _send(line, message)

    def _listen(self, name: str, line: socket.socket) -> None:
        try:
            message = _read(line)
        except OSError:  # the network's trouble; JAX notices by itself when a process is gone
            return
        if self._over.is_set() or (message and "done" in message):
            return
        self._over.set()
        message = message or {"error": "error: ended without a word\nnext: see its output; perhaps its machine is gone", "code": PREEMPTED}
        said = f"{name}: {message['error']}" if self._first else message["error"]
        print(said, file=sys.stderr, flush=True)
        logging.getLogger("llama_eqx").info("ended by %s", said)
        self._tell(message | {"error": said})
        with contextlib.suppress(OSError):
            line.settimeout(LAST_WORDS)
            line.recv(1)  # nothing more will come but its end
        self._see_off()
        end(int(message["code"]))

    def _see_off(self) -> None:
        """Process 0 leaves last: JAX aborts the others, in the middle of what they have to say, when it is gone."""
        for thread in self._threads if self._first else []:
            if thread is not threading.current_thread():
                thread.join(LAST_WORDS)


def _place(config: DistributedConfig) -> tuple[Place | None, Any]:
    """None for a single process; with it the local devices that are this process's own, None for all."""
    coordinator, processes, process, local_devices = config.coordinator, config.processes, config.process, None
    if coordinator is None:
        # A pod of Kubernetes that is no part of a job would be asked for one.
        parts_of_jobs = {"JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "SLURM_PROCID"}
        if "KUBERNETES_SERVICE_HOST" in os.environ and not parts_of_jobs & os.environ.keys():
            return None, None
        from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` would find, before it does anything

        try:
            found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, config.timeout)
        except Exception as error:
            raise ConfigError(
                f"the cluster around this process cannot be made out: {error}",
                where="distributed",
                next="distributed.coordinator=HOST:PORT distributed.processes=N distributed.process=I",
            ) from error
        coordinator, processes, process, local_devices = found
    if coordinator is None or processes is None or process is None or processes == 1:
        return None, None
    return Place(process, processes, coordinator), local_devices


def _receive(place: Place, deadline: float, timeout: float, config: dict[str, Any]) -> Lines:
    port = int(place.coordinator.rpartition(":")[2])
    lines: dict[int, socket.socket] = {}
    hosts, problems = {}, []
    both = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(f"cannot listen at port {port}: {error.strerror}", where="distributed.coordinator", next="another port") from None
    with server:
        while len(lines) < place.processes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                line, _ = server.accept()
            except OSError:
                continue
            try:
                line.settimeout(min(left, 10))
                hello = _read(line) or {}
                process, host, theirs = int(hello["process"]), str(hello["host"]), hello["config"]
            except (OSError, ValueError, KeyError):  # somebody else
                line.close()
                continue
            problems += [
                f"process {process} on {host} has another config than process 0, {difference}"
                for difference in _disagreements(config, theirs)
            ]
            if process in lines or not 0 < process < place.processes:
                problems.append(f"process {process} on {host} is one too many")
                line.close()
            else:
                lines[process], hosts[process] = line, host
    missing = [process for process in range(1, place.processes) if process not in lines]
    if missing:
        problems.insert(0, f"of {place.processes} processes, {_listed(missing)} did not come to {place.coordinator} within {timeout:g} s")
    answer: dict[str, Any] = {"error": "\n".join(problems)} if problems else {"config": config}
    for line in lines.values():
        with contextlib.suppress(OSError):
            _send(line, answer)
    if problems:
        for line in lines.values():
            line.close()
        raise _refusal(answer["error"])
    return Lines({f"process {process} on {hosts[process]}": _patient(line) for process, line in lines.items()}, config)


def _call(place: Place, deadline: float, timeout: float, config: dict[str, Any]) -> Lines:
    host, _, port = place.coordinator.rpartition(":")
    hello = {"process": place.process, "host": socket.gethostname(), "config": config}
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = socket.create_connection((host.strip("[]"), int(port)), left)
        except OSError:  # it is not there yet
            time.sleep(min(0.2, left))
            continue
        line.settimeout(left + 10)  # process 0 may have begun to wait later
        answer = None
        with contextlib.suppress(OSError, ValueError):
            _send(line, hello)
            answer = _read(line)
        if answer and "config" in answer:
            return Lines({"process 0": _patient(line)}, answer["config"])
        line.close()
        if answer:
            raise _refusal(answer["error"])
        time.sleep(min(0.2, left))
    raise _refusal(f"process 0 of {place.processes} did not answer at {place.coordinator} within {timeout:g} s")


def _refusal(text: str) -> ConfigError:
    return ConfigError(text, where="distributed", next="the same command on every machine; distributed.timeout=SECONDS waits longer")


def _disagreements(config: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    own = ("run_dir", "distributed")
    return differences({**config, **dict.fromkeys(own)}, {**theirs, **dict.fromkeys(own)})


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"number{'s' * (len(numbers) > 1)} {shown}{' and others' * (len(numbers) > 8)}"


def _patient(line: socket.socket) -> socket.socket:
    """A line on which nothing need be said for days."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    return line


def _send(line: socket.socket, message: dict[str, Any]) -> None:
    line.sendall(json.dumps(message).encode() + b"\n")


def _read(line: socket.socket) -> dict[str, Any] | None:
    """One message, None at the end. There is never more than one to be read."""
    content = b""
    while not content.endswith(b"\n"):
        part = line.recv(2**16)
        if not part:
            return None
        content += part
        if len(content) > 2**24:
            raise ValueError("this is no message of a process")
    return json.loads(content)


def end(code: int) -> NoReturn:
    """Ends this process now, whatever its threads are doing."""
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)
