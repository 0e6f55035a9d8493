"""Runs the units of work, in processes of this machine or on Ray."""

import concurrent.futures
import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

from llama_eqx.config import Config
from llama_eqx.data.cores import allow, cores
from llama_eqx.errors import ConfigError, UserError

# Runs calls of a function, and yields the numbers of those that are done, in any order.
Pool = Callable[[Callable[..., None], list[tuple[Any, ...]]], Iterator[int]]


class EngineConfig(Config):
    """`workers` is the number of processes. None is one per core, or on Ray as many as its cluster has room for. The cores of a machine are
    divided among its workers, and each worker encodes with one thread per core of its own.

    Ray is the cluster at $RAY_ADDRESS, or one that runs on this machine, or else one started for the time. All of its machines must see the
    same files under the same names. None of this changes a byte of the result.
    """

    engine: Literal["local", "ray"]
    workers: int | None

    def check(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"{self.workers} is too small", where="workers")

    @contextlib.contextmanager
    def open(self) -> Iterator[Pool]:
        """Yields a pool. It raises `UserError` when a worker is killed; Ray first retries by itself.

        An error of a call is raised once all calls before it are done, so it does not depend on which finished first.
        """
        with (_local if self.engine == "local" else _ray)(self.workers) as done:

            def pool(function: Callable[..., None], calls: list[tuple[Any, ...]]) -> Iterator[int]:
                open, failed = set(range(len(calls))), {}
                for i, error in done(function, calls):
                    open.remove(i)
                    if error is not None:
                        failed[i] = error
                    else:
                        yield i
                    if failed and min(failed) < min(open, default=len(calls)):
                        raise failed[min(failed)]

            yield pool


Done = Callable[[Callable[..., None], list[tuple[Any, ...]]], Iterator[tuple[int, BaseException | None]]]


@contextlib.contextmanager
def _local(workers: int | None) -> Iterator[Done]:
    workers = workers or cores()
    others = set(multiprocessing.active_children())
    share = max(1, cores() // workers)
    # A process without threads can be forked with all that it has loaded. With threads, the copy may hold locks that nobody releases.
    alone = sys.platform == "linux" and threading.active_count() == 1 and "jax" not in sys.modules
    context = multiprocessing.get_context("fork" if alone else "spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (share,))

    def done(function: Callable[..., None], calls: list[tuple[Any, ...]]) -> Iterator[tuple[int, BaseException | None]]:
        if min(workers, len(calls)) < 2:  # not worth a process
            for i, call in enumerate(calls):
                try:
                    function(*call)
                except Exception as error:
                    yield i, error
                else:
                    yield i, None
            return
        futures = {pool.submit(function, *call): i for i, call in enumerate(calls)}
        for future in concurrent.futures.as_completed(futures):
            error = future.exception()
            if isinstance(error, concurrent.futures.BrokenExecutor):
                raise UserError(
                    "a worker was killed, perhaps for lack of memory",
                    kept="the units that are done",
                    next=f"the same command continues; with fewer workers: prepare.workers={max(1, workers // 2)}",
                )
            yield futures[future], error

    try:
        yield done
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # their unfinished work is done again
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    allow(threads)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _on_one_core(function: Callable[..., None], *call: Any) -> None:
    allow(1)
    function(*call)


@contextlib.contextmanager
def _ray(workers: int | None) -> Iterator[Done]:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ConfigError(
            "Ray is not installed", where="prepare.engine", next="pip install 'llama_eqx[ray]', or prepare.engine=local"
        ) from None

    def done(function: Callable[..., None], calls: list[tuple[Any, ...]]) -> Iterator[tuple[int, BaseException | None]]:
        remote, todo = ray.remote(num_cpus=1, max_retries=3, name=function.__name__)(_on_one_core), list(enumerate(calls))[::-1]
        running: dict[Any, int] = {}
        while todo or running:
            while todo and len(running) < (workers or 10_000):
                i, call = todo.pop()
                running[remote.remote(function, *call)] = i
            for reference in ray.wait(list(running))[0]:
                i, error = running.pop(reference), None
                try:
                    ray.get(reference)
                except ray.exceptions.RayTaskError as raised:
                    error = raised.cause
                except ray.exceptions.RayError as raised:
                    error = UserError(
                        f"a unit of work was lost: {raised}", kept="the units that are done", next="the same command continues"
                    )
                yield i, error

    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            _connect(ray, stack)
        yield done


def _connect(ray: Any, stack: contextlib.ExitStack) -> None:
    """Connects to a running cluster, or to one of our own that leaves nothing behind.

    Raises `ConfigError` when the cluster at $RAY_ADDRESS does not answer.
    """
    quiet = {"log_to_driver": False, "configure_logging": False}
    try:
        ray.init("auto", **quiet)
    except ConnectionError as error:
        if address := os.environ.get("RAY_ADDRESS"):
            raise ConfigError(f"no Ray cluster answers: {error}", where=f"RAY_ADDRESS={address}", next="unset it") from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))  # for logs and sockets
        ray.init("local", _temp_dir=folder, include_dashboard=False, **quiet)
    stack.callback(ray.shutdown)
