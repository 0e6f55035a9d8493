"""What a run of an experiment records, so that a report can tell whether two arms were paired."""

import contextlib
import gzip
import itertools
import json
import math
import os
import pathlib
import shlex
import uuid
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from llama_eqx.checkpoint.native import read_config
from llama_eqx.config import nearest
from llama_eqx.errors import CheckpointError, ConfigError, DataError, UserError
from llama_eqx.files import sync, write_json
from llama_eqx.model.llama import Llama
from llama_eqx.model.rotary import Rotary
from llama_eqx.sharding import parameter_names
from llama_eqx.studies.matching import cost, residual
from llama_eqx.studies.registration import folder, load_registration, tuned
from llama_eqx.studies.runs import STUDY, free, outdated, read_kept, read_study
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.starts import read_starts
from llama_eqx.training.identity import ended_by, is_same
from llama_eqx.training.run import RunConfig


@jax.jit
def _checksum(x: Array) -> UInt32[Array, "2"]:
    """A 64-bit checksum of every bit and its place, whatever devices hold them. The mixing is MurmurHash3's."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16).astype(jnp.uint32)
    place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)

    def mixed(h: Array) -> Array:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = (h ^ (h >> shift)) * jnp.uint32(factor)
        return h ^ (h >> 16)

    return jnp.stack([mixed(mixed(bits) ^ (place * jnp.uint32(2) + jnp.uint32(half))).sum(dtype=jnp.uint32) for half in (0, 1)])


def tensor_hashes(model: Llama) -> dict[str, str]:
    """Dtype, shape and a hash of each parameter, by name."""

    def said(leaf: Array) -> str:
        a, b = map(int, jax.device_get(_checksum(leaf)))
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}] {a:08x}{b:08x}"

    return {name: said(leaf) for name, leaf in zip(parameter_names(model), jax.tree.leaves(model), strict=True)}


def position_codes(rotary: Rotary, positions: Int[Array, " seq"]) -> int:
    """How many of these positions the compiled rotary embedding tells apart."""
    rotation = jax.jit(lambda p: (rotary(p).cos, rotary(p).sin))(positions[None])
    return len(np.unique(np.concatenate([np.asarray(part[0, :, 0]) for part in rotation], axis=-1), axis=0))


def check_registered(config: RunConfig) -> None:
    """Raises `ConfigError` when no report could use this run: its evaluations do not give the registered metric, or it is a registered run
    of the final stage whose learning rate is not that of its arm. Raises `CheckpointError` when its directory has a run of a registration
    or a rate that has changed since.
    """
    if config.study is None:
        return
    question, arm, length = config.study.question, config.study.arm, config.train.seq_len
    registration = load_registration(question)
    losses = config.losses + [f"val/loss_at_{position}" for position in (0, *(1 << n for n in range((length - 1).bit_length())))]
    if (metric := registration.metric) not in losses:
        where = str(folder(question) / "prereg.yaml")
        raise ConfigError(f"no evaluation of {arm} gives {metric}", where=where, next=nearest(metric, losses))
    counts = config.study.stage == "final" and arm in registration.arms and config.seed in registration.seeds
    if counts and config.schedule.peak != (rate := tuned(question, config.study.rung, arm)):
        raise ConfigError(
            f"no report would take {arm} at {config.schedule.peak:g}, since its rate is {rate:g}",
            where="schedule.peak",
            next=f"leave it out of the arm's file and of the command: {folder(question) / 'tuned.yaml'} gives an arm a rate of its own",
        )
    run_dir, found = pathlib.Path(config.run_dir), []
    with contextlib.suppress(UserError, KeyError, TypeError):  # no run, or none of a study
        old = read_config(run_dir)
        found += ["another registration"] * (old["study"]["registration"] != config.study.registration)
        found += [f"another rate ({old['schedule']['peak']:g})"] * (counts and old["schedule"]["peak"] != config.schedule.peak)
    if found:
        all_runs = config.run_dir.removesuffix(config.study.path.removeprefix(config.study.stage))  # of the stage
        raise CheckpointError(
            f"this run directory holds a run of {' and '.join(found)}, which reports no longer take",
            where=config.run_dir,
            kept="the run there, as it is",
            next=f"{shlex.join(['rm', '-r', all_runs])}, then the same command; or bring back {folder(question)} as it was",
        )


def record_start(config: RunConfig, model: Llama, offset: int) -> None:
    """Writes `study.json` into the run directory: hashes at step 0, the size, the residual of matching, and the position codes."""
    found = {
        "tensors": tensor_hashes(model),
        "parameters": cost(config.model, "parameters", config.train.seq_len),
        "flops_per_token": cost(config.model, "flops", config.train.seq_len),
        "residual": residual(config),
        "position_codes": position_codes(model.rotary, offset + jnp.arange(config.train.seq_len)),
    }
    if jax.process_index() == 0:
        write_json(pathlib.Path(config.run_dir, STUDY), found)


def kept_at(config: RunConfig) -> pathlib.Path:
    assert config.study is not None
    return folder(config.study.question) / "runs" / f"{config.study.path}.jsonl.gz"


def keep(config: RunConfig) -> str:
    """Files a finished run under `experiments/`: a line with its config, `study.json` and provenance, then its metrics as they are.

    If there is a record already, it stays and this run is not filed; but a record that may no longer be compared is set aside. Returns
    what was done. Raises `DataError` when a file of the run is missing or damaged.
    """
    run_dir, path, said = pathlib.Path(config.run_dir), kept_at(config), ""
    settings = {key: value for key, value in read_config(run_dir).items() if key != "run_dir"}  # a path on one machine
    first: dict[str, Any] = {"config": settings, "study": read_study(run_dir)}
    first["provenance"] = read_starts(run_dir / "provenance.jsonl")
    read_metrics(run_dir / "metrics.jsonl")  # raises what is wrong with them
    content = gzip.compress(json.dumps(first).encode() + b"\n" + (run_dir / "metrics.jsonl").read_bytes(), mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:  # another process may file at the same time
        if path.is_symlink() and not path.exists():
            return f"not filed: {path} is a link to what is not here; the files of this run are in {run_dir}"
        there = None
        with contextlib.suppress(FileNotFoundError):
            there = path.read_bytes()
        if is_kept(config):
            data = read_kept(path).settings.get("data_fingerprint", settings.get("data_fingerprint"))
            has = "the same settings" if data == settings.get("data_fingerprint") else "the same settings, but other data"
            return f"not filed: {path} has {has}, and stays as it is; the files of this run are in {run_dir}"
        if in_the_way(config):
            instead = f"to file this one, which is in {run_dir}, move or remove that file and give this command again"
            return f"not filed: {path} has other settings, and stays as it is; {instead}"
        if there is not None and (older := _set_aside(path, there)):
            said = f"; what was there, and cannot be compared any more, is {older.name} now"
        with contextlib.suppress(FileExistsError):
            _write_new(path, content)
            return f"filed in {path}{said}"


def _set_aside(path: pathlib.Path, content: bytes) -> pathlib.Path | None:
    """Moves the record and returns its new path; None when another process has moved it, or has filed since."""
    places = (path.with_name(f"{path.name}.old{n}") for n in itertools.count(1))
    place = next(place for place in places if not place.exists())
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        place.touch(exist_ok=False)  # so that no other process takes it
        try:
            path.rename(place)
        except FileNotFoundError:
            place.unlink()
            raise
        if place.read_bytes() == content:
            return place
        _write_new(path, place.read_bytes())
        place.unlink()
    return None


def _write_new(path: pathlib.Path, content: bytes) -> None:
    """Writes the file whole or not at all. Raises `FileExistsError` when it exists."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content)
        sync(partial)
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if path.exists():
                raise FileExistsError(path) from None
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def in_the_way(config: RunConfig) -> pathlib.Path | None:
    """The record of a run with other settings in this run's place, if it may still be compared and so is not set aside."""
    if config.study is None or not (path := kept_at(config)).exists() or is_kept(config):
        return None
    with contextlib.suppress(DataError):  # a damaged record does not count
        run = read_kept(path)
        with contextlib.suppress(ConfigError):  # no rate yet
            return None if next(outdated(run, load_registration(config.study.question)), None) else path
        return path
    return None


def diverged(config: RunConfig) -> pathlib.Path | None:
    """The record of this config's run, if its numbers were not finite: of a study, as it was kept, without a loss at its end."""
    if config.study is None:
        return ended_by(config)
    if not (path := kept_at(config)).exists():
        return None
    return path if math.isinf(read_kept(path).last("val/loss")) else None


def is_kept(config: RunConfig) -> bool:
    """Whether the run of this config has been kept, here or on the machine that this checkout comes from. A run that ended early because
    its numbers were not finite counts too.
    """
    if config.study is None or not (path := kept_at(config)).exists():
        return False
    with contextlib.suppress(DataError):
        run = read_kept(path)
        return is_same(config, run.settings, free(run))
    return False
