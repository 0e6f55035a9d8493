"""A run in its directory: what must stay the same when it is resumed, what is filed there, and when it is over."""

import contextlib
import hashlib
import os
import pathlib
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llama_eqx.checkpoint.native import CHECKPOINTS, CONFIG, TOKENIZER, read_config, write_config
from llama_eqx.checkpoint.restore import Damaged, manifest_of, steps
from llama_eqx.checkpoint.store import MANIFEST, Place, bring, children, content, is_remote, put, records
from llama_eqx.config import Difference, differences, dump, known_to_both
from llama_eqx.data.tokenizer import Tokenizer, load_tokenizer
from llama_eqx.data.tokenizer.base import MARK
from llama_eqx.errors import CheckpointError, DataError, StorageError, UserError
from llama_eqx.files import write
from llama_eqx.interop.files import CARRIED
from llama_eqx.processes import of_first
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.provenance import software
from llama_eqx.training.run import RunConfig, home
from llama_eqx.writer import holder

# What may differ between the parts of one run. None of it changes what a step computes, except the number of steps, whose change
# the course of the schedule shows.
FREE = (
    "run_dir",
    "mesh",
    "sharding",
    "remat",
    "kernel",
    "checkpoint",
    "tracking",
    "distributed",
    "profile",
    "compile_cache",
    "model.tokens.pad",
    "guard.max_withheld",
    "train.steps",
    "data.prompt",
    "eval_data",
    "train.unroll",
    "train.microbatch_size",
    "train.meters",
    "loss.chunk",
    "train.log_every",
    "train.eval_every",
    "train.sample_tokens",
    "train.traces",
)
# What may move while a run is resumed. The fingerprint of the data, which includes that of the tokenizer, tells whether it is the same.
MOVABLE = ("data.path", "data.verify", "tokenizer.path")
# How a run begins. Not read once it has a checkpoint.
BEGINNING = ("init_from", "init_new")
# What a config may leave open, for `with_vocab` to fill in.
OPEN = ("model.dims.vocab", "model.tokens.bos", "model.tokens.eos", "model.tokens.pad")
BUNDLES = "replay"  # the folder of what a run records of steps that were not finite
SHARED_WITHIN = 30  # seconds; a network's file system may be slow to show a new file


def movable(settings: dict[str, Any]) -> list[str]:
    """`MOVABLE`, extended to the components of a mixture. `settings` are plain containers."""
    components = [f"data.components.{name}" for name in settings.get("data", {}).get("components", {})]
    return [*MOVABLE, *(f"{component}.{key}" for component in components for key in ("path", "verify"))]


