"""The metrics of the steps, fetched one step late, and where the time went."""

import contextlib
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

import jax

from llama_eqx.data.pipeline import Progress
from llama_eqx.errors import NonFiniteError
from llama_eqx.flops import mfu
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.tracker import Tracker
from llama_eqx.training.step import Metrics

LEDGER = "data/ledger"


def is_logged(run_dir: pathlib.Path, step: int, name: str) -> bool:
    """Whether `metrics.jsonl` has this metric of that step."""
    return any(record["step"] == step and name in record for record in read_metrics(run_dir / "metrics.jsonl"))


def last_logged(run_dir: pathlib.Path) -> int:
    """The last step in `metrics.jsonl`, 0 when there is none."""
    return max((int(record["step"]) for record in read_metrics(run_dir / "metrics.jsonl")), default=0)


class Reporter:
    """Logs the metrics of every `log_every`-th step. While the newest step runs on the device, those of the one before are fetched.

    The first step is logged too: its time is mostly compilation. The metrics also have `tokens`, the targets counted so far; `flops`;
    `perf/tokens_per_second` (padding and masked targets are computed, and so included); `perf/mfu` (causal, where the chip's peak is
    known); `data/starved_fraction`, the fraction of the time that steps waited for a batch that was not ready; `data/epoch` (of each
    source of a mixture); and `data/ledger`, a number that identifies the rows of all batches so far. The speeds leave out time in `pause`.
    """

    def __init__(
        self,
        tracker: Tracker,
        *,
        log_every: int,
        last_step: int,
        max_withheld: int,
        tokens: int,
        epochs: Callable[[int], dict[str, float]],
        flops_per_token: int,
        device_kind: str,
        devices: int,
        waited: Callable[[], float] = lambda: 0.0,
    ):
        """`tokens` are those of one step, `epochs` those completed after a step, `waited` the seconds steps have waited for data so far."""
        self._tracker, self._log_every, self._last_step = tracker, log_every, last_step
        self._tokens, self._flops, self._device_kind, self._devices = tokens, flops_per_token, device_kind, devices
        self._epochs, self._waited, self._max_withheld = epochs, waited, max_withheld
        self._late: tuple[int, Metrics, Progress, tuple[float, float] | None] | None = None
        self._steps, self.withheld, self.reported = 0, 0, 0
        self.metrics: dict[str, float] = {}  # of the step that was reported last
        self._speeds: list[dict[str, float]] = []
        self._begun, self._waited_before = time.perf_counter(), waited()

    def add(self, step: int, metrics: Metrics, progress: Progress) -> None:
        """Takes the metrics of the step just begun and the progress of its batch, and reports those of the step before.

        Raises `NonFiniteError` after `max_withheld` updates in a row that were not finite.
        """
        self.flush()
        # On a CPU, the step may be over before the call that begins it returns.
        over = metrics["train/loss"].is_ready()  # pyright: ignore[reportAttributeAccessIssue]
        self._late = step, metrics, progress, self._now() if over else None

    def flush(self) -> None:
        if self._late is None:
            return
        step, metrics, progress, ready = self._late
        self._late, self.reported = None, step
        fetched = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._steps, self.metrics = self._steps + 1, fetched
        logged = step % self._log_every == 0 or step in (1, self._last_step)
        if logged or not self._speeds:  # the first step of every start compiles: its time goes into no other's speed
            speed = self._speed(*ready or self._now())
            if logged:
                drawn = {"tokens": progress.tokens, "flops": self.flops(step), LEDGER: progress.ledger} | self._epochs(step)
                self._tracker.log(step, fetched | drawn | speed)
        self._tell_withheld(step, fetched)

    def _tell_withheld(self, step: int, fetched: dict[str, float]) -> None:
        loss, norm = fetched["train/loss"], fetched["optim/grad_norm"]
        if not fetched["optim/withheld"]:
            self.withheld = 0
        elif fetched.get("optim/spike"):
            self._tracker.say(f"warning: step {step}: loss {loss:.4f}, gradient norm {norm:.4g} are a spike: its update is withheld")
        else:
            self.withheld += 1
            finite = math.isfinite(loss) and math.isfinite(norm)
            what = "numbers of its update that are not finite are" if finite else "its update is"
            self._tracker.say(
                f"warning: step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: {what} withheld, {self.withheld} of "
                f"{self._max_withheld} in a row"
            )
        if self.withheld == self._max_withheld:
            raise NonFiniteError(
                f"loss, gradient or update was not finite, or no target counted, for {self.withheld} steps in a row: no update was made",
                where=f"step {step}",
                kept="the checkpoints, all of whose numbers are finite",
                next="start another run (another run_dir) with a lower schedule.peak or more schedule.warmup_steps: from the beginning, or "
                "with init_from=CHECKPOINT from the weights of a checkpoint if there is one, without its optimizer state",
            )

    def flops(self, step: int) -> int:
        """The FLOPs of training up to this step, by the formula of `flops_per_token`; padding is computed, and so included."""
        return step * self._tokens * self._flops

    def settle(self) -> None:
        """Waits until the device is done with every step that was begun."""
        if self._late is not None:
            jax.block_until_ready(self._late[1])

    def typical(self) -> dict[str, float]:
        """The median of each measure of speed over the records of this start, without the first step, which compiles."""
        return {name: statistics.median(speed[name] for speed in self._speeds[1:]) for name in self._speeds[0]} if self._speeds[1:] else {}

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A context for what is not training, such as an evaluation. All steps are reported before it begins."""
        self.flush()
        begun = time.perf_counter()
        yield
        self._begun += time.perf_counter() - begun

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), self._waited()

    def _speed(self, now: float, waited_before: float) -> dict[str, float]:
        passed, waited, steps = now - self._begun, waited_before - self._waited_before, self._steps
        self._begun, self._waited_before, self._steps = now, waited_before, 0
        rate = steps * self._tokens / passed
        used = mfu(rate, self._flops, self._device_kind, self._devices)
        speed = {"perf/tokens_per_second": rate, "data/starved_fraction": waited / passed}
        self._speeds.append(speed if used is None else speed | {"perf/mfu": used})
        return self._speeds[-1]
