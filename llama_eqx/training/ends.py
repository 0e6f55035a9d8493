"""The two ends of a run: the pretrained weights that it may start from, and the model that it exports."""

import contextlib
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
from llama_eqx.data.prepared import PreparedTokenizerConfig
from llama_eqx.data.sft import SftConfig
from llama_eqx.data.tokenizer import HuggingFaceTokenizerConfig, Tokenizer, find_tokenizer
from llama_eqx.data.tokenizer.find import options
from llama_eqx.errors import CheckpointError, ConfigError, DataError
from llama_eqx.extensions import conf_dirs
from llama_eqx.files import json_object, mistaken
from llama_eqx.interop.conversion import ConvertConfig, convert, require_expressible
from llama_eqx.interop.files import CARRIED, TOKENIZER, carried
from llama_eqx.interop.huggingface import GENERATION, token_ids
from llama_eqx.interop.pretrained import format_of, load_pretrained, located, open_pretrained
from llama_eqx.interop.weights import Weights, abstract, compare, parameter_shapes
from llama_eqx.model.llama import LlamaConfig
from llama_eqx.precision import cast
from llama_eqx.sharding import ending_in, parameter_names
from llama_eqx.training.optimizer import transformation
from llama_eqx.training.run import RunConfig, home
from llama_eqx.training.state import TrainState, first_state

# What may differ between a model and the weights that it starts from. None of it changes what the weights compute.
FREE = ("context", "dropout", "block.dropout", "init", "tokens")
# Slots whose settings may be new to the weights, as for a longer context, if `init_new` names them.
NEW = ("attention", "rotary")
# Keys of a generation_config.json that hold ids of the original tokenizer, besides those that end with `_token_id`.
IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")
SAMPLED = 1000  # ids whose text is compared, at most
SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def check_start(config: RunConfig) -> None:
    """Raises `CheckpointError` when there is no model at `init_from`, before time is spent on a tokenizer or data."""
    if _starts_elsewhere(config):
        format_of(config.init_from or "")


def open_start(config: RunConfig) -> Weights | None:
    """Opens the weights at `init_from` without reading them. Returns None without `init_from`, or when the run has a checkpoint already.

    Its notes name a different context, and what is new to the weights because `init_new` names it.

    Raises `CheckpointError` when there are no weights, or when they are of another model than `config.model` apart from what `init_new`
    names; all differences are listed. Raises `ConfigError` when `init_new` names a parameter that the model lacks or the weights have, or
    a slot that is no other than theirs.
    """
    if not _starts_elsewhere(config):
        return None
    assert config.init_from is not None
    weights = open_pretrained(config.init_from)
    given, wanted = parameter_shapes(abstract(weights.config)), parameter_shapes(abstract(config.model))
    lacking = [name for name in wanted if name not in given]
    every = f"init_new=[{','.join(lacking)}]"
    slots = [name for name in config.init_new or () if name in NEW and not ending_in(name, wanted)]
    named = [name for name in config.init_new or () if name not in slots]
    new = _named(named, wanted, given, every if lacking else "leave init_new out")
    found, explained = model_differences(weights.config, config.model), [*_explained(weights.config, config.model, new), *slots]
    for slot in slots:
        if not any(difference.within([slot]) for difference in found):
            advice = f"another model/{slot} or model.{slot}.…, or leave {slot} out"
            raise ConfigError(f"the {slot} of this model is that of the weights", where="init_new", next=advice)
    if wrong := [difference for difference in found if not difference.within(explained)]:
        lines = [f"model.{name} is {a} there, {b} here" for name, a, b in wrong]
        lines += [f"not part of this model: {name}" for name in given if name not in wanted]
        advice, explicable = _advice(weights.config, wrong), _explained(weights.config, config.model, lacking)
        if any(key == "dims.vocab" for key, *_ in wrong) and (there := _tokenizer_there(config)):
            advice = f"{there[1]}, the tokenizer of these weights, or {advice}"
        other = dict.fromkeys(key.partition(".")[0] for key, *_ in (each for each in found if not each.within(explicable)))
        if given.items() <= wanted.items() and {*other} <= {*NEW}:
            why = [*(["these parameters to start fresh"] if lacking else []), *(f"another {slot} than they learned with" for slot in other)]
            advice += f"; or init_new=[{','.join([*lacking, *other])}], for {' and '.join(why)}"
        what = "the weights are of another model than the config:\n" + "\n".join(lines)
        raise CheckpointError(what, where=config.init_from, next=advice)
    compare({name: shape for name, shape in wanted.items() if name not in new}, given, where=config.init_from)
    notes = []
    if new:
        notes.append(f"{len(new)} parameters that the weights lack start fresh, drawn with seed={config.seed}: {', '.join(new)}")
    notes += [f"model.{name} is {a} there, {b} here" for name, a, b in found]
    there, here = weights.config.context, config.model.context
    if there != here:
        notes.append(
            f"the weights are of a context of {there}, and this model, with what it exports, of {here}: model.context={there} keeps it"
        )
    return dataclasses.replace(weights, notes=(*weights.notes, *notes))


