"""Measures how long a start takes: `python -m benchmarks.startup [--rounds 3] [--out benchmarks/results/startup.json]`.

Times the help of the command line, the import of the package compared with the libraries that it is built on, and the default run from the
command to the end of its first step. The run starts cold (nothing in the cache folder: text is read, a tokenizer is trained, the step is
compiled) and then warm (the same once more).
"""

import argparse
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.record import idle, write

PYTHON = {
    "import jax, equinox": "import jax, equinox",
    "import llama_eqx": "import llama_eqx",
    "import llama_eqx and the model": "import llama_eqx; llama_eqx.build_model, llama_eqx.load_config",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--loaded", action="store_true", help="run on a busy machine too: to try the script, not for numbers")
    arguments = parser.parse_args()
    load = idle(arguments.loaded)
    seconds: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for name, code in PYTHON.items():
            seconds.setdefault(name, []).append(timed([sys.executable, "-c", code]))
        seconds.setdefault("train --help", []).append(timed([sys.executable, "-m", "llama_eqx.train", "--help"]))
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # W&B's process outlives a killed run, and writes there
            for name in ("first step, cold", "first step, warm"):
                seconds.setdefault(name, []).append(first_step(folder, f"run_dir={folder}/run-{time.time_ns()}", "train.steps=1000"))
    base = statistics.median(seconds["import jax, equinox"])
    lines = ["| what | seconds (median) | range | ratio to `import jax, equinox` |", "|---|---|---|---|"]
    for name, found in seconds.items():
        median = statistics.median(found)
        lines.append(f"| {name} | {median:.2f} | {min(found):.2f} to {max(found):.2f} | {median / base:.2f} |")
    write(arguments.out, {"seconds": seconds}, "\n".join(lines), load)


def timed(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begun


def first_step(cache: str, *overrides: str) -> float:
    """Returns the seconds from the command to the end of its first step, and kills the run. The next start finds what `cache` keeps."""
    command = [sys.executable, "-m", "llama_eqx.train", "train.log_every=1", *overrides]
    begun = time.perf_counter()
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "LLAMA_EQX_CACHE": cache}
    ) as run:
        assert run.stderr
        said = []
        for line in run.stderr:
            said.append(line)
            if re.match(r"step +\d+/", line):
                passed = time.perf_counter() - begun
                run.send_signal(signal.SIGKILL)
                return passed
    raise SystemExit("".join(said))


if __name__ == "__main__":
    main()