def claim(config: RunConfig, tokenizer: str, data: str) -> list[str]:
    """Writes `config.yaml` and the fingerprint of the data into the run directory, or compares them with those of the run to resume.

    Records that a run left in a store are copied here. `tokenizer` and `data` are fingerprints. The manifest of the newest checkpoint
    holds the same facts, and is compared whether there is a `config.yaml` or not.

    Returns remarks on changes that affect the numbers, and on settings that are not read any more.

    Raises `CheckpointError` listing every difference that would make it another run, and `StorageError` when it cannot be written.
    """
    run_dir, there = pathlib.Path(config.run_dir), home(config)
    new, found = {**dump(config), "data_fingerprint": data}, []
    # Which activations are dropped depends on the microbatch.
    dropout = config.model.dropout or getattr(config.model.block, "dropout", 0)
    free = [key for key in FREE if key != "train.microbatch_size" or not dropout]
    free += movable(dump(config))
    begun = bool(steps(there / CHECKPOINTS))
    free += BEGINNING if begun else ()
    manifest, facts = _newest(there / CHECKPOINTS)
    weights = f", with init_from={manifest.parent} to begin with its weights" if facts else ""
    folders = [folder for folder in ((run_dir, there) if is_remote(there) else (run_dir,)) if CONFIG in children(folder)]
    for folder in folders:
        old = _settings(folder, replaceable="settings" in facts or not begun)
        moved = ["checkpoint.store"] if folder is run_dir else []  # the checkpoints would be left behind
        another = f"{'run_dir' if folder is run_dir else 'checkpoint.store'}{weights}"
        found = _changed(old, new, free, moved, where=folder / CONFIG, another=another)
    # Older manifests have no settings, but a hash of config.yaml, which changes with what is free too.
    fingerprints = {"tokenizer_fingerprint": facts.get("tokenizer", tokenizer), "data_fingerprint": facts.get("data", data)}
    # A setting that they have not heard of, or that is no more, is left to config.yaml, where it can be mended by hand.
    old, now = facts.get("settings", new) | fingerprints, {**new, "tokenizer_fingerprint": tokenizer}
    filed = _changed(known_to_both(old, now), known_to_both(now, old), free, where=manifest, another=f"run_dir{weights}")
    found = found if folders else filed
    other = [difference for difference in found if begun and difference.key in BEGINNING]
    new |= {difference.key: difference.old for difference in other}  # what is written says where the weights came from
    trained, asked = int(manifest.parent.name) if facts else 0, config.train.steps
    if over := trained >= asked:  # and on which course of the learning rate they were trained
        new["train"] = {**new["train"], "steps": facts.get("settings", new)["train"]["steps"]}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if is_remote(there):
            bring(there, run_dir)
        write_config(new, run_dir)
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror}", where=config.run_dir, next="another place: run_dir=FOLDER") from error
    stretched = "the learning rate now takes the course of a run of that length"
    said = [f"{difference}; {stretched}" for difference in found if difference.key == "train.steps" and not over]
    if over and (course := new["train"]["steps"]) != asked:
        said.append(f"train.steps={asked} changes nothing: this run is trained to step {trained} already, with train.steps={course}")
    if begun and not folders and "settings" not in facts:
        said.append(f"{CONFIG} was missing, and the newest checkpoint does not say its settings: whether these are the same is not known")
    for key, began, asked in other:
        if asked and key == "init_from":
            said.append(f"init_from={asked} is not read: this run began from {began or 'new weights'}")
        elif asked:
            said.append(f"init_new=[{','.join(asked)}] is not read: this run began with [{','.join(began or ())}]")
    return said


def _settings(folder: Place, *, replaceable: bool) -> dict[str, Any]:
    """Reads `config.yaml`. It is `replaceable` if nothing is lost with it."""
    try:
        return read_config(folder)
    except CheckpointError as error:
        path = folder / CONFIG
        remove = ["gcloud", "storage", "rm"] if is_remote(folder) else ["rm"]
        advice = f"{shlex.join([*remove, str(path)])}, then the same command: the newest checkpoint says its settings too"
        if not replaceable:
            advice = "bring back a copy of this file, or give another run_dir"
        raise CheckpointError(error.what, where=error.where, kept="the run there is untouched", next=advice) from error


def _newest(folder: Place) -> tuple[Place, dict[str, Any]]:
    """The newest readable manifest in a folder of checkpoints, and its content; empty if there is none."""
    for step in reversed(steps(folder)):
        with contextlib.suppress(Damaged):
            return folder / str(step) / MANIFEST, manifest_of(folder / str(step))
    return folder, {}


def _changed(
    old: dict[str, Any], new: dict[str, Any], free: Sequence[str], fixed: Sequence[str] = (), *, where: Place, another: str
) -> list[Difference]:
    """Returns the differences, which must be `free` and not `fixed`. Raises `CheckpointError` listing those that are not.

    `another` says how the run would lie elsewhere.
    """
    found = differences(old, new)
    if changed := [difference for difference in found if not difference.within(free) or difference.within(fixed)]:
        kinds = {"data_fingerprint": "data", "tokenizer_fingerprint": "tokenizer"}
        back = " and ".join(dict.fromkeys(kinds.get(difference.key, "settings") for difference in changed))
        raise CheckpointError(
            "this run directory holds another run:\n" + "\n".join(map(str, changed)),
            where=str(where),
            kept="the run there is untouched",
            next=f"give another {another}, or bring back the {back} of the run there"
            + f"; or remove {CONFIG}, if it is damaged: the newest checkpoint says its settings too" * (where.name == CONFIG),
        )
    return found


