"""A trace of a few steps, and a summary of it in a few lines."""

import collections
import pathlib
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

from llama_eqx.config import Config
from llama_eqx.errors import ConfigError

SHOWN = 10  # operations in a summary
CONTAINERS = ("while", "call", "conditional")  # their time is that of what they contain


class ProfileConfig(Config):
    """`steps` are the first and the last step to trace, or None."""

    steps: tuple[int, int] | None

    def check(self) -> None:
        if self.steps is not None and not 1 <= self.steps[0] <= self.steps[1]:
            raise ConfigError(f"{list(self.steps)} is not a first and a last step", where="steps", next="profile.steps=[10,13]")


class Profile:
    """Traces the steps of `config` on process 0 into `run_dir/profile` and summarises them through `say`.

    A context manager: leaving it ends a trace that an error cut short.
    """

    def __init__(self, config: ProfileConfig, run_dir: pathlib.Path, say: Callable[[str], None], devices: int):
        self._folder, self._say, self._devices = run_dir / "profile", say, devices
        self._steps = config.steps if jax.process_index() == 0 else None
        self._begun: float | None = None
        self._ended, self._compiling = False, 0.0
        self._between: dict[str, None] = {}
        if self._steps:
            jax.monitoring.register_event_duration_secs_listener(self._heard)

    def begins_with(self, step: int) -> bool:
        return self._steps is not None and step == self._steps[0]

    def begin(self) -> None:
        """Begins the trace. The device must be done with the step before."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python calls would fill the trace, and slow the steps
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
        self._begun = time.perf_counter()

    def between(self, what: str) -> None:
        """Notes work that is traced but of no step, such as "an evaluation"."""
        if self._begun is not None:
            self._between[what] = None

    def ends_with(self, step: int) -> bool:
        return self._begun is not None and self._steps is not None and step == self._steps[1]

    def end(self, metrics: Any) -> None:
        """Waits for the step that gave `metrics`, ends the trace and says what is in it."""
        assert self._steps is not None
        assert self._begun is not None
        first, last = self._steps
        jax.block_until_ready(metrics)
        seconds = (time.perf_counter() - self._begun) / (last - first + 1)
        self._begun, self._ended = None, True
        jax.profiler.stop_trace()
        self._say(f"profile: steps {first} to {last}, {seconds:.4f} s each; {self._compiling:.1f} s of compilation in all")
        if self._between:
            self._say(f"profile: these times include {' and '.join(self._between)} between the steps; next: other profile.steps")
        device = jax.local_devices()[0]
        if stats := device.memory_stats():  # not on CPUs
            peak, limit = (stats.get(name, 0) / 2**30 for name in ("peak_bytes_in_use", "bytes_limit"))
            self._say(f"profile: peak memory {peak:.2f} of {limit:.2f} GiB on {device}")
        trace = max(self._folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        times = operations(jax.profiler.ProfileData.from_file(str(trace)).planes)
        total, each = sum(times.values()), (last - first + 1) * self._devices
        for name, spent in times.most_common(SHOWN):
            self._say(f"profile: {spent / total:6.1%}  {spent / 1e6 / each:10.3f} ms a step  {name}")
        self._say(f"profile: {trace.parent / 'perfetto_trace.json.gz'} opens in https://ui.perfetto.dev")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._steps:
            return
        jax.monitoring.unregister_event_duration_listener(self._heard)
        if self._begun is not None:
            jax.profiler.stop_trace()
        if not self._ended:
            self._say(f"warning: no profile, as the run did not go through steps {self._steps[0]} to {self._steps[1]}")

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            self._compiling += duration_secs


def operations(planes: Iterable[Any]) -> collections.Counter[str]:
    """Nanoseconds by the name of the operation in the compiled program, summed over the devices of this process."""
    found = collections.Counter()
    for plane in planes:
        for line in plane.lines:
            if plane.name.startswith("/device:TPU") and line.name != "XLA Ops":
                continue
            for event in line.events:
                stats = dict(event.stats)
                name = stats.get("hlo_op") or (event.name if plane.name.startswith("/device:TPU") else None)
                if name and not event.name.startswith("end: "):
                    name = re.split(r"[ =]", str(name).lstrip("%"))[0]
                    if not name.startswith(CONTAINERS):
                        found[name] += int(event.duration_ns)
    return found
