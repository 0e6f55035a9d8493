"""What to type instead of a key, option, flag or word that does not exist."""

import difflib
import itertools
import pathlib
import re
from collections.abc import Callable, Sequence

import yaml

from llama_eqx.config import TYPO, nearest
from llama_eqx.errors import ConfigError

# Hydra's, without --experimental-rerun: it unpickles a file, which can run anything.
FLAGS = ("help", "cfg", "resolve", "package", "run", "multirun", "config-path", "config-name", "config-dir", "info", "hydra-help",
         "version", "shell-completion")  # fmt: skip

# What other projects call some of the keys and groups.
ELSEWHERE = {
    **dict.fromkeys(("lr", "learning_rate", "max_lr"), "schedule.peak"),
    **dict.fromkeys(("d_model", "dim", "hidden_size", "n_embd"), "model.dims.embed"),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_hidden_layers"), "model.dims.layers"),
    **dict.fromkeys(("ffn", "ff", "mlp_type"), "model/feed_forward"),
    **dict.fromkeys(("epochs", "max_steps", "max_iters", "iterations"), "train.steps"),
}

OPEN = ("mesh.compiler_options.", "sharding.axes.")  # the keys within are whatever the compiler and the model's annotations name


def check_words(overrides: Sequence[str], keys: Callable[[], list[str]]) -> None:
    """Raises `ConfigError` for `train.steps 5`, `help`, and the rest of a value with spaces whose quotes are missing."""
    for before, word, following in zip(["", *overrides], overrides, [*overrides[1:], ""], strict=False):
        if "=" in word or word.startswith("~"):
            continue
        advice = "KEY=VALUE, or --help"
        if following and "=" not in following and word in keys():
            advice = f"{word}={following}"
        elif "=" in before:
            advice += f"; a value with spaces needs quotes: '{before.partition('=')[0]}=SEVERAL WORDS'"
        raise ConfigError(f"{word!r} is not KEY=VALUE", where=" ".join(overrides), next=advice)


def check_flags(arguments: Sequence[str], keys: Callable[[], list[str]]) -> None:
    """Raises `ConfigError` for `--steps 5` and `--train.steps=5`, for which Hydra's parser would print a page, and for -m with --cfg."""
    if {"-m", "--multirun"} & {*arguments} and {"-c", "--cfg"} & {argument.partition("=")[0] for argument in arguments}:
        raise ConfigError("-m makes one config per job, and --cfg shows only one", where="-m", next="--cfg job with the values of one job")
    for flag, following in itertools.pairwise([*arguments, ""]):
        word, _, value = flag.removeprefix("--").partition("=")
        if flag.startswith("--") and word not in FLAGS and (not any(known.startswith(word) for known in FLAGS) or word in keys()):
            key, known_keys = word.replace("-", "_"), keys()
            value = value or ("VALUE" if not following or following.startswith("-") or "=" in following else following)
            key = key if key in known_keys else _meant(key, known_keys) or "KEY"
            advice = f"{key}={value}"
            if word == "experimental-rerun":
                advice = "the command of that run again; its settings are in the config.yaml of its run_dir"
            raise ConfigError(f"no such flag: --{word}", where=flag, next=advice)


def no_option(group: str, option: str, where: str, folders: Sequence[pathlib.Path]) -> ConfigError:
    options = [path.stem for folder in folders for path in (folder / group).glob("*.yaml") if not path.stem.startswith("_")]
    is_path = group == "data" and re.search(r"[/.]", option)
    advice = f"data=text data.path={option}" if is_path else nearest(option, options, len(options))  # --cfg job does not show them
    if advice.startswith("did you mean") and len(options) <= 20:
        advice += f" There are {', '.join(sorted(options))}"
    return ConfigError(f"{group} has no option {option!r}", where=where, next=advice)


def instead(key: str, keys: list[str], overrides: Sequence[str], folders: Sequence[pathlib.Path]) -> str:
    """What to type instead of, or beside, a key or group that does not exist."""
    if key == "plan":
        return "model=NAME mesh=NAME, whose plan is used automatically"
    if key in ("rung", "stage") or key.startswith("experiment/"):
        experiment = key.partition("/")[2] or "NAME"
        return f"experiment={experiment} {override_of(key, overrides)}: it exists only within experiments"
    group, _, field = key.rpartition(".")
    group = group.replace(".", "/")
    if group and any((folder / group).is_dir() for folder in folders):
        files = sorted(path for folder in folders for path in (folder / group).glob("[!_]*.yaml"))
        if owners := [f"{group}={path.stem}" for path in files if field in (yaml.safe_load(path.read_text()) or {})]:
            return f"choose an option that has it first: {', '.join(owners)}"
    keys = [key for key in keys if not key.endswith("_target_") and not key.startswith("hydra")]
    parent = key[: len(key) - len(_last(key))]
    siblings = [other for other in keys if parent and other.startswith(parent) and parent + _last(other) == other]
    if parent in OPEN:
        return f"+{override_of(key, overrides)} adds it" + (f"; there are {', '.join(map(_last, siblings))}" if siblings else "")
    if meant := _meant(key, keys):
        return f"did you mean {meant}?"
    return f"one of: {', '.join(siblings)}" if 0 < len(siblings) <= 30 else nearest(key, keys)


def override_of(key: str, overrides: Sequence[str]) -> str:
    """The override of the key or group itself, else the first of a key within it, or of the group at another place."""
    found = [(len(match[0]), override) for override in overrides if (match := re.match(rf"[+~]*{re.escape(key)}(?=[=.@/]|$)", override))]
    exact = [override for end, override in found if override[end : end + 1] in ("=", "")]
    return next(iter(exact or [override for _, override in found]), "")


def _meant(key: str, keys: list[str]) -> str:
    """The key that is meant: one of that name in `ELSEWHERE`, or a similar one beside it, or anywhere; "" if none is near."""
    word, parent = _last(key), key[: len(key) - len(_last(key))]
    if ELSEWHERE.get(word) in keys:
        return ELSEWHERE[word]
    for known in ([other for other in keys if parent + _last(other) == other], keys):
        if near := difflib.get_close_matches(word, [*map(_last, known)], 1, TYPO):
            return difflib.get_close_matches(key, [other for other in known if _last(other) == near[0]], 1, 0)[0]
    return ""


def _last(key: str) -> str:
    return re.split(r"[./]", key)[-1]
