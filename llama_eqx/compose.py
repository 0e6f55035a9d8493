"""Builds a config from YAML and overrides. Only this module, `verb` and the launcher import Hydra."""

import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llama_eqx.advice import check_words, instead, no_option, override_of
from llama_eqx.config import Config, load, nearest
from llama_eqx.errors import ConfigError, UserError, first_line
from llama_eqx.extensions import conf_dir, conf_dirs

# Keys whose values are text or paths: what a user types after "=" is taken as it stands, whatever commas, quotes or braces it has.
VERBATIM = (
    "prompt",
    "prompts",
    "system",
    "draft",
    "quantize_text",
    "checkpoint",
    "path",
    "against",
    "run_dir",
    "data.path",
    "data.prompt",
    "tokenizer.path",
    "init_from",
    "from",
    "to",
    "input",
    "output",
    "bundle",
    "tasks",
    "include_path",
    "tracking.wandb.notes",
)

PLANNED = ("train", "plan")  # verbs that take the settings planned for a model on a mesh

HYDRAS = (HydraException, OmegaConfBaseException)  # errors, for `explained` to explain


def sweep_name(overrides: list[str]) -> str:
    """The name of a sweep's folder, the same for the same overrides. It has no = and no comma, which would need quotes in `runs=[…]`."""
    said = re.sub(r"[^\w.-]+", "_", " ".join(overrides))[:60]
    return f"{said}-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:6]}"


OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
OmegaConf.register_new_resolver("registered", lambda question, name: registration().registered(question, name), replace=True)
OmegaConf.register_new_resolver("tuned", lambda *arm: registration().tuned(*arm), replace=True)


def registration() -> Any:
    from llama_eqx.studies import registration  # which knows YAML and no JAX, but few configs ask for it

    return registration


def home(name: str) -> pathlib.Path:
    """The folder that a verb is composed from. A verb with keys that are also names of groups has its own folder, without any group."""
    own = conf_dir() / name
    return own if (own / f"{name}.yaml").is_file() else conf_dir()


def load_config(*overrides: str, name: str = "train", plan: bool = True) -> Any:
    """`conf/<name>.yaml` with Hydra overrides such as "model=llama3_2_1b" or "train.steps=100", as frozen dataclasses.

    Settings planned for the model on the mesh come first, see `planned`, unless `plan` is False.

    Raises `ConfigError` naming the key and the nearest right one.
    """
    config = resolve(compose(name, planned(name, overrides) if plan else list(overrides)))
    if not isinstance(config, Config):
        raise ConfigError(f"conf/{name}.yaml has no _target_")
    return config


def plan_file(overrides: Sequence[str]) -> pathlib.Path:
    """The file that has, or would have, the settings planned for a model on a mesh."""
    said = values(overrides)
    name = pathlib.PurePath("plan", f"{said.get('model', 'llama3_1m')}_{said.get('mesh', 'local')}.yaml")
    return next((folder / name for folder in conf_dirs() if (folder / name).is_file()), conf_dir() / name)


def planned(name: str, overrides: Sequence[str]) -> list[str]:
    """The overrides `from_plan`, then `overrides`.

    Hydra's defaults lists cannot do this: a file included by an interpolated name may not choose options of groups.
    """
    return [*from_plan(name, overrides), *overrides]


def from_plan(name: str, overrides: Sequence[str]) -> list[str]:
    """The plan's overrides for keys and groups that `overrides` leave alone; none with an experiment, whose own settings they would beat.

    The plan's microbatch is left out if it does not divide the user's batch. The plan's batch, microbatch and row length are left out if
    the user names a recipe, which has sizes of its own.
    """
    path, said = plan_file(overrides), values(override for override in overrides if not override.startswith("~"))  # ~ needs a key to delete
    if name not in PLANNED or not path.is_file() or "experiment" in said:
        return []

    def left_alone(override: str) -> bool:
        (key,) = values([override])
        if "recipe" in said and key in ("train.batch_size", "train.microbatch_size", "train.seq_len"):
            return False
        return not any(key == other or key.startswith(f"{other}.") for other in said if other != "mesh")

    taken = [*filter(left_alone, yaml.safe_load(path.read_text())["overrides"])]
    batch, microbatch = said.get("train.batch_size"), values(taken).get("train.microbatch_size")
    if batch and microbatch and not _divides(microbatch, batch):
        taken = [override for override in taken if "train.microbatch_size" not in values([override])]
    return taken


def values(overrides: Iterable[str]) -> dict[str, str]:
    return {key.lstrip("+~"): value for key, _, value in (override.partition("=") for override in overrides)}


def _divides(part: str, whole: str) -> bool:
    return part == "null" or (part.isdigit() and whole.isdigit() and int(part) > 0 and int(whole) % int(part) == 0)


def quoted(override: str) -> str:
    """Quotes an override such as `prompt=it's` or `profile=true`, so that its value passes through Hydra unchanged."""
    key, equals, value = override.partition("=")
    if not equals or re.sub(r"^(data\.components|eval_data)\.\w+", "data", key.lstrip("+")) not in VERBATIM or value == "null":
        return quoted_options(override)
    return literal(key, os.path.expanduser(value) if key == "run_dir" else value)  # not every shell expands it after a "="


def literal(key: str, value: str) -> str:
    """The override that gives a key this text, whatever characters it has."""
    value = re.sub(r"(\\*)(\"|$)", lambda found: found[1] * 2 + found[2].replace('"', '\\"'), value)
    value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)  # backslashes before it count as escapes too
    return f'{key}="{value}"'


