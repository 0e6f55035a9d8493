"""Stops a run that receives a signal, once its last finished step is safe."""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_eqx.errors import Stopped
from llama_eqx.meeting import PREEMPTED, end
from llama_eqx.processes import once

INTERRUPTED = 130
# A scheduler's termination, SLURM's notice before it (`sbatch --signal=USR1@120`; submitit asks for USR2, and SLURM sends
# it to every process of a job), a terminal that closes, and a person's Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


class Preemption:
    """While entered, a signal ends the run with its last finished step on the disk, and code 75, "start me again", or 130 for SIGINT.

    The loop calls `check` after every step, and most runs end there. But the main thread may compile for minutes, and Python runs no
    handler meanwhile. So the signals also go to a thread. It ends the process by itself while the main thread is `idle`, that is, does
    not touch the state. A second SIGINT ends the process at once, and so does the first signal after `grace` seconds.

    If it is not entered, as for users of the library, it leaves signals alone.
    """

    def __init__(self, grace: float, next: str = ""):
        """`next` is what to type to continue the run."""
        self._grace, self._next = grace, next
        self._signal = 0
        self._idle = threading.Lock()  # held by the main thread while it is busy
        self._keep: Callable[[], str] = lambda: "before the first step"
        self._in_loop = self._over = False
        self._before: dict[int, Any] = {}
        self._asked: jax.Array | None = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "Preemption":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._listen, args=(self._reader,), name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)  # ends the thread
        if self._timer:
            self._timer.cancel()

    @contextlib.contextmanager
    def training(self, keep: Callable[[], str]) -> Iterator[None]:
        """A context for the loop. `keep` saves the last finished step, and returns what to say of it."""
        self._keep, self._in_loop = keep, True
        with self._idle:
            yield

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """A context for work in the loop that may take long and changes neither the state nor its last step."""
        self._idle.release()
        try:
            yield
        finally:
            self._idle.acquire()  # blocks for ever if the process is being ended

    def check(self, step: int) -> None:
        """Every process calls it after every step. Raises `Stopped` in all of them after the same step, once that is saved."""
        if number := self._agreed(step):
            self._over = True
            said = self._keep()
            once(lambda: None)  # a process that leaves ends the others too, and process 0 is to name the checkpoint
            raise self._stopped(number, said)

    def _agreed(self, step: int) -> int:
        """The signal that any process received, or 0. Each step asks, and the next one reads the answer, so no process waits."""
        if jax.process_count() == 1:
            return self._signal
        here = np.full(jax.local_device_count(), self._signal, np.int32)
        split, largest = _reduction()
        asked, self._asked = self._asked, largest(jax.make_array_from_process_local_data(split, here))
        noticed = False
        with contextlib.suppress(RuntimeError):  # JAX was told not to listen
            noticed = multihost_utils.reached_preemption_sync_point(step)  # such as the notice of a TPU's host
        return (0 if asked is None else int(asked)) or (signal.SIGTERM if noticed else 0)

    def _listen(self, reader: int) -> None:
        while told := os.read(reader, 1):
            number = told[0]
            if number not in SIGNALS or (self._signal and number != signal.SIGINT):
                continue
            if self._signal:
                self._end(number, "ended at once; checkpoints saved before are intact")
            self._signal = number
            again = "; a second Ctrl-C ends at once, without saving" if number == signal.SIGINT else ""
            _say(f"{_name(number)}: the last finished step is being saved{again}")
            self._timer = threading.Timer(
                self._grace,
                self._end,
                (number, f"not finished after {self._grace:g} s (checkpoint.grace); checkpoints saved before are intact"),
            )
            self._timer.daemon = True
            self._timer.start()
            threading.Thread(target=self._leave, args=(number,), name="leaving", daemon=True).start()
        os.close(reader)

    def _leave(self, number: int) -> None:
        """Ends the process once the main thread is idle. In the loop, one of several cannot save alone and leaves it to `check`."""
        with self._idle:
            if self._over or (jax.distributed.is_initialized() and self._in_loop):
                return
            try:
                said = self._keep()
            except Exception as error:
                _say(f"{_name(number)}: {error}")
                end(getattr(error, "code", 1))
            self._end(number, said)

    def _end(self, number: int, said: str) -> None:
        stopped = self._stopped(number, said)
        _say(str(stopped))
        end(stopped.code)

    def _stopped(self, number: int, said: str) -> Stopped:
        return Stopped(f"{_name(number)}: {said}", code=INTERRUPTED if number == signal.SIGINT else PREEMPTED, next=self._next)


@functools.cache
def _reduction() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """A sharding of one number per device, and a function that gives all devices the largest."""
    mesh = Mesh(np.array(jax.devices()), ("devices",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("devices")), jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _name(number: int) -> str:
    return signal.Signals(number).name


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
