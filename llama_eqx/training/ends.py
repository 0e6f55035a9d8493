"""The two ends of a run: the weights that it starts from, if not fresh ones, and those that it hands on."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection
from typing import Any

import jax
import yaml
from jax.experimental import multihost_utils
from jaxtyping import Array, PRNGKeyArray

from llama_eqx.checkpoint.native import CHECKPOINTS, read_config
from llama_eqx.checkpoint.restore import steps
from llama_eqx.config import Config, Difference, differences, dump
from llama_eqx.data.chat import FORMATS, chat_format
from llama_eqx.data.sft import SftConfig
from llama_eqx.data.tokenizer import HuggingFaceTokenizerConfig, Tokenizer
from llama_eqx.errors import CheckpointError, ConfigError
from llama_eqx.extensions import conf_dirs
from llama_eqx.interop.conversion import ConvertConfig, convert, require_expressible
from llama_eqx.interop.files import CARRIED, TOKENIZER, carried, mistaken, read_json
from llama_eqx.interop.huggingface import GENERATION, token_ids
from llama_eqx.interop.pretrained import format_of, load_pretrained, located, open_pretrained
from llama_eqx.interop.weights import Weights, abstract, compare, parameter_shapes
from llama_eqx.model.llama import LlamaConfig
from llama_eqx.precision import cast
from llama_eqx.sharding import parameter_names
from llama_eqx.training.run import RunConfig, home
from llama_eqx.training.state import TrainState, first_state

# What may differ between a model and the weights that it starts from: none of it changes what the weights compute.
FREE = ("context", "dropout", "block.dropout", "init", "tokens")
# In a generation_config.json, beside all that end with `_token_id`: of the tokenizer that it was written for.
IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")
SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def check_start(config: RunConfig) -> None:
    """Raises `CheckpointError` when there is no model at `init_from`: before a tokenizer or data are made for nothing."""
    if _starts_elsewhere(config):
        format_of(config.init_from or "")


def open_start(config: RunConfig) -> Weights | None:
    """What lies at `init_from`, not yet read; None without it, or when the run has a checkpoint already. A context that is another is
    noted, and so is what starts fresh by `init_new`.

    Raises `CheckpointError` when there are none or they are of another model than `config.model`, but for what `init_new` names; all
    differences are listed. Raises `ConfigError` when `init_new` names what the model has not, or the weights have.
    """
    if not _starts_elsewhere(config):
        return None
    assert config.init_from is not None
    weights = open_pretrained(config.init_from)
    given, wanted = parameter_shapes(abstract(weights.config)), parameter_shapes(abstract(config.model))
    lacking = [name for name in wanted if name not in given]
    every = f"init_new=[{','.join(lacking)}]"
    new = _named(config.init_new or (), wanted, given, every if lacking else "leave init_new out")
    found, explained = model_differences(weights.config, config.model), _explained(weights.config, config.model, new)
    if wrong := [difference for difference in found if not difference.within(explained)]:
        lines = [f"model.{name} is {a} there, {b} here" for name, a, b in wrong]
        lines += [f"not part of this model: {name}" for name in given if name not in wanted]
        advice, explicable = _advice(weights.config, wrong), _explained(weights.config, config.model, lacking)
        if all(difference.within(explicable) for difference in found):
            advice += f"; or {every}, for these parameters to start fresh"
        what = "the weights are of another model than the config:\n" + "\n".join(lines)
        raise CheckpointError(what, where=config.init_from, next=advice)
    compare({name: shape for name, shape in wanted.items() if name not in new}, given, where=config.init_from)
    notes = []
    if new:
        notes.append(f"{len(new)} parameters that the weights have not start fresh, drawn with seed={config.seed}: {', '.join(new)}")
        notes += [f"model.{name} is {a} there, {b} here" for name, a, b in found]
    there, here = weights.config.context, config.model.context
    if there != here:
        notes.append(
            f"the weights are of a context of {there}, and this model, with what it exports, of {here}: model.context={there} keeps it"
        )
    return dataclasses.replace(weights, notes=(*weights.notes, *notes))


def seen_before(config: RunConfig, data: str) -> list[str]:
    """What is to be said where the weights at `init_from` saw the data with this fingerprint in the order in which they come now."""
    if not _starts_elsewhere(config) or format_of(config.init_from or "") != "native":
        return []
    there = read_config(located(config.init_from or "")[0])
    told = [there.get("data_fingerprint"), there.get("seed"), there.get("train", {}).get("seq_len")]
    if told != [data, config.seed, config.train.seq_len]:
        return []
    return [f"the run at init_from had this seed and these data: its rows come again, and seed={config.seed + 1} takes others"]


def start(weights: Weights, config: RunConfig, shardings: TrainState, key: PRNGKeyArray) -> TrainState:
    """The state before the first step: these weights, read straight to where they are to live, what they lack as `key` draws it, and a
    fresh optimizer.
    """
    assert config.init_from is not None
    names, (places, here) = parameter_names(shardings.model), jax.tree.flatten(shardings.model)
    place, there = dict(zip(names, places, strict=True)), abstract(weights.config)
    given = parameter_names(there)
    targets = jax.tree.structure(there).unflatten([place[name] for name in given])
    loaded = load_pretrained(config.init_from, config.precision.params, targets)
    leaves = dict(zip(given, jax.tree.leaves(loaded), strict=True))
    new = {name: place[name] for name in names if name not in leaves}

    def drawn(key: PRNGKeyArray) -> dict[str, Array]:  # the compiler leaves out what is not asked for
        model = cast(config.model.build(key=key), config.precision.params)
        return {name: leaf for name, leaf in zip(names, jax.tree.leaves(model), strict=True) if name in new}

    if new:
        leaves |= jax.jit(drawn, out_shardings=new)(key)
    model = here.unflatten([leaves[name] for name in names])
    optimizer = config.optimizer.build()
    return jax.jit(lambda model: first_state(model, optimizer, config.guard), donate_argnums=0, out_shardings=shardings)(model)


def handed_on(config: RunConfig, tokenizer: Tokenizer, weights: Weights | None) -> tuple[dict[str, bytes], list[str]]:
    """What the run keeps beside its tokenizer for whoever gets the model from it, by the name of the file; and what is to be said: what
    is left behind, as a link leads outside of its folder or it is not what its name says, and a template of another format than is learned.

    From the folder of `tokenizer=hf` its chat template and the like. Where none is there and conversations are trained on, the template
    of their format. Of the model at `init_from` its settings of generation, with this model's special ids.
    """
    files, trees, remarks = {}, {}, []

    def keep(name: str, find: Callable[[], pathlib.Path | None]) -> None:
        try:
            if file := find():
                if wrong := mistaken(file, ""):
                    raise CheckpointError(wrong)
                if file.suffix == ".json":
                    trees[name] = read_json(file)
                files[name] = file.read_bytes()
        except (CheckpointError, OSError) as error:
            remarks.append(f"{name} was left behind: {error.what if isinstance(error, CheckpointError) else error.strerror}")

    if isinstance(config.tokenizer, HuggingFaceTokenizerConfig):
        folder = pathlib.Path(config.tokenizer.path or "").expanduser()
        for name in CARRIED:
            if name not in ("tokenizer.json", GENERATION):
                keep(name, lambda name=name: carried(folder, [name]).get(name))
    if trees.get(SETTINGS, {}).pop("auto_map", None) is not None:  # it names code, which does not go along
        files[SETTINGS] = _json(trees[SETTINGS])
    templates = {TEMPLATE: files[TEMPLATE].decode(errors="replace")} if TEMPLATE in files else {}
    templates |= {name: str(tree["chat_template"]) for name, tree in trees.items() if tree.get("chat_template")}
    if any(isinstance(source, SftConfig) for _, source in config.data.sources().values()):
        learned = chat_format(tokenizer)
        if not templates:
            files[TEMPLATE] = learned.template.encode()
        remarks += [
            f"conversations are learned in the format {tokenizer.chat!r}, and the model is handed on with {name}, which is not of it: "
            "apply_chat_template will give ids that were not learned"
            + "".join(f"; next: tokenizer.chat={known}, which it may be of" for known, other in FORMATS.items() if other.wrote(template))
            for name, template in templates.items()
            if not learned.wrote(template)
        ]
    given = {} if weights is None else weights.files
    keep(GENERATION, lambda: given.get(GENERATION, given.get(f"{TOKENIZER}/{GENERATION}")))
    if GENERATION in files:
        of_any = {key: value for key, value in trees[GENERATION].items() if key not in IDS and not key.endswith("_token_id")}
        files[GENERATION] = _json({**of_any, **token_ids(config.model.tokens)})
    return files, remarks


def check_export(config: RunConfig) -> None:
    """Raises `ConfigError` when the model cannot be exported as asked: before it is trained."""
    if config.checkpoint.export is not None:
        try:
            require_expressible(config.model, config.checkpoint.export)
        except CheckpointError as error:
            raise ConfigError(
                f"checkpoint.export={config.checkpoint.export}: {error.what}",
                where=f"model.{error.where}",
                next="checkpoint.export=native or null, or another model",
            ) from None


def export(config: RunConfig) -> pathlib.Path | None:
    """Writes the last checkpoint of a run to `export` in its directory, in place of an earlier one, and says what the format leaves out.
    Process 0 does it, the others wait.

    Raises `StorageError` when it cannot be written.
    """
    if config.checkpoint.export is None:
        return None
    target = pathlib.Path(config.run_dir, "export")
    if jax.process_index() == 0:
        job = ConvertConfig(
            from_=config.checkpoint.store or config.run_dir, to=str(target), format=config.checkpoint.export, dtype=None, shards=None
        )
        for note in convert(job, replace=True):
            print(f"note: {note}")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export")
    return target


def _starts_elsewhere(config: RunConfig) -> bool:
    return config.init_from is not None and not steps(home(config) / CHECKPOINTS)


def model_differences(there: LlamaConfig, here: LlamaConfig) -> list[Difference]:
    """Everything that bears on what the same weights compute; `old` is what it is there."""
    return [difference for difference in differences(dump(there), dump(here)) if not difference.within(FREE)]


def _named(names: Collection[str], wanted: Collection[str], given: Collection[str], advice: str) -> list[str]:
    """The parameters, of all that are `wanted`, whose names end with one of these, part by part.

    Raises `ConfigError` when there is none, or one is `given`.
    """
    found: set[str] = set()
    for name in names:
        meant = [each for each in wanted if f".{each}".endswith(f".{name}")]
        if not meant:
            raise ConfigError(f"the model has no parameter {name}", where="init_new", next=advice)
        if known := [each for each in meant if each in given]:
            raise ConfigError(f"{name} names what the weights at init_from have: {', '.join(known)}", where="init_new", next=advice)
        found |= {*meant}
    return [name for name in wanted if name in found]


def _explained(there: LlamaConfig, here: LlamaConfig, new: Collection[str]) -> list[str]:
    """The keys of `here` that may differ when `new` are not among the weights: the class in a slot that has them beside all parameters of
    the class there, and the settings that it alone has.
    """
    wanted, keys = parameter_shapes(abstract(here)), []
    for slot, other in vars(there).items():
        own = getattr(here, slot, None)
        if isinstance(own, Config) and type(own) is not type(other):
            without = parameter_shapes(abstract(dataclasses.replace(here, **{slot: other})))
            if without.items() < wanted.items() and wanted.keys() - without.keys() <= {*new}:
                keys += [f"{slot}.{key}" for key in dump(own) if key == "_target_" or key not in dump(other)]
    return keys


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()


def _advice(there: LlamaConfig, found: list[Difference]) -> str:
    """What to type so that the model becomes that of the weights, or the class that a slot wants where no option has it."""
    slots = [name.removesuffix("._target_") for name, _, _ in found if name.endswith("._target_")]
    typed, values = [], [each for each in found if not each.within(slots)]
    for slot in slots:
        wanted = dump(getattr(there, slot))
        files = [path for folder in conf_dirs() for path in sorted((folder / "model" / slot).glob("*.yaml"))]
        trees = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) or {} for path in files}
        options = {
            name: {key: _number(value) for key, value in tree.items()} for name, tree in trees.items()
        }  # YAML 1.1 takes 5e5 for text
        left = {name: differences(tree, wanted, slot) for name, tree in options.items() if tree.get("_target_") == wanted["_target_"]}
        option = min(left, key=lambda name: len(left[name]), default=f"an option with {wanted['_target_']}")
        typed.append(f"model/{slot}={option}")
        values += [Difference(each.key, each.new, None) for each in left.get(option, []) if not each.within(FREE)]
    typed += [f"model.{name}={'null' if value is None else value}" for name, value, _ in values]
    return f"another model=, or {' '.join(typed)}"


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value
