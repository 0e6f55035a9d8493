"""What the user sees during a run: a progress bar on a terminal, plain lines in a log."""

import datetime
import re
import sys
import time
from collections.abc import Mapping
from typing import SupportsFloat

from tqdm import tqdm

SHOWN = {
    "train/loss": "loss {:.4f}",
    "val/loss": "validation loss {:.4f}",
    "optim/lr": "lr {:.2e}",
    "perf/tokens_per_second": "{:,.0f} tokens/s",
}


class Console:
    """Shows steps `start` to `total` on standard error."""

    def __init__(self, total: int, start: int):
        self._total, self._stream = total, sys.stderr
        self._first: tuple[int, float] | None = None
        self._bar = None
        if self._stream.isatty():
            form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self._bar = tqdm(total=total, initial=start, file=self._stream, dynamic_ncols=True, bar_format=form)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        said = [form.format(float(metrics[name])) for name, form in SHOWN.items() if name in metrics]
        said += [f"{name} {float(metrics[name]):.4f}" for name in metrics if re.fullmatch("val/.+/loss", name)]
        if "train/loss" in metrics:
            said.append(f"ETA {self._remaining(step)}")
        if self._bar is None:
            self.say("  ".join([f"step {step:>{len(str(self._total))}}/{self._total}", *said]))
        elif "train/loss" in metrics:
            self._bar.n = step
            self._bar.set_postfix_str(", ".join(said))
        else:
            self.say("  ".join([f"step {step}", *said]))

    def say(self, text: str) -> None:
        """Writes a line of its own, above the bar."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _remaining(self, step: int) -> str:
        """The remaining time, "0:12:34", at the mean speed since the first report: the compilation before that is not repeated."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = self._first or (step, now)
            return "?"
        begun, then = self._first
        return str(datetime.timedelta(seconds=round((self._total - step) * (now - then) / (step - begun))))
