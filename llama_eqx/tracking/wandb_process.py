"""`python -m llama_eqx.tracking.wandb_process RUN_DIR MODE`: draws the record of a run into a W&B run, as it grows.

Standard input says what to show, which checkpoint to add, and when the run ends: one JSON object per line. Its own messages are lines on
standard output, each a kind and a text. wandb's messages go to standard error.
"""

import html
import json
import os
import pathlib
import select
import signal
import sys
from collections.abc import Iterator
from typing import Any

from llama_eqx.tracking.wandb import ABOUT, FOLDER, UPLOAD

POLL = 1.0  # seconds between looks at the record
LAST = 60  # seconds after which the end is forced, because nobody may be left to do so


def main(run_dir: pathlib.Path, mode: str) -> None:
    # Before wandb is imported. Its error reports go to its makers, and may quote what they should not.
    os.environ.update({"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"})
    import wandb

    about = json.loads((run_dir / FOLDER / ABOUT).read_text(encoding="utf-8"))
    lean = wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True, disable_git=True, disable_code=True, init_timeout=20)
    run = wandb.init(
        mode="offline" if mode == "offline" else "online",
        **{name: about[name] for name in ("id", "project", "entity", "group", "job_type", "name", "notes")},
        tags=about["tags"] or None,  # those of WANDB_TAGS
        resume="allow",
        dir=os.fspath(run_dir),
        config=about["settings"],
        settings=lean,
    )
    tell("folder", str(pathlib.Path(run.dir).parent))
    if run.url:
        tell("url", run.url)

    def draw(record: dict[str, Any]) -> None:
        nonlocal step
        step = record.pop("step")
        if step >= run.starting_step:  # W&B has the others from before
            run.log({name: float(value) for name, value in record.items()}, step=step)

    last, step, lines, code = LAST, 0, growing(run_dir / "metrics.jsonl"), 1  # a run that does not report its end has failed
    for messages in told():
        for line in next(lines):
            draw(json.loads(line))
        for message in messages:
            for file, shown in message.get("show", {}).items():
                run.log({pathlib.PurePath(file).stem: looked_at(run_dir / file)}, step=max(step, shown))
            if "checkpoint" in message:
                folder = run_dir / message["checkpoint"]
                artifact = wandb.Artifact(f"checkpoint-{about['id']}", type="model", metadata={"step": int(folder.name)})
                artifact.add_dir(os.fspath(folder), policy="immutable")  # it stays where it is, and is not copied first
                run.log_artifact(artifact, aliases=["latest", f"step-{folder.name}"])
                last = int(UPLOAD)
            code = message.get("end", code)
    signal.alarm(last)
    run.finish(exit_code=code)


def growing(path: pathlib.Path) -> Iterator[list[bytes]]:
    """Yields the lines added to a file since the last time. A line that is still being written is left for the next time."""
    torn = b""
    with path.open("rb") as file:
        while True:
            *lines, torn = (torn + file.read()).split(b"\n")
            yield lines


def looked_at(path: pathlib.Path) -> Any:
    """A text or a picture as W&B shows it."""
    import wandb

    if path.suffix == ".png":
        return wandb.Image(os.fspath(path))
    return wandb.Html(f"<pre style='white-space: pre-wrap'>{html.escape(path.read_text(encoding='utf-8'))}</pre>")


def told(stdin: int = 0) -> Iterator[list[dict[str, Any]]]:
    """Yields every `POLL` seconds what standard input has said since, until it ends."""
    torn = b""
    while True:
        part = os.read(stdin, 2**16) if (readable := select.select([stdin], [], [], POLL)[0]) else b""
        *lines, torn = (torn + part).split(b"\n")
        if readable and not part:
            signal.alarm(LAST)
        yield [json.loads(line) for line in lines]
        if readable and not part:
            return


def tell(kind: str, text: str) -> None:
    try:
        print(kind, next(iter(text.splitlines()), ""), flush=True)
    except BrokenPipeError:  # the run is gone; what it recorded is drawn to the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    try:
        main(pathlib.Path(sys.argv[1]), sys.argv[2])
    except Exception as error:
        tell("failed", f"{type(error).__name__}: {error}")
        raise