def seen_before(config: RunConfig, data: str) -> list[str]:
    """Returns a warning if the weights at `init_from` have already seen the data with this fingerprint in the order to come."""
    if not _starts_elsewhere(config) or format_of(config.init_from or "") != "native":
        return []
    there = read_config(located(config.init_from or "")[0])
    told = [there.get("data_fingerprint"), there.get("seed"), there.get("train", {}).get("seq_len")]
    if told != [data, config.seed, config.train.seq_len]:
        return []
    return [f"the run at init_from had this seed and these data: its rows come again, and seed={config.seed + 1} takes others"]


def other_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """Returns a warning if ids mean other text to the weights at `init_from`, by the tokenizer beside them."""
    if not (_starts_elsewhere(config) and (there := _tokenizer_there(config))):
        return []
    own, typed = there
    ids = range(0, min(own.vocab, tokenizer.vocab), 1 + tokenizer.vocab // SAMPLED)
    others = sum(own.decode([i]) != tokenizer.decode([i]) for i in ids)
    if own.fingerprint == tokenizer.fingerprint or 10 * others < len(ids):  # formats of one tokenizer differ in their special ids
        return []
    what = "the weights at init_from belong to another tokenizer: ids mean other text to them"
    prepared = isinstance(config.tokenizer, PreparedTokenizerConfig)
    return [f"{what}; next: {'python -m llama_eqx.prepare with ' if prepared else ''}{typed}"]


def _tokenizer_there(config: RunConfig) -> tuple[Tokenizer, str] | None:
    """The tokenizer beside the weights at `init_from`, if one can be read, and what to type for it."""
    with contextlib.suppress(DataError):
        folder = located(config.init_from or "")[0]
        return (own := find_tokenizer(folder)), options(own, folder)
    return None


def start(weights: Weights, config: RunConfig, shardings: TrainState, key: PRNGKeyArray) -> TrainState:
    """The state before the first step: these weights, each read straight to its devices, the parameters that they lack, drawn with `key`,
    and a fresh optimizer.
    """
    assert config.init_from is not None
    names, (places, here) = parameter_names(shardings.model), jax.tree.flatten(shardings.model)
    place, there = dict(zip(names, places, strict=True)), abstract(weights.config)
    given = parameter_names(there)
    targets = jax.tree.structure(there).unflatten([place[name] for name in given])
    loaded = load_pretrained(config.init_from, config.precision.params, targets)
    leaves = dict(zip(given, jax.tree.leaves(loaded), strict=True))
    new = {name: place[name] for name in names if name not in leaves}

    def drawn(key: PRNGKeyArray) -> dict[str, Array]:  # the compiler drops the parameters that are not returned
        model = cast(config.model.build(key=key), config.precision.params)
        return {name: leaf for name, leaf in zip(names, jax.tree.leaves(model), strict=True) if name in new}

    if new:
        leaves |= jax.jit(drawn, out_shardings=new)(key)
    model = here.unflatten([leaves[name] for name in names])
    optimizer = transformation(config.optimizer, config.train.only)
    return jax.jit(lambda model: first_state(model, optimizer, config.guard), donate_argnums=0, out_shardings=shardings)(model)


def handed_on(config: RunConfig, tokenizer: Tokenizer, weights: Weights | None) -> tuple[dict[str, bytes], list[str]]:
    """Returns the files that the run keeps beside its tokenizer and exports with the model, by name, and remarks on them.

    These are the chat template and the like from the folder of `tokenizer=hf`; without a template there, the one of the format of the
    conversations that are trained on; and the generation settings of the model at `init_from`, with this model's special ids. The
    remarks name files that are left behind, because a link leads out of the folder or the content does not fit the name, and a template
    of another format than the one that is trained on.
    """
    files, trees, remarks = {}, {}, []

    def keep(name: str, find: Callable[[], pathlib.Path | None]) -> None:
        try:
            if file := find():
                if wrong := mistaken(file, ""):
                    raise CheckpointError(wrong)
                if file.suffix == ".json":
                    trees[name] = json_object(file, CheckpointError)
                files[name] = file.read_bytes()
        except (CheckpointError, OSError) as error:
            remarks.append(f"{name} was left behind: {error.what if isinstance(error, CheckpointError) else error.strerror}")

    if isinstance(config.tokenizer, HuggingFaceTokenizerConfig):
        folder = pathlib.Path(config.tokenizer.path or "").expanduser()
        for name in CARRIED:
            if name not in ("tokenizer.json", GENERATION):
                keep(name, lambda name=name: carried(folder, [name]).get(name))
    if trees.get(SETTINGS, {}).pop("auto_map", None) is not None:  # it names code, which is not exported
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
    """Raises `ConfigError` when the model cannot be exported as asked, before it is trained."""
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
    """Writes the last checkpoint of a run to `export` in its directory, replacing an earlier export, and prints what the format leaves out.

    Process 0 writes; the others wait.

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
    """Returns all differences that affect what the same weights compute. `old` is the value in `there`."""
    return [difference for difference in differences(dump(there), dump(here)) if not difference.within(FREE)]


def _named(names: Collection[str], wanted: Collection[str], given: Collection[str], advice: str) -> list[str]:
    """Returns those of the `wanted` parameters whose names end with one of `names`, compared part by part.

    Raises `ConfigError` when a name matches none, or matches one that is `given`.
    """
    found: set[str] = set()
    for name in names:
        if not (meant := ending_in(name, wanted)):
            raise ConfigError(f"the model has no parameter {name}", where="init_new", next=advice)
        if known := [each for each in meant if each in given]:
            raise ConfigError(f"{name} names what the weights at init_from have: {', '.join(known)}", where="init_new", next=advice)
        found |= {*meant}
    return [name for name in wanted if name in found]


def _explained(there: LlamaConfig, here: LlamaConfig, new: Collection[str]) -> list[str]:
    """Returns the keys of `here` that may differ if the parameters `new` are not among the weights.

    These are the class of a slot, if it adds only new parameters to those of the class there, and the settings that this class alone has.
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
    """Returns the overrides that make the model that of the weights. For a slot whose class no option has, it names the class."""
    if any(name == "_target_" for name, _, _ in found):
        return "another model=, or weights of this one's class, which docs/variants.md makes of a Llama's under A model of your own"
    slots = [name.removesuffix("._target_") for name, _, _ in found if name.endswith("._target_")]
    typed, values = [], [each for each in found if not each.within(slots)]
    for slot in slots:
        wanted = dump(getattr(there, slot))
        files = [path for folder in conf_dirs() for path in sorted((folder / "model" / slot).glob("*.yaml"))]
        options = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) or {} for path in files}
        options = {name: {key: _number(value) for key, value in tree.items()} for name, tree in options.items()}
        left = {name: differences(tree, wanted, slot) for name, tree in options.items() if tree.get("_target_") == wanted["_target_"]}
        option = min(left, key=lambda name: len(left[name]), default=f"an option with {wanted['_target_']}")
        typed.append(f"model/{slot}={option}")
        values += [Difference(each.key, each.new, None) for each in left.get(option, []) if not each.within(FREE)]
    typed += [f"model.{name}={'null' if value is None else value}" for name, value, _ in values]
    return f"another model=, or {' '.join(typed)}"


def _number(value: Any) -> Any:
    """The number that a text of YAML means: YAML 1.1 reads 5e5 as text. Anything else as it is."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value
