"""A run: its whole config, and what must stay the same when it is resumed."""

import contextlib
import dataclasses
import hashlib
import pathlib
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llama_eqx.checkpoint.native import CHECKPOINTS, CONFIG, TOKENIZER, read_config, write_config
from llama_eqx.checkpoint.restore import Damaged, manifest_of, steps
from llama_eqx.checkpoint.save import CheckpointConfig
from llama_eqx.checkpoint.store import MANIFEST, Place, bring, children, content, is_remote, place, put, records
from llama_eqx.config import Config, Difference, differences, dump, known_to_both, nearest
from llama_eqx.data.corpus import DataConfig
from llama_eqx.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from llama_eqx.data.tokenizer.base import MARK
from llama_eqx.errors import CheckpointError, ConfigError, DataError, StorageError, UserError
from llama_eqx.extensions import import_all
from llama_eqx.interop.files import CARRIED
from llama_eqx.model.kernel import KernelConfig
from llama_eqx.model.llama import LlamaConfig
from llama_eqx.precision import PrecisionConfig
from llama_eqx.processes import DistributedConfig
from llama_eqx.remat import Remat
from llama_eqx.sharding import MeshConfig, Rules
from llama_eqx.studies.study import StudyConfig
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.tracking.provenance import commit, versions
from llama_eqx.tracking.tracker import TrackingConfig
from llama_eqx.training.guard import GuardConfig
from llama_eqx.training.loss import Objective
from llama_eqx.training.meters import METERS
from llama_eqx.training.optimizer import OptimizerConfig
from llama_eqx.training.profile import ProfileConfig
from llama_eqx.training.schedule import ScheduleConfig


