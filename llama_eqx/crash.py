"""Points at which a test can kill a process."""

import collections
import os
import signal

VARIABLE = "LLAMA_EQX_CRASH_AT"
_seen: collections.Counter[str] = collections.Counter()


def crash_point(label: str) -> None:
    """Ends this process as `kill -9` does, the first time it comes here, if `LLAMA_EQX_CRASH_AT` is `<label>`.

    `<label>:3` means the third time, `<label>:3:SIGTERM` another signal.
    """
    wanted, _, rest = os.environ.get(VARIABLE, "").partition(":")
    if label != wanted:
        return
    _seen[label] += 1
    time, _, name = rest.partition(":")
    if _seen[label] == int(time or 1):
        os.kill(os.getpid(), signal.Signals[name or "SIGKILL"])