def file_tokenizer(config: RunConfig, tokenizer: Tokenizer, beside: Mapping[str, bytes]) -> None:
    """Saves the tokenizer into the run directory and, with the config, into the store, so no run trains that could not be saved there.

    `beside` holds the other files of that folder, by name. Once there is a checkpoint, the saved tokenizer stays: its fingerprint does
    not cover where a generated text ends, or the chat format. An older run without these files gets them now. Nothing is removed from
    the folder that the tokenizer is read from.
    """
    folder, there = pathlib.Path(config.run_dir, TOKENIZER), home(config)
    filed, begun = None, bool(steps(there / CHECKPOINTS))
    if begun:
        if is_remote(there):
            folder.mkdir(parents=True, exist_ok=True)
            for name in {*children(there / TOKENIZER)} & {MARK, tokenizer.file, *CARRIED}:
                write(folder / name, content(there / TOKENIZER, name))
        with contextlib.suppress(DataError):  # gone or damaged
            filed = load_tokenizer(folder).fingerprint
    others = [folder / name for name in CARRIED if name != tokenizer.file]
    if filed != tokenizer.fingerprint:
        tokenizer.save(folder)
    if filed != tokenizer.fingerprint or not any(file.exists() for file in others):
        for name, file in beside.items():
            write(folder / name, file)
    source = pathlib.Path(getattr(config.tokenizer, "path", None) or "").expanduser().resolve()
    if not begun and folder.resolve() not in (source, source.parent):
        for file in others:  # of a start that came to nothing
            if file.name not in beside:
                file.unlink(missing_ok=True)
    if is_remote(there):
        put(there, records(folder.parent) | {f"{TOKENIZER}/{file.name}": file.read_bytes() for file in folder.iterdir()})


def finished(config: RunConfig) -> bool:
    """Whether the run of this config is finished, so that starting it again would only evaluate it again."""
    run_dir = pathlib.Path(config.run_dir)
    if steps(home(config) / CHECKPOINTS)[-1:] != [config.train.steps]:
        return False
    with contextlib.suppress(UserError):
        return is_over(config, read_config(run_dir), read_metrics(run_dir / "metrics.jsonl"))
    return False


def ended_by(config: RunConfig) -> pathlib.Path | None:
    """The folder in which this config's run recorded that its numbers were not finite, so that another start would end there too.

    None for a run that did not end so, has been saved after it, or had other settings.
    """
    run_dir = pathlib.Path(config.run_dir)
    at = max((int(path.stem.removeprefix("step-")) for path in run_dir.glob(f"{BUNDLES}/step-*.json")), default=0)
    free = [key for key in (*FREE, *BEGINNING) if key not in ("train.steps", "guard.max_withheld")]
    with contextlib.suppress(UserError):
        if at > max(steps(home(config) / CHECKPOINTS), default=0) and is_same(config, read_config(run_dir), free):
            return run_dir / BUNDLES
    return None


def is_over(config: RunConfig, settings: dict[str, Any], metrics: list[dict[str, Any]]) -> bool:
    """Whether `metrics` are those of a whole run of this config. `settings` are those of the run, in plain containers."""
    evaluated = any(record["step"] == config.train.steps and "val/loss" in record for record in metrics)
    return evaluated and is_same(config, settings, (*FREE, *BEGINNING))


def is_same(config: RunConfig, settings: dict[str, Any], free: Sequence[str]) -> bool:
    """Whether `settings`, in plain containers, equal those of this config, except for the `free` ones."""
    old, new = known_to_both(settings, dump(config)), known_to_both(dump(config), settings)
    free = (*free, "model.dims.mlp") if config.study is not None and config.study.match != "none" else free  # matching sets it
    filled = [each for each in differences(old, new) if each.new in (None, []) and each.within(OPEN)]
    return all(each.within(free) for each in differences(old, new) if each not in filled)


def check_shared(run_dir: pathlib.Path) -> None:
    """Raises `StorageError` when this process does not see the lock of process 0 in the run directory. An older copy has another one."""
    first = of_first(os.getpid())
    for _ in range(SHARED_WITHIN):
        if holder(run_dir).get("pid") == first:
            return
        time.sleep(1)
    raise StorageError(
        f"{socket.gethostname()} does not see the files that process 0 writes",
        where=str(run_dir.absolute()),
        next="run_dir=FOLDER in a file system that all machines share",
    )


def origin(run_dir: pathlib.Path, tokenizer: str, data: str) -> dict[str, Any]:
    """Returns what a checkpoint records of its origin: the config in the run directory and its hash, the hashes of tokenizer and data, and
    the software. `claim` compares settings, tokenizer and data.
    """
    config = {"config": hashlib.sha256((run_dir / CONFIG).read_bytes()).hexdigest(), "settings": read_config(run_dir)}
    return {**config, "tokenizer": tokenizer, "data": data, **software()}
