"""Opens the model to evaluate, laid out over the devices, with notes for the user."""

import math
from typing import Any, NamedTuple

import equinox as eqx

from llama_eqx.checkpoint.native import CHECKPOINTS, CONFIG, configured, read_config
from llama_eqx.checkpoint.restore import steps
from llama_eqx.config import Config
from llama_eqx.data.corpus import DataConfig
from llama_eqx.data.prepared import PreparedTokenizerConfig
from llama_eqx.data.tokenizer import Tokenizer, TokenizerConfig
from llama_eqx.errors import ConfigError, DataError
from llama_eqx.interop.pretrained import find_tokenizer, format_of, load_pretrained, located, open_pretrained
from llama_eqx.interop.weights import abstract
from llama_eqx.model.kernel import KernelConfig
from llama_eqx.model.llama import Llama
from llama_eqx.precision import Dtype, PrecisionConfig
from llama_eqx.processes import DistributedConfig
from llama_eqx.remat import RematConfig
from llama_eqx.sharding import Layout, MeshConfig, Rules
from llama_eqx.training.evaluation import Score, make_score
from llama_eqx.training.loss import policy_view

CHUNK = 2048  # tokens whose logits exist at a time
LONGEST = 2048  # tokens of a window if neither a run nor the user says


class EvaluateConfig(Config):
    """Evaluates the weights at `checkpoint` on the held-out text of `data`, None for the run's, or on `tasks` of the lm-evaluation-harness.

    `length` is a window's size in tokens, None for that of training or of the context. `stride` is how many of them it predicts, None for
    all. `batch_size` windows at a time go over all devices, in `dtype`, None for that of the files. `output` is a JSON file.

    `tasks` are names separated by commas, also of YAML files in the folder `include_path`. `limit` examples of each are used, None for all,
    with `num_fewshot` others before them, None for what the task says.
    """

    checkpoint: str | None
    data: DataConfig | None
    tokenizer: TokenizerConfig | None
    mesh: MeshConfig
    sharding: Rules
    length: int | None
    stride: int | None
    batch_size: int
    dtype: Dtype | None
    output: str | None
    tasks: str | None
    include_path: str | None
    num_fewshot: int | None
    limit: int | None
    distributed: DistributedConfig

    def check(self) -> None:
        if self.checkpoint is None:
            raise ConfigError("checkpoint is not given", where="checkpoint", next="checkpoint=RUN_DIR, or a folder of Hugging Face or Meta")
        if self.tasks is not None and self.data is not None:
            raise ConfigError("tasks bring their own data", where="tasks/data", next="leave out tasks or data")
        for name in ("length", "stride", "batch_size", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{value} is too small", where=name)


class Opened(NamedTuple):
    """A model on its devices, its layout there, and its tokenizer, for rows of `length` tokens, `batch_size` at a time.

    `notes` are what the user should know.
    """

    model: Llama
    layout: Layout
    score: Score
    tokenizer: Tokenizer
    length: int
    batch_size: int
    notes: list[str]


def open_model(config: EvaluateConfig) -> Opened:
    """Opens the model. Raises `ConfigError`, `CheckpointError` and `DataError`."""
    assert config.checkpoint is not None
    layout, weights = Layout(config.mesh.build(), config.sharding), open_pretrained(config.checkpoint)
    sizes = {axis: size for axis, size in vars(weights.config.dims).items() if size is not None}
    length = config.length or _length(config, weights.config.context)
    ways = math.prod(layout.mesh.shape[name] for name in layout.rules.axes.get("batch", ()))
    batch_size = -(-config.batch_size // ways) * ways  # each device has the same number of rows
    notes = [*weights.notes, *layout.check({"batch": batch_size, "seq": length, **sizes})]
    if length > weights.config.context:
        notes.append(f"rows of {length} tokens are longer than the model's context of {weights.config.context}")
    tokenizer, said = _tokenizer(config)
    if tokenizer.vocab > sizes["vocab"]:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab} ids, the model {sizes['vocab']}",
            where="tokenizer",
            next="tokenizer=null uses the one beside the model",
        )
    model = load_pretrained(config.checkpoint, config.dtype, layout.shardings(abstract(weights.config)))
    view = policy_view(
        PrecisionConfig(params="float32", compute="float32"),  # the same twice: computes in the dtype that was loaded
        RematConfig(policy="none"),
        layout,
        KernelConfig(name="auto", q_block=None, kv_block=None, fused_backward=False),
    )
    score = eqx.filter_jit(make_score(view, layout, CHUNK))
    return Opened(model, layout, score, tokenizer, length, batch_size, notes + said)


def data_of(config: EvaluateConfig) -> DataConfig:
    """The data to evaluate on.

    Raises `ConfigError` when neither the config nor a run says what it is, and `CheckpointError` when there is no model either.
    """
    if config.data is not None:
        return config.data
    if "data" not in (saved := _saved(config)):
        format_of(config.checkpoint or "")
        raise ConfigError("no data is given, and the checkpoint is not a run with its own", where="data", next="data=test data.path=FILE")
    return configured(located(config.checkpoint or "")[0], saved, "data")


def step_of(config: EvaluateConfig) -> tuple[int, int | None] | None:
    """The step of a run that is evaluated, and how many steps the run is to have; None for other folders."""
    assert config.checkpoint is not None
    folder, step = located(config.checkpoint)
    if "train" not in (saved := _saved(config)):
        return None
    return (steps(folder / CHECKPOINTS)[-1] if step is None else step), saved["train"].get("steps")


def _length(config: EvaluateConfig, context: int) -> int:
    """The length in the run's training, else as much of the context as is usual; all of it for benchmarks."""
    return context if config.tasks else _saved(config).get("train", {}).get("seq_len", min(context, LONGEST))


def _saved(config: EvaluateConfig) -> dict[str, Any]:
    """The config of a run; empty for other folders."""
    assert config.checkpoint is not None
    folder, _ = located(config.checkpoint)
    return read_config(folder) if (folder / CONFIG).is_file() else {}


def _tokenizer(config: EvaluateConfig) -> tuple[Tokenizer, list[str]]:
    """The tokenizer beside the model, unless another is asked for or the data comes with its own. Also returns notes."""
    assert config.checkpoint is not None
    if config.tokenizer is None:
        return find_tokenizer(config.checkpoint), []
    chosen = config.tokenizer.build(data_of(config))
    try:
        own = find_tokenizer(config.checkpoint)
    except DataError:
        return chosen, []
    if own.fingerprint == chosen.fingerprint:
        return chosen, []
    whose = "the data was prepared with a tokenizer" if isinstance(config.tokenizer, PreparedTokenizerConfig) else "this tokenizer"
    return chosen, [f"{whose} is not the model's: {chosen.vocab:,} ids instead of {own.vocab:,}"]