def quoted_options(override: str) -> str:
    """Quotes the options of an override such as `profile=true,false`, which Hydra would take for bools or numbers."""
    key, _, value = override.partition("=")
    if not re.fullmatch(r"(true|false|[\d.]+)(,(true|false|[\d.]+))*", value) or not key or not _is_group(key):
        return override
    return f"{key}=" + ",".join(f'"{option}"' for option in value.split(","))


def _is_group(name: str) -> bool:
    return any((folder / name).is_dir() for folder in conf_dirs())


def compose(name: str, overrides: list[str]) -> DictConfig:
    """The merged YAML, not yet checked against the dataclasses."""
    check_words(overrides, lambda: keys(name, []))
    check_groups(overrides)
    check_recipe(overrides)
    try:
        return _compose(name, overrides)
    except (*HYDRAS, ValueError) as error:  # Hydra raises the last for an option that is no text
        raise explained(error, name, overrides) from None


def _said_within(error: BaseException | None) -> UserError | None:
    """The error of one of the resolvers above, if that led to `error`."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def check_recipe(overrides: Sequence[str]) -> None:
    """Raises `ConfigError` for a recipe that does not exist. A model's recipe is optional, so Hydra would silently go on."""
    options = [path.stem for folder in conf_dirs() for path in (folder / "recipe").glob("*.yaml")]
    chosen = next((value for key, _, value in (override.partition("=") for override in overrides) if key == "recipe"), "")
    for option in chosen.replace('"', "").split(",") if re.fullmatch(r"[\w.,\"-]+", chosen) else ():
        if option not in options:
            raise ConfigError(f"recipe has no option {option!r}", where="recipe", next=nearest(option, options))


def check_groups(overrides: Sequence[str]) -> None:
    """Raises `ConfigError` for a group written with dots, as in `model.norm=layer`."""
    for override in overrides:
        key, _, value = override.partition("=")
        if "." in key and value and value[0] not in "{$" and _is_group(group := key.replace(".", "/")):
            raise ConfigError(f"{key} is a group, which is written with /", where=override, next=f"{group}={value}")


def resolve(config: DictConfig) -> Any:
    """Resolves interpolations once, to plain containers, then builds the config classes; Hydra's `instantiate` is never used."""
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        said = _said_within(error) or ConfigError(first_line(error), where=str(getattr(error, "full_key", "") or ""))
        raise said from None
    assert isinstance(tree, dict)
    tree.pop("hydra", None)
    try:
        return load(tree)
    except ConfigError as error:
        if ((tree.get("study") or {}).get("stage"), error.what, error.where) != ("tune", "no such key: holdout", "data"):
            raise
        raise ConfigError(
            "stage=tune holds out a part of the training text, and this data is no text that it can cut",
            where="data.holdout",
            next="data=text data.path=FOLDER, the same as text; or '~data.holdout', and data of its own to tune on; or tune_arms: [] in "
            "prereg.yaml: see docs/experiments.md",
        ) from None


def _compose(name: str, overrides: list[str]) -> DictConfig:
    for group, _, option in (override.lstrip("+").partition("=") for override in overrides):
        if _is_group(group.partition("@")[0]) and (".." in option.split("/") or option.startswith("/")):
            raise no_option(group, option, group, conf_dirs())
    outer = GlobalHydra.instance().hydra  # the caller's own, if any
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(home(name)), version_base="1.3"):
            return hydra_compose(name, overrides)
    finally:
        GlobalHydra.instance().hydra = outer


def explained(error: Exception, name: str, overrides: list[str]) -> UserError:
    """Hydra's exception as a sentence with the nearest key or option."""
    if said := _said_within(error):
        return said
    text = str(error)
    if match := re.search(r"Could not find '([\w/]+/[^']+)'", text):
        group = next((str(path) for path in pathlib.PurePath(match[1]).parents if _is_group(str(path))), "")
        return no_option(group, match[1].removeprefix(f"{group}/"), override_of(group, overrides), conf_dirs())
    if match := re.search(r"Could not override '(?P<key>[^']+)'|Key '(?P<bare>[^']+)' is not in struct", text):
        key = match["key"] or match["bare"]
        advice = instead(key, keys(name, overrides), overrides, conf_dirs())
        return ConfigError(f"no such key: {key}", where=override_of(key, overrides), next=advice)
    if match := re.search(r"Ambiguous value for argument '(?P<key>[^=]+)=(?P<values>.*)'", text):
        advice = f"'{match['key']}=[{match['values']}]' if it is a list, -m for a sweep, or quotes around a value with commas"
        return ConfigError("several values for one key make a sweep", where=match["key"], next=advice)
    hint = ""
    if isinstance(error, OverrideParseException):
        hint = "values with commas, braces or = need quotes: 'key=\"value\"'"
    elif "is defined before" in text:
        hint = "in a list of defaults, entries that override a group come last"
    return ConfigError(first_line(error), where=" ".join(overrides), next=hint)


def keys(name: str, overrides: list[str]) -> list[str]:
    """Every dotted key and every group of a verb, composed with the overrides that choose options, if those compose."""
    groups = [str(path.parent.relative_to(folder)) for folder in conf_dirs() for path in folder.rglob("*.yaml")]
    choices = [override for override in overrides if override.split("=")[0].lstrip("+") in groups]
    try:
        config = _compose(name, choices)
    except HYDRAS:
        config = _compose(name, [])

    def walk(node: Any, path: str) -> list[str]:
        if not isinstance(node, dict):
            return [path]
        return [path] * bool(path) + [key for name, child in node.items() for key in walk(child, f"{path}.{name}".strip("."))]

    groups = [group for group in groups if name in PLANNED or group.split("/")[0] in config]
    return sorted({*walk(OmegaConf.to_container(config), ""), *groups} - {"."})
