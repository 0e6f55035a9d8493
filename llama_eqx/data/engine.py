"""Who does the units of work: processes of this machine, or Ray."""

import concurrent.futures
import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

from llama_eqx.config import Config
from llama_eqx.errors import ConfigError, UserError

# Does calls of a function, and gives the numbers of those that are done, in any order.
Pool = Callable[[Callable[..., None], list[tuple[Any, ...]]], Iterator[int]]


class EngineConfig(Config):
    """`workers` processes, one for each core with None; on Ray as many as its cluster has room for with None.

    Ray is that of $RAY_ADDRESS, or one that is running on this machine, or else one that is started for the time. All of its
    machines must see the same files under the same names. None of this changes a byte of the result.
    """

    engine: Literal["local", "ray"]
    workers: int | None

    def check(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"{self.workers} is too small", where="workers")

    @contextlib.contextmanager
    def open(self) -> Iterator[Pool]:
        """Raises `UserError` from the pool when a worker is killed, beyond what Ray tries again by itself.

        An error of a call is raised when those before it are done: it does not depend on who was first.
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
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)

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
                    "a worker was killed, perhaps for want of memory",
                    kept="the units that are done",
                    next=f"the same command continues; with fewer workers: prepare.workers={max(1, workers // 2)}",
                )
            yield futures[future], error

    try:
        yield done
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # what they are at is done again
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"] = "false", "1"
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextlib.contextmanager
def _ray(workers: int | None) -> Iterator[Done]:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ConfigError(
            "Ray is not installed", where="prepare.engine", next="pip install 'llama_eqx[ray]', or prepare.engine=local"
        ) from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)

    def done(function: Callable[..., None], calls: list[tuple[Any, ...]]) -> Iterator[tuple[int, BaseException | None]]:
        remote, todo = ray.remote(num_cpus=1, max_retries=3)(function), list(enumerate(calls))[::-1]
        running: dict[Any, int] = {}
        while todo or running:
            while todo and len(running) < (workers or 10_000):
                i, call = todo.pop()
                running[remote.remote(*call)] = i
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

    try:
        yield done
    finally:
        if ours:
            ray.shutdown()