class TrainConfig(Config):
    """`batch_size` in sequences over all devices, `seq_len` in tokens; `log_every` and `eval_every` in steps.

    `microbatch_size` sequences go through the model at a time, and gradients are added up; None takes all at once.
    `distinct_rows` limits training to that many of the data's rows, repeated in new orders; None takes all of them.
    `meters` names the measures of `llama_eqx.training.meters` to record; they cost something. `traces` names what is drawn of the model
    at each evaluation, for a held-out text.
    `unroll` layers make one turn of the loop over layers: more to compile, fewer copies at run time.
    `only` names the parameters that learn, in full or by how their names end; None lets all of them. The others have neither a gradient nor
    a state of the optimizer.
    """

    steps: int
    batch_size: int
    microbatch_size: int | None
    seq_len: int
    unroll: int
    distinct_rows: int | None
    meters: tuple[str, ...]
    only: tuple[str, ...] | None
    traces: tuple[Literal["residual", "attention_weights", "attention_entropy", "logit_lens"], ...]
    log_every: int
    eval_every: int
    sample_tokens: int

    def check(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "sample_tokens" else 1
            if isinstance(value, int) and value < least:
                raise ConfigError(f"{value} is too small", where=field.name, next=f"train.{field.name}={least} or more")
        if self.only == ():
            raise ConfigError("then nothing learns", where="only", next="train.only=null, for all parameters, or [q_proj,v_proj]")
        if not METERS.keys() >= {*self.meters}:
            import_all()
        for name in self.meters:
            if name not in METERS:
                raise ConfigError(f"there is no meter {name!r}", where="meters", next=nearest(name, METERS))


class RunConfig(Config):
    """`eval_data` holds further data by name. Their held-out text is evaluated like that of `data`.

    `init_new` names the parameters that the weights at `init_from` lack, which are drawn with the seed. A name may be the end of one:
    "lora_a" stands for every "….lora_a".
    """

    model: LlamaConfig
    data: DataConfig
    eval_data: dict[str, DataConfig]
    tokenizer: TokenizerConfig
    mesh: MeshConfig
    sharding: Rules
    precision: PrecisionConfig
    remat: Remat
    kernel: KernelConfig
    loss: Objective
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    guard: GuardConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    distributed: DistributedConfig
    profile: ProfileConfig
    compile_cache: bool
    train: TrainConfig
    init_from: str | None
    init_new: tuple[str, ...] | None
    study: StudyConfig | None
    run_dir: str
    seed: int

    def check(self) -> None:
        if not 0 <= self.seed < 2**32:  # of a larger one, JAX's keys have only the last 32 bits
            raise ConfigError(f"{self.seed} is not a seed: from 0 to {2**32 - 1}", where="seed", next="seed=0")
        if self.init_new and self.init_from is None:
            raise ConfigError(
                "parameters are named as new, but there are no weights to start from",
                where="init_new",
                next="init_from=FOLDER, or leave init_new out",
            )
        measured = ["val/loss", "val/bits_per_byte", *(f"val/{name}/loss" for name in self.eval_data)]
        if self.checkpoint.keep_best and self.checkpoint.best_by not in measured:
            raise ConfigError(
                f"no evaluation gives a {self.checkpoint.best_by} that is best where it is lowest",
                where="checkpoint.best_by",
                next=nearest(self.checkpoint.best_by, measured),
            )
        if self.checkpoint.store is not None and self.tracking.wandb.artifact:
            raise ConfigError("W&B takes checkpoints of a run directory, and not of a store", where="tracking.wandb.artifact")
        if self.train.seq_len > self.model.context:
            raise ConfigError(
                f"train.seq_len={self.train.seq_len} is longer than the model's context of {self.model.context}",
                where="train.seq_len",
                next=f"model.context={self.train.seq_len} makes room",
            )


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
FINETUNE_WARMUP = 20  # steps, of recipe=finetune
# What a config may leave open, for `with_vocab` to fill in.
OPEN = ("model.dims.vocab", "model.tokens.bos", "model.tokens.eos", "model.tokens.pad")


def movable(settings: dict[str, Any]) -> list[str]:
    """`MOVABLE`, extended to the components of a mixture. `settings` are plain containers."""
    components = [f"data.components.{name}" for name in settings.get("data", {}).get("components", {})]
    return [*MOVABLE, *(f"{component}.{key}" for component in components for key in ("path", "verify"))]


def home(config: RunConfig) -> Place:
    """The folder of the run's checkpoints, config and records: the run directory, or a folder of the same shape in a store."""
    return place(config.checkpoint.store or config.run_dir)


SHARED_WITHIN = 30  # seconds; a network's file system may be slow to show a new file


def with_vocab(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """Returns `config` with the tokenizer's size if `dims.vocab` is None, and the tokenizer's BOS and padding if `tokens` has none.

    All ids that end a text for the tokenizer are added to `tokens.eos`, those that end a turn too: a model that has learned to end with
    one is exported with it, and generation stops there. They are not added if `tokens` belong to another tokenizer.

    Raises `ConfigError` when the tokenizer has ids that the model lacks.
    """
    vocab, tokens = config.model.dims.vocab, config.model.tokens
    pad = tokenizer.pad if tokens.pad is None else tokens.pad
    if tokens.bos is None and not tokens.eos:
        tokens = dataclasses.replace(tokens, bos=tokenizer.bos, eos=tokenizer.stop, pad=pad)
    elif tokenizer.eos in tokens.eos:
        tokens = dataclasses.replace(tokens, eos=tuple(dict.fromkeys((*tokens.eos, *tokenizer.stop))), pad=pad)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, tokens=tokens))
    if vocab is None:
        dims = dataclasses.replace(config.model.dims, vocab=tokenizer.vocab)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, dims=dims))
    if tokenizer.vocab > vocab:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab} ids, the model {vocab}",
            where="model.dims.vocab",
            next="model.dims.vocab=null takes the tokenizer's size",
        )
    return config


