"""A run: its whole config."""

import dataclasses
from typing import Literal

from llama_eqx.checkpoint.save import CheckpointConfig
from llama_eqx.checkpoint.store import Place, place
from llama_eqx.config import Config, nearest
from llama_eqx.data.corpus import DataConfig
from llama_eqx.data.tokenizer import HuggingFaceTokenizer, Tokenizer, TokenizerConfig
from llama_eqx.errors import ConfigError
from llama_eqx.extensions import import_all
from llama_eqx.model.kernel import KernelConfig
from llama_eqx.model.llama import LlamaConfig
from llama_eqx.precision import PrecisionConfig
from llama_eqx.processes import DistributedConfig
from llama_eqx.remat import Remat
from llama_eqx.sharding import MeshConfig, Rules
from llama_eqx.studies.study import StudyConfig
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
    "lora_a" stands for every "….lora_a". "attention" and "rotary" stand for settings of these slots that are new to the weights.
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
        measured = [*self.losses, "val/bits_per_byte"]
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

    @property
    def losses(self) -> list[str]:
        """What an evaluation records in nats per token of whole texts: of all, of each component of a mixture, and of `eval_data`."""
        names = dict.fromkeys(name for name in (*self.data.sources(), *self.eval_data) if name)
        return ["val/loss", *(f"val/{name}/loss" for name in names)]


FINETUNE_WARMUP = 20  # steps, of recipe=finetune


def home(config: RunConfig) -> Place:
    """The folder of the run's checkpoints, config and records: the run directory, or a folder of the same shape in a store."""
    return place(config.checkpoint.store or config.run_dir)


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
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.bos is None and tokenizer.eos is None:
        said.append(
            "the tokenizer has neither BOS nor EOS, so nothing marks where a document ends; next: a tokenizer_config.json beside "
            "the tokenizer.json, with a bos_token and an eos_token that it has"
        )
    if config.precision.params == "bfloat16":
        said.append(
            "precision.params=bfloat16: of a weight an update below a 512th of it is lost (train.meters=[update_norm,dead_updates] counts "
            "them); precision=mixed keeps float32"
        )
        for name in ("b1", "b2", "momentum"):
            if (value := getattr(config.optimizer, name, 0)) >= 1 - 2**-9:
                said.append(
                    f"optimizer.{name}={value:g}: kept in bfloat16, that average forgets nothing; next: optimizer.{name}=0.99, or "
                    "precision=mixed"
                )
    if config.schedule.warmup_steps >= config.train.steps:
        recipe = ", or recipe=finetune" if config.init_from and config.train.steps > FINETUNE_WARMUP else ""
        said.append(
            f"the warm-up of {config.schedule.warmup_steps} steps is not over after {config.train.steps}: schedule.peak is not reached; "
            f"next: schedule.warmup_steps={config.train.steps // 10}{recipe}"
        )
    return said
