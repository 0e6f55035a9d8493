"""Several processes as one run. JAX does the computing; `meeting` lets them find each other and end together."""

import contextlib
import dataclasses
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from llama_eqx.config import Config, dump
from llama_eqx.errors import ConfigError, DataError
from llama_eqx.meeting import PREEMPTED, Lines, Place, end, give_up, meet

T = TypeVar("T")


class DistributedConfig(Config):
    """Process number `process`, from 0, of `processes`; `coordinator` is HOST:PORT of number 0.

    If they are not given, they are read from where TPU pods, SLURM, Open MPI and Kubernetes jobs name them. The first process waits
    `timeout` seconds for the last. A process without a sign of life for `heartbeat` seconds is lost, and a run without a step for `stall`
    seconds is stuck (None: never). All processes then say where they are and end, to be started again.
    """

    coordinator: str | None
    processes: int | None
    process: int | None
    timeout: int
    heartbeat: int
    stall: int | None

    def check(self) -> None:
        for name in ("timeout", "heartbeat", "stall"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{value} is less than 1 second", where=name)
        names = ("coordinator", "processes", "process")
        missing = [name for name in names if getattr(self, name) is None]
        if missing and len(missing) < len(names):
            raise ConfigError(f"not given: {', '.join(missing)}", where=missing[0], next="all three, or none for a single process")
        if self.coordinator is None or self.processes is None or self.process is None:
            return
        if not 0 <= self.process < self.processes:
            raise ConfigError(f"there is no process {self.process} of {self.processes}", where="process", next="numbers start at 0")
        if not self.coordinator.rpartition(":")[2].isdecimal():
            raise ConfigError(f"{self.coordinator} has no port", where="coordinator", next="HOST:PORT")


@contextlib.contextmanager
def together(config: Any) -> Iterator[tuple[Any, int]]:
    """A context that gives `config`, with the `run_dir` of process 0 if it has one, and the number of this process.

    A single process is left as it is. Whatever ends one of several within it ends them all, with its exit code, and process 0 says what it
    was.

    Raises `ConfigError` when some processes do not come in time, or were given another config.
    """
    place, local_devices = _place(config.distributed)
    if place is None:
        with _may_end():
            yield config, 0
        return
    if jax.distributed.is_initialized():
        raise ConfigError("a sweep over several processes needs new processes for every job", where="-m", next="hydra/launcher=slurm")
    settings = config.distributed
    with meet(place, settings.timeout, dump(config), settings.heartbeat) as lines:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=settings.timeout,
            heartbeat_timeout_seconds=settings.heartbeat + 60,  # our own comes first: it says what is wrong, where JAX only aborts
        )
        with _may_end():
            shared = {name: value for name, value in lines.config.items() if name == "run_dir"}
            yield dataclasses.replace(config, **shared), place.process


_ending_allowed = threading.Event()


@contextlib.contextmanager
def _may_end() -> Iterator[None]:
    """A context in which this process belongs to the run and may be ended with it."""
    _ending_allowed.set()
    try:
        yield
    finally:
        _ending_allowed.clear()


def leave(code: int) -> None:
    """Ends this process. One of several that has failed does not wait for the others, as JAX would at a regular end.

    A verb that is the whole program skips the interpreter's teardown: a library's thread that calls the interpreter meanwhile would abort
    the process, and a finished run would count as killed.
    """
    several = "jax" in sys.modules and jax.distributed.is_initialized()
    program = getattr(sys.modules["__main__"], "__spec__", None)
    if code if several else program is not None and program.name.startswith("llama_eqx."):
        end(code)
    sys.exit(code)


def watched(steps: Iterable[T], stall: int | None) -> Iterator[T]:
    """Yields `steps`. The first may take any time: it compiles, and the second waits for what it began. When a later step takes more than
    `stall` seconds, with the evaluation and saving after it, this process and all others say where they are and end with code 75.

    Outside of `together`, as for users of the library, it only yields the steps.
    """
    over, begun = threading.Event(), [time.monotonic()]

    def watch() -> None:
        assert stall is not None
        while not over.wait(min(stall / 10, 5)) and _ending_allowed.is_set():
            if time.monotonic() - begun[0] > stall:
                said = f"error: no step for {stall} s\nnext: the stacks of the process that is stuck show where"
                give_up(said, {"code": PREEMPTED, "lost": True}, Lines.current)

    watching = None
    try:
        for number, step in enumerate(steps):
            begun[0] = time.monotonic()
            if number == 1 and stall is not None:
                watching = threading.Thread(target=watch, daemon=True)
                watching.start()
            yield step
    finally:
        over.set()
        if watching is not None:
            watching.join()


def once(action: Callable[[], T]) -> T | None:
    """Process 0 runs `action` while the others wait. Returns its result there, and None in the others."""
    result = action() if jax.process_index() == 0 else None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("once")
    return result


def is_first() -> bool:
    """Whether this is process 0. Unlike `jax.process_index`, it starts no backend, which would fix the number of virtual devices."""
    from jax._src.distributed import global_state

    return global_state.process_id == 0


def count() -> int:
    """The number of processes. Unlike `jax.process_count`, it starts no backend."""
    from jax._src.distributed import global_state

    return global_state.num_processes or 1


def of_first(number: int) -> int:
    """The `number` that process 0 gives, in every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def any_process(here: bool) -> bool:
    """Whether `here` is true in any of the processes."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(here))))


def on_host(tree: PyTree[jax.Array]) -> PyTree[np.ndarray]:
    """The arrays as NumPy's, each whole in every process, even if the devices of several processes hold parts of it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(array: jax.Array) -> np.ndarray:
        there = array.is_fully_addressable or array.is_fully_replicated
        return np.asarray(array) if there else multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(whole, tree)


def require_same(text: str, what: str, where: str) -> None:
    """Raises `DataError` in every process unless all give the same `text`."""
    found = np.ravel(multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode()))))
    if others := np.flatnonzero(found != found[0]).tolist():
        raise DataError(
            f"processes {', '.join(map(str, others))} have different {what} from process 0",
            where=where,
            next="the same files and the same versions of the libraries on every machine",
        )


def _place(config: DistributedConfig) -> tuple[Place | None, Any]:
    """The place of this process, None for a single one, and the local devices that it owns, None for all."""
    coordinator, processes, process, local_devices = config.coordinator, config.processes, config.process, None
    if coordinator is None:
        # JAX would ask a Kubernetes pod for its job, even one that is part of none.
        parts_of_jobs = {"JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "SLURM_PROCID"}
        if "KUBERNETES_SERVICE_HOST" in os.environ and not parts_of_jobs & os.environ.keys():
            return None, None
        from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` would find, before it does anything

        try:
            found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, config.timeout)
        except Exception as error:
            raise ConfigError(
                f"the cluster of this process cannot be detected: {error}",
                where="distributed",
                next="distributed.coordinator=HOST:PORT distributed.processes=N distributed.process=I",
            ) from error
        coordinator, processes, process, local_devices = found
    if coordinator is None or processes is None or process is None or processes == 1:
        return None, None
    return Place(process, processes, coordinator), local_devices