def warnings(config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """Returns warnings about settings that are allowed but seldom intended."""
    unused = config.model.dims.of("vocab")[0] - tokenizer.vocab
    said = [f"{unused} token ids of the model are not in the tokenizer: they will only be made less likely"] if unused else []
    tokens = config.model.tokens
    if tokens.eos and (tokenizer.bos != tokens.bos or tokenizer.eos not in tokens.eos):
        said.append(
            f"texts begin and end with the tokenizer's ids {tokenizer.bos} and {tokenizer.eos}, in the model's config they are "
            f"{tokens.bos} and {', '.join(map(str, tokens.eos))}: see model.tokens"
        )
    if config.precision.params == "bfloat16":
        said.append(
            "precision.params=bfloat16: of a weight an update below a 256th of it is lost (train.meters=[update_norm,dead_updates] counts "
            "them); precision=mixed keeps float32"
        )
    if config.schedule.warmup_steps >= config.train.steps:
        recipe = ", or recipe=finetune" if config.init_from and config.train.steps > FINETUNE_WARMUP else ""
        said.append(
            f"the warm-up of {config.schedule.warmup_steps} steps is not over after {config.train.steps}: schedule.peak is not reached; "
            f"next: schedule.warmup_steps={config.train.steps // 10}{recipe}"
        )
    return said


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
    folders = [folder for folder in ((run_dir, there) if is_remote(there) else (run_dir,)) if CONFIG in children(folder)]
    for folder in folders:
        old = _settings(folder, replaceable="settings" in facts or not begun)
        moved = ["checkpoint.store"] if folder is run_dir else []  # the checkpoints would be left behind
        found = _changed(old, new, free, moved, where=folder / CONFIG, another="run_dir" if folder is run_dir else "checkpoint.store")
    # Older manifests have no settings, but a hash of config.yaml, which changes with what is free too.
    fingerprints = {"tokenizer_fingerprint": facts.get("tokenizer", tokenizer), "data_fingerprint": facts.get("data", data)}
    # A setting that they have not heard of, or that is no more, is left to config.yaml, where it can be mended by hand.
    old, now = facts.get("settings", new) | fingerprints, {**new, "tokenizer_fingerprint": tokenizer}
    filed = _changed(known_to_both(old, now), known_to_both(now, old), free, where=manifest, another="run_dir")
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
        raise CheckpointError(error.what, where=error.where, kept="the run there is untouched", next=error.next or advice) from error


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

    `another` is the setting by which the run would lie elsewhere.
    """
    found = differences(old, new)
    if changed := [difference for difference in found if not difference.within(free) or difference.within(fixed)]:
        kinds = {"data_fingerprint": "data", "tokenizer_fingerprint": "tokenizer"}
        back = " and ".join(dict.fromkeys(kinds.get(difference.key, "settings") for difference in changed))
        raise CheckpointError(
            "this run directory holds another run:\n" + "\n".join(map(str, changed)),
            where=str(where),
            kept="the run there is untouched",
            next=f"give another {another}, or bring back the {back} of the run there",
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
                (folder / name).write_bytes(content(there / TOKENIZER, name))
        with contextlib.suppress(DataError):  # gone or damaged
            filed = load_tokenizer(folder).fingerprint
    others = [folder / name for name in CARRIED if name != tokenizer.file]
    if filed != tokenizer.fingerprint:
        tokenizer.save(folder)
    if filed != tokenizer.fingerprint or not any(file.exists() for file in others):
        for name, file in beside.items():
            (folder / name).write_bytes(file)
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
    """Raises `StorageError` when this process does not see what process 0 wrote into the run directory."""
    for _ in range(SHARED_WITHIN):
        if (run_dir / CONFIG).exists():
            return
        time.sleep(1)
    raise StorageError(
        f"{socket.gethostname()} does not see the files that process 0 writes",
        where=str(run_dir.absolute()),
        next="run_dir=FOLDER in a file system that all machines share",
    )


def origin(run_dir: pathlib.Path, tokenizer: str, data: str) -> dict[str, Any]:
    """Returns what a checkpoint records of its origin: the config in the run directory and its hash, the hashes of tokenizer and data, the
    commit of the code and the versions of the libraries. `claim` compares settings, tokenizer and data.
    """
    config = {"config": hashlib.sha256((run_dir / CONFIG).read_bytes()).hexdigest(), "settings": read_config(run_dir)}
    return {**config, "tokenizer": tokenizer, "data": data, "commit": commit(), "versions": versions()}
